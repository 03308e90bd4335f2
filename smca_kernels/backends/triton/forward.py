"""Forward pass: out = Σ_s α_s softmax_k(scale · q·k + logG) v, all scales in one launch.

A program owns BLOCK_N queries of one (batch, head). For each scale it walks the keys of their window (windows.py;
without a plan, the valid part of the grid) in tiles of KEYS, row by row:

    S  = q kᵀ + coefficients · featuresᵀ       the prior and keys that do not count as a product (channels.py)
    m' = max(m, scale · rowmax S)              online softmax; exponentials in base 2
    P  = 2^(scale · S - m')
    l, acc  ←  2^(m - m') (l, acc) + P [1, v]

and at the scale's end adds α_s acc / l to the output, keeping acc / l and the log-sum-exp for the backward.

Where blocks of queries are too few to fill the device, `splits` programs share one: each takes an equal run of all
tiles of all scales, and leaves what it found for merge.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import (
    LOG2E,
    NOTHING,
    direct_logits,
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
    precise_dot,
    prior_coefficients,
    queries_of_block,
    rounded,
    run_of_split,
    store_rows,
    tiles_of_block,
    tiles_to_share,
    valid_part,
    warp_any,
    window_of_block,
)

# Nothing that changes with the sizes of a batch may start a compilation.
UNSPECIALIZED = [
    *("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_n"),
    *("heads", "center_heads", "precision_heads", "weight_heads", "queries", "keys", "scales", "plan_size"),
    *("scale", "log2_scale", "inverse_scale", "direct_limit", "dropout_threshold", "dropout_scale"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


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
    positions,  # the features of positions, float16: launch.position_table
    out,  # [B, H, N, D]
    scale_outputs,  # [B, H, N, S, D] contiguous, fp32: the backward's δ needs all of it
    lse,  # [B, H, N, S] contiguous, log-sum-exp in base 2
    partial_outputs,  # [splits + S - 1, B, H, N, D] contiguous, fp32, or None for one program a block
    partial_lse,  # [splits + S - 1, B, H, N] contiguous, or None
    q_b, q_h, q_n, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_n,  # strides, in units of UNIT elements
    heads, center_heads, precision_heads, weight_heads, queries, keys, scales, plan_size,
    log2_scale, inverse_scale, direct_limit, dropout_threshold, dropout_scale,
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
    batch_head = tl.program_id(0) // blocks
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    block = tl.program_id(0) % blocks
    head_plan = plan
    if plan is not None:
        head_plan += batch_head.to(tl.int64) * plan_size
    n, in_range = queries_of_block(head_plan, block, queries, BLOCK_N)
    q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D)
    key += (b * k_b + h * k_h) * UNIT
    value += (b * v_b + h * v_h) * UNIT
    center += (b * center_heads + h % center_heads) * queries * scales * 2
    precision += (b * precision_heads + h % precision_heads) * queries * scales * 2
    mask = key_padding_mask
    if key_padding_mask is not None:
        mask += b * keys
    batch_head_row = batch_head.to(tl.int64) * queries
    if seed is not None:
        row_key = dropout_row_key(tl.load(seed), batch_head, n)
    if partial_outputs is not None:
        all_tiles = tiles_of_block(
            head_plan, queries, block, valid_shapes, b, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS
        )

    first_key = 0
    tiles_before = 0
    for s in tl.range(scales, disable_licm=True):
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
        x0, y0, x1, y1 = window_of_block(head_plan, queries, block, s, scales, valid_height, valid_width)
        across = tl.maximum(x1 - x0, 1)
        count = (x1 - x0) * (y1 - y0)
        last_cell = first_key + (y1 - 1) * width + x1 - 1
        first = 0
        if partial_outputs is not None:
            tiles = tl.cdiv(count, KEYS)
            first, run = run_of_split(all_tiles, tl.program_id(1), tl.num_programs(1), tiles_before, tiles)
            tiles_before += tiles_to_share(tiles)
            count = tl.minimum(count, (first + run) * KEYS)
            first *= KEYS

        if partial_outputs is None or run > 0:
            origin_x = (x0 + x1) // 2
            origin_y = (y0 + y1) // 2
            # Here and below, computed again rather than kept through the loops.
            of_query = queries_of_block(head_plan, opaque(block), queries, BLOCK_N)[0] * scales + s
            p_x = tl.load(precision + of_query * 2)
            p_y = tl.load(precision + of_query * 2 + 1)
            c_x = tl.load(center + of_query * 2)
            c_y = tl.load(center + of_query * 2 + 1)
            n_x = nearest_cell(c_x, valid_width) - origin_x
            n_y = nearest_cell(c_y, valid_height) - origin_y
            e_x = c_x - origin_x
            e_y = c_y - origin_y
            direct = 1
            m = tl.full([BLOCK_N], NOTHING, tl.float32) * log2_scale
            total = tl.zeros([BLOCK_N], tl.float32)
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            if DIRECT_ONLY == 0:
                coefficients = prior_coefficients(p_x * inverse_scale, p_y * inverse_scale, e_x, e_y, n_x, n_y, 0.0)
                direct = is_direct(p_x, p_y, e_x, e_y, n_x, n_y, across, y1 - y0, inverse_scale, direct_limit)
                x = x0 + (first + tl.arange(0, KEYS)) % across
                y = y0 + (first + tl.arange(0, KEYS)) // across
                cell = first_key + y * width + x
                for start in tl.range(first, tl.where(direct == 0, count, 0), KEYS, num_stages=STAGES):
                    counts = start + tl.arange(0, KEYS) < count
                    k, v, key_index, counts = load_keys(
                        key, value, mask, cell, last_cell, counts, k_t, v_t, UNIT, HEAD_DIM, BLOCK_D
                    )
                    features = load_features(positions, x - origin_x, y - origin_y, counts)
                    logits = dot(coefficients, tl.trans(features), dot(q, tl.trans(k), None, PRECISION), PRECISION)
                    m_new = tl.maximum(m, tl.max(logits, 1) * log2_scale)
                    p = tl.exp2(logits * log2_scale - m_new[:, None])
                    rescale = tl.exp2(m - m_new)
                    total = total * rescale + tl.sum(p, 1)
                    if seed is not None:
                        kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                        p = tl.where(kept, p, 0.0)
                    acc = dot(rounded(p, v.dtype), v, acc * rescale[:, None], PRECISION)
                    m = m_new
                    x, y, cell = next_cells(x, y, cell, x1, across, width, KEYS)
                # A row whose logits are all below where its maximum started may have no key that counts, or none near.
                direct |= warp_any(tl.max((total == 0.0).to(tl.int32), 0))
            if direct != 0:
                of_query = queries_of_block(head_plan, opaque(block), queries, BLOCK_N)[0] * scales + s
                p_x = tl.load(precision + of_query * 2) * LOG2E
                p_y = tl.load(precision + of_query * 2 + 1) * LOG2E
                c_x = tl.load(center + of_query * 2)
                c_y = tl.load(center + of_query * 2 + 1)
                n_x = nearest_cell(c_x, valid_width)
                n_y = nearest_cell(c_y, valid_height)
                c_x -= n_x
                c_y -= n_y
                m = tl.full([BLOCK_N], -1e30, tl.float32)
                total = tl.zeros([BLOCK_N], tl.float32)
                acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
                column = x0 + (first + tl.arange(0, DIRECT_KEYS)) % across
                row = y0 + (first + tl.arange(0, DIRECT_KEYS)) // across
                number = first_key + row * width + column
                for start in tl.range(first, count, DIRECT_KEYS, num_stages=1):
                    counts = start + tl.arange(0, DIRECT_KEYS) < count
                    k, v, key_index, counts = load_keys(
                        key, value, mask, number, last_cell, counts, k_t, v_t, UNIT, HEAD_DIM, BLOCK_D
                    )
                    logits = dot(q, tl.trans(k), None, PRECISION)
                    from_x = column.to(tl.float32)[None, :] - n_x[:, None]
                    from_y = row.to(tl.float32)[None, :] - n_y[:, None]
                    logits = direct_logits(
                        logits, log2_scale, p_x[:, None], p_y[:, None], from_x, from_y, c_x[:, None], c_y[:, None]
                    )
                    logits = tl.where(counts[None, :], logits, float("-inf"))
                    m_new = tl.maximum(m, tl.max(logits, 1))
                    p = tl.exp2(logits - m_new[:, None])
                    rescale = tl.exp2(m - m_new)
                    total = total * rescale + tl.sum(p, 1)
                    if seed is not None:
                        kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                        p = tl.where(kept, p, 0.0)
                    acc = precise_dot(rounded(p, v.dtype), v, acc * rescale[:, None], PRECISION)
                    m = m_new
                    column, row, number = next_cells(column, row, number, x1, across, width, DIRECT_KEYS)

            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            scale_output = acc * tl.where(empty, 0.0, dropout_scale / total)[:, None]
            n, in_range = queries_of_block(head_plan, opaque(block), queries, BLOCK_N)
            if partial_outputs is None:
                at = (batch_head_row + n) * scales + s
                store_rows(scale_outputs, at, HEAD_DIM, scale_output, in_range, HEAD_DIM, BLOCK_D)
                tl.store(lse + at, tl.where(empty, 0.0, m + tl.log2(total)), mask=in_range)
            else:
                # A split's runs of two scales, and two splits' runs of one scale, are in different places.
                place = (tl.program_id(1) + s).to(tl.int64) * (tl.num_programs(0) // blocks) * queries
                at = place + batch_head_row + n
                store_rows(partial_outputs, at, HEAD_DIM, scale_output, in_range, HEAD_DIM, BLOCK_D)
                tl.store(partial_lse + at, tl.where(empty, -float("inf"), m + tl.log2(total)), mask=in_range)
        first_key += height * width

    if partial_outputs is None:
        tl.debug_barrier()
        # Read back rather than carried through the loops, which need the registers.
        n, in_range = queries_of_block(head_plan, opaque(block), queries, BLOCK_N)
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for s in tl.range(scales, num_stages=1, disable_licm=True):
            scale_output = load_rows(scale_outputs, (batch_head_row + n) * scales + s, HEAD_DIM, HEAD_DIM, BLOCK_D)
            if scale_weights is not None:
                weight_row = (b * weight_heads + h % weight_heads) * queries + n
                scale_output *= tl.load(scale_weights + weight_row * scales + s)[:, None]
            total += scale_output
        store_rows(out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, total, in_range, HEAD_DIM, BLOCK_D)
