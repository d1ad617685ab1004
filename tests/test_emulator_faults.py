"""Faults planted in kernels: each is found, and said where; the same kernel without it passes.

The kernels are in emulator/faults.cu, a pair for each fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from emulator import mutate, runtime
from emulator.direct import aligned, given, launch, updated, wanted
from emulator.machine import EmulationError, Program
from emulator.ptx import Module
from numpy.typing import NDArray

SOURCE = Path(__file__).parent / "emulator" / "faults.cu"
SEEDS = [None, 0, 1, 2, 3]
BLOCK = 64

pytestmark = pytest.mark.skipif(
    runtime.cuda_home() is None, reason="needs a CUDA toolkit (nvcc) to compile the kernels"
)

Result = Callable[[NDArray], NDArray]


def _in_blocks(function: Result) -> Result:
    return lambda x: function(x.reshape(-1, BLOCK)).ravel()


def _mixed(x: NDArray) -> NDArray:
    return np.concatenate([x[:, 63:31:-1] + 1, x[:, 32:] + 1], axis=1)


def _swapped_pairs(x: NDArray) -> NDArray:
    halves = x.reshape(-1, 2, 16).copy()
    halves[:, 0] = halves[:, 0].reshape(-1, 8, 2)[:, :, ::-1].reshape(-1, 16)
    return halves.ravel()


@dataclass(frozen=True)
class Fault:
    name: str  # of the kernel
    what: str  # what the error begins with
    where: tuple[int, int] | None  # block and thread in lockstep, where that is only one
    address: tuple[str, int] | None  # element of x or y, or byte of shared memory
    result: Result = lambda x: x  # of the kernel without the fault
    n: int = 256
    in_place: bool = False  # y is given as zeros


FAULTS = [
    Fault("end", "4 bytes outside x", (3, 7), ("x", 200), n=200),
    Fault("write_end", "4 bytes outside y", (3, 8), ("y", 200), result=np.ones_like, n=200),
    Fault(
        "neighbour", "4 bytes outside the shared variable .*one", (0, 63), None,
        _in_blocks(lambda x: 3 * x[:, ::-1]),
    ),
    Fault("misaligned", "access not aligned to its 16 bytes", (0, 0), ("x", 1)),
    Fault("uninitialised", "read of uninitialised y", (0, 0), ("y", 0)),
    Fault("table", "read of uninitialised shared memory", (0, 32), ("shared", 128)),
    Fault(
        "barrier", "(?:race in shared memory: read|read of uninitialised)", (0, 0), ("shared", 252),
        _in_blocks(lambda x: x[:, ::-1]),
    ),
    Fault(
        "refill", "race in shared memory: write", (0, 0), ("shared", 0), lambda x: x + 1
    ),
    Fault(
        "reduction", "race in shared memory: read", (0, 0), ("shared", 64),
        _in_blocks(lambda x: x.sum(1, keepdims=True).repeat(BLOCK, 1)),
    ),
    Fault("two_blocks", "race in y: write", None, None),
    Fault("in_place", "race in y: write", (0, 0), ("y", 0), in_place=True),
    Fault(
        "two_barriers", "threads 0 and 32 wait at different barriers", (0, 32), None,
        _in_blocks(_mixed),
    ),
    Fault("deadlock", "no end after 2000 basic blocks", (0, 32), None),
    Fault(
        "shuffle", "a warp operation names lanes that are not there", (0, 0), None,
        _swapped_pairs,
    ),
    Fault(
        "shuffle_source", "a shuffle reads from a lane that it does not name", (0, 0), None,
        lambda x: x.reshape(-1, 2, 16)[:, ::-1].ravel(),
    ),
    Fault("input", "write to x, an input", (0, 0), ("x", 0)),
]  # fmt: skip


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("faults")
    runtime.compile_kernels(SOURCE, folder)
    return Module((folder / "faults.ptx").read_text())


def line_at_fault(kernel: str) -> int:
    """The number of the line that is marked in the kernel's source."""
    lines = SOURCE.read_text().splitlines()
    start = lines.index(f"KERNEL({kernel}) {{")
    return next(k for k in range(start, len(lines)) if lines[k].endswith("// FAULT")) + 1


@dataclass
class Buffers:
    x: NDArray
    y: NDArray

    @classmethod
    def of(cls, n: int) -> Buffers:
        x = aligned(n, np.float32)
        x[:] = np.arange(n) % 100
        return cls(x, aligned(n, np.float32))

    def run(self, program: Program, fault: Fault, seed: int | None, grid: int = 4) -> None:
        y = (updated if fault.in_place else wanted)(self.y)
        launch(program, grid, BLOCK, seed=seed, max_steps=2000, x=given(self.x), y=y, n=fault.n)


def address_of(fault: Fault, buffers: Buffers) -> int:
    assert fault.address is not None
    space, place = fault.address
    if space == "shared":
        return place
    return {"x": buffers.x, "y": buffers.y}[space].ctypes.data + 4 * place


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_found(fault: Fault, seed: int | None, module: Module) -> None:
    name, buffers = f"{fault.name}_faulty", Buffers.of(fault.n)
    with pytest.raises(EmulationError) as caught:
        buffers.run(Program(module.kernel(name)), fault, seed)
    place = rf"{name}, (?:\S+ in )?faults\.cu:{line_at_fault(name)}, block (\d+), thread (\d+)"
    match = re.match(rf"{fault.what}.*: {place}(?:, address (0x[0-9a-f]+))?, '", str(caught.value))
    assert match, str(caught.value)
    if seed is None and fault.where:
        assert (int(match[1]), int(match[2])) == fault.where
    if seed is None and fault.address:
        assert int(match[3], 16) == address_of(fault, buffers)
    concerns_memory = not re.search("barriers|no end|warp|shuffle", fault.what)
    assert (match[3] is not None) == concerns_memory


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_same_without_the_fault(fault: Fault, seed: int | None, module: Module) -> None:
    buffers = Buffers.of(fault.n)
    buffers.run(Program(module.kernel(f"{fault.name}_fixed")), fault, seed)
    np.testing.assert_array_equal(buffers.y, fault.result(buffers.x))


def test_a_grid_too_small_leaves_elements_unwritten(module: Module) -> None:
    program, buffers = Program(module.kernel("end_fixed")), Buffers.of(200)
    fault = next(fault for fault in FAULTS if fault.name == "end")
    expected = (
        rf"element 192 of y was never written: end_fixed, address {buffers.y[192:].ctypes.data:#x}"
    )
    with pytest.raises(EmulationError, match=expected):
        buffers.run(program, fault, None, grid=200 // BLOCK)
    buffers.run(program, fault, None, grid=-(-200 // BLOCK))


@pytest.mark.skipif(not runtime.available(), reason="needs nvcc and a torch with CUDA headers")
@pytest.mark.long
def test_mutations_of_the_kernels_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of them; ``python -m emulator.mutate`` makes all."""
    assert mutate.main(["vectors although misaligned", "a mask bit dropped"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search("mask bit.*AssertionError.*grad_input", lines[0])
    assert re.search("misaligned.*EmulationError.*not aligned to its 16 bytes", lines[1])


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_of_a_text_that_is_there(mutation, tmp_path):
    mutate.mutated(mutation, tmp_path)
