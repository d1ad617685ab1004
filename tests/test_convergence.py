"""Fifty steps of training, frozen in every way, in float32 and under autocast: the losses are those
of ``nn.BatchNorm2d`` in eval mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import calm_
from nets import EVERY_CONVERSION, Block
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn

STEPS, SIZE, BATCH = 50, 16, 8
CHANNELS = 16

#: By dtype, how far the loss of any step may be from the other's, as a part of the first loss. In
#: float32 the order of additions differs; under autocast what lies between two layers is rounded
#: there and not here, which is as far as bfloat16 is from float32 (0.04 of the classifier's).
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.06}


class Stage(nn.Module):
    """Halves the sides."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.expand_bn = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return x + self.expand_bn(self.expand(x))


class Classifier(nn.Module):
    """Tells by which of four gratings an image was made."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(3, CHANNELS)
        self.block = Block(CHANNELS, nn.ReLU)  # ends in a mean over the image
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.block(self.stage(images))), labels)


class Detector(nn.Module):
    """Finds the one bright rectangle: whether a cell has its centre, and its box from there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = Stage(3, CHANNELS), Stage(CHANNELS, CHANNELS)
        self.top = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.objectness, self.boxes = nn.Conv2d(CHANNELS, 1, 1), nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        features = torch.relu(self.top(self.body(self.stem(images))))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        column, row = (centres * features.shape[-1]).long().unbind(1)
        scores = self.objectness(features).flatten(1)
        there = scores.shape[1] // features.shape[-2] * row + column
        index = torch.arange(len(images))
        found = self.boxes(features)[index, :, row, column].sigmoid()
        return F.cross_entropy(scores, there) + F.smooth_l1_loss(found.float(), boxes, beta=0.1)


def gratings(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(4, (BATCH,), generator=generator)
    across = torch.arange(SIZE) / SIZE * 6.28
    waves = [torch.sin((i + 1) * across).expand(SIZE, SIZE) for i in range(4)]
    images = torch.stack([waves[label] for label in labels]).unsqueeze(1)
    return images + 0.3 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator), labels


def rectangles(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    corners = torch.rand(BATCH, 2, generator=generator) * 0.5
    boxes = torch.cat(
        [corners, corners + 0.2 + 0.25 * torch.rand(BATCH, 2, generator=generator)], 1
    )
    images = 0.3 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    for image, (left, top, right, bottom) in zip(images, boxes * SIZE, strict=True):
        image[:, int(top) : int(bottom), int(left) : int(right)] += 2
    return images, boxes


class Task(NamedTuple):
    make: Callable[[], nn.Module]
    data: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    rate: float  # of learning


TASKS = {
    "classifier": Task(Classifier, gratings, 0.06),
    "detector": Task(Detector, rectangles, 0.003),
}


def losses(net: nn.Module, task: Task, dtype: torch.dtype) -> Tensor:
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=task.rate, momentum=0.9
    )
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        images, targets = task.data(generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = net(images, targets)
        loss.backward()
        optimizer.step()
        found.append(loss.detach().float())
    return torch.stack(found)


def made(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return calm_(task.make())


@functools.cache
def expected_losses(name: str, dtype: torch.dtype, freeze_affine: bool) -> Tensor:
    live = made(TASKS[name]).eval()
    for layer in live.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(not freeze_affine)
    return losses(live, TASKS[name], dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@EVERY_CONVERSION
@pytest.mark.parametrize("name", TASKS)
def test_losses_are_those_of_live_layers_in_eval_mode(name, options, dtype):
    expected = expected_losses(name, dtype, options["freeze_affine"])
    assert expected[-5:].mean() < 0.6 * expected[0]  # there is something to follow
    net = convert_frozen_bn(made(TASKS[name]), **options).train()
    found = losses(net, TASKS[name], dtype)
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * expected[0]


def test_a_wrong_layer_shows_in_the_losses():
    """Other statistics by a twentieth of the deviation, in one layer of seven."""
    net = convert_frozen_bn(made(TASKS["classifier"])).train()
    net.stage.bn.running_mean += 0.05 * net.stage.bn.running_var.sqrt()
    expected = expected_losses("classifier", torch.float32, True)
    found = losses(net, TASKS["classifier"], torch.float32)
    assert (found - expected).abs().max() > 10 * TOLERANCES[torch.float32] * expected[0]
