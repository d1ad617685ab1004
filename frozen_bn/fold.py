"""Folding a frozen batch normalization into the convolution before it, for training too:

    bn(conv(x, W, b)) = conv(x, W * scale, (b - mean) * scale + bias)

with ``scale = weight / sqrt(var + eps)`` along the output channels. Autograd differentiates the
right-hand side: the gradients of ``W``, ``b`` and a trainable affine are exact, and the output of
the convolution is not needed for any of them (unlike for the affine gradient of ``bn``).
"""

from __future__ import annotations

from collections.abc import Callable
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


class _Kept(NamedTuple):
    values: tuple[Tensor, Tensor]
    state: list[object]  # how what they were made of was then
    sources: list[Tensor]  # what that is, and its storages, so that no address recurs
    storages: list[Any]


_Cache = WeakKeyDictionary[nn.Module, _Kept]

#: By batch normalization: factor and shift, while they are constants, and the folded weight and
#: bias, while no gradient of them is wanted.
_coefficients: _Cache = WeakKeyDictionary()
_folds: _Cache = WeakKeyDictionary()

# Fused optimizers write without counting it as a modification.
register_optimizer_step_post_hook(lambda *_: _folds.clear())


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


class _Sources(NamedTuple):
    """What is folded, each read once: a parametrization computes anew at every reading, and one
    like spectral_norm counts them."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    bn: Statistics

    @classmethod
    def of(cls, conv: nn.Module, bn: _FrozenBatchNorm) -> _Sources:
        weight, bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias)
        return cls(weight, bias, bn.statistics())

    def vectors(self) -> list[Tensor]:
        return [t for t in (self.conv_bias, *self.bn) if isinstance(t, Tensor)]


def _factor_and_shift(conv: nn.Module, sources: _Sources) -> tuple[Tensor, Tensor]:
    """What the weight is multiplied with, and the new bias, in the dtype of the arithmetic."""
    weight, conv_bias, (mean, var, bn_weight, bn_bias, eps) = sources
    dtype = arithmetic_dtype(weight)
    scale = 1 / torch.sqrt(var.to(dtype) + eps)
    if bn_weight is not None:
        scale = bn_weight.to(dtype) * scale
    shift = -mean.to(dtype)
    if conv_bias is not None:
        shift = shift + conv_bias.to(dtype)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(dtype)
    if _transposed(conv):
        return _factor_of_transposed(weight, scale, conv.groups), shift  # type: ignore[arg-type]
    return scale.reshape([-1] + [1] * (weight.dim() - 1)), shift


def _multiply(weight: Tensor, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return (weight.to(factor.dtype) * factor).to(weight.dtype), shift.to(weight.dtype)


def fold(conv: nn.Module, bn: _FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and bias of the convolution that does the work of both, in the dtype of ``conv``,
    computed in float32 (float64 if that is its dtype) and rounded once. Differentiable."""
    sources = _Sources.of(conv, bn)
    return _multiply(sources.conv_weight, *_factor_and_shift(conv, sources))


def is_sharded(module: nn.Module) -> bool:
    """Whether its parameters are FSDP's."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def _is_written_unseen(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether autograd is not told of new values: FSDP gathers parameters, and DDP broadcasts
    buffers, without counting it as a modification."""
    parallel = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    return parallel is not None or is_sharded(conv) or is_sharded(bn)


def _keep(
    cache: _Cache,
    bn: _FrozenBatchNorm,
    sources: list[Tensor],
    dtype: torch.dtype,
    make: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """What ``make`` returns, made anew only after a change of the sources."""
    storages = [t.untyped_storage() for t in sources]
    state: list[object] = [bn.eps, dtype]
    state += [
        (id(t), t._version, t.dtype, storage._cdata, t.storage_offset())
        for t, storage in zip(sources, storages, strict=True)
    ]
    known = cache.get(bn)
    if known is None or known.state != state:
        # Outside of inference mode, for a later call may save them for its backward pass.
        with torch.inference_mode(False), torch.no_grad():
            known = _Kept(make(), state, sources, storages)
        cache[bn] = known
    return known.values


def _folded(conv: nn.Module, bn: _FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """:func:`fold`, with what is constant computed anew only after a change."""
    sources = _Sources.of(conv, bn)
    weight, vectors, dtype = sources.conv_weight, sources.vectors(), sources.conv_weight.dtype
    counted = not _is_written_unseen(conv, bn)

    def of_vectors() -> tuple[Tensor, Tensor]:
        # An optimizer could write them, and perhaps without counting it.
        if not counted or any(t.requires_grad or t.is_inference() for t in vectors):
            return _factor_and_shift(conv, sources)
        arithmetic = arithmetic_dtype(weight)
        return _keep(
            _coefficients, bn, vectors, arithmetic, lambda: _factor_and_shift(conv, sources)
        )

    tensors = [weight, *vectors]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiated or not counted or any(t.is_inference() for t in tensors):
        _folds.pop(bn, None)
        return _multiply(weight, *of_vectors())
    return _keep(_folds, bn, tensors, dtype, lambda: _multiply(weight, *of_vectors()))


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
    own, later = (None, bias) if bias_later else (bias, None)
    transposed = _transposed(conv)
    if transposed is None:
        return conv._conv_forward(input, weight, own), later  # type: ignore[operator]
    geometry = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
    return transposed(input, weight, own, *geometry), later
