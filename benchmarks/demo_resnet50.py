"""The first half of the demo: a ResNet-50 with its batch normalizations frozen in three ways.

What they compute is compared, then what a training step costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import v2

import frozen_bn
from frozen_bn.report import saved_bytes

from .timing import Plan, measure

BASELINE = "nn.BatchNorm2d.eval()"
TORCHVISION = "torchvision FrozenBatchNorm2d"
OURS = "frozen_bn"

CLASSES = 1000
BATCH = 4
STATISTICS_PASSES = 4
ROUNDS = 9


def relative_error(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``, in float64."""
    b = b.double()
    return float((a.double() - b).norm() / b.norm())


@dataclass(frozen=True)
class Result:
    """What the comparison found; ratios are of frozen_bn to the baseline."""

    worst_error: float
    time_ratio: float
    memory_ratio: float


def photograph_crops(count: int) -> Tensor:
    """``[count, 3, 224, 224]``: random crops of scikit-learn's two photographs, by turns."""
    photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.1, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    return torch.stack([augment(photographs[i % len(photographs)]) for i in range(count)])


def live_net(progress: Progress) -> nn.Module:
    """A ResNet-50 with random weights whose running statistics are those of the photographs."""
    net = resnet50(weights=None, num_classes=CLASSES).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The initial affine is the identity, behind which errors in it would not show.
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
            module.momentum = None  # a plain average: no trace is left of the initial values
    with torch.no_grad():
        for _ in progress.track(range(STATISTICS_PASSES), description="Running statistics"):
            net(photograph_crops(2 * BATCH))
    return net


def variants(net: nn.Module) -> dict[str, nn.Module]:
    """``net`` frozen in three ways, all in the state that a training loop leaves them in."""
    evaluating = copy.deepcopy(net).train()
    for module in evaluating.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)  # the others have a frozen affine too
    torchvision_net = resnet50(weights=None, num_classes=CLASSES, norm_layer=FrozenBatchNorm2d)
    torchvision_net.load_state_dict(net.state_dict())
    return {
        BASELINE: evaluating,
        TORCHVISION: torchvision_net.train(),
        OURS: frozen_bn.convert_frozen_bn(copy.deepcopy(net)).train(),
    }


def results_of(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The output, the input's gradient, and the gradients of all weights, by name."""
    net.zero_grad()
    images = images.clone().requires_grad_()
    output = net(images)
    F.cross_entropy(output, labels).backward()
    results = {"output": output.detach(), "input gradient": images.grad}
    results |= {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    return {name: tensor for name, tensor in results.items() if tensor is not None}


def compare(nets: dict[str, nn.Module], images: Tensor, labels: Tensor, console: Console) -> float:
    """Print how far all are from the baseline computed in float64.

    Returns the largest error of frozen_bn among its float32 output and all its float64 results.
    Its float32 gradients are printed only: rounding decides on which side of 0 some inputs of ReLUs
    fall, and there the gradient jumps, so no two implementations agree closely on them.
    """
    exact = results_of(copy.deepcopy(nets[BASELINE]).double(), images.double(), labels)
    candidates = [(name, "fp32", net, images) for name, net in nets.items()]
    candidates.append((OURS, "fp64", copy.deepcopy(nets[OURS]).double(), images.double()))
    table = Table(
        title=f"Relative error to {BASELINE} in float64",
        caption="Weight grads: the worst. In fp32, rounding flips a few ReLUs in every row.",
    )
    for header in ("", "dtype", "output", "input grad", "weight grads"):
        table.add_column(header, justify="right" if header else "left")
    checked = []
    for name, dtype, net, inputs in candidates:
        got = results_of(net, inputs, labels)
        if got.keys() != exact.keys():
            raise RuntimeError(f"{name} has other gradients: {got.keys() ^ exact.keys()}")
        output, input_gradient, *others = (relative_error(got[key], exact[key]) for key in exact)
        if name == OURS:
            checked += [output] if dtype == "fp32" else [output, input_gradient, *others]
        shown = (output, input_gradient, max(others))
        table.add_row(name, dtype, *(f"{error:.1e}" for error in shown))
    console.print(table)
    return max(checked)


def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What the training steps minimize."""
    return F.cross_entropy(net(images), labels)


def training_step(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A function that does one step of SGD."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(net, images, labels).backward()
        optimizer.step()

    return step


def cost(
    nets: dict[str, nn.Module], images: Tensor, labels: Tensor, progress: Progress
) -> tuple[float, float]:
    """Print time and memory of a training step; returns the two ratios of frozen_bn to the
    baseline."""
    memory = {
        name: saved_bytes(net, partial(loss, net, images, labels)) for name, net in nets.items()
    }
    steps = {name: training_step(net, images, labels) for name, net in nets.items()}
    progress.add_task("Training steps", total=None)
    timings = measure(steps, Plan(0, ROUNDS, ROUNDS), images.device)
    seconds = {name: timing.rounds for name, timing in timings.items()}
    fastest = {name: min(values) for name, values in seconds.items()}
    shape = "x".join(map(str, images.shape))
    table = Table(
        title=f"One training step of ResNet-50 on {shape}, {torch.get_num_threads()} CPU threads",
        caption=f"{ROUNDS} steps each, by turns; the affine is frozen in all three.\n"
        "Other programs only add time: the first ratio is of the fastest steps.",
    )
    table.add_column(no_wrap=True)
    for header in ("median ms", "fastest ms", "ratio", "saved MiB", "ratio"):
        table.add_column(header, justify="right")
    ratios = {}
    for name in nets:
        ratios[name] = fastest[name] / fastest[BASELINE], memory[name] / memory[BASELINE]
        table.add_row(
            name,
            f"{1e3 * median(seconds[name]):.0f}",
            f"{1e3 * fastest[name]:.0f}",
            f"{ratios[name][0]:.2f}",
            f"{memory[name] / 2**20:.1f}",
            f"{ratios[name][1]:.2f}",
        )
    progress.console.print(table)
    return ratios[OURS]


def run(console: Console) -> Result:
    """Print both comparisons."""
    torch.manual_seed(0)
    with Progress(console=console, transient=True) as progress:
        nets = variants(live_net(progress))
        images, labels = photograph_crops(BATCH), torch.randint(CLASSES, (BATCH,))
        worst_error = compare(nets, images, labels, console)
        return Result(worst_error, *cost(nets, images, labels, progress))
