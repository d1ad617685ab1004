"""PyTorch's own samples of ``nn.functional.batch_norm``, run through frozen_batch_norm."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frozen_bn import frozen_batch_norm

PARAMETERS = list(inspect.signature(F.batch_norm).parameters)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def inference_samples(dtype: torch.dtype) -> list[dict]:
    """The arguments of those that normalize with given statistics, by name."""
    # PyTorch's test-suite, which has them, wants this package; it takes seconds to import.
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    batch_norm = next(op for op in op_db if op.name == "nn.functional.batch_norm")
    samples = batch_norm.sample_inputs("cpu", dtype, requires_grad=True)
    named = [
        dict(zip(PARAMETERS, (s.input, *s.args), strict=False)) | dict(s.kwargs) for s in samples
    ]
    return [sample for sample in named if not sample.get("training", False)]


def results(y: Tensor, sample: dict) -> list[Tensor]:
    leaves = [sample[name] for name in ("input", "weight", "bias") if sample.get(name) is not None]
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_inference(dtype, device):
    samples = inference_samples(dtype)
    assert len(samples) >= 4
    for sample in samples:
        # Statistics are constants here; the samples ask for their gradients in no call.
        for name in ("running_mean", "running_var"):
            sample[name] = sample[name].detach()
        ours = {n: v for n, v in sample.items() if n not in ("training", "momentum")}
        if sample["input"].dim() < 2:  # which F.batch_norm lets pass if it is empty
            with pytest.raises(RuntimeError, match="expected input to have at least 2 dimensions"):
                frozen_batch_norm(**ours)
            continue
        expected = results(F.batch_norm(**sample), sample)
        torch.testing.assert_close(results(frozen_batch_norm(**ours), sample), expected)
