"""Watching one ``forward`` while it is traced: which functions it executes, and which attributes
of modules it reads. Both are refused, or guarded (``guards.py``), before they can do anything."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .allowed import is_torch_function, is_torchs, torch_functions
from .audit import Form
from .guards import (
    CONTAINERS,
    Children,
    Class,
    Contents,
    Given,
    Guard,
    Held,
    Missing,
    NotOwn,
    Outside,
    absent,
    contents,
    is_plain,
    once,
)
from .source import CannotTrace, nested

_STORES = ("_parameters", "_buffers", "_modules")

#: Methods of torch's modules that only read.
_READERS = [nn.Module.children, nn.Module.named_children, nn.Sequential.forward]
_READERS += [
    vars(kind)[name]
    for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    for name in ("__iter__", "__getitem__", "__len__", "__contains__", "keys", "items", "values")
    if name in vars(kind)
]
_READER_CODES = {function.__code__ for function in _READERS}


def _is_reader(frame: FrameType) -> bool:
    """Whether the traced code reads by way of it. (What a Sequential calls is told elsewhere.)"""
    caller = frame.f_back
    called = caller is not None and caller.f_code is nn.Sequential.forward.__code__
    return frame.f_code in _READER_CODES and not called


def _copied(value: Any) -> Any:
    """A copy of nested containers of what is_plain, and of modules."""
    if is_plain(value) or isinstance(value, nn.Module):
        return value
    if type(value) not in CONTAINERS:
        raise CannotTrace(f"holds a {type(value).__name__}")
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    return type(value)(map(_copied, value))


class _OfProxies(TorchFunctionMode):
    """Refuses torch's functions of nothing that is traced, such as of random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            name = getattr(func, "__name__", str(func))
            raise CannotTrace(f"it calls {name} of no argument of its own")
        return func(*args, **(kwargs or {}))


class Watch:
    """What one trace executes and reads.

    Args:
        root: the module whose forward is traced.
        training: the mode that it, and what is below it, is said to be in.
        tensors: whether the arguments are said to be tensors.
        recorded: makes a proxy of a parameter or buffer, given by its module and name.
    """

    def __init__(
        self,
        root: nn.Module,
        training: bool,
        tensors: bool,
        recorded: Callable[[nn.Module, str], fx.Proxy],
    ) -> None:
        forward = type(root).forward
        if "forward" in vars(root):
            raise CannotTrace("it has a forward of its own, set on the instance")
        iterates = getattr(type(root), "__iter__", None) is nn.Sequential.__iter__
        sequential = forward is nn.Sequential.forward and iterates
        if (is_torchs(forward) and not sequential) or not isinstance(forward, FunctionType):
            raise CannotTrace("its forward is decorated, or one of torch itself")
        for module in root.modules():
            if type(module).__getattribute__ is not object.__getattribute__:
                raise CannotTrace(f"{type(module).__name__} has a __getattribute__ of its own")
        self.root, self.training, self.tensors = root, training, tensors
        self.recorded = recorded
        self.asked_training = False
        self.root_code = forward.__code__
        self._guards: list[Guard] = [Class(root, type(root))]
        self._guards.append(Outside(type(root), "forward", forward))
        self._known: dict[CodeType, list[FunctionType]] = {}
        self._audited: set[CodeType] = set()
        self._copies: dict[tuple[nn.Module, str], Any] = {}
        self._thread = threading.get_ident()
        self._running = False
        self.asks_isinstance = False
        if forward is nn.Sequential.forward:
            self._guards.append(Children(root, [*root._modules.items()]))
        else:
            self._know(forward)

    def guards(self) -> list[Guard]:
        """What the trace rests on."""
        for (module, name), copied in self._copies.items():
            if contents(copied) != contents(vars(module)[name]):
                raise CannotTrace(f"it changes {name} of {type(module).__name__}")
        return once(self._guards)

    def is_audited(self, frame: FrameType) -> bool:
        """Whether a frame belongs to what is traced, and not to torch."""
        return frame.f_code in self._audited

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of the trace. Other threads do not notice."""
        profiler = sys.getprofile()
        nn.Module.__getattribute__ = self._attribute()  # type: ignore[method-assign, assignment]
        sys.setprofile(self._event)
        try:
            with _OfProxies():
                yield
        finally:
            sys.setprofile(None)
            del nn.Module.__getattribute__
            if callable(profiler):
                sys.setprofile(profiler)
            elif profiler is not None:
                profiler.enable()  # cProfile's

    # Functions

    def _know(self, function: FunctionType) -> None:
        if {*vars(function)} - {"_torchscript_modifier"}:
            raise CannotTrace(f"{function.__qualname__} has attributes, or is decorated")
        known = self._known.setdefault(function.__code__, [])
        if function not in known:
            known.append(function)

    def _event(self, frame: FrameType, event: str, arg: object) -> None:
        if arg is isinstance:
            self.asks_isinstance = event == "c_call" and frame.f_code in self._audited
        if event != "call":
            return
        code = frame.f_code
        self._running = self._running or code is self.root_code
        if code in self._known:
            self._audit(frame)
        elif frame.f_back is not None and not self._may_call(frame.f_back.f_code, frame):
            raise CannotTrace(f"it calls {code.co_qualname}, which a trace cannot repeat")

    def _may_call(self, caller: CodeType, frame: FrameType) -> bool:
        """Of a function that is not known."""
        if caller not in self._audited and not (self._running and caller in _READER_CODES):
            return True  # torch calls it, at any depth
        module = frame.f_globals.get("__name__", "")
        package = module.split(".")[0]
        if package == __package__ or module.startswith("torch.fx."):
            return True
        if caller in _READER_CODES:
            return bool(package == "torch")
        return frame.f_code in self._audited or frame.f_code in _torch_codes()

    def _audit(self, frame: FrameType) -> None:
        values = frame.f_locals
        for function in self._known[frame.f_code]:
            names = frame.f_code.co_freevars
            cells = zip(names, function.__closure__ or (), strict=True)
            if all(cell.cell_contents is values.get(name, absent) for name, cell in cells):
                break
        else:
            raise CannotTrace(f"it calls {frame.f_code.co_qualname}, which is not to be found")
        if function.__globals__.get("__name__", "").startswith("namedtuple_"):
            return
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(map(is_plain, defaults)):
            raise CannotTrace(f"{function.__qualname__} has defaults that may change")
        Form(function, values, self._guards.append, self._know, self.tensors)
        self._audited |= {*nested(frame.f_code)}

    # Attributes

    def _attribute(self) -> Callable[[nn.Module, str], Any]:
        read, find, thread = object.__getattribute__, threading.get_ident, self._thread

        def __getattribute__(module: nn.Module, name: str) -> Any:
            if find() != thread:
                return read(module, name)
            asker = sys._getframe(1)
            if asker.f_code in self._audited:
                return self._read(module, name)
            if name == "_modules" and self._running and _is_reader(asker):
                self._guards.append(Children(module, [*read(module, name).items()]))
            return read(module, name)

        return __getattribute__

    def _read(self, module: nn.Module, name: str) -> Any:
        """An attribute of a module, as the traced code is given it."""
        own = object.__getattribute__(module, "__dict__")
        kind = type(module)
        ofclass = inspect.getattr_static(kind, name, absent)
        if name == "training":
            self.asked_training = True
            if module is not self.root:
                self._guards.append(Held(module, None, name, self.training))
            return self.training
        if name in own and not hasattr(ofclass, "__set__"):
            return self._held(module, name, own[name])
        if ofclass is not absent:
            return self._of_class(module, name, ofclass)
        if inspect.getattr_static(kind, "__getattr__") is not vars(nn.Module)["__getattr__"]:
            raise CannotTrace(f"{kind.__name__} has a __getattr__ of its own")
        for store in _STORES:
            if name in own[store]:
                value = own[store][name]
                if store == "_modules" or value is None:
                    self._guards.append(Held(module, store, name, value))
                    return value
                self._guards.append(Given(module, store, name))
                return self.recorded(module, name)
        self._guards.append(Missing(module, name))
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")

    def _held(self, module: nn.Module, name: str, value: Any) -> Any:
        constant = is_plain(value) or isinstance(value, nn.Module) or is_torch_function(value)
        function = value.__func__ if isinstance(value, MethodType) else value
        if isinstance(function, FunctionType) and name != "forward":
            if isinstance(value, MethodType) and not isinstance(value.__self__, nn.Module):
                raise CannotTrace(f"it reads {name} of {type(module).__name__}, a method")
            if not is_torchs(function):
                self._know(function)
                constant = True
        if constant:
            self._guards.append(Held(module, None, name, value))
            return value
        if type(value) not in CONTAINERS:
            what = f"a {type(value).__name__}, which may change"
            raise CannotTrace(f"it reads {name} of {type(module).__name__}, {what}")
        if (module, name) not in self._copies:
            try:
                self._copies[module, name] = _copied(value)
            except CannotTrace as error:
                what = f"it reads {name} of {type(module).__name__}, which {error}"
                raise CannotTrace(what) from None
            self._guards.append(Contents(module, name, contents(value)))
        return self._copies[module, name]

    def _of_class(self, module: nn.Module, name: str, ofclass: Any) -> Any:
        kind = type(module)
        if name == "forward":
            raise CannotTrace(f"it calls forward of {kind.__name__} itself")
        value = ofclass.__func__ if isinstance(ofclass, staticmethod) else ofclass
        function = value.fget if isinstance(value, property) else value
        self._guards += [NotOwn(module, name), Class(module, kind)]
        # As the class answers: a staticmethod is looked through.
        self._guards.append(Outside(kind, name, getattr(kind, name)))
        if isinstance(function, FunctionType):
            if not is_torchs(function):
                self._know(function)
        elif not (is_plain(value) or is_torch_function(value)):
            what = f"a {type(value).__name__} of its class"
            raise CannotTrace(f"it reads {name} of {kind.__name__}, {what}")
        return object.__getattribute__(module, name)


@functools.cache
def _torch_codes() -> set[CodeType]:
    """Of the functions of torch that may be called."""
    modes = [getattr(torch.jit, name) for name in ("is_scripting", "is_tracing")]
    modes.append(torch.compiler.is_compiling)
    functions = [f for f in (*torch_functions(), *modes) if isinstance(f, FunctionType)]
    return {function.__code__ for function in functions} | _READER_CODES
