"""Which modules are batch normalizations, what each becomes, and why some are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from . import activations
from .activations import defined
from .modules import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct2d,
    _FrozenBatchNorm,
)

VECTORS = ("weight", "bias", "running_mean", "running_var")

_TORCH_CLASSES: dict[type[nn.Module], type[_FrozenBatchNorm]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenBatchNorm2d,
}

#: Classes of other libraries, all to become FrozenBatchNorm2d: module, name, submodules.
_LIBRARY_CLASSES = (
    ("torchvision.ops.misc", "FrozenBatchNorm2d", ()),
    ("timm.layers.norm_act", "BatchNormAct2d", ("act", "drop")),
    ("timm.layers.norm_act", "SyncBatchNormAct", ("act", "drop")),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d", ("act", "drop")),
)

#: Of those classes that have no attribute for it.
_FIXED_EPS = 1e-5


class LeftAlone(Exception):
    """Why a module is left as it is."""


class Recognised(NamedTuple):
    """What a batch normalization becomes."""

    frozen_class: type[_FrozenBatchNorm]
    eps: float
    activation: str | None = None
    negative_slope: float = 0.01
    submodules: Mapping[str, nn.Module | None] = {}  # that it keeps


def _is_of_transformers(kind: type[nn.Module]) -> bool:
    """DetrFrozenBatchNorm2d and its copies: every detector there has one of its own, line by line
    the same, under the model's name."""
    module, name = kind.__module__, kind.__qualname__
    return (
        module.startswith("transformers.models.")
        and name.endswith("FrozenBatchNorm2d")
        and kind is defined(module, name)
    )


def _submodules_of_library_class(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """What a class of another library holds besides its vectors; None for any other class."""
    for module, name, submodules in _LIBRARY_CLASSES:
        if kind is defined(module, name):
            return submodules
    return () if _is_of_transformers(kind) else None


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is one of those that this module knows, or derived from one."""
    return isinstance(module, _BatchNorm) or any(
        _submodules_of_library_class(kind) is not None for kind in type(module).__mro__
    )


def _frozen_class(module: nn.Module) -> type[_FrozenBatchNorm]:
    kind = type(module)
    if _submodules_of_library_class(kind) is not None:
        return FrozenBatchNorm2d
    if isinstance(module, LazyModuleMixin):
        raise LeftAlone("it is lazy and not initialized, run the model once before")
    if kind not in _TORCH_CLASSES:
        raise LeftAlone(f"{kind.__name__} is a subclass that may compute something else")
    return _TORCH_CLASSES[kind]


def _check_unaltered(module: nn.Module) -> None:
    """Pruning, weight norm, observers and the like register more than the class does, and take
    part in what the layer computes; so does a ``forward`` of its own."""
    submodules = _submodules_of_library_class(type(module)) or ()
    usual = {*VECTORS, *submodules, "num_batches_tracked"}
    registered = {*module._parameters, *module._buffers, *module._modules}
    altered = (registered - usual) | (set(VECTORS) - registered) | ({"forward"} & {*vars(module)})
    if altered:
        names = ", ".join(sorted(altered))
        raise LeftAlone(f"it was altered ({names}) and may compute something else")
    if module.running_mean is None or module.running_var is None:
        raise LeftAlone("track_running_stats=False, there are no statistics to freeze")


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody would notice if its work was done without calling it."""
    hooks = any(value for name, value in vars(module).items() if "hooks" in name)
    return not hooks and "forward" not in vars(module)


def recognise(module: nn.Module) -> Recognised:
    """What the batch normalization ``module`` becomes.

    Raises:
        LeftAlone: it cannot be frozen.
    """
    frozen_class = _frozen_class(module)
    _check_unaltered(module)
    eps: Any = getattr(module, "eps", _FIXED_EPS)
    act, drop = (module._modules.get(name) or nn.Identity() for name in ("act", "drop"))
    activation = activations.of_module(act)
    if activation and type(drop) is nn.Identity and _is_plain(drop) and _is_plain(act):
        return Recognised(frozen_class, eps, *activation)
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


def check_eps_fits(frozen: _FrozenBatchNorm, original: nn.Module) -> None:
    """Raises :class:`LeftAlone` if ``original`` cannot take over the eps of ``frozen``."""
    if not hasattr(original, "eps") and frozen.eps != _FIXED_EPS:
        raise LeftAlone(f"{type(original).__name__} has eps={_FIXED_EPS:g} for good")
