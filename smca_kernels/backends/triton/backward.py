"""Backward pass, deterministic: every gradient element is summed in a fixed order.

With dO'_s = α_s dO (over 1 - dropout_p) and δ'_s = α_s dO·O_s, for every scale s:

    P  = 2^(scale · (q kᵀ + coefficients · featuresᵀ))     the log-sum-exp rides in the base (channels.py)
    dP = dO' vᵀ,   dS = P (dP - δ')                        gradient of the logits, and of logG
    dv = Σ_n P dO',   dk = scale Σ_n dS q                  key-major pass: a program owns KEYS keys
    dq = scale Σ_s Σ_k dS k                                query-major pass: a program owns BLOCK_N queries
    dp_x = -Σ_k dS ((x - c_x)² - (n_x - c_x)²),   dc_x = 2 p_x Σ_k dS (x - n_x)

n is the cell nearest to the centre: as Σ dS = 0, it changes nothing but the rounding. `prepare_kernel` computes dO',
δ', dα = dO·O_s and the coefficients, and lays all that belongs to a query side by side in the order of the plan
(windows.py), padded to whole blocks with zeros. The sums over dS times positions are one more product, with a table.

Where programs are too few to fill the device, splits share a block or a tile, as in the forward: merge.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import (
    LN2,
    LOG2E,
    MASKED,
    ONE_UNIT,
    SQUARE_UNIT,
    base_of_query,
    direct_prior,
    dot,
    dropout_key_key,
    dropout_row_key,
    grid_of_scale,
    is_direct,
    keeps,
    load_features,
    load_keys,
    load_rows,
    nearest_cell,
    next_cells,
    opaque,
    prior_coefficients,
    queries_of_block,
    rounded,
    run_of_split,
    store_rows,
    tiles_of_block,
    tiles_to_share,
    valid_part,
    warp_any,
    warp_any_5_bits,
    window_of_block,
)
from smca_kernels.backends.triton.merge import SUMS, store_prior_gradients

# What is stored side by side for a block of queries and a scale, BLOCK_N numbers each.
CENTER_X = tl.constexpr(0)
CENTER_Y = tl.constexpr(1)
PRECISION_X = tl.constexpr(2)
PRECISION_Y = tl.constexpr(3)
LOG_SUM = tl.constexpr(4)  # log-sum-exp in base 2
DELTA = tl.constexpr(5)  # δ'
TERMS = tl.constexpr(6)
STRIP = tl.constexpr(8)  # rows of cells whose keys follow each other, column by column, in the key-major pass
UNSPECIALIZED = [
    *("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_n"),
    *("dq_b", "dq_h", "dq_n", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t"),
    *("heads", "center_heads", "precision_heads", "weight_heads", "queries", "keys", "scales"),
    *("tiles_per_head", "plan_size", "scale", "log2_scale", "inverse_scale"),
    *("direct_limit", "dropout_threshold", "dropout_scale", "keep_p"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit
def terms_of_block(terms, block, BLOCK_N: tl.constexpr):
    """Pointers to term 0 of a block's queries; term i is i · BLOCK_N further, at no register."""
    return terms + block * TERMS * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    query,  # [B, H, N, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    grad_out,  # dO [B, H, N, D]
    scale_outputs,  # [B, H, N, S, D] contiguous, fp32
    scale_weights,  # [B, H or 1, N, S] contiguous, or None
    valid_shapes,  # [B, S, 2] contiguous, or None
    lse,  # [B, H, N, S] contiguous, in base 2
    plan,  # [B, H, plan_size] contiguous int32, or None: queries stay in their order
    ordered_query,  # [B, H, rows, D] contiguous; rows: blocks · BLOCK_N
    weighted_grads,  # dO' [B, H, S, rows, D] contiguous
    coefficients,  # [B, H, S, rows, 16] contiguous, float16
    terms,  # [B, H, S, blocks, TERMS, BLOCK_N] contiguous, fp32
    direct_blocks,  # [B, H, S, blocks] contiguous, int32: 1 on the direct path
    whole_coefficients,  # the same, positions counted from the image's middle, or None without a plan
    whole_direct_blocks,  # the same, or None
    grad_weights,  # dα [B, H, N, S] contiguous, or None
    q_b, q_h, q_n, o_b, o_h, o_n,  # strides, in units of UNIT elements
    heads, center_heads, precision_heads, weight_heads, queries, scales, plan_size,
    inverse_scale, direct_limit, dropout_scale, keep_p,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    n, real = queries_of_block(plan, block, queries, BLOCK_N)
    q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D, real)
    store_rows(ordered_query + batch_head * rows * HEAD_DIM, row, HEAD_DIM, q, row < rows, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, HEAD_DIM, BLOCK_D, real).to(tl.float32)
    for s in range(scales):
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
        x0, y0, x1, y1 = window_of_block(plan, queries, block, s, scales, valid_height, valid_width)
        at = (batch_head * queries + n) * scales + s
        output = load_rows(scale_outputs, at, HEAD_DIM, HEAD_DIM, BLOCK_D)
        factor = tl.full([BLOCK_N], 1.0, tl.float32) * dropout_scale
        if scale_weights is not None:
            tl.store(grad_weights + at, tl.sum(grad * output, 1), mask=real)
            factor *= tl.load(scale_weights + ((b * weight_heads + h % weight_heads) * queries + n) * scales + s)
        # δ' must see dO' as rounded: dP - δ' cancels where one key has all the mass.
        weighted = rounded(grad * factor[:, None], grad_out.dtype.element_ty)
        delta = tl.sum(weighted.to(tl.float32) * keep_p * output, 1)
        log_sum = tl.load(lse + at, mask=real, other=0.0)
        at = (((b * center_heads + h % center_heads) * queries + n) * scales + s) * 2
        c_x = tl.load(center + at, mask=real, other=0.0)
        c_y = tl.load(center + at + 1, mask=real, other=0.0)
        at = (((b * precision_heads + h % precision_heads) * queries + n) * scales + s) * 2
        p_x = tl.load(precision + at, mask=real, other=0.0)
        p_y = tl.load(precision + at + 1, mask=real, other=0.0)

        of_scale = batch_head * scales + s
        first = of_scale * rows
        store_rows(weighted_grads + first * HEAD_DIM, row, HEAD_DIM, weighted, row < rows, HEAD_DIM, BLOCK_D)
        of_terms = terms_of_block(terms, of_scale * blocks + block, BLOCK_N)
        tl.store(of_terms + CENTER_X * BLOCK_N, c_x)
        tl.store(of_terms + CENTER_Y * BLOCK_N, c_y)
        tl.store(of_terms + PRECISION_X * BLOCK_N, p_x)
        tl.store(of_terms + PRECISION_Y * BLOCK_N, p_y)
        tl.store(of_terms + LOG_SUM * BLOCK_N, log_sum)
        tl.store(of_terms + DELTA * BLOCK_N, delta)

        store_coefficients(
            coefficients + first * 16, direct_blocks + of_scale * blocks, block, c_x, c_y, p_x, p_y, log_sum,
            x0, y0, x1, y1, valid_height, valid_width, inverse_scale, direct_limit, BLOCK_N,
        )  # fmt: skip
        if plan is not None:
            store_coefficients(
                whole_coefficients + first * 16, whole_direct_blocks + of_scale * blocks, block,
                c_x, c_y, p_x, p_y, log_sum,
                0, 0, valid_width, valid_height, valid_height, valid_width, inverse_scale, direct_limit, BLOCK_N,
            )  # fmt: skip


@triton.jit
def store_coefficients(
    coefficients, direct_blocks, block, c_x, c_y, p_x, p_y, log_sum, x0, y0, x1, y1, valid_height, valid_width,
    inverse_scale, direct_limit, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the coefficients of a block of queries in a window, and whether it has to take the direct path there."""
    origin_x = (x0 + x1) // 2
    origin_y = (y0 + y1) // 2
    n_x = nearest_cell(c_x, valid_width) - origin_x
    n_y = nearest_cell(c_y, valid_height) - origin_y
    e_x = c_x - origin_x
    e_y = c_y - origin_y
    direct = is_direct(p_x, p_y, e_x, e_y, n_x, n_y, x1 - x0, y1 - y0, inverse_scale, direct_limit)
    log_sum *= LN2 * inverse_scale
    direct |= warp_any(tl.max((tl.abs(log_sum) >= MASKED).to(tl.int32), 0))
    tl.store(direct_blocks + block, direct)
    p_x *= inverse_scale
    p_y *= inverse_scale
    base = base_of_query(p_x, p_y, e_x, e_y, n_x, n_y) + log_sum
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    of_row = prior_coefficients(p_x, p_y, e_x, e_y, base)
    tl.store(coefficients + row[:, None] * 16 + tl.arange(0, 16)[None, :], of_row)


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
                    for start in tl.range(first, count, KEYS, num_stages=STAGES):
                        counts = start + tl.arange(0, KEYS) < count
                        k, v, key_index, counts = load_keys(
                            key, value, mask, first_key, width, x, y, y1, counts, k_t, v_t, UNIT, HEAD_DIM, BLOCK_D
                        )
                        features = load_features(positions, x - origin_x, y - origin_y, counts)
                        of_moments = features
                        if k.dtype == tl.bfloat16:
                            of_moments = load_features(positions, x - origin_x, y - origin_y, counts, True)
                        logits = dot(prior, tl.trans(features), dot(q, tl.trans(k), None, PRECISION), PRECISION)
                        p = tl.exp2(logits * log2_scale)
                        dp = dot(do, tl.trans(v), None, PRECISION)
                        if seed is not None:
                            kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                            dp = tl.where(kept, dp, 0.0)
                        ds = rounded(p * (dp - delta[:, None]), k.dtype)
                        dq = dot(ds, k, dq, PRECISION)
                        moments = dot(ds, of_moments, moments, PRECISION)
                        p_moments = dot(rounded(p, k.dtype), of_moments, p_moments, PRECISION)
                        x, y = next_cells(x, y, x1, across, KEYS)
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
                for start in tl.range(first, count, DIRECT_KEYS, num_stages=1):
                    counts = start + tl.arange(0, DIRECT_KEYS) < count
                    k, v, key_index, counts = load_keys(
                        key, value, mask, first_key, width, column, line, y1, counts, k_t, v_t, UNIT, HEAD_DIM, BLOCK_D
                    )
                    from_x = column.to(tl.float32)[None, :] - n_x[:, None]
                    from_y = line.to(tl.float32)[None, :] - n_y[:, None]
                    logits = dot(q, tl.trans(k), None, PRECISION) * log2_scale - log_sum[:, None]
                    logits -= direct_prior(p_x[:, None], from_x, c_x[:, None])
                    logits -= direct_prior(p_y[:, None], from_y, c_y[:, None])
                    p = tl.where(counts[None, :], tl.exp2(logits), 0.0)
                    dp = dot(do, tl.trans(v), None, PRECISION)
                    if seed is not None:
                        kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                        dp = tl.where(kept, dp, 0.0)
                    ds = p * (dp - delta[:, None])
                    dq = dot(rounded(ds, k.dtype), k, dq, PRECISION)
                    first_x += tl.sum(ds * from_x, 1)
                    first_y += tl.sum(ds * from_y, 1)
                    second_x += tl.sum(ds * from_x * from_x, 1)
                    second_y += tl.sum(ds * from_y * from_y, 1)
                    column, line = next_cells(column, line, x1, across, DIRECT_KEYS)
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
def cells_outside(u, valid_height, valid_width, width):
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
                    logits = logits * log2_scale - tl.load(of_terms + LOG_SUM * BLOCK_N)[None, :]
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
                    logits -= direct_prior(p_x[None, :], from_x, (c_x - n_x)[None, :])
                    logits -= direct_prior(p_y[None, :], from_y, (c_y - n_y)[None, :])
                    p = tl.where(inside[:, None], tl.exp2(logits), 0.0)
                else:
                    prior = tl.load(coefficients + n[:, None] * 16 + tl.arange(0, 16)[None, :])
                    logits = dot(features, tl.trans(prior), logits, PRECISION)
                    if plan is None:
                        p = tl.exp2(logits * log2_scale)
                    else:
                        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
                        p = tl.exp2(logits * log2_scale + tl.where(inside, 0.0, -1e30)[:, None])
                dp = dot(v, tl.trans(do), None, PRECISION)
                if seed is not None:
                    row = tl.minimum(n, queries - 1)
                    if plan is not None:
                        row = tl.load(plan + row)
                    row_key = dropout_row_key(drop_seed, batch_head, row)
                    kept = keeps(row_key[None, :], dropout_key_key(key_index)[:, None], dropout_threshold)
                    dp = tl.where(kept, dp, 0.0)
                    dv = dot(rounded(tl.where(kept, p, 0.0), do.dtype), do, dv, PRECISION)
                else:
                    dv = dot(rounded(p, do.dtype), do, dv, PRECISION)
                ds = p * (dp - delta[None, :])
                dk = dot(rounded(ds, q.dtype), q, dk, PRECISION)

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
        column, line = cells_outside(u, valid_height, valid_width, width)
        to = first_key + line * width + column
        nothing = tl.zeros([KEYS, BLOCK_D], tl.float32)
        if partial_keys is None:
            store_rows(grad_key, to, dk_t * UNIT, nothing, u < outside, HEAD_DIM, BLOCK_D)
            store_rows(grad_value, to, dv_t * UNIT, nothing, u < outside, HEAD_DIM, BLOCK_D)
        else:
            place = (tl.program_id(1) * (tl.num_programs(0) // tiles_per_head) + batch_head) * keys
            store_rows(partial_keys, place + to, HEAD_DIM, nothing, u < outside, HEAD_DIM, BLOCK_D)
            store_rows(partial_values, place + to, HEAD_DIM, nothing, u < outside, HEAD_DIM, BLOCK_D)
