"""What a trace took to be constant. Each guard is a condition, in Python, that holds as long as it
is: ``TracedForward`` asks all of them at every call.

The model's own objects are copied with the model, and pickled. Classes, functions and globals are
not: they are looked up again where the model is loaded, by their names, and compared.
"""

from __future__ import annotations

import enum
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, type(...))
PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)
CONTAINERS = (list, tuple, dict, set, frozenset, OrderedDict, torch.Size)


class absent:
    """Stands for what is not there."""


def is_plain(value: object) -> bool:
    """Whether it can never change."""
    if isinstance(value, enum.Enum):
        return type(value.value) in PLAIN
    return type(value) in PLAIN or (
        type(value) in (tuple, frozenset, torch.Size)
        and all(map(is_plain, cast(Iterable[object], value)))
    )


def same(a: Any, b: Any) -> bool:
    """Whether one can stand for the other: 1 is not True."""
    return a is b or (is_plain(a) and is_plain(b) and contents(a) == contents(b))


def contents(value: Any) -> Any:
    """Of nested containers: what makes two of them equal, order and types too."""
    if isinstance(value, Mapping):
        return type(value), [(contents(k), contents(v)) for k, v in value.items()]
    if type(value) in CONTAINERS:
        return type(value), [contents(item) for item in value]
    return type(value), repr(value) if type(value) in (float, complex) else value


class Held(NamedTuple):
    """An entry of ``vars(module)``, or of one of the dictionaries there."""

    module: nn.Module
    store: str | None
    name: str
    value: Any

    def condition(self, bind: Callable[[object], str]) -> str:
        own = vars(self.module)
        found = f"{bind(own if self.store is None else own[self.store])}.get({self.name!r}, absent)"
        value = bind(self.value)
        held = f"{found} is {value}"
        return f"({held} or same({found}, {value}))" if is_plain(self.value) else held


class Given(NamedTuple):
    """A parameter or buffer is not None, whatever it is."""

    module: nn.Module
    store: str
    name: str

    def condition(self, bind: Callable[[object], str]) -> str:
        return f"{bind(vars(self.module)[self.store])}.get({self.name!r}) is not None"


class Contents(NamedTuple):
    """What a container holds."""

    module: nn.Module
    name: str
    value: Any  # see contents()

    def condition(self, bind: Callable[[object], str]) -> str:
        own = bind(vars(self.module))
        return f"contents({own}.get({self.name!r}, absent)) == {bind(self.value)}"


class Children(NamedTuple):
    """Which, under which names, in which order."""

    module: nn.Module
    items: list[tuple[str, nn.Module | None]]

    def condition(self, bind: Callable[[object], str]) -> str:
        return f"[*{bind(self.module._modules)}.items()] == {bind(self.items)}"


class Missing(NamedTuple):
    """There is no such attribute."""

    module: nn.Module
    name: str

    def condition(self, bind: Callable[[object], str]) -> str:
        own = vars(self.module)
        stores = (own, own["_parameters"], own["_buffers"], own["_modules"])
        none = [f"{self.name!r} not in {bind(store)}" for store in stores]
        kind = f"type({bind(self.module)})"
        return f"({' and '.join(none)} and not hasattr({kind}, {self.name!r}))"


class NotOwn(NamedTuple):
    """The class's attribute is not hidden by one of the instance."""

    module: nn.Module
    name: str

    def condition(self, bind: Callable[[object], str]) -> str:
        return f"{self.name!r} not in {bind(vars(self.module))}"


class Class(NamedTuple):
    """What a module is."""

    module: nn.Module
    kind: type[nn.Module]

    def condition(self, bind: Callable[[object], str]) -> str:
        return f"type({bind(self.module)}) is {bind(self.kind)}"


def _digest(code: CodeType) -> int:
    """Of what a function does; without its line numbers."""
    constants: list[object] = []
    for value in code.co_consts:
        known = sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
        constants.append(_digest(value) if isinstance(value, CodeType) else known)
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return zlib.crc32(repr((code.co_code, constants, names)).encode())


def _description(value: object) -> object:
    """Tells in another process whether a name still stands for ``value``."""
    if type(value) in CONTAINERS or type(value) in PLAIN:
        return contents(value)
    if isinstance(value, property):
        return "property", _description(value.fget)
    names = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(value, FunctionType):
        return (*names, _digest(value.__code__))
    return (*names, getattr(value, "__name__", None))


class Outside:
    """What a name stands for outside of the model.

    Args:
        holder: where it is looked up: a module of Python, a class (and its bases), a cell, or a
            namespace; None for a guard that never holds.
        name: the name.
        value: what it is there.
    """

    def __init__(self, holder: object, name: str, value: object) -> None:
        self.holder, self.name, self.value = holder, name, value

    def __deepcopy__(self, memo: object) -> Outside:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        holder = self.holder
        if isinstance(holder, ModuleType):
            return _find_again, (holder.__name__, self.name, _description(self.value))
        kept = holder if isinstance(holder, type) else None
        return _find_again, (kept, self.name, _description(self.value))

    def condition(self, bind: Callable[[object], str]) -> str:
        if self.holder is None:
            return "False"
        value = bind(self.value)
        if isinstance(self.holder, CellType):
            found = f"{bind(self.holder)}.cell_contents"
        elif isinstance(self.holder, type):
            found = f"getattr({bind(self.holder)}, {self.name!r}, absent)"
        else:
            names = self.holder if isinstance(self.holder, dict) else vars(self.holder)
            found = f"{bind(names)}.get({self.name!r}, absent)"
        held = f"{found} is {value}"
        return f"({held} or same({found}, {value}))" if is_plain(self.value) else held


def _find_again(holder: str | type | None, name: str, description: object) -> Outside:
    place = sys.modules.get(holder) if isinstance(holder, str) else holder
    value = getattr(place, name, absent)
    if place is None or _description(value) != description:
        return Outside(None, name, None)
    return Outside(place, name, value)


Guard = Held | Given | Contents | Children | Missing | NotOwn | Class | Outside


def once(guards: Iterable[Guard]) -> list[Guard]:
    """Without repetitions."""

    def key(guard: Guard) -> tuple[object, ...]:
        about = guard.holder if isinstance(guard, Outside) else guard.module
        return type(guard), id(about), getattr(guard, "store", None), getattr(guard, "name", None)

    return [*{key(guard): guard for guard in guards}.values()]


def compiled(guards: Iterable[Guard], hooks: Iterable[object]) -> Callable[[], bool]:
    """A function that tells whether all of ``guards`` hold, and ``hooks`` are empty."""
    names: dict[int, str] = {}
    values: dict[str, object] = {"absent": absent, "same": same, "contents": contents}

    def bind(value: object) -> str:
        name = names.setdefault(id(value), f"_{len(names)}")
        values[name] = value  # and is kept alive, so that its id is its own
        return name

    conditions = [f"not {bind(hook)}" for hook in hooks]
    conditions += [guard.condition(bind) for guard in guards]
    text = " and ".join(dict.fromkeys(conditions)) or "True"
    return cast(Callable[[], bool], eval(f"lambda: {text}", values))
