"""Which tensors change their floating dtype in a step of training: by a cast, or unseen, by an
operator that is given two dtypes (and then widens one: in its kernel on CUDA, by a copy on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _is_vector(tensor: Tensor) -> bool:
    return sum(n > 1 for n in tensor.shape) < 2


class _Casts(TorchDispatchMode):
    """Vectors of channels are not counted: a cast of one is a launch, and no bytes to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = self.mixed = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before, after = (
            [t for t in tree_leaves(part) if isinstance(t, Tensor) and t.is_floating_point()]
            for part in ((args, kwargs), result)
        )
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_") and after and not _is_vector(after[0]):
            if len({t.dtype for t in before + after}) > 1:
                self.casts += 1
                self.bytes += before[-1].nbytes + after[0].nbytes
        elif func.namespace == "aten" and not all(map(_is_vector, before)):
            self.mixed += len({t.dtype for t in before}) > 1
        return result


def casts(step: Callable[[], object]) -> dict[str, int]:
    """How many there are, what they read and write, and how many operators are given two dtypes."""
    with _Casts() as counted:
        step()
    return {"casts": counted.casts, "cast_bytes": counted.bytes, "mixed": counted.mixed}
