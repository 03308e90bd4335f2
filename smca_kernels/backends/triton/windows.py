"""Which keys a block of queries needs: one window, a rectangle of cells, for each block and scale.

For a query with centre c and precision p let d be c's distance from k*, the image's nearest cell (channels.py), V the
number of cells, A ≥ |scale q·k| for all of their keys, and g_x = p_x ((x - c_x)² - d_x²) ≥ 0, g_y alike. The cells with

    g_x > t or g_y > t        where   t = log(min(V, M) / tolerance) + A - scale q·k*

hold at most `tolerance` of the query's softmax: docs/locality.md proves it, and says what M is. A query's window is the
rest, a rectangle around k*; that of a block is the smallest that holds those of its queries.

`survey_kernel` finds the largest norm of the keys of each patch of PATCH_H × PATCH_W cells, and an order of the queries
that makes neighbours of those that look at the same place: in strips across the image, alternately to the right and to
the left. `window_kernel` computes the windows. The forward and both backward passes read the same ones.

A plan holds both, [B, H, launch.plan_size] int32: N queries in order, then (x0, y0, x1, y1) of each block and scale, in
memory for the smallest blocks that there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import grid_of_scale, load_rows, nearest_cell, valid_part

PATCH_H = tl.constexpr(8)
PATCH_W = tl.constexpr(32)
EVERYWHERE = tl.constexpr(1e9)  # cells; farther than any grid reaches
FARTHEST = tl.constexpr(1e6)  # cells; beyond it fp32 no longer tells neighbouring cells apart
UNSPECIALIZED = [
    *("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "heads", "center_heads", "precision_heads", "queries", "keys"),
    *("scales", "patches_per_head", "widest", "scale", "log_tolerance", "plan_size"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit
def max_norm_of_patch(
    key, precision, patch, valid_shapes, b, key_padding_mask, queries, keys, scales, log_tolerance, stride,
    g0, g1, g2, g3, g4, g5, g6, g7, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest norm of a patch's keys that count; infinite if one is NaN, or where no prior is narrow enough to matter.

    `patch` counts through all scales.
    """
    s = 0
    first_key = 0
    height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    patches = tl.cdiv(height, PATCH_H) * tl.cdiv(width, PATCH_W)
    while patch >= patches:
        patch -= patches
        s += 1
        first_key += height * width
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        patches = tl.cdiv(height, PATCH_H) * tl.cdiv(width, PATCH_W)
    narrowest_x = tl.zeros([BLOCK_N], tl.float32)
    narrowest_y = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, queries, BLOCK_N):
        at = precision + (tl.minimum(start + tl.arange(0, BLOCK_N), queries - 1) * scales + s) * 2
        narrowest_x = tl.maximum(narrowest_x, tl.load(at))
        narrowest_y = tl.maximum(narrowest_y, tl.load(at + 1))
    # t is at least log_tolerance: here every query reaches the whole grid.
    falls_x = tl.max(narrowest_x, 0) * width * width
    falls_y = tl.max(narrowest_y, 0) * height * height
    norm = float("inf")
    if tl.maximum(falls_x, falls_y) > log_tolerance:
        norm = norm_of_cells(
            key, first_key, patch, s, height, width, valid_shapes, b, key_padding_mask, keys, scales, stride,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    return norm


@triton.jit
def norm_of_cells(
    key, first_key, patch, s, height, width, valid_shapes, b, key_padding_mask, keys, scales, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest norm of the keys of one patch of scale s that count."""
    i = tl.arange(0, PATCH_H * PATCH_W)
    x = patch % tl.cdiv(width, PATCH_W) * PATCH_W + i % PATCH_W
    y = patch // tl.cdiv(width, PATCH_W) * PATCH_H + i // PATCH_W
    valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
    ignored = (x >= valid_width) | (y >= valid_height)
    key_index = first_key + tl.minimum(y, height - 1) * width + tl.minimum(x, width - 1)
    if key_padding_mask is not None:
        ignored |= tl.load(key_padding_mask + b * keys + key_index) != 0
    k = load_rows(key, key_index, stride, HEAD_DIM, BLOCK_D).to(tl.float32)
    squared = tl.where(ignored, 0.0, tl.sum(k * k, 1))
    # A maximum would pass over NaN, which every query has to see.
    squared = tl.where(squared == squared, squared, float("inf"))
    return tl.sqrt(tl.max(squared, 0))


@triton.jit
def place_in_strips(x, y, n, lowest, highest, width, strips):
    """Sort keys of queries n < 2048, a distinct int32 for each: strip, place in it, number.

    Strips are rows between `lowest` and `highest`; every other one runs from right to left.
    """
    strip = tl.minimum(tl.floor((y - lowest) / (highest - lowest + 1e-6) * strips), strips - 1.0)
    backwards = strip - 2.0 * tl.floor(strip * 0.5)
    place = strip + tl.where(backwards != 0.0, width - 1.0 - x, x) / width
    return (place / strips * 1048575.0).to(tl.int32) * 2048 + n


@triton.jit
def load_cell(center, n, stride, last):
    """One coordinate of the centres of queries n, moved into the grid; 0 for NaN."""
    c = tl.load(center + n * stride)
    return tl.minimum(tl.maximum(tl.where(c == c, c, 0.0), 0.0), last)


@triton.jit
def order_queries(center, plan, block, queries, blocks, stride, height, width, BLOCK_N: tl.constexpr):
    """Store the queries of a block at their ranks: how many others come before them."""
    last_x = width - 1.0
    last_y = height - 1.0
    lowest = tl.full([BLOCK_N], EVERYWHERE, tl.float32)
    highest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, queries, BLOCK_N):
        y = load_cell(center + 1, tl.minimum(start + tl.arange(0, BLOCK_N), queries - 1), stride, last_y)
        lowest = tl.minimum(lowest, y)
        highest = tl.maximum(highest, y)
    lowest = tl.min(lowest, 0)
    highest = tl.max(highest, 0)
    # Blocks about as high as wide: strips / blocks of a strip = height / width.
    strips = tl.maximum(tl.floor(tl.sqrt(blocks.to(tl.float32) * height / width) + 0.5), 1.0)

    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.minimum(n, queries - 1)
    x = load_cell(center, at, stride, last_x)
    y = load_cell(center + 1, at, stride, last_y)
    place = place_in_strips(x, y, n, lowest, highest, width, strips)[:, None]
    before = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    for start in range(0, queries, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        at = tl.minimum(other, queries - 1)
        x = load_cell(center, at, stride, last_x)
        y = load_cell(center + 1, at, stride, last_y)
        of_other = place_in_strips(x, y, other, lowest, highest, width, strips)
        of_other = tl.where(other < queries, of_other, 2147483647)
        before += (of_other[None, :] < place).to(tl.int32)
    tl.store(plan + tl.sum(before, 1), n, mask=n < queries)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def survey_kernel(
    key,  # [B, H, T, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    norms,  # [B, H, patches_per_head] contiguous, fp32
    plan,  # [B, H, plan_size] contiguous, int32
    k_b, k_h, k_t,  # strides, in units of UNIT elements
    heads, center_heads, precision_heads, queries, keys, scales, patches_per_head, plan_size,
    widest,  # the scale of most keys
    log_tolerance,  # -log of the tolerance, positive
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_N)
    batch_head = tl.program_id(0) // (patches_per_head + blocks)
    i = tl.program_id(0) % (patches_per_head + blocks)
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    if i < patches_per_head:
        norm = max_norm_of_patch(
            key + (b * k_b + h * k_h) * UNIT,
            precision + (b * precision_heads + h % precision_heads) * queries * scales * 2,
            i, valid_shapes, b, key_padding_mask, queries, keys, scales, log_tolerance, k_t * UNIT,
            g0, g1, g2, g3, g4, g5, g6, g7, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        tl.store(norms + batch_head.to(tl.int64) * patches_per_head + i, norm)
    else:
        height, width = grid_of_scale(widest, g0, g1, g2, g3, g4, g5, g6, g7)
        order_queries(
            center + ((b * center_heads + h % center_heads) * queries * scales + widest) * 2,
            plan + batch_head.to(tl.int64) * plan_size,
            i - patches_per_head, queries, blocks, scales * 2, height, width, BLOCK_N,
        )  # fmt: skip


@triton.jit
def reach(p, d, t):
    """Distances to the left and right of the nearest cell within which g = p ((x - c)² - d²) ≤ t may hold."""
    beyond = tl.sqrt(d * d + t / tl.maximum(p, 1e-20))
    far = beyond + tl.abs(d)
    # beyond - |d|, which would cancel for a centre far outside.
    near = t / tl.maximum(p, 1e-20) / far
    # Also where a precision is not a number.
    near = tl.where(near < EVERYWHERE, near, EVERYWHERE)
    far = tl.where(far < EVERYWHERE, far, EVERYWHERE)
    return tl.where(d > 0.0, near, far), tl.where(d > 0.0, far, near)


@triton.jit
def cells_outside(p, other_p, log_tolerance):
    """Bounds e^t Σ e^-(g_x + g_y) over the cells beyond t along one axis; `other_p` is the other's precision."""
    falling = 1.0 - tl.exp(-2.0 * tl.sqrt(p * log_tolerance))
    return 2.0 / tl.maximum(falling, 1e-20) * (2.0 + tl.sqrt(3.1415927 / tl.maximum(other_p, 1e-20)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_kernel(
    query,  # [B, H, N, D]
    key,  # [B, H, T, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    norms,  # [B, H, patches_per_head] contiguous, fp32
    plan,  # [B, H, plan_size] contiguous, int32
    q_b, q_h, q_n, k_b, k_h, k_t,  # strides, in units of UNIT elements
    heads, center_heads, precision_heads, queries, keys, scales, patches_per_head, plan_size,
    scale, log_tolerance,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_N)
    s = tl.program_id(0) % scales
    block = tl.program_id(0) // scales % blocks
    batch_head = tl.program_id(0) // scales // blocks
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    plan += batch_head.to(tl.int64) * plan_size
    n = tl.load(plan + tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), queries - 1))

    first_key = 0
    first_patch = 0
    for of in range(s):
        height, width = grid_of_scale(of, g0, g1, g2, g3, g4, g5, g6, g7)
        first_key += height * width
        first_patch += tl.cdiv(height, PATCH_H) * tl.cdiv(width, PATCH_W)
    height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
    patches = tl.cdiv(height, PATCH_H) * tl.cdiv(width, PATCH_W)
    largest = tl.zeros([64], tl.float32)
    for start in range(0, patches, 64):
        i = start + tl.arange(0, 64)
        at = norms + batch_head.to(tl.int64) * patches_per_head + first_patch + i
        largest = tl.maximum(largest, tl.load(at, mask=i < patches, other=0.0))
    largest_norm = tl.max(largest, 0)

    center += ((b * center_heads + h % center_heads) * queries + n) * scales * 2 + s * 2
    precision += ((b * precision_heads + h % precision_heads) * queries + n) * scales * 2 + s * 2
    c_x = tl.load(center)
    c_y = tl.load(center + 1)
    p_x = tl.load(precision)
    p_y = tl.load(precision + 1)
    nearest_x = nearest_cell(c_x, valid_width)
    nearest_y = nearest_cell(c_y, valid_height)
    # Also an index for a centre that is not a number.
    column = tl.minimum(tl.maximum(nearest_x, 0.0), width - 1.0).to(tl.int32)
    row = tl.minimum(tl.maximum(nearest_y, 0.0), height - 1.0).to(tl.int32)
    nearest = first_key + tl.minimum(tl.maximum(row * width + column, 0), height * width - 1)
    q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D).to(tl.float32)
    k = load_rows(key + (b * k_b + h * k_h) * UNIT, nearest, k_t * UNIT, HEAD_DIM, BLOCK_D).to(tl.float32)

    # 1 % covers the rounding of norms and logits, TF32's among them.
    bound = 1.01 * tl.abs(scale) * tl.sqrt(tl.sum(q * q, 1)) * largest_norm
    outside = cells_outside(p_x, p_y, log_tolerance) + cells_outside(p_y, p_x, log_tolerance)
    outside = tl.minimum(outside, valid_height.to(tl.float32) * valid_width)
    t = log_tolerance + tl.log(tl.maximum(outside, 1.0)) + bound - scale * tl.sum(q * k, 1) + 0.004
    t = tl.where(t < EVERYWHERE, t, EVERYWHERE)
    left, right = reach(p_x, c_x - nearest_x, t)
    up, down = reach(p_y, c_y - nearest_y, t)
    known = (tl.abs(c_x) < FARTHEST) & (tl.abs(c_y) < FARTHEST) & (t < EVERYWHERE)
    if key_padding_mask is not None:
        known &= tl.load(key_padding_mask + b * keys + nearest) == 0

    # A quarter of a cell on each side covers the rounding of `reach`.
    x0 = tl.min(tl.where(known, tl.maximum(tl.ceil(nearest_x - left - 0.25), 0.0), 0.0), 0).to(tl.int32)
    y0 = tl.min(tl.where(known, tl.maximum(tl.ceil(nearest_y - up - 0.25), 0.0), 0.0), 0).to(tl.int32)
    x1 = tl.max(tl.where(known, tl.minimum(tl.floor(nearest_x + right + 0.25) + 1.0, width), width), 0).to(tl.int32)
    y1 = tl.max(tl.where(known, tl.minimum(tl.floor(nearest_y + down + 0.25) + 1.0, height), height), 0).to(tl.int32)
    x1 = tl.minimum(x1, valid_width)
    y1 = tl.minimum(y1, valid_height)
    at = plan + queries + (block * scales + s) * 4
    tl.store(at, tl.minimum(x0, x1))
    tl.store(at + 1, tl.minimum(y0, y1))
    tl.store(at + 2, x1)
    tl.store(at + 3, y1)
