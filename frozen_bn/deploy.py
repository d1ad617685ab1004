"""For good: convolutions that carry the frozen layers behind them, without this package."""

from __future__ import annotations

import copy
import dis
import inspect
import warnings
from collections import Counter
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from . import activations
from .checks import fail
from .fusion.classes import only_holds, unfuse
from .fusion.flow import uses_in
from .fusion.fold import fold, is_normalized_by, is_sharded
from .fusion.kinds import is_sequential
from .fusion.source import codes
from .fusion.uses import SIZES, is_free, sole
from .modules import _FrozenBatchNorm
from .recognise import is_batch_norm

#: By frozen layer, the convolution before it, or why there is none to take.
Found = dict[_FrozenBatchNorm, nn.Module | str]

_NONE_BEFORE = "no convolution was found before it whose output only it reads"


def _methods(owner: nn.Module) -> dict[str, CodeType]:
    """Those that its class, and the user's classes it derives from, define, without decorators."""
    codes: dict[str, CodeType] = {}
    for kind in type(owner).__mro__:
        if kind.__module__.split(".")[0] not in ("torch", "builtins"):
            for name, member in vars(kind).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                function = inspect.unwrap(function) if callable(function) else function
                if isinstance(function, FunctionType):
                    codes.setdefault(name, function.__code__)
    return codes


def _reads(code: CodeType) -> set[str]:
    """The attributes that it reads, but for those of which it wants to know a size."""
    names: set[str] = set()
    for part in codes(code):
        instructions = [i for i in dis.get_instructions(part) if i.opname not in ("CACHE", "NOP")]
        for this, following in zip(instructions, [*instructions[1:], None], strict=True):
            if this.opname in ("LOAD_ATTR", "LOAD_METHOD") and not (
                following is not None
                and following.opname == "LOAD_ATTR"
                and following.argval in SIZES
            ):
                names.add(str(this.argval))
    return names


def _reached(reads: dict[str, set[str]], method: str) -> set[str]:
    """It and the methods that it calls, by name."""
    found: set[str] = set()
    waiting = [method]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += reads.get(name, set()) & {*reads}
    return found


def _is_used_elsewhere(owner: nn.Module, conv: str, bn: str) -> bool:
    """Whether a method of ``owner`` that its ``forward`` does not call uses the convolution or the
    layer behind it, or a module that holds one of them, by itself or through other methods."""
    parts = {part for path in (conv, bn) for part in (path.split(".")[0], path.split(".")[-1])}
    reads = {name: _reads(code) for name, code in _methods(owner).items()}
    for method in {*reads} - _reached(reads, "forward") - {"__init__"}:
        if any(reads.get(name, set()) & parts for name in _reached(reads, method)):
            return True
    return False


def _owner(root: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The last around a layer that has a forward of its own, and its name."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        above = root.get_submodule(".".join(parts[:i]))
        if not (only_holds(above) or is_sequential(type(above))):
            return ".".join(parts[:i]), above
    return "", root


def convolutions_before(root: nn.Module) -> Found:
    """Of each frozen layer in ``root`` the convolution whose output is its input, always, and read
    by nothing else; or why there is none."""
    uses = uses_in(root)
    names = {module: name for name, module in root.named_modules()}
    places = Counter(module for _, module in root.named_modules(remove_duplicate=False))

    def before(layer: _FrozenBatchNorm) -> nn.Module | str:
        conv = sole(uses.before.get(layer))
        if not is_free(layer):
            return "it has hooks"
        if not isinstance(conv, nn.Module) or not is_normalized_by(conv, layer):
            return uses.reasons.get(layer, _NONE_BEFORE)
        alone = places[conv] == places[layer] == 1 and sole(uses.behind.get(conv)) is layer
        if not alone or not is_free(conv):
            return _NONE_BEFORE
        place, owner = _owner(root, names[layer])
        relative = (names[m].removeprefix(place).lstrip(".") for m in (conv, layer))
        if _is_used_elsewhere(owner, *relative):
            return f"another method of {type(owner).__name__} uses its convolution"
        return conv

    return {layer: before(layer) for layer in root.modules() if isinstance(layer, _FrozenBatchNorm)}


def _take_over(conv: nn.Module, bn: _FrozenBatchNorm) -> str | None:
    """Makes ``conv`` do the work of both; or says why it cannot."""
    if is_sharded(conv) or is_sharded(bn):
        return "FSDP holds on to it"
    with torch.no_grad():
        weight, bias = fold(conv, bn)
        bias = bias.to(weight.dtype)
    if not weight.is_meta and not all(torch.isfinite(t).all() for t in (weight, bias)):
        return f"the folded weight does not fit in {str(weight.dtype).removeprefix('torch.')}"
    trained = cast(Tensor, conv.weight).requires_grad
    # New ones: another convolution may share the old.
    conv._parameters["weight"] = Parameter(weight, trained)
    conv._parameters["bias"] = Parameter(bias, trained)
    return None


def _fold_all(root: nn.Module) -> dict[str, str]:
    """Returns the layers that stay, and why."""
    stay: dict[str, str] = {}
    found = convolutions_before(root)
    names = {layer: name for name, layer in root.named_modules()}
    for layer, conv in found.items():
        reason = conv if isinstance(conv, str) else _take_over(conv, layer)
        if reason is not None:
            stay[names[layer] or type(layer).__name__] = reason
            continue
        parent, _, name = names[layer].rpartition(".")
        activation = activations.as_module(layer.activation, layer.negative_slope).eval()
        root.get_submodule(parent)._modules[name] = activation
    for name, layer in root.named_modules():
        if is_batch_norm(layer):
            stay[name or type(layer).__name__] = "it is not frozen, call convert_frozen_bn before"
    return stay


def _check_same(actual: Any, expected: Any) -> None:
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    tensors = [
        (got, want) for got, want in pairs if isinstance(want, Tensor) and want.is_floating_point()
    ]
    if not tensors:  # of a class whose parts torch's pytree does not know
        kind = type(expected).__name__
        raise fail("fold_for_inference", "the model to return floating tensors to compare", kind)
    for got, want in tensors:
        error, size = float((got - want).double().norm()), float(want.double().norm())
        if not error <= torch.finfo(want.dtype).eps ** 0.5 * size:
            expected_text = "the folded model to return what the model returns"
            raise fail("fold_for_inference", expected_text, f"an error of {error:g} in {size:g}")


def fold_for_inference(module: nn.Module, *inputs: Any) -> nn.Module:
    """A copy of a converted model for deployment, in ``eval()`` mode: the convolutions carry the
    frozen layers behind them for good. It consists of plain torch modules, and this package is not
    needed to load, export or quantize it.

    Names are kept: where a layer was, there is ``torch.nn.Identity``, or the activation that the
    layer had. A layer stays as it is, named in a warning, where there is no convolution before it
    whose output it alone reads, or where that cannot be told from the ``forward`` that calls it. So
    does what was never converted.

    What ``forward`` methods do is read from the code of the modules that hold the layers, as their
    flags are now; what cannot be followed there is not folded. Where a convolution is called from
    elsewhere (a parent that reaches for it, or calls another method than ``forward``), the layer is
    in it there too, and a ``Sequential`` that is handed to a function of torch or timm is taken to
    be called from its first layer to its last: give an example input to compare.

    Args:
        module: not changed. Weights may be of any dtype; what is folded is computed in float32 at
            least and rounded once.
        *inputs: an example input. If given, the copy is run on it before and after folding.

    Returns:
        The copy.

    Raises:
        RuntimeError: on ``inputs`` the copy does not return what ``module`` returns in ``eval()``.
    """
    twin = copy.deepcopy(module).eval()
    unfuse(twin)
    with torch.no_grad():
        expected = twin(*inputs) if inputs else None
        stay = _fold_all(twin)
        if inputs:
            _check_same(twin(*inputs), expected)
    if stay:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in stay.items())
        warnings.warn(f"frozen_bn: not folded, left as they are: {listed}", stacklevel=2)
    return twin
