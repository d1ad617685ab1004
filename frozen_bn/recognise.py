"""Which modules are batch normalizations, what each becomes, and why some are left alone."""

from __future__ import annotations

import functools
import inspect
import re
from collections import deque
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from . import activations
from .activations import defined
from .modules import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
    _FrozenBatchNorm,
)
from .probe import COUNTERS, VECTORS, formula, tensors_beside

_TORCH_CLASSES: dict[type[nn.Module], type[_FrozenBatchNorm]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenBatchNorm2d,
}

#: As torch has it: somebody may put another in its place.
_TORCH_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _TORCH_CLASSES}

#: What a subclass of those may define and still compute the same.
_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__repr__"}
_HARMLESS |= {"__orig_bases__", "__parameters__", "__firstlineno__", "__static_attributes__"}
_HARMLESS |= {"__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl"}
_HARMLESS |= {"extra_repr", "_get_name", "reset_parameters", "reset_running_stats"}

#: Set on an instance, these replace what its class does.
_OVERRIDING = frozenset(("forward", "_call_impl", "_check_input_dim"))

#: timm's classes, all to become FrozenBatchNorm2d: they hold an activation and a dropout.
_TIMM_CLASSES = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
_TIMM_SUBMODULES = ("act", "drop")


#: Why what :func:`unregistered` finds is not frozen.
NO_SUBMODULE = "it is kept in a plain list or dict, use nn.ModuleList or nn.ModuleDict"


class LeftAlone(Exception):
    """Why a module is left as it is."""


class Recognised(NamedTuple):
    """What a batch normalization becomes."""

    frozen_class: type[_FrozenBatchNorm]
    eps: float
    activation: str | None = None
    negative_slope: float = 0.01
    submodules: Mapping[str, nn.Module | None] = {}  # that it keeps
    ranks: tuple[int, ...] | None = None  # of its inputs, unless those of the class


def _is_of_timm(kind: type[nn.Module]) -> bool:
    return any(kind is defined("timm.layers.norm_act", name) for name in _TIMM_CLASSES)


def _class_name(module: nn.Module) -> str:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return str(module.original_name) if scripted else type(module).__name__


#: FrozenBatchNorm2d, batch_norm; FrozenBN, ABN, BN2d, BN2.
_NAMED = re.compile(r"[Bb]atch_?[Nn]orm|BATCH_?NORM|(^|[a-z_]|A)BN\d?d?$")


def _looks_like_one(module: nn.Module) -> bool:
    """Of a module of unknown class: whether it holds statistics of channels, or has the name and
    holds something. Nothing of it is run."""
    held = {**vars(module), **dict(module._parameters.items()), **dict(module._buffers.items())}
    statistics = [held.get(name) for name in ("running_mean", "running_var")]
    tensors = [value for value in statistics if isinstance(value, Tensor)]
    if len(tensors) == 2:
        return any(is_lazy(value) or value.dim() == 1 or value.numel() > 1 for value in tensors)
    has_tensors = any(isinstance(value, Tensor) for value in held.values())
    return bool(_NAMED.search(_class_name(module)) and has_tensors and not len(module._modules))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a batch normalization, or something like one, not frozen by this package."""
    if isinstance(module, _FrozenBatchNorm | _InstanceNorm):
        return False
    return (
        isinstance(module, _BatchNorm)
        or any(map(_is_of_timm, type(module).__mro__))
        or _looks_like_one(module)
    )


def _plainly_held(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in lists, tuples, sets, deques, dicts and bound methods among its attributes."""
    for name, value in vars(module).items():
        if name not in ("_modules", "_parameters", "_buffers", "_original") and "hook" not in name:
            yield from _modules_in(name, value, 4)


def _modules_in(place: str, value: object, depth: int) -> Iterator[tuple[str, nn.Module]]:
    value = getattr(value, "__self__", value) if isinstance(value, MethodType) else value
    if isinstance(value, nn.Module):
        yield place, value
    elif isinstance(value, functools.partial):
        yield from _modules_in(place, (value.func, *value.args, value.keywords), depth)
    elif isinstance(value, list | tuple | set | frozenset | deque | dict) and depth > 0:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _modules_in(f"{place}[{key!r}]", item, depth - 1)


def unregistered(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Batch normalizations that a module of ``root`` keeps (also) in a plain list, tuple, dict or
    the like, where they are not replaced; with a name for each."""
    registered = {*root.modules()}
    for path, parent in root.named_modules():
        for place, held in _plainly_held(parent):
            if held is parent:  # a method of its own, bound to it
                continue
            for inner, layer in held.named_modules():
                if is_batch_norm(layer) and (layer is held or layer not in registered):
                    yield ".".join(filter(None, (path, place, inner))), layer


def _torch_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch whose ``forward`` is that of ``kind``, if it is one, or derived from one
    and changes no more than how it is made."""
    base = next((base for base in kind.__mro__ if base in _TORCH_CLASSES), None)
    added = [c for c in kind.__mro__ if base is not None and c not in base.__mro__]
    return base if all({*vars(c)} <= _HARMLESS for c in added) else None


def _recognise_torchs(module: nn.Module) -> type[_FrozenBatchNorm]:
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        raise LeftAlone("it is lazy and not initialized, run the model once before")
    base = _torch_class(kind)
    if base is None:
        raise LeftAlone(f"{kind.__name__} is a subclass that may compute something else")
    if base.forward is not _TORCH_FORWARDS[base]:
        raise LeftAlone(f"the forward of torch's {base.__name__} has been replaced")
    return _TORCH_CLASSES[base]


def _recognise_others(module: nn.Module) -> Recognised:
    """One that is known by nothing but what it computes."""
    name = _class_name(module)
    vectors = [module._parameters.get(v, module._buffers.get(v)) for v in VECTORS]
    if not all(isinstance(v, Tensor) and not is_lazy(v) for v in vectors):
        raise LeftAlone(f"{name} does not hold {', '.join(VECTORS)}")
    beside = tensors_beside(module)
    if beside:
        raise LeftAlone(f"{name} holds more ({', '.join(beside)}), which may take part")
    shapes = {v.shape for v in vectors if v is not None}
    if len(shapes) > 1 or len(*shapes) != 1 or not shapes.pop().numel():
        raise LeftAlone(f"{name} holds vectors of different shapes, or empty ones")
    if len(inspect.signature(type(module).forward).parameters) != 2:  # ours would take a residual
        raise LeftAlone(f"the forward of {name} takes more than an input")
    found = formula(module) if type(module).__call__ is nn.Module.__call__ else None
    if found is None:
        raise LeftAlone(f"{name} looks like a batch normalization, but computes something else")
    frozen_class: type[_FrozenBatchNorm] = FrozenBatchNorm2d
    if {*found.ranks} <= {2, 3}:
        frozen_class = FrozenBatchNorm1d
    elif found.ranks == (5,):
        frozen_class = FrozenBatchNorm3d
    return Recognised(frozen_class, found.eps, ranks=found.ranks)


def is_called_as_its_class(module: nn.Module) -> bool:
    """Whether the instance has no ``forward`` of its own, but for one bound anew, which wrappers
    leave behind."""
    own = vars(module).get("forward")
    bound = isinstance(own, MethodType) and own.__self__ is module
    unwrapped = bound and own.__func__ is type(module).forward  # type: ignore[union-attr]
    return not ({*vars(module)} & (_OVERRIDING - {"forward"})) and (own is None or unwrapped)


def _check_unaltered(module: nn.Module) -> None:
    """Pruning, weight norm, observers and the like register more than the class does, and take
    part in what the layer computes; so does a ``forward`` of its own."""
    submodules = _TIMM_SUBMODULES if _is_of_timm(type(module)) else ()
    usual = {*VECTORS, *submodules, *COUNTERS}
    registered = {*module._parameters, *module._buffers, *module._modules}
    altered = (registered - usual) | (set(VECTORS) - registered)
    if altered:
        names = ", ".join(sorted(altered))
        raise LeftAlone(f"it was altered ({names}) and may compute something else")
    if module.running_mean is None or module.running_var is None:
        raise LeftAlone("track_running_stats=False, there are no statistics to freeze")


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody would notice if its work was done without calling it."""
    hooks = any(value for name, value in vars(module).items() if "hooks" in name)
    return not hooks and "forward" not in vars(module)


def is_probed(module: nn.Module) -> bool:
    """Whether it was recognised by what it computes."""
    return not isinstance(module, _BatchNorm) and not _is_of_timm(type(module))


def recognise(module: nn.Module) -> Recognised:
    """What the batch normalization ``module`` becomes.

    Raises:
        LeftAlone: it cannot be frozen.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise LeftAlone("it is compiled by torch.jit, freeze before compiling")
    if not is_called_as_its_class(module):
        overridden = ", ".join(sorted(_OVERRIDING & {*vars(module)}))
        raise LeftAlone(f"it was altered ({overridden}) and may compute something else")
    if any(map(_is_of_timm, type(module).__mro__)) and not _is_of_timm(type(module)):
        name = type(module).__name__
        raise LeftAlone(f"{name} is a subclass that may compute something else")
    if is_probed(module):
        return _recognise_others(module)
    timm = _is_of_timm(type(module))
    frozen_class = FrozenBatchNorm2d if timm else _recognise_torchs(module)
    _check_unaltered(module)
    eps: Any = module.eps
    act, drop = (module._modules.get(name) or nn.Identity() for name in _TIMM_SUBMODULES)
    activation = activations.of_module(act)
    ranks = () if isinstance(module, nn.SyncBatchNorm) and not timm else None
    if activation and type(drop) is nn.Identity and _is_plain(drop) and _is_plain(act):
        return Recognised(frozen_class, eps, *activation, ranks=ranks)
    return Recognised(FrozenBatchNormAct2d, eps, submodules=module._modules)


def why_not_frozen(module: nn.Module) -> str | None:
    """Why :func:`convert_frozen_bn` leaves a batch normalization alone, if it does."""
    try:
        recognise(module)
    except LeftAlone as reason:
        return str(reason)
    return None


def live_form(frozen: _FrozenBatchNorm) -> nn.Module:
    """What takes the place of a frozen module that was made by hand.

    Raises:
        LeftAlone: there is nothing that computes the same.
    """
    if frozen.activation is not None:
        raise LeftAlone(f"it was made with activation={frozen.activation!r}")
    live_class = next((k for k, v in _TORCH_CLASSES.items() if v is type(frozen)), None)
    if live_class is None:
        raise LeftAlone(f"{type(frozen).__name__} is a subclass, made by hand")
    return live_class(frozen.num_features, frozen.eps, affine=frozen.affine)


def give_eps(original: nn.Module, eps: float) -> None:
    """Has ``original`` compute with ``eps``. Raises :class:`LeftAlone` if it cannot."""
    if not is_probed(original):
        original.eps = eps  # type: ignore[assignment]
        return
    present = recognise(original).eps
    if present == eps:
        return
    if hasattr(original, "eps"):  # which may be there and not used
        before, original.eps = original.eps, eps  # type: ignore[assignment]
        if recognise(original).eps == eps:
            return
        original.eps = before
    raise LeftAlone(f"{type(original).__name__} has eps={present:g} for good")
