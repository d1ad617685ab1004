"""The input checks of csrc/checks.h, in the same words, for the paths that never reach the kernels:
fake tensors, and plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The position of an activation is its code in the operators (csrc/affine.h).
ACTIVATIONS: tuple[str | None, ...] = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op: str, expected: str, got: str) -> RuntimeError:
    """The error for an input that ``op`` cannot take."""
    return RuntimeError(f"frozen_bn::{op}: expected {expected}, but got {got}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def activation_code(activation: str | None) -> int:
    """The code of an activation, or a ``ValueError`` that lists those there are."""
    try:
        return ACTIVATIONS.index(activation)
    except ValueError:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(
            f"frozen_bn::forward: expected activation to be one of {known}, but got {activation!r}"
        ) from None


def _check_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise fail(
            op,
            f"{name} to be float16, bfloat16, float32 or float64",
            _dtype(tensor.dtype),
        )


def _check_device(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise fail(op, f"{name} to be on {input.device}", str(tensor.device))


def _check_channel_vector(op: str, name: str, vector: Tensor | None, input: Tensor) -> None:
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != input.shape[1]:
        raise fail(op, f"{name} to have shape [{input.shape[1]}]", str(list(vector.shape)))
    _check_dtype(op, name, vector)
    _check_device(op, name, vector, input)


def _check_residual(op: str, residual: Tensor | None, input: Tensor) -> None:
    if residual is None:
        return
    if residual.shape != input.shape:
        raise fail(op, f"residual to have shape {list(input.shape)}", str(list(residual.shape)))
    if residual.dtype != input.dtype:
        raise fail(op, f"residual to be {_dtype(input.dtype)}", _dtype(residual.dtype))
    _check_device(op, "residual", residual, input)


def check_forward(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> None:
    """Raise ``RuntimeError`` unless ``frozen_bn::forward`` can take these."""
    op = "forward"
    if input.dim() < 2:
        raise fail(op, "input to have at least 2 dimensions", f"shape {list(input.shape)}")
    _check_dtype(op, "input", input)
    _check_channel_vector(op, "running_mean", running_mean, input)
    _check_channel_vector(op, "running_var", running_var, input)
    _check_channel_vector(op, "weight", weight, input)
    _check_channel_vector(op, "bias", bias, input)
    _check_residual(op, residual, input)
    if not (eps >= 0 and math.isfinite(eps)):
        raise fail(op, "eps to be finite and >= 0", f"{eps:g}")


def check_inplace(input: Tensor) -> None:
    """Raise ``RuntimeError`` where writing to ``input`` would break its gradient or itself."""
    if torch.is_grad_enabled():
        root = input._base if input._is_view() else input
        if root is not None and root.is_leaf and root.requires_grad:
            kind = "a view of a leaf" if root is not input else "a leaf"
            raise fail(
                "forward",
                "input not to be a leaf that requires grad when inplace=True",
                f"{kind} that does",
            )
    expanded = any(s == 0 and n > 1 for s, n in zip(input.stride(), input.shape, strict=True))
    if expanded:
        strides = str(list(input.stride()))
        raise fail("forward", "input not to be expanded in memory", f"strides {strides}")
