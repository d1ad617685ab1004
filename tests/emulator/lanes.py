"""Threads that run in step: their registers, their memory accesses, and what warps do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .memory import Accessors, AddressSpace, MemoryFault, SharedMemory
from .values import Value

if TYPE_CHECKING:
    from .machine import Launch

WARP = 32


class EmulationError(RuntimeError):
    """A kernel did what it must not; says where."""


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
        #: Of registers that only some threads have written: the threads that have not.
        self._unwritten: dict[str, NDArray[np.bool_]] = {}
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
        if name in self._unwritten:
            unwritten = self.pick(self._unwritten[name])
            if unwritten.any():
                what = f"register {name} is read before this thread has written it"
                raise MemoryFault(what, int(unwritten.argmax()))
        return value if value.ndim == 0 or self.active is None else value[self.active]

    def set(self, name: str, value: Value) -> None:
        if self.active is None:
            self.registers[name] = value
            self._unwritten.pop(name, None)
            return
        old = self.registers.get(name)
        new = np.zeros(self.count, value.dtype)
        if old is not None:
            new[:] = old
        else:
            self._unwritten[name] = np.ones(self.count, bool)
        if name in self._unwritten:
            self._unwritten[name][self.active] = False
            if not self._unwritten[name].any():
                del self._unwritten[name]
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
        k = "xyz".index(axis)
        size = self.launch.grid if register.endswith("ctaid") else self.launch.block
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
        narrower = not predicate.all()
        if narrower:
            everyone = np.arange(self.count) if before is None else before
            self.active = everyone[predicate]
        try:
            yield self.active is None or self.active.size > 0
        except MemoryFault as fault:
            if narrower:
                fault.lane = int(np.flatnonzero(predicate)[fault.lane])
            raise
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

    def load(
        self, space: str, address: Value, dtype: np.dtype, count: int, constant: bool = False
    ) -> Value:
        """[lanes, count], or [count] where all lanes load the same parameter. ``constant``: no
        thread writes there while the kernel runs."""
        if space == "param":
            return self._load_parameter(address, dtype, count)
        width = dtype.itemsize * count
        memory, addresses = self._place(space, address, width)
        loaded = memory.load(addresses, dtype, count, self.accessors(), constant)
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
        """The values before."""
        combine = {
            "exch": lambda old, new: new,
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[operation]
        memory, addresses = self._place(space, address, value.dtype.itemsize)
        operands = np.broadcast_to(value, addresses.shape)
        before = memory.atomic(addresses, operands, combine, self.accessors())
        if space == "global":
            self.launch.observe(self, "atomic", addresses, value.dtype.itemsize)
        return before

    # Warps

    def _members(self, active: NDArray[np.int64], members: Value) -> NDArray[np.uint32]:
        """The mask of each lane. Every lane that it names has to be here, and so has its own."""
        lane = (self.thread_in_block[active] % WARP).astype(np.uint32)
        mask = np.broadcast_to(members, active.shape)
        bit = np.uint32(1) << lane
        missing = (mask & ~self._ballot(active, bit)) != 0
        if missing.any():
            raise MemoryFault("a warp operation names lanes that are not there", missing.argmax())
        unnamed = (mask & bit) == 0
        if unnamed.any():
            raise MemoryFault("a warp operation does not name its own lane", unnamed.argmax())
        return mask

    def _ballot(self, active: NDArray[np.int64], bit: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """The bits of all active lanes of the warp together, for each of them."""
        warp = self.warp[active] - self.warp[0]
        ballot = np.zeros(int(warp.max()) + 1, np.uint32)
        np.bitwise_or.at(ballot, warp, bit)
        return ballot[warp]

    def shuffle(
        self, mode: str, value: Value, by: Value, clamp: Value, members: Value
    ) -> tuple[Value, Value]:
        """``shfl.sync``: the other lane's value, and whether that lane was in range."""
        active = self.pick(np.arange(self.count))
        lane = self.thread_in_block[active] % WARP
        mask = self._members(active, members)
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
        absent = (mask >> origin.astype(np.uint32)) & 1 == 0
        if absent.any():
            raise MemoryFault("a shuffle reads from a lane that it does not name", absent.argmax())
        everyone = np.zeros(self.count, value.dtype)
        everyone[active] = value
        return everyone[active - lane + origin], inside

    def vote(self, mode: str, vote: Value, members: Value) -> Value:
        """``vote.sync``"""
        active = self.pick(np.arange(self.count))
        mask = self._members(active, members)
        votes = np.broadcast_to(vote, active.shape).astype(np.uint32)
        lane = (self.thread_in_block[active] % WARP).astype(np.uint32)
        ballot = self._ballot(active, votes << lane) & mask
        if mode == "ballot":
            return ballot
        some, every = ballot != 0, ballot == mask
        return {"any": some, "all": every, "uni": every | ~some}[mode]
