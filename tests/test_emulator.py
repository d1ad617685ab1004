"""Every instruction that the emulator knows, against results worked out in another way: integers as
Python's, floating point as exact fractions that are rounded once."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from emulator.direct import given, launch, wanted
from emulator.machine import Program
from emulator.ptx import Module
from numpy.typing import NDArray

INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]


def numpy_type(kind: str) -> np.dtype:
    letter = {"b": "uint", "u": "uint", "s": "int", "f": "float"}[kind[0]]
    return np.dtype(f"{letter}{kind[1:]}")


def run(body: str, kind: str, *inputs: NDArray) -> NDArray:
    """One thread for each element: ``body`` makes ``%d``, of a type, of its ``%a, %b, %c``."""
    result = np.zeros(inputs[0].size, numpy_type(kind))
    names = "abc"[: len(inputs)] + "d"
    arrays = [*inputs, result]
    widths = [8 * array.itemsize for array in arrays]
    parameters = ", ".join(f".param .u64 p{name}" for name in names)
    registers = "".join(
        f".reg .b64 %p{name};\n.reg .b{max(width, 16)} %{name};\n"
        for name, width in zip(names, widths, strict=True)
    )
    addresses = "".join(
        f"ld.param.u64 %p{name}, [p{name}];\nmad.wide.u32 %p{name}, %i, {width // 8}, %p{name};\n"
        for name, width in zip(names, widths, strict=True)
    )
    loads = "".join(
        f"ld.global.b{width} %{name}, [%p{name}];\n"
        for name, width in zip(names[:-1], widths, strict=False)
    )
    text = f"""
.visible .entry probe({parameters})
{{
.reg .pred %q<4>;
.reg .b16 %h<8>;
.reg .b32 %t<8>;
.reg .b64 %w<8>;
.reg .b32 %i;
{registers}mov.u32 %i, %tid.x;
{addresses}{loads}{body}
st.global.b{widths[-1]} [%pd], %d;
ret;
}}
"""
    program = Program(Module(text).kernel("probe"))
    arguments = {name: given(array) for name, array in zip(names[:-1], inputs, strict=True)}
    launch(program, 1, result.size, **arguments, d=wanted(result))
    return result


def assert_bits(actual: NDArray, expected: list) -> None:
    """Equal, and -0 is not 0; every NaN is as good as another."""
    wanted_values = np.array(expected, actual.dtype)
    if actual.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted_values))
        wanted_values = np.where(np.isnan(actual), actual, wanted_values)
    bits = f"u{actual.itemsize}"
    np.testing.assert_array_equal(actual.view(bits), wanted_values.view(bits), str(actual))


# Integers


def width_of(kind: str) -> int:
    return int(kind[1:])


def wrap(value: int, kind: str) -> int:
    """Modulo two to the width."""
    width = width_of(kind)
    value %= 1 << width
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def edges(kind: str) -> list[int]:
    width = width_of(kind)
    corners = [0, 1, 2, 7, 255, (1 << width - 1) - 1, 1 << width - 1, (1 << width) - 1, 0x1234]
    return sorted({wrap(value, kind) for value in [*corners, -2, -7, -255]})


def columns(rows: list[tuple], kind: str) -> list[NDArray]:
    return [np.array(column, numpy_type(kind)) for column in zip(*rows, strict=True)]


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add", operator.add),
        ("sub", operator.sub),
        ("mul.lo", operator.mul),
        ("min", min),
        ("max", max),
        ("div", truncated),
        ("rem", lambda a, b: a - b * truncated(a, b)),
    ],
)
def test_integer_arithmetic(opcode: str, function: Callable[[int, int], int], kind: str) -> None:
    rows = [(a, b) for a, b in product(edges(kind), repeat=2) if b or opcode not in ("div", "rem")]
    expected = [wrap(function(a, b), kind) for a, b in rows]
    assert_bits(run(f"{opcode}.{kind} %d, %a, %b;", kind, *columns(rows, kind)), expected)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_integer_products_of_twice_the_width(kind: str) -> None:
    rows, width = list(product(edges(kind), repeat=2)), width_of(kind)
    wide = f"{kind[0]}{2 * width}"
    a, b = columns(rows, kind)
    full = [wrap(x * y, wide) for x, y in rows]
    high = [wrap(x * y >> width, kind) for x, y in rows]
    assert_bits(run(f"mul.wide.{kind} %d, %a, %b;", wide, a, b), full)
    assert_bits(run(f"mul.hi.{kind} %d, %a, %b;", kind, a, b), high)
    c = np.array([wrap(x << width + 2, wide) for x, _ in rows], numpy_type(wide))
    plus = [wrap(x + int(y), wide) for x, y in zip(full, c, strict=True)]
    assert_bits(run(f"mad.wide.{kind} %d, %a, %b, %c;", wide, a, b, c), plus)
    low = [wrap(x * y + x - 5, kind) for x, y in rows]
    body = f"sub.{kind} %d, %a, 5;\nmad.lo.{kind} %d, %a, %b, %d;"
    assert_bits(run(body, kind, a, b), low)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind: str) -> None:
    (a,) = columns([(x,) for x in edges(kind)], kind)
    assert_bits(run(f"neg.{kind} %d, %a;", kind, a), [wrap(-x, kind) for x in edges(kind)])
    assert_bits(run(f"abs.{kind} %d, %a;", kind, a), [wrap(abs(x), kind) for x in edges(kind)])


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_bitwise(kind: str) -> None:
    rows = list(product(edges(kind), repeat=2))
    a, b = columns(rows, kind)
    functions = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
    for opcode, function in functions.items():
        expected = [function(x, y) for x, y in rows]
        assert_bits(run(f"{opcode}.{kind} %d, %a, %b;", kind, a, b), expected)
    assert_bits(run(f"not.{kind} %d, %a;", kind, a), [wrap(~x, kind) for x, _ in rows])


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_by_the_width_and_more(width: int) -> None:
    by = [0, 1, width - 1, width, width + 1, 255, 256, 2**31, 2**32 - 1]
    rows = list(product(edges(f"s{width}"), by))
    a = np.array([x for x, _ in rows], f"i{width // 8}")
    b = np.array([n for _, n in rows], np.uint32)
    clamped = [(x, min(n, width)) for x, n in rows]  # Python would try to hold x << 2**32
    left = [wrap(x << n, f"b{width}") for x, n in clamped]
    assert_bits(run(f"shl.b{width} %d, %a, %b;", f"b{width}", a, b), left)
    unsigned = [wrap(x, f"u{width}") >> n for x, n in clamped]
    assert_bits(run(f"shr.u{width} %d, %a, %b;", f"u{width}", a, b), unsigned)
    assert_bits(run(f"shr.s{width} %d, %a, %b;", f"s{width}", a, b), [x >> n for x, n in clamped])


def test_bit_field_insert() -> None:
    places = [(0, 8), (8, 8), (16, 16), (0, 32), (31, 1), (28, 8), (32, 4), (5, 0), (256 + 4, 4)]
    for position, length in places:
        start = position & 255
        expected = 0x89ABCDEF
        for i in range(min(length, max(32 - start, 0))):  # as the ISA has it, bit by bit
            bit = 0x13579BDF >> i & 1
            expected = expected & ~(1 << start + i) | bit << start + i
        a, b = np.array([0x13579BDF], np.uint32), np.array([0x89ABCDEF], np.uint32)
        assert_bits(run(f"bfi.b32 %d, %a, %b, {position}, {length};", "b32", a, b), [expected])


# Floating point

#: precision, exponent of the smallest number, exponent of the largest
FORMATS = {"f64": (53, -1074, 1023), "f32": (24, -149, 127), "f16": (11, -24, 15)}
FORMATS["bf16"] = (8, -133, 127)

FLOATS = [0.0, 1.0, -1.0, 1.5, 3.0, 1 / 3, -0.1, 1e-30, 16777217.0, 65504.0, 2.0**-149, 3e38]
FLOATS += [-(2.0**-126), 1.0 + 2**-23, 2.0**-127 + 2.0**-149]


def rounded(x: Fraction, kind: str, *, down: bool = False) -> float:
    """To the nearest, ties to even, or towards minus infinity."""
    if x == 0:
        return 0.0
    precision, smallest, largest = FORMATS[kind]
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    quantum = Fraction(2) ** max(exponent - precision + 1, smallest)
    steps = math.floor(x / quantum) if down else round(x / quantum)
    result = steps * quantum
    highest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** largest
    if abs(result) > highest:
        return float(highest) if down and x > 0 else math.copysign(math.inf, x)
    return math.copysign(float(result), x)


def floats(*values: float) -> NDArray:
    return np.array(values, np.float32)


def exact(value: float) -> Fraction:
    return Fraction(float(value))


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add", operator.add),
        ("sub.rn", operator.sub),
        ("mul", operator.mul),
        ("div.rn", operator.truediv),
    ],
)
def test_float_arithmetic_rounds_once(
    opcode: str, function: Callable[[Fraction, Fraction], Fraction], kind: str
) -> None:
    values = [float(np.float32(x)) for x in FLOATS]
    rows = [(x, y) for x, y in product(values, repeat=2) if opcode != "div.rn" or y]
    actual = run(f"{opcode}.{kind} %d, %a, %b;", kind, *columns(rows, kind))
    expected = [rounded(function(exact(x), exact(y)), kind) for x, y in rows]
    np.testing.assert_array_equal(actual, np.array(expected, actual.dtype))  # signs of 0: below


INF, NAN = math.inf, math.nan
NEGATIVE_ZERO = -0.0


@pytest.mark.parametrize(
    ("body", "a", "b", "expected"),
    [
        ("max.NaN.f32 %d, %a, %b;", 1.0, 2.0, 2.0),
        ("max.NaN.f32 %d, %a, %b;", NEGATIVE_ZERO, 0.0, 0.0),
        ("max.NaN.f32 %d, %a, %b;", 0.0, NEGATIVE_ZERO, 0.0),
        ("max.NaN.f32 %d, %a, %b;", NEGATIVE_ZERO, NEGATIVE_ZERO, NEGATIVE_ZERO),
        ("max.NaN.f32 %d, %a, %b;", NAN, 1.0, NAN),
        ("max.NaN.f32 %d, %a, %b;", 1.0, NAN, NAN),
        ("max.NaN.f32 %d, %a, %b;", -INF, 0.0, 0.0),
        ("add.f32 %d, %a, %b;", INF, -INF, NAN),
        ("add.f32 %d, %a, %b;", NEGATIVE_ZERO, NEGATIVE_ZERO, NEGATIVE_ZERO),
        ("add.f32 %d, %a, %b;", NEGATIVE_ZERO, 0.0, 0.0),
        ("sub.f32 %d, %a, %b;", 1.0, NAN, NAN),
        ("mul.f32 %d, %a, %b;", INF, 0.0, NAN),
        ("mul.f32 %d, %a, %b;", -1.0, 0.0, NEGATIVE_ZERO),
        ("mul.f32 %d, %a, %b;", 2.0**-149, 0.5, 0.0),
        ("mul.f32 %d, %a, %b;", 3e38, -10.0, -INF),
        ("div.rn.f32 %d, %a, %b;", 1.0, NEGATIVE_ZERO, -INF),
        ("div.rn.f32 %d, %a, %b;", 0.0, 0.0, NAN),
        ("div.rn.f32 %d, %a, %b;", 1.0, INF, 0.0),
        ("rcp.rn.f32 %d, %a;", NEGATIVE_ZERO, 0.0, -INF),
        ("rcp.rn.f32 %d, %a;", 3.0, 0.0, 1 / 3),
        ("sqrt.rn.f32 %d, %a;", NEGATIVE_ZERO, 0.0, NEGATIVE_ZERO),
        ("sqrt.rn.f32 %d, %a;", -1.0, 0.0, NAN),
        ("sqrt.rn.f32 %d, %a;", INF, 0.0, INF),
        ("neg.f32 %d, %a;", 0.0, 0.0, NEGATIVE_ZERO),
        ("neg.f32 %d, %a;", INF, 0.0, -INF),
        ("abs.f32 %d, %a;", NEGATIVE_ZERO, 0.0, 0.0),
        ("abs.f32 %d, %a;", -INF, 0.0, INF),
        ("cvt.sat.f32.f32 %d, %a;", NAN, 0.0, 0.0),
        ("cvt.sat.f32.f32 %d, %a;", NEGATIVE_ZERO, 0.0, 0.0),
        ("cvt.sat.f32.f32 %d, %a;", -INF, 0.0, 0.0),
        ("cvt.sat.f32.f32 %d, %a;", INF, 0.0, 1.0),
        ("cvt.sat.f32.f32 %d, %a;", 0.25, 0.0, 0.25),
        ("ex2.approx.f32 %d, %a;", -INF, 0.0, 0.0),
        ("ex2.approx.f32 %d, %a;", 128.0, 0.0, INF),
        ("ex2.approx.f32 %d, %a;", NAN, 0.0, NAN),
        ("ex2.approx.f32 %d, %a;", -126.0, 0.0, 2.0**-126),
        ("ex2.approx.f32 %d, %a;", -149.0, 0.0, 2.0**-149),
        ("ex2.approx.ftz.f32 %d, %a;", -127.0, 0.0, 0.0),
        ("ex2.approx.ftz.f32 %d, %a;", 2.0**-127, 0.0, 1.0),
        ("ex2.approx.ftz.f32 %d, %a;", 3.0, 0.0, 8.0),
    ],
)
def test_float_special_values(body: str, a: float, b: float, expected: float) -> None:
    assert_bits(run(body, "f32", floats(a), floats(b)), [expected])


def test_square_root_and_reciprocal_round_once() -> None:
    values = [float(np.float32(x)) for x in FLOATS if x > 0]
    context = Context(prec=80)
    roots = [Fraction(context.sqrt(Decimal(x))) for x in values]
    expected = [rounded(x, "f32") for x in roots]
    assert_bits(run("sqrt.rn.f32 %d, %a;", "f32", floats(*values)), expected)
    expected = [rounded(1 / exact(x), "f32") for x in values]
    assert_bits(run("rcp.rn.f32 %d, %a;", "f32", floats(*values)), expected)


def fused_triples() -> list[tuple[float, float, float]]:
    """Products next to a tie, which a sum in double precision would round onto it, and others."""
    near_tie = [(1 + 2**-12, 1 + 2**-12, 2.0**-70), (1 + 2**-12, 1 + 2**-12, -(2.0**-70))]
    near_tie += [(1 + 2**-23, 1 + 2**-23, -1.0), (2.0**24 + 2, 1.0, 1 - 2.0**-24)]
    near_tie += [(2.0**-100, 2.0**-50, 2.0**-126), (2.0**-75, 2.0**-75, 2.0**-149)]
    generator = np.random.default_rng(0)
    random = generator.standard_normal((400, 3)) * 2.0 ** generator.integers(-40, 40, (400, 3))
    return [tuple(map(float, row)) for row in [*near_tie, *random.astype(np.float32)]]


@pytest.mark.parametrize("rounding", ["rn", "rm"])
def test_fma_rounds_once(rounding: str) -> None:
    rows = fused_triples()
    actual = run(f"fma.{rounding}.f32 %d, %a, %b, %c;", "f32", *columns(rows, "f32"))
    sums = [exact(a) * exact(b) + exact(c) for a, b, c in rows]
    assert_bits(actual, [rounded(x, "f32", down=rounding == "rm") for x in sums])


def test_fma_differs_from_a_sum_that_is_rounded_twice() -> None:
    a, b, c = 1 + 2**-12, 1 + 2**-12, 2.0**-70
    assert np.float32(a * b + c) != rounded(exact(a) * exact(b) + exact(c), "f32")


@pytest.mark.parametrize(
    ("rounding", "a", "b", "c", "expected"),
    [
        ("rn", INF, 1.0, -INF, NAN),
        ("rn", INF, 0.0, 1.0, NAN),
        ("rn", 1.0, NAN, 1.0, NAN),
        ("rn", 3e38, 2.0, -INF, -INF),
        ("rn", 3e38, 2.0, 0.0, INF),
        ("rm", 3e38, 2.0, 0.0, float(np.finfo(np.float32).max)),
        ("rm", 3e38, -2.0, 0.0, -INF),
        ("rn", 1.0, 1.0, -1.0, 0.0),
        ("rm", 1.0, 1.0, -1.0, NEGATIVE_ZERO),
        ("rm", 0.0, 1.0, 0.0, 0.0),
        ("rm", -(2.0**-100), 2.0**-100, 0.0, -(2.0**-149)),
        ("rn", -(2.0**-100), 2.0**-100, 0.0, NEGATIVE_ZERO),
    ],
)
def test_fma_special_values(rounding: str, a: float, b: float, c: float, expected: float) -> None:
    inputs = [floats(x) for x in (a, b, c)]
    assert_bits(run(f"fma.{rounding}.f32 %d, %a, %b, %c;", "f32", *inputs), [expected])


# Comparisons and selection

_RELATIONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def compared(comparison: str, kind: str, a: NDArray, b: NDArray) -> list[bool]:
    body = f"setp.{comparison}.{kind} %q0, %a, %b;\nselp.b32 %d, 1, 0, %q0;"
    return [bool(x) for x in run(body, "b32", a, b)]


@pytest.mark.parametrize("comparison", [*_RELATIONS, "num", "nan", *(f"{r}u" for r in _RELATIONS)])
def test_float_comparisons(comparison: str) -> None:
    rows = list(product([NAN, -INF, -1.0, NEGATIVE_ZERO, 0.0, 2.0**-149, INF], repeat=2))

    def holds(a: float, b: float) -> bool:
        unordered = a != a or b != b
        if comparison in ("num", "nan"):
            return unordered == (comparison == "nan")
        if unordered:
            return comparison.endswith("u")
        return _RELATIONS[comparison.removesuffix("u")](a, b)

    expected = [holds(a, b) for a, b in rows]
    assert compared(comparison, "f32", *columns(rows, "f32")) == expected


@pytest.mark.parametrize("kind", [*INTEGERS, "b32"])
def test_integer_comparisons(kind: str) -> None:
    rows = list(product(edges(kind), repeat=2))
    names = ["eq", "ne"] if kind == "b32" else list(_RELATIONS)
    for name in names:
        expected = [_RELATIONS[name](a, b) for a, b in rows]
        assert compared(name, kind, *columns(rows, kind)) == expected
    if kind == "u32":
        for name, relation in zip(("lo", "ls", "hi", "hs"), ("lt", "le", "gt", "ge"), strict=True):
            expected = [_RELATIONS[relation](a, b) for a, b in rows]
            assert compared(name, kind, *columns(rows, kind)) == expected


def test_selection_keeps_bits() -> None:
    a, b = floats(1.0, 2.0, NAN, 4.0), floats(-1.0, NAN, -3.0, NEGATIVE_ZERO)
    condition = np.array([1, 0, 1, 0], np.int32)
    body = "setp.ne.s32 %q0, %c, 0;\nselp.f32 %d, %a, %b, %q0;"
    assert_bits(run(body, "f32", a, b, condition), [1.0, NAN, NAN, NEGATIVE_ZERO])


def test_predicate_logic() -> None:
    a, b = columns(list(product([0, 1], repeat=2)), "s32")
    both = "setp.ne.s32 %q0, %a, 0;\nsetp.ne.s32 %q1, %b, 0;\n"
    for opcode, expected in (("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])):
        body = f"{both}{opcode}.pred %q2, %q0, %q1;\nselp.s32 %d, 1, 0, %q2;"
        assert_bits(run(body, "s32", a, b), expected)
    body = f"{both}not.pred %q2, %q0;\nmov.pred %q3, %q2;\nselp.s32 %d, 1, 0, %q3;"
    assert_bits(run(body, "s32", a, b), [1, 1, 0, 0])


# Conversions


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("origin", INTEGERS)
def test_integer_conversions_cut_or_extend(to: str, origin: str) -> None:
    (a,) = columns([(x,) for x in edges(origin)], origin)
    expected = [wrap(x, to) for x in edges(origin)]
    assert_bits(run(f"cvt.{to}.{origin} %d, %a;", to, a), expected)


def test_narrow_loads_and_conversions_extend_by_their_sign() -> None:
    a = np.array([0, 1, 127, 128, 255], np.uint8)
    signed = [0, 1, 127, -128, -1]
    assert_bits(run("ld.global.s8 %t0, [%pa];\nmov.b32 %d, %t0;", "s32", a), signed)
    assert_bits(run("ld.global.u8 %t0, [%pa];\nmov.b32 %d, %t0;", "s32", a), a.tolist())
    assert_bits(run("cvt.s32.s8 %d, %a;", "s32", a), signed)
    assert_bits(run("cvt.u32.u8 %d, %a;", "s32", a), a.tolist())


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize(("rounding", "function"), [("rzi", math.trunc), ("rni", round)])
def test_float_to_integer_clamps(to: str, rounding: str, function: Callable[[float], int]) -> None:
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 3.9, -3.9, 65535.5, 2.0**31, -(2.0**31), 2.0**32]
    values += [2.0**63, 1e19, 3e20, -3e20, INF, -INF, NAN, 16777217.0, 2147483520.0]
    width, signed = width_of(to), to[0] == "s"
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)

    def integer(x: float) -> int:
        if math.isnan(x):
            return 0
        return max(low, min(high, function(x))) if math.isfinite(x) else (low, high)[x > 0]

    a = floats(*values)
    assert_bits(run(f"cvt.{rounding}.{to}.f32 %d, %a;", to, a), [integer(x) for x in a.tolist()])


@pytest.mark.parametrize("origin", ["s32", "u32", "s64", "u64", "f64"])
def test_to_float32_rounds_to_the_nearest(origin: str) -> None:
    values = [0, 1, 16777217, 16777219, 33554433, 33554435, 2**31 - 1, 2**30 + 33]
    if origin == "f64":
        values += [1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e-45, 1e300, 0.1]
    (a,) = columns([(x,) for x in values], origin)
    expected = [rounded(Fraction(x), "f32") for x in a.tolist()]
    assert_bits(run(f"cvt.rn.f32.{origin} %d, %a;", "f32", a), expected)


def half_bits(kind: str, value: float) -> int:
    """Of a value that the format has."""
    if math.isnan(value):
        return 0x7FFF
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


#: ties, both ways; the ends of the range; subnormals; what rounds to infinity
HALF_CASES = [1.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-9]
HALF_CASES += [65504.0, 65519.0, 65520.0, -65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-26]
HALF_CASES += [3.4e38, 3.3895e38, -1 / 3, 2.0**-133, 2.0**-134, NEGATIVE_ZERO, INF, -INF, NAN]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_to_half_rounds_ties_to_even(kind: str) -> None:
    a = floats(*HALF_CASES)

    def nearest(x: float) -> float:
        return rounded(Fraction(x), kind) if x and math.isfinite(x) else x

    expected = [half_bits(kind, nearest(x)) for x in a.tolist()]
    assert_bits(run(f"cvt.rn.{kind}.f32 %d, %a;", "b16", a), expected)
    pairs = [high << 16 | low for high, low in zip(expected, expected[::-1], strict=True)]
    assert_bits(run(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", "b32", a, a[::-1].copy()), pairs)
    expected = [half_bits(kind, nearest(x)) if not x <= 0 else 0 for x in a.tolist()]
    pairs = [high << 16 | low for high, low in zip(expected, expected[::-1], strict=True)]
    assert_bits(run(f"cvt.rn.relu.{kind}x2.f32 %d, %a, %b;", "b32", a, a[::-1].copy()), pairs)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_to_float_is_exact(kind: str) -> None:
    bits = np.array([0, 0x8000, 1, 0x3C00, 0x3F80, 0x7BFF, 0xFC00, 0x7F80, 0x7FFF], np.uint16)
    if kind == "f16":
        expected = [struct.unpack("<e", struct.pack("<H", x))[0] for x in bits.tolist()]
    else:
        expected = [struct.unpack("<f", struct.pack("<I", x << 16))[0] for x in bits.tolist()]
    assert_bits(run(f"cvt.f32.{kind} %d, %a;", "f32", bits), expected)


def test_float32_to_float64_is_exact() -> None:
    a = floats(*FLOATS, NEGATIVE_ZERO, INF, NAN)
    assert_bits(run("cvt.f64.f32 %d, %a;", "f64", a), a.tolist())


# Moves


def test_move_packs_the_first_operand_lowest() -> None:
    a, b = np.array([0x1111, 0xAAAA], np.uint16), np.array([0x2222, 0xBBBB], np.uint16)
    assert_bits(run("mov.b32 %d, {%a, %b};", "b32", a, b), [0x22221111, 0xBBBBAAAA])
    body = "mov.b32 %t0, {%a, %b};\nmov.b64 %d, {%t0, 7};"
    assert_bits(run(body, "b64", a, b), [0x7_22221111, 0x7_BBBBAAAA])


def test_move_unpacks_the_lowest_first() -> None:
    a = np.array([0x22221111, 0xBBBBAAAA], np.uint32)
    body = "mov.b32 {%h0, %h1}, %a;\ncvt.u32.u16 %t0, %h0;\nmad.wide.u16 %t1, %h1, 3, %t0;\n"
    expected = [0x1111 + 3 * 0x2222, 0xAAAA + 3 * 0xBBBB]
    assert_bits(run(f"{body}mov.b32 %d, %t1;", "b32", a), expected)


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        ("mov.f32 %d, 0f3FC00000;", "f32", 1.5),
        ("mov.b32 %d, 0f3FC00000;", "b32", 0x3FC00000),
        ("mov.f64 %d, 0d3FF8000000000000;", "f64", 1.5),
        ("mov.b64 %d, 0d3FF8000000000000;", "b64", 0x3FF8000000000000),
        ("mov.u32 %d, -1;", "u32", 2**32 - 1),
        ("mov.s64 %d, 0x10;", "s64", 16),
        ("mov.b16 %d, 0xFFFFU;", "b16", 65535),
        ("mov.u32 %d, %ntid.x;", "u32", 1),
        ("mov.u32 %d, %nctaid.y;", "u32", 1),
        ("mov.u32 %d, %laneid;", "u32", 0),
    ],
)
def test_literals_and_special_registers(body: str, kind: str, expected: float) -> None:
    assert_bits(run(body, kind, np.zeros(1, np.uint32)), [expected])


def test_address_conversion_keeps_the_address() -> None:
    a = floats(3.0, 4.0)
    body = "cvta.to.global.u64 %w0, %pa;\nld.global.nc.f32 %d, [%w0];"
    assert_bits(run(body, "f32", a), [3.0, 4.0])
