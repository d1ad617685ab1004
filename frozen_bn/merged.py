"""What the fused forwards call: frozen batch normalizations together with their neighbours.

Everywhere, ``into`` says that a sum was written ``+=``, which keeps the left side's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import SMOOTH, activation_code
from .fold import Rest
from .functional import activate
from .modules import _FrozenBatchNorm
from .pair import frozen_batch_norm_pair


def input_is_saved(bn: _FrozenBatchNorm, activation: str | None) -> bool:
    """Whether a backward pass reads the input, which then must not be overwritten."""
    _, _, weight, _ = bn._vectors()
    return activation_code(activation) in SMOOTH or (weight is not None and weight.requires_grad)


def _may_overwrite(bn: _FrozenBatchNorm, activation: str | None, overwrite: bool) -> bool:
    """Whether the output may take the place of an input that nothing else reads."""
    return overwrite and not (torch.is_grad_enabled() and input_is_saved(bn, activation))


def _is_plain_sum(a: Tensor, b: Any) -> bool:
    """Of tensors, without broadcasting and promotion: what the kernels can add."""
    return isinstance(b, Tensor) and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _add(a: Tensor, b: Tensor, into: bool) -> Tensor:
    return (a + b).to(a.dtype) if into else a + b


def normalize(
    bn: _FrozenBatchNorm,
    input: Tensor,
    overwrite: bool,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    into: bool,
) -> Tensor:
    """``act(bn(input) + residual)``, written over ``input`` if nothing else will read it."""
    if residual is not None and not _is_plain_sum(input, residual):
        normalized = normalize(bn, input, overwrite, None, None, 0.0, False)
        return reference.activate(_add(normalized, residual, into), activation, negative_slope)
    inplace = bn.inplace or _may_overwrite(bn, activation, overwrite)
    return bn.normalize(input, residual, activation, negative_slope, inplace)


def normalize_branches(
    bn: _FrozenBatchNorm,
    input: Tensor,
    overwrite: bool,
    other_bn: _FrozenBatchNorm,
    other_input: Tensor,
    overwrite_other: bool,
    activation: str | None,
    negative_slope: float,
    into: bool,
) -> Tensor:
    """``act(bn(input) + other_bn(other_input))``."""
    trained = bn.trains_affine() or other_bn.trains_affine()
    if trained or not _is_plain_sum(input, other_input):
        residual = normalize(other_bn, other_input, overwrite_other, None, None, 0.0, False)
        return normalize(bn, input, overwrite, residual, activation, negative_slope, into)
    bn.check_rank(input)
    return frozen_batch_norm_pair(
        input,
        bn.statistics(),
        other_input,
        other_bn.statistics(),
        activation=activation,
        negative_slope=negative_slope,
        inplace=_may_overwrite(bn, activation, overwrite),
    )


def add_and_activate(
    convolved: tuple[Tensor, Rest],
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    into: bool,
) -> Tensor:
    """``act(input + bias + residual)``, written over ``input``, the output of a convolution whose
    bias, if there is one here, is still to be added; or ``act(bn(input) + residual)``."""
    input, bias = convolved
    if isinstance(bias, _FrozenBatchNorm):
        return normalize(bias, input, True, residual, activation, negative_slope, into)
    if residual is not None and not _is_plain_sum(input, residual):
        if bias is not None:
            input = activate(input, bias, None, None, 0.0)
        input, bias, residual = _add(input, residual, into), None, None
    if bias is None and residual is None and activation is None:
        return input
    return activate(input, bias, residual, activation, negative_slope)
