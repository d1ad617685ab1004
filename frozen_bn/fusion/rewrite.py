"""One method's source, rewritten to do by steps what is local and adjacent (see steps.py).

    out = self.conv1(x)         out = steps.convolve(self.conv1, x)
    out = self.bn1(out)         out = steps.normalize(self.bn1, out)
    out = self.relu(out)        out = steps.activate(self.relu, out)
    return out                  return out

What a step returns may be *pending*: not computed yet. Then it is assigned to a local variable by a
plain assignment, or handed to the next step. A variable that may be pending is handed to a step as it
is only where its value is read for the last time; any other read is ``steps.value(out)``. Where
something else is done before the next step, ``steps.settle`` computes what others could change.
"""

from __future__ import annotations

import ast
import copy
import itertools

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import NamedTuple, TypeVar, cast

from . import flow, source
from .source import LeftAlone

#: By the text of what is called, what it is: the name of the step that calls it. Only a hint: "call"
#: is right for anything.
Roles = Mapping[str, str]

#: The steps whose result may be pending.
_PENDING = ("convolve", "normalize", "call", "add", "add_into")
_METHODS = ("relu", "relu_", "add", "add_")
_REFUSED = ("locals", "vars", "eval", "exec", "_getframe", "currentframe", "dir", "globals")
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
_ENDS = (ast.Return, ast.Raise, ast.Break, ast.Continue)

#: Which way an `if` goes, by its test; None if that is not known.
Decide = Callable[[ast.expr], bool | None]

Node = TypeVar("Node", bound=ast.AST)
_Place = tuple[int, int, int | None, int | None]


@dataclass(eq=False)
class Site:
    """A step in a method: what it calls, and which steps it takes what is pending from and gives it
    to."""

    step: str
    node: ast.expr | ast.stmt
    callee: ast.expr | None  # None: a sum
    inputs: list[set[Site]] = field(default_factory=lambda: [set(), set()])
    readers: set[Site] = field(default_factory=set)
    returned: bool = False  # by a method that may return what is pending
    settled: bool = False  # something else is done before the next step
    others: dict[ast.stmt, ast.expr | None] = field(default_factory=dict)  # that read it: calls what

    def is_useful(self) -> bool:
        """Whether it may do the work of another step too, or leave its own to another."""
        before = {site.step for sites in self.inputs for site in sites}
        after = {site.step for site in self.readers}
        consumers = {"normalize", "activate", "call", "add", "add_into"}
        if self.returned:
            return True
        if self.step == "convolve":
            return bool(after & {"normalize", "call"})
        if self.step in ("normalize", "call"):
            return bool(before & {"convolve", "call", "normalize"} or after & consumers)
        return bool(before & {"normalize", "call", "add", "add_into"})


class State(NamedTuple):
    """At one place: which variables may be pending, and by which steps; which have a value."""

    pending: dict[str, frozenset[Site]]
    assigned: frozenset[str]


class Rewritten(NamedTuple):
    """A method with steps."""

    function: FunctionType
    text: str
    raw: FunctionType | None = None  # the same, but it may return what is pending
    node: ast.FunctionDef | None = None  # as it was written
    roles: Roles = {}


def _join(a: State | None, b: State | None) -> State | None:
    """None is where nothing gets to."""
    if a is None or b is None:
        return a or b
    names = {**a.pending, **b.pending}
    none: frozenset[Site] = frozenset()
    pending = {n: a.pending.get(n, none) | b.pending.get(n, none) for n in names}
    return State(pending, a.assigned & b.assigned)


class _Scope:
    """The rewriting of one function's body. With ``raw`` it may return what is pending."""

    def __init__(
        self, method: _Method, node: ast.FunctionDef | ast.Lambda, raw: bool = False
    ) -> None:
        self.method, self.returns_raw, self.returned = method, raw, False
        self.inner: dict[str, str] = {}  # by the name of an inner function, that of its raw form
        if isinstance(node, ast.Lambda):
            self.body: list[ast.stmt] = [ast.copy_location(ast.Return(node.body), node.body)]
        else:
            self.body = node.body
        arguments = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        self.shared = flow.captured(self.body) | {method.self_name}
        self.live = flow.Liveness(self.body)
        self.state: State | None = State({}, frozenset(arguments))
        self.ever: dict[str, frozenset[Site]] = {}  # pending at some place
        self.statement: ast.stmt = ast.Pass()
        self.borders = 0  # of the `with` and `try` around it

    def rewritten(self) -> list[ast.stmt]:
        """The new body."""
        return self.block(self.body, [])

    # Expressions

    def step(self, name: str, arguments: Sequence[ast.expr], at: Node) -> ast.expr:
        function = ast.Attribute(ast.Name(self.method.steps, ast.Load()), name, ast.Load())
        call = ast.Call(function, [*arguments], [])
        for node in (call, function, function.value):
            ast.copy_location(node, at)  # type: ignore[type-var]
        return call

    def raw(
        self, e: ast.expr, then: Sequence[ast.expr] = ()
    ) -> tuple[ast.expr, frozenset[Site]]:
        """``e`` as an argument of a step, and the steps whose result it may be, pending. ``then``
        is evaluated between it and the step."""
        if isinstance(e, ast.Name) and self.state and e.id in self.state.pending:
            if not self.live_ends(e.id):
                return self.value(e, self.state.pending[e.id]), frozenset()
            new, sites = cast(ast.expr, e), self.state.pending[e.id]
        elif isinstance(e, ast.Call):
            new, sites = self.call(e)
        elif isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            new, sites = self.sum("add", e, e.left, e.right)
        else:
            new, sites = self.rebuilt(e), frozenset()
        if sites and not all(map(flow.only_reads, then)):
            new = self.settle(new, sites)
        return new, sites

    def settle(self, new: ast.expr, sites: frozenset[Site]) -> ast.expr:
        for site in sites:
            site.settled = True
        return self.step("settle", [new], new)

    def live_ends(self, name: str) -> bool:
        return isinstance(self.statement, _SIMPLE) and self.live.ends(name, self.statement)

    def call(self, e: ast.Call) -> tuple[ast.expr, frozenset[Site]]:
        none: frozenset[Site] = frozenset()
        if not e.args and e.keywords and e.keywords[0].arg == "input":  # F.relu(input=x)
            e = ast.copy_location(ast.Call(e.func, [e.keywords[0].value], e.keywords[1:]), e)
        if any(isinstance(argument, ast.Starred) for argument in e.args):
            return self.rebuilt(e), none
        role = self.method.role(e)
        if isinstance(e.func, ast.Name) and e.func.id in self.inner:
            role = "call"
        if role == "add":
            if len(e.args) != 2 or e.keywords:
                return self.rebuilt(e), none
            return self.sum("add", e, *e.args, self.visit(e.func))
        if role == "method":
            return self.method_call(e)
        site = self.method.site(e, role, e.func)
        if site is None or not e.args:
            return self.rebuilt(e), none
        others = [*e.args[1:], *(keyword.value for keyword in e.keywords)]
        function = self.visit(e.func)
        if isinstance(function, ast.Name) and function.id in self.inner:
            function = ast.copy_location(ast.Name(self.inner[function.id], ast.Load()), function)
        convolves = role == "convolve"
        first, inputs = (self.visit(e.args[0]), none) if convolves else self.raw(e.args[0], others)
        self.link(site, 0, inputs)
        new = self.step(role, [function, first, *map(self.visit, e.args[1:])], e)
        cast(ast.Call, new).keywords = [self.rebuilt(keyword) for keyword in e.keywords]
        return new, frozenset({site}) if role in _PENDING else none

    def method_call(self, e: ast.Call) -> tuple[ast.expr, frozenset[Site]]:
        """``a.relu()``, ``a.add_(b)``."""
        none: frozenset[Site] = frozenset()
        attribute = cast(ast.Attribute, e.func)
        adds = attribute.attr in ("add", "add_")
        if e.keywords or len(e.args) != adds:
            return self.rebuilt(e), none
        left, inputs = self.raw(attribute.value, e.args)
        right, others = self.raw(e.args[0]) if adds else (ast.Constant(None), none)
        callee = None if adds else attribute
        site = self.linked(e, "add" if adds else "activate", callee, inputs, others)
        if site is None:
            new = copy.copy(e)
            left, right = self.value(left, inputs), self.value(right, others)
            new.func = ast.copy_location(ast.Attribute(left, attribute.attr, ast.Load()), e.func)
            new.args = [right] if adds else []
            return new, none
        name = ast.copy_location(ast.Constant(attribute.attr), e)
        new_step = self.step("method", [left, name, *([right] if adds else [])], e)
        return new_step, frozenset({site}) if adds else none

    def sum(
        self, step: str, e: ast.expr | ast.stmt, a: ast.expr, b: ast.expr, *function: ast.expr
    ) -> tuple[ast.expr, frozenset[Site]]:
        left, inputs = self.raw(a, [b])
        right, others = self.raw(b)
        number = isinstance(a, ast.Constant) or isinstance(b, ast.Constant)
        site = None if number else self.linked(e, step, None, inputs, others)
        if site is not None:
            return self.step(step, [left, right, *function], e), frozenset({site})
        left, right = self.value(left, inputs), self.value(right, others)
        if function:
            return ast.copy_location(ast.Call(function[0], [left, right], []), e), frozenset()
        return ast.copy_location(ast.BinOp(left, ast.Add(), right), e), frozenset()

    def linked(
        self,
        e: ast.expr | ast.stmt,
        step: str,
        callee: ast.expr | None,
        *inputs: frozenset[Site],
    ) -> Site | None:
        """The step that takes ``inputs``, if it takes any that may be pending."""
        site = self.method.site(e, step, callee) if any(inputs) else None
        if site is not None:
            for place, sites in enumerate(inputs):
                self.link(site, place, sites)
        return site

    def link(self, site: Site, place: int, inputs: frozenset[Site]) -> None:
        site.inputs[place] |= inputs
        for before in inputs:
            before.readers.add(site)

    def visit(self, e: ast.expr) -> ast.expr:
        """``e`` where its value is needed."""
        return self.value(*self.raw(e))

    def value(self, new: ast.expr, sites: frozenset[Site]) -> ast.expr:
        for site in sites:
            call = getattr(self.statement, "value", None)
            site.others[self.statement] = call.func if isinstance(call, ast.Call) else None
        return self.step("value", [new], new) if sites else new

    def rebuilt(self, node: Node) -> Node:
        """A copy, with what is in it rewritten."""
        if isinstance(node, ast.Lambda):
            inner = _Scope(self.method, node)
            (body,) = inner.rewritten()
            new: ast.AST = ast.Lambda(self.rebuilt(node.args), cast(ast.Return, body).value)
            return cast(Node, ast.copy_location(new, node))
        new = copy.copy(node)
        for name, value in ast.iter_fields(node):
            setattr(new, name, self.part(value))
        return new

    def part(self, value: object) -> object:
        if isinstance(value, list):
            return [self.part(item) for item in value]
        if isinstance(value, ast.expr):
            reads = not isinstance(getattr(value, "ctx", None), ast.Store | ast.Del)
            return self.visit(value) if reads else self.rebuilt(value)
        return self.rebuilt(value) if isinstance(value, ast.AST) else value

    # Statements

    def flush(self, at: ast.stmt, names: set[str] | None = None) -> list[ast.stmt]:
        """Computes what is pending."""
        if self.state is None:
            return []
        names = {*self.state.pending} if names is None else names
        new: list[ast.stmt] = []
        for name in sorted(names & self.state.assigned):
            value = self.step("value", [ast.copy_location(ast.Name(name, ast.Load()), at)], at)
            store = ast.copy_location(ast.Name(name, ast.Store()), at)
            new.append(ast.copy_location(ast.Assign([store], value), at))
        left = {n: s for n, s in self.state.pending.items() if n not in names & self.state.assigned}
        self.state = State(left, self.state.assigned)
        return new

    def block(self, body: Sequence[ast.stmt], rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        new: list[ast.stmt] = []
        for i, statement in enumerate(body):
            new += self.one(statement, [*body[i + 1 :], *rest])
        return new

    def one(self, s: ast.stmt, rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        self.statement = s
        if isinstance(s, ast.If):
            return self.branches(s, rest)
        if isinstance(s, ast.For | ast.While):
            return self.loop(s)
        if isinstance(s, flow.BORDERED):
            return self.bordered(s)
        if isinstance(s, ast.FunctionDef):
            return self.function(s)
        if isinstance(s, ast.ClassDef | ast.AsyncFunctionDef):
            self.assign({s.name})
            return [s]
        if isinstance(s, ast.Break | ast.Continue):
            return [*self.flush(s), self.left(s)]
        if isinstance(s, ast.AugAssign):
            return self.augmented(s, rest)
        if flow.target(s) is not None:
            return [self.assignment(cast(ast.Assign, s), rest)]
        if isinstance(s, ast.Return) and s.value and self.returns_raw and not self.borders:
            value, sites = self.raw(s.value)
            for site in sites:
                site.returned = self.returned = True
            return [self.left(ast.copy_location(ast.Return(value), s))]
        new = self.rebuilt(s)
        self.assign(flow.stored(s))
        if isinstance(s, ast.Delete):
            self.forget(flow.stored(s, ast.Del))
        elif isinstance(s, ast.Import | ast.ImportFrom):
            self.assign({(a.asname or a.name).split(".")[0] for a in s.names})
        return [self.left(new) if isinstance(s, _ENDS) else new]

    def left(self, s: ast.stmt) -> ast.stmt:
        self.state = None
        return s

    def assign(self, names: set[str]) -> None:
        if self.state is not None:
            self.state = State(self.state.pending, self.state.assigned | names)

    def forget(self, names: set[str]) -> None:
        if self.state is not None:
            left = {n: s for n, s in self.state.pending.items() if n not in names}
            self.state = State(left, self.state.assigned - names)

    def assignment(self, s: ast.Assign | ast.AnnAssign, rest: Sequence[ast.stmt]) -> ast.stmt:
        name = cast(str, flow.target(s))
        value = cast(ast.expr, s.value)
        if isinstance(value, ast.Name) or name in self.shared:
            new, sites = self.visit(value), frozenset[Site]()
        else:
            new, sites = self.raw(value)
        return self.stored(s, name, new, sites, rest)

    def stored(
        self,
        s: ast.Assign | ast.AnnAssign | ast.AugAssign,
        name: str,
        new: ast.expr,
        sites: frozenset[Site],
        rest: Sequence[ast.stmt],
    ) -> ast.stmt:
        if sites and not flow.soon(name, rest):
            new = self.settle(new, sites)
        if self.state is not None:
            self.forget({name})
            pending = self.state.pending | ({name: sites} if sites else {})
            self.state = State(pending, self.state.assigned | {name})
        if sites:
            self.ever[name] = self.ever.get(name, frozenset()) | sites
        store = ast.copy_location(ast.Name(name, ast.Store()), s)
        return ast.copy_location(ast.Assign([store], new), s)

    def augmented(self, s: ast.AugAssign, rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        name = s.target.id if isinstance(s.target, ast.Name) else None
        if name is None or self.state is None or name not in self.state.pending:
            return [self.rebuilt(s)]
        read = ast.copy_location(ast.Name(name, ast.Load()), s.target)
        if isinstance(s.op, ast.Add) and self.live_ends(name):
            new, sites = self.sum("add_into", s, read, s.value)
            if sites:
                return [self.stored(s, name, new, sites, rest)]
            self.statement = s
        return [*self.flush(s, {name}), self.rebuilt(s)]

    def branches(self, s: ast.If, rest: Sequence[ast.stmt]) -> list[ast.stmt]:
        test = self.visit(s.test)
        self.assign(flow.stored(s.test))
        start, ends = self.state, []
        known = self.method.decide(s.test)
        for value, body in ((True, s.body), (False, s.orelse)):
            self.state = start if known in (None, value) else None
            ends.append((self.block(body, rest) if self.state else [], self.state))
        return [self.joined(ast.If(test, [], []), s, ends)]

    def joined(
        self, new: ast.If, old: ast.stmt, ends: list[tuple[list[ast.stmt], State | None]]
    ) -> ast.stmt:
        """What is pending after one branch has a value after every other."""
        both = _join(ends[0][1], ends[1][1])
        bodies, states = [], []
        for body, state in ends:
            self.state = state
            lost = {*state.pending} - both.assigned if state and both else set()
            bodies.append([*body, *self.flush(old, lost)])
            states.append(self.state)
        self.state = _join(*states)
        new.body, new.orelse = bodies[0] or [ast.copy_location(ast.Pass(), old)], bodies[1]
        return ast.copy_location(new, old)

    def loop(self, s: ast.For | ast.While) -> list[ast.stmt]:
        head = self.visit(s.iter) if isinstance(s, ast.For) else None
        entry = self.state
        while True:
            self.state = entry
            self.statement = s
            test = self.visit(s.test) if isinstance(s, ast.While) else None
            if isinstance(s, ast.For):
                self.assign(flow.stored(s.target))
            body = self.block(s.body, [flow.LOOP])
            if self.state and entry:
                body += self.flush(s, {*self.state.pending} - entry.assigned)
            end = self.state and entry and State(self.state.pending, entry.assigned)
            grown = _join(entry, end)
            if grown == entry:
                break
            entry = grown
        self.state = entry
        orelse = self.block(s.orelse, [flow.BORDER]) + (self.flush(s) if s.orelse else [])
        self.state = _join(entry, self.state)
        new = copy.copy(s)
        new.body, new.orelse = body, orelse
        if isinstance(new, ast.For):
            new.iter, new.target = cast(ast.expr, head), self.rebuilt(cast(ast.For, s).target)
        else:
            new.test = cast(ast.expr, test)
        return [new]

    def closed(self, body: Sequence[ast.stmt], at: ast.stmt) -> list[ast.stmt]:
        """A block that nothing pending leaves."""
        self.borders += 1
        new = self.block(body, [flow.BORDER])
        self.borders -= 1
        return new + self.flush(at) if body else []

    def bordered(self, s: ast.stmt) -> list[ast.stmt]:
        """A `with`, `try` or `match`: nothing pending goes in or out. An exception may leave any
        variable of it pending all the same."""
        before = self.flush(s)
        start, outer, self.ever = self.state, self.ever, {}

        def inside(node: Node) -> Node:
            new = copy.copy(node)
            for name, value in ast.iter_fields(node):
                if name in ("body", "orelse", "finalbody"):
                    self.state = start and State({**start.pending, **self.ever}, start.assigned)
                    setattr(new, name, self.closed(value, s))
                elif name in ("handlers", "cases"):
                    setattr(new, name, [inside(part) for part in value])
                else:
                    self.statement = s
                    setattr(new, name, self.part(value))
            return new

        new = inside(s)
        self.state = start and State({**start.pending, **self.ever}, start.assigned)
        self.forget({handler.name for handler in getattr(s, "handlers", []) if handler.name})
        self.ever = {**outer, **self.ever}
        return [*before, new]

    def function(self, s: ast.FunctionDef) -> list[ast.stmt]:
        """An inner function; and one that may return what is pending, if it is called here."""
        new = copy.copy(s)
        new.decorator_list = [self.visit(d) for d in s.decorator_list]
        new.args = self.rebuilt(s.args)
        self.assign({s.name})
        if any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(s)):
            return [new]
        new.body = _Scope(self.method, s).rewritten()
        scope = _Scope(self.method, s, raw=True)
        raw = ast.FunctionDef(f"{s.name}_pending", s.args, scope.rewritten(), [])
        functions = [n.name for n in ast.walk(self.method.node) if isinstance(n, ast.FunctionDef)]
        once = functions.count(s.name) == 1 and s.name not in flow.stored(self.method.node)
        used = {*functions, *flow.names(self.method.node)}
        if not scope.returned or s.decorator_list or not once or raw.name in used:
            return [new]
        self.inner[s.name] = raw.name
        return [new, ast.copy_location(raw, s)]


class _Method:
    """What the scopes of one method share."""

    def __init__(
        self, node: ast.FunctionDef, roles: Roles, steps: str, decide: Decide, useful: set[_Place] | None
    ) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.node = node
        self.self_name = arguments[0].arg if arguments else ""
        self.roles, self.steps, self.decide, self.useful = roles, steps, decide, useful
        self.sites: dict[_Place, Site] = {}

    def role(self, call: ast.Call) -> str:
        role = self.roles.get(ast.unparse(call.func), "")
        method = isinstance(call.func, ast.Attribute) and call.func.attr in _METHODS
        return role or "method" * method

    def site(self, node: ast.expr | ast.stmt, step: str, callee: ast.expr | None) -> Site | None:
        place = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
        if not step or (self.useful is not None and place not in self.useful):
            return None
        return self.sites.setdefault(place, Site(step, node, callee))


def _prologue(node: ast.FunctionDef, name: str, steps: str, owner: str, written: str) -> ast.stmt:
    """``if steps.aside(...): return owner.forward(self, ...)``: the class's own method."""
    a = node.args
    given = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    given += [f"*{a.vararg.arg}"] if a.vararg else []
    given += [f"{arg.arg}={arg.arg}" for arg in a.kwonlyargs]
    given += [f"**{a.kwarg.arg}"] if a.kwarg else []
    text = f"if {steps}.aside({owner}.{name}, {written}): return {owner}.{name}({', '.join(given)})"
    (statement,) = ast.parse(text).body
    for part in ast.walk(statement):
        if isinstance(part, ast.expr | ast.stmt | ast.keyword):
            ast.copy_location(part, node)
    return statement


def analyse(
    node: ast.FunctionDef,
    roles: Roles,
    steps: str,
    decide: Decide = lambda test: None,
    raw: bool = False,
    every: bool = False,
) -> tuple[list[ast.stmt], list[Site]]:
    """The body with those steps that gain something, or ``every`` one. ``decide`` tells which way an
    `if` goes; with ``raw`` it may return what is pending."""
    useful: set[_Place] | None = None
    while True:
        method = _Method(node, roles, steps, decide, useful)
        body = _Scope(method, node, raw).rewritten()
        now = {place for place, site in method.sites.items() if site.is_useful()}
        if every or now == useful:
            return body, [*method.sites.values()]
        useful = now


def rewrite(
    function: FunctionType, name: str, defined_in: type, owner: type, roles: Roles, steps: object
) -> Rewritten:
    """The method ``name`` of the class ``owner``, found in ``defined_in``; as it was, without a text,
    where there is nothing to be gained.

    Raises:
        LeftAlone: it has to stay as it is.
    """
    node = source.tree(function, defined_in.__name__)
    used = {*flow.names(node)}
    names = [next(n for n in _free(word) if n not in used) for word in ("steps", "owner", "written")]
    given = dict(zip(names, (steps, owner, function), strict=True))
    prologue = _prologue(node, name, *names)

    def with_body(body: list[ast.stmt]) -> FunctionType:
        new.body = [prologue, *body]
        return source.build(function, new, given)

    new = copy.copy(node)
    new.body, sites = analyse(node, roles, names[0])
    raw_body, raw_sites = analyse(node, roles, names[0], raw=True)
    returns = name != "forward" and any(site.returned for site in raw_sites)
    if not returns and not any(site.step in ("normalize", "call") for site in sites):
        return Rewritten(function, "", None, node, roles)
    refused = used.intersection(_REFUSED)
    refused |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} & {*_REFUSED[4:6]}
    if refused:
        raise LeftAlone(f"it uses {min(refused)}")
    text = ast.unparse(ast.fix_missing_locations(new))
    raw = with_body(raw_body) if returns else None
    return Rewritten(with_body(analyse(node, roles, names[0])[0]), text, raw, node, roles)


def _free(word: str) -> Iterator[str]:
    return (word + "_" * i for i in itertools.count())
