"""A frame for hand-written PTX: a block whose threads each have a value, and return one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .direct import aligned, given, launch, wanted
from .machine import Counters, Program
from .ptx import Module

HEAD = """
.file 1 "/somewhere/hand.cu"
.visible .entry probe(.param .u64 pin, .param .u64 pout)
{
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<16>;
.reg .b64 %w<8>;
.reg .b64 %in, %out;
.reg .b32 %tid, %v;
.shared .align 16 .b8 room[512];
.shared .align 4 .u32 cell;
.loc 1 7 3
mov.u32 %tid, %tid.x;
ld.param.u64 %w0, [pin];
ld.param.u64 %w1, [pout];
mul.wide.u32 %w2, %tid, 4;
add.s64 %in, %w0, %w2;
add.s64 %out, %w1, %w2;
ld.global.u32 %v, [%in];
"""
TAIL = """
st.global.u32 [%out], %v;
DONE:
ret;
}
"""
#: instructions of the frame, which run once a thread
FRAME = 9


def program(body: str, tail: str = TAIL) -> Program:
    return Program(Module(HEAD + body + tail).kernel("probe"))


def run(
    body: str, values: NDArray, seed: int | None = None, tail: str = TAIL
) -> tuple[list[int], Counters]:
    """A block with a thread for each value, which it has in ``%v`` and returns from there."""
    result = aligned(values.size, np.uint32)
    x = aligned(values.size, np.uint32)
    x[:] = values
    code = program(body, tail)
    counters = launch(code, 1, values.size, seed=seed, x=given(x), y=wanted(result))
    return result.tolist(), counters


def threads(count: int) -> NDArray:
    return np.arange(count, dtype=np.uint32)
