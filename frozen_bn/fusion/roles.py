"""What the calls in a method are of, as far as it can be told without running anything: for the names
of the steps, and for which calls to leave as they are. Only hints: the steps look again."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .. import activations
from ..modules import _FrozenBatchNorm
from .steps import _CONVOLUTIONS

UNKNOWN = object()
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def is_sequential(module: object) -> bool:
    """Whether calling it is calling its children one after the other, and nothing else."""
    kind = type(module)
    made = vars(kind).get("_frozen_bn")
    kind = made.written if made else kind
    return (
        issubclass(kind, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
    )


def parts(module: nn.Module | None) -> Iterator[nn.Module]:
    """What calling a Sequential calls, also of those in it; else the module itself."""
    if module is not None and is_sequential(module):
        for child in module._modules.values():
            yield from parts(child)
    elif module is not None:
        yield module


def role(module: object) -> str:
    """Which step calls ``module``; "" for none."""
    if type(module) in _CONVOLUTIONS:
        return "convolve"
    if isinstance(module, _FrozenBatchNorm):
        return "normalize"
    if type(module) is nn.Identity:
        return "call"
    if isinstance(module, nn.Module) and activations.is_known(type(module)):
        return "activate"
    if isinstance(module, nn.Module) and is_sequential(module):
        inside = [m for m in parts(module) if type(m) is not nn.Identity]
        roles = [role(inside[-1]), role(inside[0])] if inside else ["call", ""]
        if roles[0] == "normalize":
            return "normalize"
        return "call" if roles[0] == "convolve" or roles[1] == "activate" else ""
    return ""


def look_up(e: ast.expr, names: Mapping[str, object], run: bool = False) -> Any:
    """What ``e`` stands for; UNKNOWN if only running code could tell, which is done with ``run``."""
    if isinstance(e, ast.Name):
        return names.get(e.id, UNKNOWN)
    if isinstance(e, ast.Constant):
        return e.value
    if isinstance(e, ast.Attribute):
        inside, name = e.value, e.attr
    elif isinstance(e, ast.Subscript):
        inside, name = e.value, look_up(e.slice, names, run)
    elif isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id == "getattr":
        inside, name = e.args[0], look_up(e.args[1], names, run)
    else:
        return UNKNOWN
    holder = look_up(inside, names, run)
    if holder is UNKNOWN or name is UNKNOWN:
        return UNKNOWN
    if isinstance(e, ast.Subscript):
        return _item(holder, name)
    if run:
        return getattr(holder, name, None)
    if not isinstance(holder, nn.Module):
        return UNKNOWN
    for place in (holder._modules, vars(holder)):
        if name in place:
            return place[name]
    return UNKNOWN if isinstance(getattr(type(holder), name, None), property) else None


def _item(holder: object, name: object) -> Any:
    if isinstance(holder, nn.ModuleList | nn.Sequential) and isinstance(name, int):
        return [*holder._modules.values()][name] if -len(holder) <= name < len(holder) else None
    if isinstance(holder, nn.ModuleDict) and isinstance(name, str):
        return holder._modules.get(name)
    return UNKNOWN if isinstance(holder, nn.Module | list | tuple | dict) else None


def _of_name(text: list[str], function: FunctionType) -> object:
    """A global, or an attribute of one."""
    value: Any = function.__globals__.get(text[0], UNKNOWN)
    for name in text[1:]:
        value = getattr(value, name, UNKNOWN) if isinstance(value, type(torch)) else UNKNOWN
    return value


def _of_function(value: object) -> str:
    if value is torch.add:
        return "add"
    try:
        return "activate" if value in activations._FUNCTIONS else ""
    except TypeError:
        return ""


def _chain(e: ast.expr) -> list[str] | None:
    names: list[str] = []
    while isinstance(e, ast.Attribute):
        names.append(e.attr)
        e = e.value
    return [e.id, *reversed(names)] if isinstance(e, ast.Name) else None


def _holds_layers(value: object) -> bool:
    """Whether a layer can be got out of it."""
    if isinstance(value, _CONTAINERS):
        return any(role(child) in ("normalize", "convolve") for child in value._modules.values())
    return role(value) != ""


def _bound_to_layers(node: ast.FunctionDef, self_name: str, instances: list[nn.Module]) -> set[str]:
    """Local variables that may be one of the layers."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.For | ast.comprehension):
            targets, value = [part.target], part.iter
        elif isinstance(part, ast.Assign):
            targets, value = part.targets, part.value
        else:
            continue
        inside = [e for e in ast.walk(value) if isinstance(e, ast.Attribute | ast.Call)]
        called = {id(e.func) for e in inside if isinstance(e, ast.Call)}
        if any(
            _holds_layers(look_up(e, {self_name: instance}))
            for e in inside
            if id(e) not in called
            for instance in instances
        ):
            names = (n for target in targets for n in ast.walk(target))
            found |= {n.id for n in names if isinstance(n, ast.Name)}
    return found


def roles(
    node: ast.FunctionDef, function: FunctionType, instances: Iterable[nn.Module]
) -> dict[str, str]:
    """By the text of each callee in a method, the step that calls it."""
    instances = [*instances]
    arguments = [*node.args.posonlyargs, *node.args.args]
    self_name = arguments[0].arg if arguments else ""
    layers = _bound_to_layers(node, self_name, instances)
    found: dict[str, str] = {}
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or not (call.args or call.keywords):
            continue
        callee, chain = call.func, _chain(call.func)
        if isinstance(callee, ast.Name) and callee.id in layers:
            step = "call"
        elif chain and chain[0] != self_name:
            step = _of_function(_of_name(chain, function))
        else:
            values = [look_up(callee, {self_name: instance}) for instance in instances]
            known = {role(value) for value in values if value is not None} - {""}
            unknown = any(value is UNKNOWN for value in values) and not _is_method_of(callee)
            step = "call" if unknown or len(known) > 1 else "".join(known)
        if step:
            found[ast.unparse(callee)] = step
    return found


def _is_method_of(callee: ast.expr) -> bool:
    """Whether it is ``f(x).name``, which is no layer."""
    while isinstance(callee, ast.Attribute | ast.Subscript):
        callee = callee.value
    getter = isinstance(callee, ast.Call) and isinstance(callee.func, ast.Name)
    return not isinstance(callee, ast.Name) and not (getter and callee.func.id == "getattr")  # type: ignore[attr-defined]
