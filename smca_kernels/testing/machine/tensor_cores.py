"""Tensor-core instructions: ldmatrix, stmatrix, mma.sync and wgmma, with fragments as PTX lays them out.

Products are exact. Their sums are made in float64 and rounded once to float32; inside `truncating` they are rounded as
the hardware has been found to (Fasi et al. 2021 and later work): the terms of a block, 8 on sm_80 and 16 on sm_90, and
the accumulator are aligned to the largest exponent, cut off a few bits below float32's last, and so is their sum.

The functions that take a machine `m` first are instructions: `i` is the instruction's number, rows are registers of all
lanes, `mask` says which lanes take part (None: all).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.interfaces import Lanes

_truncates = False


@contextmanager
def truncating() -> Iterator[None]:
    """Round the sums of tensor-core instructions as the hardware does, instead of once."""
    global _truncates
    _truncates = True
    try:
        yield
    finally:
        _truncates = False


def widened(words: Array, kind: str) -> Array:
    """Elements of kind "f16", "bf16" or "tf32" as float64: words [..., n] → [..., n or 2 n], low half first."""
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "tf32":  # the lowest 13 bits are not looked at
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    raise NotImplementedError(f"tensor-core operands of kind {kind!r}")


def multiply(a: Array, b: Array, c: Array | None, arch: int) -> Array:
    """a [..., m, k] @ b [..., k, n] + c, float64 → float32."""
    if not _truncates:
        total = a @ b
        return (total if c is None else total + c).astype(np.float32)
    block, extra_bits = (8, 1) if arch < 90 else (16, 2)
    result: Array = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32) if c is None else c.astype(np.float32)
    for start in range(0, a.shape[-1], block):
        terms = a[..., :, start : start + block, None] * b[..., None, start : start + block, :]
        result = _aligned_sum(np.concatenate([terms, result[..., :, None, :].astype(np.float64)], -2), extra_bits)
    return result


def _aligned_sum(terms: Array, extra_bits: int) -> Array:
    """Sum over axis -2, every term cut at 23 + extra_bits below the largest."""
    largest = np.abs(terms).max(-2)
    _, exponent = np.frexp(largest)
    unit = np.ldexp(1.0, exponent - 1 - 23 - extra_bits)[..., None, :]
    total = (np.trunc(terms / unit) * unit).sum(-2)
    result = total.astype(np.float32)
    over = np.isfinite(result) & (np.abs(result.astype(np.float64)) > np.abs(total))
    result = np.where(over, np.nextafter(result, np.float32(0)), result)
    plain = ~np.isfinite(largest) | (largest == 0)
    return np.where(plain, terms.sum(-2), result).astype(np.float32)


# --- mma.sync ---


@lru_cache(None)
def _fragments(k: int, is_half: bool) -> tuple[Array, Array, Array]:
    """Where A [16, k] and B [k, 8], flat, are among a warp's (register, lane[, half]), and C's registers in C."""
    lane = np.arange(32)
    group, member = lane // 4, lane % 4
    per = 2 if is_half else 1
    width = 4 * per  # columns that the four lanes of a row hold in one register
    half = np.arange(per)
    a, b = [], []
    for register in range(2 * (k // width)):
        row, column = group + 8 * (register % 2), member * per + width * (register // 2)
        a.append((row * k + column)[:, None] + half)
    for register in range(k // width):
        row = member * per + width * register
        b.append((row[:, None] + half) * 8 + group[:, None])
    c = [(group + 8 * (register // 2)) * 8 + member * 2 + register % 2 for register in range(4)]
    return np.argsort(np.array(a).reshape(-1)), np.argsort(np.array(b).reshape(-1)), np.array(c)


def _per_warp(rows: Sequence[Array]) -> Array:
    """Registers [n][lanes] → [warps, n, 32]."""
    return np.ascontiguousarray(np.stack(rows).reshape(len(rows), -1, 32).transpose(1, 0, 2))


def _set(row: Array, value: Array, mask: Array | None) -> None:
    np.copyto(row, value.reshape(-1), where=True if mask is None else mask)


def mma_sync(
    m: Lanes, i: int, k: int, kind: str, d: Sequence[Array], a: Sequence[Array], b: Sequence[Array],
    c: Sequence[Array], mask: Array | None,
) -> None:  # fmt: skip
    """m16n8k8 and m16n8k16."""
    m.need_whole_warps(i, mask)
    a_at, b_at, c_at = _fragments(k, kind != "tf32")
    left = widened(_per_warp(a), kind).reshape(m.warps, -1)[:, a_at].reshape(m.warps, 16, k)
    right = widened(_per_warp(b), kind).reshape(m.warps, -1)[:, b_at].reshape(m.warps, k, 8)
    old = np.empty((m.warps, 128), np.float64)
    old[:, c_at.reshape(-1)] = _per_warp(c).view(np.float32).reshape(m.warps, -1)
    result = multiply(left, right, old.reshape(m.warps, 16, 8), m.arch).reshape(m.warps, 128)[:, c_at]
    for j, row in enumerate(d):
        _set(row, result[:, j], mask)


# --- ldmatrix, stmatrix ---


def ldmatrix(
    m: Lanes, i: int, count: int, transposed: bool, destinations: Sequence[Array], address: Array, offset: int,
    mask: Array | None,
) -> None:  # fmt: skip
    m.need_whole_warps(i, mask)
    lanes = m.lanes_of(mask)
    suppliers = lanes[(lanes & 31) < 8 * count]
    position, good = m.shared.locate(i, address, offset, suppliers, 16, "ldmatrix")
    index = position // 16
    m.shared.check_read(i, index, good, 16)
    rows = np.full((m.lanes, 8), 0xDEAD, np.uint16)
    rows[good] = m.shared.view(np.uint16, 8)[index]
    tiles = rows.reshape(m.warps, 4, 8, 8)[:, :count]  # [warp, matrix, row, column]
    words = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles).view(np.uint32)  # a lane: 4 row + word
    for j, row in enumerate(destinations):
        _set(row, words[:, j], mask)


def stmatrix(
    m: Lanes, i: int, count: int, transposed: bool, sources: Sequence[Array], address: Array, offset: int,
    mask: Array | None,
) -> None:  # fmt: skip
    m.need_whole_warps(i, mask)
    lanes = m.lanes_of(mask)
    suppliers = lanes[(lanes & 31) < 8 * count]
    tiles = _per_warp(sources).view(np.uint16).reshape(m.warps, count, 8, 8)
    rows = np.zeros((m.warps, 4, 8, 8), np.uint16)
    rows[:, :count] = tiles.swapaxes(2, 3) if transposed else tiles
    position, good = m.shared.locate(i, address, offset, suppliers, 16, "stmatrix")
    # The lane that supplies a row's address stands for the write; all lanes of its warp take part.
    m.shared.write(i, position // 16, good, 16, rows.reshape(m.lanes, 8)[good])


# --- wgmma ---


@dataclass(eq=False)
class Pending:
    """A wgmma that a warpgroup has issued: what it will write where, and what it reads until it is waited for."""

    destinations: Sequence[Array]
    values: Array  # [registers, 128]
    granules: Array  # of shared memory
    accumulators: tuple[str, ...]  # names of registers
    operands: tuple[str, ...]  # names of the registers of its left operand, if they are


SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # a descriptor's bits 62 and 63 → bytes


@lru_cache(1024)
def operand_addresses(descriptor: int, rows: int, k: int, size: int, transposed: bool) -> Array:
    """Byte addresses [rows, k] of an operand in shared memory; `rows` is M or N, `size` the bytes of an element."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = SWIZZLES[descriptor >> 62 & 3]
    if descriptor >> 49 & 7 and swizzle:
        raise NotImplementedError("wgmma descriptor with a base offset")
    per = 16 // size  # elements of a 16-byte unit
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if not transposed:  # K-major: 16-byte units along K
        unit = column // per
        at = (row // 8) * stride + (column % per) * size
        at = at + ((row % 8) * swizzle + unit * 16 if swizzle else (row % 8) * 16 + unit * leading)
    elif size == 2:  # MN-major: 16-byte units along M or N
        unit = row // per
        at = (row % per) * size
        if swizzle:
            units = swizzle // 16
            at = at + (unit % units) * 16 + (unit // units) * leading + (column % 8) * swizzle + (column // 8) * stride
        else:
            at = at + unit * stride + (column % 8) * 16 + (column // 8) * leading
    else:
        raise NotImplementedError("transposed wgmma operand that is not 16 bits wide")
    at = at + start
    return at ^ ((at >> 7 & (swizzle // 16 - 1)) << 4) if swizzle else at


def _shared_operand(
    m: Lanes, i: int, cta: int, descriptor: int, rows: int, k: int, kind: str, transposed: bool
) -> tuple[Array, Array]:
    """The operand [rows, k] in float64, and the granules that are read."""
    shared, size = m.shared, 4 if kind == "tf32" else 2
    address = operand_addresses(descriptor, rows, k, size, transposed) - shared.BASE
    low, high = int(address.min()), int(address.max()) + size
    if low < 0 or high > shared.size:
        detail = f"wgmma operand reaches bytes {low} to {high} of {shared.size}"
        m.fault("memcheck shared", i, cta * m.threads, detail)
        address = np.clip(address, 0, shared.size - size)
    position = address + cta * shared.stride
    granules = np.unique(position // shared.granule)
    m.check_async_read(i, cta, granules)
    raw = shared.bytes.view(np.uint32 if size == 4 else np.uint16)[position // size]
    return widened(raw, kind), granules


@lru_cache(None)
def _accumulators(n: int) -> Array:
    """Flat index into [64, n] of (register, thread of the warpgroup)."""
    thread = np.arange(128)
    warp, group, member = thread // 32, thread % 32 // 4, thread % 4
    row, column = 16 * warp + group, 2 * member
    return np.array([(row + 8 * (r % 4 // 2)) * n + column + 8 * (r // 4) + r % 2 for r in range(n // 2)])


def wgmma(
    m: Lanes, i: int, n: int, kind: str, d: Sequence[Array], a: Sequence[Array] | Array, b: Array,
    keeps: Array | bool, transposed_a: bool, transposed_b: bool, names: tuple[tuple[str, ...], tuple[str, ...]],
    mask: Array | None,
) -> None:  # fmt: skip
    """wgmma.mma_async m64nNk8 and m64nNk16.

    Args:
        a: four registers, or a row of descriptors as `b` is.
        keeps: whether the accumulators are added to, else overwritten.
        names: of the accumulators, and of the registers of the left operand.
    """
    if m.threads != 128:
        raise NotImplementedError("wgmma with other than one warpgroup")
    k = 8 if kind == "tf32" else 16
    index = _accumulators(n)
    for cta in m.whole_ctas(i, mask):
        threads = slice(cta * 128, cta * 128 + 128)
        uniform = [row[threads] for row in (b, keeps, a) if isinstance(row, np.ndarray)]
        if any((row != row[0]).any() for row in uniform):
            m.fault(
                "wgmma operand", i, cta * 128, "an operand that must be uniform differs between threads of a warpgroup"
            )
        if isinstance(a, np.ndarray):
            left, of_left = _shared_operand(m, i, cta, int(a[threads][0]), 64, k, kind, transposed_a)
        else:
            words = _per_warp([row[threads] for row in a])
            left = widened(words, kind).reshape(4, -1)[:, _fragments(k, kind != "tf32")[0]].reshape(64, k)
            of_left = np.empty(0, np.int64)
        right, of_right = _shared_operand(m, i, cta, int(b[threads][0]), n, k, kind, transposed_b)
        old: Array | None = None
        if bool(keeps[threads][0]) if isinstance(keeps, np.ndarray) else keeps:
            old = np.empty(64 * n)
            old[index.reshape(-1)] = m.accumulators(cta, d, threads).reshape(-1)
            old = old.reshape(64, n)
        result = multiply(left, right.T, old, m.arch).reshape(-1)[index]
        m.issue_wgmma(cta, Pending(d, result, np.unique(np.concatenate([of_left, of_right])), *names), threads)
