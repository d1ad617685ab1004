"""Time of several contenders side by side, so that what disturbs one disturbs all; peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Result = TypeVar("Result")

#: A round calls a contender as often as it takes to fill this.
_ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Plan:
    """How long to measure: as many rounds as ``seconds`` hold, within the limits."""

    seconds: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Quantiles:
    """The middle of some figures, and their 20 % and 80 % quantiles."""

    median: float
    q20: float
    q80: float

    @staticmethod
    def of(figures: Iterable[float]) -> Quantiles:
        figures = list(figures)
        low, *_, high = statistics.quantiles(figures, n=5, method="inclusive")
        return Quantiles(statistics.median(figures), low, high)

    def inverse(self) -> Quantiles:
        return Quantiles(1 / self.median, 1 / self.q80, 1 / self.q20)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender: one figure a round."""

    rounds: tuple[float, ...]

    def over(self, other: Timing) -> Quantiles:
        """This one's time over the other's in the same round: steadier than the ratio of the
        medians where the machine's speed drifts."""
        return Quantiles.of(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


class OtherLoad:
    """Which share of the machine's CPU time other processes took since this was made.

    With two cores and torch's spinning threads a few per cent make the figures worthless.
    """

    def __init__(self) -> None:
        self._start = self._used()

    @staticmethod
    def _used() -> tuple[float, float] | None:
        """CPU seconds taken by other processes (or the hypervisor), and those there were."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        total = sum(ticks) / os.sysconf("SC_CLK_TCK")
        idle = (ticks[3] + ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return total - idle - sum(own[:4]), total  # with the forks'

    def share(self) -> float | None:
        """Between 0 and 1; ``None`` where the system does not tell."""
        end = self._used()
        if self._start is None or end is None or end[1] == self._start[1]:
            return None
        return max(0.0, (end[0] - self._start[0]) / (end[1] - self._start[1]))


def apart(function: Callable[[], Result], device: torch.device) -> Result:
    """What ``function`` returns or raises, run in a fork of this process if it is for the CPU.

    Every fork finds the heap as it was, so that no row depends on the rows before it: where an
    earlier one has left a large hole, an output fits in there and skips the page faults that it
    costs otherwise. This process must not have run any parallel torch operation. Where there
    is a GPU, torch refuses autograd in the fork of a process that has run it, and ``function`` runs
    in this one.
    """
    if device.type != "cpu" or torch.cuda.is_available() or not hasattr(os, "fork"):
        return function()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        try:
            sender.send((function(), None))
        except BaseException as error:
            sender.send((None, error))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the fork died with exit code {process.exitcode}") from None
    process.join()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


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
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
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


def measure(calls: dict[str, Call], plan: Plan, device: torch.device) -> dict[str, Timing]:
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
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}
