"""convert_frozen_bn(fuse=True): what is merged, what must not be, and that both stay correct."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    assert_close_in_norm,
    fates,
    function_of,
    merged,
    outputs_and_gradients,
    randomize_,
    runs_fused,
)
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
        plain = block(forward, freeze_affine=freeze_affine, fuse=False)
        for options in ({"fuse": True}, {"fold_conv": True}):
            net = convert_frozen_bn(copy.deepcopy(plain), **options)
            if expected is not None:  # by the sources; or in a run, which knows better
                assert merged(net, *[torch.randn(IMAGE)] * (not expected)) == expected
            assert_same(net, plain)


# Spellings

ACTIVATION_SPELLINGS: dict[str, tuple[str, Forward]] = {
    "F.relu": ("relu", lambda s, x: F.relu(s.bn_a(s.conv_a(x)))),
    "F.relu in place": ("relu", lambda s, x: F.relu(s.bn_a(s.conv_a(x)), inplace=True)),
    "F.relu in place, positional": ("relu", lambda s, x: F.relu(s.bn_a(s.conv_a(x)), True)),
    "F.relu by keyword": ("relu", lambda s, x: F.relu(input=s.bn_a(s.conv_a(x)))),
    "torch.relu": ("relu", lambda s, x: torch.relu(s.bn_a(s.conv_a(x)))),
    "torch.relu_": ("relu", lambda s, x: torch.relu_(s.bn_a(s.conv_a(x)))),
    "x.relu": ("relu", lambda s, x: s.bn_a(s.conv_a(x)).relu()),
    "x.relu_": ("relu", lambda s, x: s.bn_a(s.conv_a(x)).relu_()),
    "nn.ReLU": ("relu", lambda s, x: s.relu(s.bn_a(s.conv_a(x)))),
    "nn.ReLU in place": ("relu", lambda s, x: s.into(s.bn_a(s.conv_a(x)))),
    "F.relu6": ("relu6", lambda s, x: F.relu6(s.bn_a(s.conv_a(x)))),
    "F.leaky_relu": ("leaky_relu", lambda s, x: F.leaky_relu(s.bn_a(s.conv_a(x)))),
    "F.leaky_relu 0.3": ("leaky_relu", lambda s, x: F.leaky_relu(s.bn_a(s.conv_a(x)), 0.3)),
    "F.leaky_relu 0": ("leaky_relu", lambda s, x: F.leaky_relu(s.bn_a(s.conv_a(x)), 0)),
    "F.leaky_relu keyword": (
        "leaky_relu",
        lambda s, x: F.leaky_relu(s.bn_a(s.conv_a(x)), negative_slope=0.3, inplace=True),
    ),
    "F.leaky_relu_": ("leaky_relu", lambda s, x: F.leaky_relu_(s.bn_a(s.conv_a(x)), 0.3)),
    "nn.LeakyReLU": ("leaky_relu", lambda s, x: s.leaky(s.bn_a(s.conv_a(x)))),
    "F.silu": ("silu", lambda s, x: F.silu(s.bn_a(s.conv_a(x)))),
    "F.silu in place": ("silu", lambda s, x: F.silu(s.bn_a(s.conv_a(x)), inplace=True)),
    "F.hardswish": ("hardswish", lambda s, x: F.hardswish(s.bn_a(s.conv_a(x)))),
    "F.hardswish in place": ("hardswish", lambda s, x: F.hardswish(s.bn_a(s.conv_a(x)), True)),
    "identity between": ("relu", lambda s, x: s.relu(s.identity(s.bn_a(s.conv_a(x))))),
}

A, B = "s.bn_a(s.conv_a(x))", "s.bn_b(s.conv_b(x))"

SUM_SPELLINGS = {
    "bn + x": f"y = {A} + x",
    "x + bn": f"y = x + {A}",
    "bn += x": f"y = {A}; y += x",
    "torch.add(bn, x)": f"y = torch.add({A}, x)",
    "torch.add(x, bn)": f"y = torch.add(x, {A})",
    "bn.add(x)": f"y = {A}.add(x)",
    "x.add(bn)": f"y = x.add({A})",
    "bn.add_(x)": f"y = {A}.add_(x)",
}

PAIR_SPELLINGS = {
    "+": f"y = {A} + {B}",
    "+=": f"y = {A}; y += {B}",
    "torch.add": f"y = torch.add({A}, {B})",
    "in another order": f"z = {A}; y = {B} + z",
}


def sum_of(statements: str, result: str = "y") -> Forward:
    return function_of(f"def forward(s, x):\n    {statements}\n    return {result}\n")


@pytest.mark.parametrize("spelling", ACTIVATION_SPELLINGS)
def test_spellings_of_an_activation(spelling):
    name, forward = ACTIVATION_SPELLINGS[spelling]
    assert_correct(forward, expected={"bn_a": name})


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("spelling", SUM_SPELLINGS)
def test_spellings_of_a_sum(spelling):
    statements = SUM_SPELLINGS[spelling]
    assert_correct(sum_of(statements), expected={"bn_a": "add"})
    assert_correct(sum_of(statements, "F.relu(y)"), expected={"bn_a": "add + relu"})


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("spelling", PAIR_SPELLINGS)
def test_spellings_of_a_sum_of_two_branches(spelling):
    statements = PAIR_SPELLINGS[spelling]
    both = dict.fromkeys(("bn_a", "bn_b"), "two branches")
    assert_correct(sum_of(statements), expected=both)
    both = dict.fromkeys(("bn_a", "bn_b"), "two branches + relu")
    assert_correct(sum_of(statements, "s.into(y)"), expected=both)


@pytest.mark.long_emulated
@ON_EVERY_DEVICE
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_every_activation_after_a_sum(activation):
    forward = sum_of(f"y = {A} + x", f"F.{activation}(y)")
    assert_correct(forward, expected={"bn_a": f"add + {activation}"})


def iterates(s, x):
    for part in s.list:
        x = part(x)
    return x


PLACES: dict[str, tuple[Forward, dict[str, str]]] = {
    "branch in a Sequential": (
        lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + s.branch(x)),
        {"bn_a": "two branches + relu", "branch.1": "two branches + relu"},
    ),
    "ModuleList": (lambda s, x: s.list[2](s.list[1](s.list[0](x))), {"list.1": "silu"}),
    "ModuleList, iterated": (iterates, None),
    "ModuleDict": (lambda s, x: s.dict["act"](s.dict["bn"](x)), {"dict.bn": "hardswish"}),
    "child of a child": (lambda s, x: F.relu(s.branch[1](x)), {"branch.1": "relu"}),
    "a chain": (
        lambda s, x: F.relu(s.bn_b(s.conv_b(s.relu(s.bn_a(s.conv_a(x)))))),
        {"bn_a": "relu", "bn_b": "relu"},
    ),
    "dict": (lambda s, x: {"out": F.relu(s.bn_a(s.conv_a(x))), "in": x}, {"bn_a": "relu"}),
    "OrderedDict": (
        lambda s, x: OrderedDict(out=s.relu(s.bn_a(s.conv_a(x))), i=x),
        {"bn_a": "relu"},
    ),
    "tuple": (lambda s, x: (F.relu(s.bn_a(s.conv_a(x))), [x, None]), {"bn_a": "relu"}),
    "namedtuple": (lambda s, x: Pair(F.relu(s.bn_a(s.conv_a(x))), x), {"bn_a": "relu"}),
    "dropout beside it": (
        lambda s, x: s.drop(F.relu(s.bn_a(s.conv_a(x)))) + s.drop(x),
        {"bn_a": "relu"},
    ),
    "self.training": (
        lambda s, x: F.relu(s.bn_a(s.conv_a(x))) if s.training else F.silu(s.bn_a(s.conv_a(x))) * 2,
        None,
    ),
    "F.dropout": (
        lambda s, x: F.dropout(F.relu(s.bn_a(s.conv_a(x))), 0.5, training=s.training),
        {"bn_a": "relu"},
    ),
    "mode of a child": (
        lambda s, x: F.dropout(F.relu(s.bn_a(s.conv_a(x))), 0.5, s.drop.training),
        {"bn_a": "relu"},
    ),
    "default argument": (lambda s, x, k=2: F.relu(s.bn_a(s.conv_a(x))) * k, {"bn_a": "relu"}),
    "flag": (lambda s, x: F.relu(s.bn_a(s.conv_a(x))) * s.scale, {"bn_a": "relu"}),
    "buffer": (lambda s, x: F.relu(s.bn_a(s.conv_a(x))) * s.gain, {"bn_a": "relu"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_layers_may_stand(place):
    forward, expected = PLACES[place]
    assert_correct(forward, expected=expected)


def test_layers_that_a_loop_runs_over():
    assert merged(fused_block(iterates), torch.randn(IMAGE)) == {"list.1": "silu"}


def test_nested_sequentials():
    inner = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    plain = randomize_(nn.Sequential(inner, nn.Identity(), nn.ReLU()))
    convert_frozen_bn(plain, fuse=False)
    fused = convert_frozen_bn(copy.deepcopy(plain), fuse=True)
    assert merged(fused) == {"0.1": "relu"}
    assert_same(fused, plain)


@pytest.mark.parametrize("kind", [dict, OrderedDict, tuple, list, Pair])
def test_the_type_of_what_is_returned(kind):
    forwards: dict[type, Forward] = {
        Pair: lambda s, x: Pair(F.relu(s.bn_a(s.conv_a(x))), x),
        dict: lambda s, x: dict(a=F.relu(s.bn_a(s.conv_a(x)))),
        OrderedDict: lambda s, x: OrderedDict(a=F.relu(s.bn_a(s.conv_a(x)))),
        tuple: lambda s, x: tuple([F.relu(s.bn_a(s.conv_a(x)))]),
        list: lambda s, x: list((F.relu(s.bn_a(s.conv_a(x))),)),
    }
    net = fused_block(forwards[kind])
    assert merged(net)
    assert type(net(torch.randn(IMAGE))) is kind


# What must not be merged


def used_twice(s, x):
    y = s.bn_a(s.conv_a(x))
    return F.relu(y) * y


def mutated(s, x):
    x += s.bn_a(s.conv_a(x.clone()))
    return F.relu(x)


def mutated_and_read(s, x):
    y = x * 2
    z = y
    z += s.bn_a(s.conv_a(x))
    return z * y


def alias_after_sum(s, x):
    y = s.bn_a(s.conv_a(x))
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
    y = s.bn_a(s.conv_a(x)) + z
    z.mul_(0.5)
    return F.relu(y) + z


def written_between(s, x):
    y = s.bn_a(s.conv_a(x))
    y.mul_(0.5)
    return F.relu(y)


def adds_to_itself(s, x):
    y = s.bn_a(s.conv_a(x))
    y += y
    return y


def promoted_in_place(s, x):
    y = s.bn_a(s.conv_a(x))
    y += x.double()
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
    "scalar": lambda s, x: s.bn_a(s.conv_a(x)) + 1,
    "alpha": lambda s, x: torch.add(s.bn_a(s.conv_a(x)), x, alpha=2),
    "alpha method": lambda s, x: s.bn_a(s.conv_a(x)).add(x, alpha=2),
    "x += x": adds_to_itself,
    "gelu": lambda s, x: F.gelu(s.bn_a(s.conv_a(x))),
    "threshold": lambda s, x: F.threshold(s.bn_a(s.conv_a(x)), 0.1, 0.0),
    "subtraction": lambda s, x: s.bn_a(s.conv_a(x)) - x,
    "another limit": lambda s, x: s.relu3(s.bn_a(s.conv_a(x))),
    "slope that is a tensor": lambda s, x: s.odd(s.bn_a(s.conv_a(x))),
}


def test_a_limit_that_changes_later_is_obeyed():
    net, plain = (
        block(lambda s, x: s.relu6(s.bn_a(s.conv_a(x))), fuse=fuse) for fuse in (True, False)
    )
    assert merged(net) == {"bn_a": "relu6"}
    for module in (net, plain):
        module.relu6.max_val = 0.5
    assert merged(net) == {}
    assert_same(net, plain)


@pytest.mark.parametrize("case", UNMERGED)
def test_what_is_not_merged_stays_correct(case):
    assert_correct(UNMERGED[case], expected={})


ODD: dict[str, Forward] = {
    "called twice": called_twice,
    "conv output read elsewhere": conv_read_twice,
    "conv called twice": conv_called_twice,
    "addend written to later": addend_written_later,
    "the module's own input": lambda s, x: F.relu(s.bn_a(x)) * x,
    "own input, sum": lambda s, x: (F.relu(s.bn_a(x) + x), x),
    "broadcast addend": lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + x[:, :1]),
    "broadcast bn": lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + x.unsqueeze(0)),
    "promotion": lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + x.double()),
    "promotion the other way": lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + x.bfloat16()),
    "promotion in place": promoted_in_place,
    "zero-dimensional": lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + x.mean()),
    "a number from a child": lambda s, x: F.relu(s.bn_a(s.conv_a(x)) + s.gain),
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
    net, kept = fused_block(lambda s, x: F.relu(s.bn_a(s.conv_a(x)))), []
    net.conv_a.register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.randn(IMAGE)
    net(x)
    assert torch.equal(kept[0], F.conv2d(x, net.conv_a.weight, padding=1))


def test_a_layer_with_two_names_is_merged_under_both():
    forward = sum_of(f"y = F.relu({A})", "y + s.bn_b(s.conv_b(x))")
    net = type("Block", (Parts,), {"forward": forward})()
    net.bn_b = net.bn_a
    plain = convert_frozen_bn(randomize_(net), fuse=False)
    fused = convert_frozen_bn(copy.deepcopy(plain))
    assert runs_fused(fused.bn_a, lambda: fused(torch.randn(IMAGE)))
    assert_same(fused, plain)


# Forwards that do more than call layers


def stores(s, x):
    s.last = F.relu(s.bn_a(s.conv_a(x)))
    return s.last


def keeps(s, x):
    s.kept.append(F.relu(s.bn_a(s.conv_a(x))))
    return s.kept[-1]


def counts(s, x):
    s.steps += 1
    return F.relu(s.bn_a(s.conv_a(x))) * s.steps


def without_gradients(s, x):
    with torch.no_grad():
        y = F.relu(s.bn_a(s.conv_a(x)))
    return y + x


def with_autocast_off(s, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(s.bn_a(s.conv_a(x)))


def with_gradients(s, x):
    with torch.enable_grad():
        return F.relu(s.bn_a(s.conv_a(x)))


def checkpointed(s, x):
    return torch.utils.checkpoint.checkpoint(
        lambda y: F.relu(s.bn_a(s.conv_a(y))), x, use_reentrant=False
    )


def asks_of_a_value(s, x):
    y = s.bn_a(s.conv_a(x))
    return F.relu(y) if isinstance(y, Tensor) else None


MORE: dict[str, Forward] = {
    "branch on values": lambda s, x: F.relu(s.bn_a(s.conv_a(x))) if x.sum() > 0 else x,
    "branch on gradients": lambda s, x: F.relu(s.bn_a(s.conv_a(x))) if x.requires_grad else x,
    "loop over the batch": lambda s, x: sum(F.relu(s.bn_a(s.conv_a(x))) for _ in x),
    "stores": stores,
    "keeps": keeps,
    "counts": counts,
    "random numbers": lambda s, x: F.relu(s.bn_a(s.conv_a(x))) * torch.rand(()),
    "no_grad": without_gradients,
    "enable_grad": with_gradients,
    "autocast": with_autocast_off,
    "checkpointing": checkpointed,
    "gradient mode": lambda s, x: F.relu(s.bn_a(s.conv_a(x))) * (1 + torch.is_grad_enabled()),
    "*args": lambda s, *x: F.relu(s.bn_a(s.conv_a(x[0]))),
    "**kwargs": lambda s, x, **k: F.relu(s.bn_a(s.conv_a(x))),
    "list": lambda s, x: F.relu(s.bn_a(s.conv_a(torch.cat(x) if isinstance(x, list) else x))),
    "isinstance of a value": asks_of_a_value,
    "tensor made": lambda s, x: F.relu(s.bn_a(s.conv_a(x))) * torch.tensor(2.0),
}


@pytest.mark.parametrize("case", MORE)
def test_a_forward_that_does_more(case):
    plain, fused = block(MORE[case], fuse=False), fused_block(MORE[case])
    assert fused.kept == [] and fused.steps == 0 and not hasattr(fused, "last")
    if case != "isinstance of a value":
        x = torch.randn(IMAGE).requires_grad_()
        assert merged(fused, x * 1) == {"bn_a": "relu"}
        fused.kept.clear(), fused.steps.zero_()
    assert_same(fused, plain)
    assert len(fused.kept) == len(plain.kept) and fused.steps == plain.steps


REFUSED: dict[str, tuple[Forward, str]] = {
    "no_grad as a decorator": (
        torch.no_grad()(lambda s, x: F.relu(s.bn_a(s.conv_a(x)))),
        "it is decorated",
    ),
    "locals": (lambda s, x: F.relu(s.bn_a(s.conv_a(x))) * len(locals()), "it uses locals"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_forward_that_cannot_be_rewritten_is_left_alone_with_a_reason(case):
    forward, reason = REFUSED[case]
    plain, fused = block(forward, fuse=False), fused_block(forward)
    assert reason in fates(fused)["bn_a"].reason
    assert_same(fused, plain)
