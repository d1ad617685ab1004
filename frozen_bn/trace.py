"""Tracing one module's own ``forward``, and running the changed trace in its place."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from importlib import import_module
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn
from torch.nn.modules import module as module_internals
from torch.overrides import has_torch_function_variadic

from .functional import is_transformed

#: What a forward can ask that a trace would answer once and for all.
_QUESTIONS = {"isinstance", "issubclass", "type", "callable", "is_tensor", "is_floating_point"}
_QUESTIONS |= {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"}
_QUESTIONS |= {"random", "rand", "randn", "randint", "bernoulli", "uniform", "uniform_"}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CannotTrace(Exception):
    """Why a ``forward`` is left as it was written."""


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether calling it is calling its children one after the other, and nothing else."""
    return type(module).forward is nn.Sequential.forward and (
        "forward" not in vars(module) or isinstance(vars(module)["forward"], TracedForward)
    )


def has_hooks(module: nn.Module) -> bool:
    return any(vars(module)[name] for name in _HOOKS)


def _constants(module: nn.Module) -> dict[str, Any]:
    """The plain values among its attributes: a trace takes them as they are."""
    plain = (bool, int, float, str, type(None))
    return {name: v for name, v in vars(module).items() if type(v) in plain and name != "training"}


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _questions(kind: type[nn.Module]) -> set[str]:
    """Those of ``_QUESTIONS`` that ``forward`` asks, or the class's methods that it calls."""
    found: set[str] = set()
    seen: set[str] = set()
    codes: list[CodeType] = []

    def look_into(name: str) -> None:
        method = inspect.getattr_static(kind, name, None)
        inherited = inspect.getattr_static(nn.Module, name, None) if name != "forward" else None
        if name not in seen and isinstance(method, FunctionType) and method is not inherited:
            seen.add(name)
            codes.append(inspect.unwrap(method).__code__)

    look_into("forward")
    while codes:
        code = codes.pop()
        found |= _QUESTIONS & {*code.co_names}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for name in code.co_names:
            look_into(name)
    return found


class _LocalTracer(fx.Tracer):
    """Children are leaves, but for the Sequentials to be looked into."""

    def __init__(self, looked_into: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._looked_into = looked_into
        self.inlined: dict[str, nn.Module] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not self._looked_into(m):
            return True
        self.inlined[module_qualified_name] = m
        return False

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # the base class would return a dict
            return self.create_arg(
                self.create_proxy("call_function", OrderedDict, ([*a.items()],), {})
            )
        known = (dict, list, tuple, torch.Size, slice)
        if isinstance(a, known) and type(a) not in known and not hasattr(a, "_fields"):
            raise CannotTrace(f"it makes a {type(a).__name__}")
        return super().create_arg(a)


def _optional_arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments with a default, which the trace takes to be left out."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise CannotTrace("it takes any number of arguments")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def trace(
    module: nn.Module, looked_into: Callable[[nn.Module], bool]
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph of ``module``'s own ``forward`` in its present mode, and the Sequentials that it
    runs through, by their qualified names.

    Raises:
        CannotTrace: the graph would not say all that ``forward`` does.
    """
    if "forward" in vars(module):
        raise CannotTrace("it has a forward of its own, set on the instance")
    if questions := _questions(type(module)):
        raise CannotTrace(f"it asks {', '.join(sorted(questions))}, which a trace cannot repeat")
    tracer = _LocalTracer(looked_into)
    before = dict(vars(module))
    try:
        graph = tracer.trace(module, _optional_arguments(module))
    except CannotTrace:
        raise
    except Exception as error:  # anything: it is somebody else's code
        text = str(error).strip().split("\n")[0]
        raise CannotTrace(f"torch.fx cannot trace it: {text or type(error).__name__}") from error
    finally:
        changed = {name for name, v in vars(module).items() if before.get(name, tracer) is not v}
        vars(module).clear()
        vars(module).update(before)
    if changed:
        raise CannotTrace(f"it sets {', '.join(sorted(changed))} on itself")
    return graph, tracer.inlined


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


class TracedForward:
    """Takes the place of a module's ``forward``, as an attribute of the instance: runs changed
    traces of it, as long as all is as it was when they were made, else the ``forward`` of the
    class.

    Args:
        owner: the module.
        graphs: by ``training``. Calls of children are looked up in ``owner`` when they run.
        parts: modules that the graphs do the work of; hooks on them have to be obeyed.
        containers: modules other than ``owner`` whose children the graphs call themselves.
    """

    def __init__(
        self,
        owner: nn.Module,
        graphs: dict[bool, fx.Graph],
        parts: Iterable[nn.Module],
        containers: Iterable[nn.Module],
    ) -> None:
        self.owner = owner
        self._sources = {training: _Source.of(graph) for training, graph in graphs.items()}
        self._arity = len(inspect.signature(type(owner).forward).parameters) - 1
        self._arity -= len(_optional_arguments(owner))
        self._parts = [*parts]
        self._containers = [owner, *containers]
        self._children = [(*module._modules.values(),) for module in self._containers]
        self._constants = [*_constants(owner).items()]
        self._functions: dict[bool, Callable[..., Any]] = {}  # made at the first call

    def _compile(self) -> None:
        title = f"fused forward of {type(self.owner).__name__}"
        self._functions = {mode: code.compile(title) for mode, code in self._sources.items()}
        # The dictionaries themselves, as they fill up when a hook is registered.
        self._hooks = [vars(part)[name] for part in self._parts for name in _HOOKS]
        self._hooks += [vars(module_internals)["_global" + name] for name in _HOOKS]

    def __getstate__(self) -> dict[str, Any]:
        made = ("_functions", "_hooks")
        return {name: value for name, value in vars(self).items() if name not in made}

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

    def _applies(self, args: tuple[Any, ...]) -> bool:
        if not self._functions:
            self._compile()
        attributes = vars(self.owner)
        return (
            len(args) == self._arity
            and not any(arg is None for arg in args)
            and not any(self._hooks)
            and all(_same(attributes.get(name, self), v) for name, v in self._constants)
            and [(*module._modules.values(),) for module in self._containers] == self._children
            and not has_torch_function_variadic(*args)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or is_transformed() or not self._applies(args):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return self._functions[self.owner.training](self.owner, *args)
