"""The classes whose methods are rewritten: one for each class that calls frozen layers, derived
from it, under its name. Instances change class, so that copies, replicas and pickles are fused."""

from __future__ import annotations

import abc
import ast
import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple, cast

from torch import fx, nn

from ..modules import _FrozenBatchNorm
from . import steps
from .kinds import SEQUENTIAL, is_sequential
from .names import Path
from .rewrite import Rewritten, rewrite
from .source import LeftAlone, build

_lock = threading.RLock()
_HOLDERS = {"children", "named_children", "modules", "named_modules", "_modules", "items", "values"}


class Made(NamedTuple):
    """What a class was made from, and is made of."""

    written: type
    methods: dict[str, Rewritten]


class _Quiet(nn.Module):
    """Keeps a class that is derived from one that counts its subclasses from being counted."""

    __slots__ = ()

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def is_enabled() -> bool:
    """Unless it is turned off for the process."""
    return os.environ.get("FROZEN_BN_FUSE") != "0"


def made(module: nn.Module) -> Made | None:
    """Of a module whose methods are rewritten."""
    return vars(type(module)).get("_frozen_bn")


def only_holds(module: nn.Module) -> bool:
    """Whether it has no ``forward``: a ModuleList, or what torch.fx makes to hold children."""
    return type(module).forward is nn.Module.forward


# Classes


def _reduce(self: Any, protocol: Any) -> Any:
    """For copies and pickles: they name the class that this one was made from."""
    kind: Any = next(k for k in type(self).__mro__ if "_frozen_bn" in vars(k))
    reduced = super(kind, self).__reduce_ex__(protocol)
    if type(self) is not kind or not isinstance(reduced, tuple):
        return reduced
    function, args, *rest = reduced
    written = kind._frozen_bn.written
    if not any(part is kind for part in (function, *args)):
        return reduced
    function = written if function is kind else function
    given = tuple(written if arg is kind else arg for arg in args)
    return (_remade, (written, function, given), *rest)


def _remade(written: type, function: Any, args: Any) -> Any:
    """An object as ``function`` makes it, whose methods are rewritten here too."""
    new: Any = function(*args)
    if type(new) is written and is_enabled():
        _change(cast(nn.Module, new), written)
    return new


def _change(module: nn.Module, written: type) -> None:
    """Gives ``module`` the class with rewritten methods, if there is one."""
    kind = _fused(written)
    if kind is not None:
        with contextlib.suppress(TypeError):  # slots
            object.__setattr__(module, "__class__", kind)


def _fused(written: Any) -> type | None:
    """The class made from ``written``."""
    with _lock:
        for kind in type.__subclasses__(written):
            if "_frozen_bn" in vars(kind):
                return kind
        methods, _ = _rewritten(written)
        return _derived(written, methods) if methods else None


@functools.lru_cache(maxsize=1000)
def _rewritten(written: type) -> tuple[dict[str, Rewritten], dict[str, str]]:
    """Its methods with steps, and why others are left alone."""
    methods: dict[str, Rewritten] = {}
    reasons: dict[str, str] = {}
    for name, function in _methods(written):
        try:
            found = (
                _sequential(written)
                if function is SEQUENTIAL
                else rewrite(function, name, written, steps)
            )
        except LeftAlone as reason:
            reasons[name] = str(reason)
            continue
        if found is not None:
            methods[name] = found
            if found.pending is not None:
                found.function._pending = found.function, found.pending  # type: ignore[attr-defined]
    return methods, reasons


def _methods(written: type) -> Iterator[tuple[str, FunctionType]]:
    """Those of the user's classes; and what a Sequential does, if that is what it does."""
    names = {
        n for k in written.__mro__ if not k.__module__.startswith("torch.nn.") for n in vars(k)
    }
    names -= {*vars(nn.Module)} - {"forward"}
    for name in sorted(names | {"forward"}):
        function = next((vars(k)[name] for k in written.__mro__ if name in vars(k)), None)
        sequential = function is SEQUENTIAL and not is_sequential(written)
        if isinstance(function, FunctionType) and not (name.startswith("__") or sequential):
            yield name, function


def _sequential(written: type) -> Rewritten:
    """The forward of a Sequential, which needs no source."""
    forward = cast(FunctionType, SEQUENTIAL)
    head = "    if steps.aside(owner.forward, written):\n"
    head += "        return owner.forward(self, input)\n"
    body = "def forward(self, input):\n{}    return steps.sequence(self, input)"
    (node,) = ast.parse(body.format(head)).body
    assert isinstance(node, ast.FunctionDef)
    given = {"steps": steps, "owner": written, "written": forward}
    new = build(forward, node, None, given)
    new.written = forward  # type: ignore[attr-defined]
    return Rewritten(new, None, body.format(""), frozenset({()}))


def _derived(written: type, methods: dict[str, Rewritten]) -> type:
    """A class like ``written``, of which neither it nor its metaclass is told."""
    told = any("__init_subclass__" in vars(k) for k in written.__mro__[:-1])
    bases = (_Quiet, written) if told else (written,)
    namespace: dict[str, Any] = {name: method.function for name, method in methods.items()}
    namespace |= {
        "__module__": written.__module__,
        "__qualname__": written.__qualname__,
        "__doc__": written.__doc__,
        "__reduce_ex__": _reduce,
        "_frozen_bn": Made(written, methods),
    }
    if issubclass(written, fx.GraphModule):  # whose class calls itself by these
        own = vars(written)
        namespace |= {n: own[n] for n in ("_wrapped_call", "__call__") if n in own}
    metaclass = type(written)
    new = abc.ABCMeta.__new__ if issubclass(metaclass, abc.ABCMeta) else type.__new__
    return new(metaclass, written.__name__, bases, namespace)


# Models


def _holds(module: nn.Module | None) -> bool:
    """Whether it is a frozen layer, or a container of one."""
    if module is None or isinstance(module, _FrozenBatchNorm):
        return module is not None
    container = only_holds(module) or is_sequential(type(module))
    return container and any(map(_holds, module._modules.values()))


def _leads(module: nn.Module, path: Path, pending: set[str]) -> bool:
    """Whether, from ``module``, frozen layers are called by ``path``."""
    for i, name in enumerate(path):
        if name not in module._modules:
            found = any(map(_holds, module._modules.values()))
            computed = name in _HOLDERS or isinstance(getattr(type(module), name, None), property)
            return (found and (computed or i > 0)) or (name in pending and i == 0)
        module = module._modules[name]  # type: ignore[assignment]
        if module is None:
            return False
    return _holds(module) or (not path and any(map(_holds, module._modules.values())))


def _calls_frozen(module: nn.Module, written: type) -> bool:
    methods, _ = _rewritten(written)
    pending = {name for name, method in methods.items() if method.pending is not None}
    return any(_leads(module, path, pending) for m in methods.values() for path in m.paths)


def fuse(root: nn.Module, fold_conv: bool) -> None:
    """Rewrites, in place, the classes of all in ``root`` that call frozen layers."""
    frozen: dict[nn.Module, None] = {}
    for name, layer in root.named_modules(remove_duplicate=False):
        if isinstance(layer, _FrozenBatchNorm):
            layer.fold_conv = fold_conv
            parts = name.split(".")
            above = (root.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
            frozen.update(dict.fromkeys(above))
    for module in frozen:
        written = type(module)
        derived = any("_frozen_bn" in vars(kind) for kind in written.__mro__)
        if not derived and _calls_frozen(module, written):
            _change(module, written)


def unfuse(root: nn.Module) -> None:
    """Undoes :func:`fuse`."""
    for module in root.modules():
        info = made(module)
        if info is not None:
            object.__setattr__(module, "__class__", info.written)
        elif isinstance(module, _FrozenBatchNorm):
            vars(module).pop("fold_conv", None)


def reasons(module: nn.Module) -> dict[str, str]:
    """Why methods of a module are left alone, by their names."""
    info = made(module)
    return _rewritten(info.written if info else type(module))[1]
