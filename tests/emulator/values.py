"""PTX types as NumPy types, and arithmetic that NumPy does not have."""

from __future__ import annotations

from typing import Any

import numpy as np

Value = Any  # an array with a row for each active lane, or a scalar that is the same for all

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
UNSIGNED[8] = np.dtype(np.uint64)
_SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32)}
_SIGNED[8] = np.dtype(np.int64)

#: What a value of each type is computed as. bfloat16 and packed halves are bits here.
DTYPES: dict[str, np.dtype] = {
    "pred": np.dtype(bool),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": UNSIGNED[2],
    "f16x2": UNSIGNED[4],
    "bf16x2": UNSIGNED[4],
    **{f"{kind}{8 * size}": dtype for kind in "bu" for size, dtype in UNSIGNED.items()},
    **{f"s{8 * size}": dtype for size, dtype in _SIGNED.items()},
}


def is_float(kind: str) -> bool:
    return kind in ("f16", "f32", "f64")


def is_integer(kind: str) -> bool:
    return kind[0] in "us" and kind[1:].isdigit()


def bits_of(value: Value) -> Value:
    """A value as the unsigned integer of its width (a predicate stays one)."""
    return value if value.dtype == bool else value.view(UNSIGNED[value.dtype.itemsize])


def fma(a: Value, b: Value, c: Value, rounding: str) -> Value:
    """``a * b + c`` in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo & Melquiond, "Emulation
    of FMA and correctly rounded sums", 2008), so that the rounding to float32 is the only one.
    """
    product = np.float64(a) * np.float64(b)
    wide = np.float64(c)
    total = product + wide
    back = total - product
    error = (product - (total - back)) + (wide - back)
    even = (total.view(np.int64) & 1) == 0
    off = np.isfinite(total) & (error != 0) & even
    odd = np.where(off, np.nextafter(total, np.copysign(np.inf, error)), total)
    if rounding == "rm":  # what cancels exactly is -0
        cancels = (total == 0) & (np.signbit(product) != np.signbit(wide))
        odd = np.where(cancels, -0.0, odd)
    return to_float32(odd, rounding)


def to_float32(exact: Value, rounding: str) -> Value:
    near = np.float32(exact) if np.ndim(exact) == 0 else exact.astype(np.float32)
    if rounding == "rn":
        return near
    assert rounding == "rm"  # towards minus infinity
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def to_float16(x: Value) -> Value:
    """Rounded to the nearest, ties to even; every NaN becomes the one that PTX has."""
    nan = np.uint16(0x7FFF).view(np.float16)
    return np.where(np.isnan(x), nan, x.astype(np.float16))[()]


def to_bfloat16(x: Value) -> Value:
    """The bits of float32 values rounded to the nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(bits: Value) -> Value:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def maximum_or_nan(a: Value, b: Value) -> Value:
    """``max.NaN.f32``: NaN if either is, and 0 is more than -0."""
    nan = np.uint32(0x7FFFFFFF).view(np.float32)
    greater = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    return np.where(np.isnan(a) | np.isnan(b), nan, greater)[()]


def exp2_approximate(x: Value, flush: bool) -> Value:
    """``ex2.approx``: here to the nearest; hardware is within 2 units in the last place."""
    tiny = np.finfo(np.float32).tiny
    if flush:
        x = np.where(np.abs(x) < tiny, np.float32(0), x)
    y = np.exp2(np.float64(x)).astype(np.float32)
    return np.where(y < tiny, np.float32(0), y) if flush else y


def divide_truncating(a: Value, b: Value) -> tuple[Value, Value]:
    """Quotient and remainder of integers, as C has them. The divisor must not be 0."""
    if a.dtype.kind == "u":
        return a // b, a % b
    quotient = a // b
    remainder = a - quotient * b
    inexact = (remainder != 0) & ((a < 0) != (b < 0))
    quotient = quotient + inexact.astype(a.dtype)
    return quotient, a - quotient * b


def shift(a: Value, by: Value, left: bool) -> Value:
    """Shifts by the width and more give 0, or the sign."""
    width = 8 * a.dtype.itemsize
    amount = np.minimum(by, np.uint32(width - 1)).astype(a.dtype)
    shifted = a << amount if left else a >> amount
    if not left and a.dtype.kind == "i":
        return shifted
    return np.where(by >= width, a.dtype.type(0), shifted)


def bit_field_insert(field: Value, into: Value, position: Value, length: Value) -> Value:
    """``bfi.b32``"""
    position, length = (np.minimum(v & np.uint32(255), np.uint32(32)) for v in (position, length))
    wide = (np.uint64(1) << np.uint64(length)) - np.uint64(1)
    mask = (wide << np.uint64(position)).astype(np.uint32)
    moved = (np.uint64(field) << np.uint64(position)).astype(np.uint32)
    return (into & ~mask) | (moved & mask)


_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_FLOAT_ONLY = {*(f"{name}u" for name in _ORDERED), "num", "nan"}
COMPARISONS = {*_ORDERED, *_UNSIGNED_NAMES, *_FLOAT_ONLY}


def compares(kind: str, comparison: str) -> bool:
    """Whether ``setp`` has the comparison for a type."""
    if is_float(kind):
        return comparison not in _UNSIGNED_NAMES
    if kind in ("b16", "b32", "b64"):
        return comparison in ("eq", "ne")
    if kind[0] == "u":
        return comparison not in _FLOAT_ONLY
    return is_integer(kind) and comparison in _ORDERED


def compare(comparison: str, a: Value, b: Value) -> Value:
    """``setp``: the plain comparisons are false at NaN, those with a ``u`` behind are true."""
    if comparison in _UNSIGNED_NAMES:
        return _ORDERED[_UNSIGNED_NAMES[comparison]](a, b)
    if a.dtype.kind != "f":
        return _ORDERED[comparison](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if comparison == "nan":
        return unordered
    if comparison == "num":
        return ~unordered
    if comparison in _ORDERED:
        return _ORDERED[comparison](a, b) & ~unordered
    return _ORDERED[comparison[:-1]](a, b) | unordered
