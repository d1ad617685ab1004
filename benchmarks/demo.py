"""What frozen_bn does, on real input: ``python -m benchmarks.demo``.

A ResNet-50 on photographs shows that it computes the same and what it costs; fine-tuning on
handwritten digits shows what freezing is for. Runs on the CPU; downloads nothing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from pandas import DataFrame
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet50
from torchvision.transforms import v2

import frozen_bn
from frozen_bn.report import saved_bytes

from .model import training_step
from .model_peers import EVAL, FUSED, TORCHVISION, batch_norms, frozen_in_every_way
from .timing import Plan, measure

LARGEST_ERROR = 1e-4
BATCH, ROUNDS = 4, 9

SEEDS = (0, 1, 2)
PRETRAINING, FINE_TUNING = 1000, 200  # images; the rest is for testing
EPOCHS, LEARNING_RATE = 3, 2e-4
LIVE, NAIVE, FROZEN = "live BN", "bn.eval(), then model.train()", "convert_frozen_bn"

ON_PHOTOGRAPHS = f"""
ResNet-50 on {BATCH} photographs, affine frozen: the error is relative to {EVAL} in float64, times
are the fastest of {ROUNDS} steps by turns.
"""
ON_DIGITS = f"""
Fine-tuning on {FINE_TUNING} shifted digits (tilted, paler, noisy) in batches of two: test accuracy
in eval mode, %, mean ± standard deviation of {len(SEEDS)} seeds.
"""
IN_SHORT = """
Statistics of two images say little about the data, even less where the two resemble each other, and
train() undoes eval(). Where batches are large and varied, or the new data lies far from the old,
live BN may well be the better choice; it also bears larger learning rates."""


def photographs(count: int) -> Tensor:
    """``[count, 3, 224, 224]``: random crops of scikit-learn's two photographs, by turns."""
    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    crop = v2.RandomResizedCrop(224, scale=(0.1, 1.0), antialias=True)
    normalize = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    crops = [crop(images[i % len(images)]) for i in range(count)]
    return normalize(torch.stack(crops).float() / 255)


def live_resnet50() -> nn.Module:
    """With random weights, and running statistics of the photographs."""
    net = resnet50(weights=None).train()
    for layer in batch_norms(net).values():
        # The initial affine is the identity, behind which errors in it would not show.
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, 0.0, 0.1)
        layer.momentum = None  # a plain average: no trace is left of the initial values
    with torch.no_grad():
        for _ in range(4):
            net(photographs(2 * BATCH))
    return net


def results(net: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and all weights."""
    images = images.clone().requires_grad_()
    output = net(images)
    weights = [p for p in net.parameters() if p.requires_grad]
    return [output, *torch.autograd.grad(cross_entropy(output, labels), [images, *weights])]


@torch.no_grad()
def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in float64."""
    return float((found.double() - exact).norm() / exact.norm())


def on_photographs() -> tuple[DataFrame, float]:
    """What a ResNet-50 computes and costs, frozen in three ways; our largest error.

    That is of the float32 output, and of all results in float64. In float32 rounding decides on
    which side of 0 some inputs of ReLUs fall, where the gradient jumps: no two implementations
    agree closely on those.
    """
    torch.manual_seed(0)
    every = frozen_in_every_way(live_resnet50())
    nets = {name: every[name] for name in (EVAL, TORCHVISION, FUSED)}
    images, labels = photographs(BATCH), torch.randint(1000, (BATCH,))
    losses = {n: lambda net=net: cross_entropy(net(images), labels) for n, net in nets.items()}
    exact, ours = (
        results(copy.deepcopy(nets[name]).double(), images.double(), labels)
        for name in (EVAL, FUSED)
    )
    found = DataFrame(index=[*nets])
    found["error of the output"] = [error(net(images), exact[0]) for net in nets.values()]
    errors = [error(*pair) for pair in zip(ours, exact, strict=True)]
    worst = torch.tensor([*errors, found["error of the output"][FUSED]]).max().item()  # or NaN
    steps = {name: training_step(net, losses[name]) for name, net in nets.items()}
    rounds = measure(steps, Plan(0, ROUNDS, ROUNDS), images.device)
    found["ms a step"] = [1e3 * min(rounds[name]) for name in nets]  # others only add time
    found["saved MiB"] = [saved_bytes(net, losses[name]) / 2**20 for name, net in nets.items()]
    for column in ("ms a step", "saved MiB"):
        found[f"{column} / {EVAL}"] = found[column] / found[column][EVAL]
    return found, worst


def small_net() -> nn.Module:
    """For ``[N, 1, 8, 8]``, ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 1), (32, 64, 2), (64, 64, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """As another scanner might give them: tilted by 15 degrees, a fifth paler, and noisy."""
    images = v2.functional.rotate(images, 15, interpolation=v2.InterpolationMode.BILINEAR)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return (0.8 * images + noise).clamp(0, 1)


def pairs(labels: Tensor, alike: bool, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of batches of two, each image once. ``alike``: both show the same digit, as two crops
    of a photograph show the same; a few are left out."""
    order = torch.randperm(len(labels), generator=generator)
    if not alike:
        return order.split(2)
    sorted_pairs = order[labels[order].argsort()].split(2)
    found = [pair for pair in sorted_pairs if labels[pair[0]] == labels[pair[-1]]]
    return [found[i] for i in torch.randperm(len(found), generator=generator)]


def train(
    net: nn.Module, images: Tensor, labels: Tensor, batches: Sequence[Tensor], lr: float
) -> None:
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=1e-4)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()


def prepared(net: nn.Module, way: str) -> nn.Module:
    """A copy of ``net``, set up for fine-tuning in one of the three ways."""
    net = copy.deepcopy(net)
    if way == NAIVE:
        for layer in batch_norms(net).values():
            layer.eval()
    elif way == FROZEN:
        frozen_bn.convert_frozen_bn(net)
    return net.train()  # as training loops do


def on_digits(seed: int) -> list[dict[str, Any]]:
    """A net learns scikit-learn's digits, and is then fine-tuned on shifted ones, two at a time. By
    way of fine-tuning: the accuracy in percent on test images of both kinds, and what moved."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    labels = torch.from_numpy(digits.target)[order]
    original = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16
    others = shifted(original, generator)
    new = slice(PRETRAINING, PRETRAINING + FINE_TUNING)

    def scores(net: nn.Module) -> dict[str, float]:
        kinds, right = {"shifted": others, "original": original}, labels[new.stop :]
        with torch.no_grad():
            found = {kind: net.eval()(of[new.stop :]).argmax(1) for kind, of in kinds.items()}
        return {kind: 100 * (of == right).float().mean().item() for kind, of in found.items()}

    start = small_net().train()
    for epochs, lr in ((12, 0.05), (4, 0.005)):
        for _ in range(epochs):
            batches = torch.randperm(PRETRAINING, generator=generator).split(64)
            train(start, original, labels, batches, lr)
    records = [{"batches": "before fine-tuning", "way": "", "buffers changed": 0, **scores(start)}]
    for kind, alike in (("two random digits", False), ("two of one class", True)):
        batches = [b for _ in range(EPOCHS) for b in pairs(labels[new], alike, generator)]
        for way in (LIVE, NAIVE, FROZEN):
            net = prepared(start, way)
            before = [buffer.clone() for buffer in net.buffers()]
            train(net, others[new], labels[new], batches, LEARNING_RATE)
            same = [torch.equal(*pair) for pair in zip(before, net.buffers(), strict=True)]
            record = {"batches": kind, "way": way, "buffers changed": same.count(False)}
            records.append(record | scores(net))
    return records


def main() -> None:
    """Print everything; exit with an error if frozen_bn computes something else than eval mode."""
    print(frozen_bn.show_config())
    costs, worst = on_photographs()
    print(ON_PHOTOGRAPHS)
    print(costs.to_markdown(floatfmt=("", ".0e", ".0f", ".1f", ".2f", ".2f")))
    if not worst <= LARGEST_ERROR:  # NaN fails too
        sys.exit(
            f"benchmarks.demo: frozen_bn differs from {EVAL} by a relative error of {worst:.1e}, "
            f"expected at most {LARGEST_ERROR:.0e}"
        )
    torch.set_num_threads(1)  # the tensors are too small to share out
    digits = DataFrame([record for seed in SEEDS for record in on_digits(seed)])
    of_ways = digits.groupby(["batches", "way"], sort=False)
    columns = {"buffers changed": of_ways["buffers changed"].max().astype(str)}
    for kind in ("shifted", "original"):
        mean, deviation = of_ways[kind].mean(), of_ways[kind].std()
        columns[kind] = mean.map("{:.1f}".format) + deviation.map(" ± {:.1f}".format)
    print(ON_DIGITS)
    print(DataFrame(columns).reset_index().to_markdown(index=False, disable_numparse=True))
    print(IN_SHORT)


if __name__ == "__main__":
    main()
