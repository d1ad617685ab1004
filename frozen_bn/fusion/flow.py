"""What reads what, by the sources of methods: of an instance, as its attributes are now. For
``summary`` and ``fold_for_inference``; nothing that runs depends on it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from . import steps
from .classes import made, only_holds, reasons
from .source import LeftAlone, tree

UNKNOWN: Any = object()
_HELD = (dict, list, tuple, set, frozenset)
_COMPARISONS: dict[type[ast.cmpop], tuple[Callable[[Any, Any], Any], tuple[type, ...]]] = {
    ast.Is: (operator.is_, ()),
    ast.IsNot: (operator.is_not, ()),
    ast.Eq: (operator.eq, ()),
    ast.NotEq: (operator.ne, ()),
    ast.Gt: (operator.gt, ()),
    ast.Lt: (operator.lt, ()),
    ast.GtE: (operator.ge, ()),
    ast.LtE: (operator.le, ()),
    ast.In: (lambda a, b: a in b, _HELD),
    ast.NotIn: (lambda a, b: a not in b, _HELD),
}
_DEEPEST = 20  # methods that call each other
_LONGEST = 1000  # turns of a loop

#: What can be asked of a convolution without using it.
SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class Sum:
    """``a + b``, or ``a += b``."""

    def __init__(self, a: frozenset[Node], b: frozenset[Node], into: bool) -> None:
        self.a, self.b, self.into = a, b, into


#: What makes a value, or reads one: a layer, a sum, or the name of an activation.
Node = nn.Module | Sum | str
Nodes = frozenset[Node]
_NONE: Nodes = frozenset()


def sole(nodes: set[Any] | None) -> Any:
    """The one that is there, if it is only one."""
    return next(iter(nodes)) if nodes and len(nodes) == 1 else None


def is_free(module: Any) -> bool:
    """Whether it does what its class does, and nobody notices the call."""
    names = ("forward", "forward_pre", "backward", "backward_pre")
    return (
        isinstance(module, nn.Module)
        and "forward" not in vars(module)
        and not any(vars(module)[f"_{name}_hooks"] for name in names)
    )


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """What calling it calls: of a Sequential the layers in it, but for identities."""
    if steps.is_sequential(type(module)):
        for child in module._modules.values():
            yield from parts(child) if child is not None else ()
    elif type(module) is not nn.Identity:
        yield module


def method_of(instance: nn.Module, name: str) -> Any:
    """As the class has it that was made to be rewritten."""
    info = made(instance)
    return getattr(info.written if info else type(instance), name, None)


class Uses:
    """Which nodes read what each makes, and made what each reads; None for anything else."""

    def __init__(self, root: nn.Module) -> None:
        self.behind: dict[Node, set[Node | None]] = {}
        self.before: dict[Node, set[Node | None]] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.called: set[nn.Module] = set()
        modules = [m for m in root.modules() if not isinstance(m, _FrozenBatchNorm)]
        frozen = [m for m in modules if any(isinstance(c, _FrozenBatchNorm) for c in m.modules())]
        for module in frozen:
            if not only_holds(module) and not steps.is_sequential(type(module)):
                self._forward(module)
        inside = {c for m in modules if steps.is_sequential(type(m)) for c in m.children()}
        for module in frozen:
            alone = module not in inside and self.called.isdisjoint(parts(module))
            if alone and steps.is_sequential(type(module)):
                self.use(self.chain([*parts(module)], _NONE), None)

    def _forward(self, module: nn.Module) -> None:
        try:
            self.use(_Run(self, module, "forward", 0).returned, None)
        except LeftAlone as reason:
            for child in module.children():
                for layer in child.modules() if only_holds(child) else parts(child):
                    self.reasons[layer] = f"{type(module).__name__}.forward: {reason}"

    def use(self, made_by: Nodes, by: Node | None) -> None:
        for node in made_by:
            self.behind.setdefault(node, set()).add(by)
        if by is not None:
            self.before.setdefault(by, set()).update(made_by or {None})

    def chain(self, layers: list[nn.Module], value: Nodes) -> Nodes:
        """What comes out of layers that are called one after the other."""
        for layer in layers:
            self.called.add(layer)
            self.use(value, layer)
            known = steps.is_convolution(type(layer)) or isinstance(layer, _FrozenBatchNorm)
            known = known or activations.is_known(type(layer))
            value = frozenset({layer}) if known else _NONE
        return value


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
        self.uses, self.instance, self.depth = uses, instance, depth
        self.name, function = name, method_of(instance, name)
        self.globals = function.__globals__
        self.returned = _NONE
        if name in reasons(instance):
            raise LeftAlone(reasons(instance)[name])
        node = node or tree(function)[0]
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        self.objects: dict[str, Any] = dict(outer or {})
        if outer is None:
            self.objects[names.pop(0)] = instance
        self.env: dict[str, Nodes] = dict(zip(names, values, strict=False))
        inside = [*ast.walk(node)]
        self.locals = {part.arg for part in inside if isinstance(part, ast.arg)}
        self.locals |= {
            part.id
            for part in inside
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        self.block(node.body)

    # What is there

    def object(self, e: ast.expr | None) -> Any:
        """What ``e`` is, if that can be told: a constant, or an attribute of the instance."""
        try:
            return self._object(e)
        except Exception:  # of a property, or an index out of range
            return UNKNOWN

    def _object(self, e: ast.expr | None) -> Any:
        if isinstance(e, ast.Constant):
            return e.value
        if isinstance(e, ast.Name):
            known = UNKNOWN if e.id in self.locals else self.globals.get(e.id, UNKNOWN)
            return self.objects.get(e.id, known)
        if isinstance(e, ast.Attribute) and e.attr != "training":  # in either mode
            inside = self.object(e.value)
            own = isinstance(inside, nn.Module | ModuleType)
            return getattr(inside, e.attr, None) if own else UNKNOWN
        if isinstance(e, ast.Subscript):
            inside, index = self.object(e.value), self.object(e.slice)
            return self._item(inside, index)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add | ast.Sub):  # of an index
            a, b = self.object(e.left), self.object(e.right)
            if type(a) is int and type(b) is int:
                return a + b if isinstance(e.op, ast.Add) else a - b
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.args:
            inside = self.object(e.args[0])
            if e.func.id == "len" and isinstance(inside, nn.Module):
                return len(inside._modules)
            if e.func.id == "getattr" and isinstance(inside, nn.Module):
                name = self.object(e.args[1])
                return getattr(inside, name, None) if name is not UNKNOWN else self._any(inside)
        return UNKNOWN

    def _item(self, inside: Any, index: Any) -> Any:
        if not isinstance(inside, nn.ModuleList | nn.ModuleDict | nn.Sequential | list | tuple):
            return UNKNOWN
        if index is UNKNOWN and isinstance(inside, nn.Module):
            return self._any(inside)
        return inside[index] if index is not UNKNOWN else UNKNOWN

    def _any(self, holder: nn.Module) -> Any:
        """One of those held, nobody knows which."""
        for child in holder.children():
            self.uses.use(frozenset(parts(child)), None)
        return UNKNOWN

    def decide(self, test: ast.expr) -> bool | None:
        """What a test of the instance's attributes says."""
        if isinstance(test, ast.BoolOp):
            each = [self.decide(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in each else None if None in each else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.decide(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            a, b = self.object(test.left), self.object(test.comparators[0])
            compare, kinds = _COMPARISONS.get(type(test.ops[0]), (None, ()))
            known = _is_plain(a) and (_is_plain(b) or isinstance(b, kinds))
            return bool(compare(a, b)) if known and compare else None
        found = self.object(test)
        return bool(found) if _is_plain(found) else None

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
            return self.env.get(e.id, _NONE)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            operands = self.value(e.left), self.value(e.right)
            if not any(isinstance(self.object(p), int | float) for p in (e.left, e.right)):
                return self.sum(*operands)
            self.uses.use(operands[0] | operands[1], None)
            return _NONE
        if isinstance(e, ast.IfExp):
            self.read(e.test)
            way = self.decide(e.test)
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
            return _NONE
        if isinstance(e, ast.Attribute) and e.attr not in SIZES:
            for held in (self.object(e), self.object(e.value)):  # somebody has it, or its weight
                if isinstance(held, nn.Module) and held is not self.instance:
                    self.uses.use(frozenset({held}), None)
            if not isinstance(e.value, ast.Name):
                self.read(e.value)
            return _NONE
        for child in ast.iter_child_nodes(e):
            self.read(child)
        return _NONE

    def sum(self, a: Nodes, b: Nodes, into: bool = False) -> Nodes:
        node = Sum(a, b, into)
        self.uses.use(a | b, node)
        return frozenset({node})

    def call(self, e: ast.Call) -> Nodes:
        f, args = self.object(e.func), e.args
        others = [*args[1:], *e.keywords]
        attribute = e.func.attr if isinstance(e.func, ast.Attribute) else ""
        if isinstance(f, nn.Module) and args:
            value = self.value(args[0])
            for other in others:
                self.read(other)
                self.uses.use(value, None)  # not what the steps merge
            return self.uses.chain([*parts(f)], value)
        owner = getattr(f, "__self__", None) if attribute == "forward" else None
        if isinstance(owner, nn.Module) and steps.is_sequential(type(owner)) and args:
            self.uses.use(self.uses.chain([*parts(owner)], self.value(args[0])), None)
            return _NONE
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
            return _NONE
        for child in ast.iter_child_nodes(e):
            inside = self.object(child) if isinstance(child, ast.expr) else UNKNOWN
            if self._is_followed(inside):  # to be called by somebody: a checkpoint, say
                self.uses.use(self.follow(inside, ()), None)
            else:
                self.read(child)
        return _NONE

    def _is_followed(self, f: Any) -> bool:
        own = isinstance(f, MethodType) and f.__self__ is self.instance
        return (own or isinstance(f, ast.FunctionDef)) and self.depth < _DEEPEST

    def follow(self, f: Any, values: tuple[Nodes, ...]) -> Nodes:
        if isinstance(f, ast.FunctionDef):
            inner = values, f, self.objects
            return _Run(self.uses, self.instance, self.name, self.depth + 1, *inner).returned
        try:
            name = f.__func__.__name__
            return _Run(self.uses, self.instance, name, self.depth + 1, values).returned
        except LeftAlone:
            self.uses.use(frozenset().union(*values), None)
            return _NONE

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
            n: frozenset().union(*(end.get(n, _NONE) for end in ends))
            for n in {n for end in ends for n in end}
        }

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign) and len(s.targets) == 1:
            self.assign(s.targets[0], s.value)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, s.value)
        elif isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            before, value = self.env.get(s.target.id, _NONE), self.value(s.value)
            if isinstance(s.op, ast.Add):
                self.env[s.target.id] = self.sum(before, value, into=True)
            else:
                self.uses.use(before | value, None)
                self.env[s.target.id] = _NONE
        elif isinstance(s, ast.Return):
            self.returned |= self.value(s.value) if s.value else _NONE
        elif isinstance(s, ast.If):
            self.read(s.test)
            known = self.decide(s.test)
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
            self.objects[s.name] = s
        else:
            self.read(s)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = [*zip(target.elts, value.elts, strict=False)]
        for to, what in pairs:
            found, made_by = self.object(what), self.value(what)
            if isinstance(what, ast.Name) or not isinstance(to, ast.Name):
                self.uses.use(made_by, None)  # somebody else has it too
            for part in ast.walk(to):
                if isinstance(part, ast.Name):
                    self.env[part.id] = made_by if part is to else _NONE
                    self.objects[part.id] = found if part is to else UNKNOWN

    def loop(self, s: ast.For | ast.While) -> None:
        self.read(s.iter if isinstance(s, ast.For) else s.test)
        items = self.items(s.iter) if isinstance(s, ast.For) else []
        for item in items[:_LONGEST] or [UNKNOWN, UNKNOWN]:
            for name, what in _bound(s.target, item) if isinstance(s, ast.For) else ():
                self.objects[name] = what
            self.ways(s.body) if items else self.ways(s.body, [])
        self.block(s.orelse)

    def items(self, e: ast.expr) -> list[Any]:
        """What a loop over layers runs over."""
        if isinstance(e, ast.Tuple | ast.List):
            return [
                tuple(map(self.object, x.elts)) if isinstance(x, ast.Tuple) else self.object(x)
                for x in e.elts
            ]
        if isinstance(e, ast.Call):
            name = e.func.attr if isinstance(e.func, ast.Attribute) else getattr(e.func, "id", "")
            if name == "range":
                limits = [*map(self.object, e.args)]
                known = all(isinstance(limit, int) for limit in limits)
                return [*range(*limits)] if known else []
            if name in ("zip", "enumerate", "reversed"):
                each = [self.items(argument) for argument in e.args]
                return [*{"zip": zip, "enumerate": enumerate, "reversed": reversed}[name](*each)]
            found = self.object(e.func.value) if isinstance(e.func, ast.Attribute) else None
            if isinstance(found, nn.Module) and name in ("values", "children"):
                return [*found._modules.values()]
            if isinstance(found, nn.Module) and name in ("items", "named_children"):
                return [*found._modules.items()]
            return []
        found = self.object(e)
        held = any(
            isinstance(found, kind) and type(found).__iter__ is kind.__iter__
            for kind in (nn.ModuleList, nn.Sequential)
        )
        return [*found._modules.values()] if held else []


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | nn.Module)


def _hashable(f: object) -> bool:
    return getattr(type(f), "__hash__", None) is not None


def _bound(target: ast.expr, item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, ast.Name):
        yield target.id, item
    elif isinstance(target, ast.Tuple):
        known = isinstance(item, tuple)
        for part, value in zip(target.elts, item if known else [UNKNOWN] * 99, strict=False):
            yield from _bound(part, value)
