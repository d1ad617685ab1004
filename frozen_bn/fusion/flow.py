"""What the rewriting knows of the local variables of a function: where a value is read for the last
time, and what is evaluated between two places."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

Names = set[str]
INNER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
INNER += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # type: ignore[assignment]

#: Stand for what follows a block of statements: the end of a loop's body, or of a `with` or `try`,
#: where nothing stays pending.
LOOP, BORDER = ast.Pass(), ast.Pass()


#: Statements that nothing pending goes into or comes out of.
BORDERED = (ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def blocks_of(s: ast.AST) -> Iterator[list[ast.stmt]]:
    """The blocks of a statement, also those of its handlers and cases."""
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        block = getattr(s, name, [])
        if name in ("handlers", "cases"):
            yield from (part.body for part in block)
        elif block:
            yield block


def names(node: ast.AST) -> Iterator[str]:
    """All that occur, also as what is assigned to, and those of inner scopes."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.arg):
            yield part.arg


def loads(node: ast.AST) -> list[str]:
    """What is read."""
    parts = [*ast.walk(node)]
    augmented = [part.target for part in parts if isinstance(part, ast.AugAssign)]
    return [
        part.id
        for part in parts
        if isinstance(part, ast.Name) and (isinstance(part.ctx, ast.Load) or part in augmented)
    ]


def stored(node: ast.AST, context: type[ast.expr_context] = ast.Store) -> set[str]:
    """What is assigned to, or deleted."""
    parts = (part for part in ast.walk(node) if isinstance(part, ast.Name))
    return {part.id for part in parts if isinstance(part.ctx, context)}


def captured(body: Sequence[ast.AST]) -> set[str]:
    """Names that are not only this scope's."""
    found: set[str] = set()
    for node in (n for part in body for n in ast.walk(part)):
        if isinstance(node, INNER):
            found |= {*names(node)}
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found |= {*node.names}
    return found


def target(statement: ast.AST) -> str | None:
    """The name that a plain assignment is to."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        to = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        to = statement.target
    else:
        return None
    return to.id if isinstance(to, ast.Name) else None


class Liveness:
    """Of every statement: which names may be read after it, and which if it raises."""

    def __init__(self, body: Sequence[ast.stmt]) -> None:
        self.after: dict[ast.stmt, set[str]] = {}
        self.raised: dict[ast.stmt, set[str]] = {}
        self._block(body, set(), set(), set(), set())

    def ends(self, name: str, statement: ast.stmt) -> bool:
        """Whether ``statement`` reads ``name`` once, and nothing reads that value afterwards."""
        after = self.after[statement] - {target(statement)}
        named = (n for n in ast.walk(statement) if isinstance(n, ast.NamedExpr))
        walrus = any(n.target.id == name for n in named)
        if isinstance(statement, ast.AugAssign):
            after = after - {*names(statement.target)}
        once = loads(statement).count(name) == 1
        return once and not walrus and name not in after | self.raised[statement]

    def _block(
        self, body: Sequence[ast.stmt], out: Names, raised: Names, stop: Names, again: Names
    ) -> Names:
        live = out
        for statement in reversed(body):
            self.after[statement], self.raised[statement] = live, raised
            live = self._statement(statement, live, raised, stop, again) | raised
        return live

    def _statement(
        self, s: ast.stmt, out: Names, raised: Names, stop: Names, again: Names
    ) -> Names:
        if isinstance(s, ast.Return | ast.Raise):
            return {*loads(s)}
        if isinstance(s, ast.Break | ast.Continue):
            return stop if isinstance(s, ast.Break) else again
        if isinstance(s, ast.If):
            blocks = (self._block(b, out, raised, stop, again) for b in (s.body, s.orelse))
            return {*loads(s.test)}.union(*blocks)
        if isinstance(s, ast.For | ast.While):
            head = self._block(s.orelse, out, raised, stop, again)
            head = head | {*loads(s.test if isinstance(s, ast.While) else s.target)}
            while True:
                grown = head | self._block(s.body, head, raised, out, head)
                if grown == head:
                    return head | ({*loads(s.iter)} if isinstance(s, ast.For) else set())
                head = grown
        bodies = [*blocks_of(s)]
        if isinstance(s, BORDERED):  # from anywhere inside it may go on behind, or in a handler
            inside = out | raised | {n for body in bodies[1:] for part in body for n in loads(part)}
            for body in bodies:
                self._block(body, inside, inside, stop | inside, again | inside)
            return out | {*loads(s)}
        return (out - {target(s)}) | {*loads(s)}


def order(node: ast.expr) -> Iterator[str | None]:
    """The names that an expression reads, in order; None where it may do anything else than read.
    Looking up attributes and items counts as reading."""
    if isinstance(node, ast.Constant):
        return
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute | ast.Starred):
        yield from order(node.value)
    elif isinstance(node, ast.Subscript | ast.Compare | ast.Tuple | ast.List | ast.Slice):
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                yield from order(part)
    elif isinstance(node, ast.UnaryOp):
        yield from order(node.operand)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from order(value)
    elif isinstance(node, ast.BinOp):
        yield from order(node.left)
        yield from order(node.right)
        yield None
    elif isinstance(node, ast.Call):
        yield from order(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from order(argument)
        yield None
    else:
        yield None


def only_reads(node: ast.expr) -> bool:
    return None not in order(node)


def _first(name: str, node: ast.expr) -> bool | None:
    """Whether ``node`` reads ``name`` before it does anything else; None if it does neither."""
    for part in ast.walk(node):  # what is not evaluated for sure
        if isinstance(part, ast.BoolOp | ast.Compare):
            late = part.values[1:] if isinstance(part, ast.BoolOp) else part.comparators[1:]
            if any(name in names(value) for value in late):
                return False
    for read in order(node):
        if read is None or read == name:
            return read == name
    return None


def soon(name: str, following: Sequence[ast.stmt], depth: int = 0) -> bool:
    """Whether what ``following`` does first, but for reading, is to use the value of ``name``."""
    for i, s in enumerate(following):
        if s is LOOP or depth > 6:
            return False
        if s is BORDER or isinstance(s, BORDERED):
            return True  # it is evaluated right there
        if isinstance(s, ast.Pass):
            continue
        if isinstance(s, ast.If):
            first, rest = _first(name, s.test), following[i + 1 :]
            branches = ([*s.body, *rest], [*s.orelse, *rest])
            return first if first is not None else all(soon(name, b, depth + 1) for b in branches)
        if isinstance(s, ast.For):
            return bool(_first(name, s.iter))
        if isinstance(s, ast.AugAssign):
            if isinstance(s.target, ast.Name) and s.target.id == name:
                return True
            return bool(_first(name, s.value))
        if not isinstance(s, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr):
            return False
        first = _first(name, s.value) if s.value else None
        if first is not None or isinstance(s, ast.Return):
            return first is not False
        if target(s) is None and not isinstance(s, ast.Expr):
            return False
        if target(s) == name:
            return True
    return True
