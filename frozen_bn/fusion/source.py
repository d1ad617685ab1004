"""From a function to the syntax tree of its source, and from a changed tree to a function that has
the same file, lines, globals, cells, defaults and annotations."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any


class LeftAlone(Exception):
    """Why a method stays as it was written."""


#: Of a file: by first line and name, each function and the class that it stands in.
_Functions = dict[tuple[int, str], tuple[ast.FunctionDef, str | None] | None]


def first_line(node: ast.FunctionDef) -> int:
    """The line that its code object names."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def codes(code: CodeType) -> Iterator[CodeType]:
    """It and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def _functions(node: ast.AST, owner: str | None) -> Iterator[tuple[ast.FunctionDef, str | None]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, owner
        elif isinstance(child, ast.Lambda):
            body = ast.copy_location(ast.Return(child.body), child.body)
            function = ast.FunctionDef("<lambda>", child.args, [body], [])
            yield ast.copy_location(function, child), owner
        yield from _functions(child, child.name if isinstance(child, ast.ClassDef) else owner)


@functools.lru_cache(maxsize=100)
def _read(file: str, text: str, flags: int) -> tuple[_Functions, frozenset[CodeType]]:
    tree = ast.parse(text)
    functions: dict[tuple[int, str], Any] = {}
    for node, owner in _functions(tree, None):
        place = first_line(node), node.name
        functions[place] = None if place in functions else (node, owner)  # two lambdas of a line
    return functions, frozenset(codes(compile(text, file, "exec", flags, dont_inherit=True)))


def tree(function: FunctionType) -> tuple[ast.FunctionDef, str | None]:
    """Its source, and the name of the class that it stands in. What is read there is what runs.

    Raises:
        LeftAlone: it cannot be found, or is not that of what runs.
    """
    code = function.__code__
    if hasattr(function, "__wrapped__"):
        raise LeftAlone("it is decorated")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise LeftAlone("it is a generator or asynchronous")
    lines = linecache.getlines(code.co_filename, function.__globals__)
    flags = code.co_flags & __future__.annotations.compiler_flag
    try:
        functions, compiled = _read(code.co_filename, "".join(lines), flags)
    except (SyntaxError, ValueError):
        functions, compiled = {}, frozenset()
    found = functions.get((code.co_firstlineno, code.co_name))
    if found is None or code not in compiled:
        raise LeftAlone("its source is not at hand")
    return found


def bare(arguments: ast.arguments) -> ast.arguments:
    """Without annotations, and with None for every default."""
    new = copy.deepcopy(arguments)
    for arg in ast.walk(new):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    new.defaults = [ast.Constant(None) for _ in new.defaults]
    new.kw_defaults = [default and ast.Constant(None) for default in new.kw_defaults]
    return new


def build(
    function: FunctionType,
    node: ast.FunctionDef,
    owner: str | None,
    given: Mapping[str, object],
) -> FunctionType:
    """``function`` with the body of ``node``, in which the names of ``given`` are known. It stands
    in the class ``owner``, which matters for names such as ``self.__x``."""
    old = function.__code__
    method = ast.FunctionDef(node.name, bare(node.args), node.body, [])
    scope = ast.ClassDef(owner, [], [], [method], []) if owner else method
    cells = [ast.arg(name) for name in {*old.co_freevars, *given} - {"__class__"}]
    arguments = ast.arguments([], cells, None, [], [], None, [])
    body: list[ast.stmt] = [scope]
    if owner and owner not in old.co_freevars:  # or the method would find this class by its name
        body.insert(0, ast.Global([owner]))
    outer = ast.FunctionDef("<outer>", arguments, body, [])
    for part in (method, *body, outer):
        ast.copy_location(part, node)
    module = ast.fix_missing_locations(ast.Module([outer], []))
    flags = old.co_flags & __future__.annotations.compiler_flag
    compiled = compile(module, old.co_filename, "exec", flags, dont_inherit=True)
    code = next(c for c in codes(compiled) if c.co_name == old.co_name).replace(
        co_qualname=old.co_qualname, co_firstlineno=old.co_firstlineno
    )
    known = dict(zip(old.co_freevars, function.__closure__ or (), strict=True))
    known |= {name: CellType(value) for name, value in given.items()}
    closure = tuple(known[name] for name in code.co_freevars)
    new = FunctionType(code, function.__globals__, function.__name__, None, closure)
    functools.update_wrapper(new, function)
    del vars(new)["__wrapped__"]
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return new
