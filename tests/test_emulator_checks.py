"""What no kernel may do, whatever it computes: the emulator's checks of registers, memory, races
and warps, on hand-written PTX that does one forbidden thing."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.direct import Argument, aligned, given, launch, updated
from emulator.machine import EmulationError
from emulator.probe import program, run, threads

# Registers


def test_a_register_that_was_never_written() -> None:
    with pytest.raises(EmulationError, match=r"register %r5 is read before.*probe, hand\.cu:42"):
        run(".loc 1 42 5\nmov.u32 %v, %r5;", threads(2))


def test_a_register_that_only_another_thread_has_written() -> None:
    body = """
    setp.ne.u32 %p0, %tid, 2;
    @%p0 mov.u32 %r2, 7;
    .loc 1 42 5
    mov.u32 %v, %r2;"""
    expected = r"register %r2 is read before this thread .*hand\.cu:42, block 0, thread 2,"
    with pytest.raises(EmulationError, match=expected):
        run(body, threads(4))


def test_a_predicate_that_only_another_thread_has_written() -> None:
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 setp.eq.u32 %p1, %tid, 0;
    .loc 1 42 5
    @%p1 bra DONE;"""
    with pytest.raises(EmulationError, match=r"register %p1 is .*hand\.cu:42.*@%p1 bra DONE"):
        run(body, threads(2))


def test_a_register_that_each_thread_writes_in_a_branch_of_its_own() -> None:
    """And one that a thread reads only where it has written it."""
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 mov.u32 %r0, 7;
    @%p0 add.u32 %r0, %r0, 1;
    @!%p0 bra OTHERS;
    mov.u32 %r1, %r0;
    bra JOIN;
    OTHERS:
    mov.u32 %r1, 9;
    JOIN:
    mov.u32 %v, %r1;"""
    assert run(body, threads(3))[0] == [8, 9, 9]


# Bounds and initialisation


def test_an_address_at_the_end_of_the_address_space() -> None:
    with pytest.raises(EmulationError, match=r"outside .*address 0xfffffffffffffffc"):
        run("mov.u64 %w3, -4;\nld.global.u32 %v, [%w3];", threads(1))


@pytest.mark.parametrize("access", ["ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%w1+16];",
                                    "st.global.v4.u32 [%w1+16], {%v, %v, %v, %v};"])  # fmt: skip
def test_an_access_that_only_begins_inside(access: str) -> None:
    """Of its 16 bytes, the last 8 lie beyond the 24 of y."""
    y = updated(aligned(6, np.uint32))
    with pytest.raises(EmulationError, match=r"16 bytes outside y.*hand\.cu:42"):
        launch(program(f".loc 1 42 5\n{access}\nbra DONE;"), 1, 1, x=given(threads(1)), y=y)


def test_an_access_that_ends_at_the_end() -> None:
    y = aligned(8, np.uint32)
    body = "st.global.v4.u32 [%w1+16], {%v, %v, %v, %v};\nbra DONE;"
    launch(program(body), 1, 1, x=given(np.full(1, 3, np.uint32)), y=updated(y))
    assert y.tolist() == [0] * 4 + [3] * 4


def test_an_input_that_is_initialised_in_part() -> None:
    x = Argument(aligned(4, np.uint32), np.array([True, True, False, True]), writable=False)
    body = "ld.global.u32 %r0, [%in+4];\n.loc 1 42 5\nld.global.u32 %r0, [%in+8];\nbra DONE;"
    with pytest.raises(EmulationError, match=r"read of uninitialised x: .*hand\.cu:42"):
        launch(program(body), 1, 1, x=x, y=given(threads(1)))


# Races


def test_an_atomic_races_with_a_plain_write() -> None:
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [cell], 5;
    .loc 1 42 5
    atom.shared.add.u32 %v, [cell], 1;"""
    with pytest.raises(EmulationError, match=r"race .* atomic on .*hand\.cu:42"):
        run(body, threads(2))


def test_a_plain_read_races_with_an_atomic() -> None:
    body = """
    red.global.add.u32 [%w1], 1;
    .loc 1 42 5
    ld.global.u32 %v, [%w1];
    bra DONE;"""
    with pytest.raises(EmulationError, match=r"race in y: read .*hand\.cu:42"):
        launch(program(body), 1, 2, x=given(threads(2)), y=updated(np.zeros(1, np.uint32)))


def test_blocks_that_read_in_one_step_are_all_remembered() -> None:
    """Both blocks read y[0]; a barrier orders the write with one of them only."""
    body = """
    ld.global.u32 %r0, [%w1];
    bar.sync 0;
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p0, %r1, 0;
    .loc 1 42 5
    @%p0 st.global.u32 [%w1], 1;
    bra DONE;"""
    arguments = {"x": given(threads(1)), "y": updated(np.zeros(1, np.uint32))}
    with pytest.raises(EmulationError, match=r"race in y: write .*hand\.cu:42, block 0"):
        launch(program(body), 2, 1, **arguments)
    launch(program(body), 1, 1, **arguments)


@pytest.mark.parametrize("thread", [0, 1, 2])
def test_threads_that_read_in_one_step_are_all_remembered(thread: int) -> None:
    """All read the cell, and one, whichever, then writes it without a barrier in between."""
    body = f"""
    setp.eq.u32 %p0, %tid, {thread};
    @%p0 st.shared.u32 [cell], 5;
    bar.sync 0;
    ld.shared.u32 %r0, [cell];
    .loc 1 42 5
    @%p0 st.shared.u32 [cell], %r0;"""
    with pytest.raises(EmulationError, match=r"race in shared memory: write .*hand\.cu:42"):
        run(body, threads(3))


def test_a_plain_write_races_with_an_atomic() -> None:
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [cell], 5;
    bar.sync 0;
    @%p0 red.shared.add.u32 [cell], 1;
    .loc 1 42 5
    @!%p0 st.shared.u32 [cell], %v;"""
    with pytest.raises(EmulationError, match=r"race in .*: write .*hand\.cu:42, block 0, thread 1"):
        run(body, threads(2))


@pytest.mark.parametrize("writer", [0, 1])
def test_threads_that_read_one_after_the_other_are_both_remembered(writer: int) -> None:
    body = f"""
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [cell], 5;
    bar.sync 0;
    @%p0 ld.shared.u32 %r0, [cell];
    @!%p0 ld.shared.u32 %r0, [cell];
    setp.eq.u32 %p1, %tid, {writer};
    .loc 1 42 5
    @%p1 st.shared.u32 [cell], 6;"""
    with pytest.raises(EmulationError, match=r"race in shared memory: write .*hand\.cu:42"):
        run(body, threads(2))


def test_a_barrier_orders_its_own_block_only() -> None:
    """Block 1 passes one while thread 1 of block 0 is about to read what thread 0 wrote."""
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p0, %r1, 0;
    setp.eq.u32 %p1, %tid, 0;
    @%p1 st.shared.u32 [cell], 5;
    @%p0 bra READ;
    bar.sync 0;
    READ:
    .loc 1 42 5
    ld.shared.u32 %r0, [cell];
    bra DONE;"""
    arguments = {"x": given(threads(2)), "y": given(threads(1))}
    expected = r"race in shared memory: read .*hand\.cu:42, block 0, thread 1"
    with pytest.raises(EmulationError, match=expected):
        launch(program(body), 2, 2, **arguments)
    launch(program(body.replace("@%p0 bra READ;", "")), 2, 2, **arguments)


# Memory that is read as constant

_CONSTANT = "ld.global.nc.u32 %r0, [%w1];"
_CHANGES = {
    "store": "st.global.u32 [%w1], %v;",
    "atomic": "red.global.add.u32 [%w1], 1;",
}


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("before", [True, False])
def test_what_a_launch_changes_is_not_constant(before: bool, change: str) -> None:
    """Not even where one thread does both, in whatever order: ld.global.nc may be served from a
    cache that never sees the change, and the compiler may move it."""
    first, second = (_CHANGES[change], _CONSTANT)[:: 1 if before else -1]
    body = f"{first}\n.loc 1 42 5\n{second}\nbra DONE;"
    arguments = {"x": given(threads(1)), "y": updated(np.zeros(1, np.uint32))}
    with pytest.raises(EmulationError, match=r"race in y: .* as constant.*hand\.cu:42"):
        launch(program(body), 1, 1, **arguments)
    launch(program(body.replace("global.nc", "global")), 1, 1, **arguments)


def test_what_an_earlier_launch_changed_is_constant() -> None:
    y = np.zeros(1, np.uint32)
    for body in (_CHANGES["store"], _CONSTANT):
        launch(program(f"{body}\nbra DONE;"), 1, 1, x=given(threads(1)), y=updated(y))


# Warps


def test_a_warp_operation_that_does_not_name_its_own_lane() -> None:
    """Every lane that it names is there."""
    body = "setp.eq.u32 %p0, %tid, 0;\n.loc 1 42 5\nvote.sync.ballot.b32 %v, %p0, 0x0000FFFF;"
    expected = r"does not name its own lane: .*hand\.cu:42, block 0, thread 16,"
    with pytest.raises(EmulationError, match=expected):
        run(body, threads(32))
    assert run(body, threads(16))[0] == [1] * 16
