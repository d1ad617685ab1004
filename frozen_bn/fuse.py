"""Fusion: frozen batch normalizations are merged with what follows them, or precedes them, in the
``forward`` that calls them.

    _Matcher      what can be merged in a graph
    _rewrite      the graph with it merged
    fuse_forwards does both for every module whose own forward calls a frozen one

The modules of the model stay what and where they are: only the ``forward`` of the module above is
replaced, on the instance, and falls back to that of the class whenever a hook or a changed child
says so (see ``TracedForward``).
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from . import activations, fold, merged
from .activations import Activation
from .guards import Children, Guard, Held, once
from .modules import Fate, _FrozenBatchNorm
from .source import CannotTrace
from .trace import is_plain_sequential, trace
from .traced import Key, Traced, TracedForward, has_hooks

_ADDITIONS = {operator.add, torch.add, "add"}
_ADDITIONS_INTO = {operator.iadd, "add_"}


@dataclass
class _Merge:
    """A batch normalization, and the nodes whose work its kernel can do too."""

    bn: fx.Node
    end: fx.Node  # the last of them
    nodes: list[fx.Node]
    conv: fx.Node | None  # the convolution before it, whose output nothing else reads
    total: fx.Node | None = None  # the sum, if it is one
    other: _Merge | None = None  # the other branch, if that is a batch normalization too
    into: bool = False
    activation: str | None = None
    negative_slope: float = 0.01

    def parts(self) -> list[fx.Node]:
        parts = [*self.nodes] + ([self.conv] if self.conv else [])
        return parts + (self.other.parts() if self.other else [])

    def residual(self) -> fx.Node | None:
        """What is added. Looked up when it is needed: rewriting another merge may replace it."""
        if self.total is None:
            return None
        (residual,) = (node for node in self.total.args if node is not self.bn)
        assert isinstance(residual, fx.Node)
        return residual

    def description(self) -> str:
        added = "two branches" if self.other else "add" if self.total else None
        return " + ".join(name for name in (added, self.activation) if name)


def _has_own_forward(module: nn.Module) -> bool:
    """Of a frozen batch normalization: whether its class does something else or more."""
    return type(module).forward is not _FrozenBatchNorm.forward


class _Matcher:
    """Finds what can be merged in the graph of ``owner``'s forward."""

    def __init__(self, owner: nn.Module, graph: fx.Graph, shared: set[nn.Module]) -> None:
        self.owner = owner
        self.graph = graph
        self.shared = shared
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.taken: set[fx.Node] = set()

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls with one argument, if it is free to be merged."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.owner.get_submodule(str(node.target))
        return None if has_hooks(module) or "forward" in vars(module) else module

    def bn(self, node: object) -> _FrozenBatchNorm | None:
        if not isinstance(node, fx.Node) or node in self.taken:
            return None
        module = self.module(node)
        if not isinstance(module, _FrozenBatchNorm) or _has_own_forward(module):
            return None
        if module.inplace and len(node.all_input_nodes[0].users) > 1:
            return None  # others read what it writes over
        return None if self._is_shared(node, module) else module

    def _is_shared(self, node: fx.Node, module: nn.Module) -> bool:
        return module in self.shared or self.calls[node.target] > 1

    def conv_before(self, bn: fx.Node) -> fx.Node | None:
        node = bn.args[0]
        if not isinstance(node, fx.Node) or len(node.users) > 1:
            return None
        module, bn_module = self.module(node), self.bn(bn)
        if module is None or bn_module is None or self._is_shared(node, module):
            return None
        return node if fold.is_normalized_by(module, bn_module) else None

    def activation(self, node: fx.Node) -> Activation | None:
        """Which ``node`` is, of one tensor, if it is one."""
        if node.op == "call_module":
            module = self.module(node)
            found = activations.of_module(module) if module else None
        else:
            found = activations.of_call(node.target, node.args, node.kwargs)
        return found if found and found.name else None

    def can_wait(self, bn: fx.Node, until: fx.Node) -> bool:
        """Whether ``bn`` can be computed as late as ``until``: nothing in between can write to its
        input."""
        input = bn.args[0]
        assert isinstance(input, fx.Node)
        if isinstance(self.module(input), _ConvNd) and len(input.users) == 1:
            return True  # nobody else has it
        node = bn.next
        while node is not until and self._only_reads(node):
            node = node.next
        return node is until

    def _only_reads(self, node: fx.Node) -> bool:
        module = self.module(node)
        return isinstance(module, _ConvNd) or (
            isinstance(module, _FrozenBatchNorm)
            and not module.inplace
            and not _has_own_forward(module)
        )

    def merge(self, bn: fx.Node) -> _Merge:
        module = self.bn(bn)
        assert module is not None
        own = module.activation, module.negative_slope
        return _Merge(bn, bn, [bn], self.conv_before(bn), None, None, False, *own)

    def with_activation(self, merge: _Merge) -> _Merge:
        """Takes in the activation, if one is all that reads the value."""
        end = merge.end
        if merge.activation is not None or len(end.users) != 1:
            return merge
        (following,) = end.users
        # What is added must not be written to in between.
        free = self.can_wait(end, following) if end is merge.bn else end.next is following
        found = self.activation(following)
        if found and free and following.args[:1] == (end,) and following.all_input_nodes == [end]:
            merge.activation, merge.negative_slope = found
            merge.end = following
            merge.nodes.append(following)
        return merge

    def _addend(self, node: object, total: fx.Node) -> bool:
        """Whether ``node`` is a batch normalization that only ``total`` uses."""
        bn = self.bn(node)
        return (
            bn is not None
            and bn.activation is None
            and len(node.users) == 1  # type: ignore[attr-defined]
            and self.can_wait(node, total)  # type: ignore[arg-type]
        )

    def addition(self, total: fx.Node) -> _Merge | None:
        """What ``total`` adds to a batch normalization, if it does."""
        if total.target not in _ADDITIONS | _ADDITIONS_INTO or len(total.args) != 2 or total.kwargs:
            return None
        a, b = total.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
            return None
        into = total.target in _ADDITIONS_INTO  # writes to a, so a has to be what is merged
        if not self._addend(a, total):
            if into or not self._addend(b, total):
                return None
            a, b = b, a
        merge = self.merge(a)
        merge.into = into
        merge.end = merge.total = total
        merge.nodes.append(total)
        if self._addend(b, total):
            merge.other = self.merge(b)
        return merge

    def merges(self) -> list[_Merge]:
        found = []
        nodes = [*self.graph.nodes]
        additions = map(self.addition, nodes)
        bare = (self.merge(node) for node in nodes if self.bn(node))
        for merge in itertools.chain(filter(None, additions), bare):
            found.append(self.with_activation(merge))
            self.taken |= {*merge.parts()}
        return [merge for merge in found if merge.conv or merge.end is not merge.bn]


def _skip_identities(owner: nn.Module, graph: fx.Graph) -> set[nn.Module]:
    """Takes every ``nn.Identity`` out of the graph, and returns them."""
    skipped: set[nn.Module] = set()
    for node in [*graph.nodes]:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            module = owner.get_submodule(str(node.target))
            if type(module) is nn.Identity and not has_hooks(module):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                skipped.add(module)
    return skipped


def _rewrite(graph: fx.Graph, merge: _Merge, fold_conv: bool) -> fx.Node:
    """Puts calls in the place of the nodes of ``merge``; returns the last."""

    def call(function: Callable[..., object], nodes: list[fx.Node], *args: object) -> fx.Node:
        with graph.inserting_before(nodes[-1]):
            new = graph.call_function(function, args)  # type: ignore[arg-type]
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            graph.erase_node(node)
        return new

    def module(node: fx.Node, before: fx.Node) -> fx.Node:
        with graph.inserting_before(before):
            return graph.get_attr(str(node.target))

    def operands(merge: _Merge) -> tuple[object, ...]:
        return module(merge.bn, merge.bn), merge.bn.args[0], merge.conv is not None

    other, residual = merge.other, merge.residual()
    tail = merge.activation, merge.negative_slope, merge.into
    if other is not None:
        if not fold_conv or not (merge.conv or other.conv):
            nodes = [other.bn, *merge.nodes]
            return call(merged.normalize_branches, nodes, *operands(merge), *operands(other), *tail)
        residual = _rewrite(graph, other, fold_conv)
    if not fold_conv or merge.conv is None:
        return call(merged.normalize, merge.nodes, *operands(merge), residual, *tail)
    conv = merge.conv
    modules = module(conv, conv), module(merge.bn, conv)
    bias_later = residual is not None or merge.activation is not None
    value = call(fold.convolve, [conv], *modules, conv.args[0], bias_later)
    return call(merged.add_and_activate, merge.nodes, value, residual, *tail)


def only_holds(module: nn.Module) -> bool:
    """Whether it has no ``forward``: a ModuleList, or what torch.fx makes to hold children."""
    return type(module).forward is nn.Module.forward


def called(module: nn.Module) -> Iterator[_FrozenBatchNorm]:
    """The frozen batch normalizations that its own ``forward`` may call."""
    for child in module.children():
        if isinstance(child, _FrozenBatchNorm):
            yield child
        elif is_plain_sequential(child) or only_holds(child):
            yield from called(child)


def _calls_frozen(module: nn.Module) -> bool:
    return any(True for _ in called(module))


def _crossed(sequential: str, merge: _Merge) -> bool:
    """Whether ``merge`` takes in nodes inside of a Sequential as well as outside."""
    inside = {
        node.op == "call_module" and str(node.target).startswith(sequential + ".")
        for node in merge.parts()
    }
    return len(inside) == 2


@dataclass(eq=False)
class _Plan:
    """A module's forward in one mode, and what can be merged there."""

    graph: fx.Graph
    merges: list[_Merge]
    inlined: dict[str, nn.Module]
    identities: set[nn.Module]
    guards: list[Guard]
    asked: bool  # whether it is right only for the kind of arguments that was assumed
    asked_training: bool  # whether it is right only for the mode


def _put_back(graph: fx.Graph, sequential: str) -> None:
    """Puts a call of a Sequential in the place of those of what is in it."""
    inside = [
        node
        for node in graph.nodes
        if node.op == "call_module" and str(node.target).startswith(sequential + ".")
    ]
    if inside:  # else it was in another one that has been put back
        with graph.inserting_before(inside[0]):
            call = graph.call_module(sequential, (inside[0].args[0],))
        inside[-1].replace_all_uses_with(call)
        for node in reversed(inside):
            graph.erase_node(node)


def _places(owner: nn.Module, graph: fx.Graph, inlined: set[nn.Module]) -> Iterator[Guard]:
    """That what the graph calls is still where it was."""
    for module in inlined:
        yield Children(module, [*module._modules.items()])
    for node in graph.nodes:
        parent: nn.Module | None = owner
        for name in str(node.target).split(".") if node.op in ("call_module", "get_attr") else ():
            child = parent._modules.get(name) if parent is not None else None
            if parent is not None and child is not None and parent not in inlined:
                yield Held(parent, "_modules", name, child)
            parent = child


def _plan(owner: nn.Module, training: bool, tensors: bool, shared: set[nn.Module]) -> _Plan:
    kept = set(shared)  # Sequentials that can as well be a call, with a forward to fuse

    def looked_into(module: nn.Module) -> bool:
        free = module not in kept and not has_hooks(module)  # which the trace would call
        return free and is_plain_sequential(module) and _calls_frozen(module)

    found = trace(owner, training, tensors, looked_into)
    while found.repeated:  # two calls of one could not be told apart
        kept |= found.repeated
        found = trace(owner, training, tensors, looked_into)
    graph, inlined = found.graph, found.inlined
    identities = _skip_identities(owner, graph)
    while True:
        merges = _Matcher(owner, graph, shared).merges()
        uncrossed = {
            name: module
            for name, module in inlined.items()
            if not any(_crossed(name, merge) for merge in merges)
        }
        if not uncrossed:
            guards = once([*found.guards, *_places(owner, graph, {*inlined.values()})])
            asked = found.asked, found.asked_training
            return _Plan(graph, merges, inlined, identities, guards, *asked)
        for name in uncrossed:
            _put_back(graph, name)
        inlined = {name: m for name, m in inlined.items() if name not in uncrossed}


def _plans(owner: nn.Module, shared: set[nn.Module]) -> dict[Key, _Plan]:
    """The present mode comes last."""
    plans: dict[Key, _Plan] = {}
    for training in (owner.training, not owner.training):
        plan = _plan(owner, training, True, shared)
        variants = {True if plan.asked else None: plan}
        if plan.asked:
            with contextlib.suppress(CannotTrace):
                variants[False] = _plan(owner, training, False, shared)
        plans |= {(training, tensors): plan for tensors, plan in variants.items()}
        if not any(plan.asked_training for plan in variants.values()):
            plans |= {(not training, tensors): plan for tensors, plan in variants.items()}
            break
    return dict(reversed(plans.items()))


def _tell(owner: nn.Module, merge: _Merge, fold_conv: bool) -> None:
    for half in (merge, merge.other):
        if half is None:
            continue
        bn = owner.get_submodule(str(half.bn.target))
        assert isinstance(bn, _FrozenBatchNorm)
        folds = fold_conv and half.conv is not None
        fate = Fate(
            merged=merge.description(),
            folded_into=str(half.conv.target) if folds else "",  # type: ignore[union-attr]
            in_place=half.conv is not None
            and not folds
            and not merged.input_is_saved(bn, merge.activation),
        )
        if fate.merged or not bn.fate.merged:  # the forward of a container may never be called
            bn.fate = fate


def _fuse_forward(owner: nn.Module, fold_conv: bool, shared: set[nn.Module]) -> set[nn.Module]:
    """Returns the Sequentials that ``owner`` now runs through by itself."""
    plans = _plans(owner, shared)
    parts: set[nn.Module] = set()
    inlined: set[nn.Module] = set()
    traces: dict[_Plan, Traced] = {}
    for plan in dict.fromkeys(plans.values()):
        inlined |= {*plan.inlined.values()}
        parts |= plan.identities
        for merge in plan.merges:
            _tell(owner, merge, fold_conv)
            called = (str(node.target) for node in merge.parts() if node.op == "call_module")
            parts |= {*map(owner.get_submodule, called)}
            _rewrite(plan.graph, merge, fold_conv)
        traces[plan] = Traced(plan.graph, plan.guards)
    if any(plan.merges for plan in traces):
        chosen = {key: traces[plan] for key, plan in plans.items()}
        owner.forward = TracedForward(owner, chosen, parts | inlined)
    return inlined


def _tell_rest(root: nn.Module, shared: set[nn.Module]) -> None:
    for layer in root.modules():
        if isinstance(layer, _FrozenBatchNorm) and layer.fate == Fate():
            reason = "nothing next to it to merge with"
            if layer in shared:
                reason = "it has several places in the model"
            elif has_hooks(layer):
                reason = "it has hooks"
            elif _has_own_forward(layer):
                reason = f"{type(layer).__name__} has a forward of its own"
            layer.fate = Fate(reason=reason)


def shared_modules(root: nn.Module) -> set[nn.Module]:
    """Those that have several places in ``root``."""
    places = Counter(child for module in root.modules() for child in module._modules.values())
    return {module for module, count in places.items() if module is not None and count > 1}


def fuse_forwards(root: nn.Module, fold_conv: bool) -> None:
    """Fuses every frozen batch normalization in ``root`` that can be, in place."""
    unfuse_forwards(root)
    shared = shared_modules(root)
    inlined: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, _FrozenBatchNorm) or module in inlined or only_holds(module):
            continue
        if not _calls_frozen(module):
            continue
        try:
            inlined |= _fuse_forward(module, fold_conv, shared)
        except CannotTrace as reason:
            for layer in called(module):
                if layer.fate == Fate():
                    layer.fate = Fate(reason=f"{type(module).__name__}.forward: {reason}")
    _tell_rest(root, shared)


def unfuse_forwards(root: nn.Module) -> None:
    """Undoes :func:`fuse_forwards`."""
    for module in root.modules():
        own = vars(module).get("forward")
        if isinstance(getattr(own, "__func__", own), TracedForward):
            del vars(module)["forward"]
        if isinstance(module, _FrozenBatchNorm):
            module.fate = Fate()
