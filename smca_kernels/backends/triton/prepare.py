"""What both passes of the backward need of a block of queries, computed once and laid out as they read it.

With dO'_s = α_s dO (over 1 - dropout_p) and δ'_s = α_s dO·O_s, for every scale s:

    P  = 2^(scale · (q kᵀ + coefficients · featuresᵀ))     the log-sum-exp rides in the base (channels.py)
    dP = dO' vᵀ,   dS = P (dP - δ')                        gradient of the logits, and of logG

`prepare_kernel` computes dO', δ', dα = dO·O_s and the coefficients, and lays all that belongs to a query side by side
in the order of the plan (windows.py), padded to whole blocks with zeros. query_major.py and key_major.py sum the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smca_kernels.backends.triton.channels import (
    LN2,
    MASKED,
    grid_of_scale,
    is_direct,
    load_rows,
    nearest_cell,
    prior_coefficients,
    queries_of_block,
    rounded,
    store_rows,
    valid_part,
    warp_any,
    window_of_block,
)

# What is stored side by side for a block of queries and a scale, BLOCK_N numbers each.
CENTER_X = tl.constexpr(0)
CENTER_Y = tl.constexpr(1)
PRECISION_X = tl.constexpr(2)
PRECISION_Y = tl.constexpr(3)
LOG_SUM = tl.constexpr(4)  # log-sum-exp in base 2
DELTA = tl.constexpr(5)  # δ'
TERMS = tl.constexpr(6)
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
    s = tl.program_id(1)
    b = batch_head // heads
    h = batch_head % heads
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if plan is not None:
        plan += batch_head * plan_size
    n, real = queries_of_block(plan, block, queries, BLOCK_N)
    grad = load_rows(grad_out + (b * o_b + h * o_h) * UNIT, n, o_n * UNIT, HEAD_DIM, BLOCK_D, real).to(tl.float32)
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
    if s == 0:
        q = load_rows(query + (b * q_b + h * q_h) * UNIT, n, q_n * UNIT, HEAD_DIM, BLOCK_D, real)
        store_rows(ordered_query + batch_head * rows * HEAD_DIM, row, HEAD_DIM, q, row < rows, HEAD_DIM, BLOCK_D)


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
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    of_row = prior_coefficients(p_x * inverse_scale, p_y * inverse_scale, e_x, e_y, n_x, n_y, log_sum)
    tl.store(coefficients + row[:, None] * 16 + tl.arange(0, 16)[None, :], of_row)
