"""Frozen layers as they are used by hand, and how other ways to run one are compared with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_in_norm, outputs_and_gradients, randomize_
from torch import Tensor, nn

from frozen_bn import FrozenBatchNorm2d

C = 4

LAYERS = {
    "plain": {},
    "trained, relu": {"freeze_affine": False, "activation": "relu"},
    "trained, silu": {"freeze_affine": False, "activation": "silu"},
    "no affine, leaky_relu": {"affine": False, "activation": "leaky_relu"},
    "in place, hardswish": {"inplace": True, "activation": "hardswish"},
    "trained, in place, relu6": {"freeze_affine": False, "inplace": True, "activation": "relu6"},
}
EVERY_LAYER = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def layer(**options: object) -> nn.Module:
    return randomize_(FrozenBatchNorm2d(C, 1e-3, **options))


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    """An input, and a residual."""
    return torch.randn(shape or (2, C, 5, 3)), torch.randn(shape or (2, C, 5, 3))


def assert_equals(
    other: Callable[..., Tensor], eager: nn.Module, *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """Values, gradients, and their dtypes."""
    actual, expected = outputs_and_gradients(other, *inputs), outputs_and_gradients(eager, *inputs)
    actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
    assert_close_in_norm(actual, expected, tolerance)
