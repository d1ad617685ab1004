"""What reads what, by the sources of methods: of an instance, as its attributes are now. For
``summary`` and ``fold_for_inference``; nothing that runs depends on it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Hashable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .classes import made, only_holds, reasons
from .kinds import is_sequential
from .names import COMPREHENSIONS, SCOPES, outside
from .objects import UNKNOWN as UNKNOWN_OBJECT
from .objects import Objects, bound
from .source import LeftAlone, tree
from .uses import SIZES, UNKNOWN, Nodes, Sum, Uses, parts

_DEEPEST = 20  # methods that call each other
_LONGEST = 1000  # turns of a loop
_NOT_FOLLOWED = (ast.Nonlocal, ast.Global, ast.Match, ast.TryStar)

#: What can be asked of a tensor without using its values.
_ASKED = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda"}
_ASKED |= {"size", "dim", "numel", "stride", "is_contiguous"}
_HOLDING = ("_modules", "__dict__")
_QUESTIONS = ("len", "isinstance", "hasattr")


def uses_in(root: nn.Module) -> Uses:
    """By following each ``forward`` that calls frozen layers."""
    uses = Uses()
    modules = [m for m in root.modules() if not isinstance(m, _FrozenBatchNorm)]
    frozen = [m for m in modules if any(isinstance(c, _FrozenBatchNorm) for c in m.modules())]
    for module in frozen:
        if not only_holds(module) and not is_sequential(type(module)):
            _follow_forward(uses, module)
    inside = {c for m in modules if is_sequential(type(m)) for c in m.children()}
    for module in frozen:
        alone = module not in inside and uses.called.isdisjoint(parts(module))
        if alone and is_sequential(type(module)):
            uses.use(uses.chain([*parts(module)], UNKNOWN), None)
    return uses


def _follow_forward(uses: Uses, module: nn.Module) -> None:
    try:
        uses.use(_Run(uses, module, "forward", 0).returned, None)
    except LeftAlone as reason:
        for child in module.children():
            for layer in child.modules() if only_holds(child) else parts(child):
                uses.reasons[layer] = f"{type(module).__name__}.forward: {reason}"


class _Run:
    """One method, or inner function, followed statement by statement."""

    def __init__(
        self,
        uses: Uses,
        instance: nn.Module,
        name: str,
        depth: int,
        values: tuple[Nodes, ...] = (),
        node: ast.FunctionDef | None = None,
        outer: Mapping[str, Any] | None = None,
    ) -> None:
        self.uses, self.instance, self.name, self.depth = uses, instance, name, depth
        if name in reasons(instance):
            raise LeftAlone(reasons(instance)[name])
        info = made(instance)  # by its class, or the one that that was made from
        function: Any = getattr(info.written if info else type(instance), name, None)
        node = node or tree(function)[0]
        if any(isinstance(part, _NOT_FOLLOWED) for part in ast.walk(node)):
            raise LeftAlone("it has a statement that is not followed")
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        known = dict(outer or {})
        if outer is None:
            known[names.pop(0)] = instance
        self.objects = Objects(node, function.__globals__, known, uses.hand_on_all_of)
        self.captured = _captured(node)
        self.env: dict[str, Nodes] = dict(zip(names, values, strict=False))
        self.returned: Nodes = frozenset()
        self.block(node.body)
        self.returned = self.returned or UNKNOWN

    # Expressions

    def read(self, e: ast.AST | None) -> None:
        """By anything that is not known."""
        if isinstance(e, ast.expr):
            self.uses.use(self.value(e), None)
        elif isinstance(e, SCOPES):
            self.read_inside(e)
        elif e is not None:
            for child in ast.iter_child_nodes(e):
                self.read(child)

    def read_inside(self, scope: ast.AST) -> None:
        """By what has variables of its own."""
        before, own = self.env, _bound_in(scope)
        self.env = {name: nodes for name, nodes in before.items() if name not in own}
        for part in ast.iter_child_nodes(scope):
            self.read(part)
        self.env = before

    def value(self, e: ast.expr) -> Nodes:
        """What made the value of ``e``."""
        if isinstance(e, ast.Name):
            self.hand_on(self.objects.of(e))
            return self.env.get(e.id, UNKNOWN)
        if _only_asks(e):
            for part in ast.iter_child_nodes(e):
                if not isinstance(self.objects.of(part), nn.Module):  # type: ignore[arg-type]
                    self.read(part)
            return UNKNOWN
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            operands = self.value(e.left), self.value(e.right)
            if not any(isinstance(self.objects.of(p), int | float) for p in (e.left, e.right)):
                return self.sum(*operands)
            self.uses.use(operands[0] | operands[1], None)
            return UNKNOWN
        if isinstance(e, ast.IfExp):
            self.read(e.test)
            way = self.objects.decide(e.test)
            bodies = [b for b, w in ((e.body, True), (e.orelse, False)) if way in (None, w)]
            return frozenset().union(*map(self.value, bodies))
        if isinstance(e, ast.NamedExpr):
            self.env[e.target.id] = value = self.value(e.value)
            self.uses.use(value, None)
            return value
        if isinstance(e, ast.Call):
            return self.call(e)
        if isinstance(e, (ast.Lambda, *COMPREHENSIONS)):
            self.read_inside(e)
            return UNKNOWN
        if isinstance(e, ast.Attribute) and e.attr not in SIZES:
            held = self.objects.of(e), self.objects.of(e.value)  # somebody has it, or its weight
            for found in held if held[1] is not self.instance or e.attr in _HOLDING else held[:1]:
                self.hand_on(found)
            if not isinstance(e.value, ast.Name):
                self.read(e.value)
            elif e.attr not in _ASKED:
                self.uses.use(self.env.get(e.value.id, UNKNOWN), None)
            return UNKNOWN
        for child in ast.iter_child_nodes(e):
            self.read(child)
        return UNKNOWN

    def sum(self, a: Nodes, b: Nodes, into: bool = False) -> Nodes:
        node = Sum(a, b, into)
        self.uses.use(a | b, node)
        return frozenset({node})

    def call(self, e: ast.Call) -> Nodes:
        f, args = self.objects.of(e.func), e.args
        others = [*args[1:], *e.keywords]
        attribute = e.func.attr if isinstance(e.func, ast.Attribute) else ""
        if isinstance(f, nn.Module) and args:
            value = self.value(args[0])
            for other in others:
                self.read(other)
                self.uses.use(value, None)  # not what the steps merge
            return self.uses.chain([*parts(f)], value)
        owner = getattr(f, "__self__", None) if attribute == "forward" else None
        if isinstance(owner, nn.Module) and is_sequential(type(owner)) and args:
            self.uses.use(self.uses.chain([*parts(owner)], self.value(args[0])), None)
            return UNKNOWN
        if self._is_followed(f):
            values = tuple(map(self.value, args))
            for keyword in e.keywords:
                self.read(keyword)
            return self.follow(f, () if any(isinstance(a, ast.Starred) for a in args) else values)
        is_sum = f is torch.add or (f is UNKNOWN_OBJECT and attribute in ("add", "add_"))
        if is_sum and not e.keywords:
            operands = args if f is torch.add else [e.func.value, *args]  # type: ignore[attr-defined]
            if len(operands) == 2:
                a, b = map(self.value, operands)
                return self.sum(a, b, into=attribute == "add_")
        which = attribute if f is UNKNOWN_OBJECT else f
        known = activations.of_call(which, (), {}) if isinstance(f, Hashable) else None
        if known and known.name:
            named = [keyword.value for keyword in e.keywords[:1] if keyword.arg == "input"]
            operand = [*args, *named, e.func.value][0] if f is not UNKNOWN_OBJECT else e.func.value  # type: ignore[attr-defined]
            self.uses.use(self.value(operand), known.name)
            return UNKNOWN
        if isinstance(e.func, ast.Name) and e.func.id == "getattr":
            self.hand_on(self.objects.of(e))
            return UNKNOWN
        if isinstance(e.func, ast.Name) and e.func.id == "super":
            self.hand_on(self.instance)
        for child in ast.iter_child_nodes(e):
            inside = self.objects.of(child) if isinstance(child, ast.expr) else UNKNOWN_OBJECT
            if self._is_followed(inside):  # to be called by somebody: a checkpoint, say
                self.uses.use(self.follow(inside, ()), None)
            else:
                self.read(child)
        return UNKNOWN

    def _is_followed(self, f: Any) -> bool:
        own = isinstance(f, MethodType) and f.__self__ is self.instance
        return (own or isinstance(f, ast.FunctionDef)) and self.depth < _DEEPEST

    def follow(self, f: Any, values: tuple[Nodes, ...]) -> Nodes:
        if isinstance(f, ast.FunctionDef):
            inner = values, f, self.objects.known
            return _Run(self.uses, self.instance, self.name, self.depth + 1, *inner).returned
        name = f.__func__.__name__
        if getattr(type(self.instance), name, None) is f.__func__:  # else it goes by another name
            with contextlib.suppress(LeftAlone):
                return _Run(self.uses, self.instance, name, self.depth + 1, values).returned
        self.uses.use(frozenset().union(*values), None)
        self.hand_on(self.instance)
        return UNKNOWN

    def hand_on(self, found: Any) -> None:
        """To something that is not followed, if it is a module, or a method of the instance."""
        if self.instance in (found, getattr(found, "__self__", None)):
            self.uses.hand_on_all_of(self.instance)
        elif isinstance(found, nn.Module):
            self.uses.hand_on(found)

    # Statements

    def block(self, body: list[ast.stmt]) -> None:
        for s in body:
            self.statement(s)

    def ways(self, *bodies: list[ast.stmt]) -> None:
        """Any of them may run."""
        before, known = self.env, self.objects.known
        ends = []
        for body in bodies:
            self.env, self.objects.known = dict(before), dict(known)
            self.block(body)
            ends.append((self.env, self.objects.known))
        self.env = {
            name: frozenset().union(*(env.get(name, UNKNOWN) for env, _ in ends))
            for name in {name for env, _ in ends for name in env}
        }
        self.objects.known = {
            name: found if all(other.get(name) is found for _, other in ends) else UNKNOWN_OBJECT
            for _, known in ends
            for name, found in known.items()
        }

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign) and len(s.targets) == 1:
            self.assign(s.targets[0], s.value)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, s.value)
        elif isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            before, value = self.env.get(s.target.id, UNKNOWN), self.value(s.value)
            if isinstance(s.op, ast.Add):
                self.env[s.target.id] = self.sum(before, value, into=True)
            else:
                self.uses.use(before | value, None)
                self.env[s.target.id] = UNKNOWN
        elif isinstance(s, ast.Return):
            self.returned |= self.value(s.value) if s.value else UNKNOWN
        elif isinstance(s, ast.If):
            self.read(s.test)
            known = self.objects.decide(s.test)
            if known is None:
                self.ways(s.body, s.orelse)
            else:
                self.block(s.body if known else s.orelse)
        elif isinstance(s, ast.For | ast.While):
            self.loop(s)
        elif isinstance(s, ast.Try):
            handled = [[*start, *h.body] for h in s.handlers for start in (s.body, [])]
            self.ways(s.body, *handled)
            self.block([*s.orelse, *s.finalbody])
        elif isinstance(s, ast.With):
            for item in s.items:
                self.read(item.context_expr)
                self.forget(item)
            self.block(s.body)
        elif isinstance(s, ast.FunctionDef) and not [*outside(s)]:
            self.objects.known[s.name] = s
        else:
            self.read(s)
            self.forget(s)

    def forget(self, node: ast.AST) -> None:
        """The variables that it assigns."""
        for name in _bound_in(node):
            self.env[name], self.objects.known[name] = UNKNOWN, UNKNOWN_OBJECT

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = [*zip(target.elts, value.elts, strict=False)]
        values = [(to, self.objects.of(what), self.value(what)) for to, what in pairs]
        for (to, found, made_by), (_, what) in zip(values, pairs, strict=True):
            if isinstance(what, ast.Name) or not isinstance(to, ast.Name) or to.id in self.captured:
                self.uses.use(made_by, None)  # somebody else has it too
            for part in ast.walk(to):  # of to[...]
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                    self.read(part)
            self.forget(to)
            if isinstance(to, ast.Name):
                self.env[to.id], self.objects.known[to.id] = made_by, found

    def loop(self, s: ast.For | ast.While) -> None:
        items = self.objects.items(s.iter) if isinstance(s, ast.For) else []
        if not items:
            self.read(s.iter if isinstance(s, ast.For) else s.test)
        jumps = any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(s))
        for item in items[:_LONGEST] or [UNKNOWN_OBJECT, UNKNOWN_OBJECT]:
            if jumps:
                self.forget(s)
            if isinstance(s, ast.For):
                self.forget(s.target)
                self.objects.known |= bound(s.target, item)
            self.ways(s.body) if items else self.ways(s.body, [])
        if jumps:
            self.forget(s)
        self.block(s.orelse)


def _captured(node: ast.FunctionDef) -> set[str]:
    """The variables that functions inside read."""
    inner = [part for part in ast.walk(node) if isinstance(part, SCOPES) and part is not node]
    return {
        name.id
        for scope in inner
        for name in ast.walk(scope)
        if isinstance(name, ast.Name) and name.id not in _bound_in(scope)
    }


def _bound_in(node: ast.AST) -> set[str]:
    """The names that it binds, in it or behind it."""
    parts = [*ast.walk(node)]
    names = {n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.arg for n in parts if isinstance(n, ast.arg)}


def _only_asks(e: ast.expr) -> bool:
    """Whether it is a question about what it names, which is not used."""
    if isinstance(e, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in e.ops)
    return isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id in _QUESTIONS
