"""Arithmetic that the forward and backward kernels share: grids, key tiles, the prior, dropout.

A key tile is TILE_H × TILE_W cells of one scale's grid. Its cells have tile-local coordinates (u, v), counted from the
tile's middle, and e = c - middle is the query's centre seen from there. Up to a constant per query and scale,

    -logG = p_x ((u - e_x)² - d_x²) + p_y ((v - e_y)² - d_y²)

where d, the centre's distance from the image's nearest cell, makes the prior 1 there: no large number common to a row
costs precision, however far outside a centre lies. Expanded, it is a dot product of query coefficients with key
features, so it rides the tensor cores as a product of rank 16:

    columns      0–2          3–5            6–7            8–10         11–13          14            15
    coefficient  -p_x         2 p_x e_x      -base          -p_y         2 p_y e_y      -base         -MASKED
    feature      u²           u              1              v²           v              1             key is ignored

    base = p_x (e_x² - d_x²) + p_y (e_y² - d_y²), plus the log-sum-exp in the backward passes

The features are exact in bfloat16. A coefficient is split into three bfloat16 terms, which hold all of its 24 bits:
one per column, those of the base in columns 6, 7 and 14. All are divided by the softmax scale, as they join q·k.

The expansion cancels: its terms reach 120 p where the log-prior is near 0, and fp32 sums them to 2⁻²³ of that. Beyond
a precision limit (`launch.PRECISION_LIMITS`), and for all fp32 inputs, the kernels take the direct path: the prior is a
function of (query, x) plus one of (query, y), evaluated on the ALU. Edges and padding ride the product on both paths.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(1e30)
UPPER_HALF = tl.constexpr(-65536)  # 0xFFFF0000: the bits of an fp32 value that a bfloat16 keeps


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc, accumulated in fp32. The interpreter has no bfloat16 arithmetic, so operands widen there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7):
    """(height, width) of scale s; each g packs height << 32 | width."""
    packed = tl.where(s == 1, g1, g0)
    packed = tl.where(s == 2, g2, packed)
    packed = tl.where(s == 3, g3, packed)
    packed = tl.where(s == 4, g4, packed)
    packed = tl.where(s == 5, g5, packed)
    packed = tl.where(s == 6, g6, packed)
    packed = tl.where(s == 7, g7, packed)
    return (packed >> 32).to(tl.int32), (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def valid_part(valid_shapes, b, s, scales, height, width):
    """The top-left (height, width) of scale s that is image, clamped to the grid."""
    # In an `else`: Triton compiles what follows a return.
    if valid_shapes is None:
        return height, width
    else:
        at = valid_shapes + (b * scales + s) * 2
        valid_height = tl.load(at).to(tl.int32)
        valid_width = tl.load(at + 1).to(tl.int32)
        return tl.minimum(tl.maximum(valid_height, 0), height), tl.minimum(tl.maximum(valid_width, 0), width)


@triton.jit
def queries_of_block(plan, block, queries, BLOCK_N: tl.constexpr):
    """The queries [BLOCK_N] of a block, in the order of a plan (windows.py) if there is one, and which are real."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    real = n < queries
    n = tl.minimum(n, queries - 1)
    if plan is not None:
        n = tl.load(plan + n)
    return n, real


@triton.jit
def window_of_block(plan, queries, block, s, scales, valid_height, valid_width):
    """The cells (x0, y0, x1, y1) of scale s that a block of queries looks at: windows.py. Without a plan, all."""
    if plan is None:
        return 0, 0, valid_width, valid_height
    else:
        at = plan + queries + (block * scales + s) * 4
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def warp_any(flag):
    """Whether an int32 that all threads agree on isn't 0, as a warp vote: the compiler sees that it is uniform."""
    if INTERPRETED:
        return (flag != 0).to(tl.int32)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.s32 $0, 1, 0, p; }",
        "=r,r", [flag], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def opaque(number):
    """Hide an int32's origin from the compiler: what depends on it is computed again, not kept through the loops."""
    if INTERPRETED:
        return number
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def warp_any_5_bits(count):
    """A number below 32 that all threads agree on, made uniform bit by bit with `warp_any`."""
    result = 0
    for bit in tl.static_range(5):
        result += warp_any(count & (1 << bit)) << bit
    return result


@triton.jit
def load_rows(base, rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, counts=None):
    """Rows [ROWS] of a matrix whose last axis is contiguous → [ROWS, BLOCK_D], zero beyond HEAD_DIM.

    A row that does not count is loaded as zeros: a weight of 0 times NaN would be NaN.
    """
    d = tl.arange(0, BLOCK_D)
    at = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    if HEAD_DIM == BLOCK_D:
        if counts is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=counts[:, None], other=0.0)
    else:
        mask = d[None, :] < HEAD_DIM
        if counts is not None:
            mask = mask & counts[:, None]
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, stride, values, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=mask[:, None] & (d[None, :] < HEAD_DIM))


@triton.jit
def upper_half(x):
    """The fp32 value of the leading bfloat16 term of x."""
    return (x.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)


@triton.jit
def as_bfloat16(x):
    """Truncate x to bfloat16: one byte permutation for two values, where a conversion would round."""
    if INTERPRETED:
        return upper_half(x).to(tl.bfloat16)
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split_term(x, term):
    """Term 0, 1 or 2 of x = t0 + t1 + t2, each with at most 8 significant bits."""
    t0 = upper_half(x)
    rest = x - t0
    t1 = upper_half(rest)
    return tl.where(term == 0, t0, tl.where(term == 1, t1, rest - t1))


@triton.jit
def force_row_layout(values, pointer, always_false):
    """Lay out `values` [ROWS, 16] so that a thread owns eight neighbouring columns.

    Triton gives a tensor the layout of the load that it comes from. This load reads nothing, as its mask is never
    true: it makes every column's formula a compile-time choice, and stores to shared memory 16 bytes wide.
    """
    if INTERPRETED:
        return values
    row = tl.arange(0, values.shape[0])
    column = tl.arange(0, 16)
    at = pointer.to(tl.pointer_type(tl.bfloat16), bitcast=True) + row[:, None] * 16 + column[None, :]
    return tl.load(at, mask=always_false, other=values)


@triton.jit
def tile_coordinates(TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Column and row of each key inside its tile: two int32 vectors [TILE_H · TILE_W]."""
    i = tl.arange(0, TILE_H * TILE_W)
    return i % TILE_W, i // TILE_W


@triton.jit
def from_middle(cell, SIDE: tl.constexpr):
    return cell.to(tl.float32) - (SIDE - 1) / 2


@triton.jit
def tile_features(TILE_H: tl.constexpr, TILE_W: tl.constexpr, pointer, always_false):
    """Features [TILE_H · TILE_W, 16] of a tile's keys, with the last column still 0."""
    column, row = tile_coordinates(TILE_H, TILE_W)
    i = tl.arange(0, 16)[None, :]
    w = tl.where(i < 8, from_middle(column, TILE_W)[:, None], from_middle(row, TILE_H)[:, None])
    features = tl.where(i % 8 < 3, w * w, tl.where(i % 8 < 6, w, tl.where(i == 15, 0.0, 1.0)))
    return force_row_layout(features.to(tl.bfloat16), pointer, always_false)


@triton.jit
def mark_ignored(features, ignored):
    """Features whose last column says which keys [KEYS] do not count."""
    last = tl.arange(0, 16)[None, :] == 15
    return tl.where(last & ignored[:, None], 1.0, features.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def fixed_coefficients(p_x, p_y, pointer, always_false):
    """The coefficients that no tile changes, [ROWS, 16]: those of u², v² and of ignored keys."""
    i = tl.arange(0, 16)[None, :]
    p = tl.where(i < 8, p_x[:, None], p_y[:, None])
    coefficients = tl.where(i % 8 < 3, split_term(-p, i % 8), tl.where(i == 15, -MASKED, 0.0))
    return force_row_layout(as_bfloat16(coefficients), pointer, always_false)


@triton.jit
def tile_coefficients(fixed, p_x, p_y, e_x, e_y, base):
    """All coefficients [ROWS, 16] for one tile; p, e and base are [ROWS], p and base already divided by the scale."""
    i = tl.arange(0, 16)[None, :]
    linear = 2.0 * tl.where(i < 8, p_x[:, None], p_y[:, None]) * tl.where(i < 8, e_x[:, None], e_y[:, None])
    of_base = split_term(tl.broadcast_to(-base[:, None], linear.shape), i % 8 - 6 + 2 * (i // 8))
    moving = tl.where(i % 8 < 6, split_term(linear, i % 8 - 3), of_base)
    return tl.where((i % 8 < 3) | (i == 15), fixed, as_bfloat16(moving))


@triton.jit
def from_nearest_cell(c, side):
    """d: a centre's signed distance from the nearest of an image's `side` cells along one axis."""
    return c - tl.floor(tl.minimum(tl.maximum(c, 0.0), side - 1.0) + 0.5)


@triton.jit
def base_of_tile(p_x, p_y, e_x, e_y, d_x, d_y):
    # Factored, as squares of a centre far outside would leave their rounding in every row.
    return p_x * ((e_x - d_x) * (e_x + d_x)) + p_y * ((e_y - d_y) * (e_y + d_y))


@triton.jit
def direct_prior(p, x, c, d):
    """p ((x - c)² - d²): one axis of -logG on the direct path; the arguments broadcast."""
    return p * ((x - c - d) * (x - c + d))


@triton.jit
def mix(x):
    """A bijection of uint32 whose output bits each depend on every input bit (two multiplications, three shifts)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def dropout_row_key(seed, batch_head, queries):
    """What a query's row [ROWS] adds to the dropout counter: uint32, from the 64-bit seed, batch · head and query."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(queries.to(tl.uint32) ^ mix(batch_head.to(tl.uint32) ^ low)) ^ high


@triton.jit
def dropout_key_key(keys):
    """What a key [KEYS] adds to the dropout counter."""
    return keys.to(tl.uint32) * 0x9E3779B9


@triton.jit
def keeps(row_key, key_key, threshold):
    """Whether each element stays; both keys broadcast. threshold = round(dropout_p · 2³²) - 2³¹."""
    return mix(row_key ^ key_key).to(tl.int32, bitcast=True) >= threshold
