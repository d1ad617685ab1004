"""Which Python code a trace can stand for.

A trace repeats what a ``forward`` did once. So all that it did must follow from its arguments, for
which it was given proxies, and from what the guards watch. ``Form`` decides that for one function,
about to be executed, by its source, and allows what is listed here and in ``allowed.py``. What the
module's attributes are is left to ``watch.py``, which sees every one that is read.
"""

from __future__ import annotations

import ast
import builtins
import enum
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any, cast

from torch import Tensor, fx, nn

from .allowed import (
    KINDS,
    SYNTAX,
    asks_mode,
    is_pure,
    is_torch_function,
    is_torchs,
    makes_namedtuple,
)
from .guards import Class, Guard, Outside, absent, is_plain
from .source import CannotTrace, Comprehension, bound, source, values


class Form:
    """Audits one function that is about to be executed.

    Args:
        function: it.
        arguments: its local variables at the start.
        guard: takes down what the trace rests on.
        know: takes down a function that it may call.
        tensors: whether the arguments of the traced forward are said to be tensors.
    """

    def __init__(
        self,
        function: FunctionType,
        arguments: Mapping[str, Any],
        guard: Callable[[Guard], None],
        know: Callable[[FunctionType], None],
        tensors: bool,
    ) -> None:
        code = function.__code__
        self.function, self.guard, self.know, self.tensors = function, guard, know, tensors
        self.cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        node = source(code, function.__globals__)
        body: list[ast.AST] = [*node.body] if isinstance(node, ast.FunctionDef) else [node.body]
        assigned = bound(body)
        self.values = values(body)
        count = code.co_argcount + code.co_kwonlyargcount
        count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
        parameters = code.co_varnames[:count]
        self.scopes = [assigned | {*parameters}]
        self.arguments = {name: arguments[name] for name in parameters}
        first = self.arguments[parameters[0]] if parameters else None
        fixed = isinstance(first, nn.Module) and parameters[0] not in assigned
        self.self_name = parameters[0] if fixed else None
        self.name = function.__qualname__
        for part in body:
            self.visit(part)

    def refuse(self, what: str) -> CannotTrace:
        return CannotTrace(f"{self.name} {what}, which a trace cannot repeat")

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, SYNTAX):
            raise self.refuse(f"has a `{type(node).__name__.lower()}`")
        getattr(self, f"visit_{type(node).__name__}", self.visit_parts)(node)

    def visit_parts(self, node: ast.AST) -> None:
        for part in ast.iter_child_nodes(node):
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    # Scopes

    def is_local(self, name: str) -> bool:
        return any(name in scope for scope in self.scopes)

    def is_inner(self, name: str) -> bool:
        return any(name in scope for scope in self.scopes[1:])

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self.scopes.append({n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)})
        self.visit(node.body)
        self.scopes.pop()

    def visit_comprehension_of(self, node: Comprehension) -> None:
        self.visit(node.generators[0].iter)
        self.scopes.append(bound([part.target for part in node.generators]))
        self.visit_parts(node)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_of

    # Names of what is outside

    def outside(self, node: ast.expr) -> Any:
        """What a name, or a name in modules of Python, stands for; ``absent`` for local ones."""
        if isinstance(node, ast.Attribute):
            module = self.outside(node.value)
            if not isinstance(module, ModuleType | enum.EnumType):
                return absent
            return self.looked_up(module, node.attr, getattr(module, node.attr, absent))
        if not isinstance(node, ast.Name) or self.is_local(node.id):
            return absent
        names = self.function.__globals__
        if node.id in self.cells:
            cell = self.cells[node.id]
            return self.looked_up(cell, node.id, cell.cell_contents)
        if node.id not in names:
            return getattr(builtins, node.id, absent)
        module = sys.modules.get(names.get("__name__", ""))
        known = module if module is not None and vars(module) is names else names
        return self.looked_up(known, node.id, names[node.id])

    def looked_up(self, holder: object, name: str, value: Any) -> Any:
        wraps = isinstance(value, FunctionType) and value.__globals__ is vars(fx._symbolic_trace)
        if wraps:  # by fx, while it traces
            value = value.__wrapped__
        self.guard(Outside(holder, name, value))
        if isinstance(value, FunctionType) and (wraps or not is_torchs(value)):
            self.know(value)
        return value

    def use(self, node: ast.expr) -> bool:
        """Whether ``node`` names something outside; it is refused unless it is known."""
        value = self.outside(node)
        if value is absent:
            if isinstance(node, ast.Name) and not self.is_local(node.id):
                raise self.refuse(f"uses {node.id}")
            return value is not absent
        known = is_plain(value) or is_torch_function(value) or asks_mode(value) or is_pure(value)
        if not known and (not isinstance(value, FunctionType) or is_torchs(value)):
            raise self.refuse(f"uses {ast.unparse(node)}")
        if isinstance(value, type) and makes_namedtuple(value):
            self.know(cast(FunctionType, value.__new__))
        return True

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.use(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not isinstance(node.ctx, ast.Load):
            raise self.refuse(f"sets {ast.unparse(node)}")
        if node.attr.startswith("__") and node.attr.endswith("__"):
            raise self.refuse(f"asks {node.attr}")
        of = self.outside(node.value)
        if isinstance(of, ModuleType | enum.EnumType):
            self.use(node)
        elif of is absent:
            self.visit(node.value)
        elif not is_plain(of):
            raise self.refuse(f"uses {ast.unparse(node)}")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        root = node.value
        while isinstance(root, ast.Subscript):
            root = root.value
        local = isinstance(root, ast.Name) and self.is_local(root.id)
        if not isinstance(node.ctx, ast.Load) and not (local and root.id != self.self_name):  # type: ignore[attr-defined]
            raise self.refuse(f"sets {ast.unparse(node)}")
        self.visit_parts(node)

    # Questions

    def own(self, node: ast.expr) -> nn.Module | None:
        """The module that ``self``, or ``self.child.child``, is."""
        if isinstance(node, ast.Name):
            if node.id != self.self_name or self.is_inner(node.id):
                return None
            return cast(nn.Module, self.arguments[node.id])
        owner = self.own(node.value) if isinstance(node, ast.Attribute) else None
        if owner is None or not isinstance(node, ast.Attribute):
            return None
        return owner._modules.get(node.attr)

    def argument(self, node: ast.expr) -> Any:
        """What is passed for a parameter that is never reassigned."""
        if not isinstance(node, ast.Name) or node.id in self.values or self.is_inner(node.id):
            return absent
        return self.arguments.get(node.id, absent)

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        for i, asked in enumerate(node.ops):
            if isinstance(asked, ast.Is | ast.IsNot):
                pair = sides[i : i + 2]
                none = [isinstance(n, ast.Constant) and n.value is None for n in pair]
                if sum(none) != 1 or not self.can_be_none(pair[none.index(False)]):
                    raise self.refuse(f"asks `{ast.unparse(node)}`")
        self.visit_parts(node)

    def can_be_none(self, node: ast.expr, asking: tuple[str, ...] = ()) -> bool:
        """Whether it is None now if and only if it will be."""
        if isinstance(node, ast.Constant | ast.BinOp | ast.Tuple | ast.List | ast.Dict):
            return True
        if isinstance(node, ast.IfExp):
            return all(self.can_be_none(n, asking) for n in (node.body, node.orelse))
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and self.outside(node.func) is getattr:
                known = len(node.args) == 2 or self.can_be_none(node.args[2], asking)
                name = getattr(node.args[1], "value", None)
                return known and isinstance(name, str) and self.is_read(node.args[0], name)
            return is_torch_function(self.outside(node.func))
        if isinstance(node, ast.Attribute):
            return self.is_read(node.value, node.attr)
        if not isinstance(node, ast.Name) or not self.is_local(node.id) or self.is_inner(node.id):
            return False
        value = self.arguments.get(node.id)
        if isinstance(value, fx.Proxy) and value.node.op not in ("placeholder", "get_attr"):
            return False  # None is no argument of a fused forward
        assigned = self.values.get(node.id, [])
        return node.id in asking or all(
            v is not None and self.can_be_none(v, (*asking, node.id)) for v in assigned
        )

    def is_read(self, node: ast.expr, name: str) -> bool:
        """Whether ``node`` is a module that has ``name`` itself; its class may compute anything."""
        owner = self.own(node)
        return owner is not None and not hasattr(
            inspect.getattr_static(type(owner), name, None), "__get__"
        )

    def visit_Call(self, node: ast.Call) -> None:
        called = self.outside(node.func) if isinstance(node.func, ast.Name) else absent
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if called is isinstance:
            self.check_isinstance(node)
            arguments = arguments[:1]
        elif called is getattr or called is hasattr:
            if not node.args or self.own(node.args[0]) is None:
                raise self.refuse(f"asks `{ast.unparse(node)}`")
        elif isinstance(node.func, ast.Attribute) and self.is_super(node.func.value):
            self.check_super(node.func)
        else:
            self.visit(node.func)
        for argument in arguments:
            self.visit(argument)

    def check_isinstance(self, node: ast.Call) -> None:
        if len(node.args) != 2 or node.keywords:
            raise self.refuse(f"asks `{ast.unparse(node)}`")
        asked, kinds = node.args
        listed = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]
        classes = [self.outside(kind) for kind in listed]
        if not all(isinstance(kind, type) and kind is not absent for kind in classes):
            raise self.refuse(f"asks `{ast.unparse(node)}`")
        module, value = self.own(asked), self.argument(asked)
        module = value if isinstance(value, nn.Module) else module
        if module is not None:
            self.guard(Class(module, type(module)))
        elif isinstance(value, fx.Proxy):
            known = (Tensor, *KINDS) if self.tensors else (Tensor,)
            if not all(kind in known for kind in classes):
                raise self.refuse(f"asks `{ast.unparse(node)}`")
        elif value is absent and not (
            isinstance(asked, ast.Attribute) and self.own(asked.value) is not None
        ):
            raise self.refuse(f"asks `{ast.unparse(node)}`")

    def is_super(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and self.outside(node.func) is super

    def check_super(self, node: ast.Attribute) -> None:
        call = cast(ast.Call, node.value)
        given = [self.outside(call.args[0])] if len(call.args) == 2 else []
        cell = self.cells.get("__class__")
        kinds = given if call.args else [cell.cell_contents] if cell else []
        module = self.arguments.get(self.self_name) if self.self_name else None
        if (
            len(kinds) != 1
            or module is None
            or call.keywords
            or node.attr.startswith("__")
            or (call.args and self.own(call.args[1]) is not module)
        ):
            raise self.refuse(f"asks `{ast.unparse(node)}`")
        order = type(module).__mro__
        later = order[order.index(kinds[0]) + 1 :]
        kind = next((kind for kind in later if node.attr in vars(kind)), None)
        function = vars(kind)[node.attr] if kind else None
        if not isinstance(function, FunctionType):
            raise self.refuse(f"asks `{ast.unparse(node)}`")
        self.guard(Class(module, type(module)))
        self.guard(Outside(kind, node.attr, function))
        if not is_torchs(function):
            self.know(function)
