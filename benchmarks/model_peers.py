"""What whole networks are measured against: the same network with its batch normalizations deleted,
frozen by other means, and frozen by this package."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

import frozen_bn

from .cases import Precision, Shape
from .peers import formula

DELETED = "BN deleted"
EVAL = "BN in eval()"
TORCHVISION = "torchvision FrozenBN"
DETECTRON2 = "detectron2's formula"
COMPILED = "torchvision, compiled"
MMCV = "eval(), mmcv's trick"
PLAIN = "frozen_bn"
FUSED = "frozen_bn, fused"
FOLDED = "frozen_bn, folded"

#: timm's module does what torchvision's does, with the same operators.
EXPLAINED = (
    "A training step is forward, backward and SGD; the affine is frozen in all. BN deleted: the "
    "network with nn.Identity for its batch normalizations, the floor. fused: convert_frozen_bn(); "
    "folded: fold_conv=True. compiled: torch.compile of the network (of a detector's backbone). "
    "Under autocast the loss is computed there too; no gradients are scaled."
)


def role(name: str) -> str:
    """``ours``, ``floor``, ``peer``, or ``beside``: compiled, which is no eager peer."""
    if name in (PLAIN, FUSED, FOLDED):
        return "ours"
    return "floor" if name == DELETED else "beside" if "compiled" in name else "peer"


@dataclass(frozen=True)
class Workload:
    """A network, and what a training step feeds it."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    detection: bool = False

    @property
    def shape(self) -> Shape:
        return self.batch, 3, self.size, self.size


_faster_rcnn = partial(
    torchvision.models.detection.fasterrcnn_resnet50_fpn,
    weights=None, weights_backbone=None, min_size=800, max_size=800,
)  # fmt: skip

WORKLOADS = {
    "resnet18": Workload("ResNet-18", torchvision.models.resnet18, 4, 224),
    "resnet50": Workload("ResNet-50", torchvision.models.resnet50, 4, 224),
    "mobilenetv2": Workload("MobileNetV2", torchvision.models.mobilenet_v2, 4, 224),
    "fasterrcnn": Workload("Faster R-CNN", _faster_rcnn, 2, 800, detection=True),
}


def _chain(channels: int, block: type[nn.Module], *arguments: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 1), *(block(*arguments) for _ in range(8)))


#: Whose tensors are too small to matter: what is measured is Python.
SMALL = [
    Workload("8 BasicBlocks", partial(_chain, 8, BasicBlock, 8, 8), 1, 4),
    Workload("8 Bottlenecks", partial(_chain, 32, Bottleneck, 32, 8), 1, 4),
    Workload("8 InvertedResiduals", partial(_chain, 8, InvertedResidual, 8, 8, 1, 2), 1, 4),
    Workload("ResNet-50", torchvision.models.resnet50, 1, 32),
    Workload("MobileNetV2", torchvision.models.mobilenet_v2, 1, 32),
]


def batch_norms(net: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Live ones, by name."""
    return {n: layer for n, layer in net.named_modules() if isinstance(layer, nn.BatchNorm2d)}


def _replace(net: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    for name, layer in batch_norms(net).items():
        net.set_submodule(name, make(layer))
    return net


def _frozen_as(kind: type[nn.Module], bn: nn.Module) -> nn.Module:
    frozen = kind(bn.num_features, bn.eps)
    frozen.load_state_dict(bn.state_dict())
    return frozen


class _Detectron2(FrozenBatchNorm2d):
    """What detectron2's class computes, by the same operators, from the same buffers."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return formula(x, self)
        vectors = self.running_mean, self.running_var, self.weight, self.bias
        return torch.nn.functional.batch_norm(x, *vectors, training=False, eps=self.eps)


def _in_eval_mode(net: nn.Module) -> nn.Module:
    for layer in batch_norms(net).values():
        layer.eval().requires_grad_(False)  # the affine is frozen in all of them
    return net


def _compiled(net: nn.Module) -> nn.Module:
    # The rest of a detector is made of Python decisions, where compiling breaks off.
    body = net.backbone if hasattr(net, "backbone") else net
    body.compile()
    return net


def _with_mmcv_trick(net: nn.Module) -> nn.Module:
    from mmengine.model.efficient_conv_bn_eval import (
        turn_on_efficient_conv_bn_eval_for_single_model as turn_on,
    )

    turn_on(net.backbone.body if hasattr(net, "backbone") else net)
    return net


def _scale(net: nn.Module, images: Tensor) -> None:
    """Gives the convolutions unit variance; batch normalizations are identities, as they are new.

    So all contenders compute the same, and neither large nor denormal numbers: what convolutions
    cost depends on that.
    """

    def scale(conv: nn.Module, _: object, output: Tensor) -> Tensor:
        deviation = output.std()
        conv.weight.div_(deviation)
        return output / deviation

    for layer in batch_norms(net).values():
        layer.num_batches_tracked.fill_(1)
    hooks = [
        layer.register_forward_hook(scale)
        for layer in net.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        net.eval()(images)
    for hook in hooks:
        hook.remove()


def left_out(compiled: bool) -> dict[str, str]:
    """Contenders that are not there, and why."""
    reasons = {} if compiled else {COMPILED: "--no-compile"}
    if importlib.util.find_spec("mmengine") is None:
        reasons[MMCV] = "not installed: pip install mmcv-lite"
    return reasons


def frozen_in_every_way(live: nn.Module) -> dict[str, nn.Module]:
    """Copies of ``live``, eager, all in train mode but for what has to be in eval."""

    def copied() -> nn.Module:
        return copy.deepcopy(live).train()

    nets = {
        DELETED: _replace(copied(), lambda bn: nn.Identity()),
        EVAL: _in_eval_mode(copied()),
        TORCHVISION: _replace(copied(), partial(_frozen_as, FrozenBatchNorm2d)),
        DETECTRON2: _replace(copied(), partial(_frozen_as, _Detectron2)),
        PLAIN: frozen_bn.convert_frozen_bn(copied(), fuse=False),
        FUSED: frozen_bn.convert_frozen_bn(copied()),
        FOLDED: frozen_bn.convert_frozen_bn(copied(), fold_conv=True),
    }
    if MMCV not in left_out(True):
        nets[MMCV] = _with_mmcv_trick(_in_eval_mode(copied()))
    return nets


def networks(
    workload: Workload, *, compiled: bool = True, all_compiled: bool = False
) -> dict[str, nn.Module]:
    """The contenders, with the same weights. ``all_compiled``: ours and BN in eval mode too, not
    just torchvision's."""
    torch.manual_seed(0)
    live = workload.build()
    _scale(live.backbone.body if workload.detection else live, torch.randn(2, 3, 224, 224))
    nets = frozen_in_every_way(live)
    if compiled:
        nets[COMPILED] = _compiled(copy.deepcopy(nets[TORCHVISION]))
    if compiled and all_compiled:
        for name in (PLAIN, FUSED, FOLDED, EVAL, DELETED):
            nets[f"{name}, compiled"] = _compiled(copy.deepcopy(nets[name]))
    return nets


def chosen(nets: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    """Those whose name the pattern is found in, and what all are compared with."""
    return {
        name: net
        for name, net in nets.items()
        if name in (DELETED, TORCHVISION, FUSED) or re.search(pattern, name)
    }


def loss_of(
    net: nn.Module, workload: Workload, device: torch.device, precision: Precision
) -> Callable[[], Tensor]:
    """A function that runs ``net`` forward on inputs that are the same for all networks."""
    generator = torch.Generator().manual_seed(1)
    count, size = workload.batch, workload.size
    images = torch.randn(workload.shape, generator=generator).to(device)
    images = images.half() if precision.half else images
    kernel = next(p for p in net.parameters() if p.dim() == 4)
    if kernel.is_contiguous(memory_format=torch.channels_last) and not workload.detection:
        images = images.contiguous(memory_format=torch.channels_last)
    corners = torch.rand(count, 8, 2, generator=generator) * size / 2
    labels = torch.randint(1000, (count,), generator=generator).to(device)
    boxes = torch.cat([corners, corners + size / 4], -1).to(device)
    ones = torch.ones(8, dtype=torch.long, device=device)

    def loss() -> Tensor:
        with torch.autocast(device.type, precision.autocast, precision.autocast is not None):
            if not workload.detection:
                return torch.nn.functional.cross_entropy(net(images), labels)
            torch.manual_seed(2)  # proposals are sampled
            losses = net([*images], [{"boxes": of_image, "labels": ones} for of_image in boxes])
            return torch.stack([*losses.values()]).sum()

    return loss
