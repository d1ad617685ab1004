"""What ``benchmarks.bench_op`` times: this package, what people use instead, and the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

import frozen_bn

#: Takes the input and the residual (``None`` where the operation has none).
Contender = Callable[[Tensor, Tensor | None], Tensor]
Operation = Literal["plain", "relu", "residual+relu"]

OURS = "ours"
FLOOR = "floor"
#: What a frozen batch norm is otherwise made of; "the fastest peer" is one of these.
#: ``batch_norm`` is ``F.batch_norm(training=False)``.
PEERS = ("torchvision", "batch_norm", "scale-shift")
#: Overwrites its input in two or three passes; shown beside the peers, not counted among them.
MUL_ADD_INPLACE = "x.mul_().add_()"

EPS = 1e-5
_FLOOR_FACTOR = 0.75


@dataclass(frozen=True)
class Affine:
    """The four vectors ``[C]``: constants all."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def random(channels: int, device: torch.device) -> Affine:
        """Scales between 0.35 and 0.9: applied in place again and again, it stays finite."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(channels, device=device).uniform_(low, high)

        return Affine(uniform(-1, 1), uniform(1, 2), uniform(0.5, 0.9), uniform(-1, 1))

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """``[1, C, 1, 1]`` each, in the dtype of the vectors, as detectron2 derives them."""
        scale = self.weight * (self.running_var + EPS).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)


@dataclass(frozen=True)
class Problem:
    """One layer: dtype of the data, vectors (always float32), and what follows the normalization.

    ``inplace_followers`` makes the peers write ``y += residual`` and ``F.relu_(y)``, as
    torchvision's ResNet does, instead of ``y + residual`` and ``F.relu(y)``.
    """

    affine: Affine
    dtype: torch.dtype
    operation: Operation
    inplace_followers: bool = False


class _Floor(torch.autograd.Function):
    """Moves the unavoidable bytes into fresh tensors with one plain torch operation per result.

    Per element of the input it reads and writes:

    - forward: 1 read, 1 write (``mul``); with a residual 2 reads, 1 write (``add``);
    - backward: 1 read, 1 write (``mul``); behind residual + ReLU 1 read, 2 writes (``mul`` for the
      input's gradient; a fill for the residual's, since any torch operation that copied the
      gradient would read it a second time).

    The mask of a ReLU, 1/8 byte an element written and read, is left out, in the floor's favour.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None) -> Tensor:
        ctx.has_residual = residual is not None
        if residual is None:
            return torch.mul(input, _FLOOR_FACTOR)
        return torch.add(input, residual)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
        grad_input = torch.mul(grad_output, _FLOOR_FACTOR)
        if not ctx.has_residual:
            return grad_input, None
        return grad_input, torch.full_like(grad_output, _FLOOR_FACTOR)


def _followed(norm: Callable[[Tensor], Tensor], problem: Problem) -> Contender:
    """``norm`` with the residual add and the activation that users write behind it."""
    relu = problem.operation != "plain"
    inplace = problem.inplace_followers

    def contender(input: Tensor, residual: Tensor | None) -> Tensor:
        output = norm(input)
        if residual is not None:
            output = output.add_(residual) if inplace else output + residual
        if relu:
            output = F.relu_(output) if inplace else F.relu(output)
        return output

    return contender


def _torchvision(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The module, its buffers in the data's dtype, as ``model.half()`` leaves them.

    With float32 buffers a half input would give a float32 output: another result, and slower.
    """
    affine = problem.affine
    module: nn.Module = FrozenBatchNorm2d(affine.weight.numel(), EPS)
    module.load_state_dict(vars(affine))
    return module.to(affine.weight.device, problem.dtype)


def _batch_norm(problem: Problem) -> Callable[[Tensor], Tensor]:
    affine = problem.affine

    def norm(input: Tensor) -> Tensor:
        return F.batch_norm(
            input,
            affine.running_mean,
            affine.running_var,
            affine.weight,
            affine.bias,
            training=False,
            eps=EPS,
        )

    return norm


def _scale_shift(problem: Problem) -> Callable[[Tensor], Tensor]:
    """detectron2's formula: float32 vectors, cast to the input's dtype after the arithmetic."""
    affine = problem.affine

    def norm(input: Tensor) -> Tensor:
        scale, shift = affine.scale_shift()
        return input * scale.to(input.dtype) + shift.to(input.dtype)

    return norm


def _with_our_signature(
    function: Callable[..., Tensor], problem: Problem, inplace: bool = False
) -> Contender:
    affine = problem.affine
    activation = None if problem.operation == "plain" else "relu"

    def contender(input: Tensor, residual: Tensor | None) -> Tensor:
        return function(
            input,
            affine.running_mean,
            affine.running_var,
            affine.weight,
            affine.bias,
            EPS,
            activation=activation,
            residual=residual,
            inplace=inplace,
        )

    return contender


def _ours(problem: Problem, inplace: bool = False) -> Contender:
    return _with_our_signature(frozen_bn.frozen_batch_norm, problem, inplace)


def _mul_add_inplace(problem: Problem) -> Contender:
    affine = problem.affine
    relu = problem.operation != "plain"

    def contender(input: Tensor, residual: Tensor | None) -> Tensor:
        scale, shift = affine.scale_shift()
        input.mul_(scale.to(input.dtype)).add_(shift.to(input.dtype))
        return F.relu_(input) if relu else input

    return contender


def reference(problem: Problem) -> Contender:
    """The oracle that ours has to agree with before it is timed."""
    return _with_our_signature(frozen_bn.reference.frozen_batch_norm, problem)


def _peers(problem: Problem) -> dict[str, Contender]:
    makers = (_torchvision, _batch_norm, _scale_shift)
    return {
        name: _followed(make(problem), problem) for name, make in zip(PEERS, makers, strict=True)
    }


def contenders(problem: Problem) -> dict[str, Contender]:
    """Ours, the floor and the peers, out of place."""
    return {OURS: _ours(problem), FLOOR: _Floor.apply, **_peers(problem)}


def inplace_contenders(problem: Problem) -> dict[str, Contender]:
    """Ours with ``inplace=True``; the peers, which cannot, with followers in place; mul_, add_."""
    peers = _peers(replace(problem, inplace_followers=True))
    return {OURS: _ours(problem, inplace=True), **peers, MUL_ADD_INPLACE: _mul_add_inplace(problem)}
