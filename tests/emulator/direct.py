"""Launches a kernel on NumPy arrays, without host code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .machine import Counters, EmulationError, Launch, Program
from .memory import AddressSpace, Region


@dataclass(frozen=True)
class Argument:
    """An array that a kernel gets a pointer to."""

    array: NDArray
    initialised: bool | NDArray[np.bool_]  # all of it, or each element
    writable: bool


def given(array: NDArray) -> Argument:
    return Argument(array, initialised=True, writable=False)


def wanted(array: NDArray) -> Argument:
    """Every element has to be written, and none read before it is."""
    return Argument(array, initialised=False, writable=True)


def updated(array: NDArray) -> Argument:
    return Argument(array, initialised=True, writable=True)


def aligned(count: int, dtype: object, offset: int = 0) -> NDArray:
    """Zeros whose address is a multiple of 256, plus ``offset`` bytes."""
    size = count * np.dtype(dtype).itemsize
    room = np.zeros(size + offset + 256, np.uint8)
    start = -room.ctypes.data % 256 + offset
    return room[start : start + size].view(dtype)


def launch(
    program: Program,
    grid: int,
    block: int,
    *,
    seed: int | None = None,
    max_steps: int = 10_000,
    **arguments: Argument | int,
) -> Counters:
    """``arguments`` come in the kernel's order, under names that errors are to show.

    Raises:
        EmulationError: a fault in the kernel, or an element of a :func:`wanted` was not written.
    """
    memory, packed = AddressSpace(), bytearray()
    regions = {}
    layout = program.kernel.parameters.values()
    for (name, argument), (offset, size) in zip(arguments.items(), layout, strict=True):
        value = argument
        if isinstance(argument, Argument):
            array = argument.array
            value = array.ctypes.data
            region = Region.at(name, value, array.nbytes, array.itemsize)
            first = (region.begin - region.base) // region.unit
            region.initialised[first : first + array.size] |= argument.initialised
            region.writable = argument.writable
            regions[name] = memory.add(region)
        packed += bytes(offset - len(packed)) + int(value).to_bytes(size, "little")
    run = Launch(
        program,
        (grid, 1, 1),
        (block, 1, 1),
        bytes(packed),
        memory,
        seed=seed,
        count_sectors=True,
        max_steps=max_steps,
    )
    counters = run.run()
    for name, region in regions.items():
        if region.writable and not region.initialised.all():
            address = region.base + int((~region.initialised).argmax()) * region.unit
            text = f"element {(address - region.begin) // region.unit} of {name} was never written"
            raise EmulationError(f"{text}: {run.short_name}, address {address:#x}")
    return counters
