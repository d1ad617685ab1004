"""What is measured on one layer: the cases, and the one set-up that serves every mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from frozen_bn.checks import Statistics

from .timing import Call, Plan, Rounds, measure

Shape = tuple[int, int, int, int]
Operation = Literal["plain", "relu", "residual+relu"]
#: Takes the input and the residual (``None`` where the operation has none).
Contender = Callable[[Tensor, Tensor | None], Tensor]

#: ``forward`` records for a backward pass; ``full`` is forward and backward; ``in place``
#: overwrites its input, without gradients.
Mode = Literal["forward", "backward", "full", "no-grad", "in place"]
MODES: tuple[Mode, ...] = ("forward", "backward", "full", "no-grad")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """How a network is run: as it is, under autocast, or after ``half()``."""

    autocast: torch.dtype | None = None
    half: bool = False

    def __str__(self) -> str:
        names = {dtype: name for name, dtype in DTYPES.items()}
        if self.autocast is not None:
            return f"{names[self.autocast]} autocast"
        return "fp16" if self.half else "fp32"


AS_IT_IS = Precision()


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

SHAPES: tuple[Shape, ...] = (
    (2, 256, 200, 304),  # Mask R-CNN, 800x1216: res2
    (4, 64, 112, 112),  # ResNet-50: stem
    (2, 1024, 50, 76),  # Mask R-CNN: res4
    (4, 512, 25, 38),  # Mask R-CNN: res5 (H*W no multiple of 4)
    (2, 2048, 25, 25),  # Mask R-CNN, 800x800: res5 (H*W odd)
    (16, 2048, 7, 7),  # ResNet-50: res5 (H*W odd)
)
QUICK_SHAPES: tuple[Shape, ...] = ((4, 512, 25, 38),)
#: Large enough for an output of 32 MB in half precision.
INPLACE_SHAPES: tuple[Shape, ...] = ((2, 256, 200, 304), (256, 2048, 7, 7))
OVERHEAD_SHAPE: Shape = (1, 64, 2, 2)
#: From 4 thousand elements to 16 million: time against size, of one kind of layer.
SIZES: tuple[Shape, ...] = tuple((1, 64, side, side) for side in (8, 16, 32, 64, 128, 256, 512))

#: The residual is normalized as well, in one kernel, as in a block that downsamples. Counted by
#: ``traffic`` only.
PAIR: Any = "pair+relu"


@dataclass(frozen=True)
class Case:
    """A kind of layer on data of one dtype, layout and shape."""

    dtype: str
    layout: str
    operation: Operation
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.layout} {self.operation} {'x'.join(map(str, self.shape))}"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def has_residual(self) -> bool:
        return self.operation in ("residual+relu", PAIR)


def every_case(shapes: Iterable[Shape]) -> list[Case]:
    """Every dtype, layout and operation on every shape."""
    kinds = itertools.product(DTYPES, LAYOUTS, get_args(Operation))
    return [Case(*kind, shape) for shape, kind in itertools.product(shapes, list(kinds))]


def random_affine(channels: int, device: torch.device) -> Statistics:
    """Scales between 0.35 and 0.9: applied in place again and again, it stays finite."""
    ranges = (-1, 1), (1, 2), (0.5, 0.9), (-1, 1)
    return Statistics(*(torch.empty(channels, device=device).uniform_(*ends) for ends in ranges))


@dataclass(frozen=True)
class Problem:
    """One layer: dtype of the data, vectors (always float32), and what follows the normalization.

    ``inplace_followers`` makes the peers write ``y += residual`` and ``F.relu_(y)``, as
    torchvision's ResNet does, instead of ``y + residual`` and ``F.relu(y)``.
    """

    affine: Statistics
    dtype: torch.dtype
    operation: Operation
    inplace_followers: bool = False


class Setup:
    """A case's tensors on a device, and what each mode calls. The input requires grad, and so does
    the residual; the affine only with ``train_affine``."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        train_affine: bool = False,
        inplace_followers: bool = False,
    ) -> None:
        self.case, self.device = case, device
        affine = random_affine(case.shape[1], device)
        if train_affine:
            affine.weight.requires_grad_()
            affine.bias.requires_grad_()
        self.problem = Problem(affine, DTYPES[case.dtype], case.operation, inplace_followers)
        self.input = self._random().requires_grad_()
        self.residual = self._random().requires_grad_() if case.has_residual else None
        self.grad = self._random()
        tensors = (self.input, self.residual, affine.weight, affine.bias)
        self.wanted = [t for t in tensors if t is not None and t.requires_grad]

    def _random(self) -> Tensor:
        tensor = torch.randn(self.case.shape, device=self.device).to(DTYPES[self.case.dtype])
        return tensor.contiguous(memory_format=LAYOUTS[self.case.layout])

    def gradients(self, output: Any, *, retain: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.wanted, self.grad, retain_graph=retain)

    def full(self, contender: Contender) -> tuple[Tensor, ...]:
        """Forward and backward."""
        return self.gradients(contender(self.input, self.residual))

    def call(self, contender: Contender, mode: Mode) -> Call:
        """To be called with gradients on or off, as the mode has it."""
        if mode == "full":
            return partial(self.full, contender)
        if mode == "forward":
            return partial(contender, self.input, self.residual)
        if mode == "backward":
            edge = get_gradient_edge(contender(self.input, self.residual))
            return partial(self.gradients, edge, retain=True)
        residual = None if self.residual is None else self.residual.detach()
        return partial(contender, self.input.detach(), residual)

    def time(self, contenders: dict[str, Contender], mode: Mode, plan: Plan) -> dict[str, Rounds]:
        """All contenders in one mode, interleaved."""
        with torch.set_grad_enabled(mode in ("forward", "backward", "full")):
            calls = {name: self.call(function, mode) for name, function in contenders.items()}
            return measure(calls, plan, self.device)
