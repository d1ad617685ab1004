"""The source of functions, and what names are assigned to there."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator
from types import CodeType
from typing import Any

Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class CannotTrace(Exception):
    """Why a ``forward`` is left as it was written."""


def nested(code: CodeType) -> Iterator[CodeType]:
    """The code itself, and that of functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> tuple[dict[int, list[ast.FunctionDef | ast.Lambda]], set[CodeType]]:
    """The functions in a file by their first lines, and what they compile to."""
    tree = ast.parse(text)
    functions: dict[int, list[ast.FunctionDef | ast.Lambda]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            decorators = getattr(node, "decorator_list", [])
            functions.setdefault(min(n.lineno for n in (node, *decorators)), []).append(node)
    return functions, {*nested(compile(tree, "", "exec", dont_inherit=True))}


def _covers(node: ast.expr, code: CodeType) -> bool:
    """Whether the body of a lambda is where ``code`` came from, or that of one in it."""
    start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
    for line, end_line, column, end_column in code.co_positions():
        if line is None or column is None or end_column == 0:
            continue
        if (line, column) < start or (end_line, end_column) > end:
            return False
    return True


def source(code: CodeType, namespace: dict[str, Any]) -> ast.FunctionDef | ast.Lambda:
    text = "".join(linecache.getlines(code.co_filename, namespace))
    try:
        functions, codes = _parsed(text)
    except (SyntaxError, ValueError):
        functions, codes = {}, set()
    found = functions.get(code.co_firstlineno, [])
    if code.co_name == "<lambda>":
        lambdas = [f for f in found if isinstance(f, ast.Lambda) and _covers(f.body, code)]
        found = [min(lambdas, key=lambda f: len(ast.dump(f)))] if lambdas else []
    else:
        found = [f for f in found if isinstance(f, ast.FunctionDef) and f.name == code.co_name]
    if code not in codes or len(found) != 1:
        raise CannotTrace(f"the source of {code.co_name} is not at hand")
    return found[0]


def bound(nodes: list[ast.AST]) -> set[str]:
    """The names that are assigned to, but for those of inner scopes."""
    names: set[str] = set()
    for node in nodes:
        inner = isinstance(node, ast.Lambda | Comprehension)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if not inner:
            names |= bound([*ast.iter_child_nodes(node)])
        elif not isinstance(node, ast.Lambda):
            walrus = [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
            names |= {n.target.id for n in walrus}
    return names


def values(body: list[ast.AST]) -> dict[str, list[ast.expr | None]]:
    """What is assigned to each name; None for what is part of something else."""
    found: dict[str, list[ast.expr | None]] = {}
    plain: dict[ast.AST, ast.expr | None] = {}
    for node in (n for part in body for n in ast.walk(part)):
        if isinstance(node, ast.Assign):
            plain |= {target: node.value for target in node.targets}
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            plain[node.target] = node.value
        elif isinstance(node, ast.AugAssign):
            plain[node.target] = ast.BinOp(node.target, node.op, node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, []).append(plain.get(node))
    return found
