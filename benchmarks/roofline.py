"""``python -m benchmarks.roofline``: the bytes that each layer moves, and the least time that they
take on six GPUs. Modelled, not measured: nothing here ran on a GPU.

Ours are counted in the emulator (tests/emulator), which runs the PTX that nvcc made of the kernels:
on one sample, cut to fewer channels (contiguous) or rows (channels_last) where it is large, which
changes neither the access pattern nor the bytes an element. Those of the peers are added up from
the operators that torch really dispatches for fake CUDA tensors, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import frozen_bn

from . import bench_op, dispatched, peers, traffic
from .bench_op import Case
from .dispatched import Dispatched
from .traffic import Emulated, Pass

#: Peak memory bandwidth in GB/s, from NVIDIA's data sheets: T4 and L4 (GDDR6), A100 80 GB SXM
#: (HBM2e), H100 SXM (HBM3), H200 SXM (HBM3e), one of HGX B200 (HBM3e).
BANDWIDTHS = {"T4": 320, "L4": 300, "A100": 2039, "H100": 3350, "H200": 4800, "B200": 8000}

MOST_ELEMENTS, QUICK_MOST_ELEMENTS = 1 << 18, 1 << 16
TARGET = 1.02
OURS = peers.OURS

HEADER = f"""\
[bold]Modelled, not measured.[/bold] frozen_bn {frozen_bn.__version__}, torch {torch.__version__}.
Ours: counted by running the compiled PTX in an emulator, on one sample, cut to about 0.26M elements
(fewer channels if contiguous, fewer rows if channels_last). Peers: bytes of the inputs and outputs
of each operator that torch dispatches for fake CUDA tensors, every one moved once: too few for an
operator that passes over an input twice, as the backward of F.batch_norm does.
The vectors \\[C] are float32 constants, but for "affine". timm's FrozenBatchNormAct2d dispatches
what torchvision's module does; scale-shift is detectron2's formula. In pair+relu, the residual is
normalized too: by the same kernel, and by a second layer of each peer.
  unavoidable  every activation once, and a bit an element for the ReLU: bytes an element
  activations  32-byte sectors of those, once a warp and launch, over the unavoidable
  DRAM         these, vectors once a launch, and partial sums, over the unavoidable; the times are
               these bytes over the peak bandwidth, which no kernel reaches
  L1           sectors of the activations, one access at a time, over the unavoidable
  L2           sectors of everything, once a warp and launch, over the unavoidable; on a whole batch
               of large maps it is less, where threads use their coefficients more often
"""


@dataclass(frozen=True)
class Row:
    """One pass of ours."""

    case: Case
    which: Pass
    counted: Emulated

    @property
    def unavoidable(self) -> int:
        return traffic.unavoidable_bytes(self.case, self.which, self.case.shape)

    @property
    def bytes(self) -> float:
        return self.counted.bytes_on(self.case.shape)

    def over_unavoidable(self, counted: float) -> float:
        """Of what was counted on the emulated part."""
        part = traffic.unavoidable_bytes(self.case, self.which, self.counted.shape)
        return counted / part

    @property
    def activations(self) -> float:
        return self.over_unavoidable(self.counted.activations)


@dataclass(frozen=True)
class PeerRow:
    """One case: bytes an element and launches, forward and backward, of ours and the peers."""

    case: Case
    bytes: dict[str, dict[Pass, float]]
    launches: dict[str, dict[Pass, int]]

    def an_element(self, name: str) -> float:
        return sum(self.bytes[name].values()) / math.prod(self.case.shape)


def count_ours(cases: Sequence[Case], most: int) -> list[Row]:
    emulator = traffic.load_emulator()
    rows = []
    for case in track(cases, "emulating", transient=True):
        shape = traffic.emulated_shape(case.shape, case.layout, most)
        counted = traffic.emulate(emulator, case, shape)
        if case.operation == "residual+relu":
            both = traffic.emulate(emulator, case, shape, affine=True)
            counted["backward, affine"] = both["backward, affine"]
        rows += [Row(case, which, of) for which, of in counted.items()]
    return rows


def compare(rows: Sequence[Row]) -> list[PeerRow]:
    """Each case's forward and backward, with a frozen affine."""
    ours: dict[Case, dict[Pass, Row]] = {}
    for row in rows:
        if row.which != "backward, affine":
            ours.setdefault(row.case, {})[row.which] = row
    result = []
    for case, mine in track(ours.items(), "dispatching", transient=True):
        others: dict[str, dict[Pass, Dispatched]] = dispatched.dispatch_peers(case)
        amounts = {OURS: {which: row.bytes for which, row in mine.items()}}
        launches = {OURS: {which: row.counted.launches for which, row in mine.items()}}
        for name, passes in others.items():
            amounts[name] = {which: float(d.bytes) for which, d in passes.items()}
            launches[name] = {which: d.launches for which, d in passes.items()}
        result.append(PeerRow(case, amounts, launches))
    return result


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _ratio(value: float, good: bool = True) -> str:
    return f"{value:.3f}" if good else f"[red]{value:.3f}[/red]"


def ours_table(rows: Sequence[Row]) -> Table:
    table = _table("ours: bytes an element, over the unavoidable; least time, us")
    table.add_column("layer", no_wrap=True)
    headings = ("pass", "unavoidable", "activations", "DRAM", "L1", "L2", "instr./pack", "launches")
    for heading in (*headings, *BANDWIDTHS):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        counted = row.counted
        table.add_row(
            row.case.name,
            row.which,
            f"{row.unavoidable / math.prod(row.case.shape):.3f}",
            _ratio(row.activations, row.activations <= TARGET),
            _ratio(row.bytes / row.unavoidable),
            _ratio(row.over_unavoidable(counted.requested)),
            _ratio(row.over_unavoidable(counted.all_sectors)),
            f"{counted.instructions_per_pack:.0f}",
            str(counted.launches),
            *(f"{row.bytes / speed / 1e3:.1f}" for speed in BANDWIDTHS.values()),
        )
    return table


def peers_table(rows: Sequence[PeerRow]) -> Table:
    table = _table(
        "bytes an element, forward + backward (launches); bytes of the peer over ours, which is "
        "also the least times' ratio"
    )
    table.add_column("layer", no_wrap=True)
    for heading in (OURS, *peers.PEERS):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in peers.PEERS:
        table.add_column(f"{name}/{OURS}", justify="right", no_wrap=True)
    for row in rows:
        numel = math.prod(row.case.shape)
        cells = []
        for name in (OURS, *peers.PEERS):
            amounts = " + ".join(f"{b / numel:.2f}" for b in row.bytes[name].values())
            launches = "+".join(map(str, row.launches[name].values()))
            cells.append(f"{amounts} ({launches})")
        ratios = (row.an_element(name) / row.an_element(OURS) for name in peers.PEERS)
        table.add_row(row.case.name, *cells, *(f"{ratio:.2f}" for ratio in ratios))
    return table


_COLOURS = dict(
    zip((OURS, *peers.PEERS), ("#1b6ca8", "#e07b39", "#7a7a7a", "#c9a227"), strict=True)
)
_LABELS = {
    OURS: "frozen_bn",
    "torchvision": "torchvision / timm module",
    "batch_norm": "F.batch_norm, eval",
    "scale-shift": "detectron2's formula",
}


def _groups(axes: Axes, groups: Sequence[str], values: dict[str, list[float]]) -> Iterator[Any]:
    """Name, places and values of each contender, side by side in every group."""
    width = 0.8 / len(values)
    axes.set_xticks(range(len(groups)), groups)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    for k, (name, heights) in enumerate(values.items()):
        yield name, [g + (k - (len(values) - 1) / 2) * width for g in range(len(groups))], heights


def _plot_bytes(axes: Axes, rows: Sequence[PeerRow]) -> None:
    values = {name: [row.an_element(name) for row in rows] for name in (OURS, *peers.PEERS)}
    for name, places, heights in _groups(axes, [row.case.operation for row in rows], values):
        bars = axes.bar(places, heights, 0.19, label=_LABELS[name], color=_COLOURS[name])
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_title(f"bytes an element, forward + backward, {rows[0].case.dtype}")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _plot_times(axes: Axes, row: PeerRow) -> None:
    gpus = [f"{gpu}\n{speed} GB/s" for gpu, speed in BANDWIDTHS.items()]
    values = {
        name: [sum(row.bytes[name].values()) / speed / 1e3 for speed in BANDWIDTHS.values()]
        for name in (OURS, *peers.PEERS)
    }
    for name, places, times in _groups(axes, gpus, values):
        axes.plot(places, times, "o", markersize=9, color=_COLOURS[name])
        for place, time in zip(places, times, strict=True):
            text = f"{time:.{0 if time >= 100 else 1}f}"
            style = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(text, (place, time), (0, 9), **style)
    axes.set_yscale("log")
    axes.set_ylabel("us, logarithmic")
    axes.set_title(f"least time of {row.case.name}, forward + backward")


def plot(rows: Sequence[PeerRow], file: Path) -> None:
    """Bytes an element of each kind of layer; the least time of one layer on each GPU."""
    half = [row for row in rows if row.case.dtype == "fp16"] or list(rows)
    first = half[0].case
    of_layer = [r for r in half if (r.case.shape, r.case.layout) == (first.shape, first.layout)]
    figure = Figure(figsize=(15, 5.4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    _plot_bytes(left, of_layer)
    _plot_times(right, ([r for r in of_layer if r.case.operation != traffic.PAIR] or of_layer)[-1])
    figure.suptitle("Modelled from counted bytes and peak bandwidths, not measured", fontsize=13)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def save(rows: Sequence[Row], others: Sequence[PeerRow], file: Path) -> None:
    def record(row: Row) -> dict[str, Any]:
        times = {gpu: row.bytes / speed / 1e9 for gpu, speed in BANDWIDTHS.items()}
        return {
            "name": row.case.name,
            "pass": row.which,
            "unavoidable_bytes": row.unavoidable,
            "bytes": row.bytes,
            "activations_over_unavoidable": row.activations,
            "emulated": vars(row.counted),
            "least_seconds": times,
        }

    content = {
        "note": "modelled, not measured",
        "bandwidths_GB_s": BANDWIDTHS,
        "ours": [record(row) for row in rows],
        "peers": [{"name": r.case.name, "bytes": r.bytes, "launches": r.launches} for r in others],
    }
    file.write_text(json.dumps(content, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--filter", default="", metavar="REGEX", help="rows it is found in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    shapes = bench_op.QUICK_SHAPES if options.quick else traffic.SHAPES
    cases = [*bench_op.cases(shapes, ()), *traffic.pair_cases(shapes)]
    cases = [case for case in cases if re.search(options.filter, case.name)]
    rows = count_ours(cases, QUICK_MOST_ELEMENTS if options.quick else MOST_ELEMENTS)
    others = compare(rows)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(HEADER, highlight=False)
    console.print(ours_table(rows))
    first = others[0].case.shape if others else None
    console.print(peers_table([row for row in others if row.case.shape == first]))
    over = [row for row in rows if row.activations > TARGET]
    narrow = [row for row in rows if row.counted.narrow >= traffic.PACK * row.counted.launches]
    console.print(
        f"of {len(rows)} rows {len(over)} move more than {TARGET}x the unavoidable, and "
        f"{len(narrow)} move activations by less than 16 bytes a thread (not only in a tail)"
    )
    if options.json is not None:
        save(rows, others, options.json)
    if options.plot is not None:
        plot(others, options.plot)


if __name__ == "__main__":
    main()
