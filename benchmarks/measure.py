"""How the benchmarks measure: rounding differences, saved activations, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


def relative_error(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``, in float64."""
    b = b.double()
    return float((a.double() - b).norm() / b.norm())


def equal_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> int:
    """How many of the tensors in ``a`` are the same in ``b``, bit for bit."""
    return sum(torch.equal(a[name], b[name]) for name in a)


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """The bytes that ``forward`` leaves behind for the backward pass, every storage counted once.

    Parameters and buffers of ``module`` do not count: they are there anyway.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until all are counted: freed memory might be handed out again, and counted as one.
        held = forward()
    del held
    return sum(saved.values())


def interleaved_seconds(
    programs: Mapping[str, Callable[[], object]], rounds: Iterable[object]
) -> dict[str, list[float]]:
    """The time of each program in each round.

    Each round runs every program once, so that whatever else the machine does meanwhile falls on
    all of them alike. A round before these, not timed, warms them up.
    """
    for program in programs.values():
        program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in rounds:
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return seconds
