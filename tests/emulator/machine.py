"""Runs a kernel: all threads of many blocks in step, a register being one array.

The threads that stand at the lowest instruction go on first, so that branches meet again. With a
``seed``, a random half of the warps goes on at each step instead: results must not depend on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .instructions import CONTROL, Step, compile_instruction
from .memory import Accessors, AddressSpace, MemoryFault, SharedMemory
from .ptx import Instruction, Kernel
from .values import Value

Dim3 = tuple[int, int, int]

WARP = 32
SECTOR = 32  # bytes
_MAX_LANES = 1 << 16  # threads that run together


class EmulationError(RuntimeError):
    """A kernel did what it must not; says where."""


@dataclass
class Counters:
    """What one launch did.

    ``instructions`` are PTX instructions summed over threads. ``accesses`` counts the threads that
    accessed global memory, by (region, "load" or "store", bytes a thread). ``requested`` counts the
    32-byte sectors that warp-wide accesses touch, one access at a time; ``sectors`` counts a sector
    once a warp and launch, as an L1 cache line serves neighbouring accesses.
    """

    kernel: str = ""
    threads: int = 0
    instructions: int = 0
    branches: int = 0  # of warps
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
            if last.opcode[0] == "bra":
                target = number[self.kernel.labels[last.operands[-1]]]
        return Block([(i, compile_instruction(i, self.kernel)) for i in code], last, target)


class Lanes:
    """The threads of some blocks, and which of them are active now."""

    def __init__(self, launch: Launch, first_block: int, blocks: int) -> None:
        self.launch = launch
        threads = launch.threads_per_block
        self.count = blocks * threads
        lane = np.arange(self.count)
        self.local_block = lane // threads
        self.block = self.local_block + first_block
        self.thread_in_block = lane % threads
        self.thread = self.block * threads + self.thread_in_block
        warps = -(-threads // WARP)
        self.warp = self.block * warps + self.thread_in_block // WARP
        self.epochs = np.zeros(blocks, np.int32)
        self.registers: dict[str, Value] = {}
        self.active: NDArray[np.int64] | None = None  # None: all
        self.shared = SharedMemory(
            launch.kernel.shared, max(launch.kernel.shared_size, 1), blocks, threads
        )
        self._specials: dict[str, Value] = {}

    # Registers

    def pick(self, per_lane: NDArray) -> NDArray:
        return per_lane if self.active is None else per_lane[self.active]

    def get(self, name: str) -> Value:
        value = self.registers.get(name)
        if value is None:
            raise EmulationError(f"register {name} is read before it is written")
        return value if value.ndim == 0 or self.active is None else value[self.active]

    def set(self, name: str, value: Value) -> None:
        if self.active is None:
            self.registers[name] = value
            return
        old = self.registers.get(name)
        new = np.zeros(self.count, value.dtype)
        if old is not None:
            new[:] = old
        new[self.active] = value
        self.registers[name] = new

    def special(self, name: str) -> Value:
        value = self._specials.get(name)
        if value is None:
            value = self._specials[name] = self._make_special(name)
        return value if value.ndim == 0 else self.pick(value)

    def _make_special(self, name: str) -> Value:
        if name == "%laneid":
            return (self.thread_in_block % WARP).astype(np.uint32)
        register, _, axis = name.partition(".")
        sizes = {"%tid": self.launch.block, "%ctaid": self.launch.grid}
        sizes |= {"%ntid": self.launch.block, "%nctaid": self.launch.grid}
        if register not in sizes or axis not in ("x", "y", "z"):
            raise EmulationError(f"the special register {name} is not emulated")
        k = "xyz".index(axis)
        size = sizes[register]
        if register.startswith("%n"):
            return np.uint32(size[k])
        linear = self.thread_in_block if register == "%tid" else self.block
        below = int(np.prod(size[:k]))
        return (linear // below % size[k]).astype(np.uint32)

    @contextmanager
    def where(self, predicate: Value) -> Iterator[bool]:
        """Only the active lanes where ``predicate`` holds."""
        before = self.active
        if predicate.ndim == 0:
            yield bool(predicate)
            return
        if not predicate.all():
            everyone = np.arange(self.count) if before is None else before
            self.active = everyone[predicate]
        try:
            yield self.active is None or self.active.size > 0
        finally:
            self.active = before

    # Memory

    def accessors(self) -> Accessors:
        return Accessors(
            self.pick(self.thread), self.pick(self.block), self.epochs[self.pick(self.local_block)]
        )

    def _addresses(self, address: Value) -> NDArray[np.int64]:
        size = self.count if self.active is None else self.active.size
        return np.broadcast_to(np.asarray(address, np.int64), (size,))

    def _place(self, space: str, address: Value, width: int) -> tuple[AddressSpace, NDArray]:
        addresses = self._addresses(address)
        if space == "global":
            return self.launch.memory, addresses.view(np.uint64)
        self.shared.check_variables(addresses, width)
        return self.shared, (addresses + self.pick(self.local_block) * self.shared.stride).view(
            np.uint64
        )

    def load(self, space: str, address: Value, dtype: np.dtype, count: int) -> Value:
        """[lanes, count], or [count] where all lanes load the same parameter."""
        if space == "param":
            return self._load_parameter(address, dtype, count)
        width = dtype.itemsize * count
        memory, addresses = self._place(space, address, width)
        loaded = memory.load(addresses, dtype, count, self.accessors())
        if space == "global":
            self.launch.observe(self, "load", addresses, width)
        return loaded

    def _load_parameter(self, address: Value, dtype: np.dtype, count: int) -> Value:
        if np.ndim(address) > 0:
            if (address != address[0]).any():
                raise EmulationError("lanes load different parameters")
            address = address[0]
        start, width = int(address), dtype.itemsize * count
        if start < 0 or start + width > len(self.launch.parameters) or start % width:
            raise EmulationError(f"a load of {width} bytes at {start} from the parameters")
        return np.frombuffer(self.launch.parameters, dtype, count, start)

    def store(self, space: str, address: Value, sources: list[Value]) -> None:
        size = self.count if self.active is None else self.active.size
        columns = [np.broadcast_to(source, (size,)) for source in sources]
        values = np.stack(columns, axis=1)
        width = values.itemsize * len(sources)
        memory, addresses = self._place(space, address, width)
        memory.store(addresses, values, self.accessors())
        if space == "global":
            self.launch.observe(self, "store", addresses, width)

    def atomic(self, space: str, operation: str, address: Value, value: Value) -> Value:
        """The values before. Lanes go one after the other; no race is looked for."""
        dtype = value.dtype
        memory, addresses = self._place(space, address, dtype.itemsize)
        operands = np.broadcast_to(value, addresses.shape)
        before = np.empty(addresses.shape, dtype)
        combine = {
            "exch": lambda old, new: new,
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
        }
        combine |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        for region, lanes in memory.split(addresses, dtype.itemsize):
            mine = np.arange(addresses.size) if lanes is None else lanes
            region.check_range(addresses[mine], dtype.itemsize)
            elements = region.data.view(dtype)
            indices = ((addresses[mine] - region.base) // dtype.itemsize).astype(np.int64)
            units, _ = region.units(indices * dtype.itemsize, dtype.itemsize)
            if not region.initialised[units].all():
                raise MemoryFault(
                    f"atomic on uninitialised {region.name}", int(mine[0]), int(addresses[mine[0]])
                )
            for lane, index in zip(mine, indices, strict=True):
                before[lane] = elements[index]
                elements[index] = combine[operation](elements[index], operands[lane])
        return before

    # Warps

    def _members(self, source: NDArray, members: Value) -> None:
        """Every lane that the mask names has to be here."""
        active = np.zeros(self.count, bool)
        active[self.pick(np.arange(self.count))] = True
        mask = np.broadcast_to(members, source.shape)
        lane_in_warp = self.thread_in_block % WARP
        bits = np.zeros(int(self.warp[-1] - self.warp[0]) + 1, np.uint64)
        here = np.flatnonzero(active)
        np.bitwise_or.at(
            bits,
            self.warp[here] - self.warp[0],
            np.uint64(1) << lane_in_warp[here].astype(np.uint64),
        )
        present = bits[self.pick(self.warp) - self.warp[0]]
        missing = (mask.astype(np.uint64) & ~present) != 0
        if missing.any():
            lane = int(missing.argmax())
            raise MemoryFault("a warp operation names lanes that are not there", lane, 0)

    def shuffle(
        self, mode: str, value: Value, by: Value, clamp: Value, members: Value
    ) -> tuple[Value, Value]:
        """``shfl.sync``: the other lane's value, and whether that lane was in range."""
        active = self.pick(np.arange(self.count))
        lane = self.thread_in_block[active] % WARP
        self._members(active, members)
        by, clamp = (np.broadcast_to(v, active.shape).astype(np.int64) for v in (by, clamp))
        by = by & 31
        segment = (clamp >> 8) & 31
        highest, lowest = (lane & segment) | (clamp & 31 & ~segment), lane & segment
        origin = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": lowest | (by & ~segment),
        }[mode]
        inside = origin >= highest if mode == "up" else origin <= highest
        origin = np.where(inside, origin, lane)
        everyone = np.zeros(self.count, value.dtype)
        everyone[active] = value
        return everyone[active - lane + origin], inside

    def vote(self, mode: str, vote: Value, members: Value) -> Value:
        """``vote.sync``"""
        active = self.pick(np.arange(self.count))
        self._members(active, members)
        votes = np.broadcast_to(vote, active.shape)
        warp = self.warp[active] - self.warp[0]
        lane = (self.thread_in_block[active] % WARP).astype(np.uint32)
        ballot = np.zeros(int(warp.max()) + 1, np.uint32)
        np.bitwise_or.at(ballot, warp, votes.astype(np.uint32) << lane)
        if mode == "ballot":
            return ballot[warp]
        yes = np.bincount(warp, votes)[warp]
        total = np.bincount(warp)[warp]
        return {"any": yes > 0, "all": yes == total, "uni": (yes == 0) | (yes == total)}[mode]


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
    ) -> None:
        self.program, self.kernel = program, program.kernel
        self.grid, self.block, self.parameters, self.memory = grid, block, parameters, memory
        self.threads_per_block = int(np.prod(block))
        self.counters = Counters(self.kernel.name, int(np.prod(grid)) * self.threads_per_block)
        self._random = None if seed is None else np.random.default_rng(seed)
        self._count_sectors = count_sectors
        self._touched: dict[tuple[str, str], list[NDArray]] = {}

    def run(self) -> Counters:
        """Runs all blocks.

        Raises:
            EmulationError: with kernel, source line, block, thread and address.
        """
        blocks = int(np.prod(self.grid))
        together = max(1, _MAX_LANES // self.threads_per_block)
        self.memory.watch(self.threads_per_block)
        with np.errstate(all="ignore"):
            for first in range(0, blocks, together):
                _Run(self, Lanes(self, first, min(together, blocks - first))).run()
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

    def run(self) -> None:
        exit = self.launch.program.exit
        while True:
            if self.together is not None and self.launch._random is None:
                if self.together == exit:
                    return
                self._step(self.together, None)
                continue
            left = self.position < exit
            if not left.any():
                return
            ready = left & ~self.waiting
            if not ready.any():
                raise EmulationError(
                    f"{self.launch.short_name}: threads wait at a barrier that others never reach"
                )
            ready = self._choose(ready)
            number = int(self.position[ready].min())
            active = np.flatnonzero(ready & (self.position == number))
            self._step(number, None if active.size == self.lanes.count else active)

    def _choose(self, ready: NDArray[np.bool_]) -> NDArray[np.bool_]:
        random = self.launch._random
        if random is None:
            return ready
        warp = self.lanes.warp - self.lanes.warp[0]
        chosen = ready & (random.random(int(warp[-1]) + 1) < 0.5)[warp]
        return chosen if chosen.any() else ready

    def _step(self, number: int, active: NDArray[np.int64] | None) -> None:
        block = self.launch.program.blocks[number]
        lanes, counters = self.lanes, self.launch.counters
        lanes.active = active
        size = lanes.count if active is None else active.size
        counters.instructions += size * (len(block.steps) + (block.end is not None))
        for instruction, step in block.steps:
            try:
                step(lanes)
            except MemoryFault as fault:
                raise self._located(instruction, fault) from None
            except (EmulationError, ZeroDivisionError) as error:
                place = f"{self.launch.short_name}, {instruction.source}"
                raise EmulationError(f"{error} ({place}, {instruction.text!r})") from None
        if block.end is None:
            self._move(active, number + 1)
        elif block.end.opcode[0] == "bra":
            self._branch(block, number, active)
        elif block.end.opcode[0] in ("ret", "exit"):
            self._return(block, number, active)
        else:
            self._wait(number, active)

    def _located(self, instruction: Instruction, fault: MemoryFault) -> EmulationError:
        lane = self.lanes.pick(np.arange(self.lanes.count))[fault.lane]
        return EmulationError(
            f"{fault.what}: {self.launch.short_name}, {instruction.source}, "
            f"block {self.lanes.block[lane]}, thread {self.lanes.thread_in_block[lane]}, "
            f"address {fault.address:#x}, {instruction.text!r}"
        )

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

    def _branch(self, block: Block, number: int, active: NDArray | None) -> None:
        assert block.end is not None
        taken = self._guard(block.end)
        if taken.ndim > 0:
            self._count_divergence(taken)
            if taken.all() or not taken.any():
                taken = taken[0]
        if taken.ndim == 0:
            self._move(active, block.target if taken else number + 1)
            return
        everyone = np.arange(self.lanes.count) if active is None else active
        self.together = None
        self.position[everyone] = np.where(taken, block.target, number + 1)

    def _count_divergence(self, taken: NDArray[np.bool_]) -> None:
        warp = self.lanes.pick(self.lanes.warp) - self.lanes.warp[0]
        lanes, yes = np.bincount(warp), np.bincount(warp, taken)
        counters = self.launch.counters
        counters.branches += int((lanes > 0).sum())
        counters.divergent_branches += int(((yes > 0) & (yes < lanes)).sum())

    def _return(self, block: Block, number: int, active: NDArray | None) -> None:
        assert block.end is not None
        returns = self._guard(block.end)
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
        lanes.epochs[complete] += 1
        self.launch.counters.barriers += int(complete.sum())
        self.waiting &= ~complete[lanes.local_block]
        if (self.position == self.position[0]).all() and not self.waiting.any():
            self.together = int(self.position[0])
