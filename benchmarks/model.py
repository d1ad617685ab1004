"""Whole networks: a training step, a forward pass without gradients, and memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from frozen_bn.report import saved_bytes

from .cases import AS_IT_IS, LAYOUTS
from .dispatched import casts
from .model_peers import Workload, chosen, loss_of, networks, role
from .op import Settings
from .rows import Row, timed
from .timing import measure, peak_bytes

STEP, NO_GRAD = "step", "no-grad"


def training_step(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def bench(
    workload: Workload, layout: str, settings: Settings, wanted: Collection[str]
) -> list[Row]:
    """Every contender on one network in one layout. ``wanted``: "model", "memory" or both."""
    compiled = {"compiled": settings.compiled, "all_compiled": settings.all_compiled}
    nets = chosen(networks(workload, **compiled), settings.contenders)
    precision = settings.precision
    problem = workload.name, str(precision), layout, workload.shape
    losses, steps, rows = {}, {}, []
    for name, net in nets.items():
        net.to(settings.device, memory_format=LAYOUTS[layout])
        if precision.half:
            net.half()
        losses[name] = loss_of(net, workload, settings.device, precision)
        steps[name] = training_step(net, losses[name])
        steps[name]()  # compiles, and lets the first momentum of things settle
        of = {"mode": STEP, "contender": name, "role": role(name)}
        if precision != AS_IT_IS and role(name) != "beside":
            rows.append(Row("casts", *problem, **of, details=casts(steps[name])))
        if "memory" in wanted:
            saved = saved_bytes(net, losses[name])
            peak = peak_bytes(steps[name], settings.device)
            rows.append(Row("memory", *problem, **of, saved_bytes=saved, peak_bytes=peak))
    if "model" in wanted:
        calls = {name: partial(_without_gradients, loss) for name, loss in losses.items()}
        for mode, of_mode in ((STEP, steps), (NO_GRAD, calls)):
            rounds = measure(of_mode, settings.plan, settings.device)
            rows += timed(("model", *problem), mode, rounds, role)
    return rows


def host(workload: Workload, settings: Settings) -> list[Row]:
    """Every contender on a network whose tensors are too small to matter, with one thread, and no
    gradients but that of the input."""
    torch.set_num_threads(1)
    nets = networks(workload, compiled=False)
    for net in nets.values():
        net.to(settings.device).requires_grad_(False)
    image = torch.randn(workload.shape, device=settings.device, requires_grad=True)
    problem = "model", workload.name, "fp32", "contiguous", workload.shape
    rows = []
    for mode, call in (
        ("forward", lambda net: net(image)),
        ("forward+backward", lambda net: net(image).sum().backward()),
        (NO_GRAD, lambda net: _without_gradients(partial(net, image))),
    ):
        calls = {name: partial(call, net) for name, net in nets.items()}
        rows += timed(problem, mode, measure(calls, settings.plan, settings.device), role)
    return rows


def _without_gradients(loss: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        loss()
