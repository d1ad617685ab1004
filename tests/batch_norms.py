"""Batch normalizations as they are before convert_frozen_bn, and what it makes of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
from helpers import randomize_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from frozen_bn import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

C = 4
IMAGE = (2, C, 5, 5)
FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)
BOTH = pytest.mark.parametrize("freeze_affine", [True, False])


def trained(live_class: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    return randomize_(live_class(C, **options))


def network(**options: object) -> nn.Sequential:
    """Two batch normalizations, in train mode."""
    net = nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.BatchNorm2d(C, **options),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C, **options)),
    )
    return randomize_(net)


def without_bias() -> nn.Module:
    if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
        return trained(bias=False)
    layer = trained()
    layer.bias = None
    return layer


def messages(function: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


def frozen_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, FROZEN)]


def frozen_statistics_loss(net: nn.Module, x: Tensor) -> Tensor:
    """A loss of ``net`` in train mode but for its batch normalizations, as one freezes by hand."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    return net(x).square().mean()
