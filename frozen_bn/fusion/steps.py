"""What rewritten methods call: steps that look at what is there when they run, and do the work of
several layers by one kernel where they can (``pending``); otherwise they call them one by one.

What models nearly always do is done in C++, where there is the autograd node: see the end.

To merge another layer, give its class a handler in ``_learn``, as ``_activate`` is that of
activations, and have ``_kernel`` of ``pending`` call a kernel for it (CONTRIBUTING, "How fusion
works").
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import conv as convolutions
from torch.nn.modules import module as internals
from torch.utils._device import DeviceContext

from .. import activations, node
from ..functional import _functorch_active, _tracing_state
from . import fold, pending
from .kinds import MODULE_CALL, is_activation, is_convolution, is_frozen, is_sequential
from .pending import Convolution, Normalized, convolved, finish, takes, waits

_call_impl = nn.Module._call_impl
_hooks, _pre_hooks = internals._global_forward_hooks, internals._global_forward_pre_hooks
_backward_hooks = internals._global_backward_hooks
_backward_pre_hooks = internals._global_backward_pre_hooks
_modes = torch._C._len_torch_function_stack
_is_compiling = torch.compiler.is_compiling

# Who sees each call


def _watched() -> bool:
    """Whether somebody sees each call, so that none may be left out."""
    return bool(
        _functorch_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or nn.Module.__call__ is not MODULE_CALL
        or nn.Module._call_impl is not _call_impl
        or _hooks
        or _pre_hooks
        or _backward_hooks
        or _backward_pre_hooks
        or (_modes() and _other_modes())
    )


def _other_modes() -> bool:
    """Than those that only tell where new tensors are made."""
    modes = map(torch._C._get_function_stack_at, range(_modes()))
    return any(type(mode) is not DeviceContext for mode in modes)


def aside(now: object, written: object) -> bool:
    """Whether a class's own method has to run: it is another by ``now``, or each call is seen."""
    return now is not written or _is_compiling() or watched()


class _Kind(NamedTuple):
    handler: Callable[..., Any] | None
    forward: object = None  # the class's, when this was learnt


_kinds: dict[type, _Kind] = {}
_without_options: dict[type, activations.Activation] = {}  # classes that are always this one


def _learn(kind: type) -> _Kind:
    """What is done with objects of a class."""
    found, forward = _Kind(None), getattr(kind, "forward", None)
    if kind in (types.FunctionType, types.BuiltinFunctionType):
        found = _Kind(_function)
    elif kind is types.MethodType:
        found = _Kind(_method)
    elif is_convolution(kind):
        found = _Kind(_convolve, forward)
    elif is_frozen(kind):
        found = _Kind(_normalize, forward)
    elif is_activation(kind):
        found = _Kind(_activate, forward)
        name = activations.without_options(kind)
        if name is not None:
            _without_options[kind] = activations.Activation(name)
    elif is_sequential(kind):
        found = _Kind(_sequence, forward)
    if len(_kinds) > 1000:  # classes made on the fly
        _kinds.clear()
    return _kinds.setdefault(kind, found)


# Steps


def _call(f: Any, x: Any) -> Any:
    """``f(x)``; may be given and return what is pending."""
    kind = type(f)
    handler, forward = _kinds.get(kind) or _learn(kind)
    if handler is None:
        return f(value(x))
    if forward is None:
        return handler(f, x, (), {})
    d = f.__dict__
    if (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or kind.forward is not forward
        or "forward" in d
        or d.get("_compiled_call_impl") is not None
    ):
        return f(value(x))
    return handler(f, d, x)


def call_with(f: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``f(x, ...)``, likewise. No layer is merged that is told more than its input."""
    handler, forward = _kinds.get(type(f)) or _learn(type(f))
    if handler is None or forward is not None:
        return f(value(x), *args, **kwargs)
    return handler(f, x, args, kwargs)


def _add(a: Any, b: Any, function: Any = operator.add) -> Any:
    """``function(a, b)``, which is a sum, unless it has been replaced."""
    if function is operator.add or function is torch.add:
        if takes(a, b):
            return a
        if takes(b, a, second=True):
            return b
    return function(value(a), value(b))


def _iadd(a: Any, b: Any) -> Any:
    """What ``a`` is after ``a += b``."""
    return a if takes(a, b) else operator.iadd(value(a), value(b))  # type: ignore[no-untyped-call]


def method(x: Any, name: str, *args: Any) -> Any:
    """``x.name(...)``, of an activation or a sum."""
    if name in ("add", "add_"):
        if takes(x, args[0]):
            return x
        if name == "add" and takes(args[0], x, second=True):
            return args[0]
        return getattr(value(x), name)(value(args[0]))
    if waits(x):
        found = activations.of_call(name, (x,), {})
        if found is not None:
            return finish(x, *found)
    return getattr(value(x), name)()


# Kinds of what is called


def _function(f: Any, x: Any, args: Any, kwargs: Any) -> Any:
    if waits(x):
        found = activations.of_call(f, (x, *args), kwargs)
        if found is not None:
            return finish(x, *found)
    itself, raw = getattr(f, "_pending", (None, f))
    return (raw if itself is f else f)(value(x), *args, **kwargs)


def _method(f: Any, x: Any, args: Any, kwargs: Any) -> Any:
    itself, raw = getattr(f.__func__, "_pending", (None, f))
    if itself is f.__func__:  # functools.wraps copies attributes
        return raw(f.__self__, value(x), *args, **kwargs)
    return f(value(x), *args, **kwargs)


def _convolve(conv: Any, d: dict[str, Any], x: Any) -> Any:
    x = value(x)
    if type(x) is not Tensor or "_conv_forward" in d:
        return conv(x)
    return Convolution(conv, x)


def _normalize(bn: Any, d: dict[str, Any], x: Any) -> Any:
    conv, folded = None, False
    if type(x) is Convolution and x.conv is not None:
        conv = x.conv
        if d.get("fold_conv") and x.output is None and fold.applies(conv, bn, x.input):
            folded, input = True, x.input
        else:
            input = convolved(x)
    else:
        input = value(x)
    if d["inplace"] or not (folded or _fits(input, bn)):
        return bn(convolved(x) if folded else input)
    n = Normalized(bn, conv, folded, input)
    if d["activation"] is not None:
        finish(n, d["activation"], d["negative_slope"])
    return n


def _fits(input: Any, bn: Any) -> bool:
    """Whether there is nothing to complain about."""
    if type(input) is not Tensor or not input.is_floating_point():
        return False
    rank, ranks = input.dim(), bn._ranks
    fits = rank in ranks if ranks else rank > 1
    return fits and input.size(1) == bn.num_features


def _activate(f: Any, d: dict[str, Any], x: Any) -> Any:
    """An activation, or an identity."""
    if waits(x):
        found = _without_options.get(type(f)) or activations.of_module(f)
        if found is not None:
            return x if found.name is None else finish(x, *found)
    elif type(x) is Convolution and type(f) is nn.Identity:
        return x
    return f(value(x))


def _sequence(modules: Any, d: dict[str, Any], x: Any) -> Any:
    """What ``nn.Sequential`` does."""
    for module in d["_modules"].values():
        x = call(module, x)
    return x


def sequence(modules: nn.Module, x: Any) -> Any:
    """What the forward of a Sequential is."""
    return value(_sequence(modules, modules.__dict__, x))


def _own(function: Any, module: types.ModuleType) -> object:
    """What torch defines there; something else, if that had been patched before."""
    code = getattr(function, "__code__", None)
    return function if code is not None and code.co_filename == module.__file__ else object()


# The steps, as they are above, or in C++ (csrc/node/steps.h), which does what is usual and leaves
# the rest to those above.

watched: Callable[[], bool] = _watched
call: Callable[[Any, Any], Any] = _call
value: Callable[[Any], Any] = pending.value
settle: Callable[[Any], Any] = pending.settle
add: Callable[..., Any] = _add
iadd: Callable[[Any, Any], Any] = _iadd
if node.compiled is not None:
    compiled = node.compiled
    _of_torch = {
        "Module": nn.Module,
        "Conv2d": nn.Conv2d,
        "functions": vars(F),
        "of_module": activations.of_module,
        "own_call": _own(nn.Module.__call__, internals),
        "own_call_impl": _own(nn.Module._call_impl, internals),
        "own_getattr": _own(nn.Module.__getattr__, internals),
        "own_forward": _own(nn.Conv2d.forward, convolutions),
        "own_conv_forward": _own(nn.Conv2d._conv_forward, convolutions),
        "own_conv2d": F.conv2d if type(F.conv2d) is types.BuiltinFunctionType else object(),
    }
    # What it takes of these is listed in csrc/node/pending.h.
    compiled.bind_steps({**vars(pending), **globals(), **_of_torch})
    watched, call, value = compiled.watched_step, compiled.call_step, compiled.value_step
    settle, add, iadd = compiled.settle_step, compiled.add_step, compiled.iadd_step
