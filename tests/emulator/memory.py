"""Memory whose every access is checked: inside an allocation, aligned, initialised before it is
read, and not shared by two threads without a barrier between them.

Global memory is real: the bytes of the tensors themselves. What happened to it in a launch is kept
beside it, one entry a unit (the element size of the tensor).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .races import Accessors, RaceDetector

Addresses = NDArray[np.uint64]
Combine = Callable[[Any, Any], Any]


class MemoryFault(Exception):
    """A bad access: what is wrong, which of the accessing lanes, and at which address if any."""

    def __init__(self, what: str, lane: int, address: int | None = None) -> None:
        super().__init__(what)
        self.what, self.lane, self.address = what, lane, address


def _view(address: int, size: int) -> NDArray[np.uint8]:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class Region:
    """One allocation: its bytes, and what is known of each unit of them."""

    def __init__(
        self, name: str, data: NDArray[np.uint8], base: int, begin: int, unit: int
    ) -> None:
        self.name, self.unit = name, unit
        self.base = base  # the address of data[0], a multiple of 16
        self.begin, self.end = begin, base + data.size
        self.data = data
        self.initialised = np.zeros(-(-data.size // unit), bool)
        self.written = np.zeros_like(self.initialised)  # by kernels
        self._complete = False  # all of it is initialised
        self.writable = True
        self.races: RaceDetector | None = None

    @classmethod
    def at(cls, name: str, address: int, size: int, unit: int) -> Region:
        """Memory of this process."""
        base = address // 16 * 16
        # Rounded up, so that whole elements of every width fit; what is beyond is never touched.
        data = _view(base, -(-(address + size - base) // 16) * 16)
        region = cls(name, data, base, address, unit)
        region.end = address + size
        region.initialised[: (address - base) // unit] = True
        region.initialised[-(-(region.end - base) // unit) :] = True
        return region

    def units(self, offsets: NDArray, width: int) -> tuple[NDArray, int]:
        """The numbers of the units that accesses of ``width`` bytes touch, and how many each."""
        count = max(width // self.unit, 1)
        first = offsets // self.unit
        if count == 1:
            return first, 1
        return (first[:, None] + np.arange(count)).ravel(), count

    def check_range(self, addresses: Addresses, width: int) -> None:
        outside = (addresses < self.begin) | (addresses > self.end - width)
        if outside.any():
            lane = int(outside.argmax())
            raise MemoryFault(
                f"{width} bytes outside {self.name}, which is [{self.begin:#x}, {self.end:#x})",
                lane,
                int(addresses[lane]),
            )

    def _check_initialised(self, addresses: Addresses, units: NDArray, per_lane: int) -> None:
        known = self.initialised[units]
        if not known.all():
            lane = int((~known).argmax()) // per_lane
            raise MemoryFault(f"read of uninitialised {self.name}", lane, int(addresses[lane]))

    def _check_races(self, races: NDArray, addresses: Addresses, per_lane: int, what: str) -> None:
        if races.any():
            lane = int(races.argmax()) // per_lane
            raise MemoryFault(f"race in {self.name}: {what}", lane, int(addresses[lane]))

    def _check_writable(self, addresses: Addresses) -> None:
        if not self.writable:
            raise MemoryFault(f"write to {self.name}, an input", 0, int(addresses[0]))

    def load(
        self, addresses: Addresses, dtype: np.dtype, count: int, by: Accessors,
        constant: bool = False,
    ) -> NDArray:  # fmt: skip
        """[lanes, count] elements. ``constant``: no thread of the launch may write there."""
        offsets = (addresses - self.base).astype(np.int64)
        self._complete = self._complete or bool(self.initialised.all())
        if self.races or not self._complete:
            units, per_lane = self.units(offsets, dtype.itemsize * count)
            self._check_initialised(addresses, units, per_lane)
            if self.races:
                races = self.races.read(units, by, per_lane, constant)
                what = "read of what another thread wrote"
                what += ", or read as constant of what any did" * constant
                self._check_races(races, addresses, per_lane, what)
        elements = self.data.view(dtype)
        return elements[(offsets // dtype.itemsize)[:, None] + np.arange(count)]

    def store(self, addresses: Addresses, values: NDArray, by: Accessors) -> None:
        """``values``: [lanes, count]"""
        self._check_writable(addresses)
        offsets = (addresses - self.base).astype(np.int64)
        units, per_lane = self.units(offsets, values.itemsize * values.shape[1])
        if self.races:
            races = self.races.write(units, by, per_lane)
            what = "write of what another thread read or wrote, or any read as constant"
            self._check_races(races, addresses, per_lane, what)
        self.initialised[units] = self.written[units] = True
        elements = self.data.view(values.dtype)
        elements[(offsets // values.itemsize)[:, None] + np.arange(values.shape[1])] = values

    def atomic(
        self, addresses: Addresses, operands: NDArray, combine: Combine, by: Accessors
    ) -> NDArray:
        """The values before. Lanes go one after the other."""
        self._check_writable(addresses)
        offsets = (addresses - self.base).astype(np.int64)
        units, per_lane = self.units(offsets, operands.itemsize)
        self._check_initialised(addresses, units, per_lane)
        if self.races:
            races = self.races.atomic(units, by, per_lane)
            what = "atomic on what another thread read or wrote, or any read as constant"
            self._check_races(races, addresses, per_lane, what)
        elements, before = self.data.view(operands.dtype), np.empty_like(operands)
        for lane, index in enumerate(offsets // operands.itemsize):
            before[lane] = elements[index]
            elements[index] = combine(elements[index], operands[lane])
        return before


def check_alignment(addresses: Addresses, width: int) -> None:
    off = addresses % np.uint64(width) != 0
    if off.any():
        lane = int(off.argmax())
        raise MemoryFault(f"access not aligned to its {width} bytes", lane, int(addresses[lane]))


class AddressSpace:
    """Regions that do not overlap, by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._begins = np.zeros(0, np.uint64)

    def add(self, region: Region) -> Region:
        """Adds a region, or finds the one that covers it already."""
        for other in self.regions:
            if other.begin <= region.begin and region.end <= other.end:
                return other
            if other.begin < region.end and region.begin < other.end:
                raise ValueError(f"{region.name} overlaps {other.name} in part")
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.begin)
        self._begins = np.array([r.begin for r in self.regions], np.uint64)
        return region

    def watch(self, threads_per_block: int) -> None:
        """Starts looking for races: a launch begins, and what came before it is ordered."""
        for region in self.regions:
            if region.writable:
                region.races = RaceDetector(region.initialised.size, threads_per_block)

    def split(self, addresses: Addresses, width: int):
        """The regions accessed, each with the lanes that do (``None``: all)."""
        check_alignment(addresses, width)
        number = np.searchsorted(self._begins, addresses, side="right") - 1
        if number.min() < 0:
            lane = int(number.argmin())
            raise MemoryFault(f"{width} bytes outside any allocation", lane, int(addresses[lane]))
        if number.min() == number.max():
            yield self.regions[number[0]], None
            return
        for k in np.unique(number):
            yield self.regions[k], np.flatnonzero(number == k)

    def load(
        self, addresses: Addresses, dtype: np.dtype, count: int, by: Accessors,
        constant: bool = False,
    ) -> NDArray:  # fmt: skip
        """[lanes, count] elements. ``constant``: no thread of the launch may write there."""
        result = None
        for region, lanes in self.split(addresses, dtype.itemsize * count):
            if lanes is None:
                region.check_range(addresses, dtype.itemsize * count)
                return region.load(addresses, dtype, count, by, constant)
            if result is None:
                result = np.empty((addresses.size, count), dtype)
            with _lanes_of(lanes):
                region.check_range(addresses[lanes], dtype.itemsize * count)
                result[lanes] = region.load(
                    addresses[lanes], dtype, count, _some(by, lanes), constant
                )
        assert result is not None
        return result

    def store(self, addresses: Addresses, values: NDArray, by: Accessors) -> None:
        """``values``: [lanes, count]"""
        width = values.dtype.itemsize * values.shape[1]
        for region, lanes in self.split(addresses, width):
            if lanes is None:
                region.check_range(addresses, width)
                region.store(addresses, values, by)
                continue
            with _lanes_of(lanes):
                region.check_range(addresses[lanes], width)
                region.store(addresses[lanes], values[lanes], _some(by, lanes))

    def atomic(
        self, addresses: Addresses, operands: NDArray, combine: Combine, by: Accessors
    ) -> NDArray:
        """The values before."""
        before = np.empty_like(operands)
        for region, lanes in self.split(addresses, operands.itemsize):
            mine = np.arange(addresses.size) if lanes is None else lanes
            with _lanes_of(mine):
                region.check_range(addresses[mine], operands.itemsize)
                before[mine] = region.atomic(
                    addresses[mine], operands[mine], combine, _some(by, mine)
                )
        return before


def _some(by: Accessors, lanes: NDArray) -> Accessors:
    return Accessors(by.thread[lanes], by.block[lanes], by.epoch[lanes])


class _lanes_of:
    """Renumbers the lane of a fault that was found in a subset."""

    def __init__(self, lanes: NDArray) -> None:
        self._lanes = lanes

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, fault: object, traceback: object) -> None:
        if isinstance(fault, MemoryFault):
            fault.lane = int(self._lanes[fault.lane])


class SharedMemory(AddressSpace):
    """The shared variables of all blocks that run together, one copy a block.

    An address is an offset into the block's own copy. Every access has to stay within one variable.
    """

    def __init__(
        self, variables: dict[str, tuple[int, int]], size: int, blocks: int, threads_per_block: int
    ) -> None:
        super().__init__()
        self.stride = -(-size // 16) * 16
        self._variables = sorted(
            (offset, length, name) for name, (offset, length) in variables.items()
        )
        self._starts = np.array([offset for offset, _, _ in self._variables], np.int64)
        region = Region("shared memory", np.zeros(self.stride * blocks, np.uint8), 0, 0, 1)
        region.races = RaceDetector(region.initialised.size, threads_per_block)
        self.regions, self._begins = [region], np.zeros(1, np.uint64)

    def check_variables(self, offsets: NDArray[np.int64], width: int) -> None:
        if not self._variables:
            raise MemoryFault("the kernel has no shared variables", 0, int(offsets[0]))
        number = np.searchsorted(self._starts, offsets, side="right") - 1
        for k in np.unique(number):
            offset, length, name = self._variables[k]
            mine = number == k
            outside = mine & ((offsets < offset) | (offsets + width > offset + length))
            if outside.any():
                lane = int(outside.argmax())
                what = f"{width} bytes outside the shared variable {name}"
                raise MemoryFault(what, lane, int(offsets[lane]))
