"""The classes whose methods are rewritten: one for each class that calls frozen layers, derived from
it, under its name. Instances change class, so that copies, replicas and pickles are fused too."""

from __future__ import annotations

import abc
import ast
import inspect
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, cast

from torch import fx, nn

from ..modules import _FrozenBatchNorm
from . import source, steps
from .rewrite import Rewritten, rewrite
from .roles import is_sequential, parts, roles
from .source import LeftAlone

#: By the name of a method, those of the calls in it.
Roles = Mapping[str, Mapping[str, str]]

_lock = threading.RLock()


@dataclass
class Made:
    """What is known of a class that was made here."""

    written: type  # what it was made from
    roles: dict[str, dict[str, str]]
    methods: dict[str, Rewritten] = field(default_factory=dict)
    others: dict[str, Rewritten] = field(default_factory=dict)  # where nothing is gained
    reasons: dict[str, str] = field(default_factory=dict)  # why others are left alone


class _Quiet:
    """Keeps a class that is derived from one that counts its subclasses from being counted."""

    __slots__ = ()

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def is_enabled() -> bool:
    """Unless it is turned off for the process."""
    return os.environ.get("FROZEN_BN_FUSE") != "0"


def made(module: nn.Module | type) -> Made | None:
    """Of a module whose methods are rewritten."""
    kind = module if isinstance(module, type) else type(module)
    return vars(kind).get("_frozen_bn")


def _reduce(self: Any, protocol: Any) -> Any:
    """For copies and pickles: they name the class that this one was made from."""
    kind = next(k for k in type(self).__mro__ if "_frozen_bn" in vars(k))
    reduced = super(kind, self).__reduce_ex__(protocol)  # type: ignore[misc]
    info = vars(kind)["_frozen_bn"]
    if type(self) is not kind or not isinstance(reduced, tuple) or kind not in reduced[1]:
        return reduced
    function, args, *rest = reduced
    names = {name: tuple(sorted(known.items())) for name, known in info.roles.items()}
    given = tuple(info.written if arg is kind else arg for arg in args)
    return (_remade, (info.written, tuple(sorted(names.items())), function, given), *rest)


def _remade(written: type, known: Any, function: Any, args: Any) -> Any:
    """An object as ``function`` makes it, whose methods are rewritten here too."""
    new = function(*args)
    if type(new) is written and is_enabled():
        _change(new, {name: dict(pairs) for name, pairs in known})
    return new


def _change(module: nn.Module, known: Roles) -> None:
    """Gives ``module`` the class with rewritten methods, if there is anything to rewrite."""
    kind = _class(type(module), known)
    if kind is not None:
        try:
            object.__setattr__(module, "__class__", kind)
        except TypeError as error:  # slots
            vars(kind)["_frozen_bn"].reasons["forward"] = str(error)


def _class(written: type, known: Roles) -> type | None:
    """The class made from ``written``, whose methods are rewritten for ``known``."""
    with _lock:
        found = next((k for k in type.__subclasses__(written) if made(k)), None)
        info = made(found) if found else Made(written, {})
        assert info is not None
        merged = {
            name: _union(info.roles.get(name, {}), known.get(name, {}))
            for name in {**info.roles, **known}
        }
        if found is not None and merged == info.roles:
            return found
        new = Made(written, merged)
        raw: set[str] = set()
        while True:
            for name, calls in merged.items():
                _rewrite(new, name, {**{t: "call" for t in raw}, **calls})
            grown = {f"self.{name}" for name, method in new.methods.items() if method.raw}
            if grown == raw:
                break
            raw = grown
        if not new.methods:
            return found
        functions = {name: rewritten.function for name, rewritten in new.methods.items()}
        steps.raw_methods.update({m.function: m.raw for m in new.methods.values() if m.raw})
        if found is None:
            return _derived(written, {**functions, "_frozen_bn": new})
        for name, function in functions.items():
            setattr(found, name, function)
        vars(info).update(vars(new))
        return found


def _union(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Where they do not agree, a step that takes anything."""
    return {**a, **b, **{text: "call" for text in a if b.get(text, a[text]) != a[text]}}


def _rewrite(info: Made, name: str, calls: Mapping[str, str]) -> None:
    holder = next(k for k in info.written.__mro__ if name in vars(k))
    function = vars(holder)[name]
    try:
        if function is nn.Sequential.forward:
            rewritten = _sequential(info.written)
        else:
            rewritten = rewrite(function, name, holder, info.written, calls, steps)
    except LeftAlone as reason:
        info.reasons[name] = str(reason)
        return
    (info.methods if rewritten.text else info.others)[name] = rewritten


def _sequential(written: type) -> Rewritten:
    """The forward of a Sequential, which needs no source."""
    body = "def forward(self, input):\n    "
    then = "return steps.value(steps.sequence(self, input))"
    head = "if steps.aside(owner.forward, written): return owner.forward(self, input)\n    "
    (node,) = ast.parse(body + head + then).body
    assert isinstance(node, ast.FunctionDef)
    forward = cast(FunctionType, nn.Sequential.forward)
    given = {"steps": steps, "owner": written, "written": forward}
    return Rewritten(source.build(forward, node, given), body + then)


def _derived(written: type, namespace: dict[str, Any]) -> type:
    """A class like ``written``, of which neither it nor its metaclass is told."""
    told = any("__init_subclass__" in vars(k) for k in written.__mro__[:-1])
    bases = (_Quiet, written) if told else (written,)
    namespace |= {
        "__module__": written.__module__,
        "__qualname__": written.__qualname__,
        "__doc__": written.__doc__,
        "__reduce_ex__": _reduce,
    }
    if issubclass(written, fx.GraphModule):  # whose class calls itself by these
        own = vars(written)
        namespace |= {n: own[n] for n in ("_wrapped_call", "__call__") if n in own}
    metaclass = type(written)
    new = abc.ABCMeta.__new__ if issubclass(metaclass, abc.ABCMeta) else type.__new__
    return new(metaclass, written.__name__, bases, namespace)  # type: ignore[no-any-return, type-var]


# Models


def fuse(root: nn.Module, fold_conv: bool) -> None:
    """Rewrites, in place, the classes of all in ``root`` that call frozen layers."""
    instances: dict[type, list[nn.Module]] = {}
    frozen: dict[nn.Module, bool] = {}

    def holds_frozen(module: nn.Module) -> bool:
        if module not in frozen:
            frozen[module] = isinstance(module, _FrozenBatchNorm)  # should it hold itself
            children = [child for child in module._modules.values() if child is not None]
            frozen[module] |= any([holds_frozen(child) for child in children])
        return frozen[module]

    holds_frozen(root)
    for module in [*root.modules()]:
        if isinstance(module, _FrozenBatchNorm):
            module.fold_conv = fold_conv
        elif frozen.get(module):
            info = made(module)
            instances.setdefault(info.written if info else type(module), []).append(module)
    for written, modules in instances.items():
        if any(made(k) for k in written.__mro__):
            continue  # a class that somebody derived from one of these
        known = _known(written, modules, frozen)
        for module in modules if known else ():
            info = made(module)
            if info is None:
                _change(module, known)
            else:
                _class(written, known)


def unfuse(root: nn.Module) -> None:
    """Undoes :func:`fuse`."""
    for module in root.modules():
        info = made(module)
        if info is not None:
            object.__setattr__(module, "__class__", info.written)
        elif isinstance(module, _FrozenBatchNorm):
            vars(module).pop("fold_conv", None)


def _known(
    written: type,
    modules: list[nn.Module],
    frozen: Mapping[nn.Module, bool],
    reasons: dict[str, str] | None = None,
) -> dict[str, dict[str, str]]:
    """What the methods of a class call; and why some cannot be read."""
    found: dict[str, dict[str, str]] = {}
    if is_sequential(modules[0]):
        layers = (part for module in modules for part in parts(module))
        if any(isinstance(layer, _FrozenBatchNorm) for layer in layers):
            found["forward"] = {}
        return found
    names = {n for m in modules for n, child in m._modules.items() if child and frozen.get(child)}
    methods = {
        name: (holder, function, source.used(inspect.unwrap(function).__code__))
        for name, (holder, function) in _methods(written).items()
    }
    everything = _has_properties(written)
    while True:  # a method that calls a method that calls a layer
        calling = {name for name, (_, _, used) in methods.items() if everything or used & names}
        if calling <= names:
            break
        names |= calling
    for name in calling:
        holder, function, _ = methods[name]
        try:
            found[name] = roles(source.tree(function, holder.__name__), function, modules)
        except LeftAlone as reason:
            if reasons is not None:
                reasons[name] = str(reason)
    return found


def reasons(module: nn.Module) -> dict[str, str]:
    """Why methods of a module are left alone, by their names."""
    info = made(module)
    found = dict(info.reasons) if info else {}
    written = info.written if info else type(module)
    frozen = {m: any(isinstance(n, _FrozenBatchNorm) for n in m.modules()) for m in module.children()}
    known = _known(written, [module], frozen, found)
    if info is None:
        new = Made(written, {})
        for name, calls in known.items():
            _rewrite(new, name, calls)
        found |= new.reasons
    return found


def _methods(written: type) -> dict[str, tuple[type, FunctionType]]:
    found: dict[str, tuple[type, FunctionType]] = {}
    for kind in reversed(written.__mro__):
        if kind.__module__.startswith("torch.nn.") or not issubclass(kind, nn.Module):
            continue
        for name, value in vars(kind).items():
            if not (name.startswith("__") and name.endswith("__")):
                found.pop(name, None)
                if isinstance(value, FunctionType):
                    found[name] = kind, value
    return found


def _has_properties(written: type) -> bool:
    return any(
        isinstance(value, property)
        for kind in written.__mro__
        if issubclass(kind, nn.Module) and kind is not nn.Module
        for value in vars(kind).values()
    )
