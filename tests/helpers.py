"""What several test files use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import frozen_bn

VECTORS = ["weight", "bias", "running_mean", "running_var"]
ACTIVATIONS = [None, "relu", "relu6", "leaky_relu", "silu", "hardswish"]


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch normalization in ``module``, frozen or live, the values of a trained one."""
    generator = torch.Generator().manual_seed(seed)

    def uniform_(target: Tensor | None) -> None:
        if target is not None:
            target.data.copy_(torch.rand(target.shape, generator=generator) + 0.5)

    def normal_(target: Tensor | None) -> None:
        if target is not None:
            target.data.copy_(torch.randn(target.shape, generator=generator))

    for layer in module.modules():
        if isinstance(getattr(layer, "running_var", None), Tensor):
            uniform_(layer.weight)
            normal_(layer.bias)
            normal_(layer.running_mean)
            uniform_(layer.running_var)
            if isinstance(getattr(layer, "num_batches_tracked", None), Tensor):
                layer.num_batches_tracked.fill_(7)
    return module


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, in order, dtypes and values; NaN equals NaN."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def _runnable(level: str) -> bool:
    try:
        frozen_bn._C.select_cpu_level(level)
    except ValueError:
        return False
    return True


#: The instruction sets of the CPU kernels that this machine can run, the best one last.
CPU_LEVELS = [level for level in ("portable", "avx2", "avx512", "avx512_bf16") if _runnable(level)]
