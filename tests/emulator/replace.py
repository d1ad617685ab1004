"""Other parts in the place of the package's, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from frozen_bn import functional, pair
from frozen_bn.fusion import pending, steps


@contextmanager
def replaced(places: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within, attributes of modules are others."""
    places = list(places)
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, replacement in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), own in zip(places, before, strict=True):
            setattr(module, name, own)


@contextmanager
def pythons_node() -> Iterator[None]:
    """Within, Python's autograd node serves, and Python's steps."""
    places = [
        (functional, "run", functional._run),
        (functional, "call", functional._not_called),
        (functional, "call_layer", functional._not_called),
        (pair, "run", pair._run),
        *((steps, name, getattr(steps, f"_{name}")) for name in ("watched", "call", "add", "iadd")),
        *((steps, name, getattr(pending, name)) for name in ("value", "settle")),
    ]
    with replaced(places):
        yield
