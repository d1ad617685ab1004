"""Bytes that a layer moves: counted in the emulator for the CUDA kernels, and from the operators
that are dispatched for what people use instead. Nothing here is measured on a GPU."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import bench_op, peers
from .bench_op import DTYPES, Case, Shape, random_tensor

#: Layers of ResNet-50 and Mask R-CNN.
SHAPES: tuple[Shape, ...] = (
    *bench_op.SHAPES,
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

#: By the operators' argument names.
WITH_VALUES = {"input", "residual", "output", "grad_output", "grad_input", "grad_residual"}
ACTIVATIONS = {*WITH_VALUES, "mask"}
VECTORS = {"running_mean", "running_var", "weight", "bias", "grad_weight", "grad_bias"}


@dataclass(frozen=True)
class Emulated:
    """What one pass of ours does on the shape that was emulated.

    Sectors count once a warp and launch, in bytes: a second access of the same warp finds them in
    the L1 cache; the same sector touched by two warps counts twice.
    """

    shape: Shape
    activations: int  # sectors of the activations and the mask
    vectors: int  # [C] and [4, C] tensors, as small as they are, once a launch: DRAM's share
    partial_sums: int  # written and read back
    all_sectors: int  # of every tensor: what the L2 cache is asked for
    requested: int  # sectors of the activations, one access at a time: what the L1 cache is asked
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


@dataclass(frozen=True)
class Dispatched:
    """What the operators of one pass read and write at least: each input and output once."""

    bytes: int
    launches: int
    operators: tuple[str, ...]


def unavoidable_bytes(case: Case, which: Pass, shape: Shape) -> int:
    """Each activation once, and a bit an element for the ReLU; no vectors ``[C]``."""
    residual = case.operation == "residual+relu"  # read forward, its gradient written backward
    tensors = 2 + residual + (which == "backward, affine")  # which reads the input
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


def _summarise(case: Case, shape: Shape, launches: Iterable[Any]) -> Emulated:
    """``launches``: the emulator's Counters of one pass."""
    sectors: Counter[str] = Counter()
    requested: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    narrow = instructions = number = vectors = 0
    vector_sizes = dict.fromkeys(VECTORS, 4 * shape[1]) | {"coefficients": 16 * shape[1]}
    itemsize = DTYPES[case.dtype].itemsize
    for launch in launches:
        number += 1
        instructions += launch.instructions
        for (region, _), count in launch.requested.items():
            requested[region] += SECTOR * count
        touched: Counter[str] = Counter()
        for (region, _), count in launch.sectors.items():
            sectors[region] += SECTOR * count
            touched[region] += SECTOR * count
        vectors += sum(min(n, vector_sizes.get(region, 0)) for region, n in touched.items())
        for (region, _, width), threads in launch.accesses.items():
            moved[region] += threads * width
            if region in WITH_VALUES and width < VECTOR:
                narrow += threads * width // itemsize
    known = ACTIVATIONS | vector_sizes.keys()
    return Emulated(
        shape,
        sum(sectors[name] for name in ACTIVATIONS),
        vectors,
        sum(n for region, n in moved.items() if region not in known),
        sectors.total(),
        sum(requested[name] for name in ACTIVATIONS),
        instructions,
        narrow,
        number,
    )


def emulate(emulator: Any, case: Case, shape: Shape, affine: bool = False) -> dict[Pass, Emulated]:
    """Runs the kernels, forward with gradients wanted and backward. ``affine``: those of weight and
    bias too."""
    cut = Case(case.dtype, case.layout, case.operation, shape)
    device = torch.device("cpu")
    vectors = peers.Affine.random(shape[1], device)
    if affine:
        vectors.weight.requires_grad_()
        vectors.bias.requires_grad_()
    problem = peers.Problem(vectors, DTYPES[case.dtype], case.operation)
    input = random_tensor(cut, device).requires_grad_()
    residual = None
    if case.operation == "residual+relu":
        residual = random_tensor(cut, device).requires_grad_()
    wanted = [t for t in (input, residual, vectors.weight, vectors.bias) if t is not None]
    wanted = [t for t in wanted if t.requires_grad]
    backward: Pass = "backward, affine" if affine else "backward"
    with _counting(emulator) as launches:
        output = peers.contenders(problem)[peers.OURS](input, residual)
        counted: dict[Pass, Emulated] = {"forward": _summarise(case, shape, launches)}
        launches.clear()
        torch.autograd.grad(output, wanted, random_tensor(cut, device))
        counted[backward] = _summarise(case, shape, launches)
    return counted


#: Operators that allocate, and launch nothing.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _stored_bytes(tensors: Iterable[Any]) -> int:
    """Of the elements that are there: an expanded dimension is stored once."""
    return sum(
        math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) * t.itemsize
        for t in tensors
        if isinstance(t, Tensor)
    )


class _Operators(TorchDispatchMode):
    """Adds up the operators that launch kernels. Views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if outputs and not is_view and name not in _ALLOCATIONS:
            self.bytes += _stored_bytes(tree_leaves((args, kwargs))) + _stored_bytes(outputs)
            self.names.append(name)
        return result

    def taken(self) -> Dispatched:
        """What was counted since the last time."""
        counted = Dispatched(self.bytes, len(self.names), tuple(self.names))
        self.bytes, self.names = 0, []
        return counted


def _backward(output: Tensor, grad: Tensor) -> None:
    """Calls autograd's nodes, in an order that respects the graph.

    Torch's engine would do just that, but refuses fake CUDA tensors where there is no GPU.
    """
    root: Any = output.grad_fn
    uses: Counter[Any] = Counter()
    found = [root]
    for node in found:
        for successor, _ in node.next_functions:
            if successor is not None:
                if successor not in uses:
                    found.append(successor)
                uses[successor] += 1
    gradients: dict[Any, dict[int, Tensor]] = {root: {0: grad}}
    ready = [root]
    while ready:
        node = ready.pop()
        if not hasattr(node, "variable"):  # a leaf's
            given = gradients[node]
            results = node(*(given.get(k) for k in range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (successor, k), result in zip(node.next_functions, results, strict=True):
                if successor is None:
                    continue
                slots = gradients.setdefault(successor, {})
                slots[k] = slots[k] + result if k in slots else result
                uses[successor] -= 1
                if uses[successor] == 0:
                    ready.append(successor)


def dispatch(
    case: Case, contender: Callable[[peers.Problem], peers.Contender]
) -> dict[Pass, Dispatched]:
    """Runs a peer forward and backward on fake CUDA tensors; the vectors are constants."""
    device = torch.device("cuda")
    with FakeTensorMode():
        vectors = peers.Affine.random(case.shape[1], device)
        function = contender(peers.Problem(vectors, DTYPES[case.dtype], case.operation))
        input = random_tensor(case, device).requires_grad_()
        residual = None
        if case.operation == "residual+relu":
            residual = random_tensor(case, device).requires_grad_()
        grad = random_tensor(case, device)
        with _Operators() as operators:
            output = function(input, residual)
            forward = operators.taken()
            with torch.no_grad():
                _backward(output, grad)
            return {"forward": forward, "backward": operators.taken()}


def dispatch_peers(case: Case) -> dict[str, dict[Pass, Dispatched]]:
    """By peer and pass."""

    def maker(name: str) -> Callable[[peers.Problem], peers.Contender]:
        return lambda problem: peers.contenders(problem)[name]

    return {name: dispatch(case, maker(name)) for name in peers.PEERS}
