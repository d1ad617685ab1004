"""A small network with everything that can be merged or folded, and the ways to convert it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import make_generator, randomize_
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

IMAGES = (4, 3, 10, 10)


class Block(nn.Module):
    """Everything that can be merged: an activation, a sum, two branches."""

    def __init__(self, channels: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = activation()
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = nn.Conv2d(channels, channels, 1, bias=False)
        self.down_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv1(x)))
        h = self.act(self.bn2(self.conv2(h)) + self.down_bn(self.down(x)))
        return h.mean((2, 3))


#: What convert_frozen_bn is asked for.
CONVERSIONS: dict[str, dict[str, bool]] = {
    f"{kind}, affine {'frozen' if freeze_affine else 'trained'}": {
        "freeze_affine": freeze_affine,
        **options,
    }
    for freeze_affine in (True, False)
    for kind, options in {
        "plain": {"fuse": False},
        "fused": {"fuse": True},
        "folded": {"fold_conv": True},
    }.items()
}
EVERY_CONVERSION = pytest.mark.parametrize("options", CONVERSIONS.values(), ids=CONVERSIONS)
#: The same; those with a trained affine are marked `long`, for compilers that take seconds.
ONE_A_KIND = pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if options["freeze_affine"] else pytest.mark.long)
        for name, options in CONVERSIONS.items()
    ],
)


def live_network(seed: int = 0) -> nn.Sequential:
    """Not converted; the same for the same seed."""
    torch.manual_seed(seed)
    stem = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return randomize_(nn.Sequential(*stem, Block(8, nn.ReLU), nn.Linear(8, 3)), seed)


def network(seed: int = 0, **options: bool) -> nn.Sequential:
    return convert_frozen_bn(live_network(seed), **options)


def plain_twin(options: dict[str, bool]) -> nn.Sequential:
    """Converted alike, but for fusing and folding."""
    return network(freeze_affine=options["freeze_affine"], fuse=False)


def images(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, generator=make_generator(seed))


def train_step(net: nn.Module, seed: int, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """One step of SGD; returns the loss."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = net(images(seed)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()
