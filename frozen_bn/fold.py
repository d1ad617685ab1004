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
from torch.optim.optimizer import register_optimizer_step_post_hook

from .checks import Statistics, arithmetic_dtype
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

# Fused optimizers write without counting it as a modification.
register_optimizer_step_post_hook(lambda *_: _cache.clear())


def is_normalized_by(conv: nn.Module, bn: _FrozenBatchNorm) -> bool:
    """Whether ``conv`` is a convolution as torch has it, whose output ``bn`` accepts."""
    if type(conv) not in _CONVOLUTIONS and type(conv) not in _TRANSPOSED:
        return False
    rank = cast(Tensor, conv.weight).dim()
    return bool(conv.out_channels == bn.num_features) and (not bn._ranks or rank in bn._ranks)


def _transposed(conv: nn.Module) -> Any:
    """The function of a transposed convolution, whose class a parametrization may have changed."""
    return next((f for kind, f in _TRANSPOSED.items() if isinstance(conv, kind)), None)


def _factor_of_transposed(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """``scale`` to be multiplied with the weight of a transposed convolution, which is
    ``[in, out / groups, ...]``."""
    rows = weight.shape[0] // groups
    factor = scale.reshape(groups, 1, -1).expand(-1, rows, -1)
    return factor.reshape([weight.shape[0], -1] + [1] * (weight.dim() - 2))


class Sources(NamedTuple):
    """What is folded, each read once: a parametrization computes anew at every reading, and one
    like spectral_norm counts them."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    bn: Statistics

    @classmethod
    def of(cls, conv: nn.Module, bn: _FrozenBatchNorm) -> Sources:
        weight, bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias)
        return cls(weight, bias, bn.statistics())

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self[:2], *self.bn) if isinstance(t, Tensor)]


def fold(conv: nn.Module, sources: Sources) -> tuple[Tensor, Tensor]:
    """The weight and bias of the convolution that does the work of both, computed in float32
    (float64 if that is the dtype of ``conv``), the weight rounded once to that of ``conv``.
    Differentiable."""
    weight, conv_bias, (mean, var, bn_weight, bn_bias, eps) = sources
    dtype = arithmetic_dtype(weight)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if bn_weight is not None:
        scale = bn_weight.to(dtype) * scale
    mean = mean.to(dtype)
    if conv_bias is not None:
        mean = mean - conv_bias.to(dtype)
    elif scale.requires_grad:
        mean = mean.clone()  # which autograd saves, while DDP may write to the buffer
    if bn_bias is not None:
        bias = torch.addcmul(bn_bias.to(dtype), mean, scale, value=-1)
    else:
        bias = -mean * scale
    if _transposed(conv):
        factor = _factor_of_transposed(weight, scale, conv.groups)  # type: ignore[arg-type]
    else:
        factor = scale.reshape([-1] + [1] * (weight.dim() - 1))
    return (weight.to(dtype) * factor).to(weight.dtype), bias


def is_sharded(module: nn.Module) -> bool:
    """Whether its parameters are FSDP's."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def _is_written_unseen(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether autograd is not told of new values: FSDP gathers parameters, and DDP broadcasts
    buffers, without counting it as a modification; a CUDA graph is replayed."""
    parallel = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    capturing = torch.cuda.is_current_stream_capturing  # which fails where there is no GPU
    captured = torch.cuda.is_initialized() and capturing()  # type: ignore[no-untyped-call]
    return parallel is not None or is_sharded(conv) or is_sharded(bn) or captured


def _folded(conv: nn.Module, bn: _FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """:func:`fold`, computed anew only after a change where no gradient is wanted."""
    sources = Sources.of(conv, bn)
    tensors = sources.tensors()
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    uncounted = any(t.is_inference() for t in tensors) or _is_written_unseen(conv, bn)
    if differentiated or uncounted:
        _cache.pop(bn, None)
        return fold(conv, sources)
    storages = [t.untyped_storage() for t in tensors]
    state = [
        (id(t), t._version, t.dtype, storage._cdata, t.storage_offset())
        for t, storage in zip(tensors, storages, strict=True)
    ]
    known = _cache.get(bn)
    if known is None or known.state != state or known.eps != bn.eps:
        # Outside of inference mode, for a later call may save them for its backward pass.
        with torch.inference_mode(False), torch.no_grad():
            known = _Folded(*fold(conv, sources), bn.eps, tensors, state, storages)
        if type(known.weight) is Tensor:  # not one of FakeTensorMode's
            _cache[bn] = known
    return known.weight, known.bias


def convolve(
    conv: nn.Module, bn: _FrozenBatchNorm, input: Tensor, bias_later: bool
) -> tuple[Tensor, Tensor | None]:
    """``bn(conv(input))`` by one convolution, but for an activation that ``bn`` has.

    With ``bias_later`` the second result has yet to be added: a kernel that passes over the output
    anyway does so for nothing, where cuDNN's convolutions are followed by another pass.
    """
    rank = len(conv.kernel_size)  # type: ignore[arg-type]
    if input.dim() != rank + 2:  # no batch: ``bn`` has something to say
        return bn.normalize(conv(input), None, None, 0.0, False), None
    weight, bias = _folded(conv, bn)
    own, later = (None, bias) if bias_later else (bias.to(weight.dtype), None)
    transposed = _transposed(conv)
    if transposed is None:
        return conv._conv_forward(input, weight, own), later  # type: ignore[operator]
    geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    return transposed(input, weight, own, *geometry), later
