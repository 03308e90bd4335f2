"""Arithmetic of PTX on rows (one number a thread) that NumPy does not have as one call.

Every function writes its last argument. Fused multiply-add rounds once. The approximate instructions give correctly
rounded results, or, inside `perturbed`, results moved by up to the error that the PTX manual states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
SMALLEST_NORMAL = np.float32(2.0**-126)
CANONICAL_NAN = np.uint32(0x7FFFFFFF)
# The bits of a float64 that a float32 does not keep, and their value halfway between two float32.
LOST_BITS = np.uint64(0x1FFFFFFF)
HALFWAY = np.uint64(0x10000000)

_perturbation: np.uint32 | None = None


@contextmanager
def perturbed(seed: int = 0) -> Iterator[None]:
    """Move the result of every approximate instruction by up to its error, the same way for the same operands."""
    global _perturbation
    _perturbation = np.uint32(seed * 2654435761 & 0xFFFFFFFF)
    try:
        yield
    finally:
        _perturbation = None


def _approximate(exact: Array, out: Array, flush: bool, ulps: int, *inputs: Array) -> None:
    """Round float64 results to `out`, float32; perturbed by at most `ulps` units in the last place."""
    result = exact.astype(np.float32)
    if _perturbation is not None:
        mixed = np.full(result.shape, _perturbation)
        for a in inputs:
            mixed = (mixed ^ a.view(np.uint32)) * np.uint32(0x9E3779B1)
            mixed ^= mixed >> np.uint32(15)
        move = (mixed % np.uint32(2 * ulps + 1)).astype(np.int32) - ulps
        moved = (result.view(np.int32) + move).view(np.float32)
        result = np.where(np.isfinite(result) & (result != 0) & np.isfinite(moved), moved, result)
    np.copyto(out, flushed(result) if flush else result)


def flushed(a: Array) -> Array:
    return np.where(np.abs(a) < SMALLEST_NORMAL, np.copysign(np.float32(0), a), a)


def fma32(a: Array, b: Array, c: Array, out: Array) -> None:
    """Fused: the product is exact in float64 and the sum rounded once.

    Where float64's own rounding of the sum lands on a tie of float32, the remainder decides. (A sum below 2^-126 whose
    float64 rounding lands on a tie of the coarser subnormal grid is not looked at: its product would need 27 zero bits
    in the middle.)
    """
    product = np.multiply(a, b, dtype=np.float64)
    total: Array = np.add(product, c)
    tie = np.bitwise_and(total.view(np.uint64), LOST_BITS) == HALFWAY
    if tie.any():
        wide = np.broadcast_to(np.asarray(c, np.float64), total.shape)
        # Knuth's two-sum: what the float64 addition lost.
        back = total - product
        lost = (product - (total - back)) + (wide - back)
        move = tie & (lost != 0) & np.isfinite(total)
        total = np.where(move, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    np.copyto(out, total, casting="same_kind")


def fma32_ftz(a: Array, b: Array, c: Array, out: Array) -> None:
    fma32(flushed(a), flushed(b), flushed(c), out)
    np.copyto(out, flushed(out))


def min32(a: Array, b: Array, out: Array) -> None:
    """The smaller; not NaN if one is a number, and -0 below +0."""
    result = np.fmin(a, b)
    np.copyto(out, np.where((result == 0) & (a == b) & (np.signbit(a) | np.signbit(b)), np.float32(-0.0), result))


def max32(a: Array, b: Array, out: Array) -> None:
    result = np.fmax(a, b)
    np.copyto(out, np.where((result == 0) & (a == b) & ~(np.signbit(a) & np.signbit(b)), np.float32(0.0), result))


def div32(a: Array, b: Array, out: Array) -> None:
    np.divide(a, b, out)


def div32_full(a: Array, b: Array, out: Array) -> None:
    if _perturbation is None:
        np.divide(a, b, out)
    else:
        _approximate(np.divide(a, b, dtype=np.float64), out, False, 2, a, b)


def rcp_rn(a: Array, out: Array) -> None:
    np.divide(np.float32(1), a, out)


def sqrt_rn(a: Array, out: Array) -> None:
    np.sqrt(a, out)


def _approximation(function: Callable[[Array], Array], ulps: int, flush: bool) -> Callable[[Array, Array], None]:
    def approximate(a: Array, out: Array) -> None:
        _approximate(function((flushed(a) if flush else a).astype(np.float64)), out, flush, ulps, a)

    return approximate


ex2, ex2_ftz = (_approximation(np.exp2, 2, flush) for flush in (False, True))
lg2, lg2_ftz = (_approximation(np.log2, 2, flush) for flush in (False, True))
rcp, rcp_ftz = (_approximation(lambda a: 1.0 / a, 1, flush) for flush in (False, True))
sqrt, sqrt_ftz = (_approximation(np.sqrt, 1, flush) for flush in (False, True))
rsqrt, rsqrt_ftz = (_approximation(lambda a: 1.0 / np.sqrt(a), 2, flush) for flush in (False, True))


# --- integers ---


def div_signed(a: Array, b: Array, out: Array) -> None:
    """Truncating; by zero all ones, as the hardware's sequence gives."""
    zero = b == 0
    safe = np.where(zero, 1, b)
    np.copyto(out, np.where(zero, -1, (a - np.fmod(a, safe)) // safe), casting="same_kind")


def rem_signed(a: Array, b: Array, out: Array) -> None:
    zero = b == 0
    np.copyto(out, np.where(zero, a, np.fmod(a, np.where(zero, 1, b))), casting="same_kind")


def div_unsigned(a: Array, b: Array, out: Array) -> None:
    zero = b == 0
    ones = np.array(~a.dtype.type(0), a.dtype)
    np.copyto(out, np.where(zero, ones, a // np.where(zero, a.dtype.type(1), b)))


def rem_unsigned(a: Array, b: Array, out: Array) -> None:
    zero = b == 0
    np.copyto(out, np.where(zero, a, a % np.where(zero, a.dtype.type(1), b)))


def mul_hi_u32(a: Array, b: Array, out: Array) -> None:
    np.copyto(out, np.multiply(a, b, dtype=np.uint64) >> np.uint64(32), casting="unsafe")


def mul_hi_s32(a: Array, b: Array, out: Array) -> None:
    np.copyto(out, np.multiply(a, b, dtype=np.int64) >> np.int64(32), casting="unsafe")


def _low_ones(length: Array) -> Array:
    return np.where(length >= 32, np.uint32(0xFFFFFFFF), (np.uint32(1) << length) - np.uint32(1))


def bfe_u32(a: Array, position: Array, length: Array, out: Array) -> None:
    position, length = position & np.uint32(255), length & np.uint32(255)
    np.copyto(out, (a >> position) & _low_ones(length))


def bfe_s32(a: Array, position: Array, length: Array, out: Array) -> None:
    position, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    end = np.minimum(position + length, 32)
    extended = (a.astype(np.int64) << (64 - end)) >> (64 - end)  # the sign of the field's last bit
    np.copyto(out, np.where(length == 0, 0, extended >> position), casting="unsafe")


def bfi_b32(a: Array, b: Array, position: Array, length: Array, out: Array) -> None:
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = _low_ones(length) << position
    np.copyto(out, (b & ~mask) | ((a << position) & mask))


def prmt(a: Array, b: Array, selector: Array, out: Array) -> None:
    """Default mode: four bytes chosen from eight, or their sign replicated."""
    pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    result = np.empty((a.size, 4), np.uint8)
    rows = np.arange(a.size)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = pool[rows, nibble & np.uint32(7)]
        result[:, i] = np.where(nibble & np.uint32(8), np.where(byte & 0x80, 0xFF, 0), byte)
    np.copyto(out, result.view(np.uint32).reshape(-1))


def lop3(a: Array, b: Array, c: Array, table: int, out: Array) -> None:
    result = np.zeros_like(a)
    for bit in range(8):
        if table >> bit & 1:
            result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    np.copyto(out, result)


def _bits(a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")


def popc(a: Array, out: Array) -> None:
    np.copyto(out, _bits(a).sum(1), casting="unsafe")


def brev(a: Array, out: Array) -> None:
    np.copyto(out, np.packbits(_bits(a)[:, ::-1], axis=1, bitorder="little").view(np.uint32).reshape(-1))


def clz(a: Array, out: Array) -> None:
    _, exponent = np.frexp(a.astype(np.float64))
    np.copyto(out, np.where(a == 0, 32, 32 - exponent), casting="unsafe")


def shf(left: bool, wrap: bool) -> Callable[[Array, Array, Array, Array], None]:
    def funnel(a: Array, b: Array, c: Array, out: Array) -> None:
        count = ((c & np.uint32(31)) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        wide = (b.astype(np.uint64) << np.uint64(32)) | a
        result = (wide << count) >> np.uint64(32) if left else wide >> count
        np.copyto(out, result & np.uint64(0xFFFFFFFF), casting="unsafe")

    return funnel


# --- conversions ---


def bf16_bits(a: Array) -> Array:
    """float32 → bfloat16 bits (uint16), to nearest even."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f16_bits(a: Array) -> Array:
    return np.where(np.isnan(a), np.uint16(0x7FFF), a.astype(np.float16).view(np.uint16))


def wide_bf16(a: Array) -> Array:
    """bfloat16 bits → float32."""
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def cvt_bf16(a: Array, out: Array) -> None:
    np.copyto(out, bf16_bits(a))


def cvt_f16(a: Array, out: Array) -> None:
    np.copyto(out, f16_bits(a))


def pack_bf16(high: Array, low: Array, out: Array) -> None:
    first, second = bf16_bits(low), bf16_bits(high)
    out.view(np.uint16)[0::2], out.view(np.uint16)[1::2] = first, second


def pack_f16(high: Array, low: Array, out: Array) -> None:
    first, second = f16_bits(low), f16_bits(high)
    out.view(np.uint16)[0::2], out.view(np.uint16)[1::2] = first, second


def from_bf16(a: Array, out: Array) -> None:
    np.left_shift(a, np.uint32(16), out, dtype=np.uint32)


def from_f16(a: Array, out: Array) -> None:
    np.copyto(out, a.view(np.float16).astype(np.float32))


ROUNDINGS: dict[str, Any] = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


def to_integral(rounding: str, flush: bool) -> Callable[[Array, Array], None]:
    """cvt.rmi.f32.f32 and its kin."""

    def convert(a: Array, out: Array) -> None:
        ROUNDINGS[rounding](flushed(a) if flush else a, out)

    return convert


def float_to_int(rounding: str, dtype: Any, flush: bool) -> Callable[[Array, Array], None]:
    """Saturating; NaN gives 0."""
    info = np.iinfo(dtype)

    def convert(a: Array, out: Array) -> None:
        wide = ROUNDINGS[rounding]((flushed(a) if flush else a).astype(np.float64))
        low, high = wide <= info.min, wide >= info.max
        inside = np.where(np.isnan(wide) | low | high, 0, wide).astype(dtype)
        np.copyto(out, np.where(low, info.min, np.where(high, info.max, inside)).astype(dtype), casting="unsafe")

    return convert


def cvt_rna_tf32(a: Array, out: Array) -> None:
    """To nearest, ties away from zero, on 10 explicit bits; kept as fp32 bits with 13 zeros."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    np.copyto(out, np.where(np.isfinite(a), rounded, np.where(np.isnan(a), CANONICAL_NAN, bits)))
