"""What reads what, by the sources of methods: of an instance, as its attributes are now. For
``summary`` and ``fold_for_inference``; nothing that runs depends on it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .classes import made, only_holds, reasons
from .kinds import is_sequential
from .objects import UNKNOWN, Objects, bound
from .source import LeftAlone, tree
from .uses import NONE, SIZES, Nodes, Sum, Uses, parts

_DEEPEST = 20  # methods that call each other
_LONGEST = 1000  # turns of a loop


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
            uses.use(uses.chain([*parts(module)], NONE), None)
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
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        known = dict(outer or {})
        if outer is None:
            known[names.pop(0)] = instance
        self.objects = Objects(node, function.__globals__, known, uses.use_any_of)
        self.env: dict[str, Nodes] = dict(zip(names, values, strict=False))
        self.returned = NONE
        self.block(node.body)

    # Expressions

    def read(self, e: ast.AST | None) -> None:
        """By anything that is not known."""
        if isinstance(e, ast.expr):
            self.uses.use(self.value(e), None)
        elif e is not None:
            for child in ast.iter_child_nodes(e):
                self.read(child)

    def value(self, e: ast.expr) -> Nodes:
        """What made the value of ``e``."""
        if isinstance(e, ast.Name):
            return self.env.get(e.id, NONE)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            operands = self.value(e.left), self.value(e.right)
            if not any(isinstance(self.objects.of(p), int | float) for p in (e.left, e.right)):
                return self.sum(*operands)
            self.uses.use(operands[0] | operands[1], None)
            return NONE
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
        if isinstance(e, ast.Lambda):
            self.read(e.body)
            return NONE
        if isinstance(e, ast.Attribute) and e.attr not in SIZES:
            for part in (e, e.value):
                held = self.objects.of(part)  # somebody has it, or its weight
                if isinstance(held, nn.Module) and held is not self.instance:
                    self.uses.use(frozenset({held}), None)
            if not isinstance(e.value, ast.Name):
                self.read(e.value)
            return NONE
        for child in ast.iter_child_nodes(e):
            self.read(child)
        return NONE

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
            return NONE
        if isinstance(f, MethodType | FunctionType | ast.FunctionDef) and self._is_followed(f):
            return self.follow(f, tuple(map(self.value, args)))
        if (f is torch.add or (f is UNKNOWN and attribute in ("add", "add_"))) and not e.keywords:
            operands = args if f is torch.add else [e.func.value, *args]  # type: ignore[attr-defined]
            if len(operands) == 2:
                a, b = map(self.value, operands)
                return self.sum(a, b, into=attribute == "add_")
        known = (
            activations.of_call(attribute if f is UNKNOWN else f, (), {}) if _hashable(f) else None
        )
        if known and known.name:
            named = [keyword.value for keyword in e.keywords[:1] if keyword.arg == "input"]
            operand = [*args, *named, e.func.value][0] if f is not UNKNOWN else e.func.value  # type: ignore[attr-defined]
            self.uses.use(self.value(operand), known.name)
            return NONE
        for child in ast.iter_child_nodes(e):
            inside = self.objects.of(child) if isinstance(child, ast.expr) else UNKNOWN
            if self._is_followed(inside):  # to be called by somebody: a checkpoint, say
                self.uses.use(self.follow(inside, ()), None)
            else:
                self.read(child)
        return NONE

    def _is_followed(self, f: Any) -> bool:
        own = isinstance(f, MethodType) and f.__self__ is self.instance
        return (own or isinstance(f, ast.FunctionDef)) and self.depth < _DEEPEST

    def follow(self, f: Any, values: tuple[Nodes, ...]) -> Nodes:
        if isinstance(f, ast.FunctionDef):
            inner = values, f, self.objects.known
            return _Run(self.uses, self.instance, self.name, self.depth + 1, *inner).returned
        try:
            name = f.__func__.__name__
            return _Run(self.uses, self.instance, name, self.depth + 1, values).returned
        except LeftAlone:
            self.uses.use(frozenset().union(*values), None)
            return NONE

    # Statements

    def block(self, body: list[ast.stmt]) -> None:
        for s in body:
            self.statement(s)

    def ways(self, *bodies: list[ast.stmt]) -> None:
        """Any of them may run."""
        before, ends = self.env, []
        for body in bodies:
            self.env = dict(before)
            self.block(body)
            ends.append(self.env)
        self.env = {
            n: frozenset().union(*(end.get(n, NONE) for end in ends))
            for n in {n for end in ends for n in end}
        }

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign) and len(s.targets) == 1:
            self.assign(s.targets[0], s.value)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, s.value)
        elif isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            before, value = self.env.get(s.target.id, NONE), self.value(s.value)
            if isinstance(s.op, ast.Add):
                self.env[s.target.id] = self.sum(before, value, into=True)
            else:
                self.uses.use(before | value, None)
                self.env[s.target.id] = NONE
        elif isinstance(s, ast.Return):
            self.returned |= self.value(s.value) if s.value else NONE
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
            self.ways(s.body, *([*s.body, *handler.body] for handler in s.handlers))
            self.block([*s.orelse, *s.finalbody])
        elif isinstance(s, ast.With):
            for item in s.items:
                self.read(item.context_expr)
            self.block(s.body)
        elif isinstance(s, ast.FunctionDef):
            self.objects.known[s.name] = s
        else:
            self.read(s)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = [*zip(target.elts, value.elts, strict=False)]
        for to, what in pairs:
            found, made_by = self.objects.of(what), self.value(what)
            if isinstance(what, ast.Name) or not isinstance(to, ast.Name):
                self.uses.use(made_by, None)  # somebody else has it too
            for part in ast.walk(to):
                if isinstance(part, ast.Name):
                    self.env[part.id] = made_by if part is to else NONE
                    self.objects.known[part.id] = found if part is to else UNKNOWN

    def loop(self, s: ast.For | ast.While) -> None:
        self.read(s.iter if isinstance(s, ast.For) else s.test)
        items = self.objects.items(s.iter) if isinstance(s, ast.For) else []
        for item in items[:_LONGEST] or [UNKNOWN, UNKNOWN]:
            for name, what in bound(s.target, item) if isinstance(s, ast.For) else ():
                self.objects.known[name] = what
            self.ways(s.body) if items else self.ways(s.body, [])
        self.block(s.orelse)


def _hashable(f: object) -> bool:
    return getattr(type(f), "__hash__", None) is not None
