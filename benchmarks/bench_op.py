"""``python -m benchmarks.bench_op``: the operator against its peers and against a floor.

Forward and forward+backward of ``frozen_bn.frozen_batch_norm``, torchvision's module,
``F.batch_norm`` in eval mode, the scale-shift formula, and a floor that moves the unavoidable bytes
(``benchmarks.peers``), on layers of ResNet-50 and Mask R-CNN. The input requires grad, and so does
the residual; the affine is frozen. Contenders are interleaved; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from frozen_bn import ops

from . import op_report, peers
from .interleave import Call, OtherLoad, Plan, Timing, in_fork, measure
from .op_report import Report, Row

Shape = tuple[int, int, int, int]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

SHAPES: tuple[Shape, ...] = (
    (2, 256, 200, 304),  # Mask R-CNN, 800x1216: res2
    (4, 64, 112, 112),  # ResNet-50: stem
    (2, 1024, 50, 76),  # Mask R-CNN: res4
    (4, 512, 25, 38),  # Mask R-CNN: res5 (H*W no multiple of 4)
    (2, 2048, 25, 25),  # Mask R-CNN, 800x800: res5 (H*W odd)
    (16, 2048, 7, 7),  # ResNet-50: res5 (H*W odd)
)
QUICK_SHAPES: tuple[Shape, ...] = ((4, 512, 25, 38), (16, 2048, 7, 7))
#: Large enough for an output of 32 MB in half precision.
INPLACE_SHAPES: tuple[Shape, ...] = ((2, 256, 200, 304), (256, 2048, 7, 7))
OVERHEAD_SHAPE: Shape = (1, 64, 2, 2)

PLAN = Plan(seconds=0.8, min_rounds=5, max_rounds=15)
QUICK_PLAN = Plan(seconds=0.5, min_rounds=3, max_rounds=5)
OVERHEAD_PLAN = Plan(seconds=2.0, min_rounds=25, max_rounds=75)


@dataclass(frozen=True)
class Case:
    """One row: a kind of layer on data of one dtype, layout and shape."""

    dtype: str
    layout: str
    operation: peers.Operation
    shape: Shape
    inplace: bool = False

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        suffix = " inplace" if self.inplace else ""
        return f"{self.dtype} {self.layout} {self.operation} {size}{suffix}"


def cases(shapes: Iterable[Shape], inplace_shapes: Iterable[Shape]) -> list[Case]:
    """Every dtype, layout and operation on every shape."""
    kinds = list(itertools.product(DTYPES, LAYOUTS))
    operations: tuple[peers.Operation, ...] = get_args(peers.Operation)
    rows = [Case(*kind, op, s) for s in shapes for kind in kinds for op in operations]
    in_place = [
        Case(*kind, op, s, True) for s in inplace_shapes for kind in kinds for op in operations[:2]
    ]
    return rows + in_place


def random_tensor(case: Case, device: torch.device) -> Tensor:
    """Normal values in the case's dtype and layout."""
    tensor = torch.randn(case.shape, device=device).to(DTYPES[case.dtype])
    return tensor.contiguous(memory_format=LAYOUTS[case.layout])


def _with_gradients(
    function: peers.Contender, input: Tensor, residual: Tensor | None, grad: Tensor
) -> tuple[Tensor, ...]:
    wanted = [input] if residual is None else [input, residual]
    return torch.autograd.grad(function(input, residual), wanted, grad)


def _assert_close(name: str, what: str, ours: Tensor, expected: Tensor, allowed: float) -> None:
    """At most a fraction ``allowed`` of the elements may differ by more than the rounding."""
    laid_out = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in (ours, expected)]
    if laid_out[0] != laid_out[1]:
        raise AssertionError(f"{name}: {what} is {laid_out[0]}, the reference's {laid_out[1]}")
    # In pieces, so as not to leave large holes on the heap that is timed next.
    pieces = (
        torch.as_strided(t, [t.numel()], [1]).chunk((t.numel() >> 20) + 1) for t in (ours, expected)
    )
    tolerance = TOLERANCES[ours.dtype]
    wrong = sum(
        int((~torch.isclose(got.float(), right.float(), rtol=tolerance, atol=1e-5)).sum())
        for got, right in zip(*pieces, strict=True)
    )
    if wrong > allowed * ours.numel():
        raise AssertionError(f"{name}: {what} differs from the reference in {wrong} elements")


def check(
    case: Case, problem: peers.Problem, input: Tensor, residual: Tensor | None, grad: Tensor
) -> None:
    """Ours against the reference: all of the output, and the gradients but for one element in a
    million, where the pre-activation may round to the other side of zero."""
    wanted = [input] if residual is None else [input, residual]
    results = []
    for function in (peers.contenders(problem)[peers.OURS], peers.reference(problem)):
        output = function(input, residual)
        results.append((output.detach(), *torch.autograd.grad(output, wanted, grad)))
        del output
    whats = ("the output", "the input's gradient", "the residual's gradient")
    for what, ours, expected in zip(whats, *results, strict=False):
        _assert_close(case.name, what, ours, expected, 0 if what == whats[0] else 1e-6)


def bench_case(case: Case, plan: Plan, device: torch.device, inplace_followers: bool) -> list[Row]:
    """Checks, then times forward and forward+backward."""
    affine = peers.Affine.random(case.shape[1], device)
    problem = peers.Problem(affine, DTYPES[case.dtype], case.operation, inplace_followers)
    input = random_tensor(case, device).requires_grad_()
    residual = None
    if case.operation == "residual+relu":
        residual = random_tensor(case, device).requires_grad_()
    grad = random_tensor(case, device)
    check(case, problem, input, residual, grad)
    functions = peers.contenders(problem).items()
    forward: dict[str, Call] = {n: partial(f, input, residual) for n, f in functions}
    both: dict[str, Call] = {
        n: partial(_with_gradients, f, input, residual, grad) for n, f in functions
    }
    return [
        Row(case.name, mode, measure(calls, plan, device))
        for mode, calls in (("forward", forward), ("forward+backward", both))
    ]


@torch.no_grad()
def bench_inplace(case: Case, plan: Plan, device: torch.device, _: bool = True) -> list[Row]:
    """Checks, then times the forward of ``inplace=True``, again and again over one tensor.

    The peers' followers always work in place here.
    """
    affine = peers.Affine.random(case.shape[1], device)
    problem = peers.Problem(affine, DTYPES[case.dtype], case.operation)
    input = random_tensor(case, device)
    functions = peers.inplace_contenders(problem)
    expected = peers.reference(problem)(input, None)
    _assert_close(case.name, "the output", functions[peers.OURS](input, None), expected, 0)
    del expected
    calls: dict[str, Call] = {name: partial(f, input, None) for name, f in functions.items()}
    return [Row(case.name, "inplace", measure(calls, plan, device))]


def bench_overhead(plan: Plan, device: torch.device) -> dict[str, dict[str, Timing]]:
    """Time per call on a tensor so small that nothing but the overhead is left."""
    case = Case("fp32", "contiguous", "plain", OVERHEAD_SHAPE)
    problem = peers.Problem(peers.Affine.random(case.shape[1], device), torch.float32, "plain")
    input, grad = random_tensor(case, device), random_tensor(case, device)
    leaf = input.clone().requires_grad_()
    functions = {n: f for n, f in peers.contenders(problem).items() if n != peers.FLOOR}
    modes: dict[str, Callable[[peers.Contender], Call]] = {
        "forward, no_grad": lambda f: partial(f, input, None),
        "forward, input requires grad": lambda f: partial(f, leaf, None),
        "forward+backward": lambda f: partial(_with_gradients, f, leaf, None, grad),
    }
    timings = {}
    for mode, bind in modes.items():
        with torch.set_grad_enabled(mode != "forward, no_grad"):
            timings[mode] = measure({n: bind(f) for n, f in functions.items()}, plan, device)
    return timings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes, few rounds")
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="rows whose name it is found in"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures there")
    parser.add_argument(
        "--seconds", type=float, help="per row and mode, to measure longer or shorter"
    )
    parser.add_argument(
        "--inplace-followers",
        action="store_true",
        help="let the peers' `+ residual` and ReLU work in place, as in torchvision's ResNet",
    )
    return parser.parse_args()


def run(options: argparse.Namespace, device: torch.device) -> Report:
    """All rows that the options select, under a progress bar on stderr."""
    plan = QUICK_PLAN if options.quick else PLAN
    if options.seconds is not None:
        plan = Plan(options.seconds, plan.min_rounds, max(plan.max_rounds, 99))
    shapes = (QUICK_SHAPES, INPLACE_SHAPES[:1]) if options.quick else (SHAPES, INPLACE_SHAPES)
    selected = [case for case in cases(*shapes) if re.search(options.filter, case.name)]
    report = Report(vars(options), complete=not (options.quick or options.filter))
    forks = device.type == "cpu" and hasattr(os, "fork")
    load = OtherLoad()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # No refresh thread, which would not go together with forks.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("overhead", total=len(selected) + 1)
        progress.refresh()
        overhead_plan = QUICK_PLAN if options.quick else OVERHEAD_PLAN
        overhead = partial(bench_overhead, overhead_plan, device)
        report.overhead = in_fork(overhead) if forks else overhead()
        for case in selected:
            progress.update(task, advance=1, description=case.name, refresh=True)
            bench = bench_inplace if case.inplace else bench_case
            rows = partial(bench, case, plan, device, options.inplace_followers)
            report.rows += in_fork(rows) if forks else rows()
        progress.update(task, advance=1, refresh=True)
    report.other_load = load.share()
    return report


def main() -> None:
    options = arguments()
    if options.device in ops.unavailable:
        raise SystemExit(f"no kernels for {options.device}: {ops.unavailable[options.device]}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no kernels for cuda: torch finds no GPU")
    torch.manual_seed(0)
    report = run(options, torch.device(options.device))
    op_report.show(report)
    if options.json is not None:
        op_report.save(report, options.json)


if __name__ == "__main__":
    main()
