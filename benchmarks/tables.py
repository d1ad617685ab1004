"""The rows of a run as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from pandas import DataFrame, Series, concat

from .cases import SIZES
from .model_peers import DELETED, FUSED
from .peers import OURS
from .rows import fastest_peers
from .timing import QUANTILES

#: A title, and cells of text; the index is the first column.
Table = tuple[str, DataFrame]

MIB = 2**20
#: Times of a layer are shown in these.
UNITS = {"op": (1e-3, "ms"), "overhead": (1e-6, "us")}


def markdown(table: Table) -> str:
    title, cells = table
    align = ("left", *("right" for _ in cells.columns))
    text = cells.to_markdown(colalign=align, disable_numparse=True)
    return f"**{title}**\n\n{text}"


def spread(rows: DataFrame, figure: str, unit: float = 1.0) -> Series:
    """The median of a figure, its 20 % and its 80 % quantile; ``-`` where there are none."""
    columns = [f"{figure}.{part}" for part in QUANTILES]
    figures = rows.reindex(columns=columns).to_numpy(float) / unit
    cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in figures]
    return Series(cells, rows.index).where(~numpy.isnan(figures[:, 0]), "-")


def rounded(figures: Series, form: str = "{:.2f}") -> Series:
    return figures.astype(float).map(form.format).where(figures.notna(), "-")


def mib(figures: Series) -> Series:
    return rounded(figures / MIB, "{:.1f}")


def by_contender(rows: DataFrame, cells: Series) -> DataFrame:
    """A line of cells for each name, a column for each contender, as they come."""
    table = rows.assign(cells=cells).pivot(index="name", columns="contender", values="cells")
    table = table.reindex(index=rows["name"].unique(), columns=rows["contender"].unique())
    return table.fillna("-").rename_axis("layer")


def layer_table(benchmark: str, mode: str, rows: DataFrame) -> Table:
    unit, word = UNITS[benchmark]
    title = (
        f"{benchmark}, {mode}: measured, median {word}; of frozen_bn with its 20-80 % quantiles, "
        "of others with frozen_bn's time over theirs in the same round, and quantiles"
    )
    ratio = spread(rows, f"ratios.{OURS}")
    cells = rounded(rows["seconds.median"] / unit) + ", " + ratio
    table = by_contender(rows, cells.mask(rows["role"] == "ours", spread(rows, "seconds", unit)))
    best = fastest_peers(rows).set_index("name")
    table[f"{OURS} / fastest peer"] = spread(best, f"ratios.{OURS}") + ", " + best["contender"]
    return title, table


def summary_table(rows: DataFrame) -> Table:
    kind = ["mode", "dtype", "layout"]

    def means(of: DataFrame, figure: str) -> Series:
        figures = of.set_index(kind).filter(regex=f"^{figure}[.]({'|'.join(QUANTILES)})$")
        return spread(numpy.exp(numpy.log(figures).groupby(kind, sort=False).mean()), figure)

    title = "op: geometric means over layers of measured ratios of frozen_bn's time (quantiles)"
    ours = rows[rows["contender"] == OURS]
    columns = {
        "how many": ours.groupby(kind, sort=False).size().astype(str),
        "/ floor": means(ours, "over_floor"),
        "/ fastest peer": means(fastest_peers(rows), f"ratios.{OURS}"),
    }
    table = DataFrame(columns)
    return title, table.set_axis([" ".join(names) for names in table.index]).rename_axis("layers")


def bandwidth_table(rows: DataFrame) -> Table:
    """All that has to be moved, over the time."""
    rows = rows[rows["unavoidable_bytes"].notna()]
    rows = rows.assign(name=rows["mode"] + " " + rows["name"])
    reached = rows["unavoidable_bytes"] / rows["seconds.median"] / 1e9
    title = "op: measured, the unavoidable bytes over the median time, GB/s"
    return title, by_contender(rows, rounded(reached, "{:.0f}"))


def size_table(rows: DataFrame) -> Table:
    """Of the layers that differ in nothing else."""
    rows = rows[rows["shape"].isin(SIZES) & rows["mode"].isin(("full", "no-grad"))]
    rows = rows.assign(name=rows["mode"] + ", elements: " + rows["numel"].astype(str))
    times = rounded(rows["seconds.median"] / rows["numel"] * 1e9, "{:.3f}")
    return "op: measured, median ns an element", by_contender(rows, times)


def network_table(name: str, rows: DataFrame) -> Table:
    """A line a contender, the modes side by side."""
    sides = []
    for mode, of_mode in rows.groupby("mode", sort=False):
        of = of_mode.set_index("contender")
        columns = {
            f"{mode} ms": spread(of, "seconds", 1e-3),
            f"/ {DELETED}": spread(of, "over_floor"),
            f"{FUSED} / this": spread(of, f"ratios.{FUSED}"),
        }
        sides.append(DataFrame(columns))
    return f"{name}: measured, medians, 20-80 % quantiles", concat(sides, axis=1)


def casts_table(name: str, rows: DataFrame) -> Table:
    title = f"casts in a step of {name}: counted, but for vectors; operators given two dtypes"
    of = rows.set_index("contender")
    columns = {
        "casts": rounded(of["details.casts"], "{:.0f}"),
        "MiB read and written": mib(of["details.cast_bytes"]),
        "two dtypes": rounded(of["details.mixed"], "{:.0f}"),
    }
    return title, DataFrame(columns)


def layer_memory_table(rows: DataFrame) -> Table:
    title = (
        "memory of a layer: measured, MiB saved for the backward pass (what else is kept of the "
        "input counts), and how far memory rises, forward and backward"
    )
    return title, by_contender(rows, mib(rows["saved_bytes"]) + ", " + mib(rows["peak_bytes"]))


def network_memory_table(name: str, rows: DataFrame) -> Table:
    of = rows.set_index("contender")
    columns = {}
    for what, heading in (("saved_bytes", "saved MiB"), ("peak_bytes", "peak of a step, MiB")):
        columns[heading] = mib(of[what])
        columns[f"{heading} / {DELETED}"] = rounded(of[what] / of[what][DELETED], "{:.3f}")
    return f"memory of {name}: measured", DataFrame(columns)


def measured(rows: DataFrame) -> Iterator[Table]:
    """All that was measured, in the order in which one reads it."""
    for benchmark in UNITS:
        of_benchmark = rows[rows["benchmark"] == benchmark]
        for mode, of_mode in of_benchmark.groupby("mode", sort=False):
            yield layer_table(benchmark, mode, of_mode)
    of_op = rows[rows["benchmark"] == "op"]
    if len(of_op):
        yield summary_table(of_op)
    if of_op["unavoidable_bytes"].any():
        yield bandwidth_table(of_op)
    if of_op["shape"].isin(SIZES).any():
        yield size_table(of_op)
    of_layers = (rows["benchmark"] == "memory") & (rows["mode"] == "full")
    if of_layers.any():
        yield layer_memory_table(rows[of_layers])
    of_networks = {"model": network_table, "casts": casts_table, "memory": network_memory_table}
    for benchmark, table in of_networks.items():
        of_benchmark = rows[(rows["benchmark"] == benchmark) & ~of_layers]
        for name, of_network in of_benchmark.groupby("name", sort=False):
            yield table(name, of_network)
