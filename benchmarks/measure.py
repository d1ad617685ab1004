"""How the benchmarks measure: rounding differences, saved activations, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .interleave import settle_allocator


def relative_error(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``, in float64."""
    b = b.double()
    return float((a.double() - b).norm() / b.norm())


def equal_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> int:
    """How many of the tensors in ``a`` are the same in ``b``, bit for bit."""
    return sum(torch.equal(a[name], b[name]) for name in a)


def peak_bytes(program: Callable[[], object], device: torch.device) -> int:
    """How far memory rises above where it was while ``program`` runs: of the device's allocator on
    CUDA, else of the process (0 where the system does not tell)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        program()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0

    def kibibytes(field: str) -> int:
        return int(status.read_text().split(f"{field}:")[1].split()[0])

    settle_allocator()
    reset.write_text("5")  # the peak is counted from here
    before = kibibytes("VmRSS")
    program()
    return (kibibytes("VmHWM") - before) * 1024


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
