"""Merging what the splits of a block of queries, or of a tile of keys, have left: in the order of their numbers.

A split has a run of a block's tiles, scale after scale. What it left of scale s is in place split + s: runs of two
scales and runs of two splits never share one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import (
    SCALE_TILES,
    grid_of_scale,
    load_rows,
    queries_of_block,
    splits_in_use,
    store_rows,
    tiles_of_block,
    tiles_to_share,
    valid_part,
    window_of_block,
)

# What the query-major pass leaves of a query and scale: the sums of dS times (x - n), (y - n), ((x - c)² - (n - c)²),
# that of y, and 1; then those of P.
SUMS = tl.constexpr(10)
AT_ONCE = tl.constexpr(4)  # splits whose rows are loaded before the first is needed
UNSPECIALIZED = [
    *("o_b", "o_h", "o_n", "dq_b", "dq_h", "dq_n", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t"),
    *("heads", "precision_heads", "weight_heads", "queries", "keys", "scales", "plan_size", "splits", "scale"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit
def queries_of_part(plan, part, queries, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """The block that ROWS queries belong to, and they as `queries_of_block` has them."""
    n, real = queries_of_block(plan, part, queries, ROWS)
    return part // (BLOCK_N // ROWS), n, real


@triton.jit
def splits_of_run(all_tiles, splits, before, tiles):
    """First split with a run in a scale, and the one behind the last."""
    splits = splits_in_use(all_tiles, splits)
    start = before + SCALE_TILES
    first = ((start + 1) * splits - 1) // all_tiles
    end = ((start + tiles) * splits - 1) // all_tiles + 1
    return first, tl.where(tiles > 0, end, first)


@triton.jit
def tiles_of_scale(
    plan, queries, block, valid_shapes, b, s, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS: tl.constexpr
):  # fmt: skip
    """Tiles of KEYS keys that cover a block's window of one scale."""
    height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    height, width = valid_part(valid_shapes, b, s, scales, height, width)
    x0, y0, x1, y1 = window_of_block(plan, queries, block, s, scales, height, width)
    return tl.cdiv((x1 - x0) * (y1 - y0), KEYS)


@triton.jit
def sum_of_parts(parts, first, end, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Σ parts[rows + i · stride] over i from `first` to before `end`, one after the other: [ROWS, BLOCK], fp32."""
    total = tl.zeros([rows.shape[0], BLOCK], tl.float32)
    for some in range(first, end, AT_ONCE):
        loaded = tl.tuple(())
        for i in tl.static_range(AT_ONCE):
            at = tl.minimum(some + i, end - 1) * stride + rows
            loaded += (load_rows(parts, at, WIDTH, WIDTH, BLOCK),)
        for i in tl.static_range(AT_ONCE):
            total += tl.where(some + i < end, loaded[i], 0.0)
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_outputs_kernel(
    partial_outputs,  # [splits + S - 1, B, H, N, D] contiguous, fp32
    partial_lse,  # [splits + S - 1, B, H, N] contiguous
    scale_weights,  # [B, H or 1, N, S] contiguous, or None
    valid_shapes,  # [B, S, 2] contiguous, or None
    plan,  # [B, H, plan_size] contiguous int32, or None
    out,  # [B, H, N, D]
    scale_outputs,  # [B, H, N, S, D] contiguous, fp32
    lse,  # [B, H, N, S] contiguous, log-sum-exp in base 2
    o_b, o_h, o_n,  # strides, in units of UNIT elements
    heads, weight_heads, queries, scales, plan_size, splits,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # queries of a block, and keys of a tile, of the forward kernel
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Output, outputs per scale and log-sum-exp: what one program a block would have stored."""
    parts_per_head = tl.cdiv(queries, ROWS)
    batch_head = tl.program_id(0) // parts_per_head
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    batch_head = batch_head.to(tl.int64)
    if plan is not None:
        plan += batch_head * plan_size
    block, n, real = queries_of_part(plan, tl.program_id(0) % parts_per_head, queries, BLOCK_N, ROWS)
    all_tiles = tiles_of_block(plan, queries, block, valid_shapes, b, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS)
    row = batch_head * queries + n
    rows = (tl.num_programs(0) // parts_per_head).to(tl.int64) * queries
    weight_row = (b * weight_heads + h % weight_heads) * queries + n
    before = 0
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for s in range(scales):
        tiles = tiles_of_scale(plan, queries, block, valid_shapes, b, s, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS)
        largest = tl.full([ROWS], -1e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        scale_output = tl.zeros([ROWS, BLOCK_D], tl.float32)
        first, end = splits_of_run(all_tiles, splits, before, tiles)
        for some in range(first, end, AT_ONCE):
            log_sums, parts = tl.tuple(()), tl.tuple(())
            for i in tl.static_range(AT_ONCE):
                at = (tl.minimum(some + i, end - 1) + s) * rows + row
                log_sums += (tl.where(some + i < end, tl.load(partial_lse + at), -float("inf")),)
                parts += (load_rows(partial_outputs, at, HEAD_DIM, HEAD_DIM, BLOCK_D),)
            so_far = largest
            for i in tl.static_range(AT_ONCE):
                so_far = tl.maximum(so_far, log_sums[i])
            rescale = tl.exp2(largest - so_far)
            scale_output *= rescale[:, None]
            mass *= rescale
            for i in tl.static_range(AT_ONCE):
                weight = tl.exp2(log_sums[i] - so_far)
                scale_output += weight[:, None] * parts[i]
                mass += weight
            largest = so_far
        before += tiles_to_share(tiles)
        empty = mass == 0.0
        mass = tl.where(empty, 1.0, mass)
        scale_output *= (1.0 / mass)[:, None]
        store_rows(scale_outputs, row * scales + s, HEAD_DIM, scale_output, real, HEAD_DIM, BLOCK_D)
        tl.store(lse + row * scales + s, tl.where(empty, 0.0, largest + tl.log2(mass)), mask=real)
        if scale_weights is not None:
            scale_output *= tl.load(scale_weights + weight_row * scales + s)[:, None]
        total += scale_output
    store_rows(out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, total, real, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_query_gradients_kernel(
    partial_queries,  # [splits, B, H, N, D] contiguous, fp32
    partial_sums,  # [splits + S - 1, B, H, N, SUMS] contiguous, fp32
    precision,  # [B, H or 1, N, S, 2] contiguous, fp32
    valid_shapes,  # [B, S, 2] contiguous, or None
    plan,  # [B, H, plan_size] contiguous int32, or None
    grad_query,  # [B, H, N, D]
    grad_center,  # [B, H, N, S, 2] contiguous
    grad_precision,  # [B, H, N, S, 2] contiguous
    dq_b, dq_h, dq_n,  # strides, in units of UNIT elements
    heads, precision_heads, queries, scales, plan_size, splits, scale,
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # queries of a block, and keys of a tile, of the query-major kernel
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of query, center and precision, the last two from sums of dS corrected by those of P."""
    parts_per_head = tl.cdiv(queries, ROWS)
    batch_head = tl.program_id(0) // parts_per_head
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    batch_head = batch_head.to(tl.int64)
    if plan is not None:
        plan += batch_head * plan_size
    block, n, real = queries_of_part(plan, tl.program_id(0) % parts_per_head, queries, BLOCK_N, ROWS)
    all_tiles = tiles_of_block(plan, queries, block, valid_shapes, b, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS)
    row = batch_head * queries + n
    rows = (tl.num_programs(0) // parts_per_head).to(tl.int64) * queries
    dq = sum_of_parts(partial_queries, 0, splits, rows, row, HEAD_DIM, BLOCK_D)
    store_rows(grad_query + (b * dq_b + h * dq_h) * UNIT, n, dq_n * UNIT, dq * scale, real, HEAD_DIM, BLOCK_D)
    before = 0
    precision += ((b * precision_heads + h % precision_heads) * queries + n) * scales * 2
    column = tl.arange(0, 16)[None, :]
    for s in range(scales):
        tiles = tiles_of_scale(plan, queries, block, valid_shapes, b, s, scales, g0, g1, g2, g3, g4, g5, g6, g7, KEYS)
        first, end = splits_of_run(all_tiles, splits, before, tiles)
        sums = sum_of_parts(partial_sums, first + s, end + s, rows, row, SUMS, 16)
        total = tl.sum(tl.where(column == 4, sums, 0.0), 1)
        p_total = tl.sum(tl.where(column == 9, sums, 0.0), 1)
        # δ' comes from a P rounded for the product with v: take off what it leaves of Σ dS, which is 0.
        error = total / tl.where(p_total == 0.0, 1.0, p_total)
        first_x = tl.sum(tl.where(column == 0, sums, tl.where(column == 5, -error[:, None] * sums, 0.0)), 1)
        first_y = tl.sum(tl.where(column == 1, sums, tl.where(column == 6, -error[:, None] * sums, 0.0)), 1)
        second_x = tl.sum(tl.where(column == 2, sums, tl.where(column == 7, -error[:, None] * sums, 0.0)), 1)
        second_y = tl.sum(tl.where(column == 3, sums, tl.where(column == 8, -error[:, None] * sums, 0.0)), 1)
        before += tiles_to_share(tiles)
        store_prior_gradients(
            precision + s * 2, grad_center, grad_precision, row * scales + s, real,
            first_x, first_y, second_x, second_y, 1,
        )  # fmt: skip


@triton.jit
def store_prior_gradients(
    precision, grad_center, grad_precision, row, real, first_x, first_y, second_x, second_y, AXIS: tl.constexpr
):  # fmt: skip
    """Gradients of centre and precision from the sums of dS times (x - n) and ((x - c)² - (n - c)²), for rows [ROWS].

    `precision` points at p_x of each row; p_y is AXIS further.
    """
    tl.store(grad_precision + row * 2, -second_x, mask=real)
    tl.store(grad_precision + row * 2 + 1, -second_y, mask=real)
    tl.store(grad_center + row * 2, 2.0 * tl.load(precision) * first_x, mask=real)
    tl.store(grad_center + row * 2 + 1, 2.0 * tl.load(precision + AXIS) * first_y, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_key_gradients_kernel(
    partial_keys,  # [splits, B, H, T, D] contiguous, fp32
    partial_values,  # [splits, B, H, T, D] contiguous, fp32
    grad_key,  # [B, H, T, D]
    grad_value,  # [B, H, T, D]
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,  # strides, in units of UNIT elements
    heads, keys, splits,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of key and value."""
    parts_per_head = tl.cdiv(keys, ROWS)
    batch_head = tl.program_id(0) // parts_per_head
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    batch_head = batch_head.to(tl.int64)
    t = tl.program_id(0) % parts_per_head * ROWS + tl.arange(0, ROWS)
    real = t < keys
    t = tl.minimum(t, keys - 1)
    rows = (tl.num_programs(0) // parts_per_head).to(tl.int64) * keys
    row = batch_head * keys + t
    dk = sum_of_parts(partial_keys, 0, splits, rows, row, HEAD_DIM, BLOCK_D)
    dv = sum_of_parts(partial_values, 0, splits, rows, row, HEAD_DIM, BLOCK_D)
    store_rows(grad_key + (b * dk_b + h * dk_h) * UNIT, t, dk_t * UNIT, dk, real, HEAD_DIM, BLOCK_D)
    store_rows(grad_value + (b * dv_b + h * dv_h) * UNIT, t, dv_t * UNIT, dv, real, HEAD_DIM, BLOCK_D)
