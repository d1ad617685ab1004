"""The pictures of the documentation, docs/images/*.png, light and dark: ``python -m
benchmarks.published``. They are drawn from the tables of docs/results.md: a figure stands in one
place only. Ours is blue, all else grey and named where it is; the two differ in brightness too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Theme:
    """The colours of a picture without a background of its own."""

    name: str
    ink: str
    quiet: str
    ours: str


LIGHT = Theme("light", ink="#1f2328", quiet="#8c959f", ours="#0072b2")
DARK = Theme("dark", ink="#e6edf3", quiet="#7d8590", ours="#56b4e9")

#: What a bar is drawn of, by name.
Values = Mapping[str, float]
#: Of a curve.
Points = Sequence[tuple[float, float]]


def figures(heading: str, column: str) -> dict[str, float]:
    """A column of the first table below a heading of docs/results.md, by what stands first in each
    row; of cells with several figures the first."""
    page = (DOCS / "results.md").read_text().replace("`", "")
    section = page[re.search(rf"^#+ {re.escape(heading)}$", page, re.MULTILINE).end() :]
    table = re.search(r"(^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    head, _, *body = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in table[0].splitlines()
    )
    place = head.index(column)
    found = {row[0]: re.match(r"[\d.]+", row[place]) for row in body}
    return {name: float(figure[0]) for name, figure in found.items() if figure is not None}


@contextmanager
def drawing(theme: Theme, file: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    """A figure that is saved in the end."""
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), theme.ink)
    ticks = dict.fromkeys(("xtick.color", "ytick.color"), theme.ink)
    settings: Any = {**ink, **ticks, "font.size": 10.5, "axes.titlesize": 10.5}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        figure.savefig(file, dpi=200, transparent=True)


def _is_ours(name: str) -> bool:
    return name.startswith("frozen_bn")


def bars(
    axes: Axes,
    theme: Theme,
    values: Values,
    title: str,
    form: str = "{:.2f}",
    *,
    names: bool = True,
    hollow: str = "",
    rows: int | None = None,
) -> None:
    """Horizontal bars, each with its name and figure. ``hollow``: the name of what is no contender,
    but what they are measured by. ``rows``: how many there is room for."""
    colours = [theme.ours if _is_ours(name) else theme.quiet for name in values]
    drawn = axes.barh([*values], [*values.values()], 0.68, color=colours)
    texts = axes.bar_label(drawn, labels=[form.format(v) for v in values.values()], padding=4)
    for name, bar, text, tick in zip(values, drawn, texts, axes.get_yticklabels(), strict=True):
        if _is_ours(name):
            text.set_fontweight("bold")
            tick.set_fontweight("bold")
        if name == hollow:
            bar.set(facecolor="none", edgecolor=theme.quiet, linestyle="--", linewidth=1.2)
    axes.set_ylim((rows or len(values)) - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, labelleft=names, bottom=False, labelbottom=False)
    axes.set_title(title, loc="left")


def curves_of(axes: Axes, theme: Theme, curves: Mapping[str, Points]) -> None:
    """Lines over logarithmic axes, each with its name at its end."""
    axes.set(xscale="log", yscale="log")
    ends = []
    for name, points in curves.items():
        ours, floor = _is_ours(name), name.startswith("floor")
        colour = theme.ours if ours else theme.ink if floor else theme.quiet
        x, y = zip(*points, strict=True)
        style = "--" if floor else "-"
        axes.plot(x, y, style, color=colour, lw=3 if ours else 1.6, marker="o", ms=4 if ours else 3)
        ends.append((y[-1], x[-1], name, colour))
    lowest = 0.0
    for height, x_end, name, colour in sorted(ends):  # far enough apart to be read
        lowest = max(height, lowest * 1.28)
        weight = "bold" if _is_ours(name) else "normal"
        axes.annotate(
            name, (x_end, lowest), (9, 0), textcoords="offset points", va="center", color=colour,
            weight=weight, annotation_clip=False,
        )  # fmt: skip
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _chosen(values: Values, names: Mapping[str, str]) -> dict[str, float]:
    """Some rows, by other names."""
    return {new: values[old] for old, new in names.items()}


_NETWORKS = {
    "frozen_bn, fuse=True": "frozen_bn",
    "torchvision's FrozenBatchNorm2d": "torchvision",
    "BN in eval()": "BN in eval()",
}


def front_page(theme: Theme, file: Path) -> None:
    """What README shows: time on a GPU and memory."""
    step = figures("Whole networks, H100", "ResNet-50")
    peak = figures("Memory", "peak of a step")
    compiled = {"the same, torch.compile (another run)": "torchvision, compiled"}
    deleted = "BatchNorms deleted"
    times = _chosen(step, _NETWORKS | compiled) | {deleted: 1.0}
    most = _chosen(peak, _NETWORKS | {"BN deleted": deleted})
    with drawing(theme, file, (8.6, 2.6), "ResNet-50, one training step") as figure:
        left, right = figure.subplots(1, 2)
        bars(left, theme, times, "Time on an H100, batch 64", hollow=deleted)
        title = "Peak memory, batch 4, MiB"
        bars(right, theme, most, title, "{:.0f}", hollow=deleted, rows=len(times))


def speed_by_size(theme: Theme, file: Path) -> None:
    columns = ("frozen_bn", "F.batch_norm, eval", "floor")
    title = "One layer with ReLU, forward + backward, fp32, two CPU cores"
    with drawing(theme, file, (8.6, 3.4), title) as figure:
        axes = figure.subplots()
        curves = {}
        for column in columns:
            found = figures("One layer against its size", column)
            curves[column] = [(float(elements), time) for elements, time in found.items()]
        curves_of(axes, theme, curves)
        axes.set(xlabel="elements", ylabel="ns an element")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        axes.minorticks_off()


def memory_saved(theme: Theme, file: Path) -> None:
    names = {n: n for n in ("frozen_bn", "torchvision", "F.batch_norm, eval")}
    layer = _chosen(figures("Memory of a layer", "saved"), names)
    names = _NETWORKS | {"BN deleted": "BatchNorms deleted"}
    network = _chosen(figures("Memory", "peak of a step"), names)
    with drawing(theme, file, (8.6, 2.3), "Memory of training, MiB") as figure:
        left, right = figure.subplots(1, 2)
        title = "One layer, residual and ReLU: saved"
        bars(left, theme, layer, title, "{:.1f}", rows=len(network))
        title = "ResNet-50, batch 4: peak of a step"
        bars(right, theme, network, title, "{:.0f}", hollow="BatchNorms deleted")


def bandwidth(theme: Theme, file: Path) -> None:
    names = {n: n for n in ("frozen_bn", "floor", "torchvision", "F.batch_norm, eval")}
    title = "One layer on an H100, fp16, forward + backward: unavoidable bytes over time, GB/s"
    with drawing(theme, file, (8.6, 2.3), title) as figure:
        panels = ("plain", "ReLU", "residual, ReLU")
        for axes, column in zip(figure.subplots(1, 3, sharex=True), panels, strict=True):
            values = _chosen(figures("Memory bandwidth, H100", column), names)
            first = column == panels[0]
            bars(axes, theme, values, column, "{:.0f}", names=first, hollow="floor")


DRAWINGS: dict[str, Callable[[Theme, Path], None]] = {
    "resnet50": front_page,
    "speed": speed_by_size,
    "memory": memory_saved,
    "h100": bandwidth,
}


def main(folder: Path = DOCS / "images") -> None:
    folder.mkdir(exist_ok=True)
    for name, make in DRAWINGS.items():
        for theme in (LIGHT, DARK):
            make(theme, folder / f"{name}-{theme.name}.png")


if __name__ == "__main__":
    main()
