"""The formula in plain PyTorch: the oracle of the tests, and the path taken wherever the kernels
do not apply (compilers, tracers, transforms, other devices)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    Statistics,
    activation_code,
    arithmetic_dtype,
    check_forward,
    check_inplace,
    check_scripted,
)


def activate(z: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    if activation is None:
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "relu6":
        return F.relu6(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "silu":
        return F.silu(z)
    if activation == "hardswish":
        return F.hardswish(z)
    raise ValueError(f"frozen_bn: unknown activation {activation}")


def _slope(z: Tensor, activation: str | None) -> Tensor:
    """The derivative of a smooth activation, itself differentiable and transformable."""
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    inner = torch.where(z < 3, z / 3 + 0.5, 1.0)
    return torch.where(z <= -3, 0.0, inner)


def in_torchs_order(input: Tensor) -> Tensor:
    """``input`` in the memory order that the output of ``torch.nn.BatchNorm2d`` would have:
    contiguous, or channels_last where it is that; copied if it is neither. What comes next may
    take a ``view`` of it."""
    if input.is_contiguous():
        return input
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        compiling = torch.compiler.is_compiling()
        # Inside of vmap a tensor cannot be asked for channels_last.
        if not compiling and torch._C._are_functorch_transforms_active():
            return input
    if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        return input
    if input.dim() == 5 and input.is_contiguous(memory_format=torch.channels_last_3d):
        return input
    return input.contiguous()


def _broadcastable(vector: Tensor, like: Tensor) -> Tensor:
    """``[C]`` to ``[1, C, 1, ...]``."""
    return vector.reshape([1, -1] + [1] * (like.dim() - 2))


def _normalize(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """In the dtype of the arithmetic."""
    dtype = arithmetic_dtype(input)
    scale = torch.rsqrt(running_var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    mean = _broadcastable(running_mean.to(dtype), input)
    z = (input.to(dtype) - mean) * _broadcastable(scale, input)
    return z if bias is None else z + _broadcastable(bias.to(dtype), input)


def frozen_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """What ``frozen_bn.frozen_batch_norm`` computes, as a composition of PyTorch operators.

    Same arguments, dtypes, shapes and errors; differentiable any number of times in every tensor
    argument, and transformable by ``torch.func``, ``torch.compile`` and the tracers.
    """
    activation_code(activation)
    if inplace:
        check_inplace(input)
    statistics = Statistics(running_mean, running_var, weight, bias, eps)
    check_forward(input, statistics, residual)
    return positional(input, *statistics, activation, negative_slope, residual, inplace)


def positional(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """:func:`frozen_batch_norm` in the part of Python that TorchScript compiles, which has no
    keyword-only arguments."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        check_scripted(input, running_mean, residual)
    ordered = input if inplace else in_torchs_order(input)
    z = _normalize(ordered, running_mean, running_var, weight, bias, eps)
    if residual is not None:
        z = z + residual.to(z.dtype)
    output = activate(z, activation, negative_slope).to(input.dtype)
    if inplace:
        return input.copy_(output)
    return output


def frozen_batch_norm_pair(
    input: Tensor,
    statistics: Statistics,
    residual: Tensor,
    residual_statistics: Statistics,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Tensor:
    """What :func:`frozen_bn.pair.frozen_batch_norm_pair` computes, likewise. The sum of the two
    branches is rounded once."""
    activation_code(activation, "forward_pair")
    if inplace:
        check_inplace(input, "forward_pair")
    statistics, residual_statistics = Statistics(*statistics), Statistics(*residual_statistics)
    check_forward(input, statistics, residual, residual_statistics)
    ordered = input if inplace else in_torchs_order(input)
    z = _normalize(ordered, *statistics) + _normalize(residual, *residual_statistics)
    output = activate(z, activation, negative_slope).to(input.dtype)
    if inplace:
        return input.copy_(output)
    return output


def backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    strides: tuple[int, ...],
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The gradients of input, weight, bias and residual as differentiable functions of the tensors
    given: the backward pass under ``create_graph=True``.

    ``coefficients`` and ``mask`` are what ``frozen_bn::forward`` saved; ``weight`` and ``bias`` are
    given where they are differentiable. The weight gradient is ``None`` without ``input``.
    """
    dtype = coefficients.dtype
    mean, scale, shift, inv_std = (_broadcastable(row, grad_output) for row in coefficients)
    if weight is not None:
        scale = _broadcastable(weight.to(dtype), grad_output) * inv_std
    if bias is not None:
        shift = _broadcastable(bias.to(dtype), grad_output)
    z = None
    if mask is None and activation is not None:
        assert input is not None
        z = (input.to(dtype) - mean) * scale + shift
        if residual is not None:
            z = z + residual.to(dtype)
    g = _behind_activation(grad_output.to(dtype), z, mask, strides, activation, negative_slope)
    others = [d for d in range(grad_output.dim()) if d != 1]
    grad_weight = None
    if input is not None:
        grad_weight = (g * (input.to(dtype) - mean) * inv_std).sum(others)
    return (g * scale).to(grad_output.dtype), grad_weight, g.sum(others), g.to(grad_output.dtype)


def pair_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    strides: tuple[int, ...],
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Likewise of a pair: the gradients of input and residual."""
    dtype = coefficients.dtype
    rows = (_broadcastable(row, grad_output) for row in coefficients)
    mean, scale, shift, residual_mean, residual_scale = rows
    z = None
    if input is not None and residual is not None:
        z = (input.to(dtype) - mean) * scale + shift
        z = z + (residual.to(dtype) - residual_mean) * residual_scale
    g = _behind_activation(grad_output.to(dtype), z, mask, strides, activation, negative_slope)
    return (g * scale).to(grad_output.dtype), (g * residual_scale).to(grad_output.dtype)


def _behind_activation(
    g: Tensor,
    z: Tensor | None,
    mask: Tensor | None,
    strides: tuple[int, ...],
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """The gradient of the pre-activation: from a mask, from ``z`` itself (smooth), or as it is."""
    if mask is not None:
        slope = negative_slope if activation == "leaky_relu" else 0.0
        return torch.where(_unpack(mask, g.shape, strides), g * slope, g)
    return g if z is None else g * _slope(z, activation)


def _unpack(mask: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The bits of a mask as booleans, in the shape of the tensor that they belong to, which had
    these strides. They are in the order of its storage, gaps closed."""
    dense = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten()[: shape.numel()].as_strided(shape, dense).bool()
