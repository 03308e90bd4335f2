"""Backward pass, deterministic: every gradient element is summed by one program in a fixed order.

With dO'_s = α_s dO (over 1 - dropout_p) and δ'_s = α_s dO·O_s, for every scale s:

    P  = 2^(scale · (q kᵀ + coefficients · featuresᵀ))     the log-sum-exp rides in the base (tiles.py)
    dP = dO' vᵀ,   dS = P (dP - δ')                        gradient of the logits, and of logG
    dv = Σ_n P dO',   dk = scale Σ_n dS q                  key-major pass: a program owns one key tile
    dq = scale Σ_s Σ_k dS k                                query-major pass: a program owns BLOCK_N queries
    dp_x = -Σ_k dS (x - c_x)²,   dc_x = 2 p_x Σ_k dS (x - c_x)

`prepare_kernel` computes dO', δ' and dα = dO·O_s, and lays all that belongs to a query side by side in the order of the
plan (windows.py), padded to whole blocks. The sums over dS (x - c)ʲ are moments of a tile's features: one more product,
dS · features, whose columns `moment_weights` weighs by polynomials in the centre; added up once a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.tiles import (
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
    store_rows,
    tile_coefficients,
    tile_coordinates,
    tile_features,
    valid_part,
    warp_any,
    warp_any_5_bits,
    window_of_block,
)

PADDED = tl.constexpr(64)  # queries are padded to a multiple of this: whole blocks of every configuration
# What is stored side by side for a query and scale.
CENTER_X = tl.constexpr(0)
CENTER_Y = tl.constexpr(1)
PRECISION_X = tl.constexpr(2)
PRECISION_Y = tl.constexpr(3)
LOG_SUM = tl.constexpr(4)  # log-sum-exp
DELTA = tl.constexpr(5)  # δ'
TERMS = tl.constexpr(6)
UNSPECIALIZED = [
    *("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_n"),
    *("dq_b", "dq_h", "dq_n", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t"),
    *("heads", "center_heads", "precision_heads", "weight_heads", "queries", "row_blocks", "keys", "scales"),
    *("tiles_per_head", "plan_size", "scale", "log2_scale", "inverse_scale"),
    *("precision_limit", "dropout_threshold", "dropout_scale", "keep_p"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit
def terms_of(terms, first, ROWS: tl.constexpr):
    """Pointers to term 0 of ROWS rows from `first` on; term i is i · PADDED further, at no register."""
    inside = (PADDED - 1) & first
    return terms + (first - inside) * TERMS + inside + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    query,  # [B, H, N, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    grad_out,  # dO [B, H, N, D]
    scale_outputs,  # [B, H, N, S, D] contiguous, fp32
    scale_weights,  # [B, H or 1, N, S] contiguous, or None
    lse,  # [B, H, N, S] contiguous
    plan,  # [B, H, plan_size] contiguous int32, or None: queries stay in their order
    ordered_query,  # [B, H, rows, D] contiguous; rows: row_blocks · PADDED
    weighted_grads,  # dO' [B, H, S, rows, D] contiguous
    terms,  # [B, H, S, row_blocks, TERMS, PADDED] contiguous, fp32
    grad_weights,  # dα [B, H, N, S] contiguous, or None
    q_b, q_h, q_n, o_b, o_h, o_n,  # strides, in units of UNIT elements
    heads, center_heads, precision_heads, weight_heads, queries, row_blocks, scales, plan_size, dropout_scale, keep_p,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = row_blocks * PADDED
    blocks = rows // BLOCK_N
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    b = batch_head // heads
    h = batch_head % heads
    first_row = tl.program_id(0) % blocks * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    in_range = row < queries
    everywhere = row < rows
    n = tl.minimum(row, queries - 1)
    if plan is not None:
        n = tl.load(plan + batch_head * plan_size + n)
    q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D)
    store_rows(ordered_query + batch_head * rows * HEAD_DIM, row, HEAD_DIM, q, everywhere, HEAD_DIM, BLOCK_D)
    grad = load_rows(grad_out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, HEAD_DIM, BLOCK_D).to(tl.float32)
    for s in range(scales):
        at = (batch_head * queries + n) * scales + s
        output = load_rows(scale_outputs, at, HEAD_DIM, HEAD_DIM, BLOCK_D)
        factor = tl.full([BLOCK_N], 1.0, tl.float32) * dropout_scale
        if scale_weights is not None:
            tl.store(grad_weights + at, tl.sum(grad * output, 1), mask=in_range)
            factor *= tl.load(scale_weights + ((b * weight_heads + h % weight_heads) * queries + n) * scales + s)
        # δ' must see dO' as rounded: dP - δ' cancels where one key has all the mass.
        weighted = (grad * factor[:, None]).to(grad_out.dtype.element_ty)
        first = (batch_head * scales + s) * rows
        store_rows(weighted_grads + first * HEAD_DIM, row, HEAD_DIM, weighted, everywhere, HEAD_DIM, BLOCK_D)
        of_terms = terms_of(terms + first * TERMS, first_row, BLOCK_N)
        at_center = center + (((b * center_heads + h % center_heads) * queries + n) * scales + s) * 2
        at_precision = precision + (((b * precision_heads + h % precision_heads) * queries + n) * scales + s) * 2
        tl.store(of_terms + CENTER_X * PADDED, tl.load(at_center))
        tl.store(of_terms + CENTER_Y * PADDED, tl.load(at_center + 1))
        tl.store(of_terms + PRECISION_X * PADDED, tl.load(at_precision))
        tl.store(of_terms + PRECISION_Y * PADDED, tl.load(at_precision + 1))
        # A row of padding must not count: its probabilities underflow to 0.
        tl.store(of_terms + LOG_SUM * PADDED, tl.where(in_range, tl.load(lse + at), 1e25))
        tl.store(of_terms + DELTA * PADDED, tl.sum(weighted.to(tl.float32) * keep_p * output, 1))


@triton.jit
def moment_weights(e_x, e_y, d_x, d_y):
    """Weights [ROWS, 16] of the moments dS · features, for centres at e [ROWS] from the tile, d from the nearest cell.

    Of each axis's eight columns (u², 1, u², u, u, u, 1, 1), columns 0, 3 and 6 add up to Σ dS ((u - e)² - d²),
    columns 4 and 7 to Σ dS (u - e + d); column 1 is Σ dS. As that is 0, d changes nothing but the rounding.
    """
    axis_x = tl.arange(0, 16)[None, :] < 8
    e = tl.where(axis_x, e_x[:, None], e_y[:, None])
    d = tl.where(axis_x, d_x[:, None], d_y[:, None])
    i = tl.arange(0, 16)[None, :] % 8
    weights = tl.where((i == 0) | (i == 1) | (i == 4), 1.0, 0.0)
    weights = tl.where(i == 3, -2.0 * e, weights)
    weights = tl.where(i == 6, (e - d) * (e + d), weights)
    return tl.where(i == 7, d - e, weights)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_major_kernel(
    ordered_query,  # [B, H, rows, D] contiguous
    key,  # [B, H, T, D]
    value,  # [B, H, T, D]
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    seed,  # [1] int64, or None without dropout
    plan,  # [B, H, plan_size] contiguous int32 (windows.py), or None: every query sees every key
    weighted_grads,  # dO' [B, H, S, rows, D] contiguous
    terms,  # [B, H, S, row_blocks, TERMS, PADDED] contiguous, fp32
    grad_query,  # [B, H, N, D]
    grad_center,  # [B, H, N, S, 2] contiguous
    grad_precision,  # [B, H, N, S, 2] contiguous
    k_b, k_h, k_t, v_b, v_h, v_t, dq_b, dq_h, dq_n,  # strides, in units of UNIT elements
    heads, queries, row_blocks, keys, scales, plan_size,
    scale, log2_scale, inverse_scale, precision_limit, dropout_threshold,
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
    rows = row_blocks * PADDED
    blocks = tl.cdiv(queries, BLOCK_N)
    batch_head = tl.program_id(0) // blocks
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    block = tl.program_id(0) % blocks
    ordered = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = ordered < queries
    n = tl.minimum(ordered, queries - 1)
    if plan is not None:
        plan += batch_head.to(tl.int64) * plan_size
        n = tl.load(plan + n)
    always_false = queries < 0

    key += (b * k_b + h * k_h) * UNIT
    value += (b * v_b + h * v_h) * UNIT
    ordered_query += batch_head.to(tl.int64) * rows * HEAD_DIM
    weighted_grads += batch_head.to(tl.int64) * scales * rows * HEAD_DIM
    terms = terms_of(terms + batch_head.to(tl.int64) * scales * rows * TERMS, block * BLOCK_N, BLOCK_N)
    batch_head_row = batch_head.to(tl.int64) * queries * scales
    column, row = tile_coordinates(TILE_H, TILE_W)
    if seed is not None:
        row_key = dropout_row_key(tl.load(seed), batch_head, n)

    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_key = 0
    for s in tl.range(scales, disable_licm=True):
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)
        of_scale = terms + s * rows * TERMS
        c_x = tl.load(of_scale + CENTER_X * PADDED)
        c_y = tl.load(of_scale + CENTER_Y * PADDED)
        p_x = tl.load(of_scale + PRECISION_X * PADDED)
        p_y = tl.load(of_scale + PRECISION_Y * PADDED)
        d_x = from_nearest_cell(c_x, valid_width)
        d_y = from_nearest_cell(c_y, valid_height)
        log_sum = tl.load(of_scale + LOG_SUM * PADDED)
        delta = tl.load(of_scale + DELTA * PADDED)
        q = load_rows(ordered_query, ordered, HEAD_DIM, HEAD_DIM, BLOCK_D)
        do = load_rows(weighted_grads + s * rows * HEAD_DIM, ordered, HEAD_DIM, HEAD_DIM, BLOCK_D)
        direct = warp_any((tl.max(tl.maximum(p_x, p_y), 0) > precision_limit).to(tl.int32))
        x0, y0, x1, y1 = window_of_block(plan, queries, block, s, scales, valid_height, valid_width)
        tiles = tl.cdiv(y1 - y0, TILE_H) * tl.cdiv(x1 - x0, TILE_W)

        moments = tl.zeros([BLOCK_N, 16], tl.float32)
        p_moments = tl.zeros([BLOCK_N, 16], tl.float32)
        first_x = tl.zeros([BLOCK_N], tl.float32)
        first_y = tl.zeros([BLOCK_N], tl.float32)
        second_x = tl.zeros([BLOCK_N], tl.float32)
        second_y = tl.zeros([BLOCK_N], tl.float32)
        for DIRECT in tl.static_range(DIRECT_ONLY, 2):
            r_x = p_x * (0.0 if DIRECT else inverse_scale)
            r_y = p_y * (0.0 if DIRECT else inverse_scale)
            fixed = fixed_coefficients(r_x, r_y, grad_query, always_false)
            features = tile_features(TILE_H, TILE_W, grad_query, always_false)
            i = tl.arange(0, 16)[None, :]
            of_moments = tl.where((i % 8 == 1) | (i == 15), 1.0, features.to(tl.float32)).to(q.dtype)
            tile_x = x0
            tile_y = y0
            for _ in range(tl.where(direct == DIRECT, tiles, 0) if DIRECT_ONLY == 0 else tiles):
                x = tile_x + column
                y = tile_y + row
                key_index = first_key + tl.minimum(y, valid_height - 1) * width + tl.minimum(x, valid_width - 1)
                k = load_rows(key, key_index, k_t * UNIT, HEAD_DIM, BLOCK_D)
                v = load_rows(value, key_index, v_t * UNIT, HEAD_DIM, BLOCK_D)
                ignored = (x >= valid_width) | (y >= valid_height)
                if key_padding_mask is not None:
                    ignored |= tl.load(key_padding_mask + b * keys + key_index) != 0
                e_x = c_x - from_middle(tile_x + TILE_W - 1, TILE_W)
                e_y = c_y - from_middle(tile_y + TILE_H - 1, TILE_H)
                coefficients = fixed
                if not DIRECT:
                    base = base_of_tile(r_x, r_y, e_x, e_y, d_x, d_y) + log_sum * inverse_scale
                    coefficients = tile_coefficients(fixed, r_x, r_y, e_x, e_y, base)

                # [BLOCK_N, KEYS]
                logits = dot(q, tl.trans(k), None, PRECISION)
                logits = dot(coefficients, tl.trans(mark_ignored(features, ignored)), logits, PRECISION)
                if DIRECT:
                    x = x.to(tl.float32)[None, :]
                    y = y.to(tl.float32)[None, :]
                    prior_x = direct_prior(p_x[:, None], x, c_x[:, None], d_x[:, None])
                    prior_y = direct_prior(p_y[:, None], y, c_y[:, None], d_y[:, None]) + log_sum[:, None]
                    p = tl.exp2((logits * scale - (prior_x + prior_y)) * LOG2E)
                else:
                    p = tl.exp2(logits * log2_scale)
                dp = dot(do, tl.trans(v), None, PRECISION)
                if seed is not None:
                    kept = keeps(row_key[:, None], dropout_key_key(key_index)[None, :], dropout_threshold)
                    dp = tl.where(kept, dp, 0.0)
                ds = p * (dp - delta[:, None])
                dq = dot(ds.to(k.dtype), k, dq, PRECISION)
                if DIRECT:
                    first_x += tl.sum(ds * (x - (c_x - d_x)[:, None]), 1)
                    first_y += tl.sum(ds * (y - (c_y - d_y)[:, None]), 1)
                    second_x += tl.sum(ds * direct_prior(1.0, x, c_x[:, None], d_x[:, None]), 1)
                    second_y += tl.sum(ds * direct_prior(1.0, y, c_y[:, None], d_y[:, None]), 1)
                else:
                    weights = moment_weights(e_x, e_y, d_x, d_y)
                    moments += dot(ds.to(q.dtype), of_moments, None, PRECISION) * weights
                    p_moments += dot(p.to(q.dtype), of_moments, None, PRECISION) * weights

                tile_x += TILE_W
                row_done = tile_x >= x1
                tile_y = tl.where(row_done, tile_y + TILE_H, tile_y)
                tile_x = tl.where(row_done, x0, tile_x)

        first_key += height * width
        # δ' comes from a P rounded for the product with v: take off what it leaves of Σ dS, which is 0.
        i = tl.arange(0, 16)[None, :]
        total = tl.sum(tl.where(i == 1, p_moments, 0.0), 1)
        error = tl.sum(tl.where(i == 1, moments, 0.0), 1) / tl.where(total == 0.0, 1.0, total)
        moments -= error[:, None] * p_moments
        squared = (i % 8 == 0) | (i % 8 == 3) | (i % 8 == 6)
        second_x += tl.sum(tl.where(squared & (i < 8), moments, 0.0), 1)
        second_y += tl.sum(tl.where(squared & (i >= 8), moments, 0.0), 1)
        linear = (i % 8 == 4) | (i % 8 == 7)
        first_x += tl.sum(tl.where(linear & (i < 8), moments, 0.0), 1)
        first_y += tl.sum(tl.where(linear & (i >= 8), moments, 0.0), 1)
        out_rows = (batch_head_row + n * scales + s) * 2
        tl.store(grad_precision + out_rows, -second_x, mask=in_range)
        tl.store(grad_precision + out_rows + 1, -second_y, mask=in_range)
        tl.store(grad_center + out_rows, 2.0 * p_x * first_x, mask=in_range)
        tl.store(grad_center + out_rows + 1, 2.0 * p_y * first_y, mask=in_range)
    store_rows(grad_query + (b * dq_b + h * dq_h) * UNIT, n, dq_n * UNIT, dq * scale, in_range, HEAD_DIM, BLOCK_D)


@triton.jit
def blocks_that_see(plan, queries, s, scales, tile_x, tile_y, PLAN_N: tl.constexpr):
    """Find which of a plan's first 30 blocks of queries look at a tile: as the bits of an int32, and how many."""
    block = tl.arange(0, 32)
    exists = block < tl.minimum(tl.cdiv(queries, PLAN_N), 30)
    at = plan + queries + (block * scales + s) * 4
    sees = (tl.load(at, mask=exists, other=0) <= tile_x) & (tile_x < tl.load(at + 2, mask=exists, other=0))
    sees &= (tl.load(at + 1, mask=exists, other=0) <= tile_y) & (tile_y < tl.load(at + 3, mask=exists, other=0))
    sees = sees.to(tl.int32)
    return tl.sum(sees << block, 0), warp_any_5_bits(tl.sum(sees, 0))


@triton.jit
def query_of_row(plan, row, queries):
    if plan is None:
        return row
    else:
        return tl.load(plan + tl.minimum(row, queries - 1))


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
    weighted_grads,  # dO' [B, H, S, rows, D] contiguous
    terms,  # [B, H, S, row_blocks, TERMS, PADDED] contiguous, fp32
    grad_key,  # [B, H, T, D]
    grad_value,  # [B, H, T, D]
    k_b, k_h, k_t, v_b, v_h, v_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,  # strides, in units of UNIT elements
    heads, queries, row_blocks, keys, scales, tiles_per_head, plan_size,
    scale, log2_scale, inverse_scale, precision_limit, dropout_threshold,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIRECT: tl.constexpr,  # queries of a block on the direct path, which keeps seven numbers for each
    PLAN_N: tl.constexpr,  # queries of a plan's block, a multiple of both
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECT_ONLY: tl.constexpr,
):  # fmt: skip
    KEYS: tl.constexpr = TILE_H * TILE_W
    rows = row_blocks * PADDED
    batch_head = tl.program_id(0) // tiles_per_head
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    always_false = queries < 0

    # The tile that this program owns: its scale, that scale's first key, and its place in the grid.
    tile = tl.program_id(0) % tiles_per_head
    s = 0
    first_key = 0
    height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    while tile >= tiles:
        tile -= tiles
        s += 1
        first_key += height * width
        height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        tiles = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    tile_x = tile % tl.cdiv(width, TILE_W) * TILE_W
    tile_y = tile // tl.cdiv(width, TILE_W) * TILE_H
    valid_height, valid_width = valid_part(valid_shapes, b, s, scales, height, width)

    column, row = tile_coordinates(TILE_H, TILE_W)
    x = tile_x + column
    y = tile_y + row
    in_grid = (x < width) & (y < height)
    key_index = first_key + tl.minimum(y, height - 1) * width + tl.minimum(x, width - 1)
    ignored = (x >= valid_width) | (y >= valid_height)
    k = load_rows(key + (b * k_b + h * k_h) * UNIT, key_index, k_t * UNIT, HEAD_DIM, BLOCK_D, ~ignored)
    v = load_rows(value + (b * v_b + h * v_h) * UNIT, key_index, v_t * UNIT, HEAD_DIM, BLOCK_D, ~ignored)
    if key_padding_mask is not None:
        ignored |= tl.load(key_padding_mask + b * keys + key_index) != 0
    if seed is not None:
        drop_seed = tl.load(seed)

    ordered_query += batch_head.to(tl.int64) * rows * HEAD_DIM
    weighted_grads += (batch_head.to(tl.int64) * scales + s) * rows * HEAD_DIM
    terms += (batch_head.to(tl.int64) * scales + s) * rows * TERMS
    if plan is not None:
        plan += batch_head.to(tl.int64) * plan_size
    middle_x = from_middle(tile_x + TILE_W - 1, TILE_W)
    middle_y = from_middle(tile_y + TILE_H - 1, TILE_H)

    direct = 1
    if DIRECT_ONLY == 0:
        narrowest = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, rows, BLOCK_N):
            at = terms_of(terms, start, BLOCK_N)
            of_rows = tl.maximum(tl.load(at + PRECISION_X * PADDED), tl.load(at + PRECISION_Y * PADDED))
            narrowest = tl.maximum(narrowest, of_rows)
        direct = warp_any((tl.max(narrowest, 0) > precision_limit).to(tl.int32))

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for DIRECT in tl.static_range(DIRECT_ONLY, 2):
        features = mark_ignored(tile_features(TILE_H, TILE_W, grad_key, always_false), ignored)
        # A tile outside the image has no work, only zeros to write.
        has_work = (tile_x < valid_width) & (tile_y < valid_height) & (direct == DIRECT)
        if plan is None:
            blocks = rows // (BLOCK_DIRECT if DIRECT else BLOCK_N)
        else:
            todo, seeing = blocks_that_see(plan, queries, s, scales, tile_x, tile_y, PLAN_N)
            blocks = seeing * (PLAN_N // (BLOCK_DIRECT if DIRECT else BLOCK_N))
        for i in range(tl.where(has_work, blocks, 0)):
            if plan is None:
                n = i * (BLOCK_DIRECT if DIRECT else BLOCK_N)
            else:
                parts: tl.constexpr = PLAN_N // (BLOCK_DIRECT if DIRECT else BLOCK_N)
                n = lowest_bit(todo) * PLAN_N + i % parts * (BLOCK_DIRECT if DIRECT else BLOCK_N)
                todo = tl.where(i % parts == parts - 1, todo & (todo - 1), todo)
            of_block = terms_of(terms, n, BLOCK_DIRECT if DIRECT else BLOCK_N)
            n += tl.arange(0, BLOCK_DIRECT if DIRECT else BLOCK_N)
            q = load_rows(ordered_query, n, HEAD_DIM, HEAD_DIM, BLOCK_D)
            do = load_rows(weighted_grads, n, HEAD_DIM, HEAD_DIM, BLOCK_D)
            c_x = tl.load(of_block + CENTER_X * PADDED)
            c_y = tl.load(of_block + CENTER_Y * PADDED)
            p_x = tl.load(of_block + PRECISION_X * PADDED)
            p_y = tl.load(of_block + PRECISION_Y * PADDED)
            d_x = from_nearest_cell(c_x, valid_width)
            d_y = from_nearest_cell(c_y, valid_height)
            log_sum = tl.load(of_block + LOG_SUM * PADDED)
            delta = tl.load(of_block + DELTA * PADDED)
            r_x = p_x * (0.0 if DIRECT else inverse_scale)
            r_y = p_y * (0.0 if DIRECT else inverse_scale)
            coefficients = fixed_coefficients(r_x, r_y, grad_key, always_false)
            if not DIRECT:
                e_x = c_x - middle_x
                e_y = c_y - middle_y
                base = base_of_tile(r_x, r_y, e_x, e_y, d_x, d_y) + log_sum * inverse_scale
                coefficients = tile_coefficients(coefficients, r_x, r_y, e_x, e_y, base)

            # [KEYS, BLOCK_N or BLOCK_DIRECT]
            logits = dot(k, tl.trans(q), None, PRECISION)
            logits = dot(features, tl.trans(coefficients), logits, PRECISION)
            if DIRECT:
                of_x = x.to(tl.float32)[:, None]
                of_y = y.to(tl.float32)[:, None]
                prior_x = direct_prior(p_x[None, :], of_x, c_x[None, :], d_x[None, :])
                prior_y = direct_prior(p_y[None, :], of_y, c_y[None, :], d_y[None, :]) + log_sum[None, :]
                p = tl.exp2((logits * scale - (prior_x + prior_y)) * LOG2E)
            else:
                p = tl.exp2(logits * log2_scale)
            dp = dot(v, tl.trans(do), None, PRECISION)
            if seed is not None:
                row_key = dropout_row_key(drop_seed, batch_head, query_of_row(plan, n, queries))
                kept = keeps(row_key[None, :], dropout_key_key(key_index)[:, None], dropout_threshold)
                dp = tl.where(kept, dp, 0.0)
                dv = dot(tl.where(kept, p, 0.0).to(do.dtype), do, dv, PRECISION)
            else:
                dv = dot(p.to(do.dtype), do, dv, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    key_index = first_key + y * width + x
    store_rows(grad_key + (b * dk_b + h * dk_h) * UNIT, key_index, dk_t * UNIT, dk * scale, in_grid, HEAD_DIM, BLOCK_D)
    store_rows(grad_value + (b * dv_b + h * dv_h) * UNIT, key_index, dv_t * UNIT, dv, in_grid, HEAD_DIM, BLOCK_D)
