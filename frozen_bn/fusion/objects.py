"""What an expression in a method is, as far as the attributes of its instance tell, as they are
now."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .names import bound_in

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


class Objects:
    """Of one run of a method. ``known``: what variables are. ``any_of`` is told of a module, one of
    whose children is meant, nobody knows which."""

    def __init__(
        self,
        node: ast.FunctionDef,
        globals: dict[str, Any],
        known: dict[str, Any],
        any_of: Callable[[nn.Module], None],
    ) -> None:
        self.globals, self.known, self.any_of = globals, known, any_of
        self.locals = bound_in(node)

    def of(self, e: ast.expr | None) -> Any:
        """What ``e`` is, if that can be told: a constant, or an attribute of the instance."""
        try:
            return self._of(e)
        except Exception:  # of a property, or an index out of range
            return UNKNOWN

    def _of(self, e: ast.expr | None) -> Any:
        if isinstance(e, ast.Constant):
            return e.value
        if isinstance(e, ast.Name):
            known = UNKNOWN if e.id in self.locals else self.globals.get(e.id, UNKNOWN)
            return self.known.get(e.id, known)
        if isinstance(e, ast.Attribute) and e.attr != "training":  # in either mode
            return self._attribute(self.of(e.value), e.attr)
        if isinstance(e, ast.Subscript):
            inside, index = self.of(e.value), self.of(e.slice)
            return self._item(inside, index)
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add | ast.Sub):  # of an index
            a, b = self.of(e.left), self.of(e.right)
            if type(a) is int and type(b) is int:
                return a + b if isinstance(e.op, ast.Add) else a - b
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.args:
            inside = self.of(e.args[0])
            if e.func.id == "len" and isinstance(inside, nn.Module):
                return len(inside._modules)
            if e.func.id == "getattr" and isinstance(inside, nn.Module):
                name = self.of(e.args[1])
                return getattr(inside, name, None) if name is not UNKNOWN else self._any(inside)
        return UNKNOWN

    def _attribute(self, inside: Any, name: str) -> Any:
        if not isinstance(inside, nn.Module | ModuleType):
            return UNKNOWN
        found = getattr(inside, name, UNKNOWN)
        computed = isinstance(getattr(type(inside), name, None), property)
        harmless = found is None or isinstance(found, nn.Module | int | str | torch.dtype)
        if computed and isinstance(inside, nn.Module) and not harmless:
            self.any_of(inside)  # nobody knows what it was computed from
        return found

    def _item(self, inside: Any, index: Any) -> Any:
        if not isinstance(inside, nn.ModuleList | nn.ModuleDict | nn.Sequential | list | tuple):
            return UNKNOWN
        if index is UNKNOWN and isinstance(inside, nn.Module):
            return self._any(inside)
        return inside[index] if index is not UNKNOWN else UNKNOWN

    def _any(self, holder: nn.Module) -> Any:
        self.any_of(holder)
        return UNKNOWN

    def decide(self, test: ast.expr) -> bool | None:
        """What a test of the instance's attributes says."""
        try:
            return self._decide(test)
        except Exception:  # of a comparison, or of Python's bool()
            return None

    def _decide(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.BoolOp):
            each = [self.decide(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in each else None if None in each else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.decide(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            a, b = self.of(test.left), self.of(test.comparators[0])
            compare, kinds = _COMPARISONS.get(type(test.ops[0]), (None, ()))
            known = _is_plain(a) and (_is_plain(b) or isinstance(b, kinds))
            return bool(compare(a, b)) if known and compare else None
        found = self.of(test)
        return bool(found) if _is_plain(found) else None

    def items(self, e: ast.expr) -> list[Any]:
        """What a loop over layers runs over; nothing, if that cannot be told."""
        if isinstance(e, ast.Tuple | ast.List):
            return [
                tuple(map(self.of, x.elts)) if isinstance(x, ast.Tuple) else self.of(x)
                for x in e.elts
            ]
        if isinstance(e, ast.Call):
            if any(keyword.arg != "strict" for keyword in e.keywords):
                return []
            name = e.func.attr if isinstance(e.func, ast.Attribute) else getattr(e.func, "id", "")
            if name == "range":
                limits = [*map(self.of, e.args)]
                known = all(isinstance(limit, int) for limit in limits)
                return [*range(*limits)] if known else []
            if name == "zip" or (name in ("enumerate", "reversed") and len(e.args) == 1):
                each = [self.items(argument) for argument in e.args]
                return [*{"zip": zip, "enumerate": enumerate, "reversed": reversed}[name](*each)]
            found = self.of(e.func.value) if isinstance(e.func, ast.Attribute) else None
            if isinstance(found, nn.ModuleDict) and name in ("values", "items"):
                return [*getattr(found, name)()]
            if isinstance(found, nn.Module) and name in ("children", "named_children"):
                return [*getattr(found, name)()]
            return []
        found = self.of(e)
        held = any(
            isinstance(found, kind) and type(found).__iter__ is kind.__iter__
            for kind in (nn.ModuleList, nn.Sequential)
        )
        return [*found._modules.values()] if held else []


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | nn.Module)


def bound(target: ast.expr, item: Any) -> Iterator[tuple[str, Any]]:
    """What the variables of a loop are, where it runs over ``item``."""
    if isinstance(target, ast.Name):
        yield target.id, item
    elif isinstance(target, ast.Tuple):
        known = isinstance(item, tuple)
        for part, value in zip(target.elts, item if known else [UNKNOWN] * 99, strict=False):
            yield from bound(part, value)
