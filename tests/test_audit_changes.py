"""What a fused forward relies on, changed after the conversion: noticed, or read anew. Every result
is compared with the model in eval mode."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from audited import Act, C, Parts, Plain, SubOfPlain, block, frozen, fused, image, run
from helpers import merged, randomize_, runs_fused
from torch import nn

from frozen_bn import convert_frozen_bn

#: All of it by the steps and the autograd node in C++, and by Python's.
pytestmark = pytest.mark.usefixtures("node")

FACTOR = 2.0


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
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if s.flag else 3),
        lambda net: setattr(net, "flag", False),
    ),
    "class attribute": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if s.flag else 3),
        set_class_flag,
    ),
    "the class": (lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if s.flag else 3), set_class),
    "getattr with a default": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if getattr(s, "dep", False) else 3),
        lambda net: setattr(net, "dep", True),
    ),
    "hasattr": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if hasattr(s, "dep") else 3),
        lambda net: setattr(net, "dep", None),
    ),
    "hasattr of a class": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if hasattr(s, "dep") else 3),
        lambda net: setattr(type(net), "dep", None),
    ),
    "a child's number": (
        lambda s, x: F.dropout(F.relu(s.bn(s.conv(x))), s.drop.p, s.training),
        lambda net: setattr(net.drop, "p", 0.0),
    ),
    "a child's mode": (
        lambda s, x: F.dropout(F.relu(s.bn(s.conv(x))), 0.5, s.drop.training),
        lambda net: net.drop.eval(),
    ),
    "list": (lambda s, x: F.relu(s.bn(s.conv(x))) * s.lst[0], mutate),
    "length of a list": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * len(s.lst),
        lambda net: net.lst.append(1),
    ),
    "dict": (lambda s, x: F.relu(s.bn(s.conv(x))) * s.dct["k"], lambda net: net.dct.update(k=5.0)),
    "order of a dict": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if "".join(s.dct)[0] == "k" else 3),
        lambda net: net.dct.update(k=net.dct.pop("k")),
    ),
    "nested": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * s.dct["nested"][0],
        lambda net: net.dct["nested"].insert(0, 4.0),
    ),
    "list of modules": (
        lambda s, x: F.relu(s.bn(conv_of(s)(x))),
        lambda net: net.plain_list.__setitem__(0, net.more[0]),
    ),
    "a child's method reads": (
        lambda s, x: s.sub.pre(F.relu(s.bn(s.conv(x)))),
        lambda net: setattr(net.sub, "slope", 0.25),
    ),
    "a child's method calls": (
        lambda s, x: s.sub.pre(F.relu(s.bn(s.conv(x)))),
        lambda net: setattr(net.sub, "act", nn.Tanh()),
    ),
    "a child's method": (lambda s, x: s.sub.pre(F.relu(s.bn(s.conv(x)))), set_method),
    "a child's method, on the instance": (
        lambda s, x: s.sub.pre(F.relu(s.bn(s.conv(x)))),
        lambda net: setattr(net.sub, "pre", lambda x: x * 2),
    ),
    "property": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * s.prop,
        lambda net: setattr(net, "own", 5.0),
    ),
    "the property": (lambda s, x: F.relu(s.bn(s.conv(x))) * s.prop, set_property),
    "forward": (lambda s, x: F.relu(s.bn(s.conv(x))), set_forward),
    "children in a list": (
        lambda s, x: F.relu(s.bn(s.conv(x))) + sum(layer(x) for layer in s.more),
        lambda net: net.more.append(nn.Identity()),
    ),
    "number of children": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * len(s.more),
        lambda net: net.more.append(nn.Identity()),
    ),
    "names of children": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * len([name for name, _ in s.named_children()]),
        lambda net: net.add_module("one_more", nn.Identity()),
    ),
    "a parameter that was None": (
        lambda s, x: (
            F.relu(s.bn(s.conv(x))) if s.shift is None else F.relu(s.bn(s.conv(x))) + s.shift
        ),
        lambda net: setattr(net, "shift", nn.Parameter(torch.tensor(3.0))),
    ),
    "a buffer that is None": (
        lambda s, x: (
            F.relu(s.bn(s.conv(x))) if s.gain is None else F.relu(s.bn(s.conv(x))) * s.gain
        ),
        lambda net: setattr(net, "gain", None),
    ),
    "a buffer": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * s.gain,
        lambda net: setattr(net, "gain", torch.tensor(5.0)),
    ),
    "number to flag": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * s.own if isinstance(s.own, float) else x,
        lambda net: setattr(net, "own", 2),
    ),
    "class of a child": (
        lambda s, x: F.relu(s.bn(s.conv(x))) * (2 if isinstance(s.drop, nn.Dropout) else 3),
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
    net, x = block(lambda s, x: helper(F.relu(s.bn(s.conv(x)))) * FACTOR), image()
    other, net = fused(net), frozen(net)
    for name, value in (("FACTOR", 5.0), ("helper", other_helper), ("F", nn.functional)):
        torch.testing.assert_close(run(other, x), run(net, x))
        monkeypatch.setitem(globals(), name, value)
        torch.testing.assert_close(run(other, x), run(net, x))


def test_a_closure_that_changes_is_obeyed():
    factor = 2.0
    net, x = block(lambda s, x: F.relu(s.bn(s.conv(x))) * factor), image()
    other, net = fused(net), frozen(net)
    torch.testing.assert_close(run(other, x), run(net, x))
    factor = 3.0
    torch.testing.assert_close(run(other, x), run(net, x))


def test_a_base_class_that_changes_is_obeyed(monkeypatch):
    net, x = randomize_(SubOfPlain()).double(), image()
    other, net = fused(net), frozen(net)
    torch.testing.assert_close(run(other, x), run(net, x))
    monkeypatch.setattr(Plain, "forward", lambda s, x: F.relu(s.bn(s.conv(x))) * 23)
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
        return F.relu(self.bn(self.conv(x)))


class AsksItsSize(Parts):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        return F.relu(self.bn(self.layers(x))) * len(self.layers)


def test_a_sequential_or_module_that_answers_by_itself():
    net = convert_frozen_bn(Shuffled(nn.BatchNorm2d(C), nn.ReLU()), fuse=True)
    assert merged(net) == {}
    net = convert_frozen_bn(
        nn.Sequential(nn.Conv2d(C, C, 1), Shuffled(nn.BatchNorm2d(C))), fuse=True
    )
    assert merged(net) == {}
    net, x = randomize_(Delegating()).double(), image()
    torch.testing.assert_close(run(fused(net), x), run(frozen(net), x))


def test_the_length_of_a_sequential_that_is_called_as_well():
    net, x = randomize_(AsksItsSize()).double(), image()
    other, net = fused(net), frozen(net)
    net.layers[1].eval()
    assert merged(other) == {"bn": "relu", "layers.1": "relu"}
    torch.testing.assert_close(run(other, x), run(net, x))
    for module in (net, other):
        module.layers.append(nn.Identity())
    torch.testing.assert_close(run(other, x), run(net, x))


# Copies


class ForCopies(Parts):
    def forward(self, x):
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training) * self.own + helper(x)


def test_a_shallow_copy_runs_as_itself():
    net, x = fused(randomize_(ForCopies()).double()), image()
    run(net, x)
    other = copy.copy(net)
    other.own, other.training = 100.0, False
    expected = copy.deepcopy(net)
    expected.__class__ = ForCopies
    expected.own, expected.training = 100.0, False
    torch.testing.assert_close(run(other, x), run(expected, x))
    assert run(net, x).sum() != run(other, x).sum()


def test_a_replica_of_data_parallel_runs_as_itself():
    net, x = fused(randomize_(ForCopies()).double()), image()
    replica = net._replicate_for_data_parallel()
    replica.own = 50.0
    assert not torch.equal(run(net, x), run(replica, x))


def test_a_loaded_copy_runs_fused_by_the_code_that_is_there(monkeypatch):
    net, x = fused(randomize_(ForCopies()).double()), image()
    expected, stream = run(net, x), io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert runs_fused(loaded.bn, lambda: loaded(x))
    torch.testing.assert_close(run(loaded, x), expected)
    text = pickle.dumps(net)
    monkeypatch.setattr(ForCopies, "forward", lambda s, x: x)
    for changed in (pickle.loads(text), net, loaded):
        assert torch.equal(run(changed, x), x)
