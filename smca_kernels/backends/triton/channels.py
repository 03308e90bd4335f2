"""The prior as sixteen more channels, and what else the forward and backward kernels share: keys, windows, dropout.

A block of queries looks at a window of each scale's grid, a rectangle of cells, and all positions there are counted
from one cell, the window's middle. With x and y so counted, e the query's centre, n its nearest cell of the image,

    -logG = p_x (x² - 2 e_x x) + p_y (y² - 2 e_y y) + base,    base = p_x n_x (2 e_x - n_x) + p_y n_y (2 e_y - n_y)

up to a constant per query and scale: at its nearest cell a query's prior is 1, so that no large number common to a row
costs precision, however far outside its centre lies. That is a dot product of sixteen numbers of the query, constant
over the scale, with sixteen of the key which depend on its position alone. It joins q·k as one more product:

    channels     0, 1        2, 3       4, 5      6             7         8–13             14, 15
    coefficient  -p_x        -p_x       2 p_x e_x -base, term 0 -MASKED   as 0–5, of y     -base, terms 1 and 2
    feature      high of x²  low of x²  x         1             ignored?  as 0–5, of y     1

Both are float16 for inputs of both half-precision dtypes. A position is at most 255 cells, and its square is the sum of
a multiple of 256 and the rest, both exact; a coefficient is the sum of two float16 terms, the base of three. The base
is made of the other coefficients as float16 holds them: what it loses is nothing at the nearest cell, and little where
a narrow prior has its mass. Squares are divided by 256 and ones multiplied by 16, coefficients the other way, against
what float16 loses below 2⁻²⁴; all coefficients are divided by the softmax scale. The features of a key are two rows of
`launch.position_table`.

The expansion cancels, and the tensor cores cut its terms at 2⁻²⁴ of the largest (sm_80; at 2⁻²⁵ on sm_90). Blocks where
that is too much (`is_direct`), and all fp32 inputs, take the direct path: the prior evaluated for each pair of query
and key.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SCALE_TILES = tl.constexpr(3)  # what it costs a split to start a scale
MAX_SIDE = tl.constexpr(511)  # cells of a window that positions are exact in
MIDDLE = tl.constexpr(256)  # row of position 0 in the table; row 0 is that of a key that does not count
AXIS_ROWS = tl.constexpr(512)
SQUARE_UNIT = tl.constexpr(256.0)
ONE_UNIT = tl.constexpr(16.0)
MASKED = tl.constexpr(65504.0)  # squared, the logit of a key that does not count, over the softmax scale
NOTHING = tl.constexpr(-1e9)  # where a running maximum starts: between that and all logits, over the softmax scale


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc, accumulated in fp32.

    The interpreter leaves sums to numpy, whose order changes with the shapes and layouts of a and b, while a GPU's does
    not: the backward could not compute the forward's logits again. There sums are made in float64 and rounded once.
    """
    if INTERPRETED:
        total = tl.dot(a.to(tl.float64), b.to(tl.float64), None if acc is None else acc.to(tl.float64))
        return total.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def precise_dot(a, b, acc, PRECISION: tl.constexpr):
    """`dot` for sums that may be of one product, or cancel: tf32x3 errs by up to 2⁻²¹ of a product, bf16x6 as fp32."""
    if PRECISION == "tf32x3":
        return dot(a, b, acc, "bf16x6")
    else:
        return dot(a, b, acc, PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in the dtype of an operand; the interpreter would cut fp32 off to bfloat16 where a GPU rounds to nearest."""
    if INTERPRETED and x.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


# --- rows of a matrix ---


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
def wide_product(a, b):
    """a · b in int64, of an int32 and a stride: one instruction where that is an int32, too.

    The compiler would widen b once before a loop, and multiply 64 bits in it.
    """
    if INTERPRETED or b.dtype == tl.int64:
        return a.to(tl.int64) * b
    return tl.inline_asm_elementwise("mul.wide.s32 $0, $1, $2;", "=l,r,r", [a, b], dtype=tl.int64, is_pure=True, pack=1)


@triton.jit
def store_rows(base, rows, stride, values, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(at, rounded(values, base.dtype.element_ty), mask=mask[:, None] & (d[None, :] < HEAD_DIM))


# --- which keys: grids, windows and runs of them ---


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
def tiles_to_share(tiles):
    """Tiles of a scale, with those that it costs as much as to start one."""
    return tl.where(tiles > 0, tiles + SCALE_TILES, 0)


@triton.jit
def tiles_of_block(
    plan, queries, block, valid_shapes, b, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS: tl.constexpr,
):  # fmt: skip
    """What the splits of a block share: tiles of KEYS keys that cover its windows, and what all its scales cost."""
    tiles = 0
    for s in range(scales):
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        height, width = valid_part(valid_shapes, b, s, scales, height, width)
        x0, y0, x1, y1 = window_of_block(plan, queries, block, s, scales, height, width)
        tiles += tiles_to_share(tl.cdiv((x1 - x0) * (y1 - y0), KEYS))
    return tiles


@triton.jit
def splits_in_use(all_tiles, splits):
    """Splits that have a run: of fewer tiles than splits, one each."""
    return tl.maximum(tl.minimum(all_tiles, splits), 1)


@triton.jit
def run_of_split(all_tiles, split, splits, before, tiles):
    """First tile and number of those that a split takes of a scale which has `tiles`, with `before` shared before it.

    A split has an equal run of all tiles of all scales, one after the other. Tiles are fewer than 2³¹ / MAX_SPLITS.
    """
    splits = splits_in_use(all_tiles, splits)
    start = before + SCALE_TILES
    first = all_tiles * split // splits - start
    end = all_tiles * (split + 1) // splits - start
    first = tl.minimum(tl.maximum(first, 0), tiles)
    return first, tl.minimum(tl.maximum(end, 0), tiles) - first


@triton.jit
def next_cells(x, y, cell, x1, across, width, STEP: tl.constexpr):
    """The cells that are STEP further in a window `across` cells wide, row by row, and their numbers in the grid."""
    x += STEP % across
    past = x >= x1
    x = tl.where(past, x - across, x)
    cell += STEP % across + STEP // across * width + tl.where(past, width - across, 0)
    return x, y + STEP // across + past.to(tl.int32), cell


@triton.jit
def load_keys(
    key, value, key_padding_mask, cell, last_cell, counts, k_t, v_t,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys and values [KEYS, BLOCK_D] of cells, their numbers, and `counts` less those that are ignored."""
    key_index = tl.minimum(cell, last_cell)
    of_key = wide_product(key_index, k_t)
    of_value = wide_product(key_index, v_t)
    if key_padding_mask is None:
        k = load_rows(key, of_key, UNIT, HEAD_DIM, BLOCK_D)
        v = load_rows(value, of_value, UNIT, HEAD_DIM, BLOCK_D)
    else:
        counts &= tl.load(key_padding_mask + key_index) == 0
        k = load_rows(key, of_key, UNIT, HEAD_DIM, BLOCK_D, counts)
        v = load_rows(value, of_value, UNIT, HEAD_DIM, BLOCK_D, counts)
    return k, v, key_index, counts


# --- the prior ---


@triton.jit
def nearest_cell(c, side):
    """The cell, of an image's `side` along one axis, that is nearest to a centre; as fp32."""
    return tl.floor(tl.minimum(tl.maximum(c, 0.0), side - 1.0) + 0.5)


@triton.jit
def fp16_terms(x):
    """Two float16 numbers, still in fp32, whose sum is x but for little."""
    first = x.to(tl.float16).to(tl.float32)
    return first, (x - first).to(tl.float16).to(tl.float32)


@triton.jit
def prior_coefficients(p_x, p_y, e_x, e_y, n_x, n_y, log_sum):
    """Coefficients [ROWS, 16] float16 of -logG + log_sum; n and the centre e are counted from the origin.

    All arguments are [ROWS], p and log_sum already divided by the softmax scale.
    """
    square_x, square_x_rest = fp16_terms(p_x * -SQUARE_UNIT)
    square_y, square_y_rest = fp16_terms(p_y * -SQUARE_UNIT)
    linear_x, linear_x_rest = fp16_terms(2.0 * p_x * e_x)
    linear_y, linear_y_rest = fp16_terms(2.0 * p_y * e_y)
    # Of the terms as they are, so that what float16 loses is nothing at the nearest cell, and little around it.
    of_x = n_x * (linear_x + linear_x_rest + (square_x + square_x_rest) * (n_x / SQUARE_UNIT))
    of_y = n_y * (linear_y + linear_y_rest + (square_y + square_y_rest) * (n_y / SQUARE_UNIT))
    base = (of_x + of_y + log_sum) * (-1.0 / ONE_UNIT)
    base_0, _ = fp16_terms(base)
    base_1, base_2 = fp16_terms(base - base_0)

    i = tl.arange(0, 16)[None, :]
    is_x = i < 8
    first = i % 2 == 0
    square = tl.where(first, tl.where(is_x, square_x[:, None], square_y[:, None]),
                      tl.where(is_x, square_x_rest[:, None], square_y_rest[:, None]))  # fmt: skip
    linear = tl.where(first, tl.where(is_x, linear_x[:, None], linear_y[:, None]),
                      tl.where(is_x, linear_x_rest[:, None], linear_y_rest[:, None]))  # fmt: skip
    of_base = tl.where(is_x, base_0[:, None], tl.where(first, base_1[:, None], base_2[:, None]))
    values = tl.where(i % 8 < 4, square, tl.where(i % 8 < 6, linear, of_base))
    return tl.where(i == 7, -MASKED, values).to(tl.float16)


@triton.jit
def load_features(positions, x, y, counts, BFLOAT16: tl.constexpr = False):
    """Features [KEYS, 16] of keys at x, y [KEYS] from the origin, or those of keys that don't count."""
    i = tl.arange(0, 16)[None, :]
    row_x = tl.where(counts, x + MIDDLE, 0)
    row_y = tl.where(counts, y + MIDDLE, 0) + AXIS_ROWS
    row = tl.where(i < 8, row_x[:, None], row_y[:, None])
    at = positions + tl.multiple_of(row * 8, [1, 8]) + i % 8
    if BFLOAT16:  # the table's other half
        at = (at + 2 * AXIS_ROWS * 8).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    # Through the L1 cache, which asynchronous copies of 16 bytes pass by unless told otherwise: all programs read the
    # same few lines, and the slices of the L2 cache that have them would serve one SM after the other.
    return tl.load(at, cache_modifier=".ca")


@triton.jit
def largest_term(p, e, n, side):
    """The largest term of one axis of the expanded prior, in a window of `side` cells."""
    reach = tl.maximum(side * 0.5, 1.0)
    return p * tl.maximum(reach * tl.maximum(reach, 2.0 * tl.abs(e)), tl.abs(n * (2.0 * e - n)))


@triton.jit
def is_direct(p_x, p_y, e_x, e_y, n_x, n_y, across, down, inverse_scale, limit):
    """Whether a block of queries has to take the direct path in a window of `across` × `down` cells.

    It does where for a query a term of the expanded prior may exceed `limit`, or overflow float16.
    """
    of_x = largest_term(p_x, e_x, n_x, across)
    of_y = largest_term(p_y, e_y, n_y, down)
    # One comparison each: a maximum would pass over what is not a number.
    fits = (of_x <= limit) & (of_y <= limit) & (across <= MAX_SIDE) & (down <= MAX_SIDE)
    # The base, stored by units of ONE_UNIT, is both and a log-sum-exp at most; then the other coefficients.
    fits &= (of_x * inverse_scale < 0.25 * ONE_UNIT * MASKED) & (of_y * inverse_scale < 0.25 * ONE_UNIT * MASKED)
    linear = tl.maximum(p_x * tl.abs(e_x), p_y * tl.abs(e_y))
    fits &= tl.maximum(SQUARE_UNIT * tl.maximum(p_x, p_y), 2.0 * linear) * inverse_scale < MASKED
    return warp_any(tl.max((~fits).to(tl.int32), 0))


@triton.jit
def direct_logits(products, log2_scale, p_x, p_y, x, y, d_x, d_y):
    """Logits in base 2 of products q·k and the prior of each pair; all arguments broadcast.

    Keys x, y and centres d_x, d_y are counted from a query's nearest cell, so that an axis of -logG is p (x² - 2 d x).
    Forward and backward must round alike here: of what both are off by, a softmax cancels nearly all.
    """
    logits = products * log2_scale
    logits -= p_x * (x * (x - 2.0 * d_x))
    logits -= p_y * (y * (y - 2.0 * d_y))
    return logits


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
def warp_any_5_bits(count):
    """A number below 32 that all threads agree on, made uniform bit by bit with `warp_any`."""
    result = 0
    for bit in tl.static_range(5):
        result += warp_any(count & (1 << bit)) << bit
    return result


@triton.jit
def opaque(number):
    """Hide an int32's origin from the compiler: what depends on it is computed again, not kept through the loops."""
    if INTERPRETED:
        return number
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1)


# --- dropout ---


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
