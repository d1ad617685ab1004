"""What exported programs and ONNX files carry for a frozen layer: torch's own batch normalization,
one operator that other tools recognise, fold and quantize; the formula is five that they do not.

It computes ``x * scale + (bias - mean * scale)``, which loses digits where the mean is large. So it
is taken for float32 only, and where the means are within ``MOST`` standard deviations of zero: that
is five bits of 24 at most. It is found out where statistics arrive, by the converter or out of a
checkpoint: while a program is exported, tensors have no values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import Statistics, check_forward

MOST = 32.0


def is_near_zero(mean: Tensor, var: Tensor, eps: float) -> bool:
    """Whether the operator keeps the digits; not where that cannot be told."""
    if not (type(mean) is type(var) is Tensor) or mean.is_meta:
        return False
    with torch.no_grad():
        deviation = torch.sqrt(var.float() + eps)
        return bool((mean.float().abs() <= MOST * deviation).all())


def is_exporting() -> bool:
    """By torch.export, or to ONNX by any of the exporters."""
    return torch.compiler.is_exporting() or (
        torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()
    )


def takes(input: Tensor, statistics: Statistics) -> bool:
    """Whether the operator is told float32 only."""
    mean, var, weight, bias, _ = statistics
    vectors = (v for v in (input, mean, var, weight, bias) if v is not None)
    return all(v.dtype == torch.float32 for v in vectors) and not (
        mean.requires_grad or var.requires_grad
    )


def batch_norm(
    input: Tensor,
    statistics: Statistics,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """``reference.frozen_batch_norm`` by that operator. Not in place: autograd, which an exported
    program goes on recording, saves its input."""
    check_forward(input, statistics, residual)
    mean, var, weight, bias, eps = statistics
    z = F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)
    if residual is not None:
        z = z + residual
    return reference.activate(z, activation, negative_slope)
