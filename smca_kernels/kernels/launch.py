"""How the kernels are launched: configurations, arguments, and the specialisations that offline compilation needs.

A configuration depends on the kernel, the dtype's width and the head dimension alone. Sizes are run-time values, so
a new H×W, number of queries or batch size compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smca_kernels.kernels.backward import key_major_kernel, query_major_kernel, weigh_kernel
from smca_kernels.kernels.forward import forward_kernel

MAX_SCALES = 8
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
WEIGH_CONFIGURATION = Configuration(64, 1, 1, 4, 1)

# Largest precision (per cell²) whose expanded prior is within a quarter of the dtype's rounding step: tiles.py.
PRECISION_LIMITS = {torch.float16: 4.0, torch.bfloat16: 32.0, torch.float32: 0.0}


def configuration(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> Configuration:
    if kernel == "weigh":
        return WEIGH_CONFIGURATION
    by_fma = dtype == torch.float32 or arch < 80
    by_head_dim = FMA_CONFIGURATIONS if by_fma else CONFIGURATIONS[kernel, dtype.itemsize, arch >= 90]
    return by_head_dim[min(limit for limit in by_head_dim if limit >= head_dim)]


def architecture(device: torch.device) -> int:
    """80 for compute capability 8.0; also on a CPU, where the interpreter runs what an A100 would."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def constants(kernel: str, chosen: Configuration, dtype: torch.dtype, head_dim: int, unit: int) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    arguments: dict[str, Any] = {
        "UNIT": unit,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "BLOCK_N": chosen.block_n,
    }
    if kernel != "weigh":
        arguments |= {
            "TILE_H": chosen.tile_h,
            "TILE_W": chosen.tile_w,
            "PRECISION": dot_precision(dtype),
            "DIRECT_ONLY": int(dtype == torch.float32),
        }
    if kernel == "key_major":
        arguments["BLOCK_DIRECT"] = chosen.block_n if dtype == torch.float32 else chosen.block_n // 2
    return arguments


def launch_arguments(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, unit: int
) -> tuple[Configuration, dict[str, Any]]:
    """The configuration of a kernel, and its compile-time arguments with Triton's launch options."""
    chosen = configuration(kernel, architecture(device), dtype, head_dim)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}
    return chosen, constants(kernel, chosen, dtype, head_dim, unit) | options


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
    spatial_shapes: Sequence[int],  # height, width of each scale, flat
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, N, D], fp32 outputs per scale [B, H, N, S, D] and log-sum-exp [B, H, N, S]."""
    (batch, heads, queries, head_dim), scales = query.shape, len(spatial_shapes) // 2
    query, key, value = (last_axis_contiguous(t) for t in (query, key, value))
    center, precision = center.contiguous(), precision.contiguous()
    out = torch.empty_like(query)
    scale_outputs = query.new_empty(batch, heads, queries, scales, head_dim, dtype=torch.float32)
    lse = query.new_empty(batch, heads, queries, scales, dtype=torch.float32)
    unit = stride_unit((query, key, value, out))
    chosen, compile_time = launch_arguments("forward", query.device, query.dtype, head_dim, unit)
    with device_of(query):
        forward_kernel[(batch * heads * -(-queries // chosen.block_n),)](
            query, key, value, center, precision,
            None if scale_weights is None else scale_weights.contiguous(),
            None if valid_shapes is None else valid_shapes.contiguous(),
            None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8),
            seed, out, scale_outputs, lse,
            *outer_strides(query, unit), *outer_strides(key, unit), *outer_strides(value, unit),
            *outer_strides(out, unit),
            heads, center.shape[1], precision.shape[1], 1 if scale_weights is None else scale_weights.shape[1],
            queries, key.shape[2], scales,
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

    def nothing() -> Tensor:
        return query.new_empty(0)

    deltas = torch.empty_like(lse)
    grad_weights = nothing() if scale_weights is None else torch.empty_like(lse)
    grad_query = torch.empty_like(query) if of_query else nothing()
    grad_center = query.new_empty(batch, heads, queries, scales, 2, dtype=torch.float32) if of_query else nothing()
    grad_precision = torch.empty_like(grad_center)
    grad_key, grad_value = (torch.empty_like(key), torch.empty_like(value)) if of_key else (nothing(), nothing())
    weighted = scale_weights is not None or seed is not None
    if weighted:
        weighted_grads = torch.empty_like(scale_outputs, dtype=dtype)
    else:
        weighted_grads = grad_out.unsqueeze(3).expand_as(scale_outputs)
    outer = (query, key, value, weighted_grads, *([grad_query] if of_query else []))
    unit = stride_unit((*outer, *([grad_key, grad_value] if of_key else [])))

    prior_heads = (center.shape[1], precision.shape[1])
    shared = (query, key, value, center, precision, valid_shapes, mask, seed, lse, deltas, weighted_grads)
    o_b, o_h, o_n, o_s = outer_strides(weighted_grads, unit)
    strides = [stride for t in (query, key, value) for stride in outer_strides(t, unit)] + [o_b, o_h, o_n, o_s]
    factors = (scale, scale * LOG2E, 1.0 / scale, PRECISION_LIMITS[dtype])
    grids = packed_grids(spatial_shapes)
    with device_of(query):
        weigh_unit = stride_unit((grad_out,))
        chosen, compile_time = launch_arguments("weigh", query.device, dtype, head_dim, weigh_unit)
        weigh_kernel[(batch * heads * -(-queries // chosen.block_n),)](
            grad_out, scale_outputs, None if scale_weights is None else scale_weights.contiguous(),
            weighted_grads if weighted else None, deltas, None if scale_weights is None else grad_weights,
            *outer_strides(grad_out, weigh_unit), heads, 1 if scale_weights is None else scale_weights.shape[1],
            queries, scales, dropout_scale(dropout_p), 1.0 - dropout_p,
            **compile_time,
        )  # fmt: skip
        if of_key:
            chosen, compile_time = launch_arguments("key_major", query.device, dtype, head_dim, unit)
            tiles = sum(
                -(-height // chosen.tile_h) * -(-width // chosen.tile_w)
                for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)
            )
            key_major_kernel[(batch * heads * tiles,)](
                *shared, grad_key, grad_value, *strides,
                *outer_strides(grad_key, unit), *outer_strides(grad_value, unit),
                heads, *prior_heads, queries, keys, scales, tiles,
                *factors, dropout_threshold(dropout_p), *grids,
                **compile_time,
            )  # fmt: skip
        if of_query:
            chosen, compile_time = launch_arguments("query_major", query.device, dtype, head_dim, unit)
            query_major_kernel[(batch * heads * -(-queries // chosen.block_n),)](
                *shared, grad_query, grad_center, grad_precision, *strides, *outer_strides(grad_query, unit),
                heads, *prior_heads, queries, keys, scales,
                *factors, dropout_threshold(dropout_p), *grids,
                **compile_time,
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_center, grad_precision, grad_weights


# ------------------------------------------------------------------------------------- offline compilation


@dataclass(frozen=True)
class Specialization:
    """One kernel as a launch with aligned inputs, scale weights and valid shapes, without dropout, compiles it."""

    kernel: str
    pass_: str  # "forward" or "backward"
    function: Any  # the JIT function
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int
    elements_per_iteration: int  # queries × keys of one tile; 0 without a loop over keys
    tensor_flops_per_element: int
    elements_per_program: int = 0  # of a kernel without such a loop: its queries × the keys of the `full` workload
    rare_loops: int = 0  # loops that only unusual inputs take: the direct path


KERNELS: dict[str, tuple[Any, str]] = {
    "forward": (forward_kernel, "forward"),
    "weigh": (weigh_kernel, "backward"),
    "query_major": (query_major_kernel, "backward"),
    "key_major": (key_major_kernel, "backward"),
}
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OF_INPUT_DTYPE = {"query", "key", "value", "out", "grad_out", "weighted_grads", "grad_query", "grad_key", "grad_value"}
FLOAT_SCALARS = {"scale", "log2_scale", "inverse_scale", "precision_limit", "dropout_scale", "keep_p"}
ABSENT = ("key_padding_mask", "seed")
FULL_WORKLOAD_KEYS = 50 * 84 + 25 * 42 + 13 * 21


def _argument_type(name: str, dtype: str) -> str:
    if name in OF_INPUT_DTYPE:
        return f"*{dtype}"
    if name == "valid_shapes":
        return "*i64"
    if name in FLOAT_SCALARS:
        return "fp32"
    if name[0] == "g" and name[1:].isdigit():
        return "i64"
    fp32_tensors = ("center", "precision", "scale_weights", "scale_outputs", "lse", "deltas", "grad_weights")
    return "*fp32" if name in (*fp32_tensors, "grad_center", "grad_precision") else "i32"


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """What offline compilation builds for an architecture (80 is sm_80), "fp16", "bf16" or "fp32" and head_dim."""
    torch_dtype = TORCH_DTYPES[dtype]
    rows = []
    for name, (function, pass_) in KERNELS.items():
        chosen = configuration(name, arch, torch_dtype, head_dim)
        constexprs = constants(name, chosen, torch_dtype, head_dim, unit=8)
        constexprs |= {argument: None for argument in ABSENT if argument in function.arg_names}
        signature = {
            argument: "constexpr" if argument in constexprs else _argument_type(argument, dtype)
            for argument in function.arg_names
        }
        flops = {"forward": 4 * head_dim + 48, "query_major": 6 * head_dim + 64, "key_major": 8 * head_dim + 32}
        rows.append(
            Specialization(
                kernel=name,
                pass_=pass_,
                function=function,
                signature=signature,
                constexprs=constexprs,
                attrs={
                    (i,): [["tt.divisibility", 16]]
                    for i, argument in enumerate(function.arg_names)
                    if signature[argument].startswith("*")
                },
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                elements_per_iteration=0 if name == "weigh" else chosen.block_n * chosen.tile_h * chosen.tile_w,
                tensor_flops_per_element=flops.get(name, 0),
                elements_per_program=chosen.block_n * FULL_WORKLOAD_KEYS if name == "weigh" else 0,
                rare_loops=int(name != "weigh" and torch_dtype != torch.float32),
            )
        )
    return rows
