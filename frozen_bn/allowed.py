"""What a traced ``forward`` may call: functions that a trace records, and those that look at
nothing but their arguments; and in which syntax."""

from __future__ import annotations

import ast
import functools
import operator
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import get_testing_overrides

_BUILTINS = {len, range, enumerate, zip, reversed, list, tuple, dict, set, frozenset, slice, map}
_BUILTINS |= {int, float, bool, str, complex, min, max, sum, sorted, abs, round, any, all}
#: The syntax that is understood.
SYNTAX: tuple[type[ast.AST], ...] = (
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword),
    *(ast.Return, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.If, ast.For, ast.While),
    *(ast.Pass, ast.Break, ast.Continue, ast.Assert, ast.Raise, ast.Constant, ast.Name),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.Call, ast.BinOp, ast.UnaryOp),
    *(ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.NamedExpr),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Lambda),
    *(ast.JoinedStr, ast.FormattedValue),
)

#: What no tensor is an instance of.
KINDS = (list, tuple, dict, str, int, float, bool, complex, type(None))

#: Answers that cannot change, for a fused forward steps aside where they would.
_MODES = {"is_scripting", "is_tracing", "is_compiling", "is_dynamo_compiling", "is_in_onnx_export"}


@functools.cache
def torch_functions() -> frozenset[Any]:
    """Those which a trace records, and which are then executed."""
    found = {*get_testing_overrides()}
    for module in (torch, F):
        for name, function in vars(module).items():
            base = getattr(module, name[:-1], None)
            if name.endswith("_") and callable(base) and base in found:
                found.add(function)  # relu_
    more = ("hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "logsigmoid", "softsign")
    found |= {getattr(F, name) for name in more}
    found.add(torch._assert)
    return frozenset(found)


def is_torch_function(value: object) -> bool:
    try:
        return value in torch_functions()
    except TypeError:  # not hashable
        return False


def is_torchs(function: object) -> bool:
    if isinstance(function, FunctionType):
        return str(function.__globals__.get("__name__")).split(".")[0] == "torch"
    return str(getattr(function, "__module__", None)).split(".")[0] == "torch"


def asks_mode(function: object) -> bool:
    return is_torchs(function) and getattr(function, "__name__", "") in _MODES


def makes_namedtuple(kind: type) -> bool:
    new = kind.__new__
    return (
        kind.__bases__ == (tuple,)
        and isinstance(new, FunctionType)
        and (new.__globals__.get("__name__") == f"namedtuple_{kind.__name__}")
    )


def is_pure(value: object) -> bool:
    """A class or a function in C that looks at nothing but its arguments."""
    if isinstance(value, type):
        known = value in _BUILTINS or value is OrderedDict or makes_namedtuple(value)
        return known or (value.__module__ == "builtins" and issubclass(value, Exception))
    if not isinstance(value, BuiltinFunctionType):
        return False
    known = value in _BUILTINS or value.__module__ in ("math", "_operator")
    return known and value not in (operator.is_, operator.is_not)
