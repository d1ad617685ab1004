"""Tracing one module's own ``forward``, and running the changed trace in its place."""

from __future__ import annotations

import builtins
import copy
import inspect
import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_internals
from torch.overrides import has_torch_function_variadic

from .functional import is_transformed

#: What a forward can ask that a trace would answer once and for all.
_QUESTIONS = {"issubclass", "type", "callable", "is_tensor", "is_floating_point", "print"}
_QUESTIONS |= {"random", "rand", "randn", "randint", "bernoulli", "uniform", "uniform_"}

_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, dict, set, deque, OrderedDict)

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
    """The attributes that are its class's own: a trace takes them as they are."""
    internal = {*vars(nn.Module()), "forward"}
    return {name: value for name, value in vars(module).items() if name not in internal}


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in _PLAIN and bool(a == b))


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


def _modes() -> tuple[object, ...]:
    """What a part of a forward can switch for itself, without a trace of it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # checkpointing sets some
    )


@contextmanager
def _other_modes(module: nn.Module) -> Iterator[None]:
    """Turns round what :func:`_modes` lists, and the mode of every module below ``module``."""
    autocast = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    training = {child: child.training for child in module.modules() if child is not module}
    try:
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, not enabled)
        for child in training:
            child.training = not child.training
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            yield
    finally:
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, enabled)
        for child, mode in training.items():
            child.training = mode


class _Proxy(fx.Proxy):
    """Records ``a += b`` as what it is: that of the base class is ``a = a + b``."""


def _record_in_place(name: str) -> None:
    function = getattr(operator, name)

    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{name}__", record)


_ARITHMETIC = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
_BITWISE = ("iand", "ior", "ixor", "ilshift", "irshift")
for _name in _ARITHMETIC + _BITWISE:
    _record_in_place(_name)


class _LocalTracer(fx.Tracer):
    """Children are leaves, but for the Sequentials to be looked into.

    Args:
        looked_into: says which these are.
        tensors: whether the arguments are tensors, should ``forward`` ask.
    """

    proxy_buffer_attributes = True

    def __init__(self, looked_into: Callable[[nn.Module], bool], tensors: bool) -> None:
        super().__init__()
        self._looked_into = looked_into
        self._tensors = tensors
        self._modes = _modes()
        self.asked = False
        self.inlined: dict[str, nn.Module] = {}

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Has ``isinstance`` answer for what a proxy stands for, except to torch itself."""
        real = builtins.isinstance

        def answer(value: Any, kinds: Any) -> bool:
            asker = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
            if not real(value, fx.Proxy) or asker in ("torch", __name__.split(".")[0]):
                return real(value, kinds)
            if value.node.op != "placeholder" or not (self._tensors or kinds is Tensor):
                raise CannotTrace("it asks isinstance, which a trace cannot repeat")
            self.asked = True
            return self._tensors and issubclass(Tensor, kinds)

        builtins.isinstance = answer
        try:
            yield
        finally:
            builtins.isinstance = real

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise CannotTrace("it sets gradient mode, autocast or checkpointing for a part of it")
        return super().create_node(*args, **kwargs)

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


def _twin(module: nn.Module, training: bool) -> nn.Module:
    """A shallow copy, to be traced in place of ``module``: it may write to itself."""
    twin = object.__new__(type(module))
    for name, value in vars(module).items():
        vars(twin)[name] = copy.copy(value) if type(value) in _CONTAINERS else value
    vars(twin)["training"] = training
    return twin


def _contents(value: Any) -> list[int]:
    """The identities of what is in a container, or of ``value`` itself."""
    if type(value) not in _CONTAINERS:
        return [id(value)]
    return [*map(id, value.values() if isinstance(value, dict) else value)]


def _trace_once(module: nn.Module, training: bool, tracer: _LocalTracer) -> fx.Graph:
    twin = _twin(module, training)
    try:
        with tracer.answering():
            graph = tracer.trace(twin, _optional_arguments(module))
    except CannotTrace:
        raise
    except Exception as error:  # anything: it is somebody else's code
        text = str(error).strip().split("\n")[0]
        raise CannotTrace(f"torch.fx cannot trace it: {text or type(error).__name__}") from error
    was = vars(_twin(module, training))
    changed = {
        name
        for name, value in vars(twin).items()
        if name not in was or (_contents(value) != _contents(was[name]))
    }
    if changed:
        raise CannotTrace(f"it sets {', '.join(sorted(changed))} on itself")
    return graph


class Trace(NamedTuple):
    """The graph of a module's own ``forward``."""

    graph: fx.Graph
    inlined: dict[str, nn.Module]  # Sequentials that it runs through, by qualified name
    asked: bool  # whether it holds only for the kind of arguments that was assumed


def trace(
    module: nn.Module, training: bool, tensors: bool, looked_into: Callable[[nn.Module], bool]
) -> Trace:
    """Traces ``module``'s own ``forward`` as it runs in the mode ``training``.

    Args:
        module: not changed.
        training: the mode.
        tensors: whether its arguments are tensors, should ``forward`` ask.
        looked_into: which children are no leaves.

    Raises:
        CannotTrace: the graph would not say all that ``forward`` does.
    """
    if "forward" in vars(module):
        raise CannotTrace("it has a forward of its own, set on the instance")
    if questions := _questions(type(module)):
        raise CannotTrace(f"it asks {', '.join(sorted(questions))}, which a trace cannot repeat")
    tracer = _LocalTracer(looked_into, tensors)
    graph = _trace_once(module, training, tracer)
    with _other_modes(module):
        again = _trace_once(module, training, _LocalTracer(looked_into, tensors))
    if graph.python_code("self").src != again.python_code("self").src:
        raise CannotTrace("it depends on more than its arguments and its own mode")
    return Trace(graph, tracer.inlined, tracer.asked)


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
        graphs: by ``training``, and whether the arguments are tensors, or None if it does not
            matter. Calls of children are looked up in ``owner`` when they run.
        parts: modules that the graphs do the work of; hooks on them have to be obeyed.
        containers: modules other than ``owner`` whose children the graphs call themselves.
    """

    def __init__(
        self,
        owner: nn.Module,
        graphs: dict[tuple[bool, bool | None], fx.Graph],
        parts: Iterable[nn.Module],
        containers: Iterable[nn.Module],
    ) -> None:
        self.owner = owner
        self._sources = {key: _Source.of(graph) for key, graph in graphs.items()}
        self._arity = len(inspect.signature(type(owner).forward).parameters) - 1
        self._arity -= len(_optional_arguments(owner))
        self._parts = [*parts]
        self._containers = [owner, *containers]
        self._children = [(*module._modules.values(),) for module in self._containers]
        self._constants = [(owner, name, value) for name, value in _constants(owner).items()]
        for part in self._parts:
            told = ("activation", "negative_slope", "forward")
            self._constants += [(part, name, vars(part).get(name)) for name in told]
        self._functions: dict[tuple[bool, bool | None], Callable[..., Any]] = {}  # made when called

    def _compile(self) -> None:
        # The dictionaries themselves, as they fill up when a hook is registered.
        hooks = [vars(part)[name] for part in self._parts for name in _HOOKS]
        self._hooks = hooks + [vars(module_internals)["_global" + name] for name in _HOOKS]
        self._watched = [(vars(module), name, value) for module, name, value in self._constants]
        title = f"fused forward of {type(self.owner).__name__}"
        # Last: another thread takes it that all is made.
        self._functions = {key: code.compile(title) for key, code in self._sources.items()}

    def __getstate__(self) -> dict[str, Any]:
        made = ("_functions", "_hooks", "_watched")
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

    @property
    def __globals__(self) -> dict[str, Any]:
        """The first thing that torch.jit.script, which compiles functions only, looks for."""
        raise AttributeError(
            f"torch.jit.script cannot compile the fused forward of {type(self.owner).__name__}: "
            "call frozen_bn.unfreeze_bn, then convert without fuse and fold_conv"
        )

    def _applies(self, args: tuple[Any, ...]) -> bool:
        if not self._functions:
            self._compile()
        return (
            len(args) == self._arity
            and not any(arg is None for arg in args)
            and not any(self._hooks)
            and all(_same(attributes.get(name), v) for attributes, name, v in self._watched)
            and [(*module._modules.values(),) for module in self._containers] == self._children
            and not has_torch_function_variadic(*args)
        )

    def _chosen(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        training = self.owner.training
        if function := self._functions.get((training, None)):
            return function
        tensors = {isinstance(arg, Tensor) for arg in args}
        return self._functions.get((training, tensors.pop())) if len(tensors) == 1 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        function = None
        if not (kwargs or is_transformed()) and self._applies(args):
            function = self._chosen(args)
        if function is None:
            return type(owner).forward(owner, *args, **kwargs)
        return function(owner, *args)
