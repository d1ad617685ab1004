"""What torch dispatches: the bytes that a layer moves with what people use instead, and the casts
in a step of a network. Nothing here is measured on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import Case, Contender, Problem, Setup
from .traffic import COUNTED, Pass, contenders


class _Watcher(TorchDispatchMode):
    """Shows each operator, with the tensors that go in and come out, to ``see``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        self.see(func, func._schema.name.removeprefix("aten::"), given, made)
        return result

    def see(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Dispatched:
    """What the operators of one pass read and write at least: each input and output once."""

    bytes: int
    launches: int
    operators: tuple[str, ...]


#: Operators that allocate, and launch nothing.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Of the elements that are there: an expanded dimension is stored once."""
    return sum(
        math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) * t.itemsize
        for t in tensors
    )


class _Operators(_Watcher):
    """Adds up the operators that launch kernels. Views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.names = 0, []

    def see(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        if made and not is_view and name not in _ALLOCATIONS:
            self.bytes += _stored_bytes(given) + _stored_bytes(made)
            self.names.append(name)

    def taken(self) -> Dispatched:
        """What was counted since the last time."""
        counted = Dispatched(self.bytes, len(self.names), tuple(self.names))
        self.bytes, self.names = 0, []
        return counted


def dispatch(case: Case, contender: Callable[[Problem], Contender]) -> dict[Pass, Dispatched]:
    """Runs a peer forward and backward on fake tensors; the vectors are constants.

    They are of the CPU, since autograd refuses fake CUDA tensors where there is no GPU. On CUDA the
    operators are the same, but for the kind of batch normalization, which moves as much.
    """
    with FakeTensorMode():
        setup = Setup(case, torch.device("cpu"))
        function = contender(setup.problem)
        with _Operators() as operators:
            output = function(setup.input, setup.residual)
            forward = operators.taken()
            setup.gradients(output)
            return {"forward": forward, "backward": operators.taken()}


def dispatch_peers(case: Case) -> dict[str, dict[Pass, Dispatched]]:
    """By peer and pass."""

    def maker(name: str) -> Callable[[Problem], Contender]:
        return lambda problem: contenders(problem)[name]

    return {name: dispatch(case, maker(name)) for name in COUNTED}


def _is_vector(tensor: Tensor) -> bool:
    return sum(n > 1 for n in tensor.shape) < 2


class _Casts(_Watcher):
    """Vectors of channels are not counted: a cast of one is a launch, and no bytes to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = self.mixed = self.bytes = 0

    def see(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        before, after = ([t for t in part if t.is_floating_point()] for part in (given, made))
        if name in ("_to_copy", "copy_") and after and not _is_vector(after[0]):
            if len({t.dtype for t in before + after}) > 1:
                self.casts += 1
                self.bytes += before[-1].nbytes + after[0].nbytes
        elif func.namespace == "aten" and not all(map(_is_vector, before)):
            self.mixed += len({t.dtype for t in before}) > 1


def casts(step: Callable[[], object]) -> dict[str, int]:
    """Which tensors change their floating dtype in a step of training: how many casts there are,
    what they read and write, and how many operators are given two dtypes (and then widen one: in
    their kernel on CUDA, by a copy on a CPU)."""
    with _Casts() as counted:
        step()
    return {"casts": counted.casts, "cast_bytes": counted.bytes, "mixed": counted.mixed}
