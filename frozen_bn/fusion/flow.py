"""What reads what, by the sources of methods: of an instance, as its attributes are now. For
``summary`` and ``fold_for_inference``; nothing that runs depends on it."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Hashable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .classes import made, only_holds, reasons
from .kinds import is_sequential
from .names import COMPREHENSIONS, SCOPES, bound_in, outside
from .objects import UNKNOWN as UNKNOWN_OBJECT
from .objects import Objects, bound
from .source import LeftAlone, tree
from .uses import SIZES, UNKNOWN, Nodes, Sum, Uses, parts

_DEEPEST = 20  # methods that call each other
_LONGEST = 1000  # turns of a loop
_MOST_RUNS = 1000  # of methods and inner functions, for one forward
_NOT_FOLLOWED = (ast.Nonlocal, ast.Global, ast.Match, ast.TryStar)

#: Whose functions call a Sequential that they are given from its first layer to its last.
_CALL_THE_WHOLE = ("torch.", "timm.")

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
    uses.runs = 0
    try:
        if "forward" in vars(module):
            raise LeftAlone("the instance has another")
        uses.use(_Run(uses, module, "forward", 0).returned, None)
    except LeftAlone as reason:
        uses.hand_on_all_of(module)
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
        function = getattr(info.written if info else type(instance), name, None)
        uses.runs += 1
        if not isinstance(function, FunctionType) or uses.runs > _MOST_RUNS:
            raise LeftAlone("it is no function, or calls too many")
        node = node or tree(function)[0]
        if any(map(_is_not_followed, ast.walk(node))):
            raise LeftAlone("it has a statement that is not followed")
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        known = {n: found for n, found in (outer or {}).items() if n not in bound_in(node)}
        if outer is None:
            if not names:
                raise LeftAlone("it names no self")
            known[names.pop(0)] = instance
        self.objects = Objects(node, function.__globals__, known, uses.hand_on_all_of)
        self.env: dict[str, Nodes] = dict(zip(names, values, strict=False))
        self.called: set[tuple[nn.Module, Nodes]] = set()
        self.captured = _captured(node)
        for name in self.captured & {*self.env}:
            uses.use(self.env[name], None)
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
        if isinstance(scope, ast.ListComp) and len(scope.generators) == 1 and self.turns(scope):
            return
        env, known, own = self.env, self.objects.known, bound_in(scope)
        later = isinstance(scope, (*SCOPES, ast.GeneratorExp))  # it runs when variables are others
        self.env = {} if later else {n: nodes for n, nodes in env.items() if n not in own}
        self.objects.known = known | dict.fromkeys(own, UNKNOWN_OBJECT)
        for part in ast.iter_child_nodes(scope):
            self.read(part)
        self.env, self.objects.known = env, known

    def turns(self, e: ast.ListComp) -> bool:
        """Follows it as what it is, a loop, if that can be done."""
        (generator,) = e.generators
        items = self.items(generator)
        if not items:
            return False
        env, known = dict(self.env), dict(self.objects.known)
        for item in items:
            self.turn(generator.target, item)
            for part in (*generator.ifs, e.elt):
                self.read(part)
        self.env, self.objects.known = env, known
        return True

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
            value = self.value(e.value)
            self.uses.use(value, None)
            self.forget(e.target)
            self.env[e.target.id] = value
            return value
        if isinstance(e, ast.Call):
            return self.call(e)
        if isinstance(e, (ast.Lambda, *COMPREHENSIONS)):
            self.read_inside(e)
            return UNKNOWN
        if isinstance(e, ast.Attribute):
            self.read_attribute(e)
            return UNKNOWN
        for child in ast.iter_child_nodes(e):
            self.read(child)
        return UNKNOWN

    def read_attribute(self, e: ast.Attribute) -> None:
        owner = self.objects.of(e.value)
        if isinstance(owner, nn.Module) and (e.attr in SIZES or owner is self.instance):
            self.hand_on(owner if e.attr in _HOLDING else self.objects.of(e))
        elif not isinstance(e.value, ast.Name):
            self.read(e.value)
        elif e.attr not in _ASKED:
            self.hand_on(owner)  # somebody has its weight, say
            self.hand_on(self.objects.of(e))
            self.uses.use(self.env.get(e.value.id, UNKNOWN), None)

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
            if (f, value) in self.called:  # with what it has been called with before
                self.hand_on(f)
            elif value != UNKNOWN:
                self.called.add((f, value))
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
        whole = str(getattr(f, "__module__", "")).startswith(_CALL_THE_WHOLE)
        for child in ast.iter_child_nodes(e):
            inside = self.objects.of(child) if isinstance(child, ast.expr) else UNKNOWN_OBJECT
            if whole and isinstance(inside, nn.Module) and is_sequential(type(inside)):
                self.uses.hand_on_the_whole(inside)
            else:
                self.read(child)
        return UNKNOWN

    def _is_followed(self, f: Any) -> bool:
        own = isinstance(f, MethodType) and f.__self__ is self.instance
        return (own or isinstance(f, ast.FunctionDef)) and self.depth < _DEEPEST

    def follow(self, f: Any, values: tuple[Nodes, ...]) -> Nodes:
        if isinstance(f, ast.FunctionDef):
            outer = dict.fromkeys(self.objects.locals, UNKNOWN_OBJECT) | self.objects.known
            inner = self.name, self.depth + 1, values, f, outer
            return _Run(self.uses, self.instance, *inner).returned
        name = f.__func__.__name__
        if getattr(type(self.instance), name, None) is f.__func__:  # else it goes by another name
            with contextlib.suppress(LeftAlone):
                return _Run(self.uses, self.instance, name, self.depth + 1, values).returned
        self.uses.use(frozenset().union(*values), None)
        self.hand_on(self.instance)
        return UNKNOWN

    def hand_on(self, found: Any) -> None:
        """What ``found`` is, or holds, to something that is not followed."""
        if self._is_followed(found):  # to be called by somebody: a checkpoint, say
            self.uses.use(self.follow(found, ()), None)
        elif found is self.instance or isinstance(found, ast.FunctionDef):
            self.uses.hand_on_all_of(self.instance)
        elif isinstance(found, nn.Module):
            self.uses.hand_on(found)
        elif isinstance(found, MethodType):
            self.hand_on(found.__self__)
        elif isinstance(found, functools.partial):
            self.hand_on([found.func, *found.args, *found.keywords.values()])
        elif isinstance(found, dict | list | tuple | set | frozenset):
            for part in found.values() if isinstance(found, dict) else found:
                if not isinstance(part, dict | list | tuple | set | frozenset):
                    self.hand_on(part)

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
        self.objects.known = known
        for name in {name for _, found in ends for name in found}:
            each = [found.get(name, UNKNOWN_OBJECT) for _, found in ends]
            known[name] = each[0]
            if any(found is not each[0] for found in each):  # any of these
                flat = [x for f in each for x in (f if isinstance(f, frozenset) else [f])]
                several = [x for x in flat if isinstance(x, ast.FunctionDef | nn.Module)]
                known[name] = frozenset(several) if several else UNKNOWN_OBJECT

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign) and len(s.targets) == 1:
            self.assign(s.targets[0], s.value)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, s.value)
        elif isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            before, value = self.env.get(s.target.id, UNKNOWN), self.value(s.value)
            self.forget(s.target)
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
            for body in (s.body, *(handler.body for handler in s.handlers), s.orelse, s.finalbody):
                self.ways(body, [])
                self.lose(s)
        elif isinstance(s, ast.With):
            for item in s.items:
                self.read(item.context_expr)
                self.forget(item)
            self.block(s.body)
            if not all(map(self.lets_exceptions_pass, s.items)):
                self.lose(s)
        elif isinstance(s, ast.FunctionDef) and not outside(s):
            self.objects.known[s.name] = s
        else:
            self.read(s)
            self.forget(s)

    def lets_exceptions_pass(self, item: ast.withitem) -> bool:
        e = item.context_expr
        made_by = self.objects.of(e.func) if isinstance(e, ast.Call) else UNKNOWN_OBJECT
        return str(getattr(made_by, "__module__", "")).startswith("torch.")

    def lose(self, node: ast.AST) -> None:
        """The variables that it assigns, nobody knows whether and how often; they may be read."""
        for name in bound_in(node):
            self.uses.use(self.env.get(name, UNKNOWN), None)
            self.hand_on(self.objects.known.get(name))
        self.forget(node)

    def forget(self, node: ast.AST) -> None:
        """The variables that it assigns."""
        for name in bound_in(node):
            self.env[name], self.objects.known[name] = UNKNOWN, UNKNOWN_OBJECT
        places = [p for p in ast.walk(node) if isinstance(p, ast.Attribute | ast.Subscript)]
        for place in places:
            if not isinstance(place.ctx, ast.Load):
                self.written(place)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            both = target.elts, value.elts
            if not any(isinstance(part, ast.Starred) for parts in both for part in parts):
                pairs = [*zip(*both, strict=False)]
        values = [(to, self.objects.of(what), self.assigned(to, what)) for to, what in pairs]
        for (to, found, made_by), (_, what) in zip(values, pairs, strict=True):
            if isinstance(what, ast.Name) or not isinstance(to, ast.Name) or to.id in self.captured:
                self.uses.use(made_by, None)  # somebody else has it too
            self.forget(to)
            if isinstance(to, ast.Name):
                self.env[to.id] = made_by
                if to.id not in self.captured:
                    self.objects.known[to.id] = found

    def written(self, target: ast.expr) -> None:
        """To x[...] or x.y, which others may have; and the instance was read as it was before."""
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                self.uses.use(self.env.get(part.id, UNKNOWN), None)
                held = target.value if isinstance(target, ast.Subscript) else None
                if not isinstance(self.objects.of(held), dict):  # a cache, say
                    self.hand_on(self.objects.of(part))

    def assigned(self, to: ast.expr, what: ast.expr) -> Nodes:
        """What made what is assigned. Another name of a layer is followed."""
        follows = isinstance(to, ast.Name) and to.id not in self.captured
        alias = follows and isinstance(self.objects.of(what), nn.Module)
        return UNKNOWN if alias else self.value(what)

    def loop(self, s: ast.For | ast.While) -> None:
        items = self.items(s) if isinstance(s, ast.For) else []
        if not items:
            self.lose(s)
            self.read(s.iter if isinstance(s, ast.For) else s.test)
            self.ways(s.body, [])
            self.lose(s)
            self.block(s.orelse)
            return
        jumps = any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(s))
        for item in items:
            if jumps:
                self.lose(s)
            self.turn(s.target, item)  # type: ignore[union-attr]
            self.block(s.body)
        if jumps:
            self.lose(s)
        self.block(s.orelse)

    def items(self, s: ast.For | ast.comprehension) -> list[Any]:
        """What its variables are in each turn; nothing, if it is not followed turn by turn."""
        items = self.objects.items(s.iter)
        simple = all(isinstance(part, ast.Name) for part in _flat(s.target))
        return items if simple and len(items) <= _LONGEST else []

    def turn(self, target: Any, item: Any) -> None:
        """Of a loop: the variables of ``target`` are what ``item`` is."""
        self.forget(target)
        if isinstance(target, ast.Tuple) and not isinstance(item, tuple):
            self.hand_on(item)
        for name, found in bound(target, item):
            if name in self.captured:
                self.hand_on(found)
            else:
                self.objects.known[name] = found


def _captured(node: ast.FunctionDef) -> set[str]:
    """The variables that functions inside read."""
    later = (*SCOPES, ast.GeneratorExp)
    inner = [part for part in ast.walk(node) if isinstance(part, later) and part is not node]
    return {
        name.id
        for scope in inner
        for name in ast.walk(scope)
        if isinstance(name, ast.Name) and name.id not in bound_in(scope)
    }


def _is_not_followed(part: ast.AST) -> bool:
    name = part.attr if isinstance(part, ast.Attribute) else ""
    private = name.startswith("__") and not name.endswith("__")
    return private or isinstance(part, _NOT_FOLLOWED)


def _flat(target: ast.expr) -> list[ast.expr]:
    """The targets in it."""
    if not isinstance(target, ast.Tuple):
        return [target]
    return [inner for part in target.elts for inner in _flat(part)]


def _only_asks(e: ast.expr) -> bool:
    """Whether it is a question about what it names, which is not used."""
    if isinstance(e, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in e.ops)
    return isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id in _QUESTIONS
