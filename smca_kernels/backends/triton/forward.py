"""Forward pass: out = Σ_s α_s softmax_k(scale · q·k + logG) v, all scales in one launch.

A program owns BLOCK_N queries of one (batch, head). For each scale it walks their window (windows.py; without a plan,
the valid part of the grid) tile by tile:

    S  = q kᵀ + coefficients · featuresᵀ       the prior, edges and padding as a rank-16 product (tiles.py)
    m' = max(m, scale · rowmax S)              online softmax; exponentials in base 2
    P  = 2^(scale · S - m')
    l, acc  ←  2^(m - m') (l, acc) + P [1, v]  row sums ride the tensor cores beside P v

and at the scale's end adds α_s acc / l to the output, keeping acc / l and the log-sum-exp for the backward.

Where blocks of queries are too few to fill the device, `splits` programs share one, each taking a part of every scale's
tiles. The last one to arrive merges what all have left, in the order of their numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.tiles import (
    LN2,
    LOG2E,
    base_of_tile,
    direct_prior,
    dot,
    dropout_key_key,
    dropout_row_key,
    fixed_coefficients,
    from_middle,
    from_nearest_cell,
    grid_of_scale,
    keeps,
    load_rows,
    mark_ignored,
    opaque,
    queries_of_block,
    store_rows,
    tile_coefficients,
    tile_coordinates,
    tile_features,
    valid_part,
    warp_any,
    window_of_block,
)

NOTHING = tl.constexpr(-1e20)  # log-sum-exp of a split without a key that counts; also where the running maximum starts

# Nothing that changes with the sizes of a batch may start a compilation.
UNSPECIALIZED = [
    *("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_n"),
    *("heads", "center_heads", "precision_heads", "weight_heads", "queries", "keys", "scales", "plan_size"),
    *("scale", "log2_scale", "inverse_scale", "precision_limit", "dropout_threshold", "dropout_scale"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit
def merge(
    program, plan, partial_outputs, partial_lse, scale_weights, scale_outputs, lse, out, o_b, o_h, o_n,
    heads, weight_heads, queries, scales, plan_size,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of a block's splits, in their order, and store what one program would have stored."""
    blocks = tl.cdiv(queries, BLOCK_N)
    batch_head = (program // blocks).to(tl.int64)
    b = batch_head // heads
    h = batch_head % heads
    if plan is not None:
        plan += batch_head * plan_size
    n, in_range = queries_of_block(plan, program % blocks, queries, BLOCK_N)
    splits = tl.num_programs(1)
    rows = (tl.num_programs(0) // blocks).to(tl.int64) * queries * scales
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for s in range(scales):
        row = batch_head * queries * scales + n * scales + s
        largest = tl.full([BLOCK_N], NOTHING, tl.float32)
        for i in range(splits):
            largest = tl.maximum(largest, tl.load(partial_lse + i * rows + row))
        scale_output = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        mass = tl.zeros([BLOCK_N], tl.float32)
        for i in range(splits):
            log_sum = tl.load(partial_lse + i * rows + row)
            weight = tl.where(log_sum == NOTHING, 0.0, tl.exp(log_sum - largest))
            part = load_rows(partial_outputs, i * rows + row, HEAD_DIM, HEAD_DIM, BLOCK_D)
            scale_output += weight[:, None] * part
            mass += weight
        empty = mass == 0.0
        mass = tl.where(empty, 1.0, mass)
        scale_output /= mass[:, None]
        store_rows(scale_outputs, row, HEAD_DIM, scale_output, in_range, HEAD_DIM, BLOCK_D)
        tl.store(lse + row, tl.where(empty, 0.0, largest + tl.log(mass)), mask=in_range)
        if scale_weights is not None:
            weight_row = (b * weight_heads + h % weight_heads) * queries + n
            scale_output *= tl.load(scale_weights + weight_row * scales + s)[:, None]
        total += scale_output
    store_rows(out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, total, in_range, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    query,  # [B, H, N, D]
    key,  # [B, H, T, D]
    value,  # [B, H, T, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    scale_weights,  # [B, H or 1, N, S] contiguous, or None
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    seed,  # [1] int64, or None without dropout
    plan,  # [B, H, plan_size] contiguous int32, or None: every query sees every key
    out,  # [B, H, N, D]
    scale_outputs,  # [B, H, N, S, D] contiguous, fp32: the backward's δ needs all of it
    lse,  # [B, H, N, S] contiguous
    partial_outputs,  # [splits, B, H, N, S, D] contiguous, fp32, or None for one program a block
    partial_lse,  # [splits, B, H, N, S] contiguous, or None
    arrivals,  # [B · H · blocks] zeros, int32, or None
    q_b, q_h, q_n, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_n,  # strides, in units of UNIT elements
    heads, center_heads, precision_heads, weight_heads, queries, keys, scales, plan_size,
    scale, log2_scale, inverse_scale, precision_limit, dropout_threshold, dropout_scale,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECT_ONLY: tl.constexpr,
):  # fmt: skip
    KEYS: tl.constexpr = TILE_H * TILE_W
    blocks = tl.cdiv(queries, BLOCK_N)
    batch_head = tl.program_id(0) // blocks
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    block = tl.program_id(0) % blocks
    head_plan = plan
    if plan is not None:
        head_plan += batch_head.to(tl.int64) * plan_size
    n, in_range = queries_of_block(head_plan, block, queries, BLOCK_N)
    always_false = queries < 0

    key += (b * k_b + h * k_h) * UNIT
    value += (b * v_b + h * v_h) * UNIT
    center += (b * center_heads + h % center_heads) * queries * scales * 2
    precision += (b * precision_heads + h % precision_heads) * queries * scales * 2
    weights = scale_weights
    if scale_weights is not None:
        weights += (b * weight_heads + h % weight_heads) * queries * scales
    batch_head_row = batch_head.to(tl.int64) * queries * scales
    outputs = scale_outputs + batch_head_row * HEAD_DIM
    log_sums = lse + batch_head_row
    if partial_outputs is not None:
        split = tl.program_id(1)
        rows = (tl.num_programs(0) // blocks).to(tl.int64) * queries * scales
        outputs = partial_outputs + (split * rows + batch_head_row) * HEAD_DIM
        log_sums = partial_lse + split * rows + batch_head_row
    column, row = tile_coordinates(TILE_H, TILE_W)
    if seed is not None:
        row_key = dropout_row_key(tl.load(seed), batch_head, n)

    first_key = 0
    for s in tl.range(scales, disable_licm=True):
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
        c_x = tl.load(center + (n * scales + s) * 2)
        c_y = tl.load(center + (n * scales + s) * 2 + 1)
        p_x = tl.load(precision + (n * scales + s) * 2)
        p_y = tl.load(precision + (n * scales + s) * 2 + 1)
        d_x = from_nearest_cell(c_x, valid_width)
        d_y = from_nearest_cell(c_y, valid_height)
        direct = warp_any((tl.max(tl.maximum(p_x, p_y), 0) > precision_limit).to(tl.int32))
        x0, y0, x1, y1 = window_of_block(head_plan, queries, block, s, scales, valid_height, valid_width)
        tiles = tl.cdiv(y1 - y0, TILE_H) * tl.cdiv(x1 - x0, TILE_W)
        first_x = x0
        first_y = y0
        if partial_outputs is not None:
            first = tiles * tl.program_id(1) // tl.num_programs(1)
            tiles = tiles * (tl.program_id(1) + 1) // tl.num_programs(1) - first
            in_row = tl.maximum(tl.cdiv(x1 - x0, TILE_W), 1)
            first_x += first % in_row * TILE_W
            first_y += first // in_row * TILE_H

        q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D)
        m = tl.full([BLOCK_N], NOTHING, tl.float32)
        sums = tl.zeros([BLOCK_N, 8], tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for DIRECT in tl.static_range(DIRECT_ONLY, 2):
            # On the direct path the product carries only the keys that do not count.
            r_x = p_x * (0.0 if DIRECT else inverse_scale)
            r_y = p_y * (0.0 if DIRECT else inverse_scale)
            fixed = fixed_coefficients(r_x, r_y, out, always_false)
            features = tile_features(TILE_H, TILE_W, out, always_false)
            tile_x = first_x
            tile_y = first_y
            for _ in range(tl.where(direct == DIRECT, tiles, 0) if DIRECT_ONLY == 0 else tiles):
                x = tile_x + column
                y = tile_y + row
                key_index = first_key + tl.minimum(y, valid_height - 1) * width + tl.minimum(x, valid_width - 1)
                k = load_rows(key, key_index, k_t * UNIT, HEAD_DIM, BLOCK_D)
                v = load_rows(value, key_index, v_t * UNIT, HEAD_DIM, BLOCK_D)
                ignored = (x >= valid_width) | (y >= valid_height)
                if key_padding_mask is not None:
                    ignored |= tl.load(key_padding_mask + b * keys + key_index) != 0
                coefficients = fixed
                if not DIRECT:
                    e_x = c_x - from_middle(tile_x + TILE_W - 1, TILE_W)
                    e_y = c_y - from_middle(tile_y + TILE_H - 1, TILE_H)
                    base = base_of_tile(r_x, r_y, e_x, e_y, d_x, d_y)
                    coefficients = tile_coefficients(fixed, r_x, r_y, e_x, e_y, base)

                # [BLOCK_N, KEYS]
                logits = dot(q, tl.trans(k), None, PRECISION)
                logits = dot(coefficients, tl.trans(mark_ignored(features, ignored)), logits, PRECISION)
                if DIRECT:
                    x = x.to(tl.float32)[None, :]
                    y = y.to(tl.float32)[None, :]
                    prior_x = direct_prior(p_x[:, None], x, c_x[:, None], d_x[:, None])
                    prior_y = direct_prior(p_y[:, None], y, c_y[:, None], d_y[:, None])
                    logits = logits * scale - (prior_x + prior_y)
                    m_new = tl.maximum(m, tl.max(logits, 1))
                    p = tl.exp2((logits - m_new[:, None]) * LOG2E)
                    rescale = tl.exp2((m - m_new) * LOG2E)[:, None]
                else:
                    m_new = tl.maximum(m, tl.max(logits, 1) * log2_scale)
                    p = tl.exp2(logits * log2_scale - m_new[:, None])
                    rescale = tl.exp2(m - m_new)[:, None]
                m = m_new
                p = p.to(v.dtype)
                sums = dot(p, tl.full([KEYS, 8], 1.0, tl.float32).to(v.dtype), sums * rescale, PRECISION)
                if seed is not None:
                    kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                    p = tl.where(kept, p, 0.0).to(v.dtype)
                acc = dot(p, v, acc * rescale, PRECISION)

                tile_x += TILE_W
                row_done = tile_x >= x1
                tile_y = tl.where(row_done, tile_y + TILE_H, tile_y)
                tile_x = tl.where(row_done, x0, tile_x)

        first_key += height * width
        total_p = tl.max(sums, 1)
        empty = total_p == 0.0
        total_p = tl.where(empty, 1.0, total_p)
        scale_output = acc * tl.where(empty, 0.0, dropout_scale / total_p)[:, None]
        store_rows(outputs, n * scales + s, HEAD_DIM, scale_output, in_range, HEAD_DIM, BLOCK_D)
        if DIRECT_ONLY == 0:
            m = tl.where(direct != 0, m, m * LN2)
        log_sum = tl.where(empty, 0.0 if partial_outputs is None else NOTHING, m + tl.log(total_p))
        tl.store(log_sums + n * scales + s, log_sum, mask=in_range)

    tl.debug_barrier()
    if partial_outputs is None:
        # Read back rather than carried through the loops, which need the registers.
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for s in tl.range(scales, num_stages=1, disable_licm=True):
            scale_output = load_rows(outputs, n * scales + s, HEAD_DIM, HEAD_DIM, BLOCK_D)
            if scale_weights is not None:
                scale_output *= tl.load(weights + n * scales + s)[:, None]
            total += scale_output
        store_rows(out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, total, in_range, HEAD_DIM, BLOCK_D)
    else:
        if tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") == tl.num_programs(1) - 1:
            merge(
                opaque(tl.program_id(0)), plan, partial_outputs, partial_lse, scale_weights, scale_outputs, lse,
                out, o_b, o_h, o_n, heads, weight_heads, queries, scales, plan_size,
                UNIT, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
