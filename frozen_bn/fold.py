"""Folding a frozen batch normalization into the convolution before it, for training too:

    bn(conv(x, W, b)) = conv(x, W * scale, (b - mean) * scale + bias)

with ``scale = weight / sqrt(var + eps)`` along the output channels. Autograd differentiates the
right-hand side: the gradients of ``W``, ``b`` and a trainable affine are exact, and the output of
the convolution is not needed for any of them (unlike for the affine gradient of ``bn``).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import arithmetic_dtype
from .modules import _FrozenBatchNorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


class _Folded(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float
    sources: list[Tensor]  # what it was made of,
    state: list[tuple[Any, ...]]  # and how that was then
    kept: list[Any]  # the storages, so that their addresses do not recur


#: By batch normalization, what was folded while no gradient was wanted.
_cache: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


def is_normalized_by(conv: nn.Module, bn: _FrozenBatchNorm) -> bool:
    """Whether ``conv`` is a convolution as torch has it, whose output ``bn`` accepts."""
    if type(conv) not in _CONVOLUTIONS and type(conv) not in _TRANSPOSED:
        return False
    rank = cast(Tensor, conv.weight).dim()
    return bool(conv.out_channels == bn.num_features) and (not bn._ranks or rank in bn._ranks)


def _factor_of_transposed(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """``scale`` to be multiplied with the weight of a transposed convolution, which is
    ``[in, out / groups, ...]``."""
    rows = weight.shape[0] // groups
    factor = scale.reshape(groups, 1, -1).expand(-1, rows, -1)
    return factor.reshape([weight.shape[0], -1] + [1] * (weight.dim() - 2))


def fold(conv: nn.Module, bn: _FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and bias of the convolution that does the work of both, in the dtype of ``conv``,
    computed in float32 (float64 if that is its dtype) and rounded once. Differentiable."""
    weight = cast(Tensor, conv.weight)
    dtype = arithmetic_dtype(weight)
    scale = 1 / torch.sqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = bn.weight.to(dtype) * scale
    shift = -bn.running_mean.to(dtype)
    if conv.bias is not None:
        shift = shift + conv.bias.to(dtype)  # type: ignore[operator]
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    if type(conv) in _TRANSPOSED:
        factor = _factor_of_transposed(weight, scale, conv.groups)  # type: ignore[arg-type]
    else:
        factor = scale.reshape([-1] + [1] * (weight.dim() - 1))
    return (weight.to(dtype) * factor).to(weight.dtype), shift.to(weight.dtype)


def _folded(conv: nn.Module, bn: _FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """:func:`fold`, computed anew only after a change where no gradient is wanted."""
    sources = conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var
    tensors = [t for t in sources if isinstance(t, Tensor)]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiated or any(t.is_inference() for t in tensors):
        _cache.pop(bn, None)
        return fold(conv, bn)
    storages = [t.untyped_storage() for t in tensors]
    state = [(id(t), t._version, t.untyped_storage()._cdata, t.dtype) for t in tensors]
    known = _cache.get(bn)
    if known is None or known.state != state or known.eps != bn.eps:
        # Outside of inference mode, for a later call may save them for its backward pass.
        with torch.inference_mode(False), torch.no_grad():
            known = _Folded(*fold(conv, bn), bn.eps, tensors, state, storages)
        _cache[bn] = known
    return known.weight, known.bias


def convolve(conv: nn.Module, bn: _FrozenBatchNorm, input: Tensor) -> Tensor:
    """``bn(conv(input))`` by one convolution, but for an activation that ``bn`` has."""
    if input.dim() != cast(Tensor, conv.weight).dim():  # no batch: ``bn`` has something to say
        return bn.normalize(conv(input), None, None, 0.0, False)
    weight, bias = _folded(conv, bn)
    transposed = _TRANSPOSED.get(type(conv))
    if transposed is None:
        return conv._conv_forward(input, weight, bias)  # type: ignore[operator, no-any-return]
    geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    return transposed(input, weight, bias, *geometry)  # type: ignore[no-any-return]
