"""For good: convolutions that carry the frozen layers behind them, without this package."""

from __future__ import annotations

import ast
import copy
import dis
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from .checks import fail
from .fusion.classes import fuse as fuse_classes
from .fusion.classes import made, reasons, unfuse
from .fusion.fold import Sources, fold, is_normalized_by, is_sharded
from .fusion.report import Method, _is_plain
from .fusion.rewrite import Site
from .fusion.roles import is_sequential, parts
from .modules import _FrozenBatchNorm
from .recognise import is_batch_norm

_ACTIVATIONS: dict[str | None, Callable[[_FrozenBatchNorm], nn.Module]] = {
    None: lambda bn: nn.Identity(),
    "relu": lambda bn: nn.ReLU(),
    "relu6": lambda bn: nn.ReLU6(),
    "leaky_relu": lambda bn: nn.LeakyReLU(bn.negative_slope),
    "silu": lambda bn: nn.SiLU(),
    "hardswish": lambda bn: nn.Hardswish(),
}

#: What can be asked of a convolution without using it.
_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

#: By frozen layer, the convolution before it, or why there is none to take.
Found = dict[_FrozenBatchNorm, nn.Module | str]

_NONE_BEFORE = "no convolution was found before it whose output only it reads"


def _methods(owner: nn.Module) -> dict[str, CodeType]:
    """Those that its class, and the user's classes it derives from, define."""
    codes: dict[str, CodeType] = {}
    for kind in type(owner).__mro__:
        if kind.__module__.split(".")[0] not in ("torch", "builtins"):
            for name, member in vars(kind).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(function, FunctionType):
                    codes.setdefault(name, function.__code__)
    return codes


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _reads(code: CodeType) -> set[str]:
    """The attributes that it reads, but for those of which it wants to know a size."""
    names: set[str] = set()
    for part in _nested(code):
        instructions = [i for i in dis.get_instructions(part) if i.opname not in ("CACHE", "NOP")]
        for this, following in zip(instructions, [*instructions[1:], None], strict=True):
            if this.opname in ("LOAD_ATTR", "LOAD_METHOD") and not (
                following is not None
                and following.opname == "LOAD_ATTR"
                and following.argval in _SIZES
            ):
                names.add(str(this.argval))
    return names


def _is_read_alone(owner: nn.Module, conv: str, bn: str) -> bool:
    """Whether a method of ``owner`` that its ``forward`` does not call uses the convolution, and
    not the layer behind it."""
    names = [path.rpartition(".")[2] for path in (conv, bn)]
    if not all(map(str.isidentifier, names)):  # in a Sequential
        return False
    reads = {name: _reads(code) for name, code in _methods(owner).items()}
    traced, reached = {"__init__"}, ["forward"]
    while reached:
        method = reached.pop()
        if method not in traced:
            traced.add(method)
            reached += reads.get(method, set()) & {*reads}
    others = [read for method, read in reads.items() if method not in traced]
    return any(names[0] in read and names[1] not in read for read in others)


class _Uses:
    """What comes behind each convolution of a fused model, and before each frozen layer: modules, or
    None for anything else."""

    def __init__(self, root: nn.Module) -> None:
        self.behind: dict[nn.Module, set[nn.Module | None]] = {}
        self.before: dict[nn.Module, set[nn.Module | None]] = {}
        self.reasons: dict[nn.Module, str] = {}
        called: set[nn.Module] = set()
        for owner in root.modules():
            if not isinstance(owner, _FrozenBatchNorm) and not is_sequential(owner):
                called |= self._of_methods(owner)
        inside = {c for m in root.modules() if is_sequential(m) for c in m.children()}
        for module in root.modules():
            if is_sequential(module) and module not in called | inside:
                self._chain([*_layers(module)])

    def _chain(self, layers: list[nn.Module]) -> None:
        for one, two in zip([None, *layers], [*layers, None], strict=True):
            if one is not None:
                self.behind.setdefault(one, set()).add(two)
            if two is not None:
                self.before.setdefault(two, set()).add(one)

    def _of_methods(self, owner: nn.Module) -> set[nn.Module]:
        """Returns what the methods that ``forward`` calls call."""
        info, called = made(owner), set[nn.Module]()
        methods = {**info.others, **info.methods} if info else {}
        names, done = ["forward"], set[str]()
        for layer in owner.children():
            for reason in reasons(owner).values() if isinstance(layer, _FrozenBatchNorm) else ():
                self.reasons[layer] = f"{type(owner).__name__}.forward: {reason}"
        while names:
            name = names.pop()
            if name in done or name not in methods:
                continue
            done.add(name)
            method = Method(owner, name, methods[name], every=True)
            names += method.called_methods()
            for site in method.sites:
                layers = method.layers(site)
                called |= {m for m in (method.object(site.callee),) if isinstance(m, nn.Module)}
                self._site(method, site, layers)
        return called

    def _site(self, method: Method, site: Site, layers: list[nn.Module]) -> None:
        for one, two in itertools.pairwise(layers):
            self.behind.setdefault(one, set()).add(two)
            self.before.setdefault(two, set()).add(one)
        if not layers:
            return
        first, last = layers[0], layers[-1]
        sources = {l for s in site.inputs[0] for l in method.layers(s)[-1:]} or {None}
        extra = isinstance(site.node, ast.Call) and len(site.node.args) + len(site.node.keywords) > 1
        self.before.setdefault(first, set()).update(sources | ({None} if extra else set()))
        readers = {l for s in site.readers for l in method.layers(s)[:1]}
        alone = readers and not site.others and len(site.readers) == 1
        if not site.returned:
            self.behind.setdefault(last, set()).update(readers if alone else {None})


def _layers(sequential: nn.Module) -> Iterator[nn.Module]:
    return (m for m in parts(sequential) if type(m) is not nn.Identity)


def convolutions_before(root: nn.Module) -> Found:
    """Of each frozen layer in ``root`` the convolution whose output is its input, always, and read
    by nothing else; or why there is none."""
    fuse_classes(root, False)
    uses = _Uses(root)
    unfuse(root)
    places = Counter(child for module in root.modules() for child in module._modules.values())
    parents = {child: module for module in root.modules() for child in module.children()}
    names = {module: name for name, module in root.named_modules()}
    found: Found = {}
    for layer in root.modules():
        if not isinstance(layer, _FrozenBatchNorm):
            continue
        before = uses.before.get(layer, set())
        conv = next(iter(before)) if len(before) == 1 else None
        if not _is_plain(layer):
            found[layer] = "it has hooks"
        elif layer in uses.reasons:
            found[layer] = uses.reasons[layer]
        elif (
            conv is None
            or uses.behind.get(conv) != {layer}
            or places[conv] > 1
            or places[layer] > 1
            or not _is_plain(conv)
            or not is_normalized_by(conv, layer)
        ):
            found[layer] = _NONE_BEFORE
        elif _is_read_alone(parents[conv], names[conv], names[layer]):
            owner = type(parents[conv]).__name__
            found[layer] = f"another method of {owner} uses its convolution"
        else:
            found[layer] = conv
    return found


def _take_over(conv: nn.Module, bn: _FrozenBatchNorm) -> str | None:
    """Makes ``conv`` do the work of both; or says why it cannot."""
    if is_sharded(conv) or is_sharded(bn):
        return "FSDP holds on to it"
    with torch.no_grad():
        weight, bias = fold(conv, Sources.of(conv, bn))
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
        activation = _ACTIVATIONS[layer.activation](layer).eval()
        root.get_submodule(parent)._modules[name] = activation
    for name, layer in root.named_modules():
        if is_batch_norm(layer):
            stay[name or type(layer).__name__] = "it is not frozen, call convert_frozen_bn before"
    return stay


def _check_same(actual: Any, expected: Any) -> None:
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for got, want in pairs:
        if not isinstance(want, Tensor) or not want.is_floating_point():
            continue
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

    What ``forward`` methods do is read from the code of the modules that hold the layers. Where a
    convolution is called from elsewhere (a parent that reaches for it), the layer is in it there
    too: give an example input to compare.

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
