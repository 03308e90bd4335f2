"""How the kernels are launched: configurations, arguments, and the specialisations that offline compilation needs.

A configuration depends on the kernel, the dtype's width and the head dimension alone. Sizes are run-time values, so
a new H×W, number of queries or batch size compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smca_kernels.backends.triton.backward import PADDED, TERMS, key_major_kernel, prepare_kernel, query_major_kernel
from smca_kernels.backends.triton.forward import forward_kernel
from smca_kernels.backends.triton.windows import PATCH_H, PATCH_W, survey_kernel, window_kernel

MAX_SCALES = 8
LEAST_BLOCK = 32  # queries of a forward block, at least
MOST_PLANNED_QUERIES = 30 * LEAST_BLOCK  # backward.blocks_that_see
# Pairs of a query and a key from which on a plan is made. At the limits of docs/cost.md these are some 15 µs of an
# H100's forward pass, of which a plan may save half and whose two launches it costs.
LEAST_PLANNED_ELEMENTS = 2**25
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
MOST_SPLITS = 16
LEAST_TILES = 4
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


def packed_grids(spatial_shapes: Sequence[int]) -> list[int]:
    grids = [height << 32 | width for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)]
    return grids + [1 << 32 | 1] * (MAX_SCALES - len(grids))


def device_of(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dropout_threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def dropout_scale(dropout_p: float) -> float:
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def cells(spatial_shapes: Sequence[int]) -> list[int]:
    """Keys of each scale."""
    return [height * width for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)]


def tiles_of_grids(spatial_shapes: Sequence[int], tile_h: int, tile_w: int) -> int:
    """Tiles that cover the grids of all scales."""
    sides = zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)
    return sum(-(-height // tile_h) * -(-width // tile_w) for height, width in sides)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; none on a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def splits_of(programs: int, tiles: int, multiprocessors: int) -> int:
    """How many forward programs share the tiles of each block of queries, when there are `programs` blocks in all."""
    return max(1, min(RESIDENT_PROGRAMS * multiprocessors // programs, tiles // LEAST_TILES, MOST_SPLITS))


def plan_size(queries: int, scales: int) -> int:
    """Integers that a plan has for each batch and head."""
    return queries + 4 * scales * -(-queries // LEAST_BLOCK)


def plan_pays(query: Tensor, spatial_shapes: Sequence[int]) -> bool:
    """Whether a call is so large that leaving out keys may save more time than planning costs."""
    batch, heads, queries, _ = query.shape
    enough = batch * heads * queries * sum(cells(spatial_shapes)) >= LEAST_PLANNED_ELEMENTS
    return enough and queries <= MOST_PLANNED_QUERIES


def plan(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, T, D]
    center: Tensor,  # [B, H or 1, N, S, 2] fp32
    precision: Tensor,  # [B, H or 1, N, S, 2] fp32
    valid_shapes: Tensor | None,  # [B, S, 2]
    key_padding_mask: Tensor | None,  # [B, T] bool
    spatial_shapes: Sequence[int],  # height, width of each scale, flat
    scale: float,
    mass_tolerance: float,
) -> Tensor:
    """Queries in order and their blocks' windows, int32 [B, H, plan_size]: windows.py. Zeros where it doesn't pay."""
    (batch, heads, queries, head_dim), scales = query.shape, len(spatial_shapes) // 2
    shape = batch, heads, plan_size(queries, scales)
    if not plan_pays(query, spatial_shapes):
        return query.new_zeros(shape, dtype=torch.int32)
    query, key = last_axis_contiguous(query), last_axis_contiguous(key)
    center, precision = center.contiguous(), precision.contiguous()
    valid_shapes = None if valid_shapes is None else valid_shapes.contiguous()
    mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    patches = tiles_of_grids(spatial_shapes, PATCH_H.value, PATCH_W.value)
    norms = query.new_empty(batch, heads, patches, dtype=torch.float32)
    planned = query.new_empty(shape, dtype=torch.int32)
    sizes = cells(spatial_shapes)
    log_tolerance = -math.log(mass_tolerance)
    unit = stride_unit((query, key))
    strides = outer_strides(key, unit)
    with device_of(query):
        chosen, compile_time = launch_arguments("survey", query.device, query.dtype, head_dim, unit)
        blocks = -(-queries // chosen.block_n)
        survey_kernel[(batch * heads * (patches + blocks),)](
            key, center, precision, valid_shapes, mask, norms, planned, *strides,
            heads, center.shape[1], precision.shape[1], queries, key.shape[2], scales, patches, shape[2],
            sizes.index(max(sizes)), log_tolerance,
            *packed_grids(spatial_shapes),
            **compile_time,
        )  # fmt: skip
        chosen, compile_time = launch_arguments("window", query.device, query.dtype, head_dim, unit)
        window_kernel[(batch * heads * blocks * scales,)](
            query, key, center, precision, valid_shapes, mask, norms, planned, *outer_strides(query, unit), *strides,
            heads, center.shape[1], precision.shape[1], queries, key.shape[2], scales, patches, shape[2],
            scale, log_tolerance,
            *packed_grids(spatial_shapes),
            **compile_time,
        )  # fmt: skip
    return planned


def forward(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, D]
    center: Tensor,  # [B, H or 1, N, S, 2] fp32
    precision: Tensor,  # [B, H or 1, N, S, 2] fp32
    scale_weights: Tensor | None,  # [B, H or 1, N, S] fp32
    valid_shapes: Tensor | None,  # [B, S, 2]
    key_padding_mask: Tensor | None,  # [B, T] bool
    seed: Tensor | None,  # [1] int64
    plan: Tensor | None,  # [B, H, plan_size] int32
    spatial_shapes: Sequence[int],  # height, width of each scale, flat
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], fp32 outputs per scale [B, H, N, S, D] and log-sum-exp [B, H, N, S]."""
    (batch, heads, queries, head_dim), scales = query.shape, len(spatial_shapes) // 2
    query, key, value = (last_axis_contiguous(t) for t in (query, key, value))
    center, precision = center.contiguous(), precision.contiguous()
    plan = plan if plan is not None and plan_pays(query, spatial_shapes) else None
    out = torch.empty_like(query)
    scale_outputs = query.new_empty(batch, heads, queries, scales, head_dim, dtype=torch.float32)
    lse = query.new_empty(batch, heads, queries, scales, dtype=torch.float32)
    unit = stride_unit((query, key, value, out))
    chosen, compile_time = launch_arguments("forward", query.device, query.dtype, head_dim, unit)
    programs = batch * heads * -(-queries // chosen.block_n)
    tiles = tiles_of_grids(spatial_shapes, chosen.tile_h, chosen.tile_w)
    splits = splits_of(programs, tiles, multiprocessors(query.device))
    partial_outputs, partial_lse, arrivals = None, None, None
    if splits > 1:
        partial_outputs = scale_outputs.new_empty(splits, *scale_outputs.shape)
        partial_lse = lse.new_empty(splits, *lse.shape)
        arrivals = query.new_zeros(programs, dtype=torch.int32)
    with device_of(query):
        forward_kernel[(programs, splits)](
            query, key, value, center, precision,
            None if scale_weights is None else scale_weights.contiguous(),
            None if valid_shapes is None else valid_shapes.contiguous(),
            None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8),
            seed, plan, out, scale_outputs, lse, partial_outputs, partial_lse, arrivals,
            *outer_strides(query, unit), *outer_strides(key, unit), *outer_strides(value, unit),
            *outer_strides(out, unit),
            heads, center.shape[1], precision.shape[1], 1 if scale_weights is None else scale_weights.shape[1],
            queries, key.shape[2], scales, plan_size(queries, scales),
            scale, scale * LOG2E, 1.0 / scale, PRECISION_LIMITS[query.dtype],
            dropout_threshold(dropout_p), dropout_scale(dropout_p),
            *packed_grids(spatial_shapes),
            **compile_time,
        )  # fmt: skip
    return out, scale_outputs, lse


def backward(
    grad_out: Tensor,  # [B, H, N, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    plan: Tensor | None,
    scale_outputs: Tensor,  # [B, H, N, S, D] fp32
    lse: Tensor,  # [B, H, N, S]
    spatial_shapes: Sequence[int],
    dropout_p: float,
    scale: float,
    of_query: bool,  # whether query, center or precision need a gradient
    of_key: bool,  # whether key or value need one
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value, center, precision, scale_weights, per head and in fp32 for the last three.

    A gradient that isn't wanted, or has no input, is an empty tensor.
    """
    (batch, heads, queries, head_dim), scales = query.shape, len(spatial_shapes) // 2
    dtype, keys = query.dtype, key.shape[2]
    query, key, value, grad_out = (last_axis_contiguous(t) for t in (query, key, value, grad_out))
    center, precision = center.contiguous(), precision.contiguous()
    valid_shapes = None if valid_shapes is None else valid_shapes.contiguous()
    mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    plan = plan if plan is not None and plan_pays(query, spatial_shapes) else None
    size = plan_size(queries, scales)

    def nothing() -> Tensor:
        return query.new_empty(0)

    row_blocks = -(-queries // PADDED.value)
    rows = row_blocks * PADDED.value
    ordered_query = query.new_empty(batch, heads, rows, head_dim)
    weighted_grads = query.new_empty(batch, heads, scales, rows, head_dim)
    terms = query.new_empty(batch, heads, scales, rows, TERMS.value, dtype=torch.float32)
    grad_weights = nothing() if scale_weights is None else torch.empty_like(lse)
    grad_query = torch.empty_like(query) if of_query else nothing()
    grad_center = query.new_empty(batch, heads, queries, scales, 2, dtype=torch.float32) if of_query else nothing()
    grad_precision = torch.empty_like(grad_center)
    grad_key, grad_value = (torch.empty_like(key), torch.empty_like(value)) if of_key else (nothing(), nothing())
    unit = stride_unit((key, value, *([grad_query] if of_query else []), *([grad_key, grad_value] if of_key else [])))

    shared = (ordered_query, key, value, valid_shapes, mask, seed, plan, weighted_grads, terms)
    strides = outer_strides(key, unit) + outer_strides(value, unit)
    factors = (scale, scale * LOG2E, 1.0 / scale, PRECISION_LIMITS[dtype], dropout_threshold(dropout_p))
    grids = packed_grids(spatial_shapes)
    with device_of(query):
        of_rows = stride_unit((query, grad_out))
        chosen, compile_time = launch_arguments("prepare", query.device, dtype, head_dim, of_rows)
        prepare_kernel[(batch * heads * (rows // chosen.block_n),)](
            query, center, precision, grad_out, scale_outputs,
            None if scale_weights is None else scale_weights.contiguous(),
            lse, plan, ordered_query, weighted_grads, terms, None if scale_weights is None else grad_weights,
            *outer_strides(query, of_rows), *outer_strides(grad_out, of_rows),
            heads, center.shape[1], precision.shape[1], 1 if scale_weights is None else scale_weights.shape[1],
            queries, row_blocks, scales, size, dropout_scale(dropout_p), 1.0 - dropout_p,
            **compile_time,
        )  # fmt: skip
        if of_key:
            chosen, compile_time = launch_arguments("key_major", query.device, dtype, head_dim, unit)
            tiles = tiles_of_grids(spatial_shapes, chosen.tile_h, chosen.tile_w)
            key_major_kernel[(batch * heads * tiles,)](
                *shared, grad_key, grad_value, *strides,
                *outer_strides(grad_key, unit), *outer_strides(grad_value, unit),
                heads, queries, row_blocks, keys, scales, tiles, size, *factors, *grids,
                **compile_time,
            )  # fmt: skip
        if of_query:
            chosen, compile_time = launch_arguments("query_major", query.device, dtype, head_dim, unit)
            query_major_kernel[(batch * heads * -(-queries // chosen.block_n),)](
                *shared, grad_query, grad_center, grad_precision, *strides, *outer_strides(grad_query, unit),
                heads, queries, row_blocks, keys, scales, size, *factors, *grids,
                **compile_time,
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_center, grad_precision, grad_weights
