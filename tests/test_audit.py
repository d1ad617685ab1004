"""Which forwards convert_frozen_bn(fuse=True) may trace: all that a trace cannot repeat is refused.
Every result is compared with the model in eval mode."""

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
from audited import C, Config, Parts, SubOfPlain, block, frozen, fused, image, run, y
from helpers import merged, randomize_
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

LOG: list[int] = []
FACTOR = 2.0
Pair = namedtuple("Pair", "first second")


# Questions that a trace would answer once and for all


def is_tensor(x):
    return torch.is_tensor(x)


def has_exact_type(x):
    return type(x) is Tensor


def noise():
    return random.random()


def with_try(s, x):
    try:
        return y(s, x) if x.requires_grad else y(s, x) * 2
    except Exception:
        return y(s, x) * 3


def same_object(s, x, z):
    return y(s, x) if x is z else y(s, x) + z


def by_dtype(s, x):
    return y(s, x) * {torch.float64: 2.0, torch.float32: 3.0}.get(x.dtype, 5.0)


def by_mode(s, x, mode):
    return y(s, x) * {"a": 3.0}.get(mode, 1.0)


def child_may_return_none(s, x):
    z = s.sub(x)
    return y(s, x) if z is None else z


def text(s, x):
    return y(s, x) * len(f"{x.dim()}")


def exact_unpacking(s, x):
    try:
        _n, _c = x.shape
    except ValueError:
        return y(s, x)
    return y(s, x) * 2


def local_function(s, x):
    def inner(z):
        return z * random.random()

    return inner(y(s, x))


def shadowed(s, x):
    return sum([noise for noise in [1.0]]) * noise() * y(s, x)


def module_changed_by_its_operator(s, x):
    more = s.more
    more += [nn.Identity()]
    return y(s, x) * len(s.more)


def module_changed_by_item(s, x):
    more = s.more
    more[0] = s.conv
    return more[0](y(s, x))


def mutable_default(s, x, seen=[]):  # noqa: B006
    seen.append(1)
    return y(s, x) * len(seen)


def caches(x, kept={}):  # noqa: B006
    kept[0] = kept.get(0, 0) + 1
    return x * kept[0]


def counting(x):
    counting.calls += 1
    return x * counting.calls


counting.calls = 0

REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "hasattr of a tensor": (lambda s, x: y(s, x) * (2 if hasattr(x, "tensors") else 1), "hasattr"),
    "getattr of a tensor": (
        lambda s, x: y(s, x) * (1 if getattr(x, "mask_", None) is None else 2),
        "getattr",
    ),
    "getattr of a buffer": (lambda s, x: y(s, x) * getattr(s.gain, "more", 1), "getattr"),
    "is_tensor in a helper": (lambda s, x: y(s, x) if is_tensor(x) else x, "is_tensor"),
    "type in a helper": (lambda s, x: y(s, x) if has_exact_type(x) else x, "has_exact_type"),
    "is of a flag": (lambda s, x: y(s, x) if x.requires_grad is True else y(s, x) * 2, "is True"),
    "is False": (lambda s, x: y(s, x) if x.is_cuda is False else x, "is False"),
    "is of a function": (lambda s, x: y(s, x) if operator.is_(x, x) else x, "operator.is_"),
    "lookup by dtype": (by_dtype, "looks"),
    "try": (with_try, "try"),
    "inference mode": (
        lambda s, x: y(s, x) * (1 + torch.is_inference_mode_enabled()),
        "is_inference_mode_enabled",
    ),
    "gradient mode": (lambda s, x: y(s, x) * (1 + torch.is_grad_enabled()), "is_grad_enabled"),
    "autocast": (lambda s, x: y(s, x) * (1 + torch.is_autocast_enabled("cpu")), "is_autocast"),
    "default dtype": (lambda s, x: y(s, x).to(torch.get_default_dtype()), "get_default_dtype"),
    "threads": (lambda s, x: y(s, x) * torch.get_num_threads(), "get_num_threads"),
    "random in a helper": (lambda s, x: y(s, x) * noise(), "random.random"),
    "a random tensor": (lambda s, x: y(s, x) * torch.empty(1).exponential_().item(), "empty"),
    "normal": (lambda s, x: y(s, x) * torch.normal(0.0, 1.0, (1,)).item(), "normal"),
    "torch function of no argument": (lambda s, x: y(s, x) * torch.cat([]), "cat"),
    "None of a child": (child_may_return_none, "z is None"),
    "None of an attribute": (lambda s, x: y(s, x) * (2 if x.grad is None else 3), "x.grad is None"),
    "None of an item": (lambda s, x: y(s, x[0]) if x[1] is None else x[0], "is None"),
    "text": (text, "text"),
    "str": (lambda s, x: y(s, x) * len(str(x.dim())), "text"),
    "class": (lambda s, x: y(s, x) if x.__class__ is Tensor else x, "__class__"),
    "dunder": (lambda s, x: y(s, x) * s.__dict__["own"], "__dict__"),
    "vars": (lambda s, x: y(s, x) * vars(s)["own"], "vars"),
    "type of self": (lambda s, x: y(s, x) * type(s).flag, "type"),
    "attribute of super": (lambda s, x: y(s, x) * super(Parts, s).training, "super"),
    "isinstance of a list's item": (
        lambda s, x: y(s, x) if isinstance(x[0], Tensor) else x,
        "isinstance",
    ),
    "isinstance of Parameter": (
        lambda s, x: y(s, x) * 2 if isinstance(x, nn.Parameter) else y(s, x),
        "isinstance",
    ),
    "local function": (local_function, "functiondef"),
    "a hidden global": (shadowed, "random.random"),
    "Config": (lambda s, x: y(s, x) * s.cfg.scale, "a Config"),
    "a global container": (lambda s, x: y(s, x) * len(LOG), "LOG"),
    "parameters": (lambda s, x: y(s, x).to(next(s.parameters()).dtype), "next"),
    "a parameter": (lambda s, x: y(s, x) * sum([p.mean() for p in s.parameters()]), "parameters"),
    "sys": (lambda s, x: y(s, x) * len(sys.argv), "sys.argv"),
    "environment": (lambda s, x: y(s, x) if Config().scale else x, "Config"),
    "iteration": (lambda s, x: sum(F.relu(s.bn(s.conv(x))) for _ in x), "iterates"),
    "unpacking that fails": (exact_unpacking, "try"),
    "a default that changes": (mutable_default, "defaults"),
    "a helper's default that changes": (lambda s, x: y(s, x) + caches(x), "defaults"),
    "a helper's attribute": (lambda s, x: y(s, x) + counting(x), "attributes"),
    "an attribute of a function": (lambda s, x: y(s, x) * [counting][0].calls, "attributes"),
    "forward of a child": (lambda s, x: F.relu(s.bn.forward(s.conv(x))), "forward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_trace_cannot_repeat_is_refused_with_a_reason(case):
    forward, reason = REFUSED[case]
    net = fused(block(forward))
    assert merged(net) == {} and "forward" not in vars(net)
    assert reason in net.bn.fate.reason


class AsksItsType(Parts):
    def forward(self, x):
        return y(self, x) if type(x) is Tensor else y(self, x) * 2


class Sub(AsksItsType):
    def forward(self, x):
        return super().forward(x)


def test_the_forward_of_a_base_class_is_audited_too():
    net = fused(randomize_(Sub()).double())
    assert "AsksItsType.forward asks `type(x)" in net.bn.fate.reason
    net = randomize_(SubOfPlain()).double()
    other, x = fused(net), image()
    assert merged(other) == {"bn": "relu"}
    torch.testing.assert_close(run(other, x), run(frozen(net), x))


@pytest.mark.parametrize("forward", [same_object, by_mode])
def test_arguments_of_other_kinds(forward):
    net, x = block(forward), image()
    other, net = fused(net), frozen(net)
    assert merged(other) == {}
    seconds = [x, x.clone()] if forward is same_object else ["a", "b"]
    for second in seconds:
        torch.testing.assert_close(run(other, x, second), run(net, x, second))


# Side effects


def counts(s, x):
    s.calls += 1
    return y(s, x) * s.calls


def counts_elsewhere(s, x):
    s.cfg.count += 1
    return y(s, x) * s.cfg.count


def counts_on_a_child(s, x):
    s.drop.count = getattr(s.drop, "count", 0) + 1
    return y(s, x) * s.drop.count


def logs(s, x):
    LOG.append(1)
    return y(s, x)


def grows(s, x):
    s.lst.append(1.0)
    return y(s, x) * len(s.lst)


def writes_nested(s, x):
    s.dct["nested"][0] += 1.0
    return y(s, x) * s.dct["nested"][0]


def writes_item(s, x):
    s.dct["k"] += 1.0
    return y(s, x) * s.dct["k"]


def writes_by_alias(s, x):
    lst = s.lst
    lst += [1.0]
    return y(s, x) * len(s.lst)


def registers(s, x):
    s.register_buffer("kept", None)
    return y(s, x)


def sets_mode(s, x):
    s.drop.eval()
    return s.drop(y(s, x))


def sets_global(s, x):
    global FACTOR
    FACTOR = FACTOR + 1
    return y(s, x) * FACTOR


def sets_attribute_by_name(s, x):
    setattr(s, "calls", s.calls + 1)  # noqa: B010
    return y(s, x) * s.calls


def prints(s, x):
    print("called")
    return y(s, x)


EFFECTS = [counts, counts_elsewhere, counts_on_a_child, logs, grows, writes_nested, writes_item]
EFFECTS += [writes_by_alias, registers, sets_mode, sets_global, sets_attribute_by_name, prints]
EFFECTS += [module_changed_by_its_operator, module_changed_by_item]


def state(net: nn.Module) -> object:
    told = [(n, type(m), m.training, [*vars(m)], [*m._buffers]) for n, m in net.named_modules()]
    plain = net.calls, net.cfg.count, net.lst, net.dct, LOG, FACTOR, len(net.more)
    return copy.deepcopy((told, plain, getattr(net.drop, "count", None)))


@pytest.mark.parametrize("forward", EFFECTS)
def test_side_effects_are_refused_and_do_not_happen_while_converting(forward, capsys):
    net = convert_frozen_bn(block(forward)).train()
    before = state(net)
    convert_frozen_bn(net, fuse=True)
    assert merged(net) == {} and net.bn.fate.reason
    assert state(net) == before and capsys.readouterr().out == ""
    run(net, image())
    if forward not in (prints, module_changed_by_item):
        assert state(net) != before


# What stays possible


def takes_none(s, x, z=None):
    z = x if z is None else z
    act = getattr(s, "act", None)
    if act is not None:
        return act(z)
    return F.relu(s.bn(s.conv(x)) + z)


def unpacks(s, x):
    n, c, h, w = x.shape
    return y(s, x).view(n, c, h * w)


def keeps_a_dict(s, x):
    out = {}
    for i, layer in enumerate(s.more):
        out[str(i)] = layer(y(s, x)) if i == 0 else layer(x)
    return out


def asks_scripting(s, x):
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return x
    return y(s, x) * math.sqrt(2.0)


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
        return y(s, x.squeeze(0)).view(shape)

    net, x = block(forward), image()
    other = fused(net)
    assert merged(other)
    torch.testing.assert_close(run(other, x), run(frozen(net), x))


def test_the_source_has_to_be_that_of_what_runs():
    namespace = {"F": F}
    exec("def forward(s, x):\n    return F.relu(s.bn(s.conv(x)))", namespace)
    assert "source" in fused(block(namespace["forward"])).bn.fate.reason


def test_the_profiler_is_put_back():
    events = []
    sys.setprofile(lambda *event: events.append(event))
    try:
        fused(block(lambda s, x: y(s, x)))
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert "__getattribute__" not in vars(nn.Module) and events


def test_the_reason_is_told_of_the_layers_that_the_forward_calls():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.inner = nn.BatchNorm2d(C), block(lambda s, x: s.bn(s.conv(x)) - 1)

        def forward(self, x):
            return self.inner(self.bn(x)) if type(x) is Tensor else x

    net = convert_frozen_bn(Outer(), fuse=True)
    assert "type" in net.bn.fate.reason and "type" not in net.inner.bn.fate.reason
