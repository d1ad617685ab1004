"""The CUDA kernels of two branches: what only the emulator can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import the_emulator
from torch import Tensor

from frozen_bn.checks import Statistics
from frozen_bn.pair import frozen_batch_norm_pair

# Planar with runs inside and across tiles, periodic with one column and many, and tails of both.
SHAPES = [(2, 64, 7, 7), (1, 8, 25, 38), (2, 3, 65, 67), (3, 37, 2, 2), (5, 2048, 1, 1)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: bfloat16 and float16 differ in how they are converted, and in nothing else: later.
kinds = pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [
        pytest.param(d, c, marks=pytest.mark.long if d == torch.bfloat16 else ())
        for d in DTYPES
        for c in (False, True)
    ],
    ids=lambda value: {True: "channels_last", False: "contiguous"}.get(value, str(value)),
)
#: One a variant soon (in channels_last it is periodic), the others where time does not matter.
shapes = pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.long) for shape in SHAPES[1:])],
    ids=str,
)
activations = pytest.mark.parametrize("activation", ["relu", "silu"])


def output_and_gradients(
    emulator: Any, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool,
    activation: str | None, offset: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Of the same random numbers each time. With ``offset``, tensors begin as many elements into
    their memory."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def activation_sized() -> Tensor:
        values = randn(*shape).to(dtype)
        if channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        memory = torch.empty(values.numel() + offset, dtype=dtype)[offset:]
        return memory.as_strided(values.shape, values.stride(), offset).copy_(values)

    a, b = (
        Statistics(randn(shape[1]), randn(shape[1]).square() + 0.1, *randn(2, shape[1]).unbind())
        for _ in range(2)
    )
    x, r = activation_sized().requires_grad_(), activation_sized().requires_grad_()
    with emulator.active():
        y = frozen_batch_norm_pair(x, a, r, b, activation=activation)
        return [y, *torch.autograd.grad(y, [x, r], activation_sized())]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.covering(2)
@shapes
@kinds
@activations
def test_results_do_not_depend_on_the_order_of_the_warps(shape, dtype, channels_last, activation):
    emulator = the_emulator()
    in_step = output_and_gradients(emulator, shape, dtype, channels_last, activation)
    try:
        emulator.seed = 1
        other = output_and_gradients(emulator, shape, dtype, channels_last, activation)
    finally:
        emulator.seed = None
    assert_same_bits(other, in_step)


@pytest.mark.covering(2)
@shapes
@kinds
@activations
def test_64_bit_arithmetic_gives_the_same(shape, dtype, channels_last, activation):
    arguments = (shape, dtype, channels_last, activation)
    wide = output_and_gradients(the_emulator(wide=True), *arguments)
    assert_same_bits(wide, output_and_gradients(the_emulator(), *arguments))


@shapes
@kinds
@pytest.mark.parametrize("offset", [1, 8])
def test_misaligned_views_give_the_same(shape, dtype, channels_last, offset):
    arguments = (the_emulator(), shape, dtype, channels_last, "relu")
    assert_same_bits(output_and_gradients(*arguments, offset), output_and_gradients(*arguments))


@shapes
@kinds
def test_one_launch_each_way_and_no_activation_moves_twice(shape, dtype, channels_last):
    emulator = the_emulator()
    emulator.count_sectors = True
    emulator.launches.clear()
    try:
        y, *_ = output_and_gradients(emulator, shape, dtype, channels_last, "relu")
    finally:
        emulator.count_sectors = False
    assert len(emulator.launches) == 2
    passes = ({"input", "residual", "output"}, {"grad_output", "grad_input", "grad_residual"})
    bits, sector = -(-y.numel() // 8), 32
    for launch, tensors in zip(emulator.launches, passes, strict=True):
        moved = {name: 0 for name in (*tensors, "mask")}
        narrow = 0
        for (region, _), count in launch.sectors.items():
            if region in moved:
                moved[region] += sector * count
        for (region, _, width), threads in launch.accesses.items():
            narrow += threads * width * (region in tensors and width < 16)
        needed = len(tensors) * y.numel() * y.element_size() + bits
        # Every tensor may end within a sector.
        assert needed <= sum(moved.values()) <= max(1.02 * needed, needed + sector * len(moved))
        assert narrow <= len(tensors) * (y.numel() % 8) * y.element_size()


@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (2, 8, 0, 3)], ids=str)
def test_nothing_is_launched_for_nothing(shape):
    emulator = the_emulator()
    emulator.launches.clear()
    output_and_gradients(emulator, shape, torch.float32, False, "relu")
    assert emulator.launches == []
