"""The activations that there are kernels for, as networks spell them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

_MODULES: dict[object, str | None] = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}

TORCHS: Any = tuple(_MODULES)

#: Those of other libraries: module, name.
_LIBRARY_MODULES = {
    ("timm.layers.activations", "Swish"): "silu",
    ("timm.layers.activations", "HardSwish"): "hardswish",
    ("transformers.activations", "SiLUActivation"): "silu",
}

_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "relu": "relu",  # methods
    "relu_": "relu",
}


_SLOPE = 0.01  # of a leaky_relu, unless it says something else


class Activation(NamedTuple):
    """What the kernels take."""

    name: str | None
    negative_slope: float = _SLOPE


def as_module(name: str | None, negative_slope: float) -> nn.Module:
    """As torch has it: ``nn.Identity`` for ``None``."""
    kind: Any = next(kind for kind, its_name in _MODULES.items() if its_name == name)
    module: nn.Module = nn.LeakyReLU(negative_slope) if kind is nn.LeakyReLU else kind()
    return module


_PLAIN = {name: Activation(name) for name in _FUNCTIONS.values()}


def defined(module: str, name: str) -> object:
    """What a library defines; a model can only contain its class if it has been imported."""
    return getattr(sys.modules.get(module), name, None)


def _checked(name: str | None, slope: object) -> Activation | None:
    return Activation(name, float(slope)) if type(slope) in (int, float) else None  # type: ignore[arg-type]


class _Known(NamedTuple):
    """Of a class of modules."""

    activation: Activation  # with the usual slope
    usual: tuple[tuple[str, Any], ...]  # options that the kernels take for granted


@functools.lru_cache(maxsize=1000)
def _known(kind: Any) -> _Known | None:
    known = _MODULES | {defined(*place): name for place, name in _LIBRARY_MODULES.items()}
    if kind not in known:
        return None
    regardless = ("negative_slope", "inplace", "training")  # they are told the slope
    usual = ((k, v) for k, v in vars(kind()).items() if k not in regardless)
    return _Known(Activation(known[kind]), tuple((k, v) for k, v in usual if not k.startswith("_")))


def is_known(kind: type) -> bool:
    """Whether a class of modules computes one, an identity included."""
    return _known(kind) is not None


def without_options(kind: type) -> str | None:
    """Which one a class computes, if nothing that can be set on its instances changes that."""
    known = _known(kind)
    plain = known is not None and not known.usual and not hasattr(kind(), "negative_slope")
    return known.activation.name if known is not None and plain else None


def of_module(module: nn.Module) -> Activation | None:
    """What ``module`` computes, an identity included; ``None`` where there is no kernel for it."""
    kind: Any = type(module)
    known = _known(kind)
    if known is None:
        return None
    options = module.__dict__
    for name, value in known.usual:
        if options.get(name) != value:
            return None
    if "negative_slope" not in options:
        return known.activation
    return _checked(known.activation.name, options["negative_slope"])


def of_call(
    function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Activation | None:
    """The same of a call of a function, or of a tensor's method by its name."""
    name = _FUNCTIONS.get(function)
    if name is None:
        return None
    if len(args) == 1 and not kwargs:
        return _PLAIN[name]
    names = ("input", "negative_slope", "inplace") if name == "leaky_relu" else ("input", "inplace")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or not {*options} <= {*names}:
        return None
    return _checked(name, options.get("negative_slope", _SLOPE))
