"""Query-major pass of the backward: the gradients of query, center and precision. A program owns BLOCK_N queries.

    dq = scale Σ_s Σ_k dS k
    dp_x = -Σ_k dS ((x - c_x)² - (n_x - c_x)²),   dc_x = 2 p_x Σ_k dS (x - n_x)        dS: prepare.py

n is the cell nearest to the centre: as Σ dS = 0, it changes nothing but the rounding. The sums over dS times positions
are one more product, with the table of positions. Every sum is taken in a fixed order.

Where blocks are too few to fill the device, splits share one, as in the forward: merge.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import (
    LOG2E,
    ONE_UNIT,
    SQUARE_UNIT,
    direct_logits,
    dot,
    dropout_key_key,
    dropout_row_key,
    grid_of_scale,
    keeps,
    load_features,
    load_keys,
    load_rows,
    nearest_cell,
    next_cells,
    opaque,
    precise_dot,
    queries_of_block,
    rounded,
    run_of_split,
    store_rows,
    tiles_of_block,
    tiles_to_share,
    valid_part,
    window_of_block,
)
from smca_kernels.backends.triton.merge import SUMS, store_prior_gradients
from smca_kernels.backends.triton.prepare import (
    CENTER_X,
    CENTER_Y,
    DELTA,
    LOG_SUM,
    PRECISION_X,
    PRECISION_Y,
    UNSPECIALIZED,
    terms_of_block,
)


@triton.jit
def sums_of_moments(moments, e_x, e_y, n_x, n_y):
    """Σ m, Σ m (x - n) and Σ m ((x - e)² - (n - e)²) along both axes, from m · features [ROWS, 16]."""
    i = tl.arange(0, 16)[None, :]
    total = tl.sum(tl.where(i == 6, moments, 0.0), 1) / ONE_UNIT
    first_x = tl.sum(tl.where(i == 4, moments, 0.0), 1) - n_x * total
    first_y = tl.sum(tl.where(i == 12, moments, 0.0), 1) - n_y * total
    second_x = tl.sum(tl.where((i == 0) | (i == 2), moments, 0.0), 1) * SQUARE_UNIT - n_x * n_x * total
    second_y = tl.sum(tl.where((i == 8) | (i == 10), moments, 0.0), 1) * SQUARE_UNIT - n_y * n_y * total
    return total, first_x, first_y, second_x - 2.0 * e_x * first_x, second_y - 2.0 * e_y * first_y


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_major_kernel(
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
    grad_query,  # [B, H, N, D]
    grad_center,  # [B, H, N, S, 2] contiguous
    grad_precision,  # [B, H, N, S, 2] contiguous
    partial_queries,  # [splits, B, H, N, D] contiguous, fp32, or None for one program a block
    partial_sums,  # [splits + S - 1, B, H, N, SUMS] contiguous, fp32, or None: merge.py
    k_b, k_h, k_t, v_b, v_h, v_t, dq_b, dq_h, dq_n,  # strides, in units of UNIT elements
    heads, queries, keys, scales, plan_size, scale, log2_scale, dropout_threshold,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    DIRECT_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECT_ONLY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_N)
    rows = blocks * BLOCK_N
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    b = batch_head // heads
    h = batch_head % heads
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if plan is not None:
        plan += batch_head * plan_size
    key += (b * k_b + h * k_h) * UNIT
    value += (b * v_b + h * v_h) * UNIT
    mask = key_padding_mask
    if key_padding_mask is not None:
        mask += b * keys
    q = load_rows(ordered_query + batch_head * rows * HEAD_DIM, row, HEAD_DIM, HEAD_DIM, BLOCK_D)
    if seed is not None:
        row_key = dropout_row_key(tl.load(seed), batch_head, queries_of_block(plan, block, queries, BLOCK_N)[0])
    if partial_queries is not None:
        all_tiles = tiles_of_block(plan, queries, block, valid_shapes, b, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS)

    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_key = 0
    tiles_before = 0
    for s in tl.range(scales, disable_licm=True):
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
        x0, y0, x1, y1 = window_of_block(plan, queries, block, s, scales, valid_height, valid_width)
        across = tl.maximum(x1 - x0, 1)
        count = (x1 - x0) * (y1 - y0)
        last_cell = first_key + (y1 - 1) * width + x1 - 1
        first = 0
        if partial_queries is not None:
            tiles = tl.cdiv(count, KEYS)
            first, run = run_of_split(all_tiles, tl.program_id(1), tl.num_programs(1), tiles_before, tiles)
            tiles_before += tiles_to_share(tiles)
            count = tl.minimum(count, (first + run) * KEYS)
            first *= KEYS

        if partial_queries is None or run > 0:
            of_scale = batch_head * scales + s
            do = load_rows(weighted_grads + of_scale * rows * HEAD_DIM, row, HEAD_DIM, HEAD_DIM, BLOCK_D)
            delta = tl.load(terms_of_block(terms, of_scale * blocks + block, BLOCK_N) + DELTA * BLOCK_N)
            # Positions are counted from the window's middle, on the direct path from the grid's corner.
            origin_x = (x0 + x1) // 2
            origin_y = (y0 + y1) // 2
            first_x = tl.zeros([BLOCK_N], tl.float32)
            first_y = tl.zeros([BLOCK_N], tl.float32)
            second_x = tl.zeros([BLOCK_N], tl.float32)
            second_y = tl.zeros([BLOCK_N], tl.float32)
            if partial_queries is not None:  # what only all splits together can be corrected by
                total = tl.zeros([BLOCK_N], tl.float32)
                p_total = tl.zeros([BLOCK_N], tl.float32)
                p_first_x = tl.zeros([BLOCK_N], tl.float32)
                p_first_y = tl.zeros([BLOCK_N], tl.float32)
                p_second_x = tl.zeros([BLOCK_N], tl.float32)
                p_second_y = tl.zeros([BLOCK_N], tl.float32)
            direct = 1
            if DIRECT_ONLY == 0:
                direct = tl.load(direct_blocks + of_scale * blocks + block)
                if direct == 0:
                    i = tl.arange(0, 16)[None, :]
                    prior = tl.load(coefficients + (of_scale * rows + row)[:, None] * 16 + i)
                    moments = tl.zeros([BLOCK_N, 16], tl.float32)
                    p_moments = tl.zeros([BLOCK_N, 16], tl.float32)
                    x = x0 + (first + tl.arange(0, KEYS)) % across
                    y = y0 + (first + tl.arange(0, KEYS)) // across
                    cell = first_key + y * width + x
                    for start in tl.range(first, count, KEYS, num_stages=STAGES):
                        counts = start + tl.arange(0, KEYS) < count
                        k, v, key_index, counts = load_keys(
                            key, value, mask, cell, last_cell, counts, k_t, v_t, UNIT, HEAD_DIM, BLOCK_D
                        )
                        features = load_features(positions, x - origin_x, y - origin_y, counts)
                        of_moments = features
                        if k.dtype == tl.bfloat16:
                            of_moments = load_features(positions, x - origin_x, y - origin_y, counts, True)
                        logits = dot(prior, tl.trans(features), dot(q, tl.trans(k), None, PRECISION), PRECISION)
                        p = tl.exp2(logits * log2_scale)
                        dp = precise_dot(do, tl.trans(v), None, PRECISION)
                        if seed is not None:
                            kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                            dp = tl.where(kept, dp, 0.0)
                        ds = rounded(p * (dp - delta[:, None]), k.dtype)
                        dq = dot(ds, k, dq, PRECISION)
                        moments = dot(ds, of_moments, moments, PRECISION)
                        p_moments = dot(rounded(p, k.dtype), of_moments, p_moments, PRECISION)
                        x, y, cell = next_cells(x, y, cell, x1, across, width, KEYS)
                    # Here and below, computed again rather than kept through the loops.
                    of_terms = terms_of_block(terms, of_scale * blocks + opaque(block), BLOCK_N)
                    c_x = tl.load(of_terms + CENTER_X * BLOCK_N)
                    c_y = tl.load(of_terms + CENTER_Y * BLOCK_N)
                    n_x = nearest_cell(c_x, valid_width) - origin_x
                    n_y = nearest_cell(c_y, valid_height) - origin_y
                    e_x = c_x - origin_x
                    e_y = c_y - origin_y
                    total, first_x, first_y, second_x, second_y = sums_of_moments(moments, e_x, e_y, n_x, n_y)
                    p_total, p_first_x, p_first_y, p_second_x, p_second_y = sums_of_moments(
                        p_moments, e_x, e_y, n_x, n_y
                    )
                    if partial_queries is None:
                        # δ' comes from a P rounded for the product with v: take off what it leaves of Σ dS, which is 0.
                        error = total / tl.where(p_total == 0.0, 1.0, p_total)
                        first_x -= error * p_first_x
                        first_y -= error * p_first_y
                        second_x -= error * p_second_x
                        second_y -= error * p_second_y
            if direct != 0:
                of_terms = terms_of_block(terms, of_scale * blocks + opaque(block), BLOCK_N)
                p_x = tl.load(of_terms + PRECISION_X * BLOCK_N) * LOG2E
                p_y = tl.load(of_terms + PRECISION_Y * BLOCK_N) * LOG2E
                c_x = tl.load(of_terms + CENTER_X * BLOCK_N)
                c_y = tl.load(of_terms + CENTER_Y * BLOCK_N)
                n_x = nearest_cell(c_x, valid_width)
                n_y = nearest_cell(c_y, valid_height)
                c_x -= n_x
                c_y -= n_y
                log_sum = tl.load(of_terms + LOG_SUM * BLOCK_N)
                column = x0 + (first + tl.arange(0, DIRECT_KEYS)) % across
                line = y0 + (first + tl.arange(0, DIRECT_KEYS)) // across
                number = first_key + line * width + column
                for start in tl.range(first, count, DIRECT_KEYS, num_stages=1):
                    counts = start + tl.arange(0, DIRECT_KEYS) < count
                    k, v, key_index, counts = load_keys(
                        key, value, mask, number, last_cell, counts, k_t, v_t, UNIT, HEAD_DIM, BLOCK_D
                    )
                    logits = dot(q, tl.trans(k), None, PRECISION)
                    from_x = column.to(tl.float32)[None, :] - n_x[:, None]
                    from_y = line.to(tl.float32)[None, :] - n_y[:, None]
                    logits = direct_logits(
                        logits, log2_scale, p_x[:, None], p_y[:, None], from_x, from_y, c_x[:, None], c_y[:, None]
                    )
                    p = tl.where(counts[None, :], tl.exp2(logits - log_sum[:, None]), 0.0)
                    dp = precise_dot(do, tl.trans(v), None, PRECISION)
                    if seed is not None:
                        kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                        dp = tl.where(kept, dp, 0.0)
                    ds = p * (dp - delta[:, None])
                    dq = dot(rounded(ds, k.dtype), k, dq, PRECISION)
                    first_x += tl.sum(ds * from_x, 1)
                    first_y += tl.sum(ds * from_y, 1)
                    second_x += tl.sum(ds * from_x * from_x, 1)
                    second_y += tl.sum(ds * from_y * from_y, 1)
                    column, line, number = next_cells(column, line, number, x1, across, width, DIRECT_KEYS)
                second_x -= 2.0 * c_x * first_x
                second_y -= 2.0 * c_y * first_y

            n, in_range = queries_of_block(plan, opaque(block), queries, BLOCK_N)
            if partial_queries is None:
                of_terms = terms_of_block(terms, of_scale * blocks + opaque(block), BLOCK_N)
                store_prior_gradients(
                    of_terms + PRECISION_X * BLOCK_N, grad_center, grad_precision,
                    (batch_head * queries + n) * scales + s, in_range, first_x, first_y, second_x, second_y, BLOCK_N,
                )  # fmt: skip
            else:
                place = (tl.program_id(1) + s).to(tl.int64) * (tl.num_programs(0) // blocks) * queries
                at = partial_sums + (place + batch_head * queries + n) * SUMS
                tl.store(at, first_x, mask=in_range)
                tl.store(at + 1, first_y, mask=in_range)
                tl.store(at + 2, second_x, mask=in_range)
                tl.store(at + 3, second_y, mask=in_range)
                tl.store(at + 4, total, mask=in_range)
                tl.store(at + 5, p_first_x, mask=in_range)
                tl.store(at + 6, p_first_y, mask=in_range)
                tl.store(at + 7, p_second_x, mask=in_range)
                tl.store(at + 8, p_second_y, mask=in_range)
                tl.store(at + 9, p_total, mask=in_range)
        first_key += height * width

    n, in_range = queries_of_block(plan, opaque(block), queries, BLOCK_N)
    if partial_queries is None:
        to = grad_query + (b * dq_b + h * dq_h) * UNIT
        store_rows(to, n, dq_n * UNIT, dq * scale, in_range, HEAD_DIM, BLOCK_D)
    else:
        place = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) * queries
        at = place + batch_head * queries + n
        store_rows(partial_queries, at, HEAD_DIM, dq, in_range, HEAD_DIM, BLOCK_D)
