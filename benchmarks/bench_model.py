"""Whole networks with frozen batch normalization, side by side:

    python -m benchmarks.bench_model                        # all: about an hour on two cores
    python -m benchmarks.bench_model --models resnet50 --seconds 20 --no-compile

For each network and layout one table: the time of a training step and of a forward pass without
gradients (medians of interleaved rounds, and the median of the round-by-round ratios to the network
with its batch normalizations deleted), the bytes saved for the backward pass, and peak memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from frozen_bn.report import saved_bytes

from .interleave import OtherLoad, Plan, Timing, measure
from .measure import peak_bytes
from .model_peers import DELETED, FOLDED, FUSED, TORCHVISION, WORKLOADS, Workload, loss_of, networks

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """One network in one layout. Times in seconds, memory in bytes."""

    workload: str
    layout: str
    contender: str
    step: Timing
    forward: Timing
    step_ratio: float  # to the network with its batch normalizations deleted
    forward_ratio: float
    saved: int
    peak: int


def _step(net: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _forward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            loss()

    return forward


def run(
    workload: Workload, layout: str, plan: Plan, device: torch.device, compiled: bool
) -> list[Row]:
    """Every contender on one network in one layout."""
    nets = networks(workload, compiled=compiled)
    losses, steps, forwards, saved, peak = {}, {}, {}, {}, {}
    for name, net in nets.items():
        net.to(device, memory_format=LAYOUTS[layout])
        losses[name] = loss_of(net, workload, device)
        steps[name] = _step(net, losses[name])
        forwards[name] = _forward(losses[name])
        steps[name]()  # compiles, and lets the first momentum of things settle
        saved[name] = saved_bytes(net, losses[name])
        peak[name] = peak_bytes(steps[name], device)
    step = measure(steps, plan, device)
    forward = measure(forwards, plan, device)
    return [
        Row(
            workload.title,
            layout,
            name,
            step[name],
            forward[name],
            step[name].ratio(step[DELETED]),
            forward[name].ratio(forward[DELETED]),
            saved[name],
            peak[name],
        )
        for name in nets
    ]


def _milliseconds(timing: Timing) -> str:
    return f"{1e3 * timing.median:.0f} ({1e3 * timing.low:.0f}-{1e3 * timing.high:.0f})"


def table(rows: list[Row]) -> Table:
    first = rows[0]
    shown = Table(title=f"{first.workload}, {first.layout}", caption="ratio: to BN deleted")
    for header in ("", "step ms", "ratio", "no-grad ms", "ratio", "saved MiB", "ratio", "peak MiB"):
        shown.add_column(header, justify="right" if header else "left", no_wrap=True)
    base = next(row for row in rows if row.contender == DELETED)
    for row in rows:
        shown.add_row(
            row.contender,
            _milliseconds(row.step),
            f"{row.step_ratio:.3f}",
            _milliseconds(row.forward),
            f"{row.forward_ratio:.3f}",
            f"{row.saved / 2**20:.1f}",
            f"{row.saved / base.saved:.3f}",
            f"{row.peak / 2**20:.0f}",
        )
    return shown


def verdict(rows: list[Row]) -> str:
    """The three targets: as fast as no normalization, faster than torchvision's, no more memory."""
    by_name = {row.contender: row for row in rows}
    ours = [by_name[FUSED], by_name[FOLDED]]
    best = min(ours, key=lambda row: row.step_ratio)
    speed_up = best.step.ratio(by_name[TORCHVISION].step)
    least = min(row.saved for row in ours) / by_name[DELETED].saved
    wanted = 1.2 if best.layout == "NCHW" else 1.1
    return (
        f"{best.contender}: step {best.step_ratio:.3f}x BN deleted (target 1.00), "
        f"{1 / speed_up:.2f}x faster than torchvision's (target {wanted}), "
        f"saved bytes {least:.3f}x (target 1.04)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, a table and mode")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    console, load, device = Console(width=120), OtherLoad(), torch.device(options.device)
    plan = Plan(options.seconds, min_rounds=5, max_rounds=100)
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        cases = [(WORKLOADS[m], layout) for m in options.models for layout in options.layouts]
        for workload, layout in progress.track(cases, description="Networks"):
            found = run(workload, layout, plan, device, not options.no_compile)
            console.print(table(found), verdict(found), "")
            rows += found
    if (share := load.share()) is not None:
        console.print(f"Other programs took {share:.0%} of the machine meanwhile.")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
