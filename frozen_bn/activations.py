"""The activations that there are kernels for, as networks spell them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

_MODULES: dict[type[nn.Module], str | None] = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}

#: Those of other libraries: module, name.
_LIBRARY_MODULES = {
    ("timm.layers.activations", "Swish"): "silu",
    ("timm.layers.activations", "HardSwish"): "hardswish",
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
    kind = next(kind for kind, its_name in _MODULES.items() if its_name == name)
    return nn.LeakyReLU(negative_slope) if kind is nn.LeakyReLU else kind()


def defined(module: str, name: str) -> object:
    """What a library defines; a model can only contain its class if it has been imported."""
    return getattr(sys.modules.get(module), name, None)


def _checked(name: str | None, slope: object) -> Activation | None:
    # fx writes the slope into the source of a fused forward: a number as Python has it.
    return Activation(name, float(slope)) if type(slope) in (int, float) else None  # type: ignore[arg-type]


def _has_usual_options(module: nn.Module) -> bool:
    """Whether what it was made with is what the kernels compute. They are told the slope."""
    regardless = ("negative_slope", "inplace", "training")
    usual = vars(type(module)()).items()
    return all(
        vars(module).get(name) == value
        for name, value in usual
        if not name.startswith("_") and name not in regardless
    )


def of_module(module: nn.Module) -> Activation | None:
    """What ``module`` computes, an identity included; ``None`` where there is no kernel for it."""
    known = _MODULES | {defined(*place): name for place, name in _LIBRARY_MODULES.items()}
    if type(module) not in known or not _has_usual_options(module):
        return None
    return _checked(known[type(module)], getattr(module, "negative_slope", _SLOPE))


def of_call(
    function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Activation | None:
    """The same of a call of a function, or of a tensor's method by its name."""
    name = _FUNCTIONS.get(function)
    names = ("input", "negative_slope", "inplace") if name == "leaky_relu" else ("input", "inplace")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    if name is None or len(args) > len(names) or not {*options} <= {*names}:
        return None
    return _checked(name, options.get("negative_slope", _SLOPE))
