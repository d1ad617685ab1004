"""What was promised of the speed of a layer and of whole networks, and what came of it: measured
ratios, with their 20 % and 80 % quantiles."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from . import model_peers, peers
from .cases import Operation
from .op import CHAIN
from .rows import Line, Row, lines
from .tables import Table, geometric_mean, spread
from .timing import Quantiles

FLOOR_WORST, FLOOR_MEDIAN = 1.05, 1.0
SPEEDUP_MEAN, SPEEDUP_WORST, INPLACE_WORST = 1.6, 1.1, 3.0
#: By mode, of no activation, ReLU, residual and ReLU.
OVERHEAD_WORST = {
    "no-grad": (0.8, 0.8, 0.8),
    "forward": (0.85, 0.7, 0.7),
    f"chain of {CHAIN}": (1.0, 0.75, 0.65),
}
STEP_WORST, SAVED_WORST = 1.0, 1.04
#: Of a step, over torchvision's class, by layout; and under autocast, by any.
STEP_SPEEDUP, AUTOCAST_SPEEDUP = {"contiguous": 1.2, "channels_last": 1.1}, 1.15


@dataclass(frozen=True)
class Verdict:
    """One target: what is asked, what was measured, and the cases that miss it."""

    target: str
    measured: str
    passed: bool
    misses: tuple[str, ...] = ()


def _every(what: str, limit: float, ratios: dict[str, Quantiles], most: bool) -> Verdict:
    """``most``: the limit is the most that is allowed, else the least."""
    sign = 1 if most else -1
    missed = {n: r for n, r in ratios.items() if sign * r.median > sign * limit}
    worst = max(ratios.values(), key=lambda ratio: sign * ratio.median)
    return Verdict(
        f"{what} {'<=' if most else '>='} {limit}",
        f"worst {spread(worst)}; {len(missed)} of {len(ratios)} miss it",
        not missed,
        tuple(f"{name}: {spread(ratio)}" for name, ratio in missed.items()),
    )


def _layers(found: Sequence[Line], mode: str) -> list[Verdict]:
    floors = {line.first.name: line.floor.ratios[peers.OURS] for line in found}
    speedups = _speedups(found)
    middle = statistics.median_low([ratio.median for ratio in floors.values()])
    median = next(ratio for ratio in floors.values() if ratio.median == middle)
    mean = geometric_mean(list(speedups.values()))
    return [
        _every(f"{mode}: every layer / floor", FLOOR_WORST, floors, True),
        Verdict(
            f"{mode}: median layer / floor <= {FLOOR_MEDIAN}",
            spread(median),
            median.median <= FLOOR_MEDIAN,
        ),
        Verdict(
            f"{mode}: speed-up over the fastest peer, geometric mean >= {SPEEDUP_MEAN}",
            spread(mean),
            mean.median >= SPEEDUP_MEAN,
        ),
        _every(f"{mode}: every layer's speed-up", SPEEDUP_WORST, speedups, False),
    ]


def _speedups(found: Iterable[Line]) -> dict[str, Quantiles]:
    return {line.first.name: line.fastest_peer.ratios[peers.OURS].inverse() for line in found}


def _network(line: Line) -> list[Verdict]:
    """Of the faster of the fused and the folded network."""
    names = (model_peers.FUSED, model_peers.FOLDED)
    measured = (line.rows[name] for name in names if name in line.rows)
    best = min(measured, key=lambda row: row.median)
    first = line.first
    what = f"{first.operation} {first.dtype} {first.layout}, {best.contender}"
    torchvision = line.rows[model_peers.TORCHVISION].ratios[best.contender].inverse()
    wanted = AUTOCAST_SPEEDUP if "autocast" in first.dtype else STEP_SPEEDUP[first.layout]
    assert best.over_floor is not None
    return [
        Verdict(
            f"{what}: step / BN deleted <= {STEP_WORST}",
            spread(best.over_floor),
            best.over_floor.median <= STEP_WORST,
        ),
        Verdict(
            f"{what}: speed-up over torchvision's >= {wanted}",
            spread(torchvision),
            torchvision.median >= wanted,
        ),
    ]


def _saved(line: Line) -> Verdict:
    names = (model_peers.FUSED, model_peers.FOLDED)
    saved = {n: line.rows[n].saved_bytes or 0 for n in names if n in line.rows}
    best = min(saved, key=lambda name: saved[name])
    ratio = saved[best] / (line.floor.saved_bytes or 1)
    what = f"{line.first.operation} {line.first.dtype} {line.first.layout}, {best}"
    return Verdict(
        f"{what}: saved bytes / BN deleted <= {SAVED_WORST}",
        f"{ratio:.3f} (counted)",
        ratio <= SAVED_WORST,
    )


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Each mode has to meet its own, not just all together."""
    found = []
    for mode in ("forward", "full"):
        if of_mode := lines(_real_layers(rows), "op", mode):
            found += _layers(of_mode, mode)
    if in_place := lines(rows, "op", "in place"):
        what = "in place: every layer's speed-up"
        found.append(_every(what, INPLACE_WORST, _speedups(in_place), False))
    for line in lines(rows, "overhead"):
        mode, operation = line.first.mode, line.first.operation
        if mode in OVERHEAD_WORST:
            ratio = line.rows["batch_norm"].ratios[peers.OURS]
            limit = OVERHEAD_WORST[mode][get_args(Operation).index(operation)]
            target = f"overhead, {operation}, {mode}: / batch_norm <= {limit}"
            found.append(Verdict(target, spread(ratio), ratio.median <= limit))
    for line in lines(rows, "model", "step"):
        found += _network(line)
    return found + [_saved(line) for line in lines(rows, "memory", "step")]


def _real_layers(rows: Iterable[Row]) -> list[Row]:
    """Not those that only differ in size: most fit a cache, and some are tiny."""
    return [row for row in rows if row.shape[:2] != (1, 64)]


def targets_table(found: Iterable[Verdict]) -> Table:
    table = Table("targets, of what was run: measured ratios", ("target", "measured", ""))
    for verdict in found:
        word = "met" if verdict.passed else "MISSED"
        table.cells.append((verdict.target, verdict.measured, word))
    return table
