"""How the kernels are launched: grids, splits, arguments and the memory that a pass needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from smca_kernels.backends.triton import locality
from smca_kernels.backends.triton.channels import AXIS_ROWS, MASKED, MIDDLE, ONE_UNIT, SQUARE_UNIT
from smca_kernels.backends.triton.configurations import MERGED_ROWS, launch_arguments, merge_arguments
from smca_kernels.backends.triton.forward import forward_kernel
from smca_kernels.backends.triton.key_major import key_major_kernel
from smca_kernels.backends.triton.launcher import launcher
from smca_kernels.backends.triton.merge import (
    SUMS,
    merge_key_gradients_kernel,
    merge_outputs_kernel,
    merge_query_gradients_kernel,
)
from smca_kernels.backends.triton.prepare import TERMS, prepare_kernel
from smca_kernels.backends.triton.query_major import query_major_kernel
from smca_kernels.backends.triton.windows import PATCH_H, PATCH_W, survey_kernel, window_kernel
from smca_kernels.inputs import MAX_SCALES, AttentionInputs, SpatialShapes

MIN_BLOCK = 32  # queries of a block, at least
MAX_PLANNED_QUERIES = 2048  # windows.place_in_strips
# Pairs of a query and a key from which on a plan is made. On an H200 these are 400 µs of a forward pass, and a plan
# takes about 50.
MIN_PLANNED_ELEMENTS = 2**29
MAX_SPLITS = 32  # programs that share a block of queries or a tile of keys
# What a program costs beside its trips over tiles, and merging: at all, and for each program in a slot. In such trips.
PROGRAM_TRIPS, MERGE_TRIPS, MERGED_PROGRAM_TRIPS = 5.0, 3.0, 3.0

# Largest term of the expanded prior, which errs near the centre by 0.7 · 2⁻²⁴ of it (root mean square, sm_80) and at
# most by 5 · 2⁻²⁴: about a rounding step of P (channels.py). Of fp32 every block is direct, also one whose priors are
# all switched off.
DIRECT_LIMITS = {torch.float16: 8192.0, torch.bfloat16: 32768.0, torch.float32: -1.0}
LOG2E = math.log2(math.e)

_position_tables: dict[torch.device, Tensor] = {}


def position_table(device: torch.device) -> Tensor:
    """Features of positions -255 to 255 and of keys that do not count (channels.py), [2, 1024, 8].

    1024: along x, then along y. 2: float16, then the same numbers in bfloat16, whose bits the tensor shows as float16.
    """
    table = _position_tables.get(device)
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return make_position_table(device)  # a graph must not own what other calls read
        # A copy from the host is waited for, so that calls on other streams find it there.
        table = _position_tables[device] = make_position_table(torch.device("cpu")).to(device)
    return table


def make_position_table(device: torch.device) -> Tensor:
    """Make what `position_table` returns, on a device."""
    middle, rows, unit = MIDDLE.value, AXIS_ROWS.value, SQUARE_UNIT.value
    position = torch.arange(1 - middle, rows - middle, dtype=torch.float32, device=device)
    low = position.square() % 256
    high = (position.square() - low) / unit
    one = torch.full_like(high, ONE_UNIT.value)
    table = high.new_zeros(2, rows, 8)
    for axis in (0, 1):
        columns = (high, high, low / unit, low / unit, position, position, one, one * axis)
        table[axis, 1:] = torch.stack(columns, 1)
    table[0, 0, 7].fill_(MASKED.value)  # an assignment would copy from the host, which a graph can't capture
    return torch.stack([table.half(), table.bfloat16().view(torch.float16)]).view(2, 2 * rows, 8)


def stride_unit(tensors: Sequence[Tensor]) -> int:
    """8 where all outer strides are multiples of 8, which lets the kernels load 16 bytes at a time; else 1."""
    return 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1


def outer_strides(tensor: Tensor, unit: int) -> list[int]:
    """Strides of all axes but the last, in units of so many elements."""
    return [stride // unit for stride in tensor.stride()[:-1]]


def last_axis_contiguous(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: copied unless its last axis is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_rows_like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape, its axes in the same order in memory where the last one stays contiguous."""
    empty = torch.empty_like(tensor)
    # Of a tensor that overlaps itself two axes may have a stride of 1.
    return empty if empty.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def packed_grids(spatial_shapes: SpatialShapes) -> list[int]:
    """The kernels' arguments g0 to g7: height << 32 | width of each scale, filled up with grids of one cell."""
    grids = [height << 32 | width for height, width in spatial_shapes]
    return grids + [1 << 32 | 1] * (MAX_SCALES - len(grids))


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch kernels on a tensor's device."""
    is_current = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(tensor.device)


def dropout_threshold(dropout_p: float) -> int:
    """What `channels.keeps` compares its 32 bits with, an int32."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def dropout_scale(dropout_p: float) -> float:
    """What makes up for the dropped elements: 1 / (1 - dropout_p); 0 where all are dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 0 on a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@lru_cache(maxsize=4096)  # a detector's grids change from batch to batch
def splits_of(programs: int, trips: int, blocks_per_sm: int, multiprocessors: int) -> int:
    """How many programs share the trips of each of `programs` blocks or tiles: what fills the device's slots best."""
    slots = multiprocessors * blocks_per_sm

    def trips_until_the_end(splits: int) -> float:
        computing = -(-programs * splits // slots) * (trips / splits + PROGRAM_TRIPS)
        merging = MERGE_TRIPS + MERGED_PROGRAM_TRIPS * programs * splits / slots if splits > 1 else 0.0
        return computing + merging

    return min(range(1, min(MAX_SPLITS, trips) + 1), key=trips_until_the_end) if programs < 4 * slots else 1


def plan_size(queries: int, scales: int) -> int:
    """Integers that a plan has for each batch and head."""
    return queries + 4 * scales * -(-queries // MIN_BLOCK)


def is_planned(inputs: AttentionInputs) -> bool:
    """Whether a call is so large that leaving out keys may save more time than planning costs."""
    batch, heads, queries, _ = inputs.query.shape
    is_large = batch * heads * queries * inputs.key.shape[2] >= MIN_PLANNED_ELEMENTS
    return inputs.mass_tolerance > 0.0 and is_large and queries <= MAX_PLANNED_QUERIES


def laid_out(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs as the kernels take them, copied where they are not."""
    weights, valid_shapes, mask = inputs.scale_weights, inputs.valid_shapes, inputs.key_padding_mask
    return replace(
        inputs,
        query=last_axis_contiguous(inputs.query),
        key=last_axis_contiguous(inputs.key),
        value=last_axis_contiguous(inputs.value),
        center=inputs.center.float().contiguous(),
        precision=inputs.precision.float().contiguous(),
        scale_weights=None if weights is None else weights.float().contiguous(),
        valid_shapes=None if valid_shapes is None else valid_shapes.contiguous(),
        key_padding_mask=None if mask is None else mask.contiguous().view(torch.uint8),
    )


def prior_heads(inputs: AttentionInputs) -> tuple[int, int, int]:
    """Heads that center, precision and scale_weights have of their own."""
    weights = inputs.scale_weights
    return inputs.center.shape[1], inputs.precision.shape[1], 1 if weights is None else weights.shape[1]


def make_plan(inputs: AttentionInputs) -> Tensor:
    """Compute the order of the queries and the windows of their blocks, int32 [B, H, plan_size]: windows.py.

    Args:
        inputs: as `laid_out` returns them.
    """
    query, key, center, precision, grids = (
        inputs.query, inputs.key, inputs.center, inputs.precision, inputs.spatial_shapes,
    )  # fmt: skip
    (batch, heads, queries, head_dim), scales = query.shape, len(grids)
    patches = sum(-(-height // PATCH_H.value) * -(-width // PATCH_W.value) for height, width in grids)
    norms = query.new_empty(batch, heads, patches, dtype=torch.float32)
    plan = query.new_empty(batch, heads, plan_size(queries, scales), dtype=torch.int32)
    sizes = inputs.keys_per_scale()
    log_tolerance = -math.log(inputs.mass_tolerance)
    unit = stride_unit((query, key))
    strides = outer_strides(key, unit)
    masks = inputs.valid_shapes, inputs.key_padding_mask
    with device_of(query):
        chosen, compile_time = launch_arguments("survey", query.device, query.dtype, head_dim, unit)
        blocks = -(-queries // chosen.block_n)
        launcher(survey_kernel)[(batch * heads * (patches + blocks),)](
            key, center, precision, *masks, norms, plan, *strides,
            heads, center.shape[1], precision.shape[1], queries, key.shape[2], scales, patches, plan.shape[2],
            sizes.index(max(sizes)), log_tolerance,
            *packed_grids(grids),
            **compile_time,
        )  # fmt: skip
        chosen, compile_time = launch_arguments("window", query.device, query.dtype, head_dim, unit)
        launcher(window_kernel)[(batch * heads * blocks * scales,)](
            query, key, center, precision, *masks, norms, plan, *outer_strides(query, unit), *strides,
            heads, center.shape[1], precision.shape[1], queries, key.shape[2], scales, patches, plan.shape[2],
            inputs.scale, log_tolerance,
            *packed_grids(grids),
            **compile_time,
        )  # fmt: skip
    return plan


def read_plan(inputs: AttentionInputs) -> locality.Plan | None:
    """What the kernels compute of these inputs, or None where they compute all."""
    if not is_planned(inputs):
        return None
    plan = make_plan(laid_out(inputs.detached()))
    batch, heads, queries, head_dim = inputs.query.shape
    block = launch_arguments("forward", inputs.query.device, inputs.query.dtype, head_dim, 1)[0].block_n
    blocks, scales = -(-queries // block), len(inputs.spatial_shapes)
    windows = plan[..., queries : queries + blocks * scales * 4].view(batch, heads, blocks, scales, 4)
    return locality.Plan(plan[..., :queries].long(), windows.long(), block)


def forward(inputs: AttentionInputs, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], fp32 outputs per scale [B, H, N, S, D], log-sum-exp in base 2 [B, H, N, S], and the plan.

    The plan [B, H, plan_size] is empty without a tolerance, and zeros where it doesn't pay.
    """
    inputs = laid_out(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    (batch, heads, queries, head_dim), spatial_shapes, dtype = query.shape, inputs.spatial_shapes, query.dtype
    scales = len(spatial_shapes)
    plan = make_plan(inputs) if is_planned(inputs) else None
    out = empty_rows_like(query)
    scale_outputs = query.new_empty(batch, heads, queries, scales, head_dim, dtype=torch.float32)
    lse = query.new_empty(batch, heads, queries, scales, dtype=torch.float32)
    unit = stride_unit((query, key, value, out))
    plain = seed is None and inputs.key_padding_mask is None
    chosen, compile_time = launch_arguments("forward", query.device, dtype, head_dim, unit, plain)
    programs = batch * heads * -(-queries // chosen.block_n)
    tiles = sum(-(-count // chosen.keys) for count in inputs.keys_per_scale())
    splits = splits_of(programs, tiles, chosen.blocks_per_sm, multiprocessors(query.device))
    partial_outputs, partial_lse = None, None
    if splits > 1:
        partial_outputs = scale_outputs.new_empty(splits + scales - 1, batch, heads, queries, head_dim)
        partial_lse = lse.new_empty(splits + scales - 1, batch, heads, queries)
    grids = packed_grids(spatial_shapes)
    with device_of(query):
        launcher(forward_kernel)[(programs, splits)](
            query, key, value, inputs.center, inputs.precision, inputs.scale_weights,
            inputs.valid_shapes, inputs.key_padding_mask, seed, plan,
            position_table(query.device),
            out, scale_outputs, lse, partial_outputs, partial_lse,
            *outer_strides(query, unit), *outer_strides(key, unit), *outer_strides(value, unit),
            *outer_strides(out, unit),
            heads, *prior_heads(inputs), queries, key.shape[2], scales, plan_size(queries, scales),
            inputs.scale * LOG2E, 1.0 / inputs.scale, DIRECT_LIMITS[dtype],
            dropout_threshold(inputs.dropout_p), dropout_scale(inputs.dropout_p),
            *grids,
            **compile_time,
        )  # fmt: skip
        if splits > 1:
            launcher(merge_outputs_kernel)[(batch * heads * -(-queries // MERGED_ROWS),)](
                partial_outputs, partial_lse, inputs.scale_weights, inputs.valid_shapes, plan,
                out, scale_outputs, lse, *outer_strides(out, unit),
                heads, prior_heads(inputs)[2], queries, scales, plan_size(queries, scales), splits, *grids,
                BLOCK_N=chosen.block_n, KEYS=chosen.keys, **merge_arguments(head_dim, unit),
            )  # fmt: skip
    if plan is None:
        plan = query.new_zeros(plan_shape(inputs), dtype=torch.int32)
    return out, scale_outputs, lse, plan


def plan_shape(inputs: AttentionInputs) -> tuple[int, ...]:
    """Sizes of the plan that `forward` returns."""
    batch, heads, queries, _ = inputs.query.shape
    if inputs.mass_tolerance == 0.0:
        return (0,)
    return batch, heads, plan_size(queries, len(inputs.spatial_shapes))


def backward(
    grad_out: Tensor,  # [B, H, N, D]
    inputs: AttentionInputs,
    seed: Tensor | None,  # [1] int64; this and the next three as the forward had and returned them
    planned: Tensor,  # [B, H, plan_size]
    scale_outputs: Tensor,  # [B, H, N, S, D] fp32
    lse: Tensor,  # [B, H, N, S]
    needs_query: bool,  # whether query, center or precision need a gradient
    needs_key: bool,  # whether key or value need one
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value, center, precision, scale_weights, per head and in fp32 for the last three.

    A gradient that isn't wanted, or has no input, is an empty tensor.
    """
    inputs, grad_out = laid_out(inputs), last_axis_contiguous(grad_out)
    query, key, value, weights = inputs.query, inputs.key, inputs.value, inputs.scale_weights
    (batch, heads, queries, head_dim), scales = query.shape, len(inputs.spatial_shapes)
    dtype, keys = query.dtype, key.shape[2]
    plan = planned if is_planned(inputs) else None
    size = plan_size(queries, scales)

    def nothing() -> Tensor:
        return query.new_empty(0)

    chosen, compile_time = launch_arguments("prepare", query.device, dtype, head_dim, 1)
    blocks = -(-queries // chosen.block_n)
    rows = blocks * chosen.block_n
    ordered_query = query.new_empty(batch, heads, rows, head_dim)
    weighted_grads = query.new_empty(batch, heads, scales, rows, head_dim)
    coefficients = query.new_empty(batch, heads, scales, rows, 16, dtype=torch.float16)
    terms = query.new_empty(batch, heads, scales, rows, TERMS.value, dtype=torch.float32)
    direct_blocks = query.new_empty(batch, heads, scales, blocks, dtype=torch.int32)
    whole: tuple[Tensor | None, Tensor | None] = None, None
    if plan is not None:
        whole = torch.empty_like(coefficients), torch.empty_like(direct_blocks)
    grad_weights = nothing() if weights is None else torch.empty_like(lse)
    grad_query = empty_rows_like(query) if needs_query else nothing()
    grad_center = query.new_empty(batch, heads, queries, scales, 2, dtype=torch.float32) if needs_query else nothing()
    grad_precision = torch.empty_like(grad_center)
    grad_key, grad_value = (empty_rows_like(key), empty_rows_like(value)) if needs_key else (nothing(), nothing())
    gradients = [*([grad_query] if needs_query else []), *([grad_key, grad_value] if needs_key else [])]
    unit = stride_unit((key, value, *gradients))
    grids = packed_grids(inputs.spatial_shapes)
    positions = position_table(query.device)
    limits = 1.0 / inputs.scale, DIRECT_LIMITS[dtype]
    factors = inputs.scale, inputs.scale * LOG2E, dropout_threshold(inputs.dropout_p)
    of_inputs = ordered_query, key, value, inputs.valid_shapes, inputs.key_padding_mask, seed, plan, positions
    strides = outer_strides(key, unit) + outer_strides(value, unit)
    keys_per_scale = inputs.keys_per_scale()
    plain = seed is None and inputs.key_padding_mask is None
    with device_of(query):
        row_unit = stride_unit((query, grad_out))
        chosen, compile_time = launch_arguments("prepare", query.device, dtype, head_dim, row_unit)
        launcher(prepare_kernel)[(batch * heads * blocks, scales)](
            query, inputs.center, inputs.precision, grad_out, scale_outputs, weights, inputs.valid_shapes, lse, plan,
            ordered_query, weighted_grads, coefficients, terms, direct_blocks, *whole,
            None if weights is None else grad_weights,
            *outer_strides(query, row_unit), *outer_strides(grad_out, row_unit),
            heads, *prior_heads(inputs), queries, scales, size,
            *limits, dropout_scale(inputs.dropout_p), 1.0 - inputs.dropout_p, *grids,
            **compile_time,
        )  # fmt: skip
        if needs_key:
            chosen, compile_time = launch_arguments(
                "key_major", query.device, dtype, head_dim, unit, plain, plan is not None
            )
            tiles = sum(-(-count // chosen.keys) for count in keys_per_scale)
            programs = batch * heads * tiles
            splits = splits_of(programs, blocks, chosen.blocks_per_sm, multiprocessors(query.device))
            partial_keys, partial_values = None, None
            if splits > 1:
                partial_keys = terms.new_empty(splits, batch, heads, keys, head_dim)
                partial_values = torch.empty_like(partial_keys)
            launcher(key_major_kernel)[(programs, splits)](
                *of_inputs, weighted_grads, terms, *(whole if plan is not None else (coefficients, direct_blocks)),
                grad_key, grad_value, partial_keys, partial_values, *strides,
                *outer_strides(grad_key, unit), *outer_strides(grad_value, unit),
                heads, queries, keys, scales, tiles, size, *factors, *grids,
                **compile_time,
            )  # fmt: skip
            if splits > 1:
                launcher(merge_key_gradients_kernel)[(batch * heads * -(-keys // MERGED_ROWS),)](
                    partial_keys, partial_values, grad_key, grad_value,
                    *outer_strides(grad_key, unit), *outer_strides(grad_value, unit), heads, keys, splits,
                    **merge_arguments(head_dim, unit),
                )  # fmt: skip
        if needs_query:
            chosen, compile_time = launch_arguments("query_major", query.device, dtype, head_dim, unit, plain)
            tiles = sum(-(-count // chosen.keys) for count in keys_per_scale)
            programs = batch * heads * blocks
            splits = splits_of(programs, tiles, chosen.blocks_per_sm, multiprocessors(query.device))
            partial_queries, partial_sums = None, None
            if splits > 1:
                partial_queries = terms.new_empty(splits, batch, heads, queries, head_dim)
                partial_sums = terms.new_empty(splits + scales - 1, batch, heads, queries, SUMS.value)
            launcher(query_major_kernel)[(programs, splits)](
                *of_inputs, weighted_grads, terms, coefficients, direct_blocks,
                grad_query, grad_center, grad_precision,
                partial_queries, partial_sums, *strides, *outer_strides(grad_query, unit),
                heads, queries, keys, scales, size, *factors, *grids,
                **compile_time,
            )  # fmt: skip
            if splits > 1:
                launcher(merge_query_gradients_kernel)[(batch * heads * -(-queries // MERGED_ROWS),)](
                    partial_queries, partial_sums, inputs.precision, inputs.valid_shapes, plan,
                    grad_query, grad_center, grad_precision, *outer_strides(grad_query, unit),
                    heads, prior_heads(inputs)[1], queries, scales, size, splits, inputs.scale, *grids,
                    BLOCK_N=chosen.block_n, KEYS=chosen.keys, **merge_arguments(head_dim, unit),
                )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_center, grad_precision, grad_weights
