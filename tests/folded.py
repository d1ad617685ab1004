"""Small networks to be folded, and whether the copy returns what they return."""

from __future__ import annotations

import copy
import warnings

import torch
from helpers import randomize_
from torch import nn

from frozen_bn import convert_frozen_bn, fold_for_inference, summary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.setup()

    def setup(self) -> None:
        """For those derived."""


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])
        self.k = 0
        self.setup()

    def setup(self) -> None:
        """For those derived."""


class Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = [(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
        self.seq = nn.Sequential(*pairs[0], *pairs[1], nn.ReLU())
        self.setup()

    def setup(self) -> None:
        """For those derived."""


def folded_layers(kind: type[nn.Module]) -> int:
    """How many layers were folded without an example input; the copy returns the same, and what was
    not folded is named."""
    torch.manual_seed(0)
    net = randomize_(kind().eval())
    converted = convert_frozen_bn(copy.deepcopy(net))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = fold_for_inference(converted)
    for samples in (1, 2):  # which some of them ask for
        x = torch.randn(samples, 4, 4, 4)
        torch.testing.assert_close(folded(x.clone()), net(x.clone()))
        torch.testing.assert_close(converted(x.clone()), net(x.clone()))
    layers = sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    count = sum(type(layer) is nn.Identity for layer in folded.modules())
    assert count == layers or any("not folded" in str(warning.message) for warning in caught)
    assert summary(converted)
    return count
