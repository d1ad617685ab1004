"""What became of every batch normalization of a model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from .convert import unfreeze_bn
from .fusion.report import Fate, expected, observed
from .modules import _FrozenBatchNorm
from .recognise import NO_SUBMODULE, is_batch_norm, unregistered, why_not_frozen


def _state(layer: nn.Module, fates: Mapping[nn.Module, Fate]) -> tuple[str, str]:
    """What it is counted as, and what is said of it."""
    if not isinstance(layer, _FrozenBatchNorm):
        return "skipped", f"skipped: {why_not_frozen(layer) or 'not converted'}"
    fate = fates.get(layer, Fate())
    parts = []
    if fate.folded_into:
        parts.append(f"folded into {fate.folded_into}")
    if fate.merged:
        parts.append(f"merged with {fate.merged}")
    if fate.in_place:
        parts.append("in place")
    if fate.reason:
        parts.append(f"not fused: {fate.reason}")
    counted = f"frozen, merged with {fate.merged}" if fate.merged else "frozen"
    return counted, ", ".join(["frozen", *parts])


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """The bytes of the tensors that ``forward`` saves for the backward pass, each storage counted
    once; parameters and buffers of ``module`` are there anyway."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, tuple[int, Tensor]] = {}  # holds on to them, or an address might recur

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes(), tensor.detach()
        return tensor

    with (
        torch.random.fork_rng(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        forward()
    return sum(size for size, _ in saved.values())


def _live(module: nn.Module) -> nn.Module:
    """A copy as it was before, with its batch normalizations in eval mode."""
    module = unfreeze_bn(copy.deepcopy(module))
    for layer in module.modules():
        if is_batch_norm(layer):
            layer.eval()
    return module


#: Whose weights and biases are usually not decayed.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)


def norm_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of every normalization in ``module`` that require grad: of frozen and
    live batch normalizations, and of torch's other normalizations; each once, in order.

    For optimizer groups: code that finds them by ``isinstance(layer, _BatchNorm)`` does not find
    those of frozen layers, and has their trained affine decayed like a convolution's weight.
    """
    own = (
        parameter
        for layer in module.modules()
        if isinstance(layer, (_FrozenBatchNorm, *_NORMS)) or is_batch_norm(layer)
        for part in (layer, *getattr(layer, "parametrizations", {}).values())
        for parameter in part.parameters(recurse=False)
    )
    return [parameter for parameter in dict.fromkeys(own) if parameter.requires_grad]


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def summary(module: nn.Module, *inputs: Any) -> str:
    """A table of every batch normalization in ``module``: frozen, merged with what, folded into
    which convolution, or skipped and why; and the totals.

    Args:
        module: a model, before or after ``convert_frozen_bn``.
        *inputs: an example input. If given, the model is run on it as it is, and as it was with
            its batch normalizations in ``eval()``, and the activation bytes that each saves for
            the backward pass are added.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if is_batch_norm(layer) or isinstance(layer, _FrozenBatchNorm)
    }
    fates = observed(module, inputs) if inputs else expected(module)
    states = {name: _state(layer, fates) for name, layer in layers.items()}
    elsewhere = dict(unregistered(module))
    layers |= elsewhere
    states |= {name: ("skipped", f"skipped: {NO_SUBMODULE}") for name in elsewhere}
    rows = [("name", "class", "state")]
    rows += [
        (name or "(root)", type(layers[name]).__name__, text) for name, (_, text) in states.items()
    ]
    lines = [*_table(rows), ""]
    counts = Counter(counted for counted, _ in states.values())
    frozen = sum(isinstance(layer, _FrozenBatchNorm) for layer in layers.values())
    lines.append(f"{frozen} frozen, {len(layers) - frozen} skipped")
    for counted, count in sorted(counts.items()):
        if "merged" in counted:
            pairs = f" ({count // 2} pairs)" if "branches" in counted else ""
            lines.append(f"{count} {counted.removeprefix('frozen, ')}{pairs}")
    if inputs:
        live = _live(module)
        before = saved_bytes(live, lambda: live(*inputs))
        now = saved_bytes(module, lambda: module(*inputs))
        lines.append(
            f"saved for backward: {before / 2**20:.1f} MiB before, {now / 2**20:.1f} MiB now"
        )
    return "\n".join(lines)
