"""Modules with a made-up forward, for the tests of convert_frozen_bn(fuse=True)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from helpers import randomize_
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

C = 4


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
    return convert_frozen_bn(copy.deepcopy(net)).train()


class Plain(Parts):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * self.own


class SubOfPlain(Plain):
    def forward(self, x):
        return super().forward(x) + self.gain
