"""A method's source with steps in the place of the calls of layers, of activations, and of sums.

What a step returns may be pending (see ``steps``). It may be handed to another step at once, or
wait in a local variable for one. For that it has to be true that

- every other read of such a variable goes through ``steps.value``;
- nothing reads the variable after the step that takes what waits there (``_consumed``);
- nothing is called between two steps that could change what the first was given, unless the first
  works on what nothing else has: else ``steps.settle`` has it computed.

So no more has to be known of a variable than its name. What a step does with what it is given is
decided when it runs.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import torch

from .. import activations
from . import source
from .source import LeftAlone

Node = TypeVar("Node", bound=ast.AST)

#: Methods of tensors that are activations or sums.
_METHODS = {name for name in activations._FUNCTIONS if isinstance(name, str)} | {"add", "add_"}

#: With these, a function sees its variables otherwise than by reading them.
_REFUSED = {"locals", "vars", "eval", "exec", "f_locals", "_getframe", "currentframe"}

#: Calls of these change nothing.
_ITERATORS = {"zip", "enumerate", "reversed", "range", "len"}

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_BORDERED = (ast.With, ast.AsyncWith, ast.Try, ast.TryStar)
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)

_PURE = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.Subscript, ast.Tuple, ast.UnaryOp),
    *(ast.Compare, ast.BoolOp, ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context, ast.keyword),
)

#: Attributes of the instance, one in the other, by which a callee is reached.
Path = tuple[str, ...]


class Rewritten(NamedTuple):
    """A method with steps."""

    function: FunctionType
    pending: FunctionType | None  # the same, but returns what is pending, if it ever does
    text: str
    paths: frozenset[Path]  # what the steps call


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All in ``nodes``, but for what is in functions and classes inside."""
    for node in nodes:
        yield node
        yield from _own(_outside(node) if isinstance(node, _SCOPES) else ast.iter_child_nodes(node))


def _outside(scope: Any) -> list[ast.AST]:
    """What of a function or class is evaluated where it is defined."""
    arguments = getattr(scope, "args", None)
    defaults = [*arguments.defaults, *filter(None, arguments.kw_defaults)] if arguments else []
    fields = ("decorator_list", "bases", "keywords")
    return [*defaults, *(part for field in fields for part in getattr(scope, field, []))]


def _loads(node: ast.AST) -> Iterator[ast.Name]:
    """The variables that are read, also those of ``x += ...``."""
    for part in _own([node]):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            yield part
        elif isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            yield part.target


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _target(s: ast.AST) -> str | None:
    """The variable that a plain assignment is to."""
    if isinstance(s, ast.Assign) and len(s.targets) == 1:
        to = s.targets[0]
    elif isinstance(s, ast.AugAssign) or (isinstance(s, ast.AnnAssign) and s.value is not None):
        to = s.target
    else:
        return None
    return to.id if isinstance(to, ast.Name) else None


def _position(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _is_pure(e: ast.AST) -> bool:
    """Whether evaluating it changes nothing. (Looking up attributes and items does not.)"""
    return all(isinstance(part, _PURE) for part in ast.walk(e))


class _Scope:
    """Rewrites one function; ``code`` is what it was compiled to. Of a variable that is assigned
    what a step returns, and of the statements behind it, it asks:

    _waits      is the next that reads it a step, so that it is worth to wait?
    _at_once    is it read before anything is called, so that nothing can change?
    _untouched  else, is nothing called but layers until then, so that ``settle`` is enough?
    _consumed   at a reading: is that the last of this value, so that it may be written over?
    """

    def __init__(
        self, method: _Method, node: ast.FunctionDef, code: CodeType, pending: bool = False
    ) -> None:
        self.method, self.node, self.code, self.pending = method, node, code, pending
        self.waiting: set[str] = set()  # variables in which something may be pending
        self.callees: dict[str, Path] = {}  # variables that may be a layer
        self.loops: list[ast.stmt] = []
        self.first: dict[int, list[ast.stmt]] = {}  # what is to be done first in a block
        self.bordered = self.inner = 0  # in how many with and try, comprehensions and lambdas
        self.unit: ast.AST = node  # what is evaluated as one
        self.returned = False  # whether it returns what is pending
        self.parts = [*_own(node.body)]
        loads = sorted((n for s in node.body for n in _loads(s)), key=_position)
        self.last = {n.id: n for n in loads}
        self._find_callees()
        self._find_waiting()

    def _find_callees(self) -> None:
        for part in self.parts:
            if isinstance(part, ast.FunctionDef):
                self.callees[part.name] = (part.name,)
            elif isinstance(part, ast.For | ast.comprehension):
                self._bind(part.target, part.iter, iterated=True)
            elif isinstance(part, ast.Assign) and len(part.targets) == 1:
                self._bind(part.targets[0], part.value, iterated=False)

    def _bind(self, target: ast.expr, value: ast.expr, iterated: bool) -> None:
        """Notes a variable that holds a layer, or runs over layers."""
        if iterated and isinstance(value, ast.Tuple | ast.List):
            for item in value.elts:
                self._bind(target, item, iterated=False)
            return
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for to, what in zip(target.elts, value.elts, strict=False):
                self._bind(to, what, iterated)
            return
        parts = [value]
        if iterated:  # zip(self.a, self.b), self.a.values(), enumerate(zip(self.a, self.b))
            calls = [part for part in ast.walk(value) if isinstance(part, ast.Call)]
            parts += [part for call in calls for part in (call.func, *call.args)]
        paths = [path for path in map(self.path, parts) if path is not None]
        self.method.paths.update(paths[1:])  # any of them may be what is called
        for part in ast.walk(target) if paths else ():
            if isinstance(part, ast.Name):
                self.callees.setdefault(part.id, paths[0])

    @staticmethod
    def _is_getter(e: ast.expr) -> bool:
        return isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id == "getattr"

    def path(self, e: ast.expr) -> Path | None:
        """From the instance to ``e``, as far as it can be read."""
        if isinstance(e, ast.Name):
            return () if e.id == self.method.self_name else self.callees.get(e.id)
        if isinstance(e, ast.Attribute):
            inside = self.path(e.value)
            return None if inside is None else (*inside, e.attr)
        if isinstance(e, ast.Subscript):
            return self.path(e.value)
        if self._is_getter(e) and cast(ast.Call, e).args:
            return self.path(cast(ast.Call, e).args[0])
        return None

    def _find_waiting(self) -> None:
        """The variables of its own that are assigned what a step returns."""
        captured = {name for code in source.codes(self.code) for name in code.co_freevars}
        own = {*self.code.co_varnames} - captured
        pairs = [(cast(str, _target(p)), cast(Any, p).value) for p in self.parts if _target(p)]
        while True:
            before = len(self.waiting)
            self.waiting |= {n for n, value in pairs if n in own and self.is_step(value)}
            if len(self.waiting) == before:
                return

    # What is a step

    def operands(self, e: ast.AST) -> list[ast.expr]:
        """What a step in the place of ``e`` would be given that may be pending; nothing, if none
        can take its place."""
        if isinstance(e, ast.BinOp):
            return [e.left, e.right] if isinstance(e.op, ast.Add) else []
        if not isinstance(e, ast.Call) or any(isinstance(a, ast.Starred) for a in e.args):
            return []
        if self._is_method(e):
            f = cast(ast.Attribute, e.func)
            return [f.value, *(e.args if f.attr == "add" else [])]
        known = self._calls(e) or self._function(e.func) is not None
        return self._arguments(e)[0][:2] if known else []

    def is_given_pending(self, e: ast.AST) -> bool:
        return any(self.may_wait(p) or self.is_step(p) for p in self.operands(e))

    def is_step(self, e: ast.AST) -> bool:
        """Whether what ``e`` evaluates to may be pending."""
        is_call = isinstance(e, ast.Call) and not self._is_method(e)  # of what may be a layer
        return bool(self.operands(e)) if is_call else self.is_given_pending(e)

    def _arguments(self, e: ast.Call) -> tuple[list[ast.expr], list[ast.keyword]]:
        """Positional ones, and others. ``F.relu(input=x)`` is ``F.relu(x)``."""
        known = not e.args and e.keywords and self._function(e.func) is not None
        named = [k.value for k in e.keywords[:1] if known and k.arg == "input"]
        return (named, e.keywords[1:]) if named else (e.args, e.keywords)

    def may_wait(self, e: ast.AST) -> bool:
        return isinstance(e, ast.Name) and e.id in self.waiting

    def _calls(self, call: ast.Call) -> bool:
        """Whether it calls something that the instance has."""
        itself = isinstance(call.func, ast.Name) and call.func.id == self.method.self_name
        return not itself and self.path(call.func) is not None

    def _is_method(self, call: ast.Call) -> bool:
        f = call.func
        if not isinstance(f, ast.Attribute) or f.attr not in _METHODS or call.keywords:
            return False
        return len(call.args) == f.attr.startswith("add") and self.path(f) is None

    def _function(self, e: ast.expr) -> object:
        """The global function that ``e`` is, if it is an activation or a sum."""
        names: list[str] = []
        while isinstance(e, ast.Attribute):
            names.append(e.attr)
            e = e.value
        if not isinstance(e, ast.Name):
            return None
        found: Any = self.method.globals.get(e.id)
        for name in reversed(names):
            found = getattr(found, name, None) if isinstance(found, type(torch)) else None
        known = isinstance(found, (type(torch.relu), FunctionType))
        return found if known and (found is torch.add or found in activations._FUNCTIONS) else None

    # Expressions

    def step(self, name: str, *args: ast.expr, at: ast.AST, keywords: Any = ()) -> ast.expr:
        function = ast.Attribute(ast.Name(self.method.steps, ast.Load()), name, ast.Load())
        call = ast.Call(function, [*args], [*keywords])
        for node in (call, function, function.value):
            ast.copy_location(node, at)
        return call

    def raw(self, e: ast.expr, *later: ast.AST) -> ast.expr:
        """``e``, which may be pending. ``later`` is evaluated before that is used."""
        if isinstance(e, ast.Name):
            if not self.may_wait(e) or not self._consumed(e):
                return self.plain(e)
            new: ast.expr = ast.copy_location(ast.Name(e.id, ast.Load()), e)
        elif not self.is_step(e):
            return self.plain(e)
        elif isinstance(e, ast.BinOp):
            new = self.step("add", self.raw(e.left, e.right), self.raw(e.right), at=e)
        else:
            new = self._call(cast(ast.Call, e))
        return self._kept(new, later)

    def _kept(self, new: ast.expr, later: Sequence[ast.AST]) -> ast.expr:
        """``new``, as far computed as ``later`` makes it necessary."""
        if all(map(_is_pure, later)):
            return new
        return self.step("settle" if all(map(self._is_harmless, later)) else "value", new, at=new)

    def _is_harmless(self, e: ast.AST) -> bool:
        """Whether it calls nothing but layers, which change no other layer."""
        return all(
            isinstance(part, (*_PURE, ast.BinOp, ast.operator))
            or (isinstance(part, ast.Call) and self._is_layer(part.func))
            or (isinstance(part, ast.Call) and self._is_iterator(part.func))
            for part in ast.walk(e)
        )

    def _is_iterator(self, e: ast.expr) -> bool:
        """Whether it is one of Python's own."""
        if not isinstance(e, ast.Name) or e.id not in _ITERATORS:
            return False
        own = {*self.code.co_varnames, *self.code.co_freevars, *self.method.globals}
        return e.id not in own

    def _is_layer(self, e: ast.expr) -> bool:
        """Whether it is no method or function, as far as the class tells."""
        path = self.path(e)
        found = getattr(self.method.owner_class, path[0], None) if path else None
        return (
            path is not None
            and len(path) < 2  # else it may be a method of a layer, or of its weight
            and (found is None or isinstance(found, property))
            and not (isinstance(e, ast.Name) and self.callees.get(e.id) == (e.id,))
        )

    def _call(self, e: ast.Call) -> ast.expr:
        args, keywords = self._arguments(e)
        if self._is_method(e):
            f = cast(ast.Attribute, e.func)
            first = self.raw(f.value, *args)
            others = [self.raw(a) if f.attr == "add" else self.plain(a) for a in args]
            return self.step(
                "method", first, ast.copy_location(ast.Constant(f.attr), e), *others, at=e
            )
        if self._function(e.func) is torch.add and len(args) == 2 and not keywords:
            a, b = self.raw(args[0], args[1]), self.raw(args[1])
            return self.step("add", a, b, self.plain(e.func), at=e)
        path = self.path(e.func)
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
            read = self.may_wait(e) and isinstance(e.ctx, ast.Load)
            return self.step("value", ast.copy_location(copy.copy(e), e), at=e) if read else e
        if self.is_given_pending(e):
            return self.step("value", self.raw(e), at=e)
        inner = isinstance(e, (ast.Lambda, *_COMPREHENSIONS))
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

    # What is known of variables

    def _consumed(self, name: ast.Name) -> bool:
        """Whether nothing reads what the variable has now, after this."""
        s = self.unit
        if self.inner or Counter(n.id for n in _loads(s))[name.id] != 1:
            return False
        if isinstance(s, ast.Return) and not self.bordered:
            return True
        if _target(s) == name.id:  # whatever comes next finds the new value, or an exception
            value = cast(ast.Call, cast(Any, s).value)
            alone = isinstance(value, ast.Call) and value.args[:1] == [name]
            if not self.bordered or isinstance(s, ast.AugAssign):
                return True
            if alone and all(isinstance(a, ast.Constant) for a in value.args[1:]):
                return not value.keywords
        return self.last.get(name.id) is name and (not self.loops or self._is_new(name.id))

    def _is_new(self, name: str) -> bool:
        """Whether each turn of the loop begins by assigning it."""
        body = cast(ast.For, self.loops[-1]).body
        first = next((s for s in body if _mentions(s, name)), body[0])
        inside = {n for s in body for n in _loads(s)}
        others = {n for n in _loads(self.loops[0]) if n.id == name} - inside
        return _target(first) == name and not others and all(n.id != name for n in _loads(first))

    def _taken(self, s: ast.AST) -> set[str]:
        """The variables of which a step in ``s`` takes what is pending."""
        found: list[Any] = [s.value] if isinstance(s, ast.Return) and self.pending else []
        for part in _own([s]):
            if isinstance(part, ast.AugAssign) and isinstance(part.op, ast.Add):
                found += [part.target, part.value]
            elif self.is_step(part):
                found += self.operands(part)
        return {part.id for part in found if isinstance(part, ast.Name)}

    def _waits(self, name: str, rest: Sequence[ast.stmt]) -> bool | None:
        """Whether the next that reads the variable is a step, in the same block of a `with` or
        `try`; None if nothing does."""
        for s in rest:
            if name not in self.method.names_in(s):
                if self.bordered and not isinstance(s, _SIMPLE):
                    return False
            elif isinstance(s, ast.If) and not self.bordered and not _mentions(s.test, name):
                ways = [self._waits(name, block) for block in (s.body, s.orelse)]
                if True in ways or None not in ways:
                    return True in ways
            elif isinstance(s, ast.For) and not self.bordered and not s.orelse:
                return not _mentions(s.iter, name) and bool(self._waits(name, s.body))
            else:
                return isinstance(s, _SIMPLE) and name in self._taken(s)
        return None

    def _at_once(self, name: str, rest: Sequence[ast.stmt]) -> bool:
        """Whether nothing is called before what the variable has is read."""
        s = rest[0] if rest else None
        if isinstance(s, ast.If) and _is_pure(s.test) and not _mentions(s.test, name):
            return all(self._at_once(name, block or rest[1:]) for block in (s.body, s.orelse))
        plain = isinstance(s, ast.Assign) and _target(s) not in (None, name) and _is_pure(s.value)
        if plain and not _mentions(cast(ast.Assign, s).value, name):
            return self._at_once(name, rest[1:])
        if not isinstance(s, _SIMPLE) or all(n.id != name for n in _loads(s)):
            return False
        if any(isinstance(p, ast.IfExp | ast.Starred) for p in _own([s])):
            return False  # evaluated in another order than written
        node = next(n for n in _loads(s) if n.id == name)
        calls = [p for p in _own([s]) if isinstance(p, ast.Call | ast.Await | ast.NamedExpr)]
        return all(node in ast.walk(c) or _position(c) > _position(node) for c in calls)

    def _untouched(self, name: str, rest: Sequence[ast.stmt]) -> bool:
        """Whether until a step takes what the variable has, nothing is called but layers."""
        for s in rest:
            if isinstance(s, ast.If) and self._is_harmless(s.test):
                if not all(self._untouched(name, block) for block in (s.body, s.orelse)):
                    return False
            elif isinstance(s, ast.For):  # of which there may be no turn
                if not (self._is_harmless(s.iter) and self._untouched(name, s.body)):
                    return False
            elif name in self.method.names_in(s):
                first = next((n for n in _loads(s) if n.id == name), None)
                calls = [p for p in _own([s]) if isinstance(p, ast.Call)]
                return first is None or all(
                    first in ast.walk(c) or _position(c) > _position(first) or self._is_harmless(c)
                    for c in calls
                )
            elif not (isinstance(s, ast.Assign) and _target(s) and self._is_harmless(s.value)):
                return False
        return True

    # Statements

    def body(self) -> list[ast.stmt]:
        return self.block(self.node.body, [])

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
        name = _target(s)
        if name is not None and name in self.waiting:
            return self.assignment(s, name, rest)
        if isinstance(s, ast.Return) and s.value and self.pending and not self.bordered:
            value = self.raw(s.value)
            self.returned |= self.is_step(s.value) or self.may_wait(s.value)
            return [ast.copy_location(ast.Return(value), s)]
        return [self.rebuilt(s)]

    def assignment(self, s: Any, name: str, rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        read = ast.copy_location(ast.Name(name, ast.Load()), s)
        store = ast.copy_location(ast.Name(name, ast.Store()), s)
        if isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Add):
            taken = self._consumed(cast(ast.Name, s.target))
            a = read if taken else self.step("value", read, at=s)
            a = self._kept(a, [s.value])
            value = self.step("iadd", a, self.raw(s.value), at=s)
        elif isinstance(s, ast.AugAssign):
            before = ast.Assign([store], self.step("value", read, at=s))
            return [ast.copy_location(before, s), self.rebuilt(s)]
        elif not self.is_step(s.value):
            return [self.rebuilt(s)]
        else:
            value = self.raw(s.value)
        if not self._waits(name, rest):
            value = self.step("value", value, at=s)
        elif not self._at_once(name, rest) and not self._computed_in_branches(name, rest):
            value = self.step(self._until(name, rest), value, at=s)
        return [ast.copy_location(ast.Assign([store], value), s)]

    def _until(self, name: str, rest: Sequence[ast.stmt]) -> str:
        """How far what the variable has must be computed, for ``rest`` to go on."""
        return "settle" if self._untouched(name, rest) else "value"

    def _computed_in_branches(self, name: str, rest: Sequence[ast.stmt]) -> bool:
        """Whether that is only so in one branch of an ``if`` that follows, which begins with it."""
        s = rest[0] if rest else None
        if not isinstance(s, ast.If) or not _is_pure(s.test) or _mentions(s.test, name):
            return False
        ways = [(block, [*block, *rest[1:]]) for block in (s.body, s.orelse)]
        called = [(block, way) for block, way in ways if not self._at_once(name, way)]
        if len(called) != 1 or not called[0][0]:
            return False
        block, way = called[0]
        read, store = ast.Name(name, ast.Load()), ast.Name(name, ast.Store())
        first = ast.Assign([store], self.step(self._until(name, way), read, at=block[0]))
        for node in (first, read, store):
            ast.copy_location(node, block[0])
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
        if len(codes) != 1 or any(isinstance(p, ast.Yield | ast.YieldFrom) for p in _own(s.body)):
            return [new]
        new.body = _Scope(self.method, s, codes[0]).body()
        scope = _Scope(self.method, s, codes[0], pending=True)
        raw.body, raw.name = scope.body(), self.method.new_name(f"{s.name}_pending")
        defaults = [*s.args.defaults, *filter(None, s.args.kw_defaults)]  # evaluated once
        if not scope.returned or s.decorator_list or defaults:
            return [new]
        itself = ast.Name(s.name, ast.Load())
        both = ast.Tuple([itself, ast.Name(raw.name, ast.Load())], ast.Load())
        hand = ast.Assign([ast.Attribute(itself, "_pending", ast.Store())], both)
        raw.returns, raw.args = None, source.bare(s.args)
        return [new, raw, ast.fix_missing_locations(ast.copy_location(hand, s))]


class _Method:
    """What the scopes of one method share."""

    def __init__(self, node: ast.FunctionDef, function: FunctionType, owner: type) -> None:
        self.owner_class = owner
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.globals = function.__globals__
        self.names: dict[ast.AST, set[str]] = {}
        self.used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        self.used |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        self.paths: set[Path] = set()
        self.steps, self.owner, self.written = map(self.new_name, ("steps", "owner", "written"))

    def names_in(self, node: ast.AST) -> set[str]:
        """The variables that it names, also those of functions inside."""
        if node not in self.names:
            self.names[node] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return self.names[node]

    def new_name(self, word: str) -> str:
        name = next(w for w in (word + "_" * i for i in itertools.count()) if w not in self.used)
        self.used.add(name)
        return name

    def prologue(self, node: ast.FunctionDef, name: str) -> ast.stmt:
        """``if steps.aside(...): return owner.forward(self, ...)``: the class's own method."""
        a = node.args
        given = [arg.arg for arg in (*a.posonlyargs, *a.args)]
        given += [f"*{a.vararg.arg}"] if a.vararg else []
        given += [f"{arg.arg}={arg.arg}" for arg in a.kwonlyargs]
        given += [f"**{a.kwarg.arg}"] if a.kwarg else []
        own = f"{self.owner}.{name}"
        text = f"if {self.steps}.aside({own}, {self.written}): return {own}({', '.join(given)})"
        (statement,) = ast.parse(text).body
        for part in ast.walk(statement):
            if isinstance(part, ast.expr | ast.stmt | ast.keyword):
                ast.copy_location(part, node)
        return statement


def rewrite(function: FunctionType, name: str, owner: type, steps: object) -> Rewritten | None:
    """The method ``name`` of the class ``owner``, if there is anything in it that steps can do.

    Raises:
        LeftAlone: it has to stay as it is.
    """
    node, place = source.tree(function)
    method = _Method(node, function, owner)
    scopes = [_Scope(method, node, function.__code__, pending) for pending in (False, True)]
    bodies = [scope.body() for scope in scopes]
    if not method.paths:
        return None
    attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    refused = (method.used | attributes) & _REFUSED
    if refused:
        raise LeftAlone(f"it uses {min(refused)}")
    given = {method.steps: steps, method.owner: owner, method.written: function}

    def with_body(body: list[ast.stmt]) -> ast.FunctionDef:
        new = copy.copy(node)
        new.body = [method.prologue(node, name), *body]
        return new

    def build(new: ast.FunctionDef) -> FunctionType:
        return source.build(function, new, place, given)

    plain = with_body(bodies[0])
    returns = scopes[1].returned and name != "forward"  # which only steps would call
    pending = build(with_body(bodies[1])) if returns else None
    return Rewritten(build(plain), pending, ast.unparse(plain), frozenset(method.paths))
