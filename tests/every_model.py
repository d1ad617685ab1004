"""All classification models of torchvision that have batch normalizations, of which test_models.py
has one a family: ``make every-model`` (20 minutes)."""

from __future__ import annotations

import pytest
import torch
import torchvision
from test_models import (
    SIDES,
    assert_fusing_changes_nothing,
    collect,  # noqa: F401  (applies here too)
    from_torchvision,
    frozen,
    image,
    one_thread,  # noqa: F401
)
from torch import nn


def has_batch_norms(name: str) -> bool:
    with torch.device("meta"):
        net = from_torchvision(name)
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


NAMES = torchvision.models.list_models(module=torchvision.models)


@pytest.mark.parametrize("name", filter(has_batch_norms, NAMES))
def test_fusing_changes_nothing(name: str) -> None:
    net, x = frozen(lambda: from_torchvision(name)), image(SIDES.get(name, 32))
    assert_fusing_changes_nothing(net, x[: 1 if name == "maxvit_t" else 2], tolerance=1e-9)
