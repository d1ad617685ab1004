"""Bytes that a layer moves, counted in the emulator that runs the CUDA kernels. Nothing here is
measured on a GPU."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from frozen_bn.pair import frozen_batch_norm_pair

from . import cases, peers
from .cases import DTYPES, PAIR, Case, Contender, Problem, Setup, Shape, random_affine

#: Layers of ResNet-50 and Mask R-CNN.
SHAPES: tuple[Shape, ...] = (
    *cases.SHAPES,
    (2, 64, 400, 608),  # Mask R-CNN, 800x1216: stem
    (2, 512, 100, 152),  # Mask R-CNN: res3
    (16, 256, 56, 56),  # ResNet-50: res2
    (16, 1024, 14, 14),  # ResNet-50: res4
)

#: ``backward, affine`` also gives the gradients of the weight and the bias.
Pass = Literal["forward", "backward", "backward, affine"]

SECTOR = 32  # bytes: what a GPU moves at least
VECTOR = 16  # bytes: the widest access of a thread
PACK = 8  # elements

#: Of a pack, by operation, pass and layout. 150 is what we promised, the others are what they were
#: (the most of any dtype and shape) and a twentieth, to notice what gets slower. Of each thread: in
#: the backward pass all of a warp go the longer way if one has to, which adds to its count on small
#: contiguous maps, and took an H100 0.88 of the time. About 400 cost no time there, where a pack
#: waits for memory as long.
MOST_INSTRUCTIONS = {
    ("residual+relu", "forward"): {"contiguous": 150, "channels_last": 150},
    ("residual+relu", "backward"): {"contiguous": 153, "channels_last": 121},
    ("residual+relu", "backward, affine"): {"contiguous": 470, "channels_last": 380},
    (PAIR, "forward"): {"contiguous": 182, "channels_last": 213},
    (PAIR, "backward"): {"contiguous": 184, "channels_last": 182},
}

#: timm's module dispatches what torchvision's does.
COUNTED = ("torchvision", "batch_norm", "detectron2")

#: By the operators' argument names.
WITH_VALUES = {"input", "residual", "output", "grad_output", "grad_input", "grad_residual"}
ACTIVATIONS = {*WITH_VALUES, "mask"}
VECTORS = {"running_mean", "running_var", "weight", "bias", "grad_weight", "grad_bias"}
VECTORS |= {"residual_mean", "residual_var", "residual_weight", "residual_bias"}


@dataclass(frozen=True)
class Emulated:
    """What one pass of ours does on the shape that was emulated.

    Sectors count once a warp and launch, in bytes: a second access of the same warp finds them in
    the L1 cache; the same sector touched by two warps counts twice.
    """

    shape: Shape
    activations: int  # sectors of the activations and the mask
    accessed: int  # bytes of those that threads load and store, over and again if they do
    requested: int  # their sectors, one access at a time: what the L1 cache is asked
    vectors: int  # [C] and [k, C] tensors, as small as they are, once a launch: DRAM's share
    partial_sums: int  # written and read back
    instructions: int  # of PTX, summed over threads
    narrow: int  # activation elements that were not moved in 16-byte accesses
    launches: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def instructions_per_pack(self) -> float:
        return self.instructions / (self.numel / PACK)

    def bytes_on(self, shape: Shape) -> float:
        """From and to DRAM, on a shape that this one was cut from."""
        elements = math.prod(shape) / self.numel
        channels = shape[1] / self.shape[1]
        return (self.activations + self.partial_sums) * elements + self.vectors * channels


def unavoidable_bytes(case: Case, which: Pass, shape: Shape) -> int:
    """Each activation once, and a bit an element for the ReLU; no vectors ``[C]``."""
    # The residual is read forward, its gradient written backward.
    tensors = 2 + case.has_residual + (which == "backward, affine")  # which reads the input
    numel = math.prod(shape)
    mask = 0 if case.operation == "plain" else math.ceil(numel / PACK)
    return tensors * numel * DTYPES[case.dtype].itemsize + mask


def emulated_shape(shape: Shape, layout: str, most: int) -> Shape:
    """One sample; of a large one, a part of at most about ``most`` elements.

    Cut along what the access pattern does not depend on: channels where each is a map of its own,
    rows of the map in channels_last.
    """
    _, c, h, w = shape
    if layout == "channels_last":
        return 1, c, min(h, max(1, most // (c * w))), w
    return 1, min(c, max(PACK, most // (h * w) // PACK * PACK)), h, w


def contenders(problem: Problem) -> dict[str, Contender]:
    """Ours and ``COUNTED``; of a pair, ours in one call and each peer as two of its layers."""
    if problem.operation != PAIR:
        made = peers.contenders(problem)
        return {name: made[name] for name in (peers.OURS, *COUNTED)}
    device = problem.affine.weight.device
    other = random_affine(problem.affine.weight.numel(), device)
    sums = peers.eager_peers(replace(problem, operation="residual+relu"))
    branches = peers.eager_peers(replace(problem, affine=other, operation="plain"))

    def ours(input: Tensor, residual: Tensor) -> Tensor:
        return frozen_batch_norm_pair(input, problem.affine, residual, other, activation="relu")

    def composed(name: str) -> Contender:
        return lambda input, residual: sums[name](input, branches[name](residual, None))

    return {peers.OURS: ours, **{name: composed(name) for name in COUNTED}}


@cache
def load_emulator() -> Any:
    """``tests/emulator``, built if need be. One a process: it registers operators."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from emulator import runtime

    return runtime.Emulator(runtime.build())


@contextmanager
def _counting(emulator: Any) -> Iterator[list[Any]]:
    """The launches within."""
    before, emulator.count_sectors = emulator.count_sectors, True
    emulator.launches.clear()
    try:
        with emulator.active():
            yield emulator.launches
    finally:
        emulator.count_sectors = before
        emulator.launches.clear()


def _summarise(case: Case, shape: Shape, launches: Sequence[Any]) -> Emulated:
    """``launches``: the emulator's Counters of one pass."""
    sectors: Counter[str] = Counter()
    requested: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    narrow = vectors = 0
    rows = 5 if case.operation == PAIR else 4
    vector_sizes = dict.fromkeys(VECTORS, 4 * shape[1]) | {"coefficients": 4 * rows * shape[1]}
    for launch in launches:
        touched: Counter[str] = Counter()
        for (region, _), count in launch.sectors.items():
            touched[region] += SECTOR * count
        sectors += touched
        vectors += sum(min(n, vector_sizes.get(region, 0)) for region, n in touched.items())
        for (region, _), count in launch.requested.items():
            requested[region] += SECTOR * count
        for (region, _, width), threads in launch.accesses.items():
            moved[region] += threads * width
            if region in WITH_VALUES and width < VECTOR:
                narrow += threads * width // DTYPES[case.dtype].itemsize
    known = ACTIVATIONS | vector_sizes.keys()
    return Emulated(
        shape,
        activations=sum(sectors[name] for name in ACTIVATIONS),
        accessed=sum(moved[name] for name in ACTIVATIONS),
        requested=sum(requested[name] for name in ACTIVATIONS),
        vectors=vectors,
        partial_sums=sum(n for region, n in moved.items() if region not in known),
        instructions=sum(launch.instructions for launch in launches),
        narrow=narrow,
        launches=len(launches),
    )


def emulate(emulator: Any, case: Case, shape: Shape, affine: bool = False) -> dict[Pass, Emulated]:
    """Runs the kernels, forward with gradients wanted and backward. ``affine``: those of weight and
    bias too."""
    cut = replace(case, shape=shape)
    setup = Setup(cut, torch.device("cpu"), train_affine=affine)
    ours = contenders(setup.problem)[peers.OURS]
    backward: Pass = "backward, affine" if affine else "backward"
    with _counting(emulator) as launches:
        output = ours(setup.input, setup.residual)
        counted: dict[Pass, Emulated] = {"forward": _summarise(case, shape, launches)}
        launches.clear()
        setup.gradients(output)
        counted[backward] = _summarise(case, shape, launches)
    return counted
