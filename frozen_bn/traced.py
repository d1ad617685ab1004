"""Running the changed trace of a module's ``forward`` in its place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from types import CodeType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn
from torch.nn.modules import module as module_internals
from torch.overrides import has_torch_function_variadic

from .functional import is_transformed
from .guards import Guard, Held, absent, compiled
from .source import CannotTrace

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Whether the module is in training mode, and whether the arguments are tensors, or None where
#: that does not matter.
Key = tuple[bool, bool | None]


def has_hooks(module: nn.Module) -> bool:
    return any(vars(module)[name] for name in _HOOKS)


def optional_arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments with a default, which the trace takes to be left out."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise CannotTrace("it takes any number of arguments")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class _Source(NamedTuple):
    """A function ``forward(self, ...)``, as can be pickled."""

    text: str
    names: dict[str, Any]  # that it uses
    modules: dict[str, str]  # likewise, to be imported

    @classmethod
    def of(cls, graph: fx.Graph) -> _Source:
        for node in graph.nodes:
            node.type = None  # an annotation only
        code = graph.python_code("self")
        (function,) = (
            c for c in compile(code.src, "", "exec").co_consts if isinstance(c, CodeType)
        )
        used = {name: v for name, v in code.globals.items() if name in function.co_names}
        modules = {name: v.__name__ for name, v in used.items() if isinstance(v, ModuleType)}
        return cls(code.src, {n: v for n, v in used.items() if n not in modules}, modules)

    def compile(self, title: str) -> Callable[..., Any]:
        namespace = self.names | {n: import_module(path) for n, path in self.modules.items()}
        exec(compile(self.text, f"<frozen_bn: {title}>", "exec"), namespace)
        return cast(Callable[..., Any], namespace["forward"])


class Traced(NamedTuple):
    """A graph, and what it rests on."""

    graph: fx.Graph
    guards: list[Guard]


class TracedForward:
    """Takes the place of a module's ``forward``, as an attribute of the instance: runs changed
    traces of it, as long as all is as it was when they were made, else the ``forward`` of the
    class.

    Args:
        owner: the module.
        traces: calls of children are looked up in ``owner`` when they run.
        parts: modules that the graphs do the work of; hooks on them have to be obeyed.
    """

    def __init__(
        self, owner: nn.Module, traces: dict[Key, Traced], parts: Iterable[nn.Module]
    ) -> None:
        self.owner = owner
        sources = {id(traced): _Source.of(traced.graph) for traced in traces.values()}
        self._sources = {key: sources[id(traced)] for key, traced in traces.items()}
        self._guards = {key: [*traced.guards] for key, traced in traces.items()}
        self._arity = len(inspect.signature(type(owner).forward).parameters) - 1
        self._arity -= len(optional_arguments(owner))
        self._parts = [*parts]
        told = ("activation", "negative_slope", "min_val", "max_val", "forward")
        self._told: list[Guard] = [
            Held(part, None, name, vars(part).get(name, absent))
            for part in self._parts
            for name in told
            if name == "forward" or name in vars(part)
        ]
        # By key: whether all is as it was, and what to run then. Made when first called.
        self._functions: dict[Key, tuple[Callable[[], bool], Callable[..., Any]]] = {}

    def _compile(self) -> None:
        # The dictionaries themselves, as they fill up when a hook is registered.
        hooks = [vars(part)[name] for part in self._parts for name in _HOOKS]
        hooks += [vars(module_internals)["_global" + name] for name in _HOOKS]
        title = f"fused forward of {type(self.owner).__name__}"
        # In one go: another thread takes it that all is made.
        self._functions = {
            key: (compiled([*self._guards[key], *self._told], hooks), source.compile(title))
            for key, source in self._sources.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._functions = {}  # the owner may not be complete yet

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands for; ``inspect`` reads the signature there."""
        return MethodType(type(self.owner).forward, self.owner)

    @property
    def __code__(self) -> CodeType:
        """torch.export looks for it."""
        return self.__wrapped__.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """The first thing that torch.jit.script, which compiles functions only, looks for."""
        raise AttributeError(
            f"torch.jit.script cannot compile the fused forward of {type(self.owner).__name__}: "
            "call frozen_bn.unfreeze_bn, then convert without fuse and fold_conv"
        )

    def _chosen(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The trace that may run on ``args``."""
        if len(args) != self._arity or has_torch_function_variadic(*args):
            return None
        if not self._functions:
            self._compile()
        training = self.owner.training
        found = self._functions.get((training, None))
        if found is None:
            tensors = {isinstance(arg, Tensor) for arg in args}
            key = training, tensors.pop() if len(tensors) == 1 else None
            found = self._functions.get(key)
        for arg in args:
            if arg is None:
                return None
        return found[1] if found is not None and found[0]() else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        function = None
        if args and type(args[0]) is type(owner):
            # Bound anew, as if it was a function: accelerate does, where it takes its wrapper away.
            owner, args = args[0], args[1:]
        if owner is self.owner and not (kwargs or is_transformed()):
            if sys.getrefcount(self) > _REFERENCES:  # somebody else has it
                owner = _caller(owner)
            if owner is self.owner:
                function = self._chosen(args)
        if function is None:
            return type(owner).forward(owner, *args, **kwargs)
        return function(owner, *args)


def _caller(owner: nn.Module) -> nn.Module:
    """The module that is called: a shallow copy of ``owner`` has the same TracedForward."""
    frame = sys._getframe(2)
    called = frame.f_locals.get("self") if frame.f_globals is vars(module_internals) else owner
    return called if isinstance(called, nn.Module) else owner


class _Counter:
    """Sees how many references there are to the ``forward`` of a module that nobody copied."""

    count = 0

    def __call__(self) -> None:
        self.count = sys.getrefcount(self)


def _references() -> int:
    module = nn.Module()
    vars(module)["forward"] = _Counter()
    module()
    return cast(int, vars(module)["forward"].count)


_REFERENCES = _references()
