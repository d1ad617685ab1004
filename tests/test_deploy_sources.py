"""fold_for_inference, without an example input, where a layer does not always read the convolution
that stands before it, or where something else reads that as well."""

# ruff: noqa: B007, B905, E731, F811, F841, SIM108 (what somebody may write)

from __future__ import annotations

import contextlib

import pytest
from folded import Many, Net, folded_layers
from torch import nn


class OneOfTwo(Net):
    def forward(self, x):
        if x.shape[0] > 1:
            y = self.conv(x)
        else:
            y = x
        return self.bn(y)


class Perhaps(Net):
    def forward(self, x):
        y = x
        if x.shape[0] > 1:
            y = self.conv(x)
        return self.bn(y)


class OneOfTwoInALine(Net):
    def forward(self, x):
        y = self.conv(x) if x.shape[0] > 1 else x
        return self.bn(y)


class AssignedTwice(Net):
    def forward(self, x):
        y = self.conv(x)
        y = z = x
        return self.bn(y)


class OfALoop(Net):
    def forward(self, x):
        y = self.conv(x)
        o = 0
        for y in [x]:
            o = o + self.bn(y)
        return o


class OfAnUnknownLoop(Net):
    def forward(self, x):
        y = self.conv(x)
        o = 0
        for y in x.split(1):
            o = o + self.bn(y)
        return o


class OfAWith(Net):
    def forward(self, x):
        y = self.conv(x)
        with contextlib.nullcontext(x) as y:
            pass
        return self.bn(y)


class OfAMatch(Net):
    def forward(self, x):
        y = self.conv(x)
        match x.shape[0]:
            case 1:
                y = x
        return self.bn(y)


class BeforeAnException(Net):
    def forward(self, x):
        y = x
        try:
            if x.shape[0] == 1:
                raise ValueError
            y = self.conv(x)
        except ValueError:
            pass
        return self.bn(y)


class AssignedInside(Net):
    def forward(self, x):
        y = self.conv(x)

        def g():
            nonlocal y
            y = x

        g()
        return self.bn(y)


class NoTurn(Net):
    def forward(self, x):
        y = x
        for i in range(x.shape[0] - 1):
            y = self.conv(x)
        return self.bn(y)


class NoTurnOfAWhile(Net):
    def forward(self, x):
        y = x
        i = x.shape[0]
        while i > 1:
            y = self.conv(x)
            i = 0
        return self.bn(y)


class OneOfTwoLayers(Net):
    def forward(self, x):
        f = self.conv if x.shape[0] > 1 else self.act
        return self.bn(f(x))


class OneOfTwoArguments(Net):
    def forward(self, x):
        y = x if x.shape[0] == 1 else self.conv(x)
        return self.bn(x if x.shape[0] == 1 else y)


class Keywords(Net):
    def help(self, x, y=None):
        return self.bn(y)

    def forward(self, x):
        y = self.conv(x)
        return self.help(y=x, x=y)


class Variadic(Net):
    def help(self, x, *ys):
        return self.bn(ys[0])

    def forward(self, x):
        y = self.conv(x)
        return self.help(y, x)


class KeywordsOnly(Net):
    def help(self, y, x):
        return self.bn(y)

    def forward(self, x):
        return self.help(x=self.conv(x), y=x)


class Starred(Net):
    def help(self, y):
        return self.bn(y)

    def forward(self, x):
        y = self.conv(x)
        a = (x,)
        return self.help(*a)


class WrittenOver(Net):
    def forward(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)


class ItemsWritten(Net):
    def forward(self, x):
        y = self.conv(x)
        y[:] = x
        return self.bn(y)


class AnItemWritten(Net):
    def forward(self, x):
        y = self.conv(x)
        y[0] += 1
        return self.bn(y)


class Exchanged(Net):
    def forward(self, x):
        y = self.conv(x)
        y, z = x, y
        return self.bn(y) + z


class MethodTwice(Net):
    def help(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.bn(self.help(x)) + self.help(x)


class ReturnedEarly(Net):
    def help(self, x):
        if x.shape[0] == 1:
            return x
        return self.conv(x)

    def forward(self, x):
        return self.bn(self.help(x))


class ReturnedLate(Net):
    def help(self, x):
        if x.shape[0] > 1:
            return self.conv(x)
        return x

    def forward(self, x):
        return self.bn(self.help(x))


class Multiplied(Net):
    def forward(self, x):
        y = self.conv(x)
        y *= 2
        return self.bn(y)


class InTrainingOnly(Net):
    def forward(self, x):
        y = self.conv(x) if self.training else x
        return self.bn(y)


class Deleted(Net):
    def forward(self, x):
        y = self.conv(x)
        del y
        y = x
        return self.bn(y)


class OfAComprehension(Net):
    def forward(self, x):
        y = self.conv(x)
        return sum(self.bn(y) for y in [x])


class OfALambda(Net):
    def forward(self, x):
        y = self.conv(x)
        f = lambda y: self.bn(y)
        return f(x)


class OfADefault(Net):
    def forward(self, x):
        y = self.conv(x)

        def g(y=x):
            return self.bn(y)

        return g()


class InAFunction(Net):
    def forward(self, x):
        y = self.conv(x)

        def g():
            return self.bn(x)

        return g()


class AssignedLater(Net):
    def forward(self, x):
        y = self.conv(x)

        def g():
            return self.bn(y)

        y = x
        return g()


class Global(Net):
    def forward(self, x):
        global GY
        GY = self.conv(x)
        setg(x)
        return self.bn(GY)


def setg(x):
    global GY
    GY = x


class ReadByAMethod(Net):
    def forward(self, x):
        y = self.conv(x)
        m = y.mean((2, 3), keepdim=True)
        return self.bn(y) * m


class ReadByAnExchange(Net):
    def forward(self, x):
        y = self.conv(x)
        w = self.bn(y)
        y, z = x, y
        return w * z


class ReadInside(Net):
    def forward(self, x):
        y = self.conv(x)

        def g(z):
            return z + y

        return g(self.bn(y))


class ReadInsideLater(Net):
    def forward(self, x):
        def g(z):
            return z + y

        y = self.conv(x)
        return g(self.bn(y))


class ReadByALambda(Net):
    def forward(self, x):
        g = lambda z: z + y
        y = self.conv(x)
        return g(self.bn(y))


class ReadByADefault(Net):
    def forward(self, x):
        y = self.conv(x)

        def g(z, q=y):
            return z + q

        return g(self.bn(y))


class InADecoratedFunction(Net):
    def forward(self, x):
        y = self.conv(x)

        def twice(f):
            return lambda z: f(z) * 2

        @twice
        def g(z):
            return self.bn(z)

        return g(y)


class LoopLeft(Many):
    def forward(self, x):
        for i in range(3):
            y = self.convs[i](x)
            if i == 1:
                break
        return self.bns[0](y)


class TurnLeft(Many):
    def forward(self, x):
        for i in range(3):
            y = self.convs[i](x)
            if i == 2:
                continue
            y = x
        return self.bns[0](y)


class LoopLeftAtOnce(Many):
    def forward(self, x):
        y = x
        for c in self.convs:
            if x.shape[0] == 1:
                break
            y = c(x)
        return self.bns[0](y)


class SomeIndex(Many):
    def forward(self, x):
        if x.shape[0] > 1:
            i = 0
        else:
            i = 1
        return self.bns[i](self.convs[1](x)) + self.bns[0](x)


class PerhapsAnIndex(Many):
    def forward(self, x):
        i = 1
        if x.shape[0] > 1:
            i = 0
        return self.bns[0](self.convs[0](x)) + self.bns[i](x)


class InALoop(Many):
    def forward(self, x):
        for c, b in zip(self.convs, self.bns):
            x = b(c(x))
        return x


class FromTurnToTurn(Many):
    def forward(self, x):
        y = x
        for c, b in zip(self.convs, self.bns):
            x = b(y)
            y = c(x)
        return x


class HookOnASequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.bn = nn.BatchNorm2d(4)
        self.t.register_forward_hook(hook)

    def forward(self, x):
        return self.bn(self.t(x))


def hook(m, i, o):
    return o * 2


class InASequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.t = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        y = x
        if x.shape[0] > 1:
            y = self.conv(x)
        return self.t(y)


HERE = [kind for kind in vars().copy().values() if isinstance(kind, type)]
NETS = [kind for kind in HERE if issubclass(kind, nn.Module) and kind not in (Net, Many)]
FOLDED = {"InALoop": 3, "FromTurnToTurn": 2}  # where it can be told


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_the_copy_returns_the_same(kind):
    assert folded_layers(kind) == FOLDED.get(kind.__name__, 0)
