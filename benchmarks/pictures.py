"""Pictures of the rows. Each says what was measured and what is modelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import model_peers, peers, roofline
from .cases import MODES, SIZES
from .rows import Line, Row, lines

MIB = 2**20
_OURS = "#1b6ca8"
_COLOURS = {
    peers.OURS: _OURS,
    peers.FLOOR: "#202020",
    "torchvision": "#e07b39",
    "timm": "#f2b48a",
    "batch_norm": "#7a7a7a",
    peers.CUDNN_OFF: "#b0b0b0",
    "detectron2": "#c9a227",
    peers.LIVE: "#a05195",
    peers.COMPILED: "#3a9d5d",
}
_LABELS = {
    "torchvision": "torchvision FrozenBatchNorm2d",
    "timm": "timm FrozenBatchNormAct2d",
    "batch_norm": "F.batch_norm, eval",
    peers.LIVE: "F.batch_norm, training",
    "detectron2": "detectron2's formula",
    peers.COMPILED: "formula, torch.compile",
    peers.FLOOR: "floor (unavoidable bytes)",
}
_TITLES = {"full": "forward + backward", "no-grad": "forward, without gradients"}


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _where(rows: Sequence[Row]) -> str:
    about = rows[0].environment
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return about["machine"] if about["device"] == "cuda" else f"{about['machine']}, {threads}"


def _save(figure: Figure, title: str, file: Path) -> Path:
    figure.suptitle(title, fontsize=11)
    figure.set_layout_engine("constrained", h_pad=0.1)  # leaves room for the title
    figure.savefig(file, dpi=130)
    return file


def speed(rows: Sequence[Row], file: Path) -> Path | None:
    """Time per element against size, a line a contender."""
    sized = [row for row in rows if row.benchmark == "op" and row.shape in SIZES]
    if not sized:
        return None
    figure = Figure(figsize=(11, 9))
    grid = figure.subplots(2, 2, sharex=True)
    for axes, mode in zip(grid.flat, MODES, strict=True):
        of_mode = [row for row in sized if row.mode == mode]
        for name in dict.fromkeys(row.contender for row in of_mode):
            of = sorted((r for r in of_mode if r.contender == name), key=lambda r: r.numel)
            middle = [1e9 * row.median / row.numel for row in of]
            ends = [[1e9 * getattr(r.seconds, q) / r.numel for r in of] for q in ("q20", "q80")]
            sizes, colour = [row.numel for row in of], _COLOURS[name]
            thick = 2.6 if name == peers.OURS else 1.3
            style = "--" if name == peers.FLOOR else "-"
            label = _LABELS.get(name, name)
            axes.plot(sizes, middle, style, marker="o", ms=3.5, lw=thick, color=colour, label=label)
            axes.fill_between(sizes, *ends, color=colour, alpha=0.12, lw=0)
        axes.set(xscale="log", yscale="log", title=_TITLES.get(mode, mode))
        axes.grid(alpha=0.25)
        _plain(axes)
    for axes in grid[1]:
        axes.set_xlabel("elements")
    for axes in grid[:, 0]:
        axes.set_ylabel("ns an element, logarithmic")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    first = sized[0]
    title = (
        f"Time an element of one layer, measured: {first.dtype}, {first.layout}, "
        f"{first.operation}; medians, shaded 20-80 %\n{_where(sized)}"
    )
    return _save(figure, title, file)


def _groups(axes: Axes, groups: Sequence[str], values: dict[str, list[float]]) -> Iterator[Any]:
    """Name, places and values of each contender, side by side in every group."""
    width = 0.84 / len(values)
    axes.set_xticks(range(len(groups)), groups)
    _plain(axes)
    axes.margins(y=0.12)
    for k, (name, heights) in enumerate(values.items()):
        yield name, [g + (k - (len(values) - 1) / 2) * width for g in range(len(groups))], heights


def _three_digits(value: float) -> str:
    """As ``%.3g``, but for its exponents from 1000 on."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _bars(axes: Axes, groups: Sequence[str], values: dict[str, list[float]]) -> None:
    width = 0.82 / len(values)
    for name, places, heights in _groups(axes, groups, values):
        label = _LABELS.get(name, name)
        bars = axes.bar(places, heights, width, label=label, color=_COLOURS[name])
        axes.bar_label(bars, fmt=_three_digits, fontsize=7.5, padding=2)
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=4)


def _modelled_bytes(axes: Axes, layers: Sequence[tuple[Line, Line]]) -> None:
    names = list(layers[0][0].rows)
    values = {name: [roofline.an_element(both, name) for both in layers] for name in names}
    _bars(axes, [both[0].first.operation for both in layers], values)
    for place, both in enumerate(layers):
        needed = [line.rows[peers.OURS].unavoidable_bytes or 0 for line in both]
        height = sum(needed) / both[0].first.numel
        axes.plot([place - 0.42, place + 0.42], [height] * 2, color="black", lw=1, ls=":")
    axes.set_ylabel("bytes an element")
    axes.set_title(
        f"On CUDA, modelled (counted bytes): forward + backward, {layers[0][0].first.dtype}; "
        "dotted: unavoidable", fontsize=10
    )  # fmt: skip


def _modelled_times(axes: Axes, both: tuple[Line, Line]) -> None:
    speeds = roofline.BANDWIDTHS
    numel = both[0].first.numel
    values = {
        name: [roofline.an_element(both, name) * numel / s / 1e3 for s in speeds.values()]
        for name in both[0].rows
    }
    gpus = [f"{gpu}\n{speed} GB/s" for gpu, speed in speeds.items()]
    for name, places, times in _groups(axes, gpus, values):
        axes.plot(places, times, "o", markersize=8, color=_COLOURS[name])
        for place, time in zip(places, times, strict=True):
            text = f"{time:.{0 if time >= 100 else 1}f}"
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
            axes.annotate(text, (place, time), (0, 7), **style)
    axes.set_yscale("log")
    axes.set_ylabel("us, logarithmic")
    title = f"On CUDA, modelled: least time of {both[0].first.name}, at peak bandwidth"
    axes.set_title(title, fontsize=10)


def _bandwidth(axes: Axes, layers: Sequence[Line]) -> None:
    """What is unavoidable, over the time that a contender takes."""
    names = list(layers[0].rows)
    values = {
        name: [1e-9 * (r.unavoidable_bytes or 0) / r.median for r in (x.rows[name] for x in layers)]
        for name in names
    }
    _bars(axes, [line.first.operation for line in layers], values)
    first = layers[0].first
    size = "x".join(map(str, first.shape))
    title = f"{_where([first])}: measured, forward + backward, {first.dtype} {first.layout} {size}"
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("unavoidable bytes over time, GB/s")


def roofline_picture(rows: Sequence[Row], file: Path) -> Path | None:
    """Bytes an element and least times, modelled; achieved bandwidth, measured, if there is any."""
    panels: list[tuple[Callable[[Axes, Any], None], Any]] = []
    if layers := _alike(roofline.passes(rows), lambda both: both[0].first):
        panels.append((_modelled_bytes, layers))
        panels.append((_modelled_times, layers[min(2, len(layers) - 1)]))
    measured = [line for line in lines(rows, "op", "full") if line.first.shape not in SIZES]
    if measured := _alike(measured, lambda line: line.first):
        panels.append((_bandwidth, measured))
    if not panels:
        return None
    figure = Figure(figsize=(11, 4.1 * len(panels) + 0.4))
    every = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (draw, what) in zip(every, panels, strict=True):
        draw(axes, what)
    return _save(figure, "Memory traffic of one layer", file)


def _alike(found: Sequence[Any], first: Callable[[Any], Row]) -> list[Any]:
    """Those on the first shape and layout; in fp16, if there is any: one an operation."""
    half = [item for item in found if first(item).dtype == "fp16"] or list(found)
    kind = [(first(item).dtype, first(item).shape, first(item).layout) for item in half]
    return [item for item, of in zip(half, kind, strict=True) if of == kind[0]]


def _contender_bars(axes: Axes, line: Line, series: Sequence[Any]) -> None:
    """Horizontal bars. ``series``: label, values, errors (or ``None``), how they are written."""
    names = list(line.rows)
    colours = [_OURS if row.role == "ours" else "#8a8a8a" for row in line.rows.values()]
    height = 0.8 / len(series)
    for k, (label, values, errors, form) in enumerate(series):
        places = [n + (k - (len(series) - 1) / 2) * height for n in range(len(names))]
        bars = axes.barh(
            places, values, height * 0.94, xerr=errors, color=colours, alpha=(1, 0.45)[k],
            error_kw={"lw": 1}, label=label,
        )  # fmt: skip
        axes.bar_label(bars, labels=[form.format(v) for v in values], fontsize=8, padding=4)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    _plain(axes)


def memory(rows: Sequence[Row], file: Path) -> Path | None:
    """Saved and peak bytes by contender: of a layer with residual and ReLU, and of networks."""
    found = lines(rows, "memory")
    of_layers = [line for line in found if line.first.mode == "full"]
    shown = [line for line in found if line.first.mode == "step"]
    shown = [line for line in of_layers if line.first.operation == "residual+relu"][:1] + shown
    if not shown:
        return None
    figure = Figure(figsize=(10, 3.9 * len(shown) + 0.6))
    for axes, line in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        saved = [(row.saved_bytes or 0) / MIB for row in line.rows.values()]
        peak = [(row.peak_bytes or 0) / MIB for row in line.rows.values()]
        _contender_bars(axes, line, [("", saved, None, "{:.1f}"), ("", peak, None, "{:.0f}")])
        axes.set_title(line.first.name, fontsize=10)
        axes.set_xlabel("MiB")
    title = (
        "Memory, measured: saved for the backward pass (full colour), and how far it rises\n"
        f"in forward and backward, or in a training step (light). {_where(rows)}"
    )
    return _save(figure, title, file)


def networks(rows: Sequence[Row], file: Path) -> Path | None:
    """Time of whole networks over that of the network without its batch normalizations."""
    steps, others = (lines(rows, "model", mode) for mode in ("step", "no-grad"))
    if not steps:
        return None
    figure = Figure(figsize=(10, 4.2 * len(steps) + 0.6))
    every = figure.subplots(len(steps), 1, squeeze=False)[:, 0]
    for axes, step, other in zip(every, steps, others, strict=True):
        series = []
        for line in (step, other):
            ratios = [row.over_floor for row in line.rows.values() if row.over_floor]
            errors = [[r.median - r.q20 for r in ratios], [r.q80 - r.median for r in ratios]]
            series.append(("", [r.median for r in ratios], errors, "{:.2f}"))
        _contender_bars(axes, step, series)
        axes.axvline(1, color="black", lw=1, ls=":")
        axes.set_title(step.first.name, fontsize=10)
        axes.set_xlabel(f"time / {model_peers.DELETED}")
    title = (
        "Whole networks, measured: a training step (full colour), and a forward pass without\n"
        f"gradients (light), over {model_peers.DELETED}; lines: 20-80 %. {_where(rows)}"
    )
    return _save(figure, title, file)


def draw(rows: Sequence[Row], json: Path) -> list[Path]:
    """All that there are rows for, next to the JSON file."""
    kinds = {"speed": speed, "roofline": roofline_picture, "memory": memory, "models": networks}
    drawn = (make(rows, json.with_name(f"{json.stem}-{k}.png")) for k, make in kinds.items())
    return [file for file in drawn if file is not None]
