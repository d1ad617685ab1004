"""Models of torchvision, timm, Hugging Face's transformers and segmentation-models-pytorch, small
and of random weights, with the losses and optimizers that their own training scripts have."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import calm_
from torch import Tensor, nn

Losses = dict[str, Tensor]


def boxes_and_labels() -> dict[str, Tensor]:
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 44.0]])
    return {"boxes": boxes, "labels": torch.tensor([1, 3])}


def faster_rcnn() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    sizes = dict(num_classes=5, min_size=64, max_size=96)
    return detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **sizes)


def faster_rcnn_losses(model: nn.Module) -> Losses:
    """As in references/detection/engine.py."""
    return model([*torch.rand(2, 3, 64, 80)], [boxes_and_labels() for _ in range(2)])


def timm_classifier(name: str, **options: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, drop_rate=0.2, drop_path_rate=0.1, **options)


def timm_losses(model: nn.Module) -> Losses:
    """As in timm's train.py."""
    criterion = pytest.importorskip("timm.loss").LabelSmoothingCrossEntropy(0.1)
    return {"loss": criterion(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 4]))}


TRANSFORMER = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    num_queries=5,
    num_labels=3,
)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])


def detr(backbone: str) -> nn.Module:
    """Frozen as it is made: transformers puts its own frozen class into the backbone."""
    transformers = pytest.importorskip("transformers")
    if backbone == "timm":
        pytest.importorskip("timm")
        options = dict(use_timm_backbone=True, backbone="resnet18", backbone_config=None)
    else:
        resnet = transformers.ResNetConfig(**RESNET, layer_type="basic", out_features=["stage4"])
        options = dict(use_timm_backbone=False, backbone=None, backbone_config=resnet)
    config = transformers.DetrConfig(**TRANSFORMER, **options, use_pretrained_backbone=False)
    return transformers.DetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    """Of frozen batch normalizations and live ones."""
    transformers = pytest.importorskip("transformers")
    stages = ["stage2", "stage3", "stage4"]
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            **RESNET, layer_type="bottleneck", out_features=stages
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 32],
        feat_strides=[8, 16, 32],
        decoder_in_channels=[32, 32, 32],
        num_denoising=4,
        **{k: v for k, v in TRANSFORMER.items() if k not in ("num_queries", "encoder_layers")},
        num_queries=10,
    )
    return transformers.RTDetrForObjectDetection(config)


def transformers_losses(model: nn.Module) -> Losses:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.4, 0.4, 0.3, 0.3]])
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": boxes} for _ in range(2)]
    return {"loss": model(pixel_values=torch.rand(2, 3, 64, 64), labels=labels).loss}


def unet(encoder: str) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet(encoder, encoder_weights=None, decoder_channels=(16, 16, 8, 8, 8))


def unet_losses(model: nn.Module) -> Losses:
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    mask = (torch.rand(2, 1, 64, 64) > 0.5).double()
    logits = model(torch.rand(2, 3, 64, 64))
    return {
        "dice": losses.DiceLoss("binary")(logits, mask),
        "bce": F.binary_cross_entropy_with_logits(logits, mask),
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """That of torchvision's reference script."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, lr=0.02, momentum=0.9, weight_decay=1e-4)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def timm_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    optim = pytest.importorskip("timm.optim")
    return optim.create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-4)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module], Losses]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    layers: int  # batch normalizations
    merged: int  # so many of them with what stands next to them, by fuse and by fold_conv


def timm_case(layers: int, merged: int, name: str, **options: object) -> Case:
    make = functools.partial(timm_classifier, name, **options)
    return Case(make, timm_losses, timm_optimizer, layers, merged)


def unet_case(layers: int, merged: int, encoder: str) -> Case:
    return Case(functools.partial(unet, encoder), unet_losses, adamw, layers, merged)


CASES = {
    "torchvision-faster_rcnn": Case(faster_rcnn, faster_rcnn_losses, sgd, 53, 53),
    "timm-resnet18": timm_case(20, 10, "resnet18"),
    "timm-mobilenetv3": timm_case(34, 23, "mobilenetv3_small_050"),
    "timm-mobilenetv3-gelu": timm_case(34, 5, "mobilenetv3_small_050", act_layer="gelu"),
    "transformers-detr": Case(lambda: detr("resnet"), transformers_losses, adamw, 12, 5),
    "transformers-detr-timm": Case(lambda: detr("timm"), transformers_losses, adamw, 20, 20),
    "transformers-rt_detr": Case(rt_detr, transformers_losses, adamw, 60, 23),
    "smp-resnet18": unet_case(30, 30, "resnet18"),
    # Whether a sum is of a BatchNorm or of what drop_connect returns shows when it runs.
    "smp-efficientnet": unet_case(59, 42, "efficientnet-b0"),
    "smp-timm-efficientnet": unet_case(59, 42, "timm-efficientnet-b0"),
}


@functools.lru_cache(maxsize=1)  # the tests of one case follow each other
def _template(case: Case) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, about initialization
        return calm_(case.make())


def made(case: Case) -> nn.Module:
    """With the values of a trained model in its batch normalizations."""
    return copy.deepcopy(_template(case))
