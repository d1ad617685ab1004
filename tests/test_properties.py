"""frozen_batch_norm and its gradients against the float64 reference, on arguments made up by
hypothesis: thousands of shapes, strides, dtypes and options that nobody would think of."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from exact import (
    DTYPES,
    assert_close_to_exact,
    at_a_kink,
    terms_of,
    unit_in_last_place,
)
from helpers import ACTIVATIONS, CPU_LEVELS, SMOOTH, make_generator, output_strides
from torch import Tensor

import frozen_bn
from frozen_bn import frozen_batch_norm, reference
from frozen_bn.functional import has_kernels

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TINY = 1e-30


class Case(NamedTuple):
    """The arguments of one call; tensors by ``make``, so that a failure prints legibly."""

    shape: tuple[int, ...]
    layouts: dict[str, tuple]  # of input, residual and grad_output
    dtype: torch.dtype
    parameters: dict[str, torch.dtype]  # of those that are there
    residual: bool
    trainable: frozenset[str]
    activation: str | None
    negative_slope: float
    eps: float
    inplace: bool
    seed: int


@st.composite
def layouts(draw: st.DrawFn, rank: int) -> tuple:
    """The order of the dimensions in memory, the gaps around each, which are expanded, and the
    offset of the first element."""
    last, first = tuple(range(rank)), (0, *range(2, rank), 1)
    order = draw(st.sampled_from([last, last, first, first]) | st.permutations(range(rank)))
    plain = st.just((0,) * rank)
    gaps = draw(plain | plain | st.tuples(*[st.integers(0, 2)] * rank))
    expanded = draw(plain | plain | st.tuples(*[st.sampled_from([0, 0, 1])] * rank))
    return tuple(order), gaps, expanded, draw(st.integers(0, 9))


def shapes() -> st.SearchStrategy:
    batch = st.integers(0, 4)
    channels = st.integers(0, 40) | st.sampled_from([64, 96, 130, 256])
    maps = st.lists(st.integers(0, 12) | st.integers(1, 4), max_size=3)
    return st.builds(lambda n, c, m: (n, c, *m), batch, channels, maps)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    optional = draw(st.sets(st.sampled_from(["weight", "bias"])))
    residual = draw(st.booleans())
    names = ["input", *sorted(optional), *["residual"] * residual]
    vectors = ["running_mean", "running_var", *sorted(optional)]
    same = st.just(dict.fromkeys(vectors, torch.float32))
    mixed = st.fixed_dictionaries({name: st.sampled_from(DTYPES) for name in vectors})
    return Case(
        shape,
        {name: draw(layouts(len(shape))) for name in ("input", "residual", "grad_output")},
        draw(st.sampled_from(DTYPES)),
        draw(same | mixed),
        residual,
        frozenset(draw(st.sets(st.sampled_from(names)))),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from([0.01, 0.2, 0.0, 1.0, -0.5, 3.0])),
        draw(st.sampled_from([1e-5, 0.0, 1e-3, 1.0])),
        draw(st.booleans()),
        draw(st.integers(0, 2**32)),
    )


def make(case: Case, name: str, generator: torch.Generator) -> Tensor:
    """An activation in its layout."""
    order, gaps, expanded, offset = case.layouts[name]
    sizes = [1 if e else n for n, e in zip(case.shape, expanded, strict=True)]
    padded = [sizes[d] + gaps[d] for d in order]
    numel = torch.Size(padded).numel()
    # Of the dtype's own buffer, so that an offset misaligns it by so many elements.
    buffer = (2 * torch.randn(numel + offset, generator=generator)).to(case.dtype)
    inverse = [order.index(d) for d in range(len(order))]
    tensor = buffer[offset:].reshape(padded).permute(inverse)
    for dimension, size in enumerate(sizes):
        tensor = tensor.narrow(dimension, gaps[dimension] // 2, size)
    return tensor.expand(case.shape)


def make_vectors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    vectors = {}
    for name, dtype in case.parameters.items():
        uniform = torch.rand(case.shape[1], generator=generator, dtype=torch.float64)
        value = uniform + 0.3 if name == "running_var" else 4 * uniform - 2
        vectors[name] = value.to(dtype)
    return vectors


def results(function, tensors: dict[str, Tensor], case: Case, grad_output: Tensor, inplace: bool):
    """The output and the gradients by name, of leaves made of ``tensors``."""
    leaves = {n: t.detach().requires_grad_(n in case.trainable) for n, t in tensors.items()}
    given = dict(leaves)
    if inplace:  # over something that is not a leaf, nor has elements in common
        given["input"] = torch.empty_like(leaves["input"]).copy_(leaves["input"])
    y = function(
        **given,
        activation=case.activation,
        negative_slope=case.negative_slope,
        eps=case.eps,
        **({"inplace": True} if inplace else {}),
    )
    assert (y is given["input"]) == inplace
    names = sorted(case.trainable)
    assert y.requires_grad == bool(names)
    gradients = torch.autograd.grad(y, [leaves[n] for n in names], grad_output) if names else ()
    return y.detach(), dict(zip(names, gradients, strict=True))


def allowed_errors(case: Case, tensors: dict[str, Tensor], g: Tensor, terms: Tensor):
    """Of the gradients: a few roundings of what is multiplied, or of all that is summed."""
    shape = [1, -1] + [1] * (len(case.shape) - 2)
    others = [d for d in range(len(case.shape)) if d != 1]
    rstd = (tensors["running_var"].double() + case.eps).rsqrt().reshape(shape)
    scale = rstd * tensors["weight"].double().reshape(shape).abs() if "weight" in tensors else rstd
    centred = (tensors["input"].double() - tensors["running_mean"].double().reshape(shape)).abs()
    slope = max(1.2, abs(case.negative_slope))
    if case.activation in SMOOTH:
        slope = slope + terms  # whose slope has the rounding of the pre-activation
    g = g.double().abs() * slope
    terms = {"input": g * scale, "residual": g, "weight": g * centred * rstd, "bias": g}
    # The affine gradients are sums, taken in single precision for all but float64.
    return {n: t.sum(others) if n in ("weight", "bias") else t for n, t in terms.items()}


def check(case: Case) -> None:
    generator = make_generator(case.seed)
    tensors = {"input": make(case, "input", generator)} | make_vectors(case, generator)
    if case.residual:
        tensors["residual"] = make(case, "residual", generator)
    grad_output = make(case, "grad_output", generator)
    doubles = {name: t.double() for name, t in tensors.items()}
    terms = exact_terms(case, tensors)
    z = reference.frozen_batch_norm(**doubles, eps=case.eps)
    kinks = at_a_kink(z, terms, case.activation)
    grad_output = torch.where(kinks, torch.zeros_like(grad_output), grad_output)

    y, gradients = results(frozen_batch_norm, tensors, case, grad_output, case.inplace)
    best, expected = results(
        reference.frozen_batch_norm, doubles, case, grad_output.double(), False
    )
    assert y.dtype == case.dtype
    x = tensors["input"]
    laid_out = torch.empty_like(x).stride() if case.inplace else output_strides(x)
    assert y.stride() == laid_out or not has_kernels(y)
    largest = max(1.0, abs(case.negative_slope))
    assert_close_to_exact(y, best, terms * largest)
    allowed = allowed_errors(case, tensors, grad_output, terms)
    arithmetic = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name, got in gradients.items():
        want = expected[name]
        assert got.dtype == tensors[name].dtype and got.shape == tensors[name].shape
        limit = 16 * torch.finfo(arithmetic).eps * allowed[name] + TINY
        if got.dtype != arithmetic:
            limit = limit + unit_in_last_place(want, got.dtype)
        error = (got.double() - want).abs()
        assert (error <= limit).all(), f"gradient of {name}: {(error - limit).max():.2e} too far"


def exact_terms(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    ones, zeros = torch.ones(case.shape[1]), torch.zeros(case.shape[1])
    given = [tensors["running_mean"], tensors["running_var"].double() + case.eps]
    given += [tensors.get("weight", ones), tensors.get("bias", zeros)]
    return terms_of(tensors["input"], given, tensors.get("residual"))


def check_examples(most: int) -> None:
    settings = hypothesis.settings(
        max_examples=most,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=True,
        database=None,
    )
    settings(hypothesis.given(cases())(check))()


@pytest.mark.long_emulated
@pytest.mark.every_cpu_level
def test_arguments_that_nobody_would_think_of(device):
    """Most of them by the kernels that most will run."""
    on_the_cpu = dict.fromkeys(CPU_LEVELS, 50) | {CPU_LEVELS[-1]: 150}
    check_examples(on_the_cpu.get(device, 75))


@pytest.mark.long
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_many_arguments_that_nobody_would_think_of(level):
    """The first of them are those above."""
    frozen_bn._C.select_cpu_level(level)
    try:
        check_examples(750)
    finally:
        frozen_bn._C.select_cpu_level(CPU_LEVELS[-1])
