"""convert_frozen_bn(fuse=True): what is merged, what must not be, and that both stay correct."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, assert_close_in_norm, merged, outputs_and_gradients, randomize_
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

ON_EVERY_DEVICE = pytest.mark.usefixtures("device")

C = 4
IMAGE = (2, C, 5, 6)
Pair = namedtuple("Pair", "first second")


class Parts(nn.Module):
    """What the forwards below are made of."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b"):
            setattr(self, f"conv_{name}", nn.Conv2d(C, C, 3, padding=1, bias=False))
            setattr(self, f"bn_{name}", nn.BatchNorm2d(C))
        self.relu = nn.ReLU()
        self.into = nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.3)
        self.relu6, self.relu3 = nn.ReLU6(), nn.ReLU6()
        self.relu3.max_val = 3.0
        self.odd = nn.LeakyReLU(torch.tensor(0.3))
        self.identity = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.branch = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
        self.list = nn.ModuleList([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.SiLU()])
        self.dict = nn.ModuleDict({"bn": nn.BatchNorm2d(C), "act": nn.Hardswish()})
        self.register_buffer("gain", torch.tensor(0.5))
        self.register_buffer("steps", torch.tensor(0.0))
        self.kept: list[Tensor] = []
        self.scale = 2.0


Forward = Callable[..., object]


def block(forward: Forward, **options: object) -> nn.Module:
    """A module with this forward and frozen layers; always the same weights."""
    torch.manual_seed(0)
    net = randomize_(type("Block", (Parts,), {"forward": forward})())
    return convert_frozen_bn(net, **options)


def fused_block(forward: Forward, **options: object) -> nn.Module:
    return block(forward, fuse=True, **options)


def assert_same(net: nn.Module, other: nn.Module, *inputs: object) -> None:
    """In train and eval mode, with and without gradients."""
    inputs = inputs or (torch.randn(IMAGE),)
    for training in (True, False):
        net.train(training), other.train(training)
        expected = outputs_and_gradients(other, *inputs)
        assert_close_in_norm(outputs_and_gradients(net, *inputs), expected, 1e-5)
        with torch.no_grad():
            results = []
            for module in (net, other):
                torch.manual_seed(1)
                copies = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
                results.append((module(*copies), copies))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def assert_correct(
    forward: Forward, expected: dict[str, str] | None = None, writes_to_input: bool = False
) -> None:
    """However it is frozen; and merged as expected."""
    for freeze_affine in (True,) if writes_to_input else (True, False):
        plain = block(forward, freeze_affine=freeze_affine)
        for options in ({"fuse": True}, {"fold_conv": True}):
            net = convert_frozen_bn(copy.deepcopy(plain), **options)
            if expected is not None:
                assert merged(net) == expected
            assert_same(net, plain)


def reason(forward: Forward) -> str:
    return fused_block(forward).bn_a.fate.reason


# Spellings


def x_a(self, x):
    return self.bn_a(self.conv_a(x))


def x_b(self, x):
    return self.bn_b(self.conv_b(x))


def iadd(a, b):
    a += b
    return a


ACTIVATION_SPELLINGS: dict[str, tuple[str, Forward]] = {
    "F.relu": ("relu", lambda s, x: F.relu(x_a(s, x))),
    "F.relu in place": ("relu", lambda s, x: F.relu(x_a(s, x), inplace=True)),
    "F.relu in place, positional": ("relu", lambda s, x: F.relu(x_a(s, x), True)),
    "F.relu by keyword": ("relu", lambda s, x: F.relu(input=x_a(s, x))),
    "torch.relu": ("relu", lambda s, x: torch.relu(x_a(s, x))),
    "torch.relu_": ("relu", lambda s, x: torch.relu_(x_a(s, x))),
    "x.relu": ("relu", lambda s, x: x_a(s, x).relu()),
    "x.relu_": ("relu", lambda s, x: x_a(s, x).relu_()),
    "nn.ReLU": ("relu", lambda s, x: s.relu(x_a(s, x))),
    "nn.ReLU in place": ("relu", lambda s, x: s.into(x_a(s, x))),
    "F.relu6": ("relu6", lambda s, x: F.relu6(x_a(s, x))),
    "F.leaky_relu": ("leaky_relu", lambda s, x: F.leaky_relu(x_a(s, x))),
    "F.leaky_relu 0.3": ("leaky_relu", lambda s, x: F.leaky_relu(x_a(s, x), 0.3)),
    "F.leaky_relu 0": ("leaky_relu", lambda s, x: F.leaky_relu(x_a(s, x), 0)),
    "F.leaky_relu keyword": (
        "leaky_relu",
        lambda s, x: F.leaky_relu(x_a(s, x), negative_slope=0.3, inplace=True),
    ),
    "F.leaky_relu_": ("leaky_relu", lambda s, x: F.leaky_relu_(x_a(s, x), 0.3)),
    "nn.LeakyReLU": ("leaky_relu", lambda s, x: s.leaky(x_a(s, x))),
    "F.silu": ("silu", lambda s, x: F.silu(x_a(s, x))),
    "F.silu in place": ("silu", lambda s, x: F.silu(x_a(s, x), inplace=True)),
    "F.hardswish": ("hardswish", lambda s, x: F.hardswish(x_a(s, x))),
    "F.hardswish in place": ("hardswish", lambda s, x: F.hardswish(x_a(s, x), True)),
    "identity between": ("relu", lambda s, x: s.relu(s.identity(x_a(s, x)))),
}

SUM_SPELLINGS: dict[str, Forward] = {
    "bn + x": lambda s, x: x_a(s, x) + x,
    "x + bn": lambda s, x: x + x_a(s, x),
    "bn += x": lambda s, x: iadd(x_a(s, x), x),
    "torch.add(bn, x)": lambda s, x: torch.add(x_a(s, x), x),
    "torch.add(x, bn)": lambda s, x: torch.add(x, x_a(s, x)),
    "bn.add(x)": lambda s, x: x_a(s, x).add(x),
    "x.add(bn)": lambda s, x: x.add(x_a(s, x)),
    "bn.add_(x)": lambda s, x: x_a(s, x).add_(x),
}

PAIR_SPELLINGS: dict[str, Forward] = {
    "+": lambda s, x: x_a(s, x) + x_b(s, x),
    "+=": lambda s, x: iadd(x_a(s, x), x_b(s, x)),
    "torch.add": lambda s, x: torch.add(x_a(s, x), x_b(s, x)),
    "without convolutions": lambda s, x: s.bn_a(x) + s.bn_b(x),
    "in another order": lambda s, x: (lambda y: x_b(s, x) + y)(x_a(s, x)),
}


@pytest.mark.parametrize("spelling", ACTIVATION_SPELLINGS)
def test_spellings_of_an_activation(spelling):
    name, forward = ACTIVATION_SPELLINGS[spelling]
    assert_correct(forward, expected={"bn_a": name})


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("spelling", SUM_SPELLINGS)
def test_spellings_of_a_sum(spelling):
    forward = SUM_SPELLINGS[spelling]
    assert_correct(forward, expected={"bn_a": "add"})
    assert_correct(lambda s, x: F.relu(forward(s, x)), expected={"bn_a": "add + relu"})


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("spelling", PAIR_SPELLINGS)
def test_spellings_of_a_sum_of_two_branches(spelling):
    forward = PAIR_SPELLINGS[spelling]
    assert_correct(forward, expected=dict.fromkeys(("bn_a", "bn_b"), "two branches"))
    both = dict.fromkeys(("bn_a", "bn_b"), "two branches + relu")
    assert_correct(lambda s, x: s.into(forward(s, x)), expected=both)


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_every_activation_after_a_sum(activation):
    act = getattr(F, activation)
    assert_correct(lambda s, x: act(x_a(s, x) + x), expected={"bn_a": f"add + {activation}"})


PLACES: dict[str, tuple[Forward, dict[str, str]]] = {
    "branch in a Sequential": (
        lambda s, x: F.relu(x_a(s, x) + s.branch(x)),
        {"bn_a": "two branches + relu", "branch.1": "two branches + relu"},
    ),
    "ModuleList": (lambda s, x: s.list[2](s.list[1](s.list[0](x))), {"list.1": "silu"}),
    "ModuleList, iterated": (
        lambda s, x: [x := part(x) for part in s.list][-1],
        {"list.1": "silu"},
    ),
    "ModuleDict": (lambda s, x: s.dict["act"](s.dict["bn"](x)), {"dict.bn": "hardswish"}),
    "child of a child": (lambda s, x: F.relu(s.branch[1](x)), {"branch.1": "relu"}),
    "a chain": (lambda s, x: F.relu(x_b(s, s.relu(x_a(s, x)))), {"bn_a": "relu", "bn_b": "relu"}),
    "dict": (lambda s, x: {"out": F.relu(x_a(s, x)), "in": x}, {"bn_a": "relu"}),
    "OrderedDict": (lambda s, x: OrderedDict(out=s.relu(x_a(s, x)), i=x), {"bn_a": "relu"}),
    "tuple": (lambda s, x: (F.relu(x_a(s, x)), [x, None]), {"bn_a": "relu"}),
    "namedtuple": (lambda s, x: Pair(F.relu(x_a(s, x)), x), {"bn_a": "relu"}),
    "dropout beside it": (lambda s, x: s.drop(F.relu(x_a(s, x))) + s.drop(x), {"bn_a": "relu"}),
    "self.training": (
        lambda s, x: F.relu(x_a(s, x)) if s.training else F.silu(x_a(s, x)) * 2,
        None,
    ),
    "F.dropout": (
        lambda s, x: F.dropout(F.relu(x_a(s, x)), 0.5, training=s.training),
        {"bn_a": "relu"},
    ),
    "mode of a child": (
        lambda s, x: F.dropout(F.relu(x_a(s, x)), 0.5, s.drop.training),
        {"bn_a": "relu"},
    ),
    "default argument": (lambda s, x, k=2: F.relu(x_a(s, x)) * k, {"bn_a": "relu"}),
    "flag": (lambda s, x: F.relu(x_a(s, x)) * s.scale, {"bn_a": "relu"}),
    "buffer": (lambda s, x: F.relu(x_a(s, x)) * s.gain, {"bn_a": "relu"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_layers_may_stand(place):
    forward, expected = PLACES[place]
    assert_correct(forward, expected=expected)


def test_nested_sequentials():
    inner = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    plain = convert_frozen_bn(randomize_(nn.Sequential(inner, nn.Identity(), nn.ReLU())))
    fused = convert_frozen_bn(copy.deepcopy(plain), fuse=True)
    assert merged(fused) == {"0.1": "relu"}
    assert_same(fused, plain)


@pytest.mark.parametrize("kind", [dict, OrderedDict, tuple, list, Pair])
def test_the_type_of_what_is_returned(kind):
    forwards: dict[type, Forward] = {
        Pair: lambda s, x: Pair(F.relu(x_a(s, x)), x),
        dict: lambda s, x: dict(a=F.relu(x_a(s, x))),
        OrderedDict: lambda s, x: OrderedDict(a=F.relu(x_a(s, x))),
        tuple: lambda s, x: tuple([F.relu(x_a(s, x))]),
        list: lambda s, x: list((F.relu(x_a(s, x)),)),
    }
    net = fused_block(forwards[kind])
    assert merged(net)
    assert type(net(torch.randn(IMAGE))) is kind


# What must not be merged


def used_twice(s, x):
    y = x_a(s, x)
    return F.relu(y) * y


def mutated(s, x):
    x += s.bn_a(s.conv_a(x.clone()))
    return F.relu(x)


def mutated_and_read(s, x):
    y = x * 2
    z = y
    z += x_a(s, x)
    return z * y


def alias_after_sum(s, x):
    y = x_a(s, x)
    z = y
    y += x
    return z * y


def input_written_later(s, x):
    y = s.bn_a(x[:, :C])
    x.mul_(0.5)
    return F.relu(y) + x


def input_written_before_the_sum(s, x):
    y = s.bn_a(s.identity(x))
    x.mul_(0.5)
    return F.relu(y + x)


def addend_written_later(s, x):
    z = x * 2
    y = x_a(s, x) + z
    z.mul_(0.5)
    return F.relu(y) + z


def written_between(s, x):
    y = x_a(s, x)
    y.mul_(0.5)
    return F.relu(y)


def conv_read_twice(s, x):
    y = s.conv_a(x)
    return F.relu(s.bn_a(y)) * y


def called_twice(s, x):
    return F.relu(s.bn_a(F.relu(s.bn_a(x))))


def conv_called_twice(s, x):
    return F.relu(s.bn_a(s.conv_a(s.conv_a(x))))


UNMERGED: dict[str, Forward] = {
    "used elsewhere": used_twice,
    "identity += bn": mutated,
    "the sum is read by another name": mutated_and_read,
    "alias of a sum": alias_after_sum,
    "written in between": written_between,
    "called twice": called_twice,
    "scalar": lambda s, x: x_a(s, x) + 1,
    "alpha": lambda s, x: torch.add(x_a(s, x), x, alpha=2),
    "alpha method": lambda s, x: x_a(s, x).add(x, alpha=2),
    "x += x": lambda s, x: (lambda y: iadd(y, y))(x_a(s, x)),
    "gelu": lambda s, x: F.gelu(x_a(s, x)),
    "threshold": lambda s, x: F.threshold(x_a(s, x), 0.1, 0.0),
    "subtraction": lambda s, x: x_a(s, x) - x,
    "another limit": lambda s, x: s.relu3(x_a(s, x)),
    "slope that is a tensor": lambda s, x: s.odd(x_a(s, x)),
}


def test_a_limit_that_changes_later_is_obeyed():
    net, plain = (block(lambda s, x: s.relu6(x_a(s, x)), fuse=fuse) for fuse in (True, False))
    assert merged(net) == {"bn_a": "relu6"}
    for module in (net, plain):
        module.relu6.max_val = 0.5
    assert_same(net, plain)


@pytest.mark.parametrize("case", UNMERGED)
def test_what_is_not_merged_stays_correct(case):
    assert_correct(UNMERGED[case], expected={})


ODD: dict[str, Forward] = {
    "conv output read elsewhere": conv_read_twice,
    "conv called twice": conv_called_twice,
    "addend written to later": addend_written_later,
    "the module's own input": lambda s, x: F.relu(s.bn_a(x)) * x,
    "own input, sum": lambda s, x: (F.relu(s.bn_a(x) + x), x),
    "broadcast addend": lambda s, x: F.relu(x_a(s, x) + x[:, :1]),
    "broadcast bn": lambda s, x: F.relu(x_a(s, x) + x.unsqueeze(0)),
    "promotion": lambda s, x: F.relu(x_a(s, x) + x.double()),
    "promotion the other way": lambda s, x: F.relu(x_a(s, x) + x.bfloat16()),
    "promotion in place": lambda s, x: F.relu(iadd(x_a(s, x), x.double())),
    "zero-dimensional": lambda s, x: F.relu(x_a(s, x) + x.mean()),
    "a number from a child": lambda s, x: F.relu(x_a(s, x) + s.gain),
}


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("case", ODD)
def test_what_is_not_plain_stays_correct(case):
    assert_correct(ODD[case])


@pytest.mark.parametrize("forward", [input_written_later, input_written_before_the_sum])
def test_an_input_that_is_written_to_afterwards(forward):
    assert_correct(forward, writes_to_input=True)


def test_the_modules_own_input_is_not_overwritten():
    net, x = fused_block(lambda s, x: F.relu(s.bn_a(x))), torch.randn(IMAGE)
    before = x.clone()
    net(x)
    assert torch.equal(x, before)


def test_an_output_of_a_convolution_that_a_hook_keeps_is_not_overwritten():
    net, kept = fused_block(lambda s, x: F.relu(x_a(s, x))), []
    net.conv_a.register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.randn(IMAGE)
    net(x)
    assert torch.equal(kept[0], F.conv2d(x, net.conv_a.weight, padding=1))


def test_shared_layers_are_not_merged():
    net = type("Block", (Parts,), {"forward": lambda s, x: F.relu(x_a(s, x)) + x_b(s, x)})()
    net.bn_b = net.bn_a
    plain = convert_frozen_bn(randomize_(net))
    fused = convert_frozen_bn(copy.deepcopy(plain), fuse=True)
    assert merged(fused) == {} and "several places" in fused.bn_a.fate.reason
    assert_same(fused, plain)


# Forwards that are left alone


def stores(s, x):
    s.last = F.relu(x_a(s, x))
    return s.last


def keeps(s, x):
    s.kept.append(F.relu(x_a(s, x)))
    return s.kept[-1]


def counts(s, x):
    s.steps += 1
    return F.relu(x_a(s, x)) * s.steps


def without_gradients(s, x):
    with torch.no_grad():
        y = F.relu(x_a(s, x))
    return y + x


def with_autocast_off(s, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(x_a(s, x))


def with_gradients(s, x):
    with torch.enable_grad():
        return F.relu(x_a(s, x))


def checkpointed(s, x):
    return torch.utils.checkpoint.checkpoint(lambda y: F.relu(x_a(s, y)), x, use_reentrant=False)


def noise(x):
    return x * torch.initial_seed() if torch.rand(()) < 2 else x


def depends_on_a_list(s, x):
    return F.relu(x_a(s, torch.cat(x) if isinstance(x, list) else x))


def asks_of_a_value(s, x):
    y = x_a(s, x)
    return F.relu(y) if isinstance(y, Tensor) else None


LEFT_ALONE: dict[str, tuple[Forward, str]] = {
    "branch on values": (lambda s, x: F.relu(x_a(s, x)) if x.sum() > 0 else x, "cannot trace"),
    "branch on gradients": (
        lambda s, x: F.relu(x_a(s, x)) if x.requires_grad else x,
        "cannot trace",
    ),
    "loop over the batch": (lambda s, x: sum(F.relu(x_a(s, x)) for _ in x), "iterates"),
    "stores": (stores, "sets s.last"),
    "keeps": (keeps, "changes kept"),
    "counts": (counts, "sets s.steps"),
    "random numbers": (lambda s, x: F.relu(x_a(s, x)) * torch.rand(()), "uses torch.rand"),
    "no_grad": (without_gradients, "has a `with`"),
    "no_grad as a decorator": (torch.no_grad()(lambda s, x: F.relu(x_a(s, x))), "decorated"),
    "enable_grad": (with_gradients, "has a `with`"),
    "autocast": (with_autocast_off, "has a `with`"),
    "checkpointing": (checkpointed, "uses torch.utils.checkpoint"),
    "gradient mode": (lambda s, x: F.relu(x_a(s, x)) * (1 + torch.is_grad_enabled()), "is_grad"),
    "*args": (lambda s, *x: F.relu(x_a(s, x[0])), "any number"),
    "**kwargs": (lambda s, x, **k: F.relu(x_a(s, x)), "any number"),
    "isinstance of a value": (asks_of_a_value, "isinstance"),
    "tensor made": (lambda s, x: F.relu(x_a(s, x)) * torch.tensor(2.0), "uses torch.tensor"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_a_forward_that_a_trace_cannot_repeat_is_left_alone_with_a_reason(case):
    forward, text = LEFT_ALONE[case]
    assert text in reason(forward)
    plain, fused = block(forward), fused_block(forward)
    assert fused.kept == [] and fused.steps == 0 and not hasattr(fused, "last")
    assert_same(fused, plain)
    assert len(fused.kept) == len(plain.kept) and fused.steps == plain.steps
