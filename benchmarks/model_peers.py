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
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual  # type: ignore[import-untyped]
from torchvision.models.resnet import BasicBlock, Bottleneck  # type: ignore[import-untyped]
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

import frozen_bn

from .cases import Precision, Shape

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


def _faster_rcnn() -> nn.Module:
    model: nn.Module = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=800, max_size=800
    )
    return model


WORKLOADS = {
    "resnet18": Workload("ResNet-18", torchvision.models.resnet18, 4, 224),
    "resnet50": Workload("ResNet-50", torchvision.models.resnet50, 4, 224),
    "mobilenetv2": Workload("MobileNetV2", torchvision.models.mobilenet_v2, 4, 224),
    "fasterrcnn": Workload("Faster R-CNN", _faster_rcnn, 2, 800, detection=True),
}


def _chain(channels: int, block: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 1), *(block() for _ in range(8)))


#: Whose tensors are too small to matter: what is measured is Python.
SMALL = [
    Workload("8 BasicBlocks", lambda: _chain(8, lambda: BasicBlock(8, 8)), 1, 4),
    Workload("8 Bottlenecks", lambda: _chain(32, lambda: Bottleneck(32, 8)), 1, 4),
    Workload("8 InvertedResiduals", lambda: _chain(8, lambda: InvertedResidual(8, 8, 1, 2)), 1, 4),
    Workload("ResNet-50", torchvision.models.resnet50, 1, 32),
    Workload("MobileNetV2", torchvision.models.mobilenet_v2, 1, 32),
]


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]


def _replace(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, make(child))
    return module


def _frozen_as(kind: type[nn.Module], bn: nn.Module) -> nn.Module:
    frozen = kind(bn.num_features, bn.eps)
    frozen.load_state_dict(bn.state_dict())
    return frozen


class _Detectron2(FrozenBatchNorm2d):  # type: ignore[misc]
    """What detectron2's class computes, by the same operators, from the same buffers."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            vectors = self.running_mean, self.running_var, self.weight, self.bias
            return torch.nn.functional.batch_norm(x, *vectors, training=False, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        scale, bias = scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
        return x * scale.to(x.dtype) + bias.to(x.dtype)


def _in_eval_mode(net: nn.Module) -> nn.Module:
    for layer in _batch_norms(net):
        layer.eval().requires_grad_(False)  # the affine is frozen in all of them
    return net


def _compiled(net: nn.Module) -> nn.Module:
    # The rest of a detector is made of Python decisions, where compiling breaks off.
    body = net.backbone if hasattr(net, "backbone") else net
    body.compile()
    return net


def _with_mmcv_trick(net: nn.Module) -> nn.Module:
    from mmengine.model.efficient_conv_bn_eval import (  # type: ignore[import-not-found]
        turn_on_efficient_conv_bn_eval_for_single_model as turn_on,
    )

    turn_on(net.backbone.body if hasattr(net, "backbone") else net)
    return net


def _scaled(net: nn.Module, images: Tensor) -> nn.Module:
    """``net`` with batch normalizations that are identities, and convolutions of unit variance.

    So all contenders compute the same, and neither large nor denormal numbers: what convolutions
    cost depends on that.
    """

    def scale(conv: nn.Module, _: object, output: Tensor) -> Tensor:
        deviation = output.std()
        conv.weight.div_(deviation)  # type: ignore[operator]
        return output / deviation

    for layer in _batch_norms(net):
        layer.num_batches_tracked.fill_(1)  # type: ignore[operator]
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [conv.register_forward_hook(scale) for conv in convolutions]
    with torch.no_grad():
        net.eval()(images)
    for hook in hooks:
        hook.remove()
    return net.train()


def left_out(compiled: bool) -> dict[str, str]:
    """Contenders that are not there, and why."""
    reasons = {} if compiled else {COMPILED: "--no-compile"}
    if importlib.util.find_spec("mmengine") is None:
        reasons[MMCV] = "not installed: pip install mmcv-lite"
    return reasons


def networks(
    workload: Workload, *, compiled: bool = True, all_compiled: bool = False
) -> dict[str, nn.Module]:
    """The contenders, with the same weights, all in train mode but for what has to be in eval.
    ``all_compiled``: ours and BN in eval mode too, not just torchvision's."""
    torch.manual_seed(0)
    live = workload.build()
    body = live.backbone.body if workload.detection else live
    _scaled(body, torch.randn(2, 3, 224, 224))
    live.train()

    def frozen(**options: bool) -> nn.Module:
        return frozen_bn.convert_frozen_bn(copy.deepcopy(live), **options)

    def replaced(kind: type[nn.Module]) -> nn.Module:
        return _replace(copy.deepcopy(live), partial(_frozen_as, kind))

    nets = {
        DELETED: _replace(copy.deepcopy(live), lambda bn: nn.Identity()),
        EVAL: _in_eval_mode(copy.deepcopy(live)),
        TORCHVISION: replaced(FrozenBatchNorm2d),
        DETECTRON2: replaced(_Detectron2),
        PLAIN: frozen(fuse=False),
        FUSED: frozen(),
        FOLDED: frozen(fold_conv=True),
    }
    if compiled:
        nets[COMPILED] = _compiled(replaced(FrozenBatchNorm2d))
    if compiled and all_compiled:
        for name in (PLAIN, FUSED, FOLDED, EVAL, DELETED):
            nets[f"{name}, compiled"] = _compiled(copy.deepcopy(nets[name]))
    if MMCV not in left_out(compiled):
        nets[MMCV] = _with_mmcv_trick(_in_eval_mode(copy.deepcopy(live)))
    return nets


def chosen(nets: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    """Those whose name the pattern is found in, and what all are compared with."""
    return {
        name: net
        for name, net in nets.items()
        if name in (DELETED, TORCHVISION, FUSED) or re.search(pattern, name)
    }


def _in_precision(
    loss: Callable[[], Tensor], precision: Precision, device: torch.device
) -> Callable[[], Tensor]:
    if precision.autocast is None:
        return loss

    def cast() -> Tensor:
        with torch.autocast(device.type, precision.autocast):
            return loss()

    return cast


def loss_of(
    net: nn.Module, workload: Workload, device: torch.device, precision: Precision
) -> Callable[[], Tensor]:
    """A function that runs ``net`` forward on inputs that are the same for all networks."""
    generator = torch.Generator().manual_seed(1)
    count, size = workload.batch, workload.size
    images = torch.randn(count, 3, size, size, generator=generator).to(device)
    if precision.half:
        images = images.half()
    if not workload.detection:
        channels_last = next(p for p in net.parameters() if p.dim() == 4).is_contiguous(
            memory_format=torch.channels_last
        )
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(1000, (count,), generator=generator).to(device)
        entropy = torch.nn.functional.cross_entropy
        return _in_precision(lambda: entropy(net(images), labels), precision, device)
    corners = torch.rand(count, 8, 2, generator=generator) * size / 2
    boxes = torch.cat([corners, corners + size / 4], -1).to(device)
    targets = [
        {"boxes": b, "labels": torch.ones(8, dtype=torch.long, device=device)} for b in boxes
    ]

    def loss() -> Tensor:
        torch.manual_seed(2)  # proposals are sampled
        losses: dict[str, Tensor] = net([*images], targets)
        return torch.stack([*losses.values()]).sum()

    return _in_precision(loss, precision, device)
