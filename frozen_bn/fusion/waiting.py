"""How long what a step returns may wait in a variable, by the statements behind."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, cast

from .names import Names, is_pure, loads, own, position, target

#: Statements without blocks, of which a step may be a part.
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)


def _taken(names: Names, s: ast.AST) -> set[str]:
    """The variables of which a step in ``s`` takes what is pending."""
    found: list[Any] = [s.value] if isinstance(s, ast.Return) and names.pending else []
    for part in own([s]):
        if isinstance(part, ast.AugAssign) and isinstance(part.op, ast.Add):
            found += [part.target, part.value]
        elif names.is_step(part):
            found += names.operands(part)
    return {part.id for part in found if isinstance(part, ast.Name)}


def is_worth_it(names: Names, name: str, rest: Sequence[ast.stmt], bordered: bool) -> bool | None:
    """Whether the next that reads the variable is a step; None if nothing reads it. ``bordered``:
    inside of a ``with`` or ``try``, which it has to be as well."""
    for s in rest:
        if name not in names.inside(s):
            if bordered and not isinstance(s, _SIMPLE):
                return False
        elif isinstance(s, ast.If) and not bordered and name not in names.inside(s.test):
            ways = [is_worth_it(names, name, block, bordered) for block in (s.body, s.orelse)]
            if True in ways or None not in ways:
                return True in ways
        elif isinstance(s, ast.For) and not bordered and not s.orelse:
            if name in names.inside(s.iter):
                return False
            return bool(is_worth_it(names, name, s.body, bordered))
        else:
            return isinstance(s, _SIMPLE) and name in _taken(names, s)
    return None


def is_read_at_once(names: Names, name: str, rest: Sequence[ast.stmt]) -> bool:
    """Whether nothing is called before what the variable has is read."""
    s = rest[0] if rest else None
    if isinstance(s, ast.If) and is_pure(s.test) and name not in names.inside(s.test):
        ways = [block or rest[1:] for block in (s.body, s.orelse)]
        return all(is_read_at_once(names, name, way) for way in ways)
    plain = isinstance(s, ast.Assign) and target(s) not in (None, name) and is_pure(s.value)
    if plain and name not in names.inside(cast(ast.Assign, s).value):
        return is_read_at_once(names, name, rest[1:])
    if not isinstance(s, _SIMPLE) or all(n.id != name for n in loads(s)):
        return False
    if any(isinstance(p, ast.IfExp | ast.Starred) for p in own([s])):
        return False  # evaluated in another order than written
    node = next(n for n in loads(s) if n.id == name)
    calls = [p for p in own([s]) if isinstance(p, ast.Call | ast.Await | ast.NamedExpr)]
    return all(node in ast.walk(c) or position(c) > position(node) for c in calls)


def _is_untouched(names: Names, name: str, rest: Sequence[ast.stmt]) -> bool:
    """Whether until a step takes what the variable has, nothing is called but layers."""
    for s in rest:
        if isinstance(s, ast.If) and names.is_harmless(s.test):
            if not all(_is_untouched(names, name, block) for block in (s.body, s.orelse)):
                return False
        elif isinstance(s, ast.For):  # of which there may be no turn
            if not (names.is_harmless(s.iter) and _is_untouched(names, name, s.body)):
                return False
        elif name in names.inside(s):
            first = next((n for n in loads(s) if n.id == name), None)
            calls = [p for p in own([s]) if isinstance(p, ast.Call)]
            return first is None or all(
                first in ast.walk(c) or position(c) > position(first) or names.is_harmless(c)
                for c in calls
            )
        elif not (isinstance(s, ast.Assign) and target(s) and names.is_harmless(s.value)):
            return False
    return True


def until(names: Names, name: str, rest: Sequence[ast.stmt]) -> str:
    """The step that computes what the variable has as far as ``rest`` makes it necessary."""
    return "settle" if _is_untouched(names, name, rest) else "value"
