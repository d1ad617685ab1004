"""Which layers, sums and activations read what each other make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .kinds import is_convolution, is_sequential

#: What can be asked of a convolution without using it.
SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class Sum:
    """``a + b``, or ``a += b``."""

    def __init__(self, a: frozenset[Node], b: frozenset[Node], into: bool) -> None:
        self.a, self.b, self.into = a, b, into


#: What makes a value, or reads one: a layer, a sum, or the name of an activation.
Node = nn.Module | Sum | str
Nodes = frozenset[Node]
NONE: Nodes = frozenset()


def sole(nodes: set[Any] | None) -> Any:
    """The one that is there, if it is only one."""
    return next(iter(nodes)) if nodes and len(nodes) == 1 else None


def is_free(module: Any) -> bool:
    """Whether it does what its class does, and nobody notices the call."""
    names = ("forward", "forward_pre", "backward", "backward_pre")
    return (
        isinstance(module, nn.Module)
        and "forward" not in vars(module)
        and not any(vars(module)[f"_{name}_hooks"] for name in names)
    )


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """What calling it calls: of a Sequential the layers in it, but for identities."""
    if is_sequential(type(module)):
        for child in module._modules.values():
            yield from parts(child) if child is not None else ()
    elif type(module) is not nn.Identity:
        yield module


class Uses:
    """Which nodes read what each makes, and made what each reads; None for anything else."""

    def __init__(self) -> None:
        self.behind: dict[Node, set[Node | None]] = {}
        self.before: dict[Node, set[Node | None]] = {}
        self.reasons: dict[nn.Module, str] = {}  # why nothing is known of a layer
        self.called: set[nn.Module] = set()

    def use(self, made_by: Nodes, by: Node | None) -> None:
        for node in made_by:
            self.behind.setdefault(node, set()).add(by)
        if by is not None:
            self.before.setdefault(by, set()).update(made_by or {None})

    def use_any_of(self, holder: nn.Module) -> None:
        """One of those held is read, nobody knows which."""
        for child in holder.children():
            self.use(frozenset(parts(child)), None)

    def chain(self, layers: list[nn.Module], value: Nodes) -> Nodes:
        """What comes out of layers that are called one after the other."""
        for layer in layers:
            self.called.add(layer)
            self.use(value, layer)
            known = is_convolution(type(layer)) or isinstance(layer, _FrozenBatchNorm)
            known = known or activations.is_known(type(layer))
            value = frozenset({layer}) if known else NONE
        return value
