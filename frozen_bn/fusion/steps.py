"""What rewritten methods call: steps that look at what is there when they run, and do the work of
several layers by one kernel where they can; otherwise they call them one after the other.

A step may be given, and return, what is pending: a convolution held back until the next step, or a
batch normalization until it is known what follows. How ``rewrite.py`` uses them makes sure that
nothing else sees it, and that what it is made of does not change in between.

To merge another layer (say, batch normalization + max pool): its class becomes a kind in ``_learn``,
with a handler that looks for a pending ``Normalized``, as ``_activate`` does; ``compute`` hands it to
the kernel; and ``roles.py`` names the step that calls it.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as internals
from torch.utils._device import DeviceContext

from .. import activations
from ..checks import ACTIVATIONS, SMOOTH, Statistics
from ..functional import activate as activate_sum
from ..functional import frozen_batch_norm, has_kernels, is_transformed
from ..modules import _FrozenBatchNorm
from ..pair import frozen_batch_norm_pair
from . import fold

Handler = Callable[..., Any]

_CONVOLUTIONS: dict[type, Any] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
    nn.ConvTranspose1d: None,
    nn.ConvTranspose2d: None,
    nn.ConvTranspose3d: None,
}
_SMOOTH = {ACTIVATIONS[code] for code in SMOOTH}
_VECTORS = {Tensor, Parameter, type(None)}
_module_call = nn.Module.__call__
_global_hooks = [
    vars(internals)[f"_global_{name}_hooks"]
    for name in ("forward", "forward_pre", "backward", "backward_pre")
]
_modes = torch._C._len_torch_function_stack
_grad_enabled = torch.is_grad_enabled


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


#: By rewritten method, the one that may return what is pending.
raw_methods: WeakKeyDictionary[Any, types.FunctionType] = WeakKeyDictionary()


class Convolution:
    """A convolution of ``input``; with ``output``, one that has been run, whose output nothing else
    has unless ``conv`` is None."""

    __slots__ = ("conv", "input", "output")

    def __init__(self, conv: Any, input: Tensor) -> None:
        self.conv, self.input, self.output = conv, input, None


class Normalized:
    """``bn(input) + other``, until ``output`` is there. ``own``: nothing else has ``input``. With
    ``folded``, ``input`` is that of the convolution until ``bias`` is there, then its output but
    for that."""

    __slots__ = (
        "bias", "bn", "conv", "eps", "folded", "grad", "input", "other", "output", "own", "vectors",
    )  # fmt: skip


# What is there now


def watched() -> bool:
    """Whether somebody sees each call, so that none may be left out."""
    if is_transformed() or nn.Module.__call__ is not _module_call:
        return True
    for hooks in _global_hooks:
        if hooks:
            return True
    return _modes() > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(_modes())
    )


def aside(now: object, written: object) -> bool:
    """Whether a class's own method has to run: it is another by ``now``, or each call is seen."""
    return torch.compiler.is_compiling() or now is not written or watched()


def _is_free(d: dict[str, Any]) -> bool:
    """Of a module's attributes: whether calling it is calling its class's forward."""
    return not (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
        or d.get("_compiled_call_impl") is not None
    )


class _Kind(NamedTuple):
    handler: Handler | None
    forward: object  # the class's, when this was learnt
    written: type | None = None  # of a class made here: the one it was made from,
    written_forward: object = None  # and its forward


_OTHER = _Kind(None, None)
_kinds: dict[type, _Kind] = {}


def _learn(kind: type) -> _Kind:
    """What is done with objects of a class."""
    found = _OTHER
    forward = getattr(kind, "forward", None)
    if not issubclass(kind, nn.Module):
        if kind in (types.FunctionType, types.BuiltinFunctionType):
            found = _Kind(_function, None)
        elif kind is types.MethodType:
            found = _Kind(_method, None)
    elif kind in _CONVOLUTIONS:
        found = _Kind(_convolve, forward)
    elif issubclass(kind, _FrozenBatchNorm):
        own = all(
            getattr(kind, name) is getattr(_FrozenBatchNorm, name)
            for name in ("forward", "normalize", "check_rank", "_vectors")
        )
        if own and not any(isinstance(getattr(kind, n, None), property) for n in _NAMES):
            found = _Kind(_normalize, forward)
    elif activations.is_known(kind):
        found = _Kind(_activate, forward)
    elif issubclass(kind, nn.Sequential) and kind.__iter__ is nn.Sequential.__iter__:
        original = vars(kind).get("_frozen_bn")
        if original is None and forward is nn.Sequential.forward:
            found = _Kind(_sequence, forward)
        elif original is not None and original.written.forward is nn.Sequential.forward:
            found = _Kind(_sequence, forward, original.written, nn.Sequential.forward)
    if len(_kinds) > 1000:  # classes made on the fly
        _kinds.clear()
    return _kinds.setdefault(kind, found)


_NAMES = ("weight", "bias", "running_mean", "running_var")


# Steps


def call(f: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``f(x, ...)``; may be given and return what is pending."""
    t = type(f)
    handler, forward, written, written_forward = _kinds.get(t) or _learn(t)
    if handler is None:
        return f(value(x), *args, **kwargs)
    if forward is None:
        return handler(f, x, args, kwargs)
    if (
        args
        or kwargs
        or t.forward is not forward
        or (written is not None and written.forward is not written_forward)  # type: ignore[attr-defined]
        or not _is_free(f.__dict__)
    ):
        return f(value(x), *args, **kwargs)
    return handler(f, x)


convolve = normalize = call


def activate(f: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """``f(x, ...)``, computed."""
    return value(call(f, x, *args, **kwargs))


def value(x: Any) -> Any:
    """``x``, computed if it is pending. From now on others may have it."""
    t = type(x)
    if t is Normalized:
        return compute(x)
    if t is Convolution:
        output = _convolved(x)
        x.conv = None
        return output
    return x


def settle(x: Any) -> Any:
    """``x``, computed as far as it rests on what others may change before the next step."""
    t = type(x)
    if t is Convolution:
        _convolved(x)
    elif t is Normalized and x.output is None:
        other = x.other
        if not x.own or (other is not None and not (type(other) is Normalized and other.own)):
            compute(x)
        elif x.folded:
            _run_folded(x)
    return x


def add(a: Any, b: Any, function: Any = operator.add) -> Any:
    """``function(a, b)``, which is a sum, unless it has been replaced."""
    if function is operator.add or function is torch.add:
        if type(a) is Normalized and _takes(a, b):
            return a
        if type(b) is Normalized and _takes(b, a):
            return b
    return function(value(a), value(b))


def add_into(a: Any, b: Any) -> Any:
    """What ``a`` is after ``a += b``."""
    if type(a) is Normalized and _takes(a, b):
        return a
    return operator.iadd(value(a), value(b))


def method(x: Any, name: str, *args: Any) -> Any:
    """``x.name(...)``, of an activation or a sum."""
    if name == "add" or name == "add_":
        if type(x) is Normalized and _takes(x, args[0]):
            return x
        if name == "add" and type(args[0]) is Normalized and _takes(args[0], x):
            return args[0]
    elif _waits(x):
        found = activations.of_call(name, (x, *args), {})
        if found is not None:
            return compute(x, *found)
    return getattr(value(x), name)(*map(value, args))


# Kinds of layers


def _function(f: Any, x: Any, args: Any, kwargs: Any) -> Any:
    if _waits(x):
        found = activations.of_call(f, (x, *args), kwargs)
        if found is not None and found.name is not None:
            return compute(x, *found)
    return f(value(x), *args, **kwargs)


def _method(f: Any, x: Any, args: Any, kwargs: Any) -> Any:
    raw = raw_methods.get(f.__func__)
    return f(value(x), *args, **kwargs) if raw is None else raw(f.__self__, value(x), *args, **kwargs)


def _convolve(conv: Any, x: Any) -> Any:
    x = value(x)
    return conv(x) if type(x) is not Tensor or watched() else Convolution(conv, x)


def _convolved(c: Convolution) -> Tensor:
    if c.output is None:
        c.output, c.input = _run(c.conv, c.input), None
    return c.output  # type: ignore[no-any-return]


def _run(conv: Any, input: Any) -> Any:
    """``conv(input)``, where nothing is hooked to it."""
    d = conv.__dict__
    function, parameters = _CONVOLUTIONS[type(conv)], d["_parameters"]
    weight = parameters.get("weight")
    if function is None or type(weight) is not Parameter or d["padding_mode"] != "zeros":
        return conv(input)
    options = d["stride"], d["padding"], d["dilation"], d["groups"]
    return function(input, weight, parameters.get("bias"), *options)


def _normalize(bn: Any, x: Any) -> Any:
    d = bn.__dict__
    conv, folded = None, False
    if type(x) is Convolution and x.conv is not None:
        conv = x.conv
        folded = d.get("fold_conv") and x.output is None and fold.is_normalized_by(conv, bn)
        input = x.input if folded else _convolved(x)
    else:
        input = value(x)
    vectors = bn._vectors()
    mean = vectors[0]
    if (
        type(input) is not Tensor
        or d["inplace"]
        or not (folded or _fits(input, bn._ranks, mean))
        or any(type(vector) not in _VECTORS for vector in vectors)
        or (conv is None and watched())
    ):
        return bn(_convolved(x) if folded else input)
    n = Normalized()
    n.bn, n.vectors, n.eps = bn, vectors, d["eps"]
    n.input, n.own, n.conv, n.folded = input, conv is not None, conv, folded
    n.other = n.output = n.bias = None
    n.grad = _grad_enabled()
    if d["activation"] is not None:
        compute(n, d["activation"], d["negative_slope"])
    return n


def _fits(input: Tensor, ranks: tuple[int, ...], mean: Tensor) -> bool:
    rank = input.dim()
    return (
        rank in ranks if ranks else rank > 1
    ) and input.size(1) == mean.numel() and input.is_floating_point()  # fmt: skip


def _activate(f: Any, x: Any) -> Any:
    """An activation, or an identity."""
    if _waits(x):
        found = activations.of_module(f)
        if found is not None:
            return x if found.name is None else compute(x, *found)
    elif type(x) is Convolution and type(f) is nn.Identity:
        return x
    return f(value(x))


def _sequence(modules: Any, x: Any) -> Any:
    if watched():
        return modules(value(x))
    return sequence(modules, x)


def sequence(modules: nn.Module, x: Any) -> Any:
    """What ``nn.Sequential`` does."""
    for module in modules._modules.values():
        x = call(module, x)
    return x


# Sums and kernels


def _takes(n: Normalized, other: Any) -> bool:
    """Whether ``n`` can add ``other``, and then does."""
    if not _waits(n) or n.other is not None:
        return False
    if n.folded:
        _run_folded(n)
    if _waits(other) and other.other is None:
        pair = not (n.folded or other.folded or _trains(n) or _trains(other))
        addend = other.input if pair else compute(other)
    else:
        addend, pair = value(other), False
    x = n.input
    if type(addend) is not Tensor or (addend.shape, addend.dtype, addend.device) != (
        x.shape, x.dtype, x.device,
    ):  # fmt: skip
        return False
    n.other = other if pair else addend
    return True


def _waits(x: Any) -> bool:
    """Whether more can be done by the computation of ``x``."""
    return type(x) is Normalized and x.output is None and x.grad is _grad_enabled()


def _trains(n: Normalized) -> bool:
    _, _, weight, bias = n.vectors
    return n.grad and (
        (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )


def _run_folded(n: Normalized, last: bool = False) -> None:
    """Runs the convolution with the layer's scale in its weight; what is to be added comes later,
    unless nothing else does. Where that is not to be trained, the later pass does it all."""
    if n.bias is None and n.input is not None:
        if not last and has_kernels(n.input) and not fold.is_trained(n.conv, n.bn):
            n.input, n.folded = _run(n.conv, n.input), False
            return
        statistics = Statistics(*n.vectors, n.eps)
        n.input, n.bias = fold.convolve(n.conv, statistics, n.input, not last)
        if n.bias is None:
            n.output = n.input


def compute(n: Normalized, activation: str | None = None, slope: float = 0.01) -> Tensor:
    """The value of ``n``, with an activation if that is wanted, which takes a pending one."""
    if n.output is None:
        if _grad_enabled() is n.grad:
            n.output = _kernel(n, activation, slope)
        else:  # a call in between changed it
            with torch.inference_mode(False), torch.set_grad_enabled(n.grad):
                n.output = _kernel(n, None, slope)
        n.input = n.other = n.bias = n.conv = None
    return n.output  # type: ignore[no-any-return]


def _kernel(n: Normalized, activation: str | None, slope: float) -> Tensor:
    """All that is pending, by one call."""
    other, weight = n.other, n.vectors[2]
    saved = n.grad and (activation in _SMOOTH or (weight is not None and weight.requires_grad))
    folded = n.folded
    if folded:
        _run_folded(n, last=other is None and activation is None)
    in_place = n.own and not n.folded and not saved
    if recorders:
        _record(n, activation, folded, in_place and not folded)
    if n.output is not None:
        return n.output  # type: ignore[no-any-return]
    if n.folded:
        return activate_sum(n.input, n.bias, other, activation, slope)
    if type(other) is Normalized:
        return frozen_batch_norm_pair(
            n.input,
            Statistics(*n.vectors, n.eps),
            other.input,
            Statistics(*other.vectors, other.eps),
            activation=activation,
            negative_slope=slope,
            inplace=in_place,
        )
    return frozen_batch_norm(
        n.input,
        *n.vectors,
        n.eps,
        activation=activation,
        negative_slope=slope,
        residual=other,
        inplace=in_place,
    )


def _record(n: Normalized, activation: str | None, folded: bool, in_place: bool) -> None:
    other = n.other
    pair = type(other) is Normalized
    added = "two branches" if pair else "add" if other is not None else ""
    merges = [Merge(n.bn, added, activation, n.conv, folded, in_place)]
    if pair:
        merges.append(Merge(other.bn, added, activation, other.conv, False, other.own))
    for recorder in recorders:
        for merge in merges:
            recorder(merge)
