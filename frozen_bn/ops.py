"""Loads the compiled operators ``torch.ops.frozen_bn.*``, and gives them fakes."""

from __future__ import annotations

import sysconfig
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import checks

#: The devices that have kernels, and why the others of the two have none.
live: set[str] = set()
unavailable: dict[str, str] = {}


def _load_cpu() -> None:
    try:
        from . import _C  # noqa: F401  (importing it registers the operators)

        live.add("cpu")
    except ImportError as error:
        unavailable["cpu"] = str(error)
        unavailable["cuda"] = "the CPU half is missing"
        warnings.warn(
            f"frozen_bn: the compiled kernels could not be loaded ({error}); running plain PyTorch "
            "instead, which gives the same results more slowly",
            stacklevel=3,
        )


def _load_cuda() -> None:
    library = Path(__file__).with_name("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not library.exists():
        unavailable["cuda"] = "not built"
    elif torch.version.cuda is None:
        unavailable["cuda"] = "this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            live.add("cuda")
        except OSError as error:
            unavailable["cuda"] = str(error)
            warnings.warn(
                f"frozen_bn: the CUDA kernels could not be loaded ({error}); running plain "
                "PyTorch on CUDA tensors instead",
                stacklevel=3,
            )


_load_cpu()
if "cpu" in live:
    _load_cuda()


def _fake_forward(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    output: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
) -> None:
    # The results are the caller's: there is nothing to make up.
    statistics = checks.Statistics(running_mean, running_var, weight, bias, eps)
    checks.check_forward(input, statistics, residual)
    checks.check_forward_outputs(input, activation, output, coefficients, mask)


def _fake_forward_pair(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    activation: int,
    negative_slope: float,
    output: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
) -> None:
    checks.check_forward(
        input,
        checks.Statistics(running_mean, running_var, weight, bias, eps),
        residual,
        checks.Statistics(
            residual_mean, residual_var, residual_weight, residual_bias, residual_eps
        ),
    )
    checks.check_forward_outputs(input, activation, output, coefficients, mask, pair=True)


def _fake_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    activation: int,
    negative_slope: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> None:
    checks.check_backward(
        grad_output,
        coefficients,
        mask,
        input,
        residual,
        activation,
        grad_input,
        grad_weight,
        grad_bias,
        grad_residual,
    )


if "cpu" in live:
    torch.library.register_fake("frozen_bn::forward")(_fake_forward)
    torch.library.register_fake("frozen_bn::forward_pair")(_fake_forward_pair)
    torch.library.register_fake("frozen_bn::backward")(_fake_backward)
