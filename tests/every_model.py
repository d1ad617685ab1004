"""All classification models of torchvision that have batch normalizations, of which test_models.py
has one a family: ``make every-model`` (five minutes)."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from test_models import (
    assert_fusing_changes_nothing,
    collect,  # noqa: F401  (applies here too)
    from_torchvision,
    frozen,
    image_for,
    one_thread,  # noqa: F401
)

#: They have none.
WITHOUT = re.compile(r"alexnet|convnext_.*|squeezenet.*|swin_.*|vgg\d+|vit_.*")
NAMES = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not WITHOUT.fullmatch(name)
]
#: 645 million parameters, which would take 26 GB in float64.
LARGEST = "regnet_y_128gf"


@pytest.mark.parametrize("name", NAMES)
def test_fusing_changes_nothing(name: str) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if name == LARGEST else (torch.float64, 1e-9)
    net = frozen(lambda: from_torchvision(name), dtype)
    assert_fusing_changes_nothing(net, image_for(name, dtype), tolerance=tolerance)
