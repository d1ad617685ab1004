"""What rewritten methods call: steps that look at what is there when they run, and do the work of
several layers by one kernel where they can; otherwise they call them one after the other.

A step may be given, and return, what is pending: a convolution, or a batch normalization that waits
for what follows. ``rewrite`` makes sure that nothing else sees it, and that what it is made of does
not change in between.

What models nearly always do is done in C++, where there is the autograd node: see the end.

To merge another layer, give its class a handler in ``_learn``, as ``_activate`` is that of
activations, and have ``_kernel`` call a kernel for it (CONTRIBUTING, "How fusion works").
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

from .. import activations, functional, node
from ..checks import ACTIVATIONS, SMOOTH
from ..functional import _functorch_active, _tracing_state, has_kernels
from ..modules import _FrozenBatchNorm
from ..pair import frozen_batch_norm_pair
from . import fold

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_OF_CONVOLUTIONS = ("forward", "_conv_forward", "_output_padding")

#: What torch's classes do, as it was at first: somebody may patch them.
_originals = {
    kind: {name: getattr(kind, name, None) for name in _OF_CONVOLUTIONS}
    for kind in (*_CONVOLUTIONS, *activations.TORCHS, nn.Sequential)
}
SEQUENTIAL = nn.Sequential.forward
_SMOOTH = {ACTIVATIONS[code] for code in SMOOTH}
_module_call, _call_impl = nn.Module.__call__, nn.Module._call_impl
_hooks, _pre_hooks = internals._global_forward_hooks, internals._global_forward_pre_hooks
_backward_hooks = internals._global_backward_hooks
_backward_pre_hooks = internals._global_backward_pre_hooks
_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_compiling = torch.compiler.is_compiling
_grad_enabled, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled


class Merge(NamedTuple):
    """What one computation did, for summary()."""

    layer: _FrozenBatchNorm
    added: str  # "", "add", "two branches"
    activation: str | None
    conv: nn.Module | None
    folded: bool
    in_place: bool


#: Told of every Merge, while summary() runs a model.
recorders: list[Callable[[Merge], None]] = []


class Convolution:
    """A convolution of ``input``; with ``output``, one that has been run. Nothing else has the
    output, unless ``conv`` is None."""

    __slots__ = ("conv", "input", "output")

    conv: Any
    input: Any
    output: Any


class Normalized:
    """``bn(input) + other``, until ``output`` is there. With ``conv``, nothing else has ``input``.
    ``folded``, ``input`` is that of the convolution until ``bias`` is there, then its output but
    for that."""

    bias: Tensor | None
    bn: _FrozenBatchNorm
    branch: _FrozenBatchNorm | None  # whose output is added
    conv: Any
    folded: bool
    grad: bool
    inference: bool
    input: Any
    other: Any
    output: Any
    __slots__ = tuple(__annotations__)


# Who sees each call


def _watched() -> bool:
    """Whether somebody sees each call, so that none may be left out."""
    return bool(
        _functorch_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or nn.Module.__call__ is not _module_call
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
    elif _is_frozen(kind):
        found = _Kind(_normalize, forward)
    elif (
        issubclass(kind, nn.Module)
        and activations.is_known(kind)
        and (kind not in _originals or _is_original(kind, kind))
    ):
        found = _Kind(_activate, forward)
        name = activations.without_options(kind)
        if name is not None:
            _without_options[kind] = activations.Activation(name)
    elif is_sequential(kind):
        found = _Kind(_sequence, forward)
    if len(_kinds) > 1000:  # classes made on the fly
        _kinds.clear()
    return _kinds.setdefault(kind, found)


def is_convolution(kind: type) -> bool:
    """Whether it is one of torch's classes, or computes what that does."""
    base: Any = next((base for base in kind.__mro__ if base in _CONVOLUTIONS), None)
    return base is not None and _is_called(kind) and _is_original(kind, base)


def _is_original(kind: type, base: type) -> bool:
    return all(getattr(kind, name, None) is _originals[base][name] for name in _OF_CONVOLUTIONS)


def _is_called(kind: Any) -> bool:
    """Whether calling it is calling its forward."""
    return kind.__call__ is _module_call


def _is_frozen(kind: Any) -> bool:
    """Whether it is one of this package's classes, or computes what that does."""
    if not issubclass(kind, _FrozenBatchNorm):
        return False
    names = ("forward", "normalize", "check_rank", "_vectors")
    own = all(getattr(kind, name) is getattr(_FrozenBatchNorm, name) for name in names)
    vectors = (getattr(kind, name, None) for name in fold.VECTORS)
    own = own and _is_called(kind)
    return own and not any(isinstance(vector, property) for vector in vectors)


def is_sequential(kind: Any) -> bool:
    """Whether calling it is calling its children one after the other, and nothing else."""
    forward = getattr(kind, "forward", None)
    return (
        issubclass(kind, nn.Sequential)
        and _is_called(kind)
        and getattr(forward, "written", forward) is SEQUENTIAL
        and kind.__iter__ is nn.Sequential.__iter__
    )


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


def _value(x: Any) -> Any:
    """``x``, computed if it is pending. From now on others may have it."""
    kind = type(x)
    if kind is Normalized:
        return _compute(x)
    if kind is Convolution:
        output = _convolved(x)
        x.conv = None
        return output
    return x


def _settle(x: Any) -> Any:
    """``x``, computed as far as it rests on what layers may change that are called before the next
    step: not on statistics and weights."""
    kind = type(x)
    if kind is Convolution:
        _convolved(x)
    elif kind is Normalized and x.output is None:
        other = x.other
        if x.conv is None or not (other is None or (type(other) is Normalized and other.conv)):
            _compute(x)
        elif x.folded:
            _unfold(x)
    return x


def _add(a: Any, b: Any, function: Any = operator.add) -> Any:
    """``function(a, b)``, which is a sum, unless it has been replaced."""
    if function is operator.add or function is torch.add:
        if _takes(a, b):
            return a
        if _takes(b, a, second=True):
            return b
    return function(value(a), value(b))


def _iadd(a: Any, b: Any) -> Any:
    """What ``a`` is after ``a += b``."""
    return a if _takes(a, b) else operator.iadd(value(a), value(b))  # type: ignore[no-untyped-call]


def method(x: Any, name: str, *args: Any) -> Any:
    """``x.name(...)``, of an activation or a sum."""
    if name in ("add", "add_"):
        if _takes(x, args[0]):
            return x
        if name == "add" and _takes(args[0], x, second=True):
            return args[0]
        return getattr(value(x), name)(value(args[0]))
    if _waits(x):
        found = activations.of_call(name, (x,), {})
        if found is not None:
            return _finish(x, *found)
    return getattr(value(x), name)()


# Kinds of what is called


def _function(f: Any, x: Any, args: Any, kwargs: Any) -> Any:
    if _waits(x):
        found = activations.of_call(f, (x, *args), kwargs)
        if found is not None:
            return _finish(x, *found)
    itself, pending = getattr(f, "_pending", (None, f))
    return (pending if itself is f else f)(value(x), *args, **kwargs)


def _method(f: Any, x: Any, args: Any, kwargs: Any) -> Any:
    itself, pending = getattr(f.__func__, "_pending", (None, f))
    if itself is f.__func__:  # functools.wraps copies attributes
        return pending(f.__self__, value(x), *args, **kwargs)
    return f(value(x), *args, **kwargs)


def _convolve(conv: Any, d: dict[str, Any], x: Any) -> Any:
    x = value(x)
    if type(x) is not Tensor or "_conv_forward" in d:
        return conv(x)
    c = Convolution()
    c.conv, c.input, c.output = conv, x, None
    return c


def _convolved(c: Convolution) -> Any:
    if c.output is None:
        c.output, c.input = c.conv(c.input), None
    return c.output


def _normalize(bn: Any, d: dict[str, Any], x: Any) -> Any:
    conv, folded = None, False
    if type(x) is Convolution and x.conv is not None:
        conv = x.conv
        if d.get("fold_conv") and x.output is None and fold.applies(conv, bn, x.input):
            folded, input = True, x.input
        else:
            input = _convolved(x)
    else:
        input = value(x)
    if d["inplace"] or not (folded or _fits(input, bn)):
        return bn(_convolved(x) if folded else input)
    n = Normalized()
    n.bn, n.conv, n.folded, n.input = bn, conv, folded, input
    n.other = n.output = n.bias = n.branch = None
    n.grad, n.inference = _grad_enabled(), _inference()
    if d["activation"] is not None:
        _finish(n, d["activation"], d["negative_slope"])
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
    if _waits(x):
        found = _without_options.get(type(f)) or activations.of_module(f)
        if found is not None:
            return x if found.name is None else _finish(x, *found)
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


# Sums and kernels


def _waits(x: Any) -> bool:
    """Whether more can be done by the computation of ``x``."""
    return (
        type(x) is Normalized
        and x.output is None
        and x.grad is _grad_enabled()
        and x.inference is _inference()
    )


def _takes(n: Any, other: Any, second: bool = False) -> bool:
    """Whether ``n`` can add ``other``, and then does; ``second``: to it, of whose strides it is."""
    if not _waits(n) or n.other is not None or n is other:
        return False
    if n.folded:
        _unfold(n)
    branch = other.bn if _waits(other) and other.other is None else None
    pair = branch is not None and not (n.folded or other.folded or _trains(n) or _trains(other))
    addend, x = other.input if pair else value(other), n.input
    if type(addend) is not Tensor or addend.shape != x.shape:
        return False
    if addend.dtype != x.dtype or addend.device != x.device:
        return False
    if second and addend.stride() != x.stride():
        return False
    n.other, n.branch = other if pair else addend, branch
    return True


def _trains(n: Normalized) -> bool:
    return n.grad and any(v is not None and v.requires_grad for v in n.bn._vectors()[2:])


def _unfold(n: Normalized) -> None:
    """Runs the convolution, with the layer's scale in its weight; the bias is left to a later pass.
    Where nothing of that is to be trained, that pass does it all for the same price."""
    if n.bias is not None:
        return
    conv, n.folded = n.conv, fold.is_trained(n.conv, n.bn) or not has_kernels(n.input)
    if n.folded:
        n.input, n.bias = fold.convolve(conv, n.bn.statistics(), n.input, True)
    else:
        n.input = conv(n.input)


def _compute(n: Normalized) -> Any:
    """The value of ``n``, in the modes in which it was written."""
    if n.output is not None:
        return n.output
    if n.grad is _grad_enabled() and n.inference is _inference():
        return _finish(n)
    with torch.inference_mode(n.inference), torch.set_grad_enabled(n.grad):
        return _finish(n)


def _finish(n: Normalized, activation: str | None = None, slope: float = 0.01) -> Any:
    """All that waits, and an activation of it."""
    n.output = _kernel(n, activation, slope)
    n.input = n.other = n.bias = n.conv = None
    return n.output


def _kernel(n: Normalized, activation: str | None, slope: float) -> Any:
    """All that is pending, by one call."""
    bn, other, folded = n.bn, n.other, n.folded
    if folded and (other is not None or activation is not None):
        _unfold(n)
    in_place = n.conv is not None and not n.folded and _may_overwrite(n, activation)
    if recorders:
        _record(n, activation, folded, in_place and not folded)
    if n.folded:
        if n.bias is None:
            return fold.convolve(n.conv, bn.statistics(), n.input, False)[0]
        return functional.activate(n.input, n.bias, other, activation, slope)
    if type(other) is Normalized:
        branches = n.input, bn.statistics(), other.input, other.bn.statistics()
        options: dict[str, Any] = {"activation": activation, "negative_slope": slope}
        return frozen_batch_norm_pair(*branches, **options, inplace=in_place)
    return bn.normalize(n.input, other, activation, slope, in_place)


def _may_overwrite(n: Normalized, activation: str | None) -> bool:
    """Whether the output may take the place of an input that nothing else has."""
    if n.input.is_inference() is not n.inference or _dispatch_modes():
        return False  # or somebody keeps what operators return
    if not n.grad:
        return not n.input.requires_grad  # nor would the result
    weight = n.bn.__dict__["_parameters"].get("weight")
    saved = activation in _SMOOTH or (weight is not None and weight.requires_grad)
    return not (saved or _functorch_active() or forward_ad._current_level >= 0)


def _record(n: Normalized, activation: str | None, folded: bool, in_place: bool) -> None:
    other = n.other
    added = "two branches" if n.branch is not None else "add" if other is not None else ""
    merges = [Merge(n.bn, added, activation, n.conv, folded, in_place)]
    if type(other) is Normalized:
        merges.append(Merge(other.bn, added, activation, other.conv, False, other.conv is not None))
    elif n.branch is not None:
        merges.append(Merge(n.branch, added, activation, None, False, False))
    for recorder in recorders:
        for merge in merges:
            recorder(merge)


def _own(function: Any, module: types.ModuleType) -> object:
    """What torch defines there; something else, if that had been patched before."""
    code = getattr(function, "__code__", None)
    return function if code is not None and code.co_filename == module.__file__ else object()


# The steps, as they are above, or in C++ (csrc/node/steps.h), which does what is usual and leaves
# the rest to those above.

watched: Callable[[], bool] = _watched
call: Callable[[Any, Any], Any] = _call
value: Callable[[Any], Any] = _value
settle: Callable[[Any], Any] = _settle
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
    compiled.bind_steps({**globals(), **_of_torch})
    watched, call, value = compiled.watched_step, compiled.call_step, compiled.value_step
    settle, add, iadd = compiled.settle_step, compiled.add_step, compiled.iadd_step
