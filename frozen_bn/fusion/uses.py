"""Which layers, sums and activations read what each other make; and what is asked of modules for
that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .classes import only_holds
from .kinds import is_convolution, is_sequential

#: What can be asked of a convolution without using it.
SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class Sum:
    """``a + b``, or ``a += b``."""

    def __init__(self, a: Nodes, b: Nodes, into: bool) -> None:
        self.a, self.b, self.into = a, b, into


#: What makes a value, or reads one: a layer, a sum, or the name of an activation.
Node = nn.Module | Sum | str

#: What may have made a value. None: anything else.
Nodes = frozenset[Node | None]
UNKNOWN: Nodes = frozenset({None})


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
    if is_sequential(type(module)) and is_free(module):
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
        self.runs = 0

    def use(self, made_by: Nodes, by: Node | None) -> None:
        for node in made_by - UNKNOWN:
            self.behind.setdefault(node, set()).add(by)  # type: ignore[arg-type]
        if by is not None:
            self.before.setdefault(by, set()).update(made_by)

    def hand_on(self, module: nn.Module) -> None:
        """To something that may call it, or what it holds, with anything, and do anything with what
        comes out."""
        if only_holds(module) or is_sequential(type(module)):
            self.hand_on_all_of(module)
        else:
            self.hand_on_the_whole(module)

    def hand_on_the_whole(self, module: nn.Module) -> None:
        """Likewise, to something that calls nothing in it by itself."""
        if layers := [*parts(module)]:
            self.before.setdefault(layers[0], set()).add(None)
            self.use(frozenset({layers[-1]}), None)

    def hand_on_all_of(self, holder: nn.Module) -> None:
        for child in holder.children():
            self.hand_on(child)

    def chain(self, layers: list[nn.Module], value: Nodes) -> Nodes:
        """What comes out of layers that are called one after the other."""
        for layer in layers:
            self.called.add(layer)
            self.use(value, layer)
            known = is_convolution(type(layer)) or isinstance(layer, _FrozenBatchNorm)
            known = known or activations.is_known(type(layer))
            value = frozenset({layer}) if known else UNKNOWN
        return value
