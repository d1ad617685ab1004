"""Finds accesses of several threads that no barrier orders, in whatever order they ran."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NOBODY, _SEVERAL_BLOCKS = 0, np.iinfo(np.int32).min


@dataclass
class Accessors:
    """Who accesses, a row for each lane: the number of its thread in the launch, of its block, and
    the barriers that the block has passed."""

    thread: NDArray[np.int64]
    block: NDArray[np.int64]
    epoch: NDArray[np.int32]

    def expand(self, units: int) -> tuple[NDArray, NDArray, NDArray]:
        return (
            np.repeat(self.thread, units).astype(np.int32) + 1,
            np.repeat(self.block, units).astype(np.int32) + 1,
            np.repeat(self.epoch, units),
        )


class _Accesses:
    """Of each unit, who has accessed it in one way (reads, writes, or atomics).

    That is a thread number, or minus a block number if several threads of that block have since its
    last barrier, or ``_SEVERAL_BLOCKS``. Older accesses of that block need not be remembered: what
    is ordered after the newest is ordered after them.
    """

    def __init__(self, units: int, threads_per_block: int) -> None:
        self._threads_per_block = threads_per_block
        self._who = np.zeros(units, np.int32)
        self._epoch = np.zeros(units, np.int32)
        self._any = False

    def _block_of(self, who: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.where(who > 0, (who - 1) // self._threads_per_block + 1, -who)

    def by_anyone(self, units: NDArray) -> NDArray[np.bool_]:
        return self._who[units] != _NOBODY

    def by_others(self, units: NDArray, thread: NDArray) -> NDArray[np.bool_]:
        who = self._who[units]
        return (who != _NOBODY) & (who != thread)

    def unordered(self, units: NDArray, thread: NDArray, block: NDArray, epoch: NDArray):
        """Where they race with the access: one thread did not make both, nor one block with a
        barrier in between."""
        if not self._any:
            return np.zeros(units.size, bool)
        others = self.by_others(units, thread)
        if not others.any():
            return others
        before_barrier = self._block_of(self._who[units]) == block
        before_barrier &= self._epoch[units] < epoch
        return others & ~before_barrier

    def add(self, units: NDArray, thread: NDArray, block: NDArray, epoch: NDArray) -> None:
        before = self._who[units]
        same_block = self._block_of(before) == block
        alone = (before == _NOBODY) | (before == thread)
        alone |= same_block & (self._epoch[units] < epoch)
        now = np.where(alone, thread, np.where(same_block, -block, _SEVERAL_BLOCKS))
        self._who[units] = now
        clash = self._who[units] != now  # several lanes of this very access
        if clash.any():
            self._who[units[clash]] = -block[clash]
            foreign = self._block_of(self._who[units]) != block
            self._who[units[foreign]] = _SEVERAL_BLOCKS
        self._epoch[units] = epoch
        self._any = True


class RaceDetector:
    """Finds accesses that no barrier orders: two of them to one unit, not both reads nor both
    atomics."""

    def __init__(self, units: int, threads_per_block: int) -> None:
        self._units = units
        self._reads = _Accesses(units, threads_per_block)
        self._writes = _Accesses(units, threads_per_block)
        self._atomics = _Accesses(units, threads_per_block)
        self._constant: NDArray[np.bool_] | None = None  # read as what nobody writes

    def read(
        self, units: NDArray, by: Accessors, width: int, constant: bool = False
    ) -> NDArray[np.bool_]:
        """Where a read races with an earlier access; ``constant``: with any write of the launch,
        ordered or not, be it to come."""
        who = by.expand(width)
        races = self._writes.unordered(units, *who) | self._atomics.unordered(units, *who)
        if constant:
            races |= self._writes.by_anyone(units) | self._atomics.by_anyone(units)
            if self._constant is None:
                self._constant = np.zeros(self._units, bool)
            self._constant[units] = True
        self._reads.add(units, *who)
        return races

    def write(self, units: NDArray, by: Accessors, width: int) -> NDArray[np.bool_]:
        """Where a write races with an earlier access, or with another lane's."""
        who = by.expand(width)
        races = self._reads.unordered(units, *who) | self._writes.unordered(units, *who)
        races |= self._atomics.unordered(units, *who) | self._read_as_constant(units)
        self._writes.add(units, *who)
        # As of now the writer is this thread, or the others are of this very access.
        return races | self._writes.by_others(units, who[0])

    def atomic(self, units: NDArray, by: Accessors, width: int) -> NDArray[np.bool_]:
        """Where an atomic races with an earlier read or write."""
        who = by.expand(width)
        races = self._reads.unordered(units, *who) | self._writes.unordered(units, *who)
        races |= self._read_as_constant(units)
        self._atomics.add(units, *who)
        return races

    def _read_as_constant(self, units: NDArray) -> NDArray[np.bool_] | np.bool_:
        return np.False_ if self._constant is None else self._constant[units]
