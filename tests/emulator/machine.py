"""Runs a kernel: all threads of many blocks in step, a register being one array.

The threads that stand at the lowest instruction go on first, so that branches meet again. With a
``seed``, random warps run ahead of the others for a while: results must not depend on it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .instructions import CONTROL, Step, check_control, compile_instruction
from .lanes import EmulationError, Lanes
from .memory import AddressSpace, MemoryFault
from .ptx import Instruction, Kernel
from .values import Value

Dim3 = tuple[int, int, int]

SECTOR = 32  # bytes
_ERRORS = (EmulationError, MemoryFault, ZeroDivisionError)
_MAX_LANES = 1 << 16  # threads that run together


@dataclass
class Counters:
    """What one launch did.

    ``instructions`` are PTX instructions summed over threads. ``accesses`` counts the threads that
    accessed global memory, by (region, "load", "store" or "atomic", bytes a thread). ``requested``
    counts the 32-byte sectors that warp-wide accesses touch, one access at a time; ``sectors``
    counts a sector once a warp and launch, as an L1 cache line serves neighbouring accesses.
    """

    kernel: str = ""
    threads: int = 0
    instructions: int = 0
    branches: int = 0  # of warps, where they can go either way
    divergent_branches: int = 0
    barriers: int = 0  # of blocks
    accesses: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    requested: Counter[tuple[str, str]] = field(default_factory=Counter)
    sectors: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Block:
    """A basic block: straight code, then one branch, return or barrier, or the next block."""

    steps: list[tuple[Instruction, Step]]
    end: Instruction | None
    target: int  # where a taken branch goes


class Program:
    """A kernel, compiled to basic blocks."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        leaders = {0, *kernel.labels.values()}
        for i, instruction in enumerate(kernel.code):
            if instruction.opcode[0] in CONTROL:
                leaders.add(i + 1)
        starts = sorted(start for start in leaders if start < len(kernel.code))
        number = {start: k for k, start in enumerate(starts)} | {len(kernel.code): len(starts)}
        self.exit = len(starts)
        self.blocks = [
            self._block(start, end, number)
            for start, end in zip(starts, [*starts[1:], len(kernel.code)], strict=True)
        ]

    def _block(self, start: int, end: int, number: dict[int, int]) -> Block:
        code = self.kernel.code[start:end]
        last, target = None, -1
        if code[-1].opcode[0] in CONTROL:
            last = code.pop()
            check_control(last, self.kernel)
            if last.opcode[0] == "bra":
                target = number[self.kernel.labels[last.operands[-1]]]
        return Block([(i, compile_instruction(i, self.kernel)) for i in code], last, target)


class Launch:
    """One launch of a kernel on a grid."""

    def __init__(
        self,
        program: Program,
        grid: Dim3,
        block: Dim3,
        parameters: bytes,
        memory: AddressSpace,
        *,
        seed: int | None = None,
        count_sectors: bool = False,
        max_steps: int = 1_000_000,
        blocks: range | None = None,
    ) -> None:
        """``blocks``: those to run, if not all."""
        self.program, self.kernel = program, program.kernel
        self.grid, self.block, self.parameters, self.memory = grid, block, parameters, memory
        self.threads_per_block = int(np.prod(block))
        self.counters = Counters(self.kernel.name, int(np.prod(grid)) * self.threads_per_block)
        self.random = None if seed is None else np.random.default_rng(seed)
        self.max_steps = max_steps
        self.blocks = range(int(np.prod(grid))) if blocks is None else blocks
        self._count_sectors = count_sectors
        self._touched: dict[tuple[str, str], list[NDArray]] = {}

    def run(self) -> Counters:
        """Runs all blocks.

        Raises:
            EmulationError: with kernel, source line, block, thread and address.
        """
        blocks = self.blocks
        together = max(1, _MAX_LANES // self.threads_per_block)
        self.memory.watch(self.threads_per_block)
        with np.errstate(all="ignore"):
            for first in blocks[::together]:
                _Run(self, Lanes(self, first, min(together, blocks.stop - first))).run()
        for key, keys in self._touched.items():
            self.counters.sectors[key] = np.unique(np.concatenate(keys)).size
        return self.counters

    def observe(self, lanes: Lanes, kind: str, addresses: NDArray, width: int) -> None:
        """Counts an access to global memory."""
        if not self._count_sectors:
            return
        warp = lanes.pick(lanes.warp).astype(np.uint64)
        for region, mine in self.memory.split(addresses, width):
            mine = slice(None) if mine is None else mine
            offsets = addresses[mine] - np.uint64(region.base // SECTOR * SECTOR)
            key = np.unique(warp[mine] << np.uint64(32) | offsets // np.uint64(SECTOR))
            self.counters.accesses[region.name, kind, width] += offsets.size
            self.counters.requested[region.name, kind] += key.size
            self._touched.setdefault((region.name, kind), []).append(key)

    @cached_property
    def short_name(self) -> str:
        """The kernel's name, without what the compiler wrapped around it."""
        name = self.kernel.name
        start = name.find("frozen_bn_")
        return name[start:] if start >= 0 else name


class _Run:
    """Schedules the lanes of some blocks until all have returned."""

    def __init__(self, launch: Launch, lanes: Lanes) -> None:
        self.launch, self.lanes = launch, lanes
        self.position = np.zeros(lanes.count, np.int32)  # basic block of each lane
        self.waiting = np.zeros(lanes.count, bool)  # at a barrier
        self.together: int | None = 0  # where all lanes are, if all are at one place
        self._ahead = np.zeros(lanes.count, bool)  # in random order: those that go on now
        self._steps = 0

    def run(self) -> None:
        exit = self.launch.program.exit
        while True:
            if self.together is not None and self.launch.random is None:
                if self.together == exit:
                    return
                self._check_progress(self.together, 0)
                self._step(self.together, None)
                continue
            left = self.position < exit
            if not left.any():
                return
            ready = self._choose(left & ~self.waiting)
            number = int(self.position[ready].min())
            active = np.flatnonzero(ready & (self.position == number))
            self._check_progress(number, int(active[0]))
            self._step(number, None if active.size == self.lanes.count else active)

    def _choose(self, ready: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """All, or in random order those of a few warps: these go on, to the next barrier or the end
        if it comes to that, before others are chosen."""
        random = self.launch.random
        if random is None:
            return ready
        chosen = ready & self._ahead
        while not chosen.any() or random.random() < 1 / 16:
            warp = self.lanes.warp - self.lanes.warp[0]
            self._ahead = (random.random(int(warp[-1]) + 1) < random.random())[warp]
            chosen = ready & self._ahead
        return chosen

    def _check_progress(self, number: int, lane: int) -> None:
        """Finds a loop without an end, be it that others wait at a barrier or behind it."""
        self._steps += 1
        if self._steps <= self.launch.max_steps:
            return
        what = f"no end after {self.launch.max_steps} basic blocks"
        if self.waiting.any():
            what += ", and threads wait at a barrier that others never reach"
        block = self.launch.program.blocks[number]
        instruction = block.steps[0][0] if block.steps else block.end
        assert instruction is not None
        raise self._located(instruction, lane, what)

    def _step(self, number: int, active: NDArray[np.int64] | None) -> None:
        block = self.launch.program.blocks[number]
        lanes, counters = self.lanes, self.launch.counters
        lanes.active = active
        size = lanes.count if active is None else active.size
        counters.instructions += size * (len(block.steps) + (block.end is not None))
        for instruction, step in block.steps:
            try:
                step(lanes)
            except _ERRORS as error:
                raise self._explained(instruction, error) from None
        if block.end is None:
            self._move(active, number + 1)
            self._release()  # it may have been the end
            return
        try:
            guard = self._guard(block.end)
        except _ERRORS as error:
            raise self._explained(block.end, error) from None
        if block.end.opcode[0] == "bra":
            self._branch(block, number, active, guard)
        elif block.end.opcode[0] in ("ret", "exit"):
            self._return(number, active, guard)
        else:
            self._wait(number, active)

    def _explained(self, instruction: Instruction, error: Exception) -> EmulationError:
        if isinstance(error, MemoryFault):
            lane = int(self.lanes.pick(np.arange(self.lanes.count))[error.lane])
            return self._located(instruction, lane, error.what, error.address)
        place = f"{self.launch.short_name}, {instruction.source}"
        return EmulationError(f"{error} ({place}, {instruction.text!r})")

    def _located(
        self, instruction: Instruction, lane: int, what: str, address: int | None = None
    ) -> EmulationError:
        place = f"{self.launch.short_name}, {instruction.source}"
        place += f", block {self.lanes.block[lane]}, thread {self.lanes.thread_in_block[lane]}"
        if address is not None:
            shared = "shared" in instruction.opcode
            place += f", address {address % self.lanes.shared.stride if shared else address:#x}"
        return EmulationError(f"{what}: {place}, {instruction.text!r}")

    def _move(self, active: NDArray | None, to: int) -> None:
        if active is None:
            self.together = to
            self.position[:] = to
            return
        self.together = None
        self.position[active] = to
        if (self.position == to).all() and not self.waiting.any():
            self.together = to

    def _guard(self, end: Instruction) -> Value:
        if end.guard is None:
            return np.bool_(True)
        return self.lanes.get(end.guard) != end.guard_negated

    def _branch(self, block: Block, number: int, active: NDArray | None, taken: Value) -> None:
        assert block.end is not None
        if block.end.guard is not None:
            self._count_divergence(taken)
        if taken.ndim > 0 and (taken.all() or not taken.any()):
            taken = taken[0]
        if taken.ndim == 0:
            self._move(active, block.target if taken else number + 1)
            return
        everyone = np.arange(self.lanes.count) if active is None else active
        self.together = None
        self.position[everyone] = np.where(taken, block.target, number + 1)

    def _count_divergence(self, taken: Value) -> None:
        warp = self.lanes.pick(self.lanes.warp) - self.lanes.warp[0]
        lanes, yes = np.bincount(warp), np.bincount(warp, np.broadcast_to(taken, warp.shape))
        counters = self.launch.counters
        counters.branches += int((lanes > 0).sum())
        counters.divergent_branches += int(((yes > 0) & (yes < lanes)).sum())

    def _return(self, number: int, active: NDArray | None, returns: Value) -> None:
        exit = self.launch.program.exit
        if returns.ndim == 0 or returns.all():
            self._move(active, exit if returns.ndim > 0 or returns else number + 1)
        else:
            everyone = np.arange(self.lanes.count) if active is None else active
            self.together = None
            self.position[everyone] = np.where(returns, exit, number + 1)
        self._release()

    def _wait(self, number: int, active: NDArray | None) -> None:
        """``bar.sync``: a block goes on when all its threads that have not returned are there."""
        self.waiting[slice(None) if active is None else active] = True
        self._move(active, number + 1)
        self._release()

    def _release(self) -> None:
        if not self.waiting.any():
            return
        lanes = self.lanes
        missing = (self.position < self.launch.program.exit) & ~self.waiting
        blocks = lanes.epochs.size
        complete = np.bincount(lanes.local_block[missing], minlength=blocks) == 0
        complete &= np.bincount(lanes.local_block[self.waiting], minlength=blocks) > 0
        if not complete.any():
            return
        self._check_same_barrier(complete)
        lanes.epochs[complete] += 1
        self.launch.counters.barriers += int(complete.sum())
        self.waiting &= ~complete[lanes.local_block]
        if (self.position == self.position[0]).all() and not self.waiting.any():
            self.together = int(self.position[0])

    def _check_same_barrier(self, complete: NDArray[np.bool_]) -> None:
        """The hardware only counts arrivals, but a barrier is for the threads that reach it."""
        waiting = np.flatnonzero(self.waiting & complete[self.lanes.local_block])
        block = self.lanes.local_block[waiting]
        first = np.searchsorted(block, block)  # the first of them in the same block
        apart = self.position[waiting] != self.position[waiting[first]]
        if apart.any():
            lane = int(waiting[apart.argmax()])
            barrier = self.launch.program.blocks[self.position[lane] - 1].end
            assert barrier is not None
            what = f"threads {self._thread(waiting[first[apart.argmax()]])} and "
            what += f"{self._thread(lane)} wait at different barriers"
            raise self._located(barrier, lane, what)

    def _thread(self, lane: int) -> int:
        return int(self.lanes.thread_in_block[lane])
