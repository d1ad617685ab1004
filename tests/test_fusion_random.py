"""Random methods over convolutions, frozen layers, activations and sums: a fused model gives,
writes and raises what the plain one does."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from emulator.replace import pythons_node
from helpers import function_of, randomize_
from torch import Tensor, nn
from torch.utils import checkpoint

from frozen_bn import convert_frozen_bn
from frozen_bn.fusion import classes

C = 3
NAMES = ["x", "y", "z", "w"]
BORDERS = ["torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu')"]
BORDERS += ["contextlib.suppress(ValueError, RuntimeError)", "torch.inference_mode(False)"]
ACTIVATIONS = ["self.relu", "self.into", "self.silu", "self.leaky", "self.identity", "F.relu"]
ACTIVATIONS += ["torch.relu", "F.silu", "self.whole"]
HELPERS = ["self.bn0(self.conv0(v))", "self.bn1(v)", "self.conv1(v)"]
HELPERS += ["self.bn2(self.conv2(v)) + v", "self.relu(self.bn0(v)) + v"]

#: How often each statement is written; those with a block not at any depth.
STATEMENTS = {"assign": 4, "chain": 9, "augment": 2, "alone": 1, "in place": 1, "annotated": 0.5}
STATEMENTS |= {"delete": 0.3, "unpack": 1, "return": 0.3, "alias": 2, "break": 0.5, "assert": 0.2}
STATEMENTS |= {"twice": 0.5}
BLOCKS = {"if": 2, "for": 1, "while": 0.5, "with": 1, "try": 1, "def": 1}


class Failed(ValueError):
    pass


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            setattr(self, f"conv{i}", nn.Conv2d(C, C, 3, padding=1, bias=i == 0))
            setattr(self, f"bn{i}", nn.BatchNorm2d(C))
        self.wide = nn.BatchNorm2d(C + 1)  # does not fit
        self.relu, self.into = nn.ReLU(), nn.ReLU(inplace=True)
        self.silu, self.leaky, self.identity = nn.SiLU(), nn.LeakyReLU(0.2), nn.Identity()
        self.branch = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
        self.whole = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())
        self.list = nn.ModuleList([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()])
        self.yes, self.no, self.none = True, False, None
        self.kept: list[Tensor] = []

    @property
    def norm(self):
        return self.bn0

    def keep(self, x):
        """What a method may do: hold on to it, write to it later."""
        self.kept.append(x)
        return x

    def spoil(self, x):
        with torch.no_grad():
            x.detach().mul_(0.5)
        return x

    def fail(self, x):
        if x.detach().mean() > 0:
            raise Failed("positive")
        return x


class Writer:
    """Writes the text of one method."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines = []
        self.loops = 0

    def pick(self, *choices):
        return self.random.choice(choices)

    def name(self) -> str:
        return self.random.choice(NAMES)

    def layer(self) -> str:
        i = self.random.randrange(3)
        odd = self.random.random() < 0.03
        return (
            "self.wide"
            if odd
            else self.pick(f"self.bn{i}", f"self.bn{i}", "self.norm", "self.branch")
        )

    def expression(self, depth: int = 0) -> str:
        if depth > 3 or self.random.random() < 0.2:
            return self.name()
        inner = lambda: self.expression(depth + 1)  # noqa: E731
        i = self.random.randrange(3)
        kinds = {
            "conv": lambda: f"self.conv{i}({inner()})",
            "bn": lambda: f"{self.layer()}({inner()})",
            "conv, bn": lambda: f"{self.layer()}(self.conv{i}({inner()}))",
            "act": lambda: f"{self.pick(*ACTIVATIONS)}({inner()})",
            "act of bn": lambda: (
                f"{self.pick('self.relu', 'F.relu', 'self.into')}({self.layer()}({inner()}))"
            ),
            "method": lambda: f"{inner()}.{self.pick('relu', 'relu_')}()",
            "sum": lambda: f"({inner()} + {inner()})",
            "torch.add": lambda: f"torch.add({inner()}, {inner()})",
            "add": lambda: f"{inner()}.{self.pick('add', 'add_')}({inner()})",
            "item": lambda: f"self.list[{i}]({inner()})",
            "other": lambda: f"({inner()} {self.pick('*', '-')} {self.pick(self.name(), '0.5')})",
            "keep": lambda: f"self.{self.pick('keep', 'keep', 'spoil', 'fail')}({inner()})",
            "if": lambda: f"({inner()} if {self.condition()} else {inner()})",
            "walrus": lambda: f"({self.name()} := {inner()})",
            "lambda": lambda: (
                f"(lambda v: self.relu(self.bn{i}(self.conv{i}(v))) + {self.name()})({inner()})"
            ),
            "checkpoint": lambda: (
                f"checkpoint.checkpoint(self.whole, {inner()}, use_reentrant=False)"
            ),
            "keyword": lambda: f"F.leaky_relu({inner()}, negative_slope=0.3)",
            "helper": lambda: f"self.helper({inner()})",
        }
        weights = {"conv, bn": 4, "bn": 4, "act of bn": 3, "act": 3, "sum": 3, "conv": 2}
        names = [*kinds]
        return kinds[self.random.choices(names, [weights.get(n, 1) for n in names])[0]]()

    def condition(self) -> str:
        return self.pick(
            "self.yes", "self.no", "self.none is not None", f"{self.name()}.sum() > 0", "flag"
        )

    def write(self, indent: int, text: str) -> None:
        self.lines.append("    " * indent + text)

    def block(self, indent: int, count: int) -> None:
        for _ in range(count):
            self.statement(indent)

    def chain(self, indent: int) -> None:
        """As networks are written, with something in between that could spoil it."""
        n, m, i = self.name(), self.name(), self.random.randrange(3)
        lines = [f"{n} = self.conv{i}({m})"] * (self.random.random() < 0.7)
        lines.append(f"{n} = {self.layer()}({n if lines else m})")
        if self.random.random() < 0.5:
            added = self.pick(self.name(), self.expression(3), self.expression(1))
            lines.append(
                self.pick(f"{n} += {added}", f"{n} = {n} + {added}", f"{n} = {added} + {n}")
            )
        if self.random.random() < 0.7:
            lines.append(f"{n} = {self.pick('self.relu', 'F.relu', 'self.into', 'self.silu')}({n})")
        for line in lines:
            chance = self.random.random()
            if chance < 0.1 and indent < 6:
                self.write(indent, f"if {self.condition()}:")
                self.write(indent + 1, line)
            elif chance < 0.2 and indent < 6:
                self.write(indent, f"with {self.pick(*BORDERS)}:")
                self.write(indent + 1, line)
            elif chance < 0.25 and indent < 6:
                self.write(indent, "try:")
                self.write(indent + 1, line)
                self.write(indent + 1, self.between(n, m))
                self.write(indent, "except ValueError:")
                self.write(indent + 1, self.between(n, m))
            else:
                self.write(indent, line)
            if self.random.random() < 0.35:
                self.write(indent, self.between(n, m))

    def between(self, n: str, m: str) -> str:
        return self.pick(
            f"{self.name()} = {n}",
            f"{self.name()} = {n}",
            f"self.keep({n})",
            f"self.spoil({m})",
            f"self.spoil({n})",
            f"self.fail({m})",
            f"{m}.mul_(0.5)",
            f"{m} += 1.0",
            f"{n} = self.{self.pick('keep', 'spoil', 'fail', 'identity')}({n})",
            f"torch.set_grad_enabled({self.pick('False', 'True')})",
            f"({m} := {n})",
            f"{m} = (lambda v: v * 1.0)({n})",
            f"del {m}",
        )

    def statement(self, indent: int) -> None:
        weights = STATEMENTS | (BLOCKS if indent <= 4 else {})
        kind = self.random.choices([*weights], [*weights.values()])[0]
        n, m, e = self.name(), self.name(), self.expression
        simple = {
            "assign": lambda: f"{n} = {e()}",
            "annotated": lambda: f"{n}: Tensor = {e()}",
            "twice": lambda: f"{n} = {m} = {e()}",
            "alias": lambda: f"{n} = {m}",
            "augment": lambda: f"{n} {self.pick('+=', '+=', '*=', '-=')} {e(1)}",
            "alone": lambda: e(),
            "in place": lambda: f"{n}.{self.pick('relu_()', 'mul_(0.5)', f'add_({m})')}",
            "unpack": lambda: f"{n}, {m} = {e(1)}, {e(2)}",
            "delete": lambda: f"del {n}",
            "assert": lambda: f"assert {n}.dim() == 4",
        }
        if kind in simple:
            self.write(indent, simple[kind]())
        elif kind == "chain":
            self.chain(indent)
        elif kind in ("return", "break"):
            ends = self.pick("break", "continue") if self.loops else "pass"
            self.write(indent, f"if {self.condition()}:")
            self.write(indent + 1, f"return {e()}" if kind == "return" else ends)
        else:
            self.compound(indent, kind)

    def compound(self, indent: int, kind: str) -> None:
        if kind in ("for", "while"):
            self.loop(indent, kind)
        elif kind == "def":
            self.inner(indent)
        else:
            head = f"with {self.pick(*BORDERS)}" if kind == "with" else kind
            head = f"if {self.condition()}" if kind == "if" else head
            self.write(indent, f"{head}:")
            self.block(indent + 1, self.random.randint(1, 3))
        if kind == "if" and self.random.random() < 0.4:
            self.write(indent, "else:")
            self.block(indent + 1, self.random.randint(1, 2))
        elif kind == "try":
            caught = self.random.random() < 0.8
            if caught:
                self.write(indent, "except (ValueError, RuntimeError):")
                self.block(indent + 1, self.random.randint(1, 2))
            if caught and self.random.random() < 0.2:
                self.write(indent, "else:")
                self.block(indent + 1, 1)
            if not caught or self.random.random() < 0.2:
                self.write(indent, "finally:")
                self.block(indent + 1, 1)

    def loop(self, indent: int, kind: str) -> None:
        i = len(self.lines)
        if kind == "while":
            self.write(indent, f"n{i} = 0")
            self.write(indent, f"while n{i} < 2:")
            self.write(indent + 1, f"n{i} += 1")
        elif self.random.random() < 0.5:
            self.write(indent, "for layer in self.list:")
            n = self.name()
            self.write(indent + 1, f"{n} = layer({n})")
        else:
            self.write(indent, f"for n{i} in range(2):")
        self.loops += 1
        self.block(indent + 1, self.random.randint(1, 3))
        self.loops -= 1

    def inner(self, indent: int) -> None:
        i = len(self.lines)
        self.write(indent, f"def inner{i}(v):")
        loops, self.loops = self.loops, 0
        if self.random.random() < 0.5:
            self.write(indent + 1, f"y = self.conv{self.random.randrange(3)}(v)")
            self.write(indent + 1, "y = self.bn1(y)")
            self.write(indent + 1, f"y += {self.pick('v', 'v', 'self.branch(v)')}")
        else:
            self.write(indent + 1, f"y = self.bn2(v) + {self.pick('v', 'x')}")
        self.write(indent + 1, "return y")
        self.loops = loops
        call = self.pick(f"inner{i}", f"inner{i}", "checkpoint.checkpoint")
        n = self.name()
        if call == f"inner{i}":
            self.write(indent, f"{n} = inner{i}({self.name()})")
        else:
            self.write(indent, f"{n} = {call}(inner{i}, {self.name()}, use_reentrant=False)")
        if self.random.random() < 0.5:
            self.write(indent, f"{n} = self.relu({n})")

    def text(self) -> str:
        self.write(0, "def helper(self, v):")
        self.write(1, f"return {self.pick(*HELPERS)}")
        self.write(0, "def forward(self, x, y, flag=True):")
        self.write(1, "z, w = x * 2, y")
        self.block(1, self.random.randint(3, 8))
        self.write(1, f"return {self.pick(self.expression(), self.name(), '(x, y, z, w)')}")
        return "\n".join(self.lines) + "\n"


def result(net: nn.Module, seed: int, grad: bool, flag: bool) -> tuple[object, ...]:
    """What it returns or raises, the gradients, and what it wrote to."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(2, C, 4, 4, generator=generator, dtype=torch.float64).requires_grad_(grad)
        for _ in range(2)
    ]
    inputs = [leaf * 1 for leaf in leaves]
    outputs: tuple[Tensor, ...] = ()
    error: object = None
    with torch.set_grad_enabled(grad):
        try:
            returned = net(*inputs, flag)
            outputs = returned if isinstance(returned, tuple) else (returned,)
        except Exception as caught:
            error = type(caught), str(caught).split("\n")[0]
        else:
            loss = sum(t.double().square().sum() for t in outputs if t.requires_grad)
            if isinstance(loss, Tensor):
                try:
                    loss.backward()
                except RuntimeError as caught:  # of what has been written over
                    error = "backward", str(caught)[:60]
    values = [t.detach().clone() for t in (*outputs, *inputs, *net.kept)]
    if error is None:
        values += [leaf.grad for leaf in leaves if leaf.grad is not None]
        values += [p.grad for p in net.parameters() if p.grad is not None]
        values.append(torch.tensor([leaf.grad is not None for leaf in leaves]))
        values.append(torch.tensor([t.requires_grad for t in outputs]))
    return error, [v.double() for v in values], [v.dtype for v in values]


def assert_alike(seed: int) -> bool:
    """Returns whether anything was fused. Of two seeds, one goes by Python's steps and node."""
    with pythons_node() if seed % 2 else contextlib.nullcontext():
        return is_alike(seed)


def is_alike(seed: int) -> bool:
    writer = Writer(seed)
    text = writer.text()
    names = {"checkpoint": checkpoint, "contextlib": contextlib, "Failed": Failed}
    forward = function_of(text, **names)
    helper = forward.__globals__["helper"]
    torch.manual_seed(0)
    net = randomize_(type("Net", (Parts,), {"forward": forward, "helper": helper})()).double()
    plain = convert_frozen_bn(net, freeze_affine=seed % 3 > 0, fuse=False)
    fused = convert_frozen_bn(copy.deepcopy(plain), fold_conv=seed % 5 == 0)
    for grad, flag in ((True, True), (False, True), (True, False)):
        expected, actual = (result(net, seed, grad, flag) for net in (plain, fused))
        told = f"seed {seed}, grad {grad}, flag {flag}\n{text}\n{source_of(fused)}"
        if expected[0] and expected[0][0] == "backward" and actual[0] is None:
            continue  # it saves less, so that less is written over
        if actual[0] and actual[0][0] == "backward" and expected[0] is None and "silu" in text:
            continue  # a smooth activation saves what was given to the layer
        assert actual[0] == expected[0], told
        assert actual[2] == expected[2], told
        for a, b in zip(actual[1], expected[1], strict=True):
            scale = b.abs().max().item() if b.numel() else 0
            tolerance = 1e-1 if "autocast" in text else 1e-8
            assert (a - b).abs().max() <= tolerance * scale + 1e-12 or b.isnan().any(), told
    info = classes.made(fused)
    return info is not None and "forward" in info.methods


def source_of(net: nn.Module) -> str:
    info = classes.made(net)
    return "\n".join(m.text for m in info.methods.values()) if info else "not fused"


@pytest.mark.parametrize(
    "first",
    [*range(0, 100, 20), *(pytest.param(n, marks=pytest.mark.long) for n in range(100, 300, 20))],
)
def test_random_methods(first):
    fused = [assert_alike(seed) for seed in range(first, first + 20)]
    assert sum(fused) > 10


@pytest.mark.long
@pytest.mark.parametrize("first", range(300, 6000, 100))
def test_many_random_methods(first):
    for seed in range(first, first + 100):
        assert_alike(seed)
