"""What only the emulator can show of the CUDA kernels: that results depend neither on the order of
the warps nor on the width of the indices, nor differ between two runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import the_emulator
from emulator import huge
from emulator.ptx import Module
from emulator.runtime import Emulator, compile_kernels
from torch import Tensor

from frozen_bn import frozen_batch_norm

# Planar with runs inside and across tiles, periodic with one column and many, and tails of both.
SHAPES = [
    (2, 64, 7, 7),
    (1, 8, 25, 38),
    (2, 3, 65, 67),
    (3, 37, 2, 2),
    (5, 2048, 1, 1),
    (9, 1, 1, 1),
]

SOURCES = Path(__file__).parent / "emulator"

KINDS = [(d, c) for d in (torch.float32, torch.float16, torch.bfloat16) for c in (False, True)]


def parametrize_kinds(kinds: list) -> pytest.MarkDecorator:
    names = {True: "channels_last", False: "contiguous"}
    return pytest.mark.parametrize(
        ("dtype", "channels_last"), kinds, ids=lambda value: names.get(value, str(value))
    )


kinds = parametrize_kinds(KINDS)
#: bfloat16 and float16 differ in how they are converted, and in nothing else: later.
kinds_soon = parametrize_kinds(
    [pytest.param(*k, marks=pytest.mark.long if k[0] == torch.bfloat16 else ()) for k in KINDS]
)
#: One a variant soon (in channels_last it is periodic), the others where time does not matter.
shapes = pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.long) for shape in SHAPES[1:])],
    ids=str,
)
activations = pytest.mark.parametrize("activation", [None, "relu", "silu"])


def output_and_gradients(
    emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool,
    activation: str | None, offset: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Everything that the operators write, of the same random numbers each time. With ``offset``,
    tensors begin as many elements into their memory."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def activation_sized() -> Tensor:
        values = randn(*shape).to(dtype)
        if channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        memory = torch.empty(values.numel() + offset, dtype=dtype)[offset:]
        return memory.as_strided(values.shape, values.stride(), offset).copy_(values)

    channels = shape[1]
    mean, var = randn(channels), randn(channels).square() + 0.1
    weight, bias = randn(channels).requires_grad_(), randn(channels).requires_grad_()
    input, residual = activation_sized().requires_grad_(), activation_sized().requires_grad_()
    with emulator.active():
        y = frozen_batch_norm(
            input, mean, var, weight, bias, activation=activation, residual=residual
        )
        leaves = [input, weight, bias, residual]
        return [y, *torch.autograd.grad(y, leaves, activation_sized())]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.covering(2)
@shapes
@kinds_soon
@activations
def test_results_do_not_depend_on_the_order_of_the_warps(shape, dtype, channels_last, activation):
    emulator = the_emulator()
    arguments = (shape, dtype, channels_last, activation)
    in_step = output_and_gradients(emulator, *arguments)
    try:
        for emulator.seed in (1, 2):
            assert_same_bits(output_and_gradients(emulator, *arguments), in_step)
    finally:
        emulator.seed = None


@pytest.mark.covering(2)
@shapes
@kinds_soon
@activations
def test_64_bit_arithmetic_gives_the_same(shape, dtype, channels_last, activation):
    arguments = (shape, dtype, channels_last, activation)
    wide = output_and_gradients(the_emulator(wide=True), *arguments)
    assert_same_bits(wide, output_and_gradients(the_emulator(), *arguments))


@pytest.mark.parametrize("case", huge.HUGE, ids=["planar", "periodic"])
def test_indices_beyond_32_bits(case):
    huge.compare(the_emulator(), case)


@pytest.mark.covering(2)
@shapes
@kinds
@pytest.mark.parametrize("offset", [1, pytest.param(3, marks=pytest.mark.long), 8])
def test_misaligned_views_give_the_same(shape, dtype, channels_last, offset):
    arguments = (the_emulator(), shape, dtype, channels_last, "relu")
    y, *gradients = output_and_gradients(*arguments)
    their_y, *their_gradients = output_and_gradients(*arguments, offset=offset)
    assert_same_bits([their_y], [y])
    # The compiler fuses other multiplications into the sums of this path.
    for a, e in zip(their_gradients, gradients, strict=True):
        torch.testing.assert_close(a, e)


@kinds_soon
@pytest.mark.parametrize(
    "shape", [(9, 64, 20, 20), pytest.param((2, 520, 9, 9), marks=pytest.mark.long)], ids=str
)
def test_a_small_device_walks_long_columns(shape, dtype, channels_last):
    arguments = (the_emulator(), shape, dtype, channels_last, "relu")
    y, *gradients = output_and_gradients(*arguments)
    the_emulator().set_multiprocessors(1)
    try:
        their_y, *their_gradients = output_and_gradients(*arguments)
    finally:
        the_emulator().set_multiprocessors()
    assert_same_bits([their_y], [y])
    for a, e in zip(their_gradients, gradients, strict=True):
        torch.testing.assert_close(
            a, e, rtol=2e-6 if a.dim() == 1 else 0, atol=1e-4 * (a.dim() == 1)
        )


@shapes
@kinds_soon
def test_gradients_are_repeatable_bit_by_bit(shape, dtype, channels_last):
    arguments = (the_emulator(), shape, dtype, channels_last, "relu")
    assert_same_bits(output_and_gradients(*arguments), output_and_gradients(*arguments))


@pytest.fixture(scope="module")
def turing(tmp_path_factory: pytest.TempPathFactory) -> Module:
    the_emulator()
    folder = tmp_path_factory.mktemp("turing")
    compile_kernels(SOURCES / "turing.cu", folder, "75")
    text = (folder / "turing.ptx").read_text()
    assert "max.NaN" not in text and ".relu" not in text
    return Module(text)


@kinds
def test_an_architecture_without_instructions_for_relu(dtype, channels_last, turing):
    """NaN passes, and -0 becomes 0, in whole packs and in the tail."""
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5, -1.5])
    x = special.repeat(324)[: 3 * 41 * 21].reshape(3, 41, 7, 3).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    vectors = [torch.zeros(41), torch.ones(41), torch.ones(41), -torch.zeros(41)]
    emulator = the_emulator()

    def output() -> Tensor:
        with emulator.active():
            return frozen_batch_norm(x, *vectors, activation="relu", eps=0.0)

    expected = output()
    with emulator.instead(turing):
        y = output()
    assert "turing" in emulator.launches[-1].kernel
    assert_same_bits([y, y], [expected, x.relu()])
    assert not (y.signbit() & ~y.isnan()).any()


@kinds
@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 8, 0, 3)], ids=str)
def test_nothing_is_launched_for_nothing(shape, dtype, channels_last):
    emulator = the_emulator()
    emulator.launches.clear()
    y, grad_input, grad_weight, grad_bias, _ = output_and_gradients(
        emulator, shape, dtype, channels_last, "relu"
    )
    assert y.shape == grad_input.shape == shape
    assert not grad_weight.any() and not grad_bias.any()
    assert emulator.launches == []
