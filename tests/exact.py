"""Made inputs, the exact results on them, and how far rounding may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from frozen_bn import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HALVES = [torch.float16, torch.bfloat16]

MAPS = {0: (0, 5), 1: (1, 1), 4: (2, 2), 15: (3, 5), 16: (4, 4), 17: (1, 17), 49: (7, 7)}
MAPS |= {950: (25, 38), 60800: (200, 304)}


def make_input(n: int, c: int, hw: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    x = (torch.randn(n, c, *MAPS[hw], dtype=torch.float64) * 2).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def make_statistics(c: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """running_mean, running_var, weight, bias"""
    mean, weight, bias = torch.randn(3, c, dtype=torch.float64)
    var = torch.rand(c, dtype=torch.float64) + 0.2
    return [v.to(dtype) for v in (mean, var, weight, bias)]


def exact(input: Tensor, statistics: list[Tensor], **options: object) -> Tensor:
    """The reference in float64, on the very values that the operator was given."""
    residual = options.pop("residual", None)
    if isinstance(residual, Tensor):
        residual = residual.double()
    vectors = [v.double() for v in statistics]
    return reference.frozen_batch_norm(input.double(), *vectors, residual=residual, **options)


def unit_in_last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double()).exponent - 1
    spacing = torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent)
    return spacing.clamp(min=info.tiny * info.eps)


def assert_close_to_exact(actual: Tensor, expected: Tensor, terms: Tensor) -> None:
    """Within one unit in the last place of the rounded result, and the cancellation that float32
    arithmetic on terms of this size must have."""
    dtype = actual.dtype
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = 4 * unit_in_last_place(terms, arithmetic)
    if dtype != arithmetic:
        allowed = allowed + unit_in_last_place(expected, dtype)
    rounded = expected.to(dtype).double()
    assert ((actual.double() - rounded).abs() <= allowed).all()


def terms_of(input: Tensor, statistics: list[Tensor], residual: Tensor | None) -> Tensor:
    """The largest intermediate result of each element: what cancellation is measured against."""
    shape = [1, -1] + [1] * (input.dim() - 2)
    mean, var, weight, bias = (v.double().reshape(shape) for v in statistics)
    scale = weight.abs() / (var + 1e-5).sqrt()
    largest = (input.double().abs() + mean.abs()) * scale + bias.abs()
    if residual is not None:
        largest = largest + residual.double().abs()
    return largest.clamp(min=1e-30)


KINKS = {"relu": [0], "leaky_relu": [0], "relu6": [0, 6], "hardswish": [-3, 3]}


def at_a_kink(z: Tensor, terms: Tensor, activation: str | None) -> Tensor:
    """Where rounding decides on which side of a kink a pre-activation ``z`` is."""
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(activation, []):
        near |= (z - kink).abs() <= 4 * torch.finfo(torch.float32).eps * terms
    return near


def assert_gradient_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within rounding of the largest; ``dtype`` is that of the input, by which sums are taken."""
    if dtype == torch.float64 and actual.dim() > 1:
        tolerance = 1e-12
    else:
        tolerance = torch.finfo(actual.dtype).eps if actual.dtype in HALVES else 4e-6
    allowed = tolerance * expected.abs().max() + 1e-30
    assert ((actual.double() - expected).abs() <= allowed).all()


def awkward(kind: str) -> Tensor:
    """Tensors with holes, overlaps and odd orders; [2, 6, 7, 9] all."""
    if kind == "sliced channels":
        return torch.randn(2, 9, 7, 9)[:, 1:7]
    if kind == "sliced width":
        return torch.randn(2, 6, 7, 20)[..., 1:19:2]
    if kind == "expanded batch":
        return torch.randn(1, 6, 7, 9).expand(2, -1, -1, -1)
    if kind == "expanded scalar":
        return torch.randn(1, 1, 1, 1).expand(2, 6, 7, 9)
    if kind == "permuted":
        return torch.randn(9, 6, 2, 7).permute(2, 1, 3, 0)
    if kind == "transposed map":
        return torch.randn(2, 6, 9, 7).transpose(2, 3)
    if kind == "misaligned":
        return torch.randn(2 * 6 * 7 * 9 + 1)[1:].reshape(2, 6, 7, 9)
    return torch.randn(2, 14, 7, 9).to(memory_format=torch.channels_last)[:, 3:9]


AWKWARD = [
    "sliced channels",
    "sliced width",
    "expanded batch",
    "expanded scalar",
    "permuted",
    "transposed map",
    "misaligned",
    "sliced channels_last",
]
