"""How the emulator runs threads: guards, branches, barriers, warps, memory; what it counts; and
that it refuses what it does not know. All on hand-written PTX."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator.direct import aligned, given, launch, updated, wanted
from emulator.machine import Counters, EmulationError, Program
from emulator.probe import FRAME, HEAD, TAIL, program, run, threads
from emulator.ptx import Module, PtxError

SEEDS = [None, 0, 1, 2]

# Control


def test_guards_leave_other_threads_alone() -> None:
    body = """
    setp.lt.u32 %p0, %tid, 3;
    mov.u32 %r0, 5;
    @%p0 mov.u32 %r0, 10;
    @!%p0 add.u32 %r0, %r0, %tid;
    mov.u32 %v, %r0;"""
    assert run(body, threads(6))[0] == [10, 10, 10, 8, 9, 10]


def test_a_masked_write_does_not_reach_a_copy_of_the_register() -> None:
    body = """
    mov.u32 %r0, %v;
    mov.u32 %r1, %r0;
    setp.eq.u32 %p0, %tid, 1;
    @%p0 add.u32 %r0, %r0, 100;
    mad.lo.u32 %v, %r0, 1000, %r1;"""
    assert run(body, np.array([1, 2, 3], np.uint32))[0] == [1001, 102002, 3003]


def test_a_masked_write_to_a_value_that_all_threads_share() -> None:
    body = """
    mov.u32 %r0, 7;
    setp.eq.u32 %p0, %tid, 0;
    @%p0 mov.u32 %r0, 8;
    mov.u32 %v, %r0;"""
    assert run(body, threads(3))[0] == [8, 7, 7]


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_meet_again(seed: int | None) -> None:
    body = """
    and.b32 %r0, %tid, 1;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 bra EVEN;
    add.u32 %v, %v, 1000;
    bra.uni JOIN;
    EVEN:
    setp.gt.u32 %p1, %tid, 4;
    @!%p1 bra JOIN;
    add.u32 %v, %v, 500;
    JOIN:
    add.u32 %v, %v, 1;"""
    expected = [t + 1 + (1000 if t % 2 else 500 if t > 4 else 0) for t in range(70)]
    assert run(body, threads(70), seed)[0] == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_loops_of_different_lengths(seed: int | None) -> None:
    """Thread t adds 0 + 1 + ... + t."""
    body = """
    mov.u32 %r0, 0;
    mov.u32 %r1, 0;
    LOOP:
    add.u32 %r1, %r1, %r0;
    add.u32 %r0, %r0, 1;
    setp.le.u32 %p0, %r0, %tid;
    @%p0 bra LOOP;
    mov.u32 %v, %r1;"""
    assert run(body, threads(70), seed)[0] == [t * (t + 1) // 2 for t in range(70)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_waits_for_all_but_those_that_returned(seed: int | None) -> None:
    """Each of the first 64 threads reads what the one opposite wrote; the others left before."""
    body = """
    setp.ge.u32 %p0, %tid, 64;
    @%p0 st.global.u32 [%out], %v;
    @%p0 ret;
    shl.b32 %r0, %tid, 2;
    mov.u32 %r1, room;
    add.u32 %r2, %r1, %r0;
    st.shared.u32 [%r2], %v;
    bar.sync 0;
    sub.u32 %r3, 63, %tid;
    shl.b32 %r3, %r3, 2;
    add.u32 %r3, %r3, %r1;
    ld.shared.u32 %v, [%r3];"""
    result, counters = run(body, threads(100), seed)
    assert result == [*range(63, -1, -1), *range(64, 100)]
    assert counters.barriers == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_orders_reads_before_later_writes(seed: int | None) -> None:
    """All read the cell, and again behind the barrier, where the last then overwrites it."""
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [cell], 40;
    bar.sync 0;
    ld.shared.u32 %r0, [cell];
    bar.sync 0;
    setp.eq.u32 %p1, %tid, 99;
    @%p1 ld.shared.u32 %r1, [cell];
    @%p1 add.u32 %r1, %r1, 2;
    @%p1 st.shared.u32 [cell], %r1;
    barrier.sync.aligned 0;
    ld.shared.u32 %r2, [cell];
    mad.lo.u32 %v, %r0, 100, %r2;"""
    assert run(body, threads(100), seed)[0] == [4042] * 100


# Memory


def test_vector_loads_and_stores_keep_the_order_of_elements() -> None:
    body = """
    setp.ne.u32 %p0, %tid, 0;
    @%p0 bra DONE;
    ld.global.nc.v4.u32 {%r0, %r1, %r2, %r3}, [%in];
    ld.global.v2.b16 {%h0, %h1}, [%in+16];
    st.shared.v4.u32 [room+16], {%r3, %r2, %r1, %r0};
    ld.volatile.shared.v2.u32 {%r4, %r5}, [room+24];
    mov.b32 %r6, {%h1, %h0};
    st.global.v4.u32 [%out], {%r4, %r5, %r6, %r3};
    bra DONE;"""
    x = aligned(8, np.uint32)
    x[:] = [11, 22, 33, 44, 0x00020001, 0, 0, 0]
    y = aligned(4, np.uint32)
    launch(program(body), 1, 8, x=given(x), y=wanted(y))
    assert y.tolist() == [22, 11, 0x00010002, 44]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add.u32", 5 + sum(range(1, 65))),
        ("max.s32", 64),
        ("min.s32", 1),
        ("and.b32", 5 & 0),
        ("or.b32", 5 | 127),
        ("xor.b32", 5 ^ 64),  # 1 ^ 2 ^ ... ^ 64
    ],
)
@pytest.mark.parametrize("space", ["shared", "global"])
def test_atomics_lose_no_update(space: str, operation: str, expected: int) -> None:
    """64 threads, with 1 to 64, on a cell that starts as 5."""
    cell = {"shared": "cell", "global": "%w1"}[space]
    start = "setp.eq.u32 %p0, %tid, 0;\n@%p0 st.shared.u32 [cell], 5;\nbar.sync 0;\n"
    x, y = np.arange(1, 65, dtype=np.uint32), np.full(1, 5, np.uint32)
    finish = "bar.sync 0;\n@%p0 ld.shared.u32 %r2, [cell];\n@%p0 st.global.u32 [%w1], %r2;\n"
    for instruction in (f"red.{space}.{operation} [{cell}], %v;",
                        f"atom.{space}.{operation} %r1, [{cell}], %v;"):  # fmt: skip
        y[:] = 5
        body = start + instruction + (finish if space == "shared" else "") + "bra DONE;"
        launch(program(body), 1, 64, x=given(x), y=updated(y))
        assert y.tolist() == [expected]


def test_atomics_return_the_value_before() -> None:
    """Every thread takes a ticket of its own, and one alone swaps."""
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [cell], 5;
    @%p0 atom.shared.exch.b32 %r3, [cell], 100;
    bar.sync 0;
    atom.shared.add.u32 %v, [cell], 1;
    @%p0 add.u32 %v, %v, 1000;
    @%p0 mad.lo.u32 %v, %r3, 10000, %v;"""
    result = run(body, threads(40))[0]
    assert sorted(value % 1000 for value in result) == list(range(100, 140))
    assert result[0] // 10000 == 5


def test_atomic_float_addition() -> None:
    x, y = np.full(32, 0.5, np.float32), np.ones(1, np.float32)
    body = "red.global.add.f32 [%w1], %v;\nbra DONE;"
    launch(program(body), 1, 32, x=given(x), y=updated(y))
    assert y.tolist() == [17.0]


# Warps


def shuffled(instruction: str, count: int = 64) -> tuple[list[int], list[int]]:
    body = f"{instruction}\nselp.u32 %r2, 1, 0, %p1;\nmad.lo.u32 %v, %r2, 1000, %r1;"
    values = run(body, threads(count))[0]
    return [v % 1000 for v in values], [v // 1000 for v in values]


@pytest.mark.parametrize("distance", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, width: int, distance: int) -> None:
    """As __shfl_*_sync has it: within segments; who would read beyond keeps its own value."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    instruction = f"shfl.sync.{mode}.b32 %r1|%p1, %v, {distance}, {clamp}, -1;"
    result, inside = shuffled(instruction)
    for lane in range(64):
        first = lane // width * width
        origin = {"up": lane - distance, "down": lane + distance, "bfly": lane ^ distance}
        wanted_lane = origin.get(mode, first + distance % width)
        within = first <= wanted_lane < first + width
        if mode == "bfly" and wanted_lane < first:
            within = True  # only the upper end is guarded
        assert result[lane] == (wanted_lane if within else lane)
        assert inside[lane] == within


@pytest.mark.parametrize(
    ("mode", "condition", "expected"),
    [
        ("all", "lt.u32 %p0, %tid, 40", [1, 0]),
        ("all", "lt.u32 %p0, %tid, 64", [1, 1]),
        ("any", "gt.u32 %p0, %tid, 40", [0, 1]),
        ("uni", "gt.u32 %p0, %tid, 40", [1, 0]),
        ("uni", "gt.u32 %p0, %tid, 31", [1, 1]),
    ],
)
def test_votes(mode: str, condition: str, expected: list[int]) -> None:
    """``all`` of thread < 40 and so on: what each of the two warps gets."""
    body = f"setp.{condition};\nvote.sync.{mode}.pred %p1, %p0, -1;\nselp.u32 %v, 1, 0, %p1;"
    result = run(body, threads(64))[0]
    assert [result[:32], result[32:]] == [[expected[0]] * 32, [expected[1]] * 32]


def test_ballot_of_the_lanes_that_each_names() -> None:
    """The lower half of the warp asks the lower half, the upper half the upper, in one step."""
    body = """
    and.b32 %r0, %tid, 3;
    setp.eq.u32 %p0, %r0, 0;
    setp.lt.u32 %p2, %tid, 16;
    selp.b32 %r1, 0x0000FFFF, 0xFFFF0000, %p2;
    vote.sync.ballot.b32 %v, %p0, %r1;"""
    assert run(body, threads(32))[0] == [0x1111] * 16 + [0x11110000] * 16


def test_warp_operations_of_a_part_of_the_warp() -> None:
    body = """
    setp.ge.u32 %p0, %tid, 16;
    @%p0 bra STORE;
    shfl.sync.down.b32 %v, %v, 1, 4127, 0xFFFF;
    STORE:"""  # 4127: segments of 16
    assert run(body, threads(32))[0] == [*range(1, 16), *range(15, 32)]


# Refusals


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("popc.b32 %r0, %v;", "popc.b32"),
        ("add.sat.s32 %r0, %v, 1;", "add.sat.s32"),
        ("add.rz.f32 %r0, %v, %v;", "add.rz.f32"),
        ("add.f16 %h0, %h1, %h2;", "add.f16"),
        ("mul.lo.f32 %r0, %v, %v;", "mul.lo.f32"),
        ("mul.hi.u64 %w4, %w0, %w0;", "mul.hi.u64"),
        ("mad.hi.u32 %r0, %v, %v, %v;", "mad.hi.u32"),
        ("fma.rz.f32 %r0, %v, %v, %v;", "fma.rz.f32"),
        ("fma.rn.ftz.f32 %r0, %v, %v, %v;", "fma.rn.ftz.f32"),
        ("fma.rn.f64 %w4, %w0, %w0, %w0;", "fma.rn.f64"),
        ("div.full.f32 %r0, %v, %v;", "div.full.f32"),
        ("rcp.approx.ftz.f32 %r0, %v;", "rcp.approx.ftz.f32"),
        ("ex2.approx.f16 %h0, %h1;", "ex2.approx.f16"),
        ("min.f32 %r0, %v, %v;", "min.f32"),
        ("setp.lt.and.s32 %p0, %v, 1, %p1;", "setp.lt.and.s32"),
        ("setp.equ.s32 %p0, %v, 1;", "setp.equ.s32"),
        ("setp.lt.b32 %p0, %v, 1;", "setp.lt.b32"),
        ("setp.lt.bf16 %p0, %h0, %h1;", "setp.lt.bf16"),
        ("bfi.b64 %w4, %w0, %w0, 1, 2;", "bfi.b64"),
        ("cvt.rz.f32.f64 %r0, %w0;", "cvt.rz.f32.f64"),
        ("cvt.f16.f32 %h0, %v;", "cvt.f16.f32"),
        ("cvt.sat.s32.s64 %r0, %w0;", "cvt.sat.s32.s64"),
        ("max.f32 %r0, %v, %v;", "max.f32"),
        ("max.NaN.f16 %h0, %h0, %h0;", "max.NaN.f16"),
        ("cvt.rn.satfinite.bf16x2.f32 %r0, %v, %v;", "cvt.rn.satfinite.bf16x2.f32"),
        ("cvt.rn.relu.bf16.f32 %h0, %v;", "cvt.rn.relu.bf16.f32"),
        ("ld.u32 %r0, [%in];", "ld.u32"),
        ("ld.acquire.gpu.global.u32 %r0, [%in];", "ld.acquire.gpu.global.u32"),
        ("ld.global.v8.u32 {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7}, [%in];", "ld.global.v8.u32"),
        ("ld.global.L1::no_allocate.u32 %r0, [%in];", "ld.global.L1::no_allocate.u32"),
        ("st.local.u32 [%in], %v;", "st.local.u32"),
        ("atom.global.cas.b32 %r0, [%out], 1, 2;", "atom.global.cas.b32"),
        ("atom.relaxed.gpu.global.add.u32 %r0, [%out], 1;", "atom.relaxed.gpu.global.add.u32"),
        ("shfl.up.b32 %r0, %v, 1, 0;", "shfl.up.b32"),
        ("vote.ballot.b32 %r0, %p0;", "vote.ballot.b32"),
        ("bar.warp.sync -1;", "bar.warp.sync"),
        ("bar.arrive 0, 64;", "bar.arrive"),
        ("bar.sync 1;", "bar.sync"),
        ("@%p0 bar.sync 0;", "bar.sync"),
        ("membar.gl;", "membar.gl"),
        ("call.uni helper, (%r0);", "call.uni"),
        ("mov.u32 %r0, %smid;", "mov.u32"),
        ("mov.u32 %r0, nothing;", "mov.u32"),
        ("mov.f64 %w4, 0f3F800000;", "mov.f64"),
    ],
)
def test_what_is_unknown_is_refused_by_name(line: str, name: str) -> None:
    expected = rf"{re.escape(name)} is not emulated: .*\(probe, hand\.cu:42\)"
    with pytest.raises(PtxError, match=expected):
        program(f".loc 1 42 5\n{line}\n")


def test_division_by_zero() -> None:
    with pytest.raises(EmulationError, match=r"division by zero.*probe, hand\.cu:42"):
        run(".loc 1 42 5\ndiv.u32 %v, 1, %v;", threads(2))


# Counters


def test_instructions_are_counted_for_each_thread() -> None:
    """The frame, 3 at the start of the branch for all, and 2 for 10 of 64."""
    body = """
    setp.lt.u32 %p0, %tid, 10;
    @!%p0 bra JOIN;
    add.u32 %v, %v, 1;
    add.u32 %v, %v, 1;
    JOIN:"""
    counters = run(body, threads(64))[1]
    assert counters.instructions == 64 * (FRAME + 2) + 10 * 2
    assert counters.threads == 64


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("limit", "divergent"), [(10, 1), (32, 0), (40, 1), (96, 0), (0, 0)])
def test_branches_are_counted_for_each_warp(limit: int, divergent: int, seed: int | None) -> None:
    body = f"setp.lt.u32 %p0, %tid, {limit};\n@%p0 bra JOIN;\nadd.u32 %v, %v, 1;\nJOIN:"
    counters = run(body, threads(96), seed)[1]
    assert (counters.branches, counters.divergent_branches) == (3, divergent)


def test_a_branch_on_what_all_threads_share_is_counted() -> None:
    body = "mov.u32 %r0, 1;\nsetp.eq.u32 %p0, %r0, 1;\n@%p0 bra JOIN;\nJOIN:"
    counters = run(body, threads(96))[1]
    assert (counters.branches, counters.divergent_branches) == (3, 0)


def test_barriers_are_counted_for_each_block() -> None:
    counters = launch(
        program("bar.sync 0;\nbar.sync 0;\nbra DONE;"),
        5,
        64,
        x=given(threads(64)),
        y=given(threads(1)),
    )
    assert counters.barriers == 10


def sectors(stride: int, vector: bool, offset: int = 0) -> Counters:
    """64 threads, each reading 4 or 16 bytes at its number times ``stride`` bytes."""
    x = aligned(64 * stride + 16, np.uint8, offset)
    load = "v4.u32 {%r0, %r1, %r2, %r3}" if vector else "u32 %r0"
    body = f"mul.wide.u32 %w3, %tid, {stride};\nadd.s64 %w3, %w3, %w0;\n"
    body += f"ld.global.{load}, [%w3];\nbra DONE;"
    head = HEAD.replace("ld.global.u32 %v, [%in];", "")
    code = Program(Module(head + body + TAIL).kernel("probe"))
    return launch(code, 1, 64, x=given(x), y=given(threads(1)))


@pytest.mark.parametrize(
    ("stride", "vector", "offset", "expected"),
    [
        (16, True, 0, 32),  # coalesced: a sector for two threads
        (4, False, 0, 8),  # coalesced: a sector for eight
        (4, False, 16, 10),  # each warp's 128 bytes begin in the middle of a sector
        (32, False, 0, 64),  # a sector for each
        (128, True, 0, 64),
        (0, False, 0, 2),  # one for each warp
    ],
)
def test_sectors(stride: int, vector: bool, offset: int, expected: int) -> None:
    counters = sectors(stride, vector, offset)
    assert counters.requested["x", "load"] == expected
    assert counters.sectors["x", "load"] == expected
    assert counters.accesses["x", "load", 16 if vector else 4] == 64


def test_a_sector_is_requested_at_each_access_and_fetched_once() -> None:
    counters = run("ld.global.u32 %r0, [%in];\nst.global.u32 [%out], %v;", threads(32))[1]
    assert (counters.requested["x", "load"], counters.sectors["x", "load"]) == (8, 4)
    assert (counters.requested["y", "store"], counters.sectors["y", "store"]) == (8, 4)
    assert counters.accesses["x", "load", 4] == counters.accesses["y", "store", 4] == 64
