"""The second half of the demo: why one freezes. A small ResNet learns scikit-learn's handwritten
digits, and is then fine-tuned, two images at a time, on digits as another scanner might give them.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import rotate

import frozen_bn

WAYS = LIVE, NAIVE, FROZEN = "live BN", "bn.eval(), then model.train()", "convert_frozen_bn"

SEEDS = (0, 1, 2)
PRETRAINING, FINE_TUNING = 1000, 200  # images; the rest is for testing
EPOCHS = 3
FINE_TUNING_LR = 2e-4


def equal_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> int:
    """How many of the tensors in ``a`` are the same in ``b``, bit for bit."""
    return sum(torch.equal(a[name], b[name]) for name in a)


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet() -> nn.Module:
    """For ``[N, 1, 8, 8]``, ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images tilted by 15 degrees, a fifth paler, and noisy."""
    images = rotate(images, 15, interpolation=InterpolationMode.BILINEAR)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return (0.8 * images + noise).clamp(0, 1)


def random_pairs(labels: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of batches of two, each image once."""
    return torch.randperm(len(labels), generator=generator).split(2)


def one_class_pairs(labels: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
    """Likewise, but both images of a batch show the same digit."""
    order = torch.randperm(len(labels), generator=generator)
    classes = [order[labels[order] == digit] for digit in labels.unique()]
    pairs = [pair for members in classes for pair in members.split(2) if len(pair) == 2]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator)]


RANDOM, ONE_CLASS = "batch: two random digits", "batch: two of one class"
BATCHES = {RANDOM: random_pairs, ONE_CLASS: one_class_pairs}


def train(
    net: nn.Module, images: Tensor, labels: Tensor, batches: Iterable[Tensor], lr: float
) -> None:
    """One step of SGD with momentum per batch."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()


def pretrained(images: Tensor, labels: Tensor, generator: torch.Generator) -> nn.Module:
    """A net trained in the usual way, in batches of 64."""
    net = small_resnet().train()
    for epochs, lr in ((12, 0.05), (4, 0.005)):
        for _ in range(epochs):
            batches = torch.randperm(len(labels), generator=generator).split(64)
            train(net, images, labels, batches, lr)
    return net


def prepared(net: nn.Module, way: str) -> nn.Module:
    """A copy of ``net``, set up for fine-tuning in one of the three ways."""
    net = copy.deepcopy(net)
    if way == NAIVE:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    elif way == FROZEN:
        frozen_bn.convert_frozen_bn(net)
    return net.train()  # as training loops do


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent, in eval mode."""
    with torch.no_grad():
        predicted = net.eval()(images).argmax(1)
    return 100 * (predicted == labels).float().mean().item()


@dataclass
class Scores:
    """What became of the nets that were fine-tuned in one way: accuracies, a value per seed."""

    shifted: list[float] = field(default_factory=list)
    original: list[float] = field(default_factory=list)
    buffers: int = 0
    buffers_changed: int = 0

    def row(self) -> list[str]:
        """The cells of the table."""
        accuracies = [f"{mean(a):.1f} ± {stdev(a):.1f}" for a in (self.shifted, self.original)]
        return [*accuracies, f"{self.buffers_changed} of {self.buffers}"]


@dataclass
class Result:
    """Scores by kind of batch and way of fine-tuning."""

    before: Scores = field(default_factory=Scores)
    after: dict[tuple[str, str], Scores] = field(default_factory=lambda: defaultdict(Scores))
    naive_is_live: bool = True

    def gain(self, kind: str) -> tuple[float, float]:
        """Points that freezing gains over live BN, on the shifted and on the original digits."""
        frozen, live = self.after[kind, FROZEN], self.after[kind, LIVE]
        return (
            mean(frozen.shifted) - mean(live.shifted),
            mean(frozen.original) - mean(live.original),
        )


def run_seed(seed: int, result: Result, advance: Callable[[], None]) -> None:
    """Pretrain one net, fine-tune it in all ways, add its scores to ``result``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    labels = torch.from_numpy(digits.target)[order]
    original = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16
    other = shifted(original, generator)
    test = slice(PRETRAINING + FINE_TUNING, None)
    new = slice(PRETRAINING, PRETRAINING + FINE_TUNING)

    def score(net: nn.Module, scores: Scores) -> None:
        scores.shifted.append(accuracy(net, other[test], labels[test]))
        scores.original.append(accuracy(net, original[test], labels[test]))

    start = pretrained(original[:PRETRAINING], labels[:PRETRAINING], generator)
    score(start, result.before)
    advance()
    for kind, pairs in BATCHES.items():
        batches = [b for _ in range(EPOCHS) for b in pairs(labels[new], generator)]
        states = {}
        for way in WAYS:
            net, scores = prepared(start, way), result.after[kind, way]
            before = {name: buffer.clone() for name, buffer in net.named_buffers()}
            train(net, other[new], labels[new], batches, FINE_TUNING_LR)
            score(net, scores)
            scores.buffers += len(before)
            scores.buffers_changed += len(before) - equal_tensors(before, dict(net.named_buffers()))
            states[way] = net.state_dict()
            advance()
        same = equal_tensors(states[LIVE], states[NAIVE])
        result.naive_is_live &= same == len(states[LIVE])


def run(console: Console) -> Result:
    """Train, and print the accuracies."""
    result = Result()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to share out
    try:
        with Progress(console=console, transient=True) as progress:
            total = len(SEEDS) * (1 + len(BATCHES) * len(WAYS))
            task = progress.add_task("Digits", total=total)
            for seed in SEEDS:
                run_seed(seed, result, lambda: progress.advance(task))
    finally:
        torch.set_num_threads(threads)

    table = Table(
        title=f"Fine-tuning on {FINE_TUNING} shifted digits in batches of 2: test accuracy (%)",
        caption="Shifted: tilted, paler, noisy. Evaluated in eval mode.\n"
        f"Mean ± standard deviation of {len(SEEDS)} seeds; buffers of all seeds together.",
    )
    for header in ("", "shifted", "original", "buffers changed"):
        table.add_column(header, justify="right" if header else "left")
    table.add_row("before fine-tuning", *result.before.row()[:2], "", end_section=True)
    for kind in BATCHES:
        table.add_row(f"[bold]{kind}[/bold]")
        for way in WAYS:
            table.add_row(f"  {way}", *result.after[kind, way].row(), end_section=way == WAYS[-1])
    console.print(table)
    verdict = "bit for bit" if result.naive_is_live else "but NOT bit for bit, which it should be"
    console.print(f"'{NAIVE}' is live BN again, {verdict}: train() undoes eval().\n")
    return result
