"""The input checks of csrc/checks.h, in the same words, for the paths that never reach the kernels:
fake tensors, and plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: The position of an activation is its code in the operators (csrc/affine.h).
ACTIVATIONS: tuple[str | None, ...] = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")

#: Those whose gradient needs one bit an element, and those whose gradient needs the input.
MASKED = frozenset(map(ACTIVATIONS.index, ("relu", "relu6", "leaky_relu")))
SMOOTH = frozenset(map(ACTIVATIONS.index, ("silu", "hardswish")))

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


#: Rows of the coefficients tensor, and of that of a pair (csrc/affine.h).
ROWS, PAIR_ROWS = 4, 5


class Statistics(NamedTuple):
    """What a branch is normalized with: vectors of ``[C]``, of any supported dtype."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


#: What the operator calls them.
_RESIDUAL_NAMES = (
    "residual_mean",
    "residual_var",
    "residual_weight",
    "residual_bias",
    "residual_eps",
)


def mismatch(op: str, expected: str, got: str) -> str:
    """What the error for an input that ``op`` cannot take says."""
    return f"frozen_bn::{op}: expected {expected}, but got {got}"


def fail(op: str, expected: str, got: str) -> RuntimeError:
    """That error."""
    return RuntimeError(mismatch(op, expected, got))


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for a float64 tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def activation_code(activation: str | None, op: str = "forward") -> int:
    """The code of an activation, or a ``ValueError`` that lists those there are."""
    try:
        return ACTIVATIONS.index(activation)
    except ValueError:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(
            f"frozen_bn::{op}: expected activation to be one of {known}, but got {activation!r}"
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


def check_rank(op: str, name: str, tensor: Tensor) -> None:
    """Raise ``RuntimeError`` unless ``tensor`` has a dimension of channels."""
    if tensor.dim() < 2:
        raise fail(op, f"{name} to have at least 2 dimensions", f"shape {list(tensor.shape)}")


def _check_channel_vector(op: str, name: str, vector: Tensor | None, input: Tensor) -> None:
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != input.shape[1]:
        raise fail(op, f"{name} to have shape [{input.shape[1]}]", str(list(vector.shape)))
    _check_dtype(op, name, vector)
    _check_device(op, name, vector, input)


def _check_like(op: str, name: str, tensor: Tensor | None, input: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != input.shape:
        raise fail(op, f"{name} to have shape {list(input.shape)}", str(list(tensor.shape)))
    if tensor.dtype != input.dtype:
        raise fail(op, f"{name} to be {_dtype(input.dtype)}", _dtype(tensor.dtype))
    _check_device(op, name, tensor, input)


def _check_not_expanded(op: str, name: str, tensor: Tensor) -> None:
    strides = tensor.stride()
    if 0 not in strides:
        return
    if any(s == 0 and n > 1 for s, n in zip(strides, tensor.shape, strict=True)) and tensor.numel():
        raise fail(op, f"{name} not to be expanded in memory", f"strides {list(strides)}")


def _check_internal(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int], input: Tensor
) -> None:
    if tensor.dtype != dtype or not tensor.is_contiguous() or list(tensor.shape) != shape:
        raise fail(
            op,
            f"{name} to be contiguous {_dtype(dtype)} of shape {shape}",
            f"{_dtype(tensor.dtype)} of shape {list(tensor.shape)}",
        )
    _check_device(op, name, tensor, input)


def _check_coefficients(op: str, coefficients: Tensor, input: Tensor, pair: bool) -> None:
    dtype = arithmetic_dtype(input)
    shape = [PAIR_ROWS if pair else ROWS, input.shape[1]]
    _check_internal(op, "coefficients", coefficients, dtype, shape, input)


def _check_mask(op: str, mask: Tensor, input: Tensor) -> None:
    _check_internal(op, "mask", mask, torch.uint8, [(input.numel() + 7) // 8], input)


def _check_code(op: str, code: int) -> None:
    if not 0 <= code < len(ACTIVATIONS):
        last = len(ACTIVATIONS) - 1
        raise fail(op, f"activation to be a code from 0 to {last}", str(code))


def _check_statistics(
    op: str, names: tuple[str, ...], statistics: Statistics, input: Tensor
) -> None:
    *vectors, eps = statistics
    *vector_names, eps_name = names
    for name, vector in zip(vector_names, vectors, strict=True):
        _check_channel_vector(op, name, vector, input)
    if not 0 <= eps < math.inf:  # in terms that torch.compile traces
        raise fail(op, f"{eps_name} to be finite and >= 0", f"{eps:g}")


def check_forward(
    input: Tensor,
    statistics: Statistics,
    residual: Tensor | None,
    residual_statistics: Statistics | None = None,
) -> None:
    """Raise ``RuntimeError`` unless ``frozen_bn::forward``, or with statistics of the residual
    ``frozen_bn::forward_pair``, can take these."""
    op = "forward" if residual_statistics is None else "forward_pair"
    check_rank(op, "input", input)
    _check_dtype(op, "input", input)
    _check_statistics(op, Statistics._fields, statistics, input)
    _check_like(op, "residual", residual, input)
    if residual_statistics is not None:
        _check_statistics(op, _RESIDUAL_NAMES, residual_statistics, input)


def check_scripted(input: Tensor, running_mean: Tensor, residual: Tensor | None) -> None:
    """Of these checks those that keep PyTorch from broadcasting or casting without a word, in the
    part of Python that TorchScript compiles."""
    shape = input.shape
    if len(shape) < 2:
        expected = "input to have at least 2 dimensions"
        raise RuntimeError(mismatch("forward", expected, f"shape {shape}"))
    if not input.is_floating_point():
        expected = "input to be float16, bfloat16, float32 or float64"
        raise RuntimeError(mismatch("forward", expected, "another dtype"))
    if running_mean.shape[0] != shape[1]:
        expected = f"running_mean to have shape [{shape[1]}]"
        raise RuntimeError(mismatch("forward", expected, f"{running_mean.shape}"))
    if residual is not None and residual.shape != shape:
        expected = f"residual to have shape {shape}"
        raise RuntimeError(mismatch("forward", expected, f"{residual.shape}"))


def check_history(input: Tensor, op: str = "forward") -> None:
    """Raise ``RuntimeError`` where autograd could not record that ``input`` is overwritten."""
    # Autograd refuses these too, but only after a custom Function has written to them.
    if not input._is_view():
        return
    kinds = torch._C._autograd.CreationMeta
    unwritable = {
        kinds.MULTI_OUTPUT_NODE: "one of multiple views that one node returned",
        kinds.NO_GRAD_MODE: "one made in no_grad mode",
        kinds.INFERENCE_MODE: "one made in inference mode",
        kinds.IN_CUSTOM_FUNCTION: "one made in a custom Function",
    }
    kind = torch._C._autograd._get_creation_meta(input)
    if kind in unwritable:
        expected = "input to be a view that autograd can follow when inplace=True"
        raise fail(op, expected, unwritable[kind])


def check_inplace(input: Tensor, op: str = "forward") -> None:
    """Raise ``RuntimeError`` where writing to ``input`` would break its gradient or itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        root = input._base if input._is_view() else input
        if root is not None and root.is_leaf and root.requires_grad:
            kind = "a view of a leaf" if root is not input else "a leaf"
            raise fail(
                op,
                "input not to be a leaf that requires grad when inplace=True",
                f"{kind} that does",
            )
        if input.requires_grad:
            check_history(input, op)
    _check_not_expanded(op, "input", input)


def check_forward_outputs(
    input: Tensor,
    activation: int,
    output: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
    pair: bool = False,
) -> None:
    """Raise ``RuntimeError`` unless the forward operator can write its results to these."""
    op = "forward_pair" if pair else "forward"
    _check_code(op, activation)
    _check_like(op, "output", output, input)
    _check_not_expanded(op, "output", output)
    if coefficients is not None:
        _check_coefficients(op, coefficients, input, pair)
    if mask is not None:
        _check_mask(op, mask, input)


def check_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    activation: int,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> None:
    """Raise ``RuntimeError`` unless ``frozen_bn::backward`` can take these."""
    op = "backward"
    _check_code(op, activation)
    check_rank(op, "grad_output", grad_output)
    _check_dtype(op, "grad_output", grad_output)
    pair = coefficients.dim() == 2 and coefficients.shape[0] == PAIR_ROWS
    _check_coefficients(op, coefficients, grad_output, pair)
    if pair:
        for name, gradient in (("grad_weight", grad_weight), ("grad_bias", grad_bias)):
            if gradient is not None:
                raise fail(op, f"no {name} of a pair", f"shape {list(gradient.shape)}")
        if residual is None and activation in SMOOTH:
            raise fail(op, "residual", "None")
    if activation in MASKED:
        if mask is None:
            raise fail(op, "mask", "None")
        _check_mask(op, mask, grad_output)
        if grad_input is None:
            raise fail(op, "grad_input", "None")
    if input is None and (activation in SMOOTH or grad_weight is not None):
        raise fail(op, "input", "None")
    _check_like(op, "input", input, grad_output)
    _check_like(op, "residual", residual, grad_output)
    _check_like(op, "grad_input", grad_input, grad_output)
    _check_like(op, "grad_residual", grad_residual, grad_output)
    for name, gradient in (("grad_input", grad_input), ("grad_residual", grad_residual)):
        if gradient is not None:
            _check_not_expanded(op, name, gradient)
    for name, gradient in (("grad_weight", grad_weight), ("grad_bias", grad_bias)):
        _check_channel_vector(op, name, gradient, grad_output)
        if gradient is not None and not gradient.is_contiguous():
            raise fail(op, f"{name} to be contiguous", f"stride [{gradient.stride(0)}]")
