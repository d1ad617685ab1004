"""What one layer is measured against: this package, what people use instead, and the floor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import frozen_bn

from .cases import Contender, Problem

OURS = "frozen_bn"
FLOOR = "floor"
CUDNN_OFF = "batch_norm, cuDNN off"
#: What a frozen batch norm is otherwise made of, run as it is: "the fastest peer" is one of these.
#: ``batch_norm`` is ``F.batch_norm(training=False)``; cuDNN can be turned off where there is CUDA.
PEERS = ("torchvision", "timm", "batch_norm", CUDNN_OFF, "detectron2")
#: Shown beside the peers, not counted among them: the formula, compiled; live batch norm, which
#: computes something else; what overwrites its input, in two or three passes.
COMPILED = "formula, compiled"
LIVE = "batch_norm, live"
MUL_ADD_INPLACE = "x.mul_().add_()"

EXPLAINED = (
    "frozen_bn: frozen_bn.frozen_batch_norm. torchvision, timm: FrozenBatchNorm2d and "
    "FrozenBatchNormAct2d, with buffers in the input's dtype, as model.half() leaves them (float32 "
    "ones would give a float32 output). batch_norm: F.batch_norm(training=False), live: "
    "training=True. detectron2: its scale-shift formula. compiled: torch.compile of that. floor: "
    "one autograd node of plain torch operations that moves the unavoidable bytes, and computes "
    "something else. Vectors are float32 constants; the input (and the residual) requires grad."
)

_FLOOR_FACTOR = 0.75


def role(name: str) -> str:
    """``ours``, ``floor``, ``peer``, or ``beside`` for what is none."""
    return {OURS: "ours", FLOOR: "floor"}.get(name, "peer" if name in PEERS else "beside")


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


def _module(problem: Problem, kind: Callable[[int, float], nn.Module]) -> nn.Module:
    """Its buffers in the data's dtype, as ``model.half()`` leaves them.

    With float32 buffers a half input would give a float32 output: another result, and slower.
    """
    vectors = problem.affine._asdict()
    module = kind(problem.affine.weight.numel(), vectors.pop("eps"))
    module.load_state_dict(vectors)
    return module.to(problem.affine.weight.device, problem.dtype)


def _batch_norm(problem: Problem, live: bool = False) -> Callable[[Tensor], Tensor]:
    """``live``: of the batch's own statistics, and with running ones that change."""
    mean, var, weight, bias, eps = problem.affine
    if live:
        mean, var = mean.clone(), var.clone()

    def norm(input: Tensor) -> Tensor:
        return F.batch_norm(input, mean, var, weight, bias, training=live, eps=eps)

    return norm


def _without_cudnn(function: Contender) -> Contender:
    def contender(input: Tensor, residual: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return function(input, residual)

    return contender


def scale_shift(affine: Any) -> tuple[Tensor, Tensor]:
    """``[1, C, 1, 1]`` each, in the dtype of the vectors, as detectron2 derives them."""
    scale = affine.weight * (affine.running_var + affine.eps).rsqrt()
    shift = affine.bias - affine.running_mean * scale
    return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)


def formula(input: Tensor, affine: Any) -> Tensor:
    """detectron2's: cast to the input's dtype after the arithmetic. ``affine``: ``Statistics``, or
    a module with buffers of these names."""
    scale, shift = scale_shift(affine)
    return input * scale.to(input.dtype) + shift.to(input.dtype)


def _compiled(function: Contender) -> Contender:
    """On its own again for each problem. The backward pass can run more than once."""
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.donated_buffer = False
    torch._inductor.config.compile_threads = 1  # or it keeps other processes
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _with_our_signature(
    function: Callable[..., Tensor], problem: Problem, inplace: bool = False
) -> Contender:
    mean, var, weight, bias, eps = problem.affine
    activation = None if problem.operation == "plain" else "relu"

    def contender(input: Tensor, residual: Tensor | None) -> Tensor:
        return function(
            input, mean, var, weight, bias, eps,
            activation=activation, residual=residual, inplace=inplace,
        )  # fmt: skip

    return contender


def _mul_add_inplace(problem: Problem) -> Contender:
    def contender(input: Tensor, residual: Tensor | None) -> Tensor:
        scale, shift = scale_shift(problem.affine)
        input.mul_(scale.to(input.dtype)).add_(shift.to(input.dtype))
        return input if problem.operation == "plain" else F.relu_(input)

    return contender


def reference(problem: Problem) -> Contender:
    """The oracle that ours has to agree with before it is timed."""
    return _with_our_signature(frozen_bn.reference.frozen_batch_norm, problem)


@cache
def left_out(device: str, compiled: bool) -> dict[str, str]:
    """Contenders that are not there, and why."""
    reasons = {} if compiled else {COMPILED: "--no-compile"}
    return reasons if device == "cuda" else reasons | {CUDNN_OFF: "there is cuDNN on CUDA only"}


def names(device: str, compiled: bool) -> list[str]:
    """Of all contenders that are there."""
    every = (OURS, FLOOR, *PEERS, LIVE, COMPILED)
    return [name for name in every if name not in left_out(device, compiled)]


def eager_peers(problem: Problem) -> dict[str, Contender]:
    """What gives the same result, one operator after the other."""
    norms = {
        "torchvision": _module(problem, FrozenBatchNorm2d),
        "timm": _module(problem, partial(FrozenBatchNormAct2d, apply_act=False)),
        "batch_norm": _batch_norm(problem),
        "detectron2": partial(formula, affine=problem.affine),
    }
    peers = {name: _followed(norm, problem) for name, norm in norms.items()}
    if problem.affine.weight.device.type == "cuda":
        peers[CUDNN_OFF] = _without_cudnn(peers["batch_norm"])
    return peers


def contenders(problem: Problem, *, compiled: bool = False) -> dict[str, Contender]:
    """Ours, the floor, the peers, and what is shown beside them: all out of place."""
    found = {
        OURS: _with_our_signature(frozen_bn.frozen_batch_norm, problem),
        FLOOR: _Floor.apply,
        **eager_peers(problem),
        LIVE: _followed(_batch_norm(problem, live=True), problem),
    }
    if compiled:
        norm = partial(formula, affine=problem.affine)
        found[COMPILED] = _compiled(_followed(norm, problem))
    return found


def inplace_contenders(problem: Problem) -> dict[str, Contender]:
    """Ours with ``inplace=True``; the peers, which cannot, with followers in place; mul_, add_."""
    return {
        OURS: _with_our_signature(frozen_bn.frozen_batch_norm, problem, inplace=True),
        **eager_peers(replace(problem, inplace_followers=True)),
        MUL_ADD_INPLACE: _mul_add_inplace(problem),
    }
