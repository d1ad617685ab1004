"""Tensors whose elements do not count in 32 bits: real addresses, of which little is ever touched.

The real host code makes the launch; a few of its blocks run, on the memory that is theirs.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

import frozen_bn

from .runtime import Emulator

_TILE, _PACK = 4096, 8
_RELU = frozen_bn.checks.ACTIVATIONS.index("relu")


@dataclass(frozen=True)
class Huge:
    """The forward of float16 with a residual and ReLU, beyond 2^32 elements."""

    channels: int
    inner: int  # of [1, channels, inner] if planar, else [inner, channels]
    planar: bool

    @property
    def numel(self) -> int:
        return self.channels * self.inner

    def channel_of(self, element: Tensor) -> Tensor:
        return element // self.inner if self.planar else element % self.channels

    def tensor(self, dtype: torch.dtype = torch.float16, share: int = 1) -> Tensor:
        """Zeros: pages that nothing touches take no memory."""
        count = -(-self.numel // share)
        no_reserve = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)

    def launches(self) -> dict[int, list[slice]]:
        """Blocks to run, and the elements that each writes."""
        if self.planar:
            last_channel = (self.numel - self.inner) // _TILE
            tiles = ((1 << 31) // _TILE, last_channel, (self.numel - 1) // _TILE)
            return {t: [slice(t * _TILE, min((t + 1) * _TILE, self.numel))] for t in tiles}
        plan = frozen_bn._C.launch_plan(self.numel, self.channels, 1, summing=0)
        (parts, rows_of_blocks), (width, height) = plan["grid"], plan["block"]
        assert parts == 1 and width * _PACK == self.channels  # the rows of a block are one piece
        size, step = self.channels * height, self.channels * height * rows_of_blocks
        first = size * (rows_of_blocks - 1)
        starts = range(first, self.numel, step)
        return {rows_of_blocks - 1: [slice(s, min(s + size, self.numel)) for s in starts]}


HUGE = [Huge(4100, (1 << 20) + 1, planar=True), Huge(256, (1 << 24) + 5, planar=False)]


def compare(emulator: Emulator, huge: Huge) -> None:
    """Raises AssertionError or EmulationError where the kernel goes wrong."""
    generator = torch.Generator().manual_seed(0)
    mean, bias = (torch.randn(huge.channels, generator=generator) for _ in range(2))
    var, weight = (torch.rand(huge.channels, generator=generator) + 0.5 for _ in range(2))
    x, residual, output = (huge.tensor() for _ in range(3))
    mask = huge.tensor(torch.uint8, share=_PACK)
    shape = (1, huge.channels, huge.inner) if huge.planar else (huge.inner, huge.channels)
    try:
        for block, windows in huge.launches().items():
            for tensor in (x, residual):
                for window in windows:
                    tensor[window] = torch.randn(
                        window.stop - window.start, generator=generator
                    ).half()
            emulator.part = (range(block, block + 1), windows, huge.numel)
            emulator.forward(
                x.view(shape), mean, var, weight, bias, residual.view(shape), 1e-5, _RELU, 0.0,
                output.view(shape), None, mask,
            )  # fmt: skip
            for window in windows:
                channel = huge.channel_of(torch.arange(window.start, window.stop))
                scale = weight[channel] / torch.sqrt(var[channel] + 1e-5)
                z = (x[window].float() - mean[channel]) * scale + bias[channel]
                z += residual[window].float()
                torch.testing.assert_close(output[window], z.relu().half(), rtol=2e-3, atol=2e-3)
    finally:
        emulator.part = None
