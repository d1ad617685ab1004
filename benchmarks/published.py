"""The pictures of the documentation, docs/images/*.png, light and dark: ``python -m
benchmarks.published``. They are drawn from the tables of docs/results.md: a figure stands in one
place only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from .pictures import LIGHT, Theme, Values, bars, curves_of, drawing

DOCS = Path(__file__).parents[1] / "docs"
DARK = Theme("dark", ink="#e6edf3", quiet="#7d8590", ours="#56b4e9")


def figures(heading: str, column: str) -> dict[str, float]:
    """A column of the first table below a heading of docs/results.md, by what stands first in each
    row; of cells with several figures the first."""
    page = (DOCS / "results.md").read_text().replace("`", "")
    section = page[re.search(rf"^#+ {re.escape(heading)}$", page, re.MULTILINE).end() :]  # type: ignore[union-attr]
    table = re.search(r"(^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    head, _, *body = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in table[0].splitlines()
    )
    place = head.index(column)
    found = {row[0]: re.match(r"[\d.]+", row[place]) for row in body}
    return {name: float(figure[0]) for name, figure in found.items() if figure is not None}


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
