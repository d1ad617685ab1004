"""One layer on real shapes: forward, backward, both, without gradients, and in place.

Every contender of ``peers`` on layers of ResNet-50 and Mask R-CNN. Ours is compared with the
reference before it is timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import nn

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
from .timing import Plan, apart, measure, peak_bytes
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


def check(setup: Setup, ours: Contender) -> None:
    """Ours against the reference: all of the output, and the gradients but for one element in a
    million, where the pre-activation may round to the other side of zero."""
    reference = peers.reference(setup.problem)
    got, expected = (function(setup.input, setup.residual) for function in (ours, reference))
    close = {"rtol": TOLERANCES[got.dtype], "atol": 1e-5}
    torch.testing.assert_close(got, expected, **close, check_stride=True)
    if not got.requires_grad:
        return
    for pair in zip(setup.gradients(got), setup.gradients(expected), strict=True):
        if (~torch.isclose(*pair, **close)).sum() > 1e-6 * got.numel():
            torch.testing.assert_close(*pair, **close)


def _check_ours(case: Case, settings: Settings, in_place: bool) -> None:
    setup = settings.setup(case)
    if not in_place:
        return check(setup, peers.contenders(setup.problem)[peers.OURS])
    with torch.no_grad():
        got = peers.inplace_contenders(setup.problem)[peers.OURS](setup.input.clone(), None)
        check(setup, lambda input, residual: got)


def bench(case: Case, settings: Settings, in_place: bool = False) -> list[Row]:
    """All modes but in place; or that only, again and again over one tensor. The peers' followers
    always work in place there."""
    # Apart, since it would leave holes on the heap that is timed.
    apart(partial(_check_ours, case, settings, in_place), settings.device)
    setup = settings.setup(case)
    if in_place:
        rounds = setup.time(peers.inplace_contenders(setup.problem), "in place", settings.plan)
        return timed(problem_of("op", case), "in place", rounds, peers.role)
    contenders = peers.contenders(setup.problem, compiled=settings.compiled)
    rows: list[Row] = []
    for mode in MODES:
        rounds = setup.time(contenders, mode, settings.plan)
        needed = sum(traffic.unavoidable_bytes(case, which, case.shape) for which in PASSES[mode])
        for row in timed(problem_of("op", case), mode, rounds, peers.role):
            rows.append(replace(row, unavoidable_bytes=needed))
    return rows


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
        setup, problem = settings.setup(case), problem_of("overhead", case)
        contenders = peers.contenders(setup.problem, compiled=settings.compiled)
        del contenders[peers.FLOOR]
        for mode in ("no-grad", "forward", "backward", "full"):
            rounds = setup.time(contenders, mode, settings.plan)
            rows += timed(problem, mode, rounds, peers.role)
        chains = {name: partial(_chain, setup, function) for name, function in contenders.items()}
        rounds = measure(chains, settings.plan, settings.device)
        a_layer = {name: seconds / CHAIN for name, seconds in rounds.items()}
        rows += timed(problem, f"chain of {CHAIN}", a_layer, peers.role)
    return rows


def memory_cases(quick: bool) -> list[Case]:
    dtypes = ("fp32",) if quick else ("fp32", "bf16")
    cases = every_case([(4, 256, 100, 152)])
    return [case for case in cases if case.layout == "contiguous" and case.dtype in dtypes]


def _memory_of(case: Case, settings: Settings, name: str) -> Row:
    setup = settings.setup(case)
    contender = peers.contenders(setup.problem, compiled=settings.compiled)[name]
    setup.full(contender)
    return Row(
        *problem_of("memory", case),
        mode="full",
        contender=name,
        role=peers.role(name),
        saved_bytes=saved_bytes(nn.Module(), partial(contender, setup.input, setup.residual)),
        peak_bytes=peak_bytes(partial(setup.full, contender), settings.device),
    )


def memory(case: Case, settings: Settings) -> list[Row]:
    """Each contender in a process of its own, on the CPU: what it saves for the backward pass, the
    input included where it keeps it, and how far memory rises, forward and backward."""
    return [
        apart(partial(_memory_of, case, settings, name), settings.device)
        for name in peers.names(settings.device.type, settings.compiled)
    ]
