"""Tracing one module's own ``forward``."""

from __future__ import annotations

import dis
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .guards import Guard
from .source import CannotTrace
from .traced import TracedForward, optional_arguments
from .watch import Watch


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether calling it is calling its children one after the other, and nothing else."""
    kind = type(module)
    iterates = getattr(kind, "__iter__", None) is nn.Sequential.__iter__
    return (
        kind.forward is nn.Sequential.forward
        and iterates
        and ("forward" not in vars(module) or isinstance(vars(module)["forward"], TracedForward))
    )


class _Proxy(fx.Proxy):
    """Refuses to answer what is not known yet, and records ``a += b`` as what it is: that of the
    base class is ``a = a + b``."""

    tracer: _LocalTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what isinstance asks
        if not self.tracer.watch.asks_isinstance:
            return type(self)
        if self.node.op != "placeholder":
            raise CannotTrace("it asks isinstance, which a trace cannot repeat")
        self.tracer.asked = True
        return Tensor if self.tracer.watch.tensors else object

    def __hash__(self) -> int:
        raise CannotTrace("it looks an argument up, which a trace cannot repeat")

    def __str__(self) -> str:
        if self.tracer.watch.is_audited(sys._getframe(1)):
            raise CannotTrace("it makes a text of an argument, which a trace cannot repeat")
        return super().__repr__()

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        raise CannotTrace("it makes a text of an argument, which a trace cannot repeat")

    def __iter__(self) -> Iterator[fx.Proxy]:
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        if dis.opname[code[at]] != "UNPACK_SEQUENCE":
            raise CannotTrace("it iterates over a value")
        count = code[at + 1]
        items = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([items[i] for i in range(count)])  # type: ignore[index]

    def __getattr__(self, name: str) -> fx.Proxy:  # type: ignore[override]
        return _Attribute(self, name)


class _Attribute(_Proxy):
    """Read when it is written: that of the base class is read when it is needed."""

    def __init__(self, root: _Proxy, name: str) -> None:
        tracer = root.tracer
        node = tracer.create_proxy("call_function", getattr, (root, name), {}).node
        super().__init__(node, tracer)
        self.of, self.name = root, name

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        self.tracer.called.append(self.node)
        return self.tracer.create_proxy("call_method", self.name, (self.of, *args), kwargs)


def _record_in_place(name: str) -> None:
    function = getattr(operator, name)

    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{name}__", record)


_ARITHMETIC = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
_BITWISE = ("iand", "ior", "ixor", "ilshift", "irshift")
for _name in _ARITHMETIC + _BITWISE:
    _record_in_place(_name)


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """``a, b = value``, which fails unless there are as many."""
    items = tuple(value)
    if len(items) != count:
        raise ValueError(f"expected {count} values to unpack, got {len(items)}")
    return items


class _LocalTracer(fx.Tracer):
    """Children are leaves, but for the Sequentials to be looked into."""

    def __init__(
        self,
        root: nn.Module,
        training: bool,
        tensors: bool,
        looked_into: Callable[[nn.Module], bool],
    ) -> None:
        super().__init__()
        self._looked_into = looked_into
        self.watch = Watch(root, training, tensors, self._recorded)
        self.asked = False
        self.called: list[fx.Node] = []
        self.inlined: dict[str, nn.Module] = {}
        self.repeated: set[nn.Module] = set()

    def _recorded(self, module: nn.Module, name: str) -> fx.Proxy:
        path = self.path_of_module(module)
        return self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not self._looked_into(m):
            return True
        if m in self.inlined.values():
            self.repeated.add(m)
        self.inlined[module_qualified_name] = m
        return False

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict:  # the base class would return a dict
            return self.create_arg(
                self.create_proxy("call_function", OrderedDict, ([*a.items()],), {})
            )
        known = (dict, list, tuple, torch.Size, slice)
        if isinstance(a, known) and type(a) not in known and not hasattr(a, "_fields"):
            raise CannotTrace(f"it makes a {type(a).__name__}")
        if isinstance(a, Tensor):
            raise CannotTrace("it makes a tensor")
        return super().create_arg(a)


class Trace(NamedTuple):
    """The graph of a module's own ``forward``."""

    graph: fx.Graph
    inlined: dict[str, nn.Module]  # Sequentials that it runs through, by qualified name
    repeated: set[nn.Module]  # of these, called more than once
    asked: bool  # whether it holds only for the kind of arguments that was assumed
    asked_training: bool  # whether it holds only for the mode
    guards: list[Guard]  # what else it rests on


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
    tracer = _LocalTracer(module, training, tensors, looked_into)
    defaults = optional_arguments(module)
    try:
        with tracer.watch.watching():
            graph = tracer.trace(module, defaults)
    except CannotTrace:
        raise
    except Exception as error:  # anything: it is somebody else's code
        text = str(error).strip().split("\n")[0]
        raise CannotTrace(f"torch.fx cannot trace it: {text or type(error).__name__}") from error
    for node in tracer.called:
        if not node.users and node in graph.nodes:
            graph.erase_node(node)  # a method that was looked up, and called
    guards = tracer.watch.guards()
    return Trace(
        graph,
        tracer.inlined,
        tracer.repeated,
        tracer.asked,
        tracer.watch.asked_training,
        guards,
    )
