"""Which forwards convert_frozen_bn(fuse=True) may trace: all that a trace cannot repeat is refused,
or noticed when it changes. Every result is compared with the model in eval mode."""

from __future__ import annotations

import copy
import io
import math
import operator
import pickle
import random
import sys
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import merged, randomize_
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

C = 4
LOG: list[int] = []
FACTOR = 2.0
Pair = namedtuple("Pair", "first second")


class Config:
    scale = 1.0
    count = 0


class Act(nn.Module):
    """Its own method is called by others."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = 0.5
        self.act = nn.ReLU()

    def pre(self, x):
        return self.act(x) * self.slope


class Parts(nn.Module):
    flag = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.drop, self.sub = nn.Dropout(0.5), Act()
        self.cfg, self.lst, self.dct = Config(), [1.0, 2.0], {"k": 3.0, "nested": [1.0]}
        self.calls, self.own = 0, 2.0
        self.more = nn.ModuleList([nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)])
        self.plain_list = [self.conv]
        self.register_buffer("gain", torch.tensor(1.5))
        self.register_parameter("shift", None)

    @property
    def prop(self):
        return self.own * 2


class Nested(Tensor):
    """A tensor with more attributes."""


def block(forward: Callable[..., object], base: type[nn.Module] = Parts) -> nn.Module:
    torch.manual_seed(0)
    kind = type("Block", (base,), {"forward": forward})
    return randomize_(kind()).double()


def image() -> Tensor:
    return torch.randn(2, C, 5, 6, dtype=torch.float64)


def run(net: nn.Module, *args: object) -> object:
    torch.manual_seed(1)
    return net(*args)


def frozen(net: nn.Module) -> nn.Module:
    """``net`` with its batch normalizations in eval mode, and the rest in training mode."""
    net = copy.deepcopy(net).train()
    net.bn.eval()
    return net


def fused(net: nn.Module) -> nn.Module:
    return convert_frozen_bn(copy.deepcopy(net), fuse=True).train()


def y(s, x):
    return F.relu(s.bn(s.conv(x)))


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


class Plain(Parts):
    def forward(self, x):
        return y(self, x) * self.own


class SubOfPlain(Plain):
    def forward(self, x):
        return super().forward(x) + self.gain


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


# Changes after conversion


def helper(x):
    return x * FACTOR


def other_helper(x):
    return x * 7


def conv_of(s):
    return s.plain_list[0]


def set_class_flag(net):
    type(net).flag = False


def set_forward(net):
    type(net).forward = lambda s, x: F.relu(s.bn(s.conv(x))) * 11


def set_method(net):
    type(net.sub).pre = lambda s, x: x * 13


def set_property(net):
    type(net).prop = property(lambda s: 17.0)


def set_class(net):
    net.__class__ = type("Other", (type(net),), {"flag": False})


def mutate(net):
    net.lst[0] = 9.0


STALE: dict[str, tuple[Callable[..., object], Callable[[nn.Module], object]]] = {
    "class attribute, then the instance's": (
        lambda s, x: y(s, x) * (2 if s.flag else 3),
        lambda net: setattr(net, "flag", False),
    ),
    "class attribute": (lambda s, x: y(s, x) * (2 if s.flag else 3), set_class_flag),
    "the class": (lambda s, x: y(s, x) * (2 if s.flag else 3), set_class),
    "getattr with a default": (
        lambda s, x: y(s, x) * (2 if getattr(s, "dep", False) else 3),
        lambda net: setattr(net, "dep", True),
    ),
    "hasattr": (
        lambda s, x: y(s, x) * (2 if hasattr(s, "dep") else 3),
        lambda net: setattr(net, "dep", None),
    ),
    "hasattr of a class": (
        lambda s, x: y(s, x) * (2 if hasattr(s, "dep") else 3),
        lambda net: setattr(type(net), "dep", None),
    ),
    "a child's number": (
        lambda s, x: F.dropout(y(s, x), s.drop.p, s.training),
        lambda net: setattr(net.drop, "p", 0.0),
    ),
    "a child's mode": (
        lambda s, x: F.dropout(y(s, x), 0.5, s.drop.training),
        lambda net: net.drop.eval(),
    ),
    "list": (lambda s, x: y(s, x) * s.lst[0], mutate),
    "length of a list": (lambda s, x: y(s, x) * len(s.lst), lambda net: net.lst.append(1)),
    "dict": (lambda s, x: y(s, x) * s.dct["k"], lambda net: net.dct.update(k=5.0)),
    "order of a dict": (
        lambda s, x: y(s, x) * (2 if "".join(s.dct)[0] == "k" else 3),
        lambda net: net.dct.update(k=net.dct.pop("k")),
    ),
    "nested": (
        lambda s, x: y(s, x) * s.dct["nested"][0],
        lambda net: net.dct["nested"].insert(0, 4.0),
    ),
    "list of modules": (
        lambda s, x: F.relu(s.bn(conv_of(s)(x))),
        lambda net: net.plain_list.__setitem__(0, net.more[0]),
    ),
    "a child's method reads": (
        lambda s, x: s.sub.pre(y(s, x)),
        lambda net: setattr(net.sub, "slope", 0.25),
    ),
    "a child's method calls": (
        lambda s, x: s.sub.pre(y(s, x)),
        lambda net: setattr(net.sub, "act", nn.Tanh()),
    ),
    "a child's method": (lambda s, x: s.sub.pre(y(s, x)), set_method),
    "a child's method, on the instance": (
        lambda s, x: s.sub.pre(y(s, x)),
        lambda net: setattr(net.sub, "pre", lambda x: x * 2),
    ),
    "property": (lambda s, x: y(s, x) * s.prop, lambda net: setattr(net, "own", 5.0)),
    "the property": (lambda s, x: y(s, x) * s.prop, set_property),
    "forward": (lambda s, x: y(s, x), set_forward),
    "children in a list": (
        lambda s, x: y(s, x) + sum(layer(x) for layer in s.more),
        lambda net: net.more.append(nn.Identity()),
    ),
    "number of children": (
        lambda s, x: y(s, x) * len(s.more),
        lambda net: net.more.append(nn.Identity()),
    ),
    "names of children": (
        lambda s, x: y(s, x) * len([name for name, _ in s.named_children()]),
        lambda net: net.add_module("one_more", nn.Identity()),
    ),
    "a parameter that was None": (
        lambda s, x: y(s, x) if s.shift is None else y(s, x) + s.shift,
        lambda net: setattr(net, "shift", nn.Parameter(torch.tensor(3.0))),
    ),
    "a buffer that is None": (
        lambda s, x: y(s, x) if s.gain is None else y(s, x) * s.gain,
        lambda net: setattr(net, "gain", None),
    ),
    "a buffer": (
        lambda s, x: y(s, x) * s.gain,
        lambda net: setattr(net, "gain", torch.tensor(5.0)),
    ),
    "number to flag": (
        lambda s, x: y(s, x) * s.own if isinstance(s.own, float) else x,
        lambda net: setattr(net, "own", 2),
    ),
    "class of a child": (
        lambda s, x: y(s, x) * (2 if isinstance(s.drop, nn.Dropout) else 3),
        lambda net: setattr(net.drop, "__class__", nn.Identity),
    ),
}


@pytest.mark.parametrize("called", [True, False], ids=["called", "fresh"])
@pytest.mark.parametrize("case", STALE)
def test_what_changes_later_is_obeyed(case, called):
    forward, change = STALE[case]
    x, kinds = image(), []
    for convert in (frozen, fused):
        torch.manual_seed(0)
        kind = type("Block", (Parts,), {"forward": forward, "prop": Parts.prop})
        net = randomize_(kind()).double()
        net.sub.__class__ = type("Act", (Act,), {"pre": Act.pre})
        kinds.append(convert(net))
    plain, net = kinds
    assert merged(net) == {"bn": "relu"}, net.bn.fate
    if called:
        torch.testing.assert_close(run(net, x), run(plain, x))
    before = run(plain, x)
    for each in (plain, net):
        change(each)
    after = run(plain, x)
    if case not in ("number to flag", "list of modules"):
        assert after.shape != before.shape or not torch.equal(after, before), "nothing changed"
    torch.testing.assert_close(run(net, x), after)


def test_a_global_that_changes_is_obeyed(monkeypatch):
    net, x = block(lambda s, x: helper(y(s, x)) * FACTOR), image()
    other, net = fused(net), frozen(net)
    assert merged(other) == {"bn": "relu"}
    for name, value in (("FACTOR", 5.0), ("helper", other_helper), ("F", nn.functional)):
        torch.testing.assert_close(run(other, x), run(net, x))
        monkeypatch.setitem(globals(), name, value)
        torch.testing.assert_close(run(other, x), run(net, x))


def test_a_closure_that_changes_is_obeyed():
    factor = 2.0
    net, x = block(lambda s, x: y(s, x) * factor), image()
    other, net = fused(net), frozen(net)
    assert merged(other) == {"bn": "relu"}
    torch.testing.assert_close(run(other, x), run(net, x))
    factor = 3.0
    torch.testing.assert_close(run(other, x), run(net, x))


def test_a_base_class_that_changes_is_obeyed(monkeypatch):
    net, x = randomize_(SubOfPlain()).double(), image()
    other, net = fused(net), frozen(net)
    torch.testing.assert_close(run(other, x), run(net, x))
    monkeypatch.setattr(Plain, "forward", lambda s, x: y(s, x) * 23)
    torch.testing.assert_close(run(other, x), run(net, x))


class SharedTwice(Parts):
    """Its convolution has two names: which of them a trace uses is nothing to rely on."""

    def __init__(self):
        super().__init__()
        self.again = self.conv

    def forward(self, x):
        return F.relu(self.bn(self.gain * x)) + self.conv(x)


@pytest.mark.parametrize("name", ["conv", "again"])
def test_a_module_of_two_names(name):
    net, x = randomize_(SharedTwice()).double(), image()
    other, net = fused(net), frozen(net)
    assert merged(other) == {"bn": "relu"}
    for module in (net, other):
        setattr(module, name, module.more[0])
    torch.testing.assert_close(run(other, x), run(net, x))


class Shuffled(nn.Sequential):
    def __iter__(self):
        return iter(random.sample([*self._modules.values()], len(self._modules)))


class Delegating(Parts):
    def __getattr__(self, name):
        return nn.Identity() if name == "conv" else super().__getattr__(name)

    def forward(self, x):
        return y(self, x)


class AsksItsSize(Parts):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        return F.relu(self.bn(self.layers(x))) * len(self.layers)


def test_a_sequential_or_module_that_answers_by_itself_is_refused():
    net = convert_frozen_bn(Shuffled(nn.BatchNorm2d(C), nn.ReLU()), fuse=True)
    assert merged(net) == {}
    net = convert_frozen_bn(
        nn.Sequential(nn.Conv2d(C, C, 1), Shuffled(nn.BatchNorm2d(C))), fuse=True
    )
    assert merged(net) == {}
    assert "__getattr__" in fused(randomize_(Delegating())).bn.fate.reason


def test_the_length_of_a_sequential_that_is_called_as_well():
    net, x = randomize_(AsksItsSize()).double(), image()
    other, net = fused(net), frozen(net)
    net.layers[1].eval()
    assert merged(other) == {"bn": "relu", "layers.1": "relu"}
    torch.testing.assert_close(run(other, x), run(net, x))
    for module in (net, other):
        module.layers.append(nn.Identity())
    torch.testing.assert_close(run(other, x), run(net, x))


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


# Copies


class ForCopies(Parts):
    def forward(self, x):
        return F.dropout(y(self, x), 0.5, self.training) * self.own + helper(x)


def test_a_shallow_copy_runs_as_itself():
    net, x = fused(randomize_(ForCopies()).double()), image()
    run(net, x)
    other = copy.copy(net)
    other.own, other.training = 100.0, False
    expected = convert_frozen_bn(copy.deepcopy(net), fuse=False)
    expected.__dict__.pop("forward", None)
    expected.own, expected.training = 100.0, False
    torch.testing.assert_close(run(other, x), run(expected, x))
    assert run(net, x).sum() != run(other, x).sum()


def test_a_replica_of_data_parallel_runs_as_itself():
    net, x = fused(randomize_(ForCopies()).double()), image()
    replica = net._replicate_for_data_parallel()
    replica.own = 50.0
    assert not torch.equal(run(net, x), run(replica, x))


def test_a_loaded_copy_runs_fused_unless_the_code_is_another(monkeypatch):
    net, x = fused(randomize_(ForCopies()).double()), image()
    expected, stream = run(net, x), io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert loaded.forward._chosen((x,)) is not None
    torch.testing.assert_close(run(loaded, x), expected)
    text = pickle.dumps(net)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    changed = pickle.loads(text)
    assert changed.forward._chosen((x,)) is None
    monkeypatch.undo()
    monkeypatch.setattr(ForCopies, "forward", lambda s, x: x)
    changed = pickle.loads(text)
    assert torch.equal(run(changed, x), x)
