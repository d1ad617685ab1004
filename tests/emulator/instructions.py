"""What each instruction does: :func:`compile_instruction` turns it into a function of the lanes.

Registers hold unsigned integers of their width (predicates: bool), one a lane, or a single scalar
where all lanes have the same. Every instruction and modifier that is not here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import values
from .ptx import Instruction, Kernel, PtxError
from .values import DTYPES, Value, is_float, is_integer

if TYPE_CHECKING:
    from .lanes import Lanes

Step = Callable[["Lanes"], None]
Source = Callable[["Lanes"], Value]

#: These end a basic block; the machine itself carries them out.
CONTROL = frozenset({"bra", "ret", "exit", "bar", "barrier"})
_CONTROL_FORMS = {("bra",), ("bra", "uni"), ("ret",), ("ret", "uni"), ("exit",)}
_BARRIERS = {("bar", "sync"), ("barrier", "sync"), ("barrier", "sync", "aligned")}

_SPECIAL = re.compile(r"%laneid|%n?(tid|ctaid)\.[xyz]")


class _Compiler:
    def __init__(self, instruction: Instruction, kernel: Kernel) -> None:
        self.instruction, self.kernel = instruction, kernel
        self.operands = instruction.operands
        self.modifiers = list(instruction.opcode[1:])

    def refuse(self) -> PtxError:
        place = f"{self.kernel.name}, {self.instruction.source}"
        name = ".".join(self.instruction.opcode)
        return PtxError(f"{name} is not emulated: {self.instruction.text!r} ({place})")

    def take(self, *allowed: str) -> str | None:
        """The next modifier, if it is one of these."""
        if self.modifiers and self.modifiers[0] in allowed:
            return self.modifiers.pop(0)
        return None

    def type(self) -> str:
        """The last modifier: nothing else may be left."""
        if len(self.modifiers) != 1 or self.modifiers[0] not in DTYPES:
            raise self.refuse()
        return self.modifiers[0]

    # Operands

    def source(self, text: str, kind: str) -> Source:
        dtype = DTYPES[kind]
        if text in self.kernel.registers:
            return _register_source(text, dtype)
        if _SPECIAL.fullmatch(text):
            return lambda lanes: lanes.special(text).astype(dtype)
        symbols = self.kernel.parameters | self.kernel.shared
        constant = dtype.type(symbols[text][0]) if text in symbols else _immediate(text, dtype)
        if constant is None:
            raise self.refuse()
        return lambda lanes: constant

    def sources(self, kind: str, start: int = 1) -> list[Source]:
        return [self.source(text, kind) for text in self.operands[start:]]

    def write(self, text: str) -> Callable[[Lanes, Value], None]:
        """Writes a value to a register, extended by its own sign or cut to the register's width."""
        if text not in self.kernel.registers:
            raise self.refuse()
        dtype = DTYPES[self.kernel.registers[text]]
        unsigned = dtype if dtype.kind == "b" else values.UNSIGNED[dtype.itemsize]

        def write(lanes: Lanes, value: Value) -> None:
            if value.dtype.kind == "f":
                value = values.bits_of(value)
            if value.dtype.itemsize != unsigned.itemsize:
                value = value.astype(unsigned)
            lanes.set(text, values.bits_of(value))

        return write

    def compute(self, function: Callable[..., Value], kind: str) -> Step:
        """``destination = function(*sources)``, all of one type."""
        write, sources = self.write(self.operands[0]), self.sources(kind)
        return lambda lanes: write(lanes, function(*(source(lanes) for source in sources)))

    def address(self, text: str) -> Source:
        """An address operand: a register or a symbol, and an offset."""
        match = re.fullmatch(r"\[\s*([^\s+]+?)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise self.refuse()
        base, offset = match[1], int(match[2] or 0)
        if base in self.kernel.registers:
            wide = DTYPES[self.kernel.registers[base]].itemsize == 8
            source = self.source(base, "s64" if wide else "s32")
        else:
            source = self.source(base, "s64")
        return lambda lanes: np.int64(source(lanes)) + np.int64(offset)

    # Data movement

    def op_mov(self) -> Step:
        kind = self.type()
        target, origin = self.operands
        if target.startswith("{"):
            return self._unpack(target, origin, kind)
        if origin.startswith("{"):
            return self._pack(target, origin, kind)
        return self.compute(lambda x: x, kind)

    def _halves(self, text: str, kind: str) -> tuple[list[str], np.dtype]:
        names = [name.strip() for name in text.strip("{}").split(",")]
        return names, values.UNSIGNED[DTYPES[kind].itemsize // len(names)]

    def _unpack(self, target: str, origin: str, kind: str) -> Step:
        names, part = self._halves(target, kind)
        source = self.source(origin, kind)
        writes = [self.write(name) for name in names]

        def step(lanes: Lanes) -> None:
            parts = np.atleast_1d(source(lanes)).view(part).reshape(-1, len(names))
            for k, write in enumerate(writes):
                write(lanes, parts[:, k].copy() if len(parts) > 1 else parts[0, k])

        return step

    def _pack(self, target: str, origin: str, kind: str) -> Step:
        names, part = self._halves(origin, kind)
        sources = [self.source(name, f"b{8 * part.itemsize}") for name in names]
        write, dtype = self.write(target), values.UNSIGNED[DTYPES[kind].itemsize]

        def step(lanes: Lanes) -> None:
            total: Value = dtype.type(0)
            for k, source in enumerate(sources):
                total = total | (source(lanes).astype(dtype) << dtype.type(8 * part.itemsize * k))
            write(lanes, total)

        return step

    def op_cvta(self) -> Step:
        if self.take("to") is None or self.take("global") is None:
            raise self.refuse()
        return self.compute(lambda x: x, self.type())

    def _vector(self, text: str) -> list[str]:
        return [name.strip() for name in text.strip("{}").split(",")]

    def op_ld(self) -> Step:
        self.take("volatile")  # here, all accesses are
        space = self.take("param", "global", "shared")
        constant = space == "global" and self.take("nc") is not None
        count = int((self.take("v2", "v4") or "v1")[1:])
        kind = self.type()
        writes = [self.write(name) for name in self._vector(self.operands[0])]
        address = self.address(self.operands[1])
        if space is None or len(writes) != count:
            raise self.refuse()
        dtype = DTYPES[kind]

        def step(lanes: Lanes) -> None:
            loaded = lanes.load(space, address(lanes), dtype, count, constant)
            for k, write in enumerate(writes):
                write(lanes, np.ascontiguousarray(loaded[..., k]) if loaded.ndim > 1 else loaded[k])

        return step

    def op_st(self) -> Step:
        space = self.take("global", "shared")
        count = int((self.take("v2", "v4") or "v1")[1:])
        kind = self.type()
        address = self.address(self.operands[0])
        sources = [self.source(name, kind) for name in self._vector(self.operands[1])]
        if space is None or len(sources) != count:
            raise self.refuse()
        return lambda lanes: lanes.store(space, address(lanes), [s(lanes) for s in sources])

    def op_atom(self) -> Step:
        space = self.take("global", "shared")
        operation = self.take("add", "min", "max", "exch", "and", "or", "xor")
        kind = self.type()
        if space is None or operation is None:
            raise self.refuse()
        write = self.write(self.operands[0])
        address = self.address(self.operands[1])
        source = self.source(self.operands[2], kind)
        return lambda lanes: write(
            lanes, lanes.atomic(space, operation, address(lanes), source(lanes))
        )

    def op_red(self) -> Step:
        space = self.take("global", "shared")
        operation = self.take("add", "min", "max", "and", "or", "xor")
        kind = self.type()
        if space is None or operation is None:
            raise self.refuse()
        address = self.address(self.operands[0])
        source = self.source(self.operands[1], kind)

        def step(lanes: Lanes) -> None:
            lanes.atomic(space, operation, address(lanes), source(lanes))

        return step

    # Arithmetic

    def _arithmetic(self, function: Callable[..., Value], floats: bool = True) -> Step:
        if self.take("rn") and not is_float(self.modifiers[-1]):
            raise self.refuse()
        kind = self.type()
        if not (is_integer(kind) or (floats and kind in ("f32", "f64"))):
            raise self.refuse()
        return self.compute(function, kind)

    def op_add(self) -> Step:
        return self._arithmetic(lambda a, b: a + b)

    def op_sub(self) -> Step:
        return self._arithmetic(lambda a, b: a - b)

    def op_min(self) -> Step:
        return self._arithmetic(np.minimum, floats=False)

    def op_max(self) -> Step:
        if self.take("NaN"):
            if self.modifiers != ["f32"]:
                raise self.refuse()
            return self._arithmetic(values.maximum_or_nan)
        return self._arithmetic(np.maximum, floats=False)

    def op_neg(self) -> Step:
        return self._arithmetic(lambda a: -a)

    def op_abs(self) -> Step:
        return self._arithmetic(np.abs)

    def op_mul(self) -> Step:
        part = self.take("lo", "hi", "wide")
        if part is None:
            return self._arithmetic(lambda a, b: a * b)
        kind = self.type()
        if not is_integer(kind):
            raise self.refuse()
        if part == "lo":
            return self.compute(lambda a, b: a * b, kind)
        return self._wide_product(part, kind, self.operands[1:3])

    def _wide_product(self, part: str, kind: str, operands: tuple[str, ...]) -> Step:
        write, product = self.write(self.operands[0]), self._product(part, kind, operands)
        return lambda lanes: write(lanes, product(lanes))

    def _product(self, part: str, kind: str, operands: tuple[str, ...]) -> Source:
        if kind not in ("u16", "s16", "u32", "s32"):
            raise self.refuse()
        narrow = DTYPES[kind]
        wide = np.dtype(f"{narrow.kind}{2 * narrow.itemsize}")
        a, b = (self.source(text, kind) for text in operands)

        def product(lanes: Lanes) -> Value:
            full = a(lanes).astype(wide) * b(lanes).astype(wide)
            if part == "wide":
                return full
            return (full >> wide.type(8 * narrow.itemsize)).astype(narrow)

        return product

    def op_mad(self) -> Step:
        part = self.take("lo", "wide")
        kind = self.type()
        if part is None or not is_integer(kind):
            raise self.refuse()
        if part == "lo":
            return self.compute(lambda a, b, c: a * b + c, kind)
        product = self._product("wide", kind, self.operands[1:3])
        addend = self.source(self.operands[3], f"{kind[0]}{2 * int(kind[1:])}")
        write = self.write(self.operands[0])
        return lambda lanes: write(lanes, product(lanes) + addend(lanes))

    def op_fma(self) -> Step:
        rounding = self.take("rn", "rm")
        kind = self.type()
        if rounding is None or kind != "f32":
            raise self.refuse()
        return self.compute(lambda a, b, c: values.fma(a, b, c, rounding), kind)

    def _division(self, which: int) -> Step:
        kind = self.type()
        if not is_integer(kind):
            raise self.refuse()

        def divide(a: Value, b: Value) -> Value:
            if np.any(b == 0):
                raise ZeroDivisionError("integer division by zero")
            return values.divide_truncating(a, b)[which]

        return self.compute(divide, kind)

    def op_div(self) -> Step:
        if self.take("rn"):
            kind = self.type()
            if kind not in ("f32", "f64"):
                raise self.refuse()
            return self.compute(lambda a, b: a / b, kind)
        return self._division(0)

    def op_rem(self) -> Step:
        return self._division(1)

    def _rounded(self, function: Callable[[Value], Value], *also: str) -> Step:
        if self.take("rn", *also) is None or self.modifiers != ["f32"]:
            raise self.refuse()
        return self.compute(function, self.type())

    def op_rcp(self) -> Step:
        """``approx``: here to the nearest; hardware is within 1 unit in the last place."""
        return self._rounded(lambda x: np.float32(1) / x, "approx")

    def op_sqrt(self) -> Step:
        return self._rounded(np.sqrt)

    def op_ex2(self) -> Step:
        if self.take("approx") is None:
            raise self.refuse()
        flush = self.take("ftz") is not None
        if self.modifiers != ["f32"]:
            raise self.refuse()
        return self.compute(lambda x: values.exp2_approximate(x, flush), self.type())

    # Bits and predicates

    def _logic(self, function: Callable[..., Value]) -> Step:
        kind = self.type()
        if kind[0] not in "bp":
            raise self.refuse()
        return self.compute(function, kind)

    def op_and(self) -> Step:
        return self._logic(lambda a, b: a & b)

    def op_or(self) -> Step:
        return self._logic(lambda a, b: a | b)

    def op_xor(self) -> Step:
        return self._logic(lambda a, b: a ^ b)

    def op_not(self) -> Step:
        return self._logic(lambda a: ~a)

    def _shift(self, left: bool) -> Step:
        kind = self.type()
        value, by = self.source(self.operands[1], kind), self.source(self.operands[2], "u32")
        write = self.write(self.operands[0])
        return lambda lanes: write(lanes, values.shift(value(lanes), by(lanes), left))

    def op_shl(self) -> Step:
        return self._shift(left=True)

    def op_shr(self) -> Step:
        return self._shift(left=False)

    def op_bfi(self) -> Step:
        if self.type() != "b32":
            raise self.refuse()
        return self.compute(values.bit_field_insert, "b32")

    def op_setp(self) -> Step:
        comparison = self.take(*values.COMPARISONS)
        kind = self.type()
        two_results_or_combined = "|" in self.operands[0] or len(self.operands) != 3
        if not comparison or not values.compares(kind, comparison) or two_results_or_combined:
            raise self.refuse()
        return self.compute(lambda a, b: np.asarray(values.compare(comparison, a, b))[()], kind)

    def op_selp(self) -> Step:
        kind = self.type()
        a, b = (self.source(text, kind) for text in self.operands[1:3])
        predicate = self.source(self.operands[3], "pred")
        write = self.write(self.operands[0])
        return lambda lanes: write(
            lanes, np.where(predicate(lanes), a(lanes), b(lanes)).astype(DTYPES[kind])[()]
        )

    # Conversions

    def op_cvt(self) -> Step:
        rounding = self.take("rn", "rzi", "rni")
        saturate = self.take("sat") is not None
        relu = self.take("relu") is not None
        if len(self.modifiers) != 2:
            raise self.refuse()
        to, origin = self.modifiers
        if to in ("f16x2", "bf16x2") and origin == "f32" and rounding == "rn":
            return self._convert_two(to, relu)
        convert = None if relu else _conversion(to, origin, rounding, saturate)
        if convert is None:
            raise self.refuse()
        source, write = self.source(self.operands[1], origin), self.write(self.operands[0])
        return lambda lanes: write(lanes, convert(source(lanes)))

    def _convert_two(self, to: str, relu: bool) -> Step:
        """With ``relu``, negative numbers (and -0) become 0."""
        convert = _conversion(to.removesuffix("x2"), "f32", "rn", False)
        assert convert is not None
        upper, lower = self.sources("f32")
        write = self.write(self.operands[0])

        def half(source: Source, lanes: Lanes) -> Value:
            x = source(lanes)
            x = np.where(x <= 0, np.float32(0), x)[()] if relu else x
            return values.bits_of(convert(x)).astype(np.uint32)

        def step(lanes: Lanes) -> None:
            high, low = half(upper, lanes), half(lower, lanes)
            write(lanes, (high << np.uint32(16)) | low)

        return step

    # Warps

    def op_shfl(self) -> Step:
        if self.take("sync") is None:
            raise self.refuse()
        mode = self.take("up", "down", "bfly", "idx")
        if mode is None or self.type() != "b32":
            raise self.refuse()
        target, _, inside = self.operands[0].partition("|")
        write = self.write(target)
        write_inside = self.write(inside) if inside else None
        value, by, clamp, members = self.sources("u32")

        def step(lanes: Lanes) -> None:
            result, found = lanes.shuffle(
                mode, value(lanes), by(lanes), clamp(lanes), members(lanes)
            )
            write(lanes, result)
            if write_inside:
                write_inside(lanes, found)

        return step

    def op_vote(self) -> Step:
        if self.take("sync") is None:
            raise self.refuse()
        mode = self.take("all", "any", "uni", "ballot")
        if mode is None or self.type() != ("b32" if mode == "ballot" else "pred"):
            raise self.refuse()
        write = self.write(self.operands[0])
        vote = self.source(self.operands[1], "pred")
        members = self.source(self.operands[2], "u32")
        return lambda lanes: write(lanes, lanes.vote(mode, vote(lanes), members(lanes)))


def _register_source(name: str, dtype: np.dtype) -> Source:
    if dtype.kind == "b":
        return lambda lanes: lanes.get(name)

    def source(lanes: Lanes) -> Value:
        bits = lanes.get(name)
        if bits.dtype.itemsize != dtype.itemsize:
            bits = bits.astype(values.UNSIGNED[dtype.itemsize])
        return bits.view(dtype)

    return source


def _immediate(text: str, dtype: np.dtype) -> Value | None:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return _bits(np.uint32(int(match[1], 16)), dtype)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return _bits(np.uint64(int(match[1], 16)), dtype)
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return None
    number = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.bool_(number)
    unsigned = values.UNSIGNED[dtype.itemsize]
    return unsigned.type(number % (1 << 8 * dtype.itemsize)).view(dtype)


def _bits(literal: Value, dtype: np.dtype) -> Value | None:
    """A float literal as a value of its own width: ``mov.b32`` takes it as bits."""
    return literal.view(dtype) if literal.itemsize == dtype.itemsize else None


def _conversion(
    to: str, origin: str, rounding: str | None, saturate: bool
) -> Callable[[Value], Value] | None:
    """The function of ``cvt``, or ``None`` where there is none here."""
    dtype = DTYPES.get(to)
    if dtype is None or origin not in DTYPES:
        return None
    if saturate:
        if (to, origin) != ("f32", "f32"):
            return None
        # NaN becomes 0.
        return lambda x: np.where(x > 0, np.where(x < 1, x, np.float32(1)), np.float32(0))
    if to == "bf16":
        return values.to_bfloat16 if (origin, rounding) == ("f32", "rn") else None
    if origin == "bf16":
        return values.from_bfloat16 if (to, rounding) == ("f32", None) else None
    if is_float(origin) and is_integer(to):
        rounded = {"rzi": np.trunc, "rni": np.rint}.get(rounding or "")
        return None if rounded is None else lambda x: _to_integer(rounded(x), dtype)
    if (to, origin, rounding) == ("f16", "f32", "rn"):
        return values.to_float16
    widens = is_float(origin) and is_float(to) and dtype.itemsize > DTYPES[origin].itemsize
    needs_rounding = is_float(to) and not widens
    if (rounding == "rn") != needs_rounding or rounding not in (None, "rn"):
        return None
    return lambda x: x.astype(dtype)


def _to_integer(x: Value, dtype: np.dtype) -> Value:
    """Values beyond the range give its ends, NaN gives 0."""
    info = np.iinfo(dtype)
    inside = np.where((x > info.min) & (x < info.max), x, 0).astype(dtype)
    return np.where(x >= info.max, info.max, np.where(x <= info.min, info.min, inside)).astype(
        dtype
    )


def check_control(instruction: Instruction, kernel: Kernel) -> None:
    """Accepts branches, returns, and barriers of the whole block.

    Raises:
        PtxError: it is another kind of them.
    """
    opcode = instruction.opcode
    whole_block = instruction.operands == ("0",) and instruction.guard is None
    if opcode not in _CONTROL_FORMS and not (opcode in _BARRIERS and whole_block):
        raise _Compiler(instruction, kernel).refuse()


def compile_instruction(instruction: Instruction, kernel: Kernel) -> Step:
    """The function of one instruction that is not :data:`CONTROL`.

    Raises:
        PtxError: it, or one of its modifiers, is not emulated.
    """
    compiler = _Compiler(instruction, kernel)
    handler = getattr(compiler, f"op_{instruction.opcode[0]}", None)
    if handler is None:
        raise compiler.refuse()
    step: Step = handler()
    if instruction.guard is None:
        return step
    guard, negated = instruction.guard, instruction.guard_negated

    def guarded(lanes: Lanes) -> None:
        with lanes.where(lanes.get(guard) != negated) as any_left:
            if any_left:
                step(lanes)

    return guarded
