"""frozen_batch_norm against the float64 reference: every dtype, layout, shape and option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact import (
    AWKWARD,
    DTYPES,
    HALVES,
    assert_close_to_exact,
    at_a_kink,
    awkward,
    exact,
    make_input,
    make_statistics,
    terms_of,
)
from helpers import ACTIVATIONS, CPU_LEVELS, output_strides
from torch import Tensor

from frozen_bn import frozen_batch_norm, reference
from frozen_bn.functional import has_kernels

pytestmark = pytest.mark.every_cpu_level

# N, C, H*W: every value that the issue lists, none of them with all others.
SHAPES = [
    (2, 1, 4),
    (2, 3, 49),
    (1, 8, 950),
    (2, 37, 49),
    (2, 37, 1),
    (3, 64, 4),
    (2, 64, 950),
    (1, 2048, 49),
    (2, 2048, 1),
    (1, 3, 60800),
    (2, 1, 60800),
    (70000, 1, 4),
    (0, 8, 49),
    (2, 8, 0),
    (1, 5, 15),
    (3, 7, 16),
    (2, 9, 17),
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_rounded_exact_result(shape, dtype, channels_last, device):
    x = make_input(*shape, dtype, channels_last)
    statistics = make_statistics(shape[1])
    y = frozen_batch_norm(x, *statistics)
    assert y.dtype == dtype and y.shape == x.shape
    assert y.stride() == torch.empty_like(x).stride()
    assert_close_to_exact(y, exact(x, statistics), terms_of(x, statistics, None))


@pytest.mark.covering(2)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_activations_and_residual(channels_last, dtype, activation, with_residual, device):
    shape = (2, 37, 49)
    x = make_input(*shape, dtype, channels_last)
    residual = make_input(*shape, dtype, not channels_last) if with_residual else None
    statistics = make_statistics(37)
    options = {"activation": activation, "negative_slope": 0.2, "residual": residual}
    y = frozen_batch_norm(x, *statistics, **options)
    assert_close_to_exact(y, exact(x, statistics, **options), terms_of(x, statistics, residual))


def gradients(function, leaves: list[Tensor], statistics, grad_output: Tensor, **options):
    input, weight, bias, *residual = leaves
    y = function(
        input, *statistics, weight, bias, residual=residual[0] if residual else None, **options
    )
    return torch.autograd.grad(y, leaves, grad_output)


@pytest.mark.covering(3)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 37, 49),
        (3, 64, 4),
        pytest.param((1, 8, 950), marks=pytest.mark.long_emulated),
        pytest.param((2, 3, 60800), marks=pytest.mark.long_emulated),
    ],
)
def test_gradients_agree_with_float64(
    shape, channels_last, dtype, activation, with_residual, device
):
    if shape[2] == 60800 and not (activation == "relu" and with_residual):
        shape = (2, 3, 15)
    mean, var, weight, bias = make_statistics(shape[1])
    leaves = [make_input(*shape, dtype, channels_last), weight, bias]
    if with_residual:
        leaves.append(make_input(*shape, dtype, channels_last))
    grad_output = make_input(*shape, dtype, not channels_last)
    options = {"activation": activation, "negative_slope": 0.2}
    statistics, residual = (mean, var, weight, bias), leaves[3] if with_residual else None
    z, terms = (
        exact(leaves[0], statistics, residual=residual),
        terms_of(leaves[0], statistics, residual),
    )
    grad_output[at_a_kink(z, terms, activation)] = 0

    def of(function, kind=None):
        tensors = [leaf.detach().to(kind or leaf.dtype).requires_grad_() for leaf in leaves]
        vectors = [v.to(kind or v.dtype) for v in (mean, var)]
        return gradients(function, tensors, vectors, grad_output.to(kind or dtype), **options)

    actual = of(frozen_batch_norm)
    expected = of(reference.frozen_batch_norm, torch.float64)
    for got, want, leaf in zip(actual, expected, leaves, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        tolerance = 1e-12 if dtype == torch.float64 and leaf.dim() > 1 else 4e-6
        if leaf.dtype in HALVES:
            tolerance = torch.finfo(leaf.dtype).eps
        assert ((got.double() - want).abs() <= tolerance * want.abs().max() + 1e-30).all()
    assert actual[0].stride() == leaves[0].stride() or not has_kernels(leaves[0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 512, 49), (8, 256, 4), (2, 128, 950)])
def test_error_is_no_worse_than_that_of_batch_norm(shape, channels_last, device):
    x = make_input(*shape, torch.float32, channels_last).requires_grad_()
    statistics = make_statistics(shape[1])
    grad_output = torch.randn_like(x)
    weight, bias = (v.requires_grad_() for v in statistics[2:])

    def results(y: Tensor, leaves) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, leaves, grad_output.to(y.dtype))]

    ours = results(frozen_batch_norm(x, *statistics), [x, weight, bias])
    theirs = results(F.batch_norm(x, *statistics, training=False), [x, weight, bias])
    doubles = [t.detach().double().requires_grad_() for t in (x, *statistics)]
    best = results(reference.frozen_batch_norm(*doubles), [doubles[0], *doubles[3:]])
    for our, their, exact_value in zip(ours, theirs, best, strict=True):
        error, theirs_error = ((t.double() - exact_value).norm() for t in (our, their))
        # Sums of a dozen elements come down to the luck of their last rounding. The CUDA kernels
        # sum a tile in single precision, which F.batch_norm's on the CPU, in double, do not.
        sums = 1.05 if device in CPU_LEVELS else 1.3
        luck = sums if our.dim() == 1 else 1.0
        assert error <= luck * theirs_error


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_keeps_its_digits(channels_last, device):
    x = 1000 + 0.01 * torch.randn(2, 16, 7, 7)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    statistics = [torch.full((16,), v) for v in (1000.0, 1e-4, 1.0, 0.0)]
    expected = exact(x, statistics)
    error = (frozen_batch_norm(x, *statistics).double() - expected).abs().max()
    scale = (statistics[1] + 1e-5).rsqrt().reshape(1, -1, 1, 1)
    folded = x * scale - statistics[0].reshape(1, -1, 1, 1) * scale
    folded_error = (folded.double() - expected).abs().max()
    assert error <= 1e-6
    assert error < folded_error / 100


@pytest.mark.parametrize("dtype", HALVES)
def test_tiny_variance_does_not_underflow_in_half(dtype, device):
    x = torch.randn(2, 4, 5, 5).to(dtype)
    statistics = [torch.full((4,), v) for v in (0.0, 1e-8, 1e-4, 0.0)]
    y = frozen_batch_norm(x, *statistics, eps=0.0)
    torch.testing.assert_close(y, x, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.covering(2)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("role", ["input", "residual", "grad_output", "all"])
def test_any_strides(kind, role, activation, device):
    def tensor(name: str) -> Tensor:
        return awkward(kind) if role in (name, "all") else torch.randn(2, 6, 7, 9)

    input, residual = tensor("input").requires_grad_(), tensor("residual").requires_grad_()
    statistics = [v.requires_grad_(i > 1) for i, v in enumerate(make_statistics(6))]
    leaves = [input, residual, *statistics[2:]]
    grad_output = tensor("grad_output")
    outcomes = []
    for function in (frozen_batch_norm, reference.frozen_batch_norm):
        y = function(input, *statistics, residual=residual, activation=activation)
        outcomes.append([y, *torch.autograd.grad(y, leaves, grad_output)])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
    assert [y.stride() for y, *_ in outcomes] == [output_strides(input)] * 2


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (2, 6, 3, 4, 5), (2, 6, 1, 1), (2, 1, 3, 4)])
def test_every_rank(shape, device):
    x = torch.randn(shape)
    statistics = make_statistics(shape[1])
    expected = F.batch_norm(x, *statistics, training=False)
    torch.testing.assert_close(frozen_batch_norm(x, *statistics), expected)
    if len(shape) == 5:
        last = x.to(memory_format=torch.channels_last_3d)
        y = frozen_batch_norm(last, *statistics)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("vectors", [(False, False), (True, False), (False, True)])
def test_weight_and_bias_are_optional(vectors, device):
    mean, var, weight, bias = make_statistics(8)
    affine = [v if present else None for v, present in zip((weight, bias), vectors, strict=True)]
    x = torch.randn(2, 8, 5, 5)
    expected = F.batch_norm(x, mean, var, *affine, training=False)
    torch.testing.assert_close(frozen_batch_norm(x, mean, var, *affine), expected)


@pytest.mark.parametrize("parameters", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_any_dtype(dtype, parameters, device):
    x = torch.randn(2, 8, 5, 5).to(dtype)
    statistics = make_statistics(8, parameters)
    y = frozen_batch_norm(x, *statistics)
    assert_close_to_exact(y, exact(x, statistics), terms_of(x, statistics, None))
    mixed = [v.to(kind) for v, kind in zip(statistics, DTYPES, strict=True)]
    y = frozen_batch_norm(x, *mixed)
    assert_close_to_exact(y, exact(x, mixed), terms_of(x, mixed, None))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_and_infinity_pass_as_in_torch(activation, channels_last, device):
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e38, -1e38])
    x = special.repeat(2 * 3 * 7).reshape(2, 3, 7, 7)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    statistics = [torch.zeros(3), torch.ones(3)]
    options = {"activation": activation, "eps": 0.0}
    torch.testing.assert_close(
        frozen_batch_norm(x, *statistics, **options),
        reference.frozen_batch_norm(x, *statistics, **options),
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_round_to_nearest_even_like_torch(dtype, device):
    """Every finite half, and what lies halfway between two."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype).reshape(1, 1, 256, 256)
    exact_copy = frozen_batch_norm(x, torch.zeros(1), torch.ones(1), eps=0.0)
    torch.testing.assert_close(exact_copy, x, rtol=0, atol=0, equal_nan=True)
    scale = torch.tensor([1 + 2.0**-9])
    y = frozen_batch_norm(x, torch.zeros(1), torch.ones(1), scale, eps=0.0)
    torch.testing.assert_close(y, (x.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_affine_gradients_are_repeatable_bit_by_bit():
    x = torch.randn(4, 64, 56, 56)
    mean, var, weight, bias = make_statistics(64)
    weight.requires_grad_(), bias.requires_grad_()
    grad_output = torch.randn_like(x)

    def once():
        y = frozen_batch_norm(x, mean, var, weight, bias, activation="relu")
        return torch.autograd.grad(y, [weight, bias], grad_output)

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_outputs_and_thread_counts(threads):
    """Large enough for streaming stores, and for every thread to have a range."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels_last in (False, True):
            x = torch.randn(2, 37, 317, 331)
            if channels_last:
                x = x.to(memory_format=torch.channels_last)
            statistics = make_statistics(37)
            y = frozen_batch_norm(x, *statistics, activation="relu")
            expected = F.relu(F.batch_norm(x, *statistics, training=False))
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_gradients_at_the_kinks_are_torchs(activation, device):
    special = [-3.0, 3.0, 0.0, -0.0, 6.0, -7.0, 1.0]  # not NaN: torch has it both ways
    statistics = [torch.zeros(2), torch.ones(2)]
    gradients = []
    for function in (frozen_batch_norm, reference.frozen_batch_norm):
        x = torch.tensor(special).repeat(2 * 2 * 7).reshape(2, 2, 7, 7).requires_grad_()
        y = function(x, *statistics, activation=activation, eps=0.0)
        gradients.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    torch.testing.assert_close(*gradients, equal_nan=True)
