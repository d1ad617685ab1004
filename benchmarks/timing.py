"""Time of several contenders side by side, so that what disturbs one disturbs all; peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy
import torch

Call = Callable[[], object]
#: Seconds per call of one contender, one figure a round. Divided by another's, they are ratios of
#: the same round: steadier than the ratio of the medians where the machine's speed drifts.
Rounds = numpy.ndarray
Result = TypeVar("Result")

#: What is told of the figures of all rounds.
QUANTILES = {"median": 0.5, "q20": 0.2, "q80": 0.8}

#: A round calls a contender as often as it takes to fill this.
_ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Plan:
    """How long to measure: as many rounds as ``seconds`` hold, within the limits."""

    seconds: float
    min_rounds: int
    max_rounds: int


def quantiles(figures: Rounds) -> dict[str, float]:
    """The middle of some figures, and their 20 % and 80 % quantiles."""
    found = numpy.quantile(figures, [*QUANTILES.values()]).tolist()
    return dict(zip(QUANTILES, found, strict=True))


def cpu_seconds() -> tuple[float, float]:
    """Those that other processes (or the hypervisor) took so far, and those there were; no numbers
    where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan, math.nan
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    total, idle = (n / os.sysconf("SC_CLK_TCK") for n in (sum(ticks), ticks[3] + ticks[4]))
    return total - idle - sum(os.times()[:4]), total  # own ones with the forks'


def apart(function: Callable[[], Result], device: torch.device) -> Result:
    """What ``function`` (to be pickled) returns or raises, run in a fork of this process if it is
    for the CPU.

    Every fork finds the heap as it was, so that no row depends on the rows before it: where an
    earlier one has left a large hole, an output fits in there and skips the page faults that it
    costs otherwise. This process must not have run any parallel torch operation. Where there
    is a GPU, torch refuses autograd in the fork of a process that has run it, and ``function`` runs
    in this one.
    """
    if device.type != "cpu" or torch.cuda.is_available() or not hasattr(os, "fork"):
        return function()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fork:
        return fork.submit(function).result()


def settle_allocator() -> None:
    """Brings glibc's malloc to where a long-running training process has it.

    It starts by mapping large blocks anew each time; freeing one of nearly 32 MB, the most that it
    adapts to, makes it keep smaller ones.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(program: Call, device: torch.device) -> int:
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


def _seconds(call: Call, repetitions: int, device: torch.device) -> float:
    """Per call; the results are freed between calls. On CUDA, between two events on the stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repetitions):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / repetitions
    begin = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - begin) / repetitions


def _estimate(call: Call, device: torch.device) -> float:
    """Warms up, and tells roughly how long a call takes."""
    call()
    once = _seconds(call, 1, device)
    repetitions = min(100, int(_ROUND_SECONDS / 4 / once))
    return _seconds(call, repetitions, device) if repetitions > 1 else once


def _order(names: list[str], round: int) -> list[str]:
    """Rotated by one each round, and turned around in every other: no fixed predecessor."""
    first = round % len(names)
    rotated = names[first:] + names[:first]
    return rotated[::-1] if round % 2 else rotated


def measure(calls: dict[str, Call], plan: Plan, device: torch.device) -> dict[str, Rounds]:
    """Times every contender once a round, on a rotating order.

    Each turn begins with a call that is not timed, so that a contender finds the pages that it
    freed itself: virtual machines with free page reporting hand what lies idle for two seconds back
    to the host, and getting 125 MB again from there takes up to ten times as long as the call.
    """
    settle_allocator()
    gc.disable()
    try:
        estimates = {name: _estimate(call, device) for name, call in calls.items()}
        repetitions = {n: max(1, math.ceil(_ROUND_SECONDS / s)) for n, s in estimates.items()}
        round_seconds = sum((1 + repetitions[name]) * s for name, s in estimates.items())
        rounds = max(plan.min_rounds, min(plan.max_rounds, int(plan.seconds / round_seconds)))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for round in range(rounds):
            for name in _order(list(calls), round):
                calls[name]()
                times[name].append(_seconds(calls[name], repetitions[name], device))
    finally:
        gc.enable()
    return {name: numpy.array(seconds) for name, seconds in times.items()}
