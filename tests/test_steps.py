"""Steps in C++ leave what is unusual to Python's: both give the same, whatever was patched, before
the package was imported or after."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
import torch.nn.functional as F
from emulator.replace import pythons_node
from fresh import run_fresh
from helpers import randomize_
from torch import nn

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn, node
from frozen_bn.fusion import steps

pytestmark = pytest.mark.skipif(node.compiled is None, reason=node.why_not)

C = 4
IMAGE = (2, C, 5, 6)

PATCHES = {
    "Conv2d.forward": "nn.Conv2d.forward = twice(nn.Conv2d.forward)",
    "Conv2d._conv_forward": "nn.Conv2d._conv_forward = twice(nn.Conv2d._conv_forward)",
    "Conv2d.__call__": "nn.Conv2d.__call__ = twice(nn.Conv2d.__call__)",
    "F.conv2d": "F.conv2d = twice(F.conv2d)",
}

BEFORE = """
import torch, torch.nn.functional as F
from torch import nn

def twice(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2

{patch}
from frozen_bn import convert_frozen_bn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
net[1].running_mean.uniform_(-1, 1)
x = torch.randn(1, 3, 8, 8)
expected = net[2](net[1](net[0](x)))
fused = convert_frozen_bn(net)
for _ in range(2):  # the first learns what the classes are
    torch.testing.assert_close(fused(x), expected)
"""


@pytest.mark.parametrize("patch", PATCHES)
def test_torch_was_patched_before_the_import(patch):
    run_fresh(BEFORE.format(patch=PATCHES[patch]))


def chain() -> nn.Sequential:
    net = randomize_(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()))
    return convert_frozen_bn(net)


def twice(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


LATE = {
    "Module._call_impl": lambda p, net: p.setattr(
        nn.Module, "_call_impl", twice(nn.Module._call_impl)
    ),
    "Conv2d.__call__": lambda p, net: p.setattr(nn.Conv2d, "__call__", twice(nn.Module.__call__)),
    "F.conv2d": lambda p, net: p.setattr(F, "conv2d", twice(F.conv2d)),
    "class attribute": lambda p, net: p.setattr(
        nn.Conv2d, "weight", property(lambda _: torch.ones(C, C, 1, 1)), raising=False
    ),
    "attribute": lambda p, net: p.setitem(
        net[0].__dict__, "weight", nn.Parameter(torch.ones(C, C, 1, 1))
    ),
    "forward": lambda p, net: p.setitem(net[0].__dict__, "forward", twice(net[0].forward)),
}


@pytest.mark.parametrize("change", LATE)
def test_a_convolution_is_another_later(monkeypatch, change):
    net, x = chain(), torch.randn(IMAGE)
    before = net(x)
    LATE[change](monkeypatch, net)
    expected = nn.Sequential(*net)(x)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(net(x), expected)


def test_a_hook_is_added_between_two_steps():
    net, x, seen = chain(), torch.randn(IMAGE), []
    net(x)
    pending = steps.call(net[0], x)
    net[0].register_forward_hook(lambda *_: seen.append(1))
    steps.value(steps.call(net[1], pending))
    assert seen == [1]


def test_options_are_those_after_the_convolution():
    class Sets(nn.Conv2d):
        @property
        def weight(self):
            layer.negative_slope = layer.negative_slope + 0.25
            return self._parameters["weight"]

    layer, image = FrozenBatchNorm2d(C, activation="leaky_relu"), torch.full(IMAGE, -1.0)
    conv = nn.Conv2d(C, C, 1, bias=False)
    nn.init.dirac_(conv.weight)
    conv.__class__ = Sets
    for call in (steps.call, steps.call, steps._call):
        layer.negative_slope = 0.5
        output = steps.value(call(layer, call(conv, image)))
        assert layer.negative_slope > 0.5
        torch.testing.assert_close(output, layer.negative_slope * image, rtol=1e-4, atol=1e-4)


def test_collected_while_a_step_runs():
    layer, taken = FrozenBatchNorm2d(C, activation="leaky_relu"), []

    def set_another(*_: object) -> None:
        layer.negative_slope = float(str(layer.negative_slope))
        taken.append([float(i) for i in range(50)])  # the place of the one before, among others

    gc.callbacks.append(set_another)
    conv, x = nn.Conv2d(C, C, 1), torch.randn(IMAGE)
    before, outputs = gc.get_threshold(), []
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(100):
            outputs.append(steps.value(steps.call(layer, steps.call(conv, x))))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(set_another)
    expected = layer(conv(x))
    for output in outputs:
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("ranks", [(4.0,), (None, 4), (2**70, 4), (3,)], ids=str)
def test_odd_ranks(ranks):
    layer = type("Odd", (FrozenBatchNorm2d,), {"_ranks": ranks})(C)
    x = torch.randn(IMAGE)

    def result() -> object:
        try:
            return steps.value(steps.call(layer, x)).sum().item()
        except RuntimeError as error:
            return str(error)

    with pythons_node():
        expected = result()
    assert [result(), result()] == [expected] * 2


def test_a_profiler_sees_convolutions():
    net, x, seen = chain(), torch.randn(IMAGE), []
    net(x)
    sys.setprofile(lambda frame, *_: seen.append(frame.f_code.co_name))
    try:
        net(x)
    finally:
        sys.setprofile(None)
    assert "_conv_forward" in seen


def test_nothing_is_lost_or_kept():
    net, x = chain(), torch.randn(IMAGE)
    counted = [None, True, False, NotImplemented, net[0], net[1], net[1].running_mean, x]
    with torch.no_grad():
        net(x)
        before = [sys.getrefcount(thing) for thing in counted]
        for _ in range(1000):
            net(x)
        after = [sys.getrefcount(thing) for thing in counted]
    assert all(abs(b - a) < 100 for a, b in zip(before, after, strict=True))
