"""What calling an object of a class does, where that is known: of torch's classes, which somebody
may patch or derive from, and of this package's."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .fold import CONVOLUTIONS, VECTORS

_OF_CONVOLUTIONS = ("forward", "_conv_forward", "_output_padding")

#: What torch's classes do, as it was at first.
_originals = {
    kind: {name: getattr(kind, name, None) for name in _OF_CONVOLUTIONS}
    for kind in (*CONVOLUTIONS, *activations.TORCHS)
}
SEQUENTIAL = nn.Sequential.forward
MODULE_CALL = nn.Module.__call__


def is_convolution(kind: type) -> bool:
    """Whether it is one of torch's classes, or computes what that does."""
    base: Any = next((base for base in kind.__mro__ if base in CONVOLUTIONS), None)
    return base is not None and _is_called(kind) and _is_original(kind, base)


def _is_original(kind: type, base: type) -> bool:
    return all(getattr(kind, name, None) is _originals[base][name] for name in _OF_CONVOLUTIONS)


def _is_called(kind: Any) -> bool:
    """Whether calling it is calling its forward."""
    return kind.__call__ is MODULE_CALL


def is_frozen(kind: Any) -> bool:
    """Whether it is one of this package's classes, or computes what that does."""
    if not issubclass(kind, _FrozenBatchNorm):
        return False
    names = ("forward", "normalize", "check_rank", "_vectors")
    own = all(getattr(kind, name) is getattr(_FrozenBatchNorm, name) for name in names)
    vectors = (getattr(kind, name, None) for name in VECTORS)
    own = own and _is_called(kind)
    return own and not any(isinstance(vector, property) for vector in vectors)


def is_sequential(kind: Any) -> bool:
    """Whether calling it is calling its children one after the other, and nothing else."""
    forward = getattr(kind, "forward", None)  # or a rewritten one, which tells of which (classes)
    return (
        issubclass(kind, nn.Sequential)
        and _is_called(kind)
        and getattr(forward, "written", forward) is SEQUENTIAL
        and kind.__iter__ is nn.Sequential.__iter__
    )


def is_activation(kind: type) -> bool:
    """Whether it is a class of activations or identities that is known, and not patched."""
    known = issubclass(kind, nn.Module) and activations.is_known(kind)
    return known and (kind not in _originals or _is_original(kind, kind))
