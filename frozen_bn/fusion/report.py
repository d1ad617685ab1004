"""What becomes of each frozen layer: by the sources of the methods, or in a run."""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .. import activations
from ..checks import ACTIVATIONS, SMOOTH
from ..modules import _FrozenBatchNorm
from . import steps
from .classes import Made, made, reasons
from .rewrite import Rewritten, Site, analyse
from .roles import UNKNOWN, is_sequential, look_up, parts


class Fate(NamedTuple):
    """What became of a layer."""

    merged: str = ""  # with what: "relu", "add + relu", "two branches + relu"
    folded_into: str = ""  # the name of the convolution
    in_place: bool = False
    reason: str = ""  # if nothing of it
    conv: nn.Module | None = None  # before it, if nothing else reads its output


def _fate(layer: _FrozenBatchNorm, added: str, activation: str | None, conv: Any) -> Fate:
    folded = conv is not None and layer.fold_conv
    weight = layer._vectors()[2]
    smooth = ACTIVATIONS.index(activation) in SMOOTH
    in_place = conv is not None and not folded
    in_place = in_place and not (smooth or (weight is not None and weight.requires_grad))
    merged = " + ".join(filter(None, (added, activation)))
    return Fate(merged, "?" * folded, in_place, "", conv)


def _is_plain(layer: Any) -> bool:
    kind = steps._kinds.get(type(layer)) or steps._learn(type(layer))
    return kind.handler is not None and steps._is_free(vars(layer)) and not (
        isinstance(layer, _FrozenBatchNorm) and layer.inplace
    )


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
}


class Method:
    """A rewritten method of one instance."""

    def __init__(
        self, instance: nn.Module, name: str, rewritten: Rewritten, every: bool = False
    ) -> None:
        self.instance, self.name, self.rewritten = instance, name, rewritten
        self.loop: dict[str, Any] = {}  # the variables of one
        assert rewritten.node is not None
        self.self_name = rewritten.node.args.args[0].arg
        raw = rewritten.raw is not None
        _, self.sites = analyse(rewritten.node, rewritten.roles, "steps", self.decide, raw, every)

    def decide(self, test: ast.expr) -> bool | None:
        """What a test of the instance's attributes says."""
        if isinstance(test, ast.BoolOp):
            known = [self.decide(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in known else None if None in known else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.decide(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            compare = _COMPARISONS.get(type(test.ops[0]))
            a, b = self.value(test.left), self.value(test.comparators[0])
            return None if a is UNKNOWN or b is UNKNOWN or compare is None else bool(compare(a, b))
        found = self.value(test)
        return None if found is UNKNOWN else bool(found)

    def called_methods(self) -> list[str]:
        """What of the instance it names."""
        assert self.rewritten.node is not None
        attributes = (n for n in ast.walk(self.rewritten.node) if isinstance(n, ast.Attribute))
        return [n.attr for n in attributes if getattr(n.value, "id", None) == self.self_name]

    def value(self, e: ast.expr) -> Any:
        return look_up(e, {self.self_name: self.instance, **self.loop}, run=True)

    def object(self, e: ast.expr | None) -> Any:
        """What is called."""
        found = UNKNOWN if e is None else self.value(e)
        if found is UNKNOWN and isinstance(e, ast.Name | ast.Attribute):
            names = ast.unparse(e).split(".")
            found = self.rewritten.function.__globals__.get(names[0], UNKNOWN)
            for name in names[1:]:
                found = getattr(found, name, UNKNOWN)
        return None if e is None else found

    def loops(self) -> Iterator[tuple[ast.For, dict[str, Any]]]:
        """The variables of each turn of each loop over layers."""
        assert self.rewritten.node is not None
        for node in ast.walk(self.rewritten.node):
            for item in self.items(node.iter) if isinstance(node, ast.For) else ():
                yield node, dict(_bound(node.target, item))

    def items(self, e: ast.expr) -> list[Any]:
        """What a loop runs over."""
        if isinstance(e, ast.Tuple | ast.List):
            return [tuple(map(self.value, x.elts)) if isinstance(x, ast.Tuple) else self.value(x) for x in e.elts]
        if isinstance(e, ast.Call):
            name = e.func.attr if isinstance(e.func, ast.Attribute) else ast.unparse(e.func)
            if name in ("zip", "enumerate"):
                each = [self.items(argument) for argument in e.args]
                return [*(zip(*each, strict=False) if name == "zip" else enumerate(each[0]))]
            found = self.value(e.func.value) if isinstance(e.func, ast.Attribute) else None
            if name in ("values", "children", "items", "named_children") and isinstance(found, nn.Module):
                items = [*found._modules.items()]
                return items if "s" == name[-1] and "m" in name else [v for _, v in items]
            return []
        found = self.value(e)
        return [*found._modules.values()] if isinstance(found, nn.ModuleList | nn.Sequential) else []

    def layers(self, site: Site) -> list[nn.Module]:
        found = self.object(site.callee)
        if isinstance(found, types.MethodType) and isinstance(found.__self__, nn.Module):
            info = made(found.__self__)
            rewritten = info and info.methods.get(found.__func__.__name__)
            if rewritten and rewritten.raw:
                method = Method(found.__self__, found.__func__.__name__, rewritten)
                returned = [s for s in method.sites if s.returned]
                tail = method.tail({*returned})
                if tail:
                    conv = method.conv(tail[0])
                    return [*([conv] if conv else []), tail[1]]
                return [m for s in returned for m in method.layers(s)[-1:]]
        if not isinstance(found, nn.Module):
            return []
        return [m for m in parts(found) if type(m) is not nn.Identity]

    def tail(self, sites: set[Site]) -> tuple[Site, _FrozenBatchNorm] | None:
        """The layer that is pending after one of ``sites``."""
        for site in sorted(sites, key=_line):
            layers = self.layers(site)
            if layers and isinstance(layers[-1], _FrozenBatchNorm) and _is_plain(layers[-1]):
                return site, layers[-1]
            if not layers and isinstance(self.object(site.callee), nn.Module):
                found = self.tail(site.inputs[0])
                if found:
                    return found
        return None

    def conv(self, site: Site) -> nn.Module | None:
        layers = self.layers(site)
        if len(layers) > 1:
            before: list[nn.Module] = layers[-2:-1]
        else:
            before = [m for s in site.inputs[0] for m in self.layers(s)[-1:]]
            if not before:  # an identity in between
                before = [m for s in site.inputs[0] for t in s.inputs[0] for m in self.layers(t)[-1:]]
        found = [m for m in before if type(m) in steps._CONVOLUTIONS and _is_plain(m)]
        return found[0] if found else None

    def readers(self, site: Site) -> Iterator[Site]:
        """In order, up to the first that takes its value."""
        if site.settled and (site.callee is None or (self.tail_of(site) and not self.conv(site))):
            return  # it is computed at once
        last = min(
            (s.lineno for s, callee in site.others.items() if self.object(callee) is not None or callee is None),
            default=None,
        )
        for reader in sorted(site.readers, key=_line):
            if last is not None and _line(reader) > last:
                return
            found = self.object(reader.callee)
            if reader.callee is None:
                yield reader
            elif type(found) is nn.Identity:
                yield from self.readers(reader)
            elif found is not None:
                yield reader
                return

    def activation(self, site: Site) -> str | None:
        for reader in self.readers(site):
            if reader.callee is None:
                return None
            attribute = isinstance(reader.callee, ast.Attribute) and reader.callee.attr
            found = self.object(reader.callee)
            if isinstance(found, nn.Module):
                first = [*parts(found)][:1]
                known = activations.of_module(first[0]) if first and _is_plain(first[0]) else None
            else:
                known = activations.of_call(attribute if found is UNKNOWN else found, (), {})
            return known.name if known else None
        return None

    def fates(self) -> Iterator[tuple[_FrozenBatchNorm, Fate]]:
        yield from map(self.fate, filter(self.tail_of, self.sites))
        for loop, self.loop in self.loops():
            inside = {*ast.walk(loop)}
            sites = (s for s in self.sites if s.node in inside)
            yield from map(self.fate, filter(self.tail_of, sites))

    def tail_of(self, site: Site) -> bool:
        layers = self.layers(site)
        return bool(layers) and isinstance(layers[-1], _FrozenBatchNorm) and _is_plain(layers[-1])

    def fate(self, site: Site) -> tuple[_FrozenBatchNorm, Fate]:
        layer, conv = cast(_FrozenBatchNorm, self.layers(site)[-1]), self.conv(site)
        if layer.activation is not None:
            return layer, _fate(layer, "", layer.activation if conv else None, conv)
        total = next((r for r in self.readers(site) if r.callee is None), None)
        added, last = "", site
        if total is not None:
            tails = (self.tail(sites) for sites in total.inputs)
            pair = any(tail and tail[1] is not layer for tail in tails)
            added, last = "two branches" if pair else "add", total
        return layer, _fate(layer, added, self.activation(last), conv)


def _bound(target: ast.expr, item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, ast.Name):
        yield target.id, item
    elif isinstance(target, ast.Tuple) and isinstance(item, tuple):
        for part, value in zip(target.elts, item, strict=False):
            yield from _bound(part, value)


def _line(site: Site) -> int:
    return site.node.lineno


def _in_sequential(module: nn.Module) -> Iterator[tuple[_FrozenBatchNorm, Fate]]:
    layers = [m for m in parts(module) if type(m) is not nn.Identity]
    for before, layer, after in zip([None, *layers], layers, [*layers[1:], None], strict=False):
        if isinstance(layer, _FrozenBatchNorm) and _is_plain(layer):
            conv = before if type(before) in steps._CONVOLUTIONS and _is_plain(before) else None
            known = activations.of_module(after) if after is not None and _is_plain(after) else None
            name = known.name if known else None
            if layer.activation is not None:
                name = layer.activation if conv is not None else None
            yield layer, _fate(layer, "", name, conv)


def _claims(module: nn.Module, info: Made) -> Iterator[tuple[_FrozenBatchNorm, Fate]]:
    if is_sequential(module):
        yield from _in_sequential(module)
    for name, rewritten in info.methods.items():
        if rewritten.node is not None:
            yield from Method(module, name, rewritten).fates()


def expected(root: nn.Module) -> dict[nn.Module, Fate]:
    """What the sources say."""
    found: dict[nn.Module, Fate] = {}
    for module in root.modules():
        info = made(module)
        for layer, fate in _claims(module, info) if info else ():
            if fate.merged or layer not in found or not found[layer].merged:
                found[layer] = fate
    return _named(root, found)


def observed(root: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, Fate]:
    """What a run did."""
    found: dict[nn.Module, Fate] = {}

    def note(merge: steps.Merge) -> None:
        own = merge.layer.activation is not None and merge.conv is None  # nothing to do with fusing
        merged = " + ".join(filter(None, (merge.added, merge.activation))) * (not own)
        folded = "?" * merge.folded
        found[merge.layer] = Fate(merged, folded, merge.in_place, "", merge.conv)

    steps.recorders.append(note)
    try:
        with torch.random.fork_rng():
            root(*inputs)
    finally:
        steps.recorders.remove(note)
    return _named(root, found)


def _named(root: nn.Module, found: dict[nn.Module, Fate]) -> dict[nn.Module, Fate]:
    names = {module: name for name, module in root.named_modules()}
    result: dict[nn.Module, Fate] = {}
    for layer in names:
        if isinstance(layer, _FrozenBatchNorm):
            fate = found.get(layer, Fate())
            if fate.folded_into and fate.conv is not None:
                fate = fate._replace(folded_into=names.get(fate.conv, "a convolution"))
            if not (fate.merged or fate.folded_into or fate.in_place) and "fold_conv" in vars(layer):
                fate = Fate(reason=_reason(root, layer))
            result[layer] = fate
    return result


def _reason(root: nn.Module, layer: _FrozenBatchNorm) -> str:
    if not steps._is_free(vars(layer)):
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
    :func:`convert_frozen_bn`; each class once. (Where a compiler, a hook or the like has to see each
    call, and where a class has got another method since, the class's own runs.)"""
    texts: dict[type, str] = {}
    for kind in dict.fromkeys(map(type, module.modules())):
        info = made(kind)
        if info:
            methods = "\n\n".join(rewritten.text for rewritten in info.methods.values())
            texts[kind] = f"# {kind.__module__}.{kind.__qualname__}\n{methods}\n"
    return "\n".join(texts.values())
