"""Tables, targets and the JSON file of ``benchmarks.bench_op``."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import frozen_bn

from .interleave import Timing
from .peers import FLOOR, MUL_ADD_INPLACE, OURS, PEERS

FLOOR_WORST, FLOOR_MEDIAN = 1.05, 1.0
SPEEDUP_MEAN, SPEEDUP_WORST = 1.6, 1.1
INPLACE_WORST = 3.0
#: A machine busier with other things than this gives no figures worth having.
OTHER_LOAD_WORST = 0.03
OVERHEAD_WORST = 1.0

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Row:
    """The timings of one case in one mode: ``forward``, ``forward+backward`` or ``inplace``."""

    name: str
    mode: str
    timings: dict[str, Timing]

    @property
    def fastest_peer(self) -> str:
        return min(PEERS, key=lambda name: self.timings[name].median)

    @property
    def speedup(self) -> float:
        """Of ours over the fastest peer."""
        return self.timings[self.fastest_peer].ratio(self.timings[OURS])

    @property
    def over_floor(self) -> float:
        return self.timings[OURS].ratio(self.timings[FLOOR])


@dataclass
class Report:
    """What one run measured.

    ``complete`` unless rows were left out; ``other_load`` is the share of the machine's CPU time
    that went to other processes meanwhile.
    """

    options: dict[str, Any]
    complete: bool
    rows: list[Row] = field(default_factory=list)
    overhead: dict[str, dict[str, Timing]] = field(default_factory=dict)
    other_load: float | None = None

    def of(self, mode: str) -> list[Row]:
        return [row for row in self.rows if row.mode == mode]


@dataclass(frozen=True)
class Verdict:
    """One target: what is asked, what was measured, and the rows that miss it."""

    target: str
    measured: str
    passed: bool
    misses: tuple[str, ...] = ()


def _figure(value: float, good: bool) -> str:
    return f"{value:.2f}" if good else f"[red]{value:.2f}[/red]"


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f}"


def _spread(timing: Timing) -> str:
    return f"{timing.low * 1e3:.3f}-{timing.high * 1e3:.3f}"


def rows_table(rows: Sequence[Row], mode: str) -> Table:
    """Times of all contenders, and ours against the floor and the fastest peer."""
    table = Table(title=f"{mode}, ms", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for heading in (OURS, "20-80 %", FLOOR, *PEERS, "/floor", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("over", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            _milliseconds(row.timings[OURS]),
            _spread(row.timings[OURS]),
            *(_milliseconds(row.timings[name]) for name in (FLOOR, *PEERS)),
            _figure(row.over_floor, row.over_floor <= FLOOR_WORST),
            _figure(row.speedup, row.speedup >= SPEEDUP_WORST),
            row.fastest_peer,
        )
    return table


def inplace_table(rows: Sequence[Row]) -> Table:
    """``inplace=True`` against the peers out of place, and beside two passes in place."""
    title = f"forward, no grad, inplace=True, ms ({MUL_ADD_INPLACE} is for comparison, no peer)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for heading in (OURS, "20-80 %", *PEERS, MUL_ADD_INPLACE, "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("over", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            _milliseconds(row.timings[OURS]),
            _spread(row.timings[OURS]),
            *(_milliseconds(row.timings[name]) for name in (*PEERS, MUL_ADD_INPLACE)),
            _figure(row.speedup, row.speedup >= INPLACE_WORST),
            row.fastest_peer,
        )
    return table


def overhead_table(overhead: dict[str, dict[str, Timing]]) -> Table:
    """Time per call on a tiny tensor."""
    table = Table(title="per call on 1x64x2x2 fp32, us", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("mode", no_wrap=True)
    for heading in (OURS, "20-80 %", *PEERS, "ours/batch_norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for mode, timings in overhead.items():
        ours = timings[OURS]
        ratio = ours.ratio(timings["batch_norm"])
        table.add_row(
            mode,
            f"{ours.median * 1e6:.2f}",
            f"{ours.low * 1e6:.2f}-{ours.high * 1e6:.2f}",
            *(f"{timings[name].median * 1e6:.2f}" for name in PEERS),
            _figure(ratio, ratio <= OVERHEAD_WORST),
        )
    return table


def _all_below(what: str, limit: float, ratios: dict[str, float]) -> Verdict:
    misses = tuple(f"{name}: {r:.3f}" for name, r in ratios.items() if r > limit)
    worst = max(ratios.values())
    measured = f"worst {worst:.3f}; {len(misses)} of {len(ratios)} miss it"
    return Verdict(f"{what} <= {limit}", measured, not misses, misses)


def _all_above(what: str, limit: float, ratios: dict[str, float]) -> Verdict:
    misses = tuple(f"{name}: {r:.3f}" for name, r in ratios.items() if r < limit)
    worst = min(ratios.values())
    measured = f"worst {worst:.3f}; {len(misses)} of {len(ratios)} miss it"
    return Verdict(f"{what} >= {limit}", measured, not misses, misses)


def _mode_verdicts(rows: Sequence[Row], mode: str) -> list[Verdict]:
    floors = {row.name: row.over_floor for row in rows}
    speedups = {row.name: row.speedup for row in rows}
    median = statistics.median(floors.values())
    mean = math.exp(statistics.fmean(map(math.log, speedups.values())))
    return [
        _all_below(f"{mode}: every row / floor", FLOOR_WORST, floors),
        Verdict(
            f"{mode}: median row / floor <= {FLOOR_MEDIAN}", f"{median:.3f}", median <= FLOOR_MEDIAN
        ),
        Verdict(
            f"{mode}: speed-up over each row's fastest peer, geometric mean >= {SPEEDUP_MEAN}",
            f"{mean:.3f}",
            mean >= SPEEDUP_MEAN,
        ),
        _all_above(f"{mode}: every row's speed-up", SPEEDUP_WORST, speedups),
    ]


def verdicts(report: Report) -> list[Verdict]:
    """The targets; forward and forward+backward each have to meet theirs, not just together."""
    found = []
    for mode in MODES:
        if rows := report.of(mode):
            found += _mode_verdicts(rows, mode)
    if rows := report.of("inplace"):
        speedups = {row.name: row.speedup for row in rows}
        found.append(_all_above("inplace=True: every row's speed-up", INPLACE_WORST, speedups))
    for mode, timings in report.overhead.items():
        ratio = timings[OURS].ratio(timings["batch_norm"])
        target = f"overhead, {mode}: / batch_norm <= {OVERHEAD_WORST}"
        found.append(Verdict(target, f"{ratio:.3f}", ratio <= OVERHEAD_WORST))
    return found


def summary_table(found: Sequence[Verdict], complete: bool) -> Table:
    """PASS or FAIL for each target."""
    title = "targets" if complete else "targets, on the rows that were run"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("target")
    table.add_column("measured")
    table.add_column("")
    for verdict in found:
        word = "[green]PASS[/green]" if verdict.passed else "[red]FAIL[/red]"
        table.add_row(verdict.target, verdict.measured, word)
    return table


def environment() -> dict[str, str | int | bool | None]:
    """What the figures depend on."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    return {
        "frozen_bn": frozen_bn.__version__,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_level": frozen_bn._C.cpu_level(),
        "machine": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def show(report: Report) -> None:
    """All tables, to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=165)
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    console.print(
        "ours: frozen_bn.frozen_batch_norm; batch_norm: F.batch_norm(training=False). "
        "Vectors are float32. torchvision's module has them in the input's dtype (model.half()): "
        "with float32 ones it would return float32; scale-shift casts scale and shift, as "
        "detectron2 does.\n"
    )
    for mode in MODES:
        if rows := report.of(mode):
            console.print(rows_table(rows, mode))
    if rows := report.of("inplace"):
        console.print(inplace_table(rows))
    console.print(overhead_table(report.overhead))
    found = verdicts(report)
    for verdict in found:
        for miss in verdict.misses:
            console.print(f"misses {verdict.target}: {miss}", highlight=False)
    console.print(summary_table(found, report.complete))
    if report.other_load is not None:
        busy = f"other processes took {report.other_load:.0%} of the machine meanwhile"
        idle = report.other_load <= OTHER_LOAD_WORST
        console.print(busy if idle else f"[red]{busy}: these figures are worthless[/red]")


def save(report: Report, file: Path) -> None:
    """Everything measured, as JSON: seconds per call, every round."""

    def figures(timings: dict[str, Timing]) -> dict[str, Any]:
        return {
            name: {"median": t.median, "q20": t.low, "q80": t.high, "rounds": t.rounds}
            for name, t in timings.items()
        }

    rows = [{"name": r.name, "mode": r.mode, "seconds": figures(r.timings)} for r in report.rows]
    content = {
        "environment": environment(),
        "options": {key: str(value) for key, value in report.options.items()},
        "other_load": report.other_load,
        "rows": rows,
        "overhead": {mode: figures(timings) for mode, timings in report.overhead.items()},
        "targets": [vars(verdict) for verdict in verdicts(report)],
    }
    file.write_text(json.dumps(content, indent=1))
