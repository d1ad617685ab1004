"""Gradients against the float64 reference at the sizes where the kernels' ways of summing change:
one channel and many, maps of one element and large ones."""

from __future__ import annotations

import pytest
import torch
from exact import (
    assert_gradient_close,
    at_a_kink,
    exact,
    make_input,
    make_statistics,
    terms_of,
)
from torch import Tensor

from frozen_bn import frozen_batch_norm, reference
from frozen_bn.checks import Statistics
from frozen_bn.pair import frozen_batch_norm_pair

# N, C, H*W. The second stage of the sums takes 32 channels a block; maps of up to 7 elements, and
# channels_last, go another way through memory than larger maps.
SHAPES = [
    (9, 1, 1),
    (2, 1, 49),
    (1, 1, 60800),
    (37, 3, 1),
    (3, 2048, 1),
    (2, 2048, 4),
    (1, 2048, 49),
    (2, 1030, 15),  # the last block of 32 channels has 6
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("channels_last", [False, True])


def leaves_of(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


@pytest.mark.covering(2)
@dtypes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_everything(shape, channels_last, dtype, device):
    mean, var, weight, bias = make_statistics(shape[1])
    x, residual, grad_output = (make_input(*shape, dtype, channels_last) for _ in range(3))
    statistics = [mean, var, weight, bias]
    z, terms = (f(x, statistics, residual=residual) for f in (exact, terms_of))
    grad_output[at_a_kink(z, terms, "relu")] = 0

    def gradients(function, dtype=None):
        x_, residual_, weight_, bias_ = leaves = leaves_of([x, residual, weight, bias], dtype)
        constants = (v.to(dtype or v.dtype) for v in (mean, var))
        y = function(x_, *constants, weight_, bias_, residual=residual_, activation="relu")
        return torch.autograd.grad(y, leaves, grad_output.to(y.dtype))

    actual = gradients(frozen_batch_norm)
    expected = gradients(reference.frozen_batch_norm, torch.float64)
    for got, want in zip(actual, expected, strict=True):
        assert_gradient_close(got, want, dtype)


@pytest.mark.covering(2)
@dtypes
@layouts
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:6], ids=str)
def test_gradients_of_both_branches_of_a_pair(shape, activation, channels_last, dtype, device):
    pair = [make_statistics(shape[1]) for _ in range(2)]
    x, residual, grad_output = (make_input(*shape, dtype, channels_last) for _ in range(3))

    def results(function, activation, dtype=None):
        a, b = (Statistics(*(v.to(dtype or v.dtype) for v in vectors)) for vectors in pair)
        leaves = leaves_of([x, residual], dtype)
        return function(leaves[0], a, leaves[1], b, activation=activation), leaves

    z, _ = results(reference.frozen_batch_norm_pair, None, torch.float64)
    terms = sum(terms_of(t, vectors, None) for t, vectors in zip((x, residual), pair, strict=True))
    grad_output[at_a_kink(z.detach(), terms, activation)] = 0
    y, leaves = results(frozen_batch_norm_pair, activation)
    exact_y, exact_leaves = results(reference.frozen_batch_norm_pair, activation, torch.float64)
    actual = torch.autograd.grad(y, leaves, grad_output)
    expected = torch.autograd.grad(exact_y, exact_leaves, grad_output.double())
    for got, want in zip(actual, expected, strict=True):
        assert_gradient_close(got, want, dtype)
