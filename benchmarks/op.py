"""One layer on real shapes: forward, backward, both, without gradients, and in place.

Every contender of ``peers`` on layers of ResNet-50 and Mask R-CNN. Ours is compared with the
reference before it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from frozen_bn.report import saved_bytes

from . import peers, traffic
from .cases import (
    AS_IT_IS,
    INPLACE_SHAPES,
    MODES,
    OVERHEAD_SHAPE,
    QUICK_SHAPES,
    SHAPES,
    SIZES,
    Case,
    Contender,
    Mode,
    Operation,
    Precision,
    Setup,
    every_case,
)
from .rows import Row, problem_of, timed
from .timing import Plan, Timing, apart, measure, peak_bytes
from .traffic import Pass

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
#: Layers of the overhead's longest case.
CHAIN = 16
#: Whose unavoidable bytes a mode moves.
PASSES: dict[Mode, tuple[Pass, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "full": ("forward", "backward"),
    "no-grad": ("forward",),
}


@dataclass(frozen=True)
class Settings:
    """How a layer or a network is measured."""

    device: torch.device
    plan: Plan
    compiled: bool = True
    inplace_followers: bool = False
    precision: Precision = AS_IT_IS  # of networks
    contenders: str = ""  # of networks, those whose name this is found in
    all_compiled: bool = False  # not just torchvision's networks

    def setup(self, case: Case) -> Setup:
        return Setup(case, self.device, inplace_followers=self.inplace_followers)


def cases(quick: bool, batch: int | None = None) -> list[tuple[Case, bool]]:
    """With whether in place. Those of ``SIZES`` differ in nothing else. ``batch``: another than
    their own."""
    sizes = SIZES[::2] if quick else SIZES
    found = [(case, False) for case in every_case(QUICK_SHAPES if quick else SHAPES)]
    if quick:  # of channels_last the longest operation only
        found = [f for f in found if f[0].layout == "contiguous" or f[0].has_residual]
    found += [(Case("fp32", "contiguous", "relu", shape), False) for shape in sizes]
    in_place = [case for case in every_case(INPLACE_SHAPES) if not case.has_residual]
    found += [(case, True) for case in (in_place[:1] if quick else in_place)]
    return [(replace(c, shape=(batch or c.shape[0], *c.shape[1:])), i) for c, i in found]


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


def check(setup: Setup, ours: Contender) -> None:
    """Ours against the reference: all of the output, and the gradients but for one element in a
    million, where the pre-activation may round to the other side of zero."""
    results = []
    for function in (ours, peers.reference(setup.problem)):
        output = function(setup.input, setup.residual)
        results.append((output.detach(), *setup.gradients(output)))
        del output
    whats = ("the output", "the input's gradient", "the residual's gradient")
    for what, got, expected in zip(whats, *results, strict=False):
        allowed = 0 if what == whats[0] else 1e-6
        _assert_close(setup.case.name, what, got, expected, allowed)


def bench(case: Case, settings: Settings) -> list[Row]:
    """All modes but in place."""
    setup = settings.setup(case)
    contenders = peers.contenders(setup.problem, compiled=settings.compiled)
    check(setup, contenders[peers.OURS])
    rows: list[Row] = []
    for mode in MODES:
        timings = setup.time(contenders, mode, settings.plan)
        needed = sum(traffic.unavoidable_bytes(case, which, case.shape) for which in PASSES[mode])
        for row in timed(problem_of("op", case), mode, timings, peers.role):
            rows.append(replace(row, unavoidable_bytes=needed))
    return rows


def bench_in_place(case: Case, settings: Settings) -> list[Row]:
    """Again and again over one tensor. The peers' followers always work in place here."""
    setup, mode = settings.setup(case), "in place"
    contenders = peers.inplace_contenders(setup.problem)
    with torch.no_grad():
        expected = peers.reference(setup.problem)(setup.input, None)
        got = contenders[peers.OURS](setup.input.clone(), None)
    _assert_close(case.name, "the output", got, expected, 0)
    del expected, got
    timings = setup.time(contenders, mode, settings.plan)
    return timed(problem_of("op", case), mode, timings, peers.role)


def _chain(setup: Setup, contender: Contender) -> object:
    """Forward and backward through layers one after the other: what ``torch.autograd.grad`` takes
    for a call is spread over them, as in a network."""
    output = setup.input
    for _ in range(CHAIN):
        output = contender(output, setup.residual)
    return setup.gradients(output)


def overhead(settings: Settings) -> list[Row]:
    """Time per call on a tensor so small that nothing but the overhead is left."""
    rows: list[Row] = []
    for operation in get_args(Operation):
        case = Case("fp32", "contiguous", operation, OVERHEAD_SHAPE)
        setup, modes = settings.setup(case), ("no-grad", "forward", "backward", "full")
        contenders = peers.contenders(setup.problem, compiled=settings.compiled)
        del contenders[peers.FLOOR]
        problem = problem_of("overhead", case)
        for mode in modes:
            timings = setup.time(contenders, mode, settings.plan)
            rows += timed(problem, mode, timings, peers.role)
        chains = {name: partial(_chain, setup, function) for name, function in contenders.items()}
        timings = {
            name: Timing(tuple(seconds / CHAIN for seconds in timing.rounds))
            for name, timing in measure(chains, settings.plan, settings.device).items()
        }
        rows += timed(problem, f"chain of {CHAIN}", timings, peers.role)
    return rows


def memory_cases(quick: bool) -> list[Case]:
    dtypes = ("fp32",) if quick else ("fp32", "bf16")
    cases = every_case([(4, 256, 100, 152)])
    return [case for case in cases if case.layout == "contiguous" and case.dtype in dtypes]


def memory(case: Case, settings: Settings) -> list[Row]:
    """Each contender in a process of its own, on the CPU: what it saves for the backward pass, the
    input included where it keeps it, and how far memory rises, forward and backward."""

    def of(name: str) -> Row:
        setup = settings.setup(case)
        contender = peers.contenders(setup.problem, compiled=settings.compiled)[name]
        setup.full(contender)
        saved = saved_bytes(nn.Module(), partial(contender, setup.input, setup.residual))
        peak = peak_bytes(partial(setup.full, contender), settings.device)
        return Row(
            *problem_of("memory", case),
            mode="full",
            contender=name,
            role=peers.role(name),
            saved_bytes=saved,
            peak_bytes=peak,
        )

    return [apart(partial(of, name), settings.device) for name in names(settings)]


def names(settings: Settings) -> Sequence[str]:
    """Of all contenders that are there."""
    missing = peers.left_out(settings.device.type, settings.compiled)
    every = (peers.OURS, peers.FLOOR, *peers.PEERS, peers.LIVE, peers.COMPILED)
    return [name for name in every if name not in missing]
