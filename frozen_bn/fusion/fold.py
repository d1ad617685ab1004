"""Folding a frozen batch normalization into the convolution before it, for training too:

    bn(conv(x, W, b)) = conv(x, W * scale, (b - mean) * scale + bias)

with ``scale = weight / sqrt(var + eps)`` along the output channels. Autograd differentiates the
right-hand side: the gradients of ``W``, ``b`` and a trainable affine are exact, and the output of
the convolution is not needed for any of them (unlike for the affine gradient of ``bn``).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import Statistics, arithmetic_dtype
from ..functional import frozen_batch_norm
from ..modules import _FrozenBatchNorm

VECTORS = ("weight", "bias", "running_mean", "running_var")
_TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def is_normalized_by(conv: nn.Module, bn: _FrozenBatchNorm) -> bool:
    """Whether ``conv`` is a convolution as torch has it, whose output ``bn`` accepts."""
    if type(conv) not in CONVOLUTIONS:
        return False
    rank = cast(Tensor, conv.weight).dim()
    return bool(conv.out_channels == bn.num_features) and (not bn._ranks or rank in bn._ranks)


def applies(conv: nn.Module, bn: _FrozenBatchNorm, input: Tensor) -> bool:
    """Whether they can be one; without a batch, ``bn`` has something to say."""
    rank = len(cast(tuple[int, ...], conv.kernel_size)) + 2
    return input.dim() == rank and is_normalized_by(conv, bn)


def _factor_of_transposed(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """``scale`` to be multiplied with the weight of a transposed convolution, which is
    ``[in, out / groups, ...]``."""
    rows = weight.shape[0] // groups
    factor = scale.reshape(groups, 1, -1).expand(-1, rows, -1)
    return factor.reshape([weight.shape[0], -1] + [1] * (weight.dim() - 2))


def _scale(bn: Statistics, dtype: torch.dtype) -> Tensor:
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    return scale if bn.weight is None else bn.weight.to(dtype) * scale


def _folded_weight(conv: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """Rounded once to the dtype of ``weight``; half precision is widened by the product itself."""
    if type(conv) in _TRANSPOSED:
        factor = _factor_of_transposed(weight, scale, conv.groups)  # type: ignore[arg-type]
    else:
        factor = scale.reshape([-1] + [1] * (weight.dim() - 1))
    return (weight * factor).to(weight.dtype)


def _folded_bias(own: Tensor | None, bn: Statistics, scale: Tensor) -> Tensor:
    """In the dtype of ``scale``. ``own``: the convolution's."""
    mean = bn.running_mean.to(scale.dtype)
    if own is not None:
        mean = mean - own.to(scale.dtype)
    elif scale.requires_grad:
        mean = mean.clone()  # which autograd saves, while DDP may write to the buffer
    if bn.bias is None:
        return -mean * scale
    return torch.addcmul(bn.bias.to(scale.dtype), mean, scale, value=-1)


def fold(conv: nn.Module, bn: _FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and bias of the convolution that does the work of both, computed in float32
    (float64 if that is the dtype of ``conv``), the weight rounded once to that of ``conv``.
    Differentiable. Each is read once: a parametrization computes anew at every reading, and one
    like spectral_norm counts them."""
    weight, statistics = cast(Tensor, conv.weight), bn.statistics()
    scale = _scale(statistics, arithmetic_dtype(weight))
    bias = _folded_bias(cast(Tensor | None, conv.bias), statistics, scale)
    return _folded_weight(conv, weight, scale), bias


def is_sharded(module: nn.Module) -> bool:
    """Whether its parameters are FSDP's."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def is_trained(conv: nn.Module, bn: _FrozenBatchNorm) -> bool:
    """Whether a gradient is wanted of what would be folded."""
    parameters = (*conv.parameters(), *bn.parameters())
    return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """What autocast makes of a weight that has another dtype."""
    device = weight.device.type
    if device == "meta" or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return None if dtype == weight.dtype else dtype


def convolve(
    conv: nn.Module, statistics: Statistics, input: Tensor, bias_later: bool
) -> tuple[Tensor, Tensor | None]:
    """``bn(conv(input))`` by one convolution. With ``bias_later`` the second result has yet to be
    added: a kernel that passes over the output anyway does so for nothing, where cuDNN's
    convolutions are followed by another pass.

    Nothing is kept from call to call: the vectors and weights are written to by too many, and in
    too many ways, to notice it.
    """
    source, own = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias)
    scale = _scale(statistics, arithmetic_dtype(source))
    weight, later = _folded_weight(conv, source, scale), None
    narrow = _autocast_dtype(source) if own is None and not bias_later else None
    if narrow is not None:
        # Made in the dtype that the convolution wants, which else would cast it: what the layer
        # makes of no bias.
        zeros = torch.zeros_like(statistics.running_mean, dtype=narrow)
        own = frozen_batch_norm(zeros.unsqueeze(0), *statistics).squeeze(0)
    else:
        bias = _folded_bias(own, statistics, scale)
        own, later = (None, bias) if bias_later else (bias.to(weight.dtype), None)
    transposed = _TRANSPOSED.get(type(conv))
    if transposed is None:
        return conv._conv_forward(input, weight, own), later  # type: ignore[operator]
    geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    return transposed(input, weight, own, *geometry), later
