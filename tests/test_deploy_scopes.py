"""fold_for_inference, without an example input: whatever Python allows between a convolution and
the layer behind it. What cannot be followed is not folded."""

# What somebody may write:
# ruff: noqa: B007, B012, B020, B905, E731, E741, F841, RUF059

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import numpy as np
import pytest
import torch
from folded import Many, Net, Seq, folded_layers
from torch import nn


def apply(f: Any, x: Any) -> Any:
    return f(x)


def features(seq, x):
    out = []
    for l in seq:
        x = l(x)
        out.append(x.clone())
    return out


def outer_fwd(self, x):
    return self.conv(x)


class Callable_:
    def __init__(self, f):
        self.f = f

    def __get__(self, o, t):
        return types.MethodType(self.f, o) if o is not None else self


def fwd(self, x):
    return self.bn(self.conv(x)) + self.conv(x)


ARR = np.array([1.0, 2.0])

IDX = 0


class Suppressed(Net):
    def forward(self, x):
        y = x
        with contextlib.suppress(ValueError):
            if x.shape[0] == 1:
                raise ValueError
            y = self.conv(x)
        return self.bn(y)


class TryInPart(Net):
    def forward(self, x):
        y = self.conv(x)
        try:
            y = x
            if x.shape[0] == 1:
                raise ValueError
            y = self.conv(x)
        except ValueError:
            pass
        return self.bn(y)


class TryFinally(Net):
    def forward(self, x):
        y = self.conv(x)
        try:
            y = x
            if x.shape[0] == 1:
                raise ValueError
            y = self.conv(x)
        finally:
            return self.bn(y)


class NestedTry(Net):
    def forward(self, x):
        y = self.conv(x)
        try:
            try:
                y = x
                int("q")
                y = self.conv(x)
            finally:
                pass
        except ValueError:
            y = y + 0 if False else y
        return self.bn(y)


class RaiseInLoop(Many):
    def forward(self, x):
        i = 0
        y = self.bns[2](self.convs[2](x))
        try:
            i = 2
            if x.shape[0]:
                raise KeyError
            i = 0
        except KeyError:
            pass
        return self.bns[i](y)


class Augmented(Many):
    def forward(self, x):
        i = 0
        y = self.bns[1](self.convs[1](x))
        i += 1
        return self.bns[i](y)


class AugmentedInAWhile(Many):
    def forward(self, x):
        i = 0
        while i < 2:
            i += 1
            x = self.bns[i](self.convs[0](x))
        return x


class AWalrus(Many):
    def forward(self, x):
        i = 0
        y = self.bns[1](self.convs[1](x))
        if (i := 1) and x is not None:
            pass
        return self.bns[i](y)


class IndexOfAComprehension(Many):
    def forward(self, x):
        y = self.bns[1](self.convs[1](x))
        for i in range(1):
            y = y * 2
        return sum(self.bns[i](y) for i in range(2))


class LambdaShadows(Many):
    def forward(self, x):
        i = 0
        y = self.bns[1](self.convs[1](x))
        g = lambda i, z: self.bns[i](z)
        return g(1, y)


class LateBinding(Many):
    def forward(self, x):
        i = 0
        y = self.bns[1](self.convs[1](x))
        g = lambda z: self.bns[i](z)
        i = 1
        return g(y)


class ParamShadows(Many):
    def forward(self, x):
        i = 0
        y = self.bns[1](self.convs[1](x))

        def g(i, z):
            return self.bns[i](z)

        return g(1, y)


class ArgumentCaptured(Net):
    def help(self, y):

        def g(z):
            return z + y

        return g(self.bn(y))

    def forward(self, x):
        return self.help(self.conv(x))


class InnerArgumentCaptured(Net):
    def forward(self, x):

        def outer(y):

            def inner(z):
                return z * y

            return inner(self.bn(y))

        return outer(self.conv(x))


class InnerInList(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))

        def g(z):
            return self.bn(z)

        return y + [g][0](y)


class InnerTwoWays(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if x.shape[0] == 1:

            def g(z):
                return self.bn(z)
        else:

            def g(z):
                return self.act(z)

        return y + g(y)


class InAGenerator(Net):
    def forward(self, x):
        y = self.conv(x)
        g = (self.bn(y) for _ in range(1))
        y = x
        return next(g)


class PrivateMethod(Net):
    def __again(self, y):
        return self.bn(y)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.__again(y)


class PrivateSeq(nn.Module):
    def __init__(self):
        super().__init__()
        self.__seq = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.__seq[0](x)


class PropertyOfAWeight(Net):
    @property
    def w(self):
        return self.conv.weight.sum()

    def forward(self, x):
        return self.bn(self.conv(x)) * self.w


class PropertyOfALambda(Net):
    @property
    def again(self):
        return lambda z: self.bn(z)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.again(y)


class HeldInAList(Net):
    def setup(self):
        self.extra = [self.conv]

    def forward(self, x):
        y = self.bn(self.conv(x))
        for l in self.extra:
            y = y + l(x)
        return y


class HeldInATuple(Net):
    def __init__(self):
        super().__init__()
        self.pair = (self.conv, self.bn)

    def forward(self, x):
        c, b = self.pair
        return self.bn(self.conv(x)) + c(x)


class HeldInADict(Net):
    def setup(self):
        self.d = {"c": self.conv}

    def forward(self, x):
        return self.bn(self.conv(x)) + self.d["c"](x)


class HeldInAPartial(Net):
    def setup(self):
        self.fn = functools.partial(apply, self.conv)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.fn(x)


class HeldInAMethod(Net):
    def setup(self):
        self.fn = self.conv.forward

    def forward(self, x):
        return self.bn(self.conv(x)) + self.fn(x)


class ForwardOfAnInstance(Net):
    def __init__(self):
        super().__init__()
        self.forward = functools.partial(outer_fwd, self)

    def forward(self, x):
        return self.bn(self.conv(x))


class StarTarget(Net):
    def forward(self, x):
        *b, a = (x, self.conv(x), x)
        return self.bn(a)


class ListTarget(Many):
    def forward(self, x):
        y = self.bns[0](self.convs[0](x))
        for [b] in zip(self.bns):
            y = b(y)
        return y


class PairTarget(Many):
    def forward(self, x):
        y = self.bns[0](self.convs[0](x))
        for pair in zip(self.bns, self.convs):
            b, c = pair
            y = b(y)
        return y


class StarLoop(Many):
    def forward(self, x):
        y = self.bns[0](self.convs[0](x))
        for i, *rest in enumerate(self.bns):
            y = rest[0](y)
        return y


class SelfTarget(Many):
    def forward(self, x):
        y = self.bns[0](self.convs[0](x))
        for self.b in zip(self.bns):
            y = self.b[0](y)
        return y


class EnumeratedFromKeyword(Many):
    def forward(self, x):
        for i, c in enumerate(self.convs, start=-1):
            x = self.bns[i](c(x))
        return x


class ChildrenDedup(nn.Module):
    def __init__(self):
        super().__init__()
        c = nn.Conv2d(4, 4, 1)
        r = nn.Conv2d(4, 4, 1)
        self.l = nn.ModuleList([r, r, c])
        self.bns = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])

    def forward(self, x):
        for c, b in zip(self.l.children(), self.bns):
            x = b(c(x))
        return x


class RoundTheLoop(Net):
    def same(self, t):
        return t

    def forward(self, x):
        a = self.conv(x)
        b = self.conv(x)
        c = self.conv(x)
        for _ in range(x.shape[0] + 2):
            a = self.same(b)
            b = self.same(c)
            c = x
        return self.bn(a)


class TwiceAndWrittenOver(Net):
    def forward(self, x):
        y = self.conv(x)
        a = self.bn(y)
        b = self.bn(y)
        a.add_(1)
        return a * b


class TwiceAndKept(Net):
    def forward(self, x):
        y = self.conv(x)
        outs = [self.bn(y) for _ in range(2)]
        outs[0].mul_(0)
        return outs[0] + outs[1]


class SequentialInAMatch(Seq):
    def forward(self, x):
        match x.shape[0]:
            case _:
                y = self.seq[0](x)
        return y


class DecoratedForward(Seq):
    @torch.no_grad()
    def forward(self, x):
        return self.seq[0](x)


class SequentialInAComprehension(Seq):
    def forward(self, x):
        out = []
        [out.append(x := l(x)) for l in self.seq]
        return out[0] + out[1] + out[2]


class SequentialReduced(Seq):
    def forward(self, x):
        return functools.reduce(lambda z, l: l(z) * 2, self.seq, x)


class SequentialsFeatures(Seq):
    def forward(self, x):
        return features(self.seq, x)


class SequentialUnpacked(Seq):
    def forward(self, x):
        c, *rest = self.seq
        return c(x) + self.seq(x)


class IteratedByHand(Seq):
    def forward(self, x):
        it = iter(self.seq)
        y = next(it)(x)
        return self.seq(x) + y


class NoneCompared(Net):
    def setup(self):
        self.p = None

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.p is not None and self.p > 0:
            y = y * self.p
        return y


class NoneIn(Net):
    def setup(self):
        self.p = None

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.p is not None and "a" in self.p:
            y = y * 2
        return y


class EnumeratedFrom(Many):
    def forward(self, x):
        for i, c in enumerate(self.convs, 1):
            x = self.bns[i - 1](c(x))
        return x


class SequentialEnumerated(Seq):
    def forward(self, x):
        out = 0
        for i, l in enumerate(self.seq, 0):
            x = l(x)
            out = out + x
        return out


class NumpyAttr(Net):
    def setup(self):
        self.scale = np.array([1.0, 2.0])

    def forward(self, x):
        return self.bn(self.conv(x)) * float(self.scale[1])


class NumpyGlobal(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) * float(ARR[1])


class WithoutSelf(Net):
    def forward(*args):
        return args[0].bn(args[0].conv(args[1]))


class HelperWithoutSelf(Net):
    def help(*a):
        return a[0].bn(a[1])

    def forward(self, x):
        return self.help(self.conv(x))


class ADescriptor(Net):
    forward = Callable_(fwd)


class RecursionTwice(Net):
    def rec(self, x, n):
        if n == 0:
            return self.bn(self.conv(x))
        return self.rec(x, n - 1) + self.rec(x, n - 1)

    def forward(self, x):
        return self.rec(x, 2)


class AttributeSet(Net):
    def setup(self):
        self.n = 1

    def forward(self, x):
        self.n = x.shape[0]
        y = x
        if self.n == 1:
            y = self.conv(x)
        return self.bn(y)


class AttributeOfAnIndex(Many):
    def forward(self, x):
        self.k = 0
        y = self.bns[1](self.convs[1](x))
        self.k = self.k + 1
        y = self.bns[self.k](y)
        return y


class ItemOfAList(Many):
    def __init__(self):
        super().__init__()
        self.order = [0]

    def forward(self, x):
        self.order[0] = 1
        return self.bns[self.order[0]](self.bns[1](self.convs[1](x)))


class AttributeAugmented(Many):
    def forward(self, x):
        y = self.bns[1](self.convs[1](x))
        self.k = 0
        self.k += 1
        return self.bns[self.k](y)


class AttributeAugmentedTwice(Many):
    def __init__(self):
        super().__init__()
        self.k = 0

    def forward(self, x):
        y = self.bns[1](self.convs[1](x))
        self.k += 1
        y = self.bns[self.k](y)
        self.k -= 1
        return y


class OuterGlobalShadow(Many):
    def forward(self, x, IDX=1):
        y = self.bns[1](self.convs[1](x))

        def g(z):
            return self.bns[IDX](z)

        return g(y)


HERE = [kind for kind in vars().copy().values() if isinstance(kind, type)]
NETS = [kind for kind in HERE if issubclass(kind, nn.Module) and kind not in (Net, Many, Seq)]


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_the_copy_returns_the_same(kind):
    folded_layers(kind)
