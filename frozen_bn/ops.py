"""The compiled operators ``torch.ops.frozen_bn.*``: loading them, and their fake implementations."""

from __future__ import annotations

import sysconfig
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import checks

#: Why the CPU or CUDA kernels are not there; absent where they are.
unavailable: dict[str, str] = {}


def _load_cpu() -> None:
    try:
        from . import _C  # noqa: F401  (importing it registers the operators)
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
            torch.ops.load_library(library)
        except OSError as error:
            unavailable["cuda"] = str(error)
            warnings.warn(
                f"frozen_bn: the CUDA kernels could not be loaded ({error}); running plain "
                "PyTorch on CUDA tensors instead",
                stacklevel=3,
            )


_load_cpu()
if "cpu" not in unavailable:
    _load_cuda()


def _mask_like(input: Tensor) -> Tensor:
    return input.new_empty([(input.numel() + 7) // 8], dtype=torch.uint8)


def _saved_like(input: Tensor, activation: int, save: bool) -> tuple[Tensor | None, Tensor | None]:
    if not save:
        return None, None
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    coefficients = input.new_empty([4, input.shape[1]], dtype=dtype)
    has_mask = checks.ACTIVATIONS[activation] in ("relu", "relu6", "leaky_relu")
    return coefficients, _mask_like(input) if has_mask else None


def _fake_forward_(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    save: bool,
) -> tuple[Tensor | None, Tensor | None]:
    checks.check_forward(input, running_mean, running_var, weight, bias, residual, eps)
    return _saved_like(input, activation, save)


def _fake_forward(
    input: Tensor, *arguments: object
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    saved = _fake_forward_(input, *arguments)  # type: ignore[arg-type]
    return torch.empty_like(input), *saved


def _fake_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    strides: list[int],
    activation: int,
    negative_slope: float,
    input_gradient: bool,
    weight_gradient: torch.dtype | None,
    bias_gradient: torch.dtype | None,
    residual_gradient: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    def dense() -> Tensor:
        return grad_output.new_empty_strided(grad_output.shape, strides)

    def vector(dtype: torch.dtype) -> Tensor:
        return grad_output.new_empty([grad_output.shape[1]], dtype=dtype)

    return (
        dense() if input_gradient else None,
        vector(weight_gradient) if weight_gradient else None,
        vector(bias_gradient) if bias_gradient else None,
        dense() if residual_gradient else None,
    )


if "cpu" not in unavailable:
    torch.library.register_fake("frozen_bn::forward")(_fake_forward)
    torch.library.register_fake("frozen_bn::forward_")(_fake_forward_)
    torch.library.register_fake("frozen_bn::backward")(_fake_backward)
