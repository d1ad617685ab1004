"""fold_for_inference, without an example input, of layers that are used in another way as well: by
a function that is handed them, by another method, under another name. What comes out is the same,
and the layer stays as it is."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import pytest
import torch
from helpers import randomize_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frozen_bn import convert_frozen_bn, fold_for_inference, summary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def again(self, y: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + self.again(y)


def apply(f: Any, x: Tensor) -> Any:
    return f(x)


def anyhow(f: Any) -> Any:
    def wrapper(self: Any, x: Tensor) -> Any:
        return f(self, x)

    return wrapper


def named_again(self: Net, y: Tensor) -> Any:
    return self.bn(y)


class Handed(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + apply(self.bn, y)


class Checkpointed(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + checkpoint(self.bn, y, use_reentrant=False)


class Alias(Net):
    def forward(self, x):
        bn = self.bn
        y = bn(self.conv(x))
        return y + apply(bn, y)


class Walrus(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + (bn := self.bn)(y) + bn(y)


class ByKeyword(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.bn(input=y)


class ForwardItself(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.bn.forward(y)


class CallItself(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.bn.__call__(y)


class Mapped(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + next(map(self.bn, [y]))


class ItsWeight(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.bn.weight.sum()


class ItsConvolutionsWeight(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


class InnerFunction(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))

        def inner(z):
            return apply(self.bn, z)

        return y + inner(y)


class Children(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        for child in [*self.children()][1:]:
            y = y + child(y)
        return y


class Dictionary(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self._modules["bn"](y)


class ByName(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        name = "bn" if x.shape[0] else "conv"
        return y + getattr(self, name)(y)


class ItselfHanded(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + named_again(self, y)


class Decorated(Net):
    @torch.no_grad()
    def again(self, y):
        return self.bn(y)


class DecoratedConvolution(Net):
    @torch.no_grad()
    def again(self, y):
        return self.conv(y[:, :3])


class Generator(Net):
    def parts(self, y):
        yield self.bn(y)

    def again(self, y):
        return sum(self.parts(y))


class NotAsNamed(Net):
    @anyhow
    def again(self, y):
        return self.bn(y)


class OfAnInstance(Net):
    def __init__(self):
        super().__init__()
        self.again = types.MethodType(lambda self, y: self.bn(y), self)


class NamedAsAnother(Net):
    """The bound method goes by the name of one that does something else."""

    def __init__(self):
        super().__init__()
        self.again = types.MethodType(named_again, self)

    def named_again(self, y):
        return y


class Parents(Net):
    def again(self, y):
        return self.bn(y)


class OfSuper(Parents):
    def again(self, y):
        return super().again(y)


class SomeOfMany(Net):
    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        y = self.bns[0](self.conv(x))
        return self.bns[x.shape[0] - 1](y)


class ManyHanded(SomeOfMany):
    def forward(self, x):
        y = self.bns[0](self.conv(x))
        return functools.reduce(lambda z, bn: bn(z), self.bns, y)


class InTurnsOfAnUnknownLoop(SomeOfMany):
    def forward(self, x):
        y = self.bns[0](self.conv(x))
        for z, bn in zip(y.split(1), self.bns, strict=False):
            y = y + bn(z)
        return y


class SequentialHanded(Net):
    def __init__(self):
        super().__init__()
        self.tail = nn.Sequential(self.bn, nn.ReLU())
        del self.bn

    def forward(self, x):
        y = self.tail(self.conv(x))
        return y + apply(self.tail, y)


HERE = [kind for kind in vars().copy().values() if isinstance(kind, type)]
USES = [kind for kind in HERE if issubclass(kind, Net) and kind is not Net]


@pytest.mark.parametrize("kind", USES, ids=lambda kind: kind.__name__)
def test_a_layer_that_is_used_in_another_way_too(kind):
    net = randomize_(kind().eval())
    x = torch.randn(1, 3, 4, 4)
    expected = net(x)
    converted = convert_frozen_bn(copy.deepcopy(net))
    with pytest.warns(UserWarning, match="not folded") as caught:
        folded = fold_for_inference(converted)
    torch.testing.assert_close(folded(x), expected)
    assert len(caught) == 1 and summary(converted)


class Optional(Net):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        if self.conv is not None:
            x = self.conv(x)
        if isinstance(self.bn, nn.Linear):
            raise TypeError
        if self.bn is not None:
            x = self.bn(x)
        act = getattr(self, "act", None)
        return x if act is None else self.act(x)


def test_a_question_about_a_layer_is_no_use_of_it():
    converted = convert_frozen_bn(Optional().eval())
    assert "merged with relu" in summary(converted)
    folded = fold_for_inference(converted)
    assert type(folded.bn) is nn.Identity
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(folded(x), converted(x))
