"""Backward pass, deterministic: every gradient element is summed by one program in a fixed order.

With dO'_s = α_s dO (over 1 - dropout_p) and δ'_s = α_s dO·O_s, for every scale s:

    P  = 2^(scale · (q kᵀ + coefficients · featuresᵀ))     the log-sum-exp rides in the base (tiles.py)
    dP = dO' vᵀ,   dS = P (dP - δ')                        gradient of the logits, and of logG
    dv = Σ_n P dO',   dk = scale Σ_n dS q                  key-major pass: a program owns one key tile
    dq = scale Σ_s Σ_k dS k                                query-major pass: a program owns BLOCK_N queries
    dp_x = -Σ_k dS (x - c_x)²,   dc_x = 2 p_x Σ_k dS (x - c_x)

`weigh_kernel` prepares dO', δ' and dα = dO·O_s. The sums over dS (x - c)ʲ are moments of a tile's features: one more
product, dS · features, whose columns `moment_weights` weighs by polynomials in the centre; added up once a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.kernels.tiles import (
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
    uniform,
    valid_part,
)

UNSPECIALIZED = [
    *("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_n", "o_s"),
    *("dq_b", "dq_h", "dq_n", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t"),
    *("heads", "center_heads", "precision_heads", "weight_heads", "queries", "keys", "scales", "tiles_per_head"),
    *("scale", "log2_scale", "inverse_scale"),
    *("precision_limit", "dropout_threshold", "dropout_scale", "keep_p"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weigh_kernel(
    grad_out,  # dO [B, H, N, D]
    scale_outputs,  # [B, H, N, S, D] contiguous, fp32
    scale_weights,  # [B, H or 1, N, S] contiguous, or None
    weighted_grads,  # dO' [B, H, N, S, D] contiguous, or None where it equals dO
    deltas,  # δ' [B, H, N, S] contiguous
    grad_weights,  # dα [B, H, N, S] contiguous, or None
    o_b, o_h, o_n,  # strides of dO, in units of UNIT elements
    heads, weight_heads, queries, scales, dropout_scale, keep_p,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_N)
    batch_head = tl.program_id(0) // blocks
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = n < queries
    n = tl.minimum(n, queries - 1)
    first_row = batch_head.to(tl.int64) * queries * scales
    grad = load_rows(grad_out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, HEAD_DIM, BLOCK_D).to(tl.float32)
    for s in range(scales):
        rows = n * scales + s
        output = load_rows(scale_outputs + first_row * HEAD_DIM, rows, HEAD_DIM, HEAD_DIM, BLOCK_D)
        weighted = grad
        if weighted_grads is not None:
            factor = tl.full([BLOCK_N], 1.0, tl.float32) * dropout_scale
            if scale_weights is not None:
                tl.store(grad_weights + first_row + rows, tl.sum(grad * output, 1), mask=in_range)
                weights = scale_weights + (b * weight_heads + h % weight_heads) * queries * scales
                factor *= tl.load(weights + rows)
            # δ' must see dO' as rounded: dP - δ' cancels where one key has all the mass.
            weighted = (grad * factor[:, None]).to(grad_out.dtype.element_ty)
            store_rows(weighted_grads + first_row * HEAD_DIM, rows, HEAD_DIM, weighted, in_range, HEAD_DIM, BLOCK_D)
            weighted = weighted.to(tl.float32) * keep_p
        tl.store(deltas + first_row + rows, tl.sum(weighted * output, 1), mask=in_range)


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
    query,  # [B, H, N, D]
    key,  # [B, H, T, D]
    value,  # [B, H, T, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    seed,  # [1] int64, or None without dropout
    lse,  # [B, H, N, S] contiguous
    deltas,  # [B, H, N, S] contiguous
    weighted_grads,  # dO' [B, H, N, S, D], strides o_b, o_h, o_n, o_s
    grad_query,  # [B, H, N, D]
    grad_center,  # [B, H, N, S, 2] contiguous
    grad_precision,  # [B, H, N, S, 2] contiguous
    q_b, q_h, q_n, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_n, o_s, dq_b, dq_h, dq_n,  # in units of UNIT elements
    heads, center_heads, precision_heads, queries, keys, scales,
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
    blocks = tl.cdiv(queries, BLOCK_N)
    batch_head = tl.program_id(0) // blocks
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = n < queries
    n = tl.minimum(n, queries - 1)
    never = queries < 0

    key += (b * k_b + h * k_h) * UNIT
    value += (b * v_b + h * v_h) * UNIT
    weighted_grads += (b * o_b + h * o_h) * UNIT
    center += (b * center_heads + h % center_heads) * queries * scales * 2
    precision += (b * precision_heads + h % precision_heads) * queries * scales * 2
    first_row = batch_head.to(tl.int64) * queries * scales
    column, row = tile_coordinates(TILE_H, TILE_W)
    if seed is not None:
        row_key = dropout_row_key(tl.load(seed), batch_head, n)

    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
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
        log_sum = tl.load(lse + first_row + n * scales + s)
        delta = tl.load(deltas + first_row + n * scales + s)
        q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D)
        do = load_rows(weighted_grads + s * o_s * UNIT, n, o_n * UNIT, HEAD_DIM, BLOCK_D)
        direct = uniform((tl.max(tl.maximum(p_x, p_y), 0) > precision_limit).to(tl.int32))
        tiles = tl.cdiv(valid_height, TILE_H) * tl.cdiv(valid_width, TILE_W)

        moments = tl.zeros([BLOCK_N, 16], tl.float32)
        p_moments = tl.zeros([BLOCK_N, 16], tl.float32)
        first_x = tl.zeros([BLOCK_N], tl.float32)
        first_y = tl.zeros([BLOCK_N], tl.float32)
        second_x = tl.zeros([BLOCK_N], tl.float32)
        second_y = tl.zeros([BLOCK_N], tl.float32)
        for DIRECT in tl.static_range(DIRECT_ONLY, 2):
            r_x = p_x * (0.0 if DIRECT else inverse_scale)
            r_y = p_y * (0.0 if DIRECT else inverse_scale)
            fixed = fixed_coefficients(r_x, r_y, grad_query, never)
            features = tile_features(TILE_H, TILE_W, grad_query, never)
            i = tl.arange(0, 16)[None, :]
            of_moments = tl.where((i % 8 == 1) | (i == 15), 1.0, features.to(tl.float32)).to(q.dtype)
            tile_x = 0
            tile_y = 0
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
                row_done = tile_x >= valid_width
                tile_y = tl.where(row_done, tile_y + TILE_H, tile_y)
                tile_x = tl.where(row_done, 0, tile_x)

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
        out_rows = (first_row + n * scales + s) * 2
        tl.store(grad_precision + out_rows, -second_x, mask=in_range)
        tl.store(grad_precision + out_rows + 1, -second_y, mask=in_range)
        tl.store(grad_center + out_rows, 2.0 * p_x * first_x, mask=in_range)
        tl.store(grad_center + out_rows + 1, 2.0 * p_y * first_y, mask=in_range)
    store_rows(grad_query + (b * dq_b + h * dq_h) * UNIT, n, dq_n * UNIT, dq * scale, in_range, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_major_kernel(
    query,  # [B, H, N, D]
    key,  # [B, H, T, D]
    value,  # [B, H, T, D]
    center,  # [B, H or 1, N, S, 2] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    valid_shapes,  # [B, S, 2] contiguous, or None
    key_padding_mask,  # [B, T] contiguous uint8, or None
    seed,  # [1] int64, or None without dropout
    lse,  # [B, H, N, S] contiguous
    deltas,  # [B, H, N, S] contiguous
    weighted_grads,  # dO' [B, H, N, S, D], strides o_b, o_h, o_n, o_s
    grad_key,  # [B, H, T, D]
    grad_value,  # [B, H, T, D]
    q_b, q_h, q_n, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_n, o_s,  # strides, in units of UNIT elements
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    heads, center_heads, precision_heads, queries, keys, scales, tiles_per_head,
    scale, log2_scale, inverse_scale, precision_limit, dropout_threshold,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIRECT: tl.constexpr,  # queries of a block on the direct path, which keeps seven numbers for each
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECT_ONLY: tl.constexpr,
):  # fmt: skip
    KEYS: tl.constexpr = TILE_H * TILE_W
    batch_head = tl.program_id(0) // tiles_per_head
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    never = queries < 0

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
    k = load_rows(key + (b * k_b + h * k_h) * UNIT, key_index, k_t * UNIT, HEAD_DIM, BLOCK_D)
    v = load_rows(value + (b * v_b + h * v_h) * UNIT, key_index, v_t * UNIT, HEAD_DIM, BLOCK_D)
    ignored = (x >= valid_width) | (y >= valid_height)
    if key_padding_mask is not None:
        ignored |= tl.load(key_padding_mask + b * keys + key_index) != 0
    if seed is not None:
        drop_seed = tl.load(seed)

    query += (b * q_b + h * q_h) * UNIT
    weighted_grads += (b * o_b + h * o_h + s * o_s) * UNIT
    center += ((b * center_heads + h % center_heads) * queries * scales + s) * 2
    precision += ((b * precision_heads + h % precision_heads) * queries * scales + s) * 2
    first_row = batch_head.to(tl.int64) * queries * scales + s
    middle_x = from_middle(tile_x + TILE_W - 1, TILE_W)
    middle_y = from_middle(tile_y + TILE_H - 1, TILE_H)

    direct = 1
    if DIRECT_ONLY == 0:
        narrowest = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, queries, BLOCK_N):
            rows = tl.minimum(start + tl.arange(0, BLOCK_N), queries - 1) * scales * 2
            narrowest = tl.maximum(narrowest, tl.load(precision + rows))
            narrowest = tl.maximum(narrowest, tl.load(precision + rows + 1))
        direct = uniform((tl.max(narrowest, 0) > precision_limit).to(tl.int32))

    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for DIRECT in tl.static_range(DIRECT_ONLY, 2):
        features = mark_ignored(tile_features(TILE_H, TILE_W, grad_key, never), ignored)
        blocks = tl.cdiv(queries, BLOCK_DIRECT if DIRECT else BLOCK_N)
        # A tile outside the image has no work, only zeros to write.
        has_work = (tile_x < valid_width) & (tile_y < valid_height) & (direct == DIRECT)
        for block in range(tl.where(has_work, blocks, 0)):
            n = block * (BLOCK_DIRECT if DIRECT else BLOCK_N) + tl.arange(0, BLOCK_DIRECT if DIRECT else BLOCK_N)
            in_range = n < queries
            n = tl.minimum(n, queries - 1)
            q = load_rows(query, n, q_n * UNIT, HEAD_DIM, BLOCK_D)
            do = load_rows(weighted_grads, n, o_n * UNIT, HEAD_DIM, BLOCK_D)
            c_x = tl.load(center + n * scales * 2)
            c_y = tl.load(center + n * scales * 2 + 1)
            p_x = tl.load(precision + n * scales * 2)
            p_y = tl.load(precision + n * scales * 2 + 1)
            d_x = from_nearest_cell(c_x, valid_width)
            d_y = from_nearest_cell(c_y, valid_height)
            delta = tl.load(deltas + first_row + n * scales)
            log_sum = tl.load(lse + first_row + n * scales)
            # A row beyond the last query must not count: its probabilities underflow to 0.
            log_sum = tl.where(in_range, log_sum, 1e25)
            r_x = p_x * (0.0 if DIRECT else inverse_scale)
            r_y = p_y * (0.0 if DIRECT else inverse_scale)
            coefficients = fixed_coefficients(r_x, r_y, grad_key, never)
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
                row_key = dropout_row_key(drop_seed, batch_head, n)
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
