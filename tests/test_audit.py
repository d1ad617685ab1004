"""Forwards that ask, count, log and change things: they fooled tracers. Every result of a fused
model is compared with that of a plain one."""

from __future__ import annotations

import copy
import math
import operator
import random
import sys
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from audited import C, Config, Parts, SubOfPlain, block, frozen, fused, image, run
from helpers import fates, merged, randomize_
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

#: All of it by the steps and the autograd node in C++, and by Python's.
pytestmark = pytest.mark.usefixtures("node")

LOG: list[int] = []
FACTOR = 2.0
Pair = namedtuple("Pair", "first second")


# Questions that are to be answered at every call


def is_tensor(x):
    return torch.is_tensor(x)


def has_exact_type(x):
    return type(x) is Tensor


def noise():
    return random.random()


def with_try(s, x):
    try:
        return F.relu(s.bn(s.conv(x))) if x.requires_grad else F.relu(s.bn(s.conv(x))) * 2
    except Exception:
        return F.relu(s.bn(s.conv(x))) * 3


def same_object(s, x, z):
    return F.relu(s.bn(s.conv(x))) if x is z else F.relu(s.bn(s.conv(x))) + z


def by_dtype(s, x):
    return F.relu(s.bn(s.conv(x))) * {torch.float64: 2.0, torch.float32: 3.0}.get(x.dtype, 5.0)


def by_mode(s, x, mode):
    return F.relu(s.bn(s.conv(x))) * {"a": 3.0}.get(mode, 1.0)


def child_may_return_none(s, x):
    z = s.sub(x)
    return F.relu(s.bn(s.conv(x))) if z is None else z


def text(s, x):
    return F.relu(s.bn(s.conv(x))) * len(f"{x.dim()}")


def exact_unpacking(s, x):
    try:
        _n, _c = x.shape
    except ValueError:
        return F.relu(s.bn(s.conv(x)))
    return F.relu(s.bn(s.conv(x))) * 2


def local_function(s, x):
    def inner(z):
        return z * random.random()

    return inner(F.relu(s.bn(s.conv(x))))


def shadowed(s, x):
    return sum([noise for noise in [1.0]]) * noise() * F.relu(s.bn(s.conv(x)))


def module_changed_by_its_operator(s, x):
    more = s.more
    more += [nn.Identity()]
    return F.relu(s.bn(s.conv(x))) * len(s.more)


def module_changed_by_item(s, x):
    more = s.more
    more[0] = s.conv
    return more[0](F.relu(s.bn(s.conv(x))))


def mutable_default(s, x, seen=[]):  # noqa: B006
    seen.append(1)
    return F.relu(s.bn(s.conv(x))) * len(seen)


def caches(x, kept={}):  # noqa: B006
    kept[0] = kept.get(0, 0) + 1
    return x * kept[0]


def counting(x):
    counting.calls += 1
    return x * counting.calls


counting.calls = 0

ASKING: dict[str, Callable[..., object]] = {
    "hasattr of a tensor": lambda s, x: (
        F.relu(s.bn(s.conv(x))) * (2 if hasattr(x, "tensors") else 1)
    ),
    "getattr of a tensor": lambda s, x: (
        F.relu(s.bn(s.conv(x))) * (1 if getattr(x, "mask_", None) is None else 2)
    ),
    "getattr of a buffer": lambda s, x: F.relu(s.bn(s.conv(x))) * getattr(s.gain, "more", 1),
    "is_tensor in a helper": lambda s, x: F.relu(s.bn(s.conv(x))) if is_tensor(x) else x,
    "type in a helper": lambda s, x: F.relu(s.bn(s.conv(x))) if has_exact_type(x) else x,
    "is of a flag": lambda s, x: (
        F.relu(s.bn(s.conv(x))) if x.requires_grad is True else F.relu(s.bn(s.conv(x))) * 2
    ),
    "is False": lambda s, x: F.relu(s.bn(s.conv(x))) if x.is_cuda is False else x,
    "is of a function": lambda s, x: F.relu(s.bn(s.conv(x))) if operator.is_(x, x) else x,
    "lookup by dtype": by_dtype,
    "try": with_try,
    "inference mode": lambda s, x: (
        F.relu(s.bn(s.conv(x))) * (1 + torch.is_inference_mode_enabled())
    ),
    "gradient mode": lambda s, x: F.relu(s.bn(s.conv(x))) * (1 + torch.is_grad_enabled()),
    "autocast": lambda s, x: F.relu(s.bn(s.conv(x))) * (1 + torch.is_autocast_enabled("cpu")),
    "default dtype": lambda s, x: F.relu(s.bn(s.conv(x))).to(torch.get_default_dtype()),
    "threads": lambda s, x: F.relu(s.bn(s.conv(x))) * torch.get_num_threads(),
    "random in a helper": lambda s, x: F.relu(s.bn(s.conv(x))) * noise(),
    "a random tensor": lambda s, x: F.relu(s.bn(s.conv(x))) * torch.empty(1).exponential_().item(),
    "normal": lambda s, x: F.relu(s.bn(s.conv(x))) * torch.normal(0.0, 1.0, (1,)).item(),
    "torch function of no argument": lambda s, x: F.relu(s.bn(s.conv(x))) * torch.cat([]),
    "None of a child": child_may_return_none,
    "None of an attribute": lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if x.grad is None else 3),
    "None of an item": lambda s, x: F.relu(s.bn(s.conv(x[0]))) if x[1] is None else x[0],
    "text": text,
    "str": lambda s, x: F.relu(s.bn(s.conv(x))) * len(str(x.dim())),
    "class": lambda s, x: F.relu(s.bn(s.conv(x))) if x.__class__ is Tensor else x,
    "dunder": lambda s, x: F.relu(s.bn(s.conv(x))) * s.__dict__["own"],
    "vars": lambda s, x: F.relu(s.bn(s.conv(x))) * vars(s)["own"],
    "type of self": lambda s, x: F.relu(s.bn(s.conv(x))) * type(s).flag,
    "attribute of super": lambda s, x: F.relu(s.bn(s.conv(x))) * super(Parts, s).training,
    "isinstance of a list's item": lambda s, x: (
        F.relu(s.bn(s.conv(x))) if isinstance(x[0], Tensor) else x
    ),
    "isinstance of Parameter": lambda s, x: (
        F.relu(s.bn(s.conv(x))) * 2 if isinstance(x, nn.Parameter) else F.relu(s.bn(s.conv(x)))
    ),
    "local function": local_function,
    "a hidden global": shadowed,
    "Config": lambda s, x: F.relu(s.bn(s.conv(x))) * s.cfg.scale,
    "a global container": lambda s, x: F.relu(s.bn(s.conv(x))) * len(LOG),
    "parameters": lambda s, x: F.relu(s.bn(s.conv(x))).to(next(s.parameters()).dtype),
    "a parameter": lambda s, x: F.relu(s.bn(s.conv(x))) * sum([p.mean() for p in s.parameters()]),
    "sys": lambda s, x: F.relu(s.bn(s.conv(x))) * len(sys.argv),
    "environment": lambda s, x: F.relu(s.bn(s.conv(x))) if Config().scale else x,
    "iteration": lambda s, x: sum(F.relu(s.bn(s.conv(x))) for _ in x),
    "unpacking that fails": exact_unpacking,
    "a default that changes": mutable_default,
    "a helper's default that changes": lambda s, x: F.relu(s.bn(s.conv(x))) + caches(x),
    "a helper's attribute": lambda s, x: F.relu(s.bn(s.conv(x))) + counting(x),
    "an attribute of a function": lambda s, x: F.relu(s.bn(s.conv(x))) * [counting][0].calls,
    "forward of a child": lambda s, x: F.relu(s.bn.forward(s.conv(x))),
}


def forget_calls() -> None:
    mutable_default.__defaults__[0].clear()
    caches.__defaults__[0].clear()
    counting.calls = 0


def outcome(net: nn.Module, *args: object) -> object:
    """What ``net`` returns, or raises."""
    try:
        return run(net, *args)
    except Exception as error:
        return type(error), str(error)


def assert_same(actual: object, expected: object) -> None:
    if isinstance(expected, tuple) and isinstance(expected[0], type):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", ASKING)
def test_what_a_trace_could_not_repeat(case):
    net = convert_frozen_bn(block(ASKING[case]), fuse=False).train()
    other, x, outcomes = fused(net), image(), []
    for module in (net, other):
        forget_calls()
        random.seed(0)
        outcomes.append([outcome(module, x.clone()) for _ in range(3)])
    for actual, expected in zip(*outcomes, strict=True):
        assert_same(actual, expected)
    forget_calls()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for y in (x.float(), torch.stack([x, x]), [x, None]):
            forget_calls()
            expected = outcome(net, y)
            forget_calls()
            assert_same(outcome(other, y), expected)


class AsksItsType(Parts):
    def forward(self, x):
        return (
            F.relu(self.bn(self.conv(x)))
            if type(x) is Tensor
            else F.relu(self.bn(self.conv(x))) * 2
        )


class Sub(AsksItsType):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Sub, SubOfPlain])
def test_the_forward_of_a_base_class(kind):
    net = randomize_(kind()).double()
    other, x = fused(net), image()
    torch.testing.assert_close(run(other, x), run(frozen(net), x))


@pytest.mark.parametrize("forward", [same_object, by_mode])
def test_arguments_of_other_kinds(forward):
    net, x = block(forward), image()
    other, net = fused(net), frozen(net)
    seconds = [x, x.clone()] if forward is same_object else ["a", "b"]
    for second in seconds:
        torch.testing.assert_close(run(other, x, second), run(net, x, second))


# Side effects


def counts(s, x):
    s.calls += 1
    return F.relu(s.bn(s.conv(x))) * s.calls


def counts_elsewhere(s, x):
    s.cfg.count += 1
    return F.relu(s.bn(s.conv(x))) * s.cfg.count


def counts_on_a_child(s, x):
    s.drop.count = getattr(s.drop, "count", 0) + 1
    return F.relu(s.bn(s.conv(x))) * s.drop.count


def logs(s, x):
    LOG.append(1)
    return F.relu(s.bn(s.conv(x)))


def grows(s, x):
    s.lst.append(1.0)
    return F.relu(s.bn(s.conv(x))) * len(s.lst)


def writes_nested(s, x):
    s.dct["nested"][0] += 1.0
    return F.relu(s.bn(s.conv(x))) * s.dct["nested"][0]


def writes_item(s, x):
    s.dct["k"] += 1.0
    return F.relu(s.bn(s.conv(x))) * s.dct["k"]


def writes_by_alias(s, x):
    lst = s.lst
    lst += [1.0]
    return F.relu(s.bn(s.conv(x))) * len(s.lst)


def registers(s, x):
    s.register_buffer("kept", None)
    return F.relu(s.bn(s.conv(x)))


def sets_mode(s, x):
    s.drop.eval()
    return s.drop(F.relu(s.bn(s.conv(x))))


def sets_global(s, x):
    global FACTOR
    FACTOR = FACTOR + 1
    return F.relu(s.bn(s.conv(x))) * FACTOR


def sets_attribute_by_name(s, x):
    setattr(s, "calls", s.calls + 1)  # noqa: B010
    return F.relu(s.bn(s.conv(x))) * s.calls


def prints(s, x):
    print("called")
    return F.relu(s.bn(s.conv(x)))


EFFECTS = [counts, counts_elsewhere, counts_on_a_child, logs, grows, writes_nested, writes_item]
EFFECTS += [writes_by_alias, registers, sets_mode, sets_global, sets_attribute_by_name, prints]
EFFECTS += [module_changed_by_its_operator, module_changed_by_item]


def state(net: nn.Module) -> object:
    told = [(n, m.training, {*vars(m)} - {"fold_conv"}) for n, m in net.named_modules()]
    plain = net.calls, net.cfg.count, net.lst, net.dct, LOG, FACTOR, len(net.more)
    return copy.deepcopy((told, plain, getattr(net.drop, "count", None)))


@pytest.mark.parametrize("forward", EFFECTS)
def test_side_effects_happen_when_called_and_not_while_converting(forward, capsys, monkeypatch):
    global FACTOR
    plain = convert_frozen_bn(block(forward), fuse=False).train()
    net, x, results, printed = copy.deepcopy(plain), image(), [], []
    before = state(net)
    convert_frozen_bn(net)
    assert state(net) == before and capsys.readouterr().out == ""
    for module in (plain, net):
        LOG.clear()
        FACTOR = 2.0
        capsys.readouterr()
        results.append([(run(module, x), state(module)[1:]) for _ in range(2)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    for (actual, after), (expected, expected_after) in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert after == expected_after


# What stays possible


def takes_none(s, x, z=None):
    z = x if z is None else z
    act = getattr(s, "act", None)
    if act is not None:
        return act(z)
    return F.relu(s.bn(s.conv(x)) + z)


def unpacks(s, x):
    n, c, h, w = x.shape
    return F.relu(s.bn(s.conv(x))).view(n, c, h * w)


def keeps_a_dict(s, x):
    out = {}
    for i, layer in enumerate(s.more):
        out[str(i)] = layer(F.relu(s.bn(s.conv(x)))) if i == 0 else layer(x)
    return out


def asks_scripting(s, x):
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return x
    return F.relu(s.bn(s.conv(x))) * math.sqrt(2.0)


def accepts_lists(s, x):
    inputs = [x] if isinstance(x, Tensor) else x
    return F.relu(s.bn(s.conv(torch.cat(inputs, 0))))


POSSIBLE = [takes_none, unpacks, keeps_a_dict, asks_scripting, accepts_lists]


@pytest.mark.parametrize("forward", POSSIBLE)
def test_what_is_harmless_is_merged(forward):
    net, x = block(forward), image()
    other, net = fused(net), frozen(net)
    assert merged(other)
    torch.testing.assert_close(run(other, x), run(net, x))
    if forward is accepts_lists:
        torch.testing.assert_close(run(other, [x, x]), run(net, [x, x]))
    if forward is unpacks:
        for module in (other, net):
            with pytest.raises(ValueError, match="unpack"):
                module(x[0])


def test_an_attribute_is_read_when_it_is_written():
    def forward(s, x):
        x = x.clone()
        shape = x.shape
        x.unsqueeze_(0)
        return F.relu(s.bn(s.conv(x.squeeze(0)))).view(shape)

    net, x = block(forward), image()
    other = fused(net)
    assert merged(other)
    torch.testing.assert_close(run(other, x), run(frozen(net), x))


def test_the_source_has_to_be_that_of_what_runs():
    namespace = {"F": F}
    exec("def forward(s, x):\n    return F.relu(s.bn(s.conv(x)))", namespace)
    assert "source" in fates(fused(block(namespace["forward"])))["bn"].reason


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.inner = nn.BatchNorm2d(C), block(lambda s, x: s.bn(s.conv(x)) - 1)

    @torch.no_grad()
    def forward(self, x):
        return self.inner(self.bn(x))


def test_the_reason_is_told_of_the_layers_that_the_forward_calls():
    found = fates(convert_frozen_bn(Outer()))
    assert found["bn"].reason == "Outer.forward: it is decorated"
    assert not found["inner.bn"].reason and found["inner.bn"].in_place
