"""What steps hand to each other: a convolution, or a batch normalization, that waits for what
follows; what it can take in, and how it is computed.

``rewrite`` makes sure that nothing else sees it, and that what it is made of does not change in
between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import functional
from ..checks import ACTIVATIONS, SMOOTH
from ..functional import _functorch_active, has_kernels
from ..modules import _FrozenBatchNorm
from ..pair import frozen_batch_norm_pair
from . import fold

_SMOOTH = {ACTIVATIONS[code] for code in SMOOTH}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_grad_enabled, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled


class Merge(NamedTuple):
    """What one computation did, for summary()."""

    layer: _FrozenBatchNorm
    added: str  # "", "add", "two branches"
    activation: str | None
    conv: nn.Module | None
    folded: bool
    in_place: bool


#: Told of every Merge, while summary() runs a model.
recorders: list[Callable[[Merge], None]] = []


class Convolution:
    """A convolution of ``input``; with ``output``, one that has been run. Nothing else has the
    output, unless ``conv`` is None."""

    __slots__ = ("conv", "input", "output")

    def __init__(self, conv: nn.Module, input: Tensor) -> None:
        self.conv: Any = conv
        self.input: Any = input
        self.output: Any = None


class Normalized:
    """``bn(input) + other``, until ``output`` is there. With ``conv``, nothing else has ``input``.
    ``folded``, ``input`` is that of the convolution until ``bias`` is there, then its output but
    for that. It is computed in the modes in which it was made."""

    __slots__ = (
        *("bn", "branch", "conv", "folded", "grad", "inference"),
        *("input", "other", "output", "bias"),
    )

    def __init__(self, bn: _FrozenBatchNorm, conv: Any, folded: bool, input: Tensor) -> None:
        self.bn, self.conv, self.folded = bn, conv, folded
        self.input: Any = input
        self.other: Any = None
        self.output: Any = None
        self.bias: Tensor | None = None
        self.branch: _FrozenBatchNorm | None = None  # whose output is added
        self.grad, self.inference = _grad_enabled(), _inference()


def convolved(c: Convolution) -> Any:
    """Its output."""
    if c.output is None:
        c.output, c.input = c.conv(c.input), None
    return c.output


def value(x: Any) -> Any:
    """``x``, computed if it is pending. From now on others may have it."""
    kind = type(x)
    if kind is Normalized:
        return compute(x)
    if kind is Convolution:
        output = convolved(x)
        x.conv = None
        return output
    return x


def settle(x: Any) -> Any:
    """``x``, computed as far as it rests on what layers may change that are called before the next
    step: not on statistics and weights."""
    kind = type(x)
    if kind is Convolution:
        convolved(x)
    elif kind is Normalized and x.output is None:
        other = x.other
        if x.conv is None or not (other is None or (type(other) is Normalized and other.conv)):
            compute(x)
        elif x.folded:
            _unfold(x)
    return x


def waits(x: Any) -> bool:
    """Whether more can be done by the computation of ``x``."""
    return (
        type(x) is Normalized
        and x.output is None
        and x.grad is _grad_enabled()
        and x.inference is _inference()
    )


def takes(n: Any, other: Any, second: bool = False) -> bool:
    """Whether ``n`` can add ``other``, and then does; ``second``: to it, of whose strides it is."""
    if not waits(n) or n.other is not None or n is other:
        return False
    if n.folded:
        _unfold(n)
    branch = other.bn if waits(other) and other.other is None else None
    pair = branch is not None and not (
        n.folded or other.folded or n.bn.trains_affine() or branch.trains_affine()
    )
    addend, x = other.input if pair else value(other), n.input
    if type(addend) is not Tensor or addend.shape != x.shape:
        return False
    if addend.dtype != x.dtype or addend.device != x.device:
        return False
    if second and addend.stride() != x.stride():
        return False
    n.other, n.branch = other if pair else addend, branch
    return True


def _unfold(n: Normalized) -> None:
    """Runs the convolution, with the layer's scale in its weight; the bias is left to a later pass.
    Where nothing of that is to be trained, that pass does it all for the same price."""
    if n.bias is not None:
        return
    conv, n.folded = n.conv, fold.is_trained(n.conv, n.bn) or not has_kernels(n.input)
    if n.folded:
        n.input, n.bias = fold.convolve(conv, n.bn.statistics(), n.input, True)
    else:
        n.input = conv(n.input)


def compute(n: Normalized) -> Any:
    """The value of ``n``, in the modes in which it was written."""
    if n.output is not None:
        return n.output
    if n.grad is _grad_enabled() and n.inference is _inference():
        return finish(n)
    with torch.inference_mode(n.inference), torch.set_grad_enabled(n.grad):
        return finish(n)


def finish(n: Normalized, activation: str | None = None, slope: float = 0.01) -> Any:
    """All that waits, and an activation of it."""
    n.output = _kernel(n, activation, slope)
    n.input = n.other = n.bias = n.conv = None
    return n.output


def _kernel(n: Normalized, activation: str | None, slope: float) -> Any:
    """All that is pending, by one call."""
    bn, other, folded = n.bn, n.other, n.folded
    if folded and (other is not None or activation is not None):
        _unfold(n)
    in_place = n.conv is not None and not n.folded and _may_overwrite(n, activation)
    if recorders:
        _record(n, activation, folded, in_place and not folded)
    if n.folded:
        if n.bias is None:
            return fold.convolve(n.conv, bn.statistics(), n.input, False)[0]
        return functional.activate(n.input, n.bias, other, activation, slope)
    if type(other) is Normalized:
        branches = n.input, bn.statistics(), other.input, other.bn.statistics()
        options: dict[str, Any] = {"activation": activation, "negative_slope": slope}
        return frozen_batch_norm_pair(*branches, **options, inplace=in_place)
    return bn.normalize(n.input, other, activation, slope, in_place)


def _may_overwrite(n: Normalized, activation: str | None) -> bool:
    """Whether the output may take the place of an input that nothing else has."""
    if n.input.is_inference() is not n.inference or _dispatch_modes():
        return False  # or somebody keeps what operators return
    if not n.grad:
        return not n.input.requires_grad  # nor would the result
    weight = n.bn.__dict__["_parameters"].get("weight")
    saved = activation in _SMOOTH or (weight is not None and weight.requires_grad)
    return not (saved or _functorch_active() or forward_ad._current_level >= 0)


def _record(n: Normalized, activation: str | None, folded: bool, in_place: bool) -> None:
    other = n.other
    added = "two branches" if n.branch is not None else "add" if other is not None else ""
    merges = [Merge(n.bn, added, activation, n.conv, folded, in_place)]
    if type(other) is Normalized:
        merges.append(Merge(other.bn, added, activation, other.conv, False, other.conv is not None))
    elif n.branch is not None:
        merges.append(Merge(n.branch, added, activation, None, False, False))
    for recorder in recorders:
        for merge in merges:
            recorder(merge)
