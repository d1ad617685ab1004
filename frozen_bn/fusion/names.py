"""What the names in a method's source stand for: which may be layers, in which something may be
pending, and which expressions a step can take the place of. Knows nothing of layers."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, cast

import torch

from .. import activations

#: Methods of tensors that are activations or sums.
_METHODS = {name for name in activations._FUNCTIONS if isinstance(name, str)} | {"add", "add_"}

#: Calls of these change nothing.
_ITERATORS = {"zip", "enumerate", "reversed", "range", "len"}

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)

_PURE = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.Subscript, ast.Tuple, ast.UnaryOp),
    *(ast.Compare, ast.BoolOp, ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context, ast.keyword),
)

#: Attributes of the instance, one in the other, by which a callee is reached.
Path = tuple[str, ...]


def own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All in ``nodes``, but for what is in functions and classes inside."""
    for node in nodes:
        yield node
        yield from own(outside(node) if isinstance(node, SCOPES) else ast.iter_child_nodes(node))


def outside(scope: Any) -> list[ast.AST]:
    """What of a function or class is evaluated where it is defined."""
    arguments = getattr(scope, "args", None)
    defaults = [*arguments.defaults, *filter(None, arguments.kw_defaults)] if arguments else []
    fields = ("decorator_list", "bases", "keywords")
    return [*defaults, *(part for field in fields for part in getattr(scope, field, []))]


def loads(node: ast.AST) -> Iterator[ast.Name]:
    """The variables that are read, also those of ``x += ...``."""
    for part in own([node]):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            yield part
        elif isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            yield part.target


def target(s: ast.AST) -> str | None:
    """The variable that a plain assignment is to."""
    if isinstance(s, ast.Assign) and len(s.targets) == 1:
        to = s.targets[0]
    elif isinstance(s, ast.AugAssign) or (isinstance(s, ast.AnnAssign) and s.value is not None):
        to = s.target
    else:
        return None
    return to.id if isinstance(to, ast.Name) else None


def position(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def bound_in(node: ast.AST) -> set[str]:
    """The names that it binds, in it or behind it."""
    parts = [*ast.walk(node)]
    names = {n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.arg for n in parts if isinstance(n, ast.arg)}


def is_pure(e: ast.AST) -> bool:
    """Whether evaluating it changes nothing. (Looking up attributes and items does not.)"""
    return all(isinstance(part, _PURE) for part in ast.walk(e))


class Method:
    """What the scopes of one method share."""

    def __init__(self, node: ast.FunctionDef, function: FunctionType, owner: type) -> None:
        self.owner_class = owner
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.globals = function.__globals__
        self.used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        self.used |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        self.paths: set[Path] = set()  # what the steps call
        self.inside: dict[ast.AST, set[str]] = {}
        self.steps, self.owner, self.written = map(self.new_name, ("steps", "owner", "written"))

    def new_name(self, word: str) -> str:
        name = next(w for w in (word + "_" * i for i in itertools.count()) if w not in self.used)
        self.used.add(name)
        return name


class Names:
    """Those of one function of the method; ``code`` is what it was compiled to, ``pending``, that
    it may return what is pending."""

    def __init__(
        self, method: Method, node: ast.FunctionDef, code: CodeType, pending: bool
    ) -> None:
        self.method, self.code, self.pending = method, code, pending
        self.waiting: set[str] = set()  # variables in which something may be pending
        self.callees: dict[str, Path] = {}  # variables that may be a layer
        self.parts = [*own(node.body)]
        self._find_callees()
        self._find_waiting()

    def inside(self, node: ast.AST) -> set[str]:
        """The variables that it names, also those of functions inside."""
        found = self.method.inside
        if node not in found:
            found[node] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return found[node]

    def _find_callees(self) -> None:
        for part in self.parts:
            if isinstance(part, ast.FunctionDef):
                self.callees[part.name] = (part.name,)
            elif isinstance(part, ast.For | ast.comprehension):
                self._bind(part.target, part.iter, iterated=True)
            elif isinstance(part, ast.Assign) and len(part.targets) == 1:
                self._bind(part.targets[0], part.value, iterated=False)

    def _bind(self, to: ast.expr, value: ast.expr, iterated: bool) -> None:
        """Notes a variable that holds a layer, or runs over layers."""
        if iterated and isinstance(value, ast.Tuple | ast.List):
            for item in value.elts:
                self._bind(to, item, iterated=False)
            return
        if isinstance(to, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, what in zip(to.elts, value.elts, strict=False):
                self._bind(part, what, iterated)
            return
        parts = [value]
        if iterated:  # zip(self.a, self.b), self.a.values(), enumerate(zip(self.a, self.b))
            calls = [part for part in ast.walk(value) if isinstance(part, ast.Call)]
            parts += [part for call in calls for part in (call.func, *call.args)]
        paths = [path for path in map(self.path, parts) if path is not None]
        self.method.paths.update(paths[1:])  # any of them may be what is called
        for name in ast.walk(to) if paths else ():
            if isinstance(name, ast.Name):
                self.callees.setdefault(name.id, paths[0])

    def path(self, e: ast.expr) -> Path | None:
        """From the instance to ``e``, as far as it can be read."""
        match e:
            case ast.Name(name):
                return () if name == self.method.self_name else self.callees.get(name)
            case ast.Attribute(value, attribute):
                inside = self.path(value)
                return None if inside is None else (*inside, attribute)
            case ast.Subscript(value) | ast.Call(ast.Name("getattr"), [value, *_]):
                return self.path(value)
        return None

    def _find_waiting(self) -> None:
        """The variables of its own that are assigned what a step returns."""
        locals = {*self.code.co_varnames} - {*self.code.co_cellvars}
        pairs = [(cast(str, target(p)), cast(Any, p).value) for p in self.parts if target(p)]
        while True:
            before = len(self.waiting)
            self.waiting |= {n for n, value in pairs if n in locals and self.is_step(value)}
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
        if self.is_method(e):
            f = cast(ast.Attribute, e.func)
            return [f.value, *(e.args if f.attr == "add" else [])]
        known = self._calls(e) or self.function_of(e.func) is not None
        return self.arguments(e)[0][:2] if known else []

    def is_given_pending(self, e: ast.AST) -> bool:
        return any(self.may_wait(p) or self.is_step(p) for p in self.operands(e))

    def is_step(self, e: ast.AST) -> bool:
        """Whether what ``e`` evaluates to may be pending."""
        is_call = isinstance(e, ast.Call) and not self.is_method(e)  # of what may be a layer
        return bool(self.operands(e)) if is_call else self.is_given_pending(e)

    def arguments(self, e: ast.Call) -> tuple[list[ast.expr], list[ast.keyword]]:
        """Positional ones, and others. ``F.relu(input=x)`` is ``F.relu(x)``."""
        known = not e.args and e.keywords and self.function_of(e.func) is not None
        named = [k.value for k in e.keywords[:1] if known and k.arg == "input"]
        return (named, e.keywords[1:]) if named else (e.args, e.keywords)

    def may_wait(self, e: ast.AST) -> bool:
        return isinstance(e, ast.Name) and e.id in self.waiting

    def _calls(self, call: ast.Call) -> bool:
        """Whether it calls something that the instance has."""
        itself = isinstance(call.func, ast.Name) and call.func.id == self.method.self_name
        return not itself and self.path(call.func) is not None

    def is_method(self, call: ast.Call) -> bool:
        f = call.func
        if not isinstance(f, ast.Attribute) or f.attr not in _METHODS or call.keywords:
            return False
        return len(call.args) == f.attr.startswith("add") and self.path(f) is None

    def function_of(self, e: ast.expr) -> object:
        """The global function that ``e`` is, if it is an activation or a sum."""
        names: list[str] = []
        while isinstance(e, ast.Attribute):
            names.append(e.attr)
            e = e.value
        if not isinstance(e, ast.Name):
            return None
        found: Any = self.method.globals.get(e.id)
        for name in reversed(names):
            found = getattr(found, name, None) if isinstance(found, ModuleType) else None
        known = isinstance(found, BuiltinFunctionType | FunctionType)
        return found if known and (found is torch.add or found in activations._FUNCTIONS) else None

    # What evaluating an expression may change

    def is_harmless(self, e: ast.AST) -> bool:
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
        others = self.code.co_varnames, self.code.co_freevars, self.method.globals
        return not any(e.id in names for names in others)

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
