"""convert_frozen_bn(fuse=True): sums of sums, of numbers, and of layers that write in place."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_in_norm, merged, outputs_and_gradients, randomize_
from torch import Tensor, nn

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn

#: All of it by the steps and the autograd node in C++, and by Python's.
pytestmark = pytest.mark.usefixtures("node")

C = 3


class Branches(nn.Module):
    """What the forwards below add."""

    def __init__(self) -> None:
        super().__init__()
        for branch in "abc":
            setattr(self, f"conv_{branch}", nn.Conv2d(C, C, 3, padding=1))
            setattr(self, f"bn_{branch}", nn.BatchNorm2d(C))

    def a(self, x: Tensor) -> Tensor:
        return self.bn_a(self.conv_a(x))

    def b(self, x: Tensor) -> Tensor:
        return self.bn_b(self.conv_b(x))

    def c(self, x: Tensor) -> Tensor:
        return self.bn_c(self.conv_c(x))


class ThreeBranches(Branches):
    """A block of RepVGG."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x) + self.c(x))


class SumInASum(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + (self.a(x) + x)


class SumAfterASum(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + x) + self.b(x)


class SumAfterAnActivation(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + x) + self.b(x)


class SumOverALoop(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = 0
        for conv, bn in ((self.conv_a, self.bn_a), (self.conv_b, self.bn_b)):
            y = y + bn(conv(x))
        return y


class SumInPlace(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y += self.c(x)
        y += 2
        return F.relu_(y)


class SumUsedTwice(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return F.relu(y + self.c(x)) + y


class PlusASize(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + x.size(1))


class PlusAnItem(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + x.sum().item())


class PlusAnArgument(Branches):
    def forward(self, x: Tensor, addend: object) -> Tensor:
        return F.relu(self.a(x) + addend)


BOTH = pytest.mark.parametrize("options", [{"fuse": True}, {"fold_conv": True}], ids=str)
AFFINE = pytest.mark.parametrize("freeze_affine", [True, False])


def assert_fuses(kind, options, freeze_affine, *others, expected=None) -> None:
    torch.manual_seed(0)
    live = randomize_(kind()).double().eval()
    plain = convert_frozen_bn(copy.deepcopy(live), freeze_affine=freeze_affine, fuse=False)
    net = convert_frozen_bn(copy.deepcopy(live), freeze_affine=freeze_affine, **options)
    x = torch.randn(2, C, 5, 4, dtype=torch.float64)
    found = merged(net) or merged(net, x, *others)
    assert found if expected is None else found == expected
    actual, wanted = (outputs_and_gradients(m, x, *others) for m in (net, plain))
    assert_close_in_norm(actual, wanted, 1e-12)


@AFFINE
@BOTH
@pytest.mark.parametrize(
    "kind",
    [SumInASum, SumAfterASum, SumAfterAnActivation, SumOverALoop, SumInPlace, SumUsedTwice],
)
def test_sums_of_sums(kind, options, freeze_affine):
    assert_fuses(kind, options, freeze_affine)


@AFFINE
@BOTH
def test_three_branches(options, freeze_affine):
    expected = {"bn_a": "two branches", "bn_b": "two branches", "bn_c": "add + relu"}
    assert_fuses(ThreeBranches, options, freeze_affine, expected=expected)


@AFFINE
@BOTH
@pytest.mark.parametrize("kind", [PlusASize, PlusAnItem])
def test_numbers(kind, options, freeze_affine):
    assert_fuses(kind, options, freeze_affine)


@BOTH
@pytest.mark.parametrize("addend", [1.5, torch.ones(1, C, 1, 1).double(), torch.tensor(2.0)])
def test_addends_known_when_called(addend, options):
    assert_fuses(PlusAnArgument, options, True, addend)


class WritesInPlace(nn.Module):
    """What ``first`` returns is ``x`` itself, which ``second`` reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FrozenBatchNorm2d(C, inplace=True)
        self.second = FrozenBatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        a = self.first(y)
        return a + self.second(y)


class AddsWhatItWrote(WritesInPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        return self.first(y) + y


@BOTH
@pytest.mark.parametrize("kind", [WritesInPlace, AddsWhatItWrote])
def test_layers_that_write_over_what_others_read(kind, options):
    torch.manual_seed(0)
    plain = randomize_(kind())
    net, x = convert_frozen_bn(copy.deepcopy(plain), **options), torch.randn(2, C, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x))
