"""Pictures of the rows of a run, beside its JSON file. Ours is blue, all else grey and named where
it is; the two differ in brightness too. Those of the documentation: ``published``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import model_peers, peers, roofline
from .cases import SIZES
from .rows import Line, Row, lines

MIB = 2**20


@dataclass(frozen=True)
class Theme:
    """The colours of a picture without a background of its own."""

    name: str
    ink: str
    quiet: str
    ours: str


LIGHT = Theme("light", ink="#1f2328", quiet="#8c959f", ours="#0072b2")

_LABELS = {
    "torchvision": "torchvision",
    "batch_norm": "F.batch_norm, eval",
    peers.LIVE: "F.batch_norm, training",
    "detectron2": "detectron2's formula",
    peers.COMPILED: "torch.compile",
    peers.FLOOR: "floor: unavoidable bytes",
}
#: Of a run's many contenders, those that a curve is drawn of.
_CURVES = (peers.OURS, peers.FLOOR, "torchvision", "batch_norm", peers.COMPILED)

#: What a bar is drawn of, by name.
Values = Mapping[str, float]
#: Of a curve.
Points = Sequence[tuple[float, float]]


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
    errors: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Horizontal bars, each with its name and figure. ``hollow``: the name of what is no contender,
    but what they are measured by. ``rows``: how many there is room for."""
    colours = [theme.ours if _is_ours(name) else theme.quiet for name in values]
    spread = None if errors is None else [list(ends) for ends in zip(*errors, strict=True)]
    style: dict[str, Any] = {"ecolor": theme.ink, "error_kw": {"lw": 1}}
    drawn = axes.barh([*values], [*values.values()], 0.68, color=colours, xerr=spread, **style)
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


def curves_of(
    axes: Axes, theme: Theme, curves: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
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


# ---- Of a run


def _where(rows: Sequence[Row]) -> str:
    about = rows[0].environment
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return about["machine"] if about["device"] == "cuda" else f"{about['machine']}, {threads}"


def _named(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {_LABELS.get(name, name): row for name, row in rows.items()}


def speed(rows: Sequence[Row], file: Path) -> Path | None:
    """Time per element against size, a line a contender."""
    sized = [row for row in rows if row.benchmark == "op" and row.shape in SIZES]
    if not sized:
        return None
    first = sized[0]
    kind = f"{first.dtype}, {first.layout}, {first.operation}, {_where(sized)}"
    with drawing(LIGHT, file, (12, 4.4), f"Time of one layer, measured: {kind}") as figure:
        panels = (("full", "forward + backward"), ("no-grad", "forward, without gradients"))
        for axes, (mode, title) in zip(figure.subplots(1, 2), panels, strict=True):
            curves = {}
            for name in _CURVES:
                of = [row for row in sized if (row.mode, row.contender) == (mode, name)]
                points = sorted((row.numel, 1e9 * row.median / row.numel) for row in of)
                if points:
                    curves[_LABELS.get(name, name)] = points
            curves_of(axes, LIGHT, curves)
            axes.set(title=title, xlabel="elements", ylabel="ns an element")
    return file


def _alike(found: Sequence[Any], first: Callable[[Any], Row]) -> list[Any]:
    """Those on the first shape and layout; in fp16, if there is any: one an operation."""
    half = [item for item in found if first(item).dtype == "fp16"] or list(found)
    kind = [(first(item).dtype, first(item).shape, first(item).layout) for item in half]
    return [item for item, of in zip(half, kind, strict=True) if of == kind[0]]


def roofline_picture(rows: Sequence[Row], file: Path) -> Path | None:
    """Bytes an element, modelled; achieved bandwidth, measured, if there is any."""
    panels: list[tuple[str, Row, Values, str]] = []
    for both in _alike(roofline.passes(rows), lambda both: both[0].first):
        counted = {name: roofline.an_element(both, name) for name in both[0].rows}
        panels.append(("modelled, bytes an element", both[0].first, counted, "{:.2f}"))
    measured = [line for line in lines(rows, "op", "full") if line.first.shape not in SIZES]
    for line in _alike(measured, lambda line: line.first):
        reached = {n: 1e-9 * (r.unavoidable_bytes or 0) / r.median for n, r in line.rows.items()}
        what = f"{_where(rows)}: measured, unavoidable bytes over time, GB/s"
        panels.append((what, line.first, reached, "{:.0f}"))
    if not panels:
        return None
    title = "Memory traffic of one layer, forward + backward"
    with drawing(LIGHT, file, (8, 2.8 * len(panels) + 0.4), title) as figure:
        every = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (what, first, values, form) in zip(every, panels, strict=True):
            bars(axes, LIGHT, values, f"{first.name}: {what}", form, hollow=peers.FLOOR)
    return file


def memory(rows: Sequence[Row], file: Path) -> Path | None:
    """Saved and peak bytes by contender: of a layer with residual and ReLU, and of networks."""
    found = lines(rows, "memory")
    of_layers = [line for line in found if line.first.mode == "full"]
    shown = [line for line in found if line.first.mode == "step"]
    shown = [line for line in of_layers if line.first.operation == "residual+relu"][:1] + shown
    if not shown:
        return None
    title = f"Memory, measured, MiB: {_where(rows)}"
    with drawing(LIGHT, file, (11, 3.0 * len(shown) + 0.4), title) as figure:
        for pair, line in zip(figure.subplots(len(shown), 2, squeeze=False), shown, strict=True):
            of = _named(line.rows)
            saved = {name: (row.saved_bytes or 0) / MIB for name, row in of.items()}
            peak = {name: (row.peak_bytes or 0) / MIB for name, row in of.items()}
            hollow = model_peers.DELETED if line.first.mode == "step" else _LABELS[peers.FLOOR]
            name = line.first.name
            bars(pair[0], LIGHT, saved, f"{name}: saved for backward", "{:.1f}", hollow=hollow)
            bars(pair[1], LIGHT, peak, "rise to the peak", "{:.0f}", hollow=hollow, names=False)
    return file


def networks(rows: Sequence[Row], file: Path) -> Path | None:
    """Time of whole networks over that of the network without its batch normalizations."""
    found: list[tuple[Line, Line]] = list(
        zip(lines(rows, "model", "step"), lines(rows, "model", "no-grad"), strict=True)
    )
    if not found:
        return None
    title = f"Whole networks, time / {model_peers.DELETED}, measured: {_where(rows)}"
    with drawing(LIGHT, file, (11, 3.2 * len(found) + 0.4), title) as figure:
        for pair, both in zip(figure.subplots(len(found), 2, squeeze=False), found, strict=True):
            for axes, line in zip(pair, both, strict=True):
                of = {name: row.over_floor for name, row in line.rows.items()}
                ratios = {name: ratio for name, ratio in of.items() if ratio is not None}
                errors = [(r.median - r.q20, r.q80 - r.median) for r in ratios.values()]
                what = "training step" if line is both[0] else "forward, without gradients"
                title = f"{line.first.name}: {what}" if line is both[0] else what
                values = {name: ratio.median for name, ratio in ratios.items()}
                bars(
                    axes, LIGHT, values, title, errors=errors, names=line is both[0],
                    hollow=model_peers.DELETED,
                )  # fmt: skip
    return file


def draw(rows: Sequence[Row], json: Path) -> list[Path]:
    """All that there are rows for, next to the JSON file."""
    kinds = {"speed": speed, "roofline": roofline_picture, "memory": memory, "models": networks}
    drawn = (make(rows, json.with_name(f"{json.stem}-{k}.png")) for k, make in kinds.items())
    return [file for file in drawn if file is not None]
