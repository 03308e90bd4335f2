"""Key-major pass of the backward: the gradients of key and value. A program owns KEYS keys of a scale.

    dv = Σ_n P dO',   dk = scale Σ_n dS q        P, dO', dS: prepare.py

Its loop is over the blocks of queries that look at its keys, in a fixed order: of every 30 blocks first those whose
prior is a product with the features, then those that take the direct path. Where tiles of keys are too few to fill the
device, splits share one, as in the forward: merge.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import (
    LOG2E,
    direct_logits,
    dot,
    dropout_key_key,
    dropout_row_key,
    grid_of_scale,
    keeps,
    load_features,
    load_rows,
    nearest_cell,
    opaque,
    precise_dot,
    rounded,
    store_rows,
    valid_part,
    warp_any_5_bits,
    window_of_block,
)
from smca_kernels.backends.triton.prepare import (
    CENTER_X,
    CENTER_Y,
    DELTA,
    LOG_SUM,
    PRECISION_X,
    PRECISION_Y,
    TERMS,
    UNSPECIALIZED,
)

STRIP = tl.constexpr(8)  # rows of cells whose keys follow each other, column by column, in the key-major pass


@triton.jit
def cells_in_strips(t, height, width):
    """Column and row of keys t of a part of a grid, counted in strips of STRIP rows, each column by column."""
    strip = t // (STRIP * width)
    within = t - strip * (STRIP * width)
    rows = tl.maximum(tl.minimum(height - strip * STRIP, STRIP), 1)
    column = within // rows
    return column, strip * STRIP + within - column * rows


@triton.jit
def keys_of_tile(tile, first_key, valid_height, valid_width, width, KEYS: tl.constexpr):
    """Column, row and number of the keys of a tile of a scale, and which are real."""
    t = tile * KEYS + tl.arange(0, KEYS)
    count = valid_height * valid_width
    x, y = cells_in_strips(tl.minimum(t, tl.maximum(count, 1) - 1), valid_height, tl.maximum(valid_width, 1))
    return x, y, first_key + y * width + x, t < count


@triton.jit
def invalid_cells(u, valid_height, valid_width, width):
    """Column and row of the cells u of a grid that are not in its valid part: those to the right of it, then below."""
    below = u - valid_height * (width - valid_width)
    cell = tl.where(below >= 0, below, u)
    across = tl.where(below >= 0, width, tl.maximum(width - valid_width, 1))
    row = cell // across
    column = cell - row * across
    return tl.where(below >= 0, column, valid_width + column), tl.where(below >= 0, valid_height + row, row)


@triton.jit
def blocks_that_see(
    plan, direct_blocks, direct, first, end, queries, s, scales, x0, y0, x1, y1, WITH_PLAN: tl.constexpr,
):  # fmt: skip
    """Which of up to 30 blocks of queries from `first` on look at some cells, on one path: as bits, and how many.

    The cells are within the rectangle x0, y0, x1, y1.
    """
    i = tl.arange(0, 32)
    block = first + i
    exists = (i < 30) & (block < end)
    sees = exists & (tl.load(direct_blocks + block, mask=exists, other=2) == direct)
    if WITH_PLAN:
        at = plan + queries + (block * scales + s) * 4
        sees &= (tl.load(at, mask=exists, other=0) < x1) & (x0 < tl.load(at + 2, mask=exists, other=0))
        sees &= (tl.load(at + 1, mask=exists, other=0) < y1) & (y0 < tl.load(at + 3, mask=exists, other=0))
    sees = sees.to(tl.int32)
    return tl.sum(sees << i, 0), warp_any_5_bits(tl.sum(sees, 0))


@triton.jit
def lowest_bit(bits):
    """Number of the lowest bit that is set in an int32: the exponent of its value as fp32."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_major_kernel(
    ordered_query,  # [B, H, rows, D] contiguous
    key,  # [B, H, T, D]
    value,  # [B, H, T, D]
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    seed,  # [1] int64, or None without dropout
    plan,  # [B, H, plan_size] contiguous int32 (windows.py), or None: every query sees every key
    positions,  # the features of positions, float16: launch.position_table
    weighted_grads,  # dO' [B, H, S, rows, D] contiguous
    terms,  # [B, H, S, blocks, TERMS, BLOCK_N] contiguous, fp32
    coefficients,  # [B, H, S, rows, 16] contiguous, float16
    direct_blocks,  # [B, H, S, blocks] contiguous, int32
    grad_key,  # [B, H, T, D]
    grad_value,  # [B, H, T, D]
    partial_keys,  # [splits, B, H, T, D] contiguous, fp32, or None for one program a tile
    partial_values,  # [splits, B, H, T, D] contiguous, fp32, or None
    k_b, k_h, k_t, v_b, v_h, v_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,  # strides, in units of UNIT elements
    heads, queries, keys, scales, tiles_per_head, plan_size, scale, log2_scale, dropout_threshold,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    TILE_N: tl.constexpr,  # queries of a tile, a part of BLOCK_N
    DIRECT_N: tl.constexpr,  # the same on the direct path, which keeps seven numbers for each
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECT_ONLY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_N)
    rows = blocks * BLOCK_N
    batch_head = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    b = batch_head // heads
    h = batch_head % heads

    # The tile that this program owns: its scale, and that scale's first key.
    tile = tl.program_id(0) % tiles_per_head
    s = 0
    first_key = 0
    height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    while tile >= tl.cdiv(height * width, KEYS):
        tile -= tl.cdiv(height * width, KEYS)
        s += 1
        first_key += height * width
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
    x, y, key_index, real = keys_of_tile(tile, first_key, valid_height, valid_width, width, KEYS)
    counts = real
    if key_padding_mask is not None:
        counts &= tl.load(key_padding_mask + b * keys + key_index) == 0
    k = load_rows(key + (b * k_b + h * k_h) * UNIT, key_index, k_t * UNIT, HEAD_DIM, BLOCK_D, counts)
    v = load_rows(value + (b * v_b + h * v_h) * UNIT, key_index, v_t * UNIT, HEAD_DIM, BLOCK_D, counts)
    if seed is not None:
        drop_seed = tl.load(seed)

    of_scale = batch_head * scales + s
    ordered_query += batch_head * rows * HEAD_DIM
    weighted_grads += of_scale * rows * HEAD_DIM
    coefficients += of_scale * rows * 16
    terms += of_scale * rows * TERMS
    direct_blocks += of_scale * blocks
    if plan is not None:
        plan += batch_head * plan_size
    x0 = tl.min(x, 0)
    y0 = tl.min(y, 0)
    x1 = tl.max(x, 0) + 1
    y1 = tl.max(y, 0) + 1
    origin_x = valid_width // 2
    origin_y = valid_height // 2
    features = load_features(positions, x - origin_x, y - origin_y, counts)

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    # A tile outside the image has no work, only zeros to write.
    end = tl.where(tile * KEYS < valid_height * valid_width, blocks, 0)
    begin = 0
    if partial_keys is not None:
        begin = end * tl.program_id(1) // tl.num_programs(1)
        end = end * (tl.program_id(1) + 1) // tl.num_programs(1)
    for chunk in range(begin, end, 30):
        for DIRECT in tl.static_range(DIRECT_ONLY, 2):
            todo, seeing = blocks_that_see(
                plan, direct_blocks, DIRECT, chunk, end, queries, s, scales, x0, y0, x1, y1, plan is not None
            )
            for i in tl.range(
                seeing * (BLOCK_N // (DIRECT_N if DIRECT else TILE_N)), num_stages=1 if DIRECT else STAGES
            ):
                first = i * (DIRECT_N if DIRECT else TILE_N) % BLOCK_N
                block = chunk + lowest_bit(todo)
                todo = tl.where(first + (DIRECT_N if DIRECT else TILE_N) == BLOCK_N, todo & (todo - 1), todo)
                part = first + tl.arange(0, DIRECT_N if DIRECT else TILE_N)
                n = block * BLOCK_N + part
                of_terms = terms + block * TERMS * BLOCK_N + part
                q = load_rows(ordered_query, n, HEAD_DIM, HEAD_DIM, BLOCK_D)
                do = load_rows(weighted_grads, n, HEAD_DIM, HEAD_DIM, BLOCK_D)
                delta = tl.load(of_terms + DELTA * BLOCK_N)
                if plan is not None:
                    # A key outside a block's window has no part in its softmax.
                    left, top, right, bottom = window_of_block(plan, queries, block, s, scales, 0, 0)
                # [KEYS, TILE_N or DIRECT_N]
                logits = dot(k, tl.trans(q), None, PRECISION)
                if DIRECT:
                    p_x = tl.load(of_terms + PRECISION_X * BLOCK_N) * LOG2E
                    p_y = tl.load(of_terms + PRECISION_Y * BLOCK_N) * LOG2E
                    c_x = tl.load(of_terms + CENTER_X * BLOCK_N)
                    c_y = tl.load(of_terms + CENTER_Y * BLOCK_N)
                    n_x = nearest_cell(c_x, valid_width)
                    n_y = nearest_cell(c_y, valid_height)
                    log_sum = tl.load(of_terms + LOG_SUM * BLOCK_N)
                    # Here and below, computed again rather than kept through the loops.
                    column, line, of_grid, inside = keys_of_tile(
                        opaque(tile), first_key, valid_height, valid_width, width, KEYS
                    )
                    if key_padding_mask is not None:
                        inside &= tl.load(key_padding_mask + b * keys + of_grid) == 0
                    if plan is not None:
                        inside &= (column >= left) & (column < right) & (line >= top) & (line < bottom)
                    from_x = column.to(tl.float32)[:, None] - n_x[None, :]
                    from_y = line.to(tl.float32)[:, None] - n_y[None, :]
                    logits = direct_logits(
                        logits, log2_scale,
                        p_x[None, :], p_y[None, :], from_x, from_y, (c_x - n_x)[None, :], (c_y - n_y)[None, :],
                    )  # fmt: skip
                    p = tl.where(inside[:, None], tl.exp2(logits - log_sum[None, :]), 0.0)
                else:
                    prior = tl.load(coefficients + n[:, None] * 16 + tl.arange(0, 16)[None, :])
                    logits = dot(features, tl.trans(prior), logits, PRECISION)
                    if plan is None:
                        p = tl.exp2(logits * log2_scale)
                    else:
                        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
                        p = tl.exp2(logits * log2_scale + tl.where(inside, 0.0, -1e30)[:, None])
                dp = precise_dot(v, tl.trans(do), None, PRECISION)
                if seed is not None:
                    row = tl.minimum(n, queries - 1)
                    if plan is not None:
                        row = tl.load(plan + row)
                    row_key = dropout_row_key(drop_seed, batch_head, row)
                    kept = keeps(row_key[None, :], dropout_key_key(key_index)[:, None], dropout_threshold)
                    dp = tl.where(kept, dp, 0.0)
                    dv = precise_dot(rounded(tl.where(kept, p, 0.0), do.dtype), do, dv, PRECISION)
                else:
                    dv = precise_dot(rounded(p, do.dtype), do, dv, PRECISION)
                ds = p * (dp - delta[None, :])
                dk = precise_dot(rounded(ds, q.dtype), q, dk, PRECISION)

    batch_head = (opaque(tl.program_id(0)) // tiles_per_head).to(tl.int64)
    b = batch_head // heads
    h = batch_head % heads
    grad_key += (b * dk_b + h * dk_h) * UNIT
    grad_value += (b * dv_b + h * dv_h) * UNIT
    _, _, key_index, real = keys_of_tile(opaque(tile), first_key, valid_height, valid_width, width, KEYS)
    if partial_keys is None:
        store_rows(grad_key, key_index, dk_t * UNIT, dk * scale, real, HEAD_DIM, BLOCK_D)
        store_rows(grad_value, key_index, dv_t * UNIT, dv, real, HEAD_DIM, BLOCK_D)
    else:
        at = (tl.program_id(1) * (tl.num_programs(0) // tiles_per_head) + batch_head) * keys + key_index
        store_rows(partial_keys, at, HEAD_DIM, dk * scale, real, HEAD_DIM, BLOCK_D)
        store_rows(partial_values, at, HEAD_DIM, dv, real, HEAD_DIM, BLOCK_D)
    outside = height * width - valid_height * valid_width
    if tile * KEYS < outside:
        u = tile * KEYS + tl.arange(0, KEYS)
        column, line = invalid_cells(u, valid_height, valid_width, width)
        to = first_key + line * width + column
        nothing = tl.zeros([KEYS, BLOCK_D], tl.float32)
        if partial_keys is None:
            store_rows(grad_key, to, dk_t * UNIT, nothing, u < outside, HEAD_DIM, BLOCK_D)
            store_rows(grad_value, to, dv_t * UNIT, nothing, u < outside, HEAD_DIM, BLOCK_D)
        else:
            place = (tl.program_id(1) * (tl.num_programs(0) // tiles_per_head) + batch_head) * keys
            store_rows(partial_keys, place + to, HEAD_DIM, nothing, u < outside, HEAD_DIM, BLOCK_D)
            store_rows(partial_values, place + to, HEAD_DIM, nothing, u < outside, HEAD_DIM, BLOCK_D)
