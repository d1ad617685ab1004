"""Bytes that a layer moves with what people use instead: from the operators that torch dispatches
for fake CUDA tensors, forward and backward. Nothing here is measured on a GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import Case, Contender, Problem, Setup
from .traffic import COUNTED, Pass, contenders


@dataclass(frozen=True)
class Dispatched:
    """What the operators of one pass read and write at least: each input and output once."""

    bytes: int
    launches: int
    operators: tuple[str, ...]


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


def dispatch(case: Case, contender: Callable[[Problem], Contender]) -> dict[Pass, Dispatched]:
    """Runs a peer forward and backward on fake CUDA tensors; the vectors are constants."""
    with FakeTensorMode():
        setup = Setup(case, torch.device("cuda"))
        function = contender(setup.problem)
        with _Operators() as operators:
            output = function(setup.input, setup.residual)
            forward = operators.taken()
            with torch.no_grad():
                _backward(output, setup.grad)
            return {"forward": forward, "backward": operators.taken()}


def dispatch_peers(case: Case) -> dict[str, dict[Pass, Dispatched]]:
    """By peer and pass."""

    def maker(name: str) -> Callable[[Problem], Contender]:
        return lambda problem: contenders(problem)[name]

    return {name: dispatch(case, maker(name)) for name in COUNTED}
