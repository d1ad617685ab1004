"""Which tensors change their floating dtype while something runs: by a cast, or unseen, by an
operator that is given two dtypes."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operator, dtypes (before and after, or those that it is given), shape of the largest.
Cast = tuple[str, tuple[str, ...], torch.Size]


def _floats(values: object) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


class Casts(TorchDispatchMode):
    """Counts them, forward and backward. This package's operators take vectors of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Cast] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        makes_new = name.startswith(
            ("empty", "new_empty", "zeros", "new_zeros", "ones", "new_ones")
        )
        if not makes_new and function.namespace != "frozen_bn":
            tensors = _floats((args, kwargs)) + _floats(result)
            dtypes = tuple(sorted({str(t.dtype) for t in tensors}))
            if len(dtypes) > 1:
                largest = max(tensors, key=Tensor.numel)
                self.found[name, dtypes, largest.shape] += 1
        return result


def without_norms(net: nn.Module) -> nn.Module:
    """A copy with nothing in the place of its batch normalizations."""
    net = copy.deepcopy(net)
    for parent in [*net.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                parent._modules[name] = nn.Identity()
    return net
