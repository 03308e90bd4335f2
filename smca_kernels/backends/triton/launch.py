"""How the kernels are launched: configurations and arguments.

A configuration depends on the kernel, the dtype's width and the head dimension alone. Sizes are run-time values, so
a new H×W, number of queries or batch size compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smca_kernels.backends.triton import hopper, locality
from smca_kernels.backends.triton.backward import PADDED, TERMS, key_major_kernel, prepare_kernel, query_major_kernel
from smca_kernels.backends.triton.forward import forward_kernel
from smca_kernels.backends.triton.windows import PATCH_H, PATCH_W, survey_kernel, window_kernel
from smca_kernels.inputs import MAX_SCALES, AttentionInputs, SpatialShapes

MIN_BLOCK = 32  # queries of a forward block, at least
MAX_PLANNED_QUERIES = 30 * MIN_BLOCK  # backward.blocks_that_see
# Pairs of a query and a key from which on a plan is made. At the limits of docs/cost.md these are some 15 µs of an
# H100's forward pass, of which a plan may save half and whose two launches it costs.
MIN_PLANNED_ELEMENTS = 2**25
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Configuration:
    block_n: int
    tile_h: int
    tile_w: int
    num_warps: int
    num_stages: int


# (kernel, bytes of an element, Hopper or newer) → head dimension up to which a configuration holds. Each is the
# cheapest of those tried, in instructions per element, that spills no register at 32 and 64 (`smca cost`).
CONFIGURATIONS: dict[tuple[str, int, bool], dict[int, Configuration]] = {
    ("forward", 2, False): {
        32: Configuration(64, 8, 8, 4, 2),
        64: Configuration(64, 8, 8, 4, 1),
        128: Configuration(64, 4, 8, 4, 1),
    },
    ("forward", 2, True): {
        32: Configuration(64, 8, 16, 4, 2),
        64: Configuration(64, 8, 8, 4, 2),
        128: Configuration(64, 4, 8, 4, 2),
    },
    ("query_major", 2, False): {
        32: Configuration(64, 8, 8, 4, 1),
        64: Configuration(64, 4, 8, 4, 1),
        128: Configuration(64, 4, 4, 4, 1),
    },
    ("query_major", 2, True): {
        32: Configuration(64, 8, 8, 4, 2),
        64: Configuration(64, 8, 8, 4, 1),
        128: Configuration(64, 4, 8, 4, 2),
    },
    ("key_major", 2, False): {
        32: Configuration(32, 16, 8, 4, 1),
        64: Configuration(32, 8, 8, 4, 1),
        128: Configuration(64, 4, 8, 4, 2),
    },
    ("key_major", 2, True): {
        32: Configuration(64, 8, 16, 4, 2),
        64: Configuration(64, 8, 8, 4, 2),
        128: Configuration(64, 4, 8, 4, 2),
    },
}
# Where products are FMAs, of fp32 inputs and below sm_80 of all, the three kernels are alike.
FMA_CONFIGURATIONS = {32: Configuration(32, 4, 4, 2, 1), 128: Configuration(32, 4, 4, 2, 2)}
PREPARE_CONFIGURATION = Configuration(64, 1, 1, 4, 1)
# A forward program holds half of an SM's registers. More splits than this cost more to merge than they save; fewer
# tiles than this leave a split nothing to pipeline.
RESIDENT_PROGRAMS = 2
MAX_SPLITS = 16
MIN_TILES = 4
TILED = ("forward", "query_major", "key_major")

# Largest precision (per cell²) whose expanded prior is within a quarter of the dtype's rounding step: tiles.py.
PRECISION_LIMITS = {torch.float16: 4.0, torch.bfloat16: 32.0, torch.float32: 0.0}


def configuration(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> Configuration:
    if kernel == "prepare":
        return PREPARE_CONFIGURATION
    if kernel in ("survey", "window"):
        # A window's arithmetic is per query: more warps would repeat it.
        warps = 4 if kernel == "survey" else 1
        return replace(configuration("forward", arch, dtype, head_dim), num_warps=warps, num_stages=1)
    by_fma = dtype == torch.float32 or arch < 80
    by_head_dim = FMA_CONFIGURATIONS if by_fma else CONFIGURATIONS[kernel, dtype.itemsize, arch >= 90]
    return by_head_dim[min(limit for limit in by_head_dim if limit >= head_dim)]


def architecture(device: torch.device) -> int:
    """80 for compute capability 8.0; also on a CPU, where the interpreter runs what an A100 would."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def planned_tile(arch: int, dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    """(height, width) in cells that windows are multiples of: whole tiles of every kernel."""
    chosen = [configuration(kernel, arch, dtype, head_dim) for kernel in TILED]
    return max(c.tile_h for c in chosen), max(c.tile_w for c in chosen)


def constants(
    kernel: str, chosen: Configuration, arch: int, dtype: torch.dtype, head_dim: int, unit: int
) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    arguments: dict[str, Any] = {
        "UNIT": unit,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "BLOCK_N": chosen.block_n,
    }
    if kernel in TILED:
        arguments |= {
            "TILE_H": chosen.tile_h,
            "TILE_W": chosen.tile_w,
            "PRECISION": dot_precision(dtype),
            "DIRECT_ONLY": int(dtype == torch.float32),
        }
    if kernel == "key_major":
        arguments["BLOCK_DIRECT"] = chosen.block_n if dtype == torch.float32 else chosen.block_n // 2
        arguments["PLAN_N"] = configuration("forward", arch, dtype, head_dim).block_n
    if kernel == "window":
        arguments["ALIGN_H"], arguments["ALIGN_W"] = planned_tile(arch, dtype, head_dim)
    return arguments


def launch_arguments(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, unit: int
) -> tuple[Configuration, dict[str, Any]]:
    """The configuration of a kernel, and its compile-time arguments with Triton's launch options."""
    arch = architecture(device)
    chosen = configuration(kernel, arch, dtype, head_dim)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}
    return chosen, constants(kernel, chosen, arch, dtype, head_dim, unit) | options


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products obey torch.set_float32_matmul_precision: "highest" is IEEE, anything lower may use TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def stride_unit(tensors: Sequence[Tensor]) -> int:
    """8 where all outer strides are multiples of 8, which lets the kernels load 16 bytes at a time; else 1."""
    return 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1


def outer_strides(tensor: Tensor, unit: int) -> list[int]:
    return [stride // unit for stride in tensor.stride()[:-1]]


def last_axis_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def packed_grids(spatial_shapes: SpatialShapes) -> list[int]:
    grids = [height << 32 | width for height, width in spatial_shapes]
    return grids + [1 << 32 | 1] * (MAX_SCALES - len(grids))


@contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Launch kernels on a tensor's device, compiled by a ptxas that is right on it."""
    if not tensor.is_cuda:
        yield
        return
    with torch.cuda.device(tensor.device), hopper.right_compiler(tensor.device):
        yield


def dropout_threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def dropout_scale(dropout_p: float) -> float:
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def tiles_of_grids(spatial_shapes: SpatialShapes, tile_h: int, tile_w: int) -> int:
    """Tiles that cover the grids of all scales."""
    return sum(-(-height // tile_h) * -(-width // tile_w) for height, width in spatial_shapes)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 0 on a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def splits_of(programs: int, tiles: int, multiprocessors: int) -> int:
    """How many forward programs share the tiles of each block of queries, when there are `programs` blocks in all."""
    return max(1, min(RESIDENT_PROGRAMS * multiprocessors // programs, tiles // MIN_TILES, MAX_SPLITS))


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


def factors(inputs: AttentionInputs) -> tuple[float, float, float, float, int]:
    """The scale in the three forms that the kernels multiply by, the precision limit and the dropout threshold."""
    scale, limit = inputs.scale, PRECISION_LIMITS[inputs.query.dtype]
    return scale, scale * LOG2E, 1.0 / scale, limit, dropout_threshold(inputs.dropout_p)


def plan(inputs: AttentionInputs) -> Tensor:
    """The order of the queries and the windows of their blocks, int32 [B, H, plan_size]: windows.py.

    The inputs are laid out.
    """
    query, key, center, precision, grids = (
        inputs.query, inputs.key, inputs.center, inputs.precision, inputs.spatial_shapes,
    )  # fmt: skip
    (batch, heads, queries, head_dim), scales = query.shape, len(grids)
    patches = tiles_of_grids(grids, PATCH_H.value, PATCH_W.value)
    norms = query.new_empty(batch, heads, patches, dtype=torch.float32)
    planned = query.new_empty(batch, heads, plan_size(queries, scales), dtype=torch.int32)
    sizes = inputs.keys_per_scale()
    log_tolerance = -math.log(inputs.mass_tolerance)
    unit = stride_unit((query, key))
    strides = outer_strides(key, unit)
    masks = inputs.valid_shapes, inputs.key_padding_mask
    with device_of(query):
        chosen, compile_time = launch_arguments("survey", query.device, query.dtype, head_dim, unit)
        blocks = -(-queries // chosen.block_n)
        survey_kernel[(batch * heads * (patches + blocks),)](
            key, center, precision, *masks, norms, planned, *strides,
            heads, center.shape[1], precision.shape[1], queries, key.shape[2], scales, patches, planned.shape[2],
            sizes.index(max(sizes)), log_tolerance,
            *packed_grids(grids),
            **compile_time,
        )  # fmt: skip
        chosen, compile_time = launch_arguments("window", query.device, query.dtype, head_dim, unit)
        window_kernel[(batch * heads * blocks * scales,)](
            query, key, center, precision, *masks, norms, planned, *outer_strides(query, unit), *strides,
            heads, center.shape[1], precision.shape[1], queries, key.shape[2], scales, patches, planned.shape[2],
            inputs.scale, log_tolerance,
            *packed_grids(grids),
            **compile_time,
        )  # fmt: skip
    return planned


def read_plan(inputs: AttentionInputs) -> locality.Plan | None:
    """What the kernels compute of these inputs, or None where they compute all."""
    if not is_planned(inputs):
        return None
    planned = plan(laid_out(inputs.detached()))
    batch, heads, queries, head_dim = inputs.query.shape
    block = configuration("forward", architecture(inputs.query.device), inputs.query.dtype, head_dim).block_n
    blocks, scales = -(-queries // block), len(inputs.spatial_shapes)
    windows = planned[..., queries : queries + blocks * scales * 4].view(batch, heads, blocks, scales, 4)
    return locality.Plan(planned[..., :queries].long(), windows.long(), block)


def forward(inputs: AttentionInputs, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], fp32 outputs per scale [B, H, N, S, D], log-sum-exp [B, H, N, S], and the plan.

    The plan [B, H, plan_size] is empty without a tolerance, and zeros where it doesn't pay.
    """
    inputs = laid_out(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    (batch, heads, queries, head_dim), grids = query.shape, inputs.spatial_shapes
    scales = len(grids)
    planned = plan(inputs) if is_planned(inputs) else None
    out = torch.empty_like(query)
    scale_outputs = query.new_empty(batch, heads, queries, scales, head_dim, dtype=torch.float32)
    lse = query.new_empty(batch, heads, queries, scales, dtype=torch.float32)
    unit = stride_unit((query, key, value, out))
    chosen, compile_time = launch_arguments("forward", query.device, query.dtype, head_dim, unit)
    programs = batch * heads * -(-queries // chosen.block_n)
    tiles = tiles_of_grids(grids, chosen.tile_h, chosen.tile_w)
    splits = splits_of(programs, tiles, multiprocessors(query.device))
    partial_outputs, partial_lse, arrivals = None, None, None
    if splits > 1:
        partial_outputs = scale_outputs.new_empty(splits, *scale_outputs.shape)
        partial_lse = lse.new_empty(splits, *lse.shape)
        arrivals = query.new_zeros(programs, dtype=torch.int32)
    with device_of(query):
        forward_kernel[(programs, splits)](
            query, key, value, inputs.center, inputs.precision, inputs.scale_weights,
            inputs.valid_shapes, inputs.key_padding_mask, seed, planned,
            out, scale_outputs, lse, partial_outputs, partial_lse, arrivals,
            *outer_strides(query, unit), *outer_strides(key, unit), *outer_strides(value, unit),
            *outer_strides(out, unit),
            heads, *prior_heads(inputs), queries, key.shape[2], scales, plan_size(queries, scales),
            *factors(inputs), dropout_scale(inputs.dropout_p),
            *packed_grids(grids),
            **compile_time,
        )  # fmt: skip
    if planned is None:
        planned = query.new_zeros(plan_shape(inputs), dtype=torch.int32)
    return out, scale_outputs, lse, planned


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

    row_blocks = -(-queries // PADDED.value)
    rows = row_blocks * PADDED.value
    ordered_query = query.new_empty(batch, heads, rows, head_dim)
    weighted_grads = query.new_empty(batch, heads, scales, rows, head_dim)
    terms = query.new_empty(batch, heads, scales, rows, TERMS.value, dtype=torch.float32)
    grad_weights = nothing() if weights is None else torch.empty_like(lse)
    grad_query = torch.empty_like(query) if needs_query else nothing()
    grad_center = query.new_empty(batch, heads, queries, scales, 2, dtype=torch.float32) if needs_query else nothing()
    grad_precision = torch.empty_like(grad_center)
    grad_key, grad_value = (torch.empty_like(key), torch.empty_like(value)) if needs_key else (nothing(), nothing())
    gradients = [*([grad_query] if needs_query else []), *([grad_key, grad_value] if needs_key else [])]
    unit = stride_unit((key, value, *gradients))

    shared = (
        ordered_query, key, value, inputs.valid_shapes, inputs.key_padding_mask, seed, plan, weighted_grads, terms,
    )  # fmt: skip
    strides = outer_strides(key, unit) + outer_strides(value, unit)
    grids = packed_grids(inputs.spatial_shapes)
    with device_of(query):
        row_unit = stride_unit((query, grad_out))
        chosen, compile_time = launch_arguments("prepare", query.device, dtype, head_dim, row_unit)
        prepare_kernel[(batch * heads * (rows // chosen.block_n),)](
            query, inputs.center, inputs.precision, grad_out, scale_outputs, weights,
            lse, plan, ordered_query, weighted_grads, terms, None if weights is None else grad_weights,
            *outer_strides(query, row_unit), *outer_strides(grad_out, row_unit),
            heads, *prior_heads(inputs), queries, row_blocks, scales, size,
            dropout_scale(inputs.dropout_p), 1.0 - inputs.dropout_p,
            **compile_time,
        )  # fmt: skip
        if needs_key:
            chosen, compile_time = launch_arguments("key_major", query.device, dtype, head_dim, unit)
            tiles = tiles_of_grids(inputs.spatial_shapes, chosen.tile_h, chosen.tile_w)
            key_major_kernel[(batch * heads * tiles,)](
                *shared, grad_key, grad_value, *strides,
                *outer_strides(grad_key, unit), *outer_strides(grad_value, unit),
                heads, queries, row_blocks, keys, scales, tiles, size, *factors(inputs), *grids,
                **compile_time,
            )  # fmt: skip
        if needs_query:
            chosen, compile_time = launch_arguments("query_major", query.device, dtype, head_dim, unit)
            query_major_kernel[(batch * heads * -(-queries // chosen.block_n),)](
                *shared, grad_query, grad_center, grad_precision, *strides, *outer_strides(grad_query, unit),
                heads, queries, row_blocks, keys, scales, size, *factors(inputs), *grids,
                **compile_time,
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_center, grad_precision, grad_weights
