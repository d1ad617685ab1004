"""The rows as tables: on the terminal, and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import model_peers, peers
from .rows import Line, Row, lines
from .timing import Quantiles

MIB = 2**20


@dataclass
class Table:
    """Cells may have more than one line. The first column is text, the others are figures."""

    title: str
    headings: Sequence[str]
    cells: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> RichTable:
        title = Text(self.title)
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for position, heading in enumerate(self.headings):
            justify = "right" if position else "left"
            table.add_column(Text(heading), justify=justify, no_wrap=bool(position))
        for row in self.cells:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("\n", "<br>") for cell in cells) + " |"

        rule = "|---|" + "---:|" * (len(self.headings) - 1)
        body = [line(row) for row in self.cells]
        return "\n".join([f"**{self.title}**", "", line(self.headings), rule, *body, ""])


def spread(ratio: Quantiles) -> str:
    return f"{ratio.median:.2f} ({ratio.q20:.2f}-{ratio.q80:.2f})"


def _time(seconds: Quantiles, unit: float) -> str:
    low, middle, high = (
        f"{figure / unit:.{0 if figure / unit >= 1000 else 2}f}"
        for figure in (seconds.q20, seconds.median, seconds.q80)
    )
    return f"{middle}\n{low}-{high}"


def _of_row(row: Row, unit: float) -> str:
    """The time, and below it, of others, ours as a multiple of it."""
    assert row.seconds is not None
    if row.role == "ours":
        return _time(row.seconds, unit)
    return f"{_time(row.seconds, unit).splitlines()[0]}\n{spread(row.ratios[peers.OURS])}"


def layer_table(benchmark: str, mode: str, found: Sequence[Line]) -> Table:
    """A line a case. ``benchmark``: op or overhead."""
    unit, word = (1e-3, "ms") if benchmark == "op" else (1e-6, "us")
    columns = list(dict.fromkeys(name for line in found for name in line.rows))
    title = (
        f"{benchmark}, {mode}: measured, median {word}; below it, of frozen_bn its 20-80 % "
        "quantiles, of others frozen_bn's time over theirs in the same round, with quantiles"
    )
    table = Table(title, ("layer", *columns, f"{peers.OURS} / fastest peer"))
    for line in found:
        best = line.fastest_peer
        cells = [_of_row(line.rows[n], unit) if n in line.rows else "-" for n in columns]
        ratio = f"{spread(best.ratios[peers.OURS])}\n{best.contender}"
        table.cells.append((line.first.name, *cells, ratio))
    return table


def model_table(found: Sequence[Line]) -> Table:
    """Of one network: a line a contender, both modes side by side."""
    first = found[0].first
    size = "x".join(map(str, first.shape))
    headings = ["contender"]
    for line in found:
        headings += [f"{line.first.mode} ms", "/ BN deleted", f"{model_peers.FUSED} / this"]
    where = f"{first.operation} {size}, {first.dtype}, {first.layout}"
    title = f"{where}: measured, medians, 20-80 % quantiles"
    table = Table(title, headings)
    for name in found[0].rows:
        cells = []
        for row in (line.rows[name] for line in found):
            assert row.seconds is not None and row.over_floor is not None
            time = _time(row.seconds, 1e-3).replace("\n", " (") + ")"
            cells += [time, spread(row.over_floor), spread(row.ratios[model_peers.FUSED])]
        table.cells.append((name, *cells))
    return table


def memory_tables(rows: Iterable[Row]) -> list[Table]:
    """One of the layers, with a line a case, and one for each network."""
    tables = []
    found = lines(rows, "memory", "full")
    if found:
        title = (
            "memory of a layer: measured, MiB saved for the backward pass (what else is kept of "
            "the input counts), below it how far memory rises, forward and backward"
        )
        layers = Table(title, ("layer", *found[0].rows))
        for line in found:
            cells = (f"{_mib(r.saved_bytes)}\n{_mib(r.peak_bytes)}" for r in line.rows.values())
            layers.cells.append((line.first.name, *cells))
        tables.append(layers)
    for line in lines(rows, "memory", "step"):
        size = "x".join(map(str, line.first.shape))
        first = line.first
        title = f"memory of {first.operation} {size}, {first.dtype}, {first.layout}: measured"
        headings = ("contender", "saved MiB", "/ BN deleted", "peak of a step, MiB", "/ BN deleted")
        table = Table(title, headings)
        floor = line.floor
        for name, row in line.rows.items():
            ratios = [
                f"{mine / base:.3f}" if mine and base else "-"
                for mine, base in (
                    (row.saved_bytes, floor.saved_bytes),
                    (row.peak_bytes, floor.peak_bytes),
                )
            ]
            saved, peak = _mib(row.saved_bytes), _mib(row.peak_bytes)
            table.cells.append((name, saved, ratios[0], peak, ratios[1]))
        tables.append(table)
    return tables


def cast_tables(rows: Iterable[Row]) -> list[Table]:
    """One for each network."""
    tables = []
    for line in lines(rows, "casts"):
        first, size = line.first, "x".join(map(str, line.first.shape))
        title = (
            f"casts in a step of {first.operation} {size}, {first.dtype}, {first.layout}: counted, "
            "but for vectors; operators that are given two dtypes"
        )
        table = Table(title, ("contender", "casts", "MiB read and written", "two dtypes"))
        for name, row in line.rows.items():
            found = row.details
            mib = _mib(found["cast_bytes"])
            table.cells.append((name, str(found["casts"]), mib, str(found["mixed"])))
        tables.append(table)
    return tables


def _mib(figure: int | None) -> str:
    return "-" if figure is None else f"{figure / MIB:.1f}"


def summary_table(rows: Sequence[Row]) -> Table | None:
    """Geometric means by mode, dtype and layout, over operations and shapes."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines(rows, "op"):
        first = line.first
        groups.setdefault((first.mode, first.dtype, first.layout), []).append(line)
    if not groups:
        return None
    title = "op: geometric means over layers of measured ratios of frozen_bn's time (quantiles)"
    table = Table(title, ("mode, dtype, layout", "layers", "/ floor", "/ fastest peer"))
    for (mode, *kind), found in groups.items():
        with_floor = [line.floor.ratios[peers.OURS] for line in found if line.of("floor")]
        best = [line.fastest_peer.ratios[peers.OURS] for line in found]
        floor = spread(geometric_mean(with_floor)) if with_floor else "-"
        name = f"{mode} {' '.join(kind)}"
        table.cells.append((name, str(len(found)), floor, spread(geometric_mean(best))))
    return table


def geometric_mean(ratios: Sequence[Quantiles]) -> Quantiles:
    """Also of each quantile."""

    def mean(figures: list[float]) -> float:
        return math.exp(math.fsum(map(math.log, figures)) / len(figures))

    return Quantiles(
        *(mean([getattr(r, name) for r in ratios]) for name in ("median", "q20", "q80"))
    )


def measured_tables(rows: Sequence[Row]) -> list[Table]:
    """All that was measured, in the order in which one reads it."""
    tables = []
    for benchmark in ("overhead", "op"):
        modes = dict.fromkeys(row.mode for row in rows if row.benchmark == benchmark)
        for mode in modes:
            tables.append(layer_table(benchmark, mode, lines(rows, benchmark, mode)))
    if (summary := summary_table(rows)) is not None:
        tables.append(summary)
    networks: dict[tuple[object, ...], list[Line]] = {}
    for line in lines(rows, "model"):
        networks.setdefault(line.key[:-1], []).append(line)
    tables += [model_table(found) for found in networks.values()]
    return tables + cast_tables(rows) + memory_tables(rows)


def wide_console() -> Console:
    """Wide enough for all tables where the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=220, highlight=False)
