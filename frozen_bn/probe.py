"""Whether a module that holds the four vectors of a batch normalization computes that formula.

Projects carry frozen batch normalizations of their own: detectron2, DETR, maskrcnn-benchmark and
each of their descendants. There is no list of them. So their ``forward`` is tried, on a twin with
made-up values in float64, and what it returns is compared with the formula. The module itself, its
hooks and the state of the process are as before.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import reference

VECTORS = ("weight", "bias", "running_mean", "running_var")

#: What else may be registered: no part of the formula, left by training or by profilers (thop).
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")

#: By the number of dimensions, what comes behind ``[2, C]``.
_SPACE = {2: (), 3: (3,), 4: (3, 2), 5: (2, 1, 3)}
EVERY_RANK = (*_SPACE,)

#: Of what is added up; more than float32 in between costs, less than any other eps would.
_TOLERANCE = 1e-6


class Formula(NamedTuple):
    """What a module was found to compute."""

    eps: float
    ranks: tuple[int, ...]  # of the inputs for which it does


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Runs somebody's code so that no state of torch takes part, and puts the random ones back."""
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy.get_state() if numpy else None
    generator = torch.get_rng_state()
    try:
        with (
            _disable_current_modes(),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.set_rng_state(generator)
        random.setstate(states[0])
        if numpy:
            numpy.set_state(states[1])


def _values(channels: int, sign: int) -> dict[str, Tensor]:
    """Far from the trivial ones; with variances next to which any eps counts, or, if ``sign`` is
    -1, large ones, and weights and biases of the other sign."""
    generator = torch.Generator("cpu").manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(channels, generator=generator, dtype=torch.float64, device="cpu")

    exponents = torch.rand(channels, generator=generator, dtype=torch.float64, device="cpu")
    exponents[0] = 1.0  # in any case
    return {
        "weight": sign * (normal() + 2),
        "bias": sign * (normal() - 1),
        "running_mean": normal() + 1,
        "running_var": 10 ** (-6 * sign * exponents),
    }


def _twin(module: nn.Module, values: dict[str, Tensor], training: bool) -> nn.Module:
    """Of the same class, with other values and without hooks."""
    twin = nn.Module.__new__(type(module))
    nn.Module.__init__(twin)
    own = vars(twin)
    skipped = {*own}  # parameters, buffers and hooks
    own.update(
        (name, copy.deepcopy(value))
        for name, value in vars(module).items()
        if name not in skipped and "hook" not in name and name != "_compiled_call_impl"
    )
    own["training"] = training
    for name in module._parameters:
        twin._parameters[name] = nn.Parameter(values[name].clone())
    for name, buffer in module._buffers.items():
        if name in values:
            twin._buffers[name] = values[name].clone()
        elif buffer is not None:
            zeros = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
            twin._buffers[name] = zeros if buffer.is_meta else zeros.copy_(buffer)
    return twin


def _state(twin: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in (*twin._parameters.items(), *twin._buffers.items())
        if value is not None
    }


def _returned(
    module: nn.Module, x: Tensor, values: dict[str, Tensor], training: bool, gradient: bool
) -> Tensor | None:
    """What ``forward`` makes of ``x``; None unless it is something of that shape, it has written to
    nothing, and the gradient of ``x`` is the scale that stands before it."""
    twin = _twin(module, values, training)
    before = {name: value.detach().clone() for name, value in _state(twin).items()}
    given = x.clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        y = type(module).forward(twin, given * 1 if gradient else given)
    after = _state(twin)
    unwritten = torch.equal(given, x) and {*after} == {*before}
    if not unwritten or not all(torch.equal(after[name], v) for name, v in before.items()):
        return None
    if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype):
        return None
    if gradient:
        (slope,) = torch.autograd.grad(y.sum(), given)
        change = y.detach() - type(module).forward(twin, torch.zeros_like(x)).detach()
        if not torch.allclose(slope * x, change, rtol=1e-5, atol=1e-5 * float(change.abs().max())):
            return None
    return y.detach()


def _is_formula(y: Tensor, x: Tensor, values: dict[str, Tensor], eps: float) -> bool:
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var, weight, bias = (
        values[name].reshape(shape) for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = weight * torch.rsqrt(var + eps)
    added_up = (x.abs() + mean.abs()) * scale.abs() + bias.abs()
    expected = reference.frozen_batch_norm(
        x, values["running_mean"], values["running_var"], values["weight"], values["bias"], eps
    )
    return bool(((y - expected).abs() <= _TOLERANCE * added_up).all())


def _candidates(module: nn.Module) -> list[float]:
    own = getattr(module, "eps", None)
    stated = [float(own)] if isinstance(own, int | float) and 0 <= own < 1 else []
    return list(dict.fromkeys([*stated, 1e-5, 0.0]))


def _outputs(module: nn.Module, x: Tensor, values: dict[str, Tensor]) -> list[Tensor | None]:
    """In either mode, with a gradient wanted and not: classes decide by it what to run."""
    try:
        return [
            _returned(module, x, values, training, gradient)
            for training in (False, True)
            for gradient in (False, True)
        ]
    except Exception:  # anything: it is somebody else's code
        return [None]


def formula(module: nn.Module) -> Formula | None:
    """What ``module``, which holds ``VECTORS`` and at most ``COUNTERS`` beside them, computes:
    None if that is not a frozen batch normalization."""
    channels = module.running_mean.numel()  # type: ignore[operator]
    with _untouched():
        both = _values(channels, 1), _values(channels, -1)
        found: dict[int, float] = {}
        for rank, space in _SPACE.items():
            shape = (2, channels, *space)
            x = torch.linspace(-2, 3, torch.Size(shape).numel(), dtype=torch.float64).view(shape)
            tried = [(y, values) for values in both for y in _outputs(module, x, values)]
            for eps in _candidates(module):
                if all(y is not None and _is_formula(y, x, values, eps) for y, values in tried):
                    found[rank] = eps
                    break
    if not found or len({*found.values()}) > 1:
        return None
    return Formula(next(iter(found.values())), (*found,))


def tensors_beside(module: nn.Module) -> list[str]:
    """The names of what it holds besides the vectors and the counters."""
    registered: dict[str, Any] = {**module._parameters, **module._buffers, **module._modules}
    plain = {name: v for name, v in vars(module).items() if isinstance(v, Tensor | nn.Module)}
    return sorted(({*registered} | {*plain}) - {*VECTORS, *COUNTERS})
