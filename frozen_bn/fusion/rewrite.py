"""A method's source with steps in the place of the calls of layers, of activations, and of sums.

What a step returns may be pending (``pending``). It may be handed to another step at once, or
wait in a local variable for one. For that it has to be true that

- every other read of such a variable goes through ``steps.value``;
- nothing reads the variable after the step that takes what waits there (``_consumed``);
- nothing is called between two steps that could change what the first was given, unless the first
  works on what nothing else has: else ``steps.settle`` has it computed (``waiting``, ``_kept``).

So no more has to be known of a variable than its name (``names``). What a step does with what it is
given is decided when it runs.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import torch

from . import source, waiting
from .names import (
    COMPREHENSIONS,
    Method,
    Names,
    Path,
    is_pure,
    loads,
    outside,
    own,
    position,
    target,
)
from .source import LeftAlone

Node = TypeVar("Node", bound=ast.AST)

#: With these, a function sees its variables otherwise than by reading them.
_REFUSED = {"locals", "vars", "eval", "exec", "f_locals", "_getframe", "currentframe"}

_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_BORDERED = (ast.With, ast.AsyncWith, ast.Try, ast.TryStar)


class Rewritten(NamedTuple):
    """A method with steps.

    Where it may return what is pending, there is a second one that does. A step that calls the
    first finds it there, as ``function._pending = function, pending``, and calls it instead: all
    others get what is computed. (The first of the pair tells a copy of the attribute from it.)
    """

    function: FunctionType
    pending: FunctionType | None
    text: str
    paths: frozenset[Path]  # what the steps call


class _Scope:
    """Rewrites one function; ``code`` is what it was compiled to, ``pending``, that it returns what
    is pending."""

    def __init__(
        self, method: Method, node: ast.FunctionDef, code: CodeType, pending: bool
    ) -> None:
        self.method, self.code = method, code
        self.names = Names(method, node, code, pending)
        reads = sorted((n for s in node.body for n in loads(s)), key=position)
        self.last = {n.id: n for n in reads}
        self.loops: list[ast.stmt] = []
        self.first: dict[int, list[ast.stmt]] = {}  # what is to be done first in a block
        self.bordered = self.inner = 0  # in how many with and try, comprehensions and lambdas
        self.unit: ast.AST = node  # what is evaluated as one
        self.returned = False  # whether it returns what is pending
        self.body = self.block(node.body, [])

    # Expressions

    def step(self, name: str, *args: ast.expr, at: ast.AST, keywords: Any = ()) -> ast.expr:
        function = ast.Attribute(ast.Name(self.method.steps, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(function, [*args], [*keywords]), at)

    def raw(self, e: ast.expr, *later: ast.AST) -> ast.expr:
        """``e``, which may be pending. ``later`` is evaluated before that is used."""
        if isinstance(e, ast.Name):
            if not self.names.may_wait(e) or not self._consumed(e):
                return self.plain(e)
            new: ast.expr = e
        elif not self.names.is_step(e):
            return self.plain(e)
        elif isinstance(e, ast.BinOp):
            new = self.step("add", self.raw(e.left, e.right), self.raw(e.right), at=e)
        else:
            new = self._call(cast(ast.Call, e))
        return self._kept(new, later)

    def _kept(self, new: ast.expr, later: Sequence[ast.AST]) -> ast.expr:
        """``new``, as far computed as ``later`` makes it necessary."""
        if all(map(is_pure, later)):
            return new
        harmless = all(map(self.names.is_harmless, later))
        return self.step("settle" if harmless else "value", new, at=new)

    def _call(self, e: ast.Call) -> ast.expr:
        args, keywords = self.names.arguments(e)
        if self.names.is_method(e):
            f = cast(ast.Attribute, e.func)
            first = self.raw(f.value, *args)
            others = [self.raw(a) if f.attr == "add" else self.plain(a) for a in args]
            return self.step("method", first, ast.Constant(f.attr), *others, at=e)
        if self.names.function_of(e.func) is torch.add and len(args) == 2 and not keywords:
            a, b = self.raw(args[0], args[1]), self.raw(args[1])
            return self.step("add", a, b, self.plain(e.func), at=e)
        path = self.names.path(e.func)
        if path is not None:
            self.method.paths.add(path)
        first = self.raw(args[0], *args[1:], *keywords)
        others = [self.plain(a) for a in args[1:]]
        named = [self.rebuilt(k) for k in keywords]
        name = "call_with" if others or named else "call"
        return self.step(name, self.plain(e.func), first, *others, at=e, keywords=named)

    def plain(self, e: ast.expr) -> ast.expr:
        """``e``, computed."""
        if isinstance(e, ast.Name):
            read = self.names.may_wait(e) and isinstance(e.ctx, ast.Load)
            return self.step("value", e, at=e) if read else e
        if self.names.is_given_pending(e):
            return self.step("value", self.raw(e), at=e)
        inner = isinstance(e, (ast.Lambda, *COMPREHENSIONS))
        self.inner += inner
        new = self.rebuilt(e)
        self.inner -= inner
        return new

    def rebuilt(self, node: Node) -> Node:
        """A copy, in which every expression is computed."""
        new = copy.copy(node)
        for name, value in ast.iter_fields(node):
            setattr(new, name, self._field(value))
        return new

    def _field(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._field(part) for part in value]
        if isinstance(value, ast.expr):
            return self.plain(value)
        return self.rebuilt(value) if isinstance(value, ast.AST) else value

    def _consumed(self, name: ast.Name) -> bool:
        """Whether nothing reads what the variable has now, after this."""
        s = self.unit
        if self.inner or sum(n.id == name.id for n in loads(s)) != 1:
            return False
        if isinstance(s, ast.Return) and not self.bordered:
            return True
        if target(s) == name.id:  # whatever comes next finds the new value, or an exception
            if not self.bordered or isinstance(s, ast.AugAssign):
                return True
            # A handler may read the old value: nothing but the step itself may raise after this.
            value = cast(ast.Call, cast(Any, s).value)
            alone = isinstance(value, ast.Call) and value.args[:1] == [name]
            if alone and all(isinstance(a, ast.Constant) for a in value.args[1:]):
                return not value.keywords
        return self.last.get(name.id) is name and (not self.loops or self._is_new(name.id))

    def _is_new(self, name: str) -> bool:
        """Whether each turn of the loop begins by assigning it."""
        body = cast(ast.For, self.loops[-1]).body
        first = next((s for s in body if name in self.names.inside(s)), body[0])
        inside = {n for s in body for n in loads(s)}
        others = {n for n in loads(self.loops[0]) if n.id == name} - inside
        return target(first) == name and not others and all(n.id != name for n in loads(first))

    # Statements

    def block(self, body: Sequence[ast.stmt], rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        pairs = [(s, [*body[i + 1 :], *rest]) for i, s in enumerate(body)]
        first = self.first.get(id(body), [])
        return [*first, *(new for s, after in pairs for new in self.statement(s, after))]

    def statement(self, s: ast.stmt, rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        self.unit = s
        if isinstance(s, ast.FunctionDef):
            return self.function(s)
        if isinstance(s, ast.ClassDef | ast.AsyncFunctionDef):
            return [self._defined(s)]
        if isinstance(s, (ast.If, ast.Match, *_LOOPS, *_BORDERED)):
            return [self.compound(s, rest)]
        name = target(s)
        if name is not None and name in self.names.waiting:
            return self.assignment(s, name, rest)
        if isinstance(s, ast.Return) and s.value and self.names.pending and not self.bordered:
            value = self.raw(s.value)
            self.returned |= self.names.is_step(s.value) or self.names.may_wait(s.value)
            return [ast.copy_location(ast.Return(value), s)]
        return [self.rebuilt(s)]

    def assignment(self, s: Any, name: str, rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        if isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Add):
            read: ast.expr = ast.copy_location(ast.Name(name, ast.Load()), s)
            a = read if self._consumed(cast(ast.Name, s.target)) else self.step("value", read, at=s)
            value = self.step("iadd", self._kept(a, [s.value]), self.raw(s.value), at=s)
        elif isinstance(s, ast.AugAssign):
            return [self.computed(name, "value", at=s), self.rebuilt(s)]
        elif not self.names.is_step(s.value):
            return [self.rebuilt(s)]
        else:
            value = self.raw(s.value)
        names = self.names
        if not waiting.is_worth_it(names, name, rest, bool(self.bordered)):
            value = self.step("value", value, at=s)
        elif not (waiting.is_read_at_once(names, name, rest) or self.in_a_branch(name, rest)):
            value = self.step(waiting.until(names, name, rest), value, at=s)
        return [self.assigned(name, value, at=s)]

    def assigned(self, name: str, value: ast.expr, at: ast.AST) -> ast.stmt:
        return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), at)

    def computed(self, name: str, step: str, at: ast.AST) -> ast.stmt:
        """``name = step(name)``"""
        return self.assigned(name, self.step(step, ast.Name(name, ast.Load()), at=at), at)

    def in_a_branch(self, name: str, rest: Sequence[ast.stmt]) -> bool:
        """Whether what the variable has is best computed where it has to be: at the beginning of
        one branch of an ``if`` that follows."""
        s = rest[0] if rest else None
        if not isinstance(s, ast.If) or not is_pure(s.test) or name in self.names.inside(s.test):
            return False
        ways = [(block, [*block, *rest[1:]]) for block in (s.body, s.orelse)]
        called = [way for way in ways if not waiting.is_read_at_once(self.names, name, way[1])]
        if len(called) != 1 or not called[0][0]:
            return False
        block, way = called[0]
        first = self.computed(name, waiting.until(self.names, name, way), at=block[0])
        self.first.setdefault(id(block), []).append(first)
        return True

    def compound(self, s: ast.stmt, rest: Sequence[ast.stmt]) -> ast.stmt:
        """A statement with blocks."""
        bordered, loop = isinstance(s, _BORDERED), isinstance(s, _LOOPS)
        self.bordered += bordered
        after: Sequence[ast.stmt] = [] if bordered else rest

        def inside(node: Node) -> Node:
            new = copy.copy(node)
            for field, value in ast.iter_fields(node):
                if field == "body" and loop:
                    self.loops.append(s)
                    new.body = self.block(value, [*value, *after])  # type: ignore[attr-defined]
                    self.loops.pop()
                elif field in ("body", "orelse", "finalbody"):
                    setattr(new, field, self.block(value, after))
                elif field in ("handlers", "cases"):
                    setattr(new, field, [inside(part) for part in value])
                else:
                    # A condition, say. That of a `while` is evaluated again and again.
                    self.unit = ast.Tuple(value if isinstance(value, list) else [value])
                    self.inner += isinstance(s, ast.While)
                    setattr(new, field, self._field(value))
                    self.inner -= isinstance(s, ast.While)
            return new

        new = inside(s)
        self.bordered -= bordered
        return new

    def _defined(self, s: Node) -> Node:
        """A function or class, where it is defined."""
        new = copy.copy(s)
        for field in ("decorator_list", "bases", "keywords", "args"):
            if hasattr(s, field):
                setattr(new, field, self._field(getattr(s, field)))
        return new

    def function(self, s: ast.FunctionDef) -> list[ast.stmt]:
        """An inner function; and one that returns what is pending."""
        inside = [c for c in self.code.co_consts if isinstance(c, CodeType)]
        codes = [
            c for c in inside if (c.co_firstlineno, c.co_name) == (source.first_line(s), s.name)
        ]
        new, raw = self._defined(s), copy.copy(s)
        if len(codes) != 1 or any(isinstance(p, ast.Yield | ast.YieldFrom) for p in own(s.body)):
            return [new]
        new.body = _Scope(self.method, s, codes[0], pending=False).body
        scope = _Scope(self.method, s, codes[0], pending=True)
        raw.body, raw.name = scope.body, self.method.new_name(f"{s.name}_pending")
        if not scope.returned or outside(s):  # evaluated once, where it is defined
            return [new]
        itself = ast.Name(s.name, ast.Load())
        both = ast.Tuple([itself, ast.Name(raw.name, ast.Load())], ast.Load())
        hand = ast.Assign([ast.Attribute(itself, "_pending", ast.Store())], both)
        raw.returns, raw.args = None, source.bare(s.args)
        return [new, raw, ast.fix_missing_locations(ast.copy_location(hand, s))]


def _prologue(method: Method, node: ast.FunctionDef, name: str) -> ast.stmt:
    """``if steps.aside(...): return owner.forward(self, ...)``: the class's own method."""
    a = node.args
    given = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    given += [f"*{a.vararg.arg}"] if a.vararg else []
    given += [f"{arg.arg}={arg.arg}" for arg in a.kwonlyargs]
    given += [f"**{a.kwarg.arg}"] if a.kwarg else []
    itself = f"{method.owner}.{name}"
    text = (
        f"if {method.steps}.aside({itself}, {method.written}): return {itself}({', '.join(given)})"
    )
    (statement,) = ast.parse(text).body
    for part in ast.walk(statement):
        ast.copy_location(part, node)
    return statement


def rewrite(function: FunctionType, name: str, owner: type, steps: object) -> Rewritten | None:
    """The method ``name`` of the class ``owner``, if there is anything in it that steps can do.

    Raises:
        LeftAlone: it has to stay as it is.
    """
    node, place = source.tree(function)
    method = Method(node, function, owner)
    scopes = [_Scope(method, node, function.__code__, pending) for pending in (False, True)]
    if not method.paths:
        return None
    attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    refused = (method.used | attributes) & _REFUSED
    if refused:
        raise LeftAlone(f"it uses {min(refused)}")
    given = {method.steps: steps, method.owner: owner, method.written: function}

    def with_body(body: list[ast.stmt]) -> ast.FunctionDef:
        new = copy.copy(node)
        new.body = [_prologue(method, node, name), *body]
        return new

    def build(new: ast.FunctionDef) -> FunctionType:
        return source.build(function, new, place, given)

    plain = with_body(scopes[0].body)
    returns = scopes[1].returned and name != "forward"  # which only steps would call
    pending = build(with_body(scopes[1].body)) if returns else None
    return Rewritten(build(plain), pending, ast.unparse(plain), frozenset(method.paths))
