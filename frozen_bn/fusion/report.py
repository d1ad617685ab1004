"""What became of each frozen layer: by the sources of the methods, or in a run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .. import activations
from ..checks import ACTIVATIONS, SMOOTH
from ..modules import _FrozenBatchNorm
from . import fold
from .classes import made, reasons
from .flow import uses_in
from .kinds import is_convolution
from .pending import Merge, recorders
from .uses import Sum, Uses, is_free, sole


class Fate(NamedTuple):
    """What became of a layer."""

    merged: str = ""  # with what: "relu", "add + relu", "two branches + relu"
    folded_into: str = ""  # the name of the convolution; "?" until `_named` finds it
    in_place: bool = False
    reason: str = ""  # if nothing of it
    conv: nn.Module | None = None  # before it, if nothing else reads its output


def _expected(layer: _FrozenBatchNorm, uses: Uses) -> Fate:
    conv = sole(uses.before.get(layer))
    alone = sole(uses.behind.get(conv)) is layer
    if not (alone and is_free(conv) and is_convolution(type(conv))):
        conv = None
    reader, added, activation = sole(uses.behind.get(layer)), "", layer.activation
    if isinstance(reader, Sum) and activation is None:
        mine = reader.a == {layer}
        other = sole({*(reader.b if mine else reader.a)})
        plain = not isinstance(other, _FrozenBatchNorm)
        if other is layer or (plain and reader.into and not mine):
            return _fate(layer, "", None, conv)
        paired = isinstance(other, _FrozenBatchNorm) and sole(uses.behind[other]) is reader
        added = "two branches" if paired else "add"
        reader = sole(uses.behind.get(reader))
    if activation is None:
        found = activations.of_module(reader) if is_free(reader) else None
        activation = reader if isinstance(reader, str) else found and found.name
    elif conv is None:
        activation = None  # nothing to do with fusing
    return _fate(layer, added, activation, conv)


def _fate(layer: _FrozenBatchNorm, added: str, activation: str | None, conv: Any) -> Fate:
    folded = conv is not None and layer.fold_conv and fold.is_normalized_by(conv, layer)
    weight = layer._vectors()[2]
    trained = weight is not None and weight.requires_grad
    smooth = ACTIVATIONS.index(activation) in SMOOTH
    in_place = conv is not None and not (folded or smooth or trained)
    merged = " + ".join(filter(None, (added, activation)))
    return Fate(merged, "?" * folded, in_place, "", conv)


def expected(root: nn.Module) -> dict[nn.Module, Fate]:
    """What the sources say."""
    uses, found = uses_in(root), dict[nn.Module, Fate]()
    for layer in root.modules():
        if isinstance(layer, _FrozenBatchNorm) and _is_fused(layer) and is_free(layer):
            own = type(layer).forward is not _FrozenBatchNorm.forward or layer.inplace
            found[layer] = Fate() if own else _expected(layer, uses)
    return _named(root, found)


def _is_fused(layer: _FrozenBatchNorm) -> bool:
    """Whether it was asked for: ``classes.fuse`` sets this."""
    return "fold_conv" in vars(layer)


def observed(root: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, Fate]:
    """What a run did."""
    found: dict[nn.Module, Fate] = {}

    def note(merge: Merge) -> None:
        own = merge.layer.activation is not None and merge.conv is None  # nothing to do with fusing
        merged = " + ".join(filter(None, (merge.added, merge.activation))) * (not own)
        new = Fate(merged, "?" * merge.folded, merge.in_place, "", merge.conv)
        if merge.conv is None and merge.layer in found:  # computed before, and then added
            new = found[merge.layer]._replace(merged=merged)
        found[merge.layer] = new

    recorders.append(note)
    try:
        with torch.random.fork_rng():
            root(*inputs)
    finally:
        recorders.remove(note)
    return _named(root, found)


def _named(root: nn.Module, found: dict[nn.Module, Fate]) -> dict[nn.Module, Fate]:
    names = {module: name for name, module in root.named_modules()}
    result: dict[nn.Module, Fate] = {}
    for layer in names:
        if isinstance(layer, _FrozenBatchNorm):
            fate = found.get(layer, Fate())
            if fate.folded_into and fate.conv is not None:
                fate = fate._replace(folded_into=names.get(fate.conv, "a convolution"))
            if _is_fused(layer) and not (fate.merged or fate.folded_into or fate.in_place):
                fate = Fate(reason=_reason(root, layer))
            result[layer] = fate
    return result


def _reason(root: nn.Module, layer: _FrozenBatchNorm) -> str:
    if not is_free(layer):
        return "it has hooks"
    if type(layer).forward is not _FrozenBatchNorm.forward:
        return f"{type(layer).__name__} has a forward of its own"
    for module in root.modules():
        if layer in module._modules.values():
            for name, reason in reasons(module).items():
                return f"{type(module).__name__}.{name}: {reason}"
    return "nothing next to it to merge with"


def fused_source(module: nn.Module) -> str:
    """The methods that run in place of those of ``module`` and of what is in it, rewritten by
    :func:`convert_frozen_bn`; each class once. (Where a compiler, a hook or the like has to see
    each call, and where a class has got another method since, the class's own runs.)"""
    texts: dict[type, str] = {}
    for part in module.modules():
        info = made(part)
        if info is not None and type(part) not in texts:
            kind = type(part)
            methods = "\n\n".join(method.text for method in info.methods.values())
            texts[kind] = f"# {kind.__module__}.{kind.__qualname__}\n{methods}\n"
    return "\n".join(texts.values())
