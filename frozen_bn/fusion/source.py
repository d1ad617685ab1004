"""From a function to the syntax tree of its source, and from a changed tree to a function that has
the same file, lines, globals, cells, defaults and annotations."""

from __future__ import annotations

import __future__

import ast
import dis
import functools
import inspect
import itertools
import linecache
import sys
import types
from collections.abc import Mapping
from types import CodeType, FunctionType


class LeftAlone(Exception):
    """Why a method stays as it was written."""


@functools.lru_cache(maxsize=4)
def _lambdas(text: str) -> list[ast.Lambda]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Lambda)]


def _of_lambda(code: CodeType, lines: list[str]) -> ast.FunctionDef | None:
    """The smallest one whose body is where the code came from."""
    spans = [(a, b, c, d) for a, c, b, d in code.co_positions() if a and c is not None and d]
    first, last = (min(s[:2] for s in spans), max((s[2], s[3]) for s in spans))
    found = [
        node
        for node in _lambdas("".join(lines))
        if (node.lineno, node.col_offset) <= first
        and last <= (node.end_lineno or 0, node.end_col_offset or 0)
    ]
    if not found:
        return None
    node = min(found, key=lambda n: len(ast.dump(n)))
    body = ast.copy_location(ast.Return(node.body), node.body)
    function = ast.FunctionDef("<lambda>", node.args, [body], [])
    return ast.copy_location(function, node)


def _of_def(code: CodeType, lines: list[str]) -> ast.FunctionDef | None:
    block = inspect.getblock(lines[code.co_firstlineno - 1 :])
    indented = block[0][:1].isspace()
    tree = ast.parse("if 1:\n" * indented + "".join(block))
    body = tree.body[0].body if indented else tree.body  # type: ignore[attr-defined]
    ast.increment_lineno(tree, code.co_firstlineno - 1 - indented)
    return body[0] if isinstance(body[0], ast.FunctionDef) else None


class _Mangle(ast.NodeTransformer):
    """Names such as ``self.__x``, as the compiler makes them inside of a class."""

    def __init__(self, owner: str) -> None:
        self.prefix = "_" + owner.lstrip("_")

    def _mangled(self, name: str) -> str:
        private = name.startswith("__") and not name.endswith("__") and "." not in name
        return self.prefix + name if private else name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("attr", "id", "arg"):
            if isinstance(getattr(node, field, None), str):
                setattr(node, field, self._mangled(getattr(node, field)))
        return super().generic_visit(node)


def _same(a: CodeType, b: CodeType) -> bool:
    """Whether they do the same, wherever they stand."""
    if (a.co_code, a.co_names, a.co_varnames) != (b.co_code, b.co_names, b.co_varnames):
        return False
    if len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        _same(x, y)
        if isinstance(x, CodeType) and isinstance(y, CodeType)
        else type(x) is type(y) and repr(x) == repr(y)
        if not isinstance(x, frozenset)
        else x == y
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def _compiled(
    function: FunctionType, node: ast.FunctionDef, cells: tuple[str, ...]
) -> CodeType:
    """The code of ``node`` inside of a function that has ``cells``."""
    bare = ast.FunctionDef(node.name, _bare(node.args), node.body, [])
    outer = ast.parse(f"def outer({', '.join(cells)}): pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [ast.copy_location(bare, node)]
    ast.copy_location(outer, node)
    names = sorted(used(function.__code__) - _called_methods(function.__code__))
    before = [ast.copy_location(ast.Import([*map(ast.alias, names)]), node)] if names else []
    module = ast.fix_missing_locations(ast.Module([*before, outer], []))
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for _ in range(2):
        code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return code


def used(code: CodeType) -> set[str]:
    """The globals and attributes that a function and those in it name."""
    inside = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(used, inside))


def _called_methods(code: CodeType) -> set[str]:
    """The globals whose methods it calls, which no `import` made: those compile to something else."""
    found = set()
    for one, two in itertools.pairwise(dis.get_instructions(code)):
        flagged = two.opname == "LOAD_ATTR" and sys.version_info >= (3, 12) and two.arg & 1
        if one.opname == "LOAD_GLOBAL" and (two.opname == "LOAD_METHOD" or flagged):
            found.add(one.argval)
    inside = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return found.union(*map(_called_methods, inside))


def _bare(arguments: ast.arguments) -> ast.arguments:
    """Without annotations, and with None for every default."""

    def bare(arg: ast.arg | None) -> ast.arg | None:
        return arg and ast.arg(arg.arg)

    def each(args: list[ast.arg]) -> list[ast.arg]:
        return [ast.arg(arg.arg) for arg in args]

    return ast.arguments(
        each(arguments.posonlyargs),
        each(arguments.args),
        bare(arguments.vararg),
        each(arguments.kwonlyargs),
        [default and ast.Constant(None) for default in arguments.kw_defaults],
        bare(arguments.kwarg),
        [ast.Constant(None) for _ in arguments.defaults],
    )


def tree(function: FunctionType, owner: str) -> ast.FunctionDef:
    """Its source, which stands in the class ``owner``; what is read there is what runs.

    Raises:
        LeftAlone: it cannot be found, or is not that of what runs.
    """
    code = function.__code__
    if hasattr(function, "__wrapped__"):
        raise LeftAlone("it is decorated")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise LeftAlone("it is a generator or asynchronous")
    lines = linecache.getlines(code.co_filename, function.__globals__)
    find = _of_lambda if code.co_name == "<lambda>" else _of_def
    try:
        node = find(code, lines)
        if node is not None:
            _Mangle(owner).visit(node)
            if _same(_compiled(function, node, code.co_freevars), code):
                return node
    except (SyntaxError, ValueError, IndexError, StopIteration):
        pass
    raise LeftAlone("its source is not at hand")


def build(
    function: FunctionType, node: ast.FunctionDef, given: Mapping[str, object]
) -> FunctionType:
    """``function`` with the body of ``node``, in which the names of ``given`` are known."""
    old = function.__code__
    code = _compiled(function, node, (*old.co_freevars, *given)).replace(
        co_name=old.co_name, co_qualname=old.co_qualname, co_firstlineno=old.co_firstlineno
    )
    cells = dict(zip(old.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in given.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    new = FunctionType(code, function.__globals__, function.__name__, None, closure)
    functools.update_wrapper(new, function)
    del new.__wrapped__
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return new
