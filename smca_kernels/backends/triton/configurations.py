"""How each kernel is compiled: tiles, warps, stages and registers, and its compile-time arguments.

A configuration depends on the kernel, the architecture, the dtype and the head dimension alone. Sizes are run-time
values, so a new H×W, number of queries or batch size compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

TILED = ("forward", "query_major", "key_major")
MERGED_ROWS = 8  # that a program merges: a part of every block_n


@dataclass(frozen=True)
class Configuration:
    """How a kernel is compiled. A block has as many queries in all kernels, as they share what is stored of it."""

    block_n: int  # queries
    keys: int  # of a tile
    direct: int  # keys of a tile on the direct path; of the key-major kernel, queries
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread: what lets one more block run on an SM
    blocks_per_sm: int = 1
    tile_n: int = 64  # queries of a tile of the key-major kernel, a part of block_n
    fuses: bool = True  # whether products and sums may be contracted to multiply-adds


# (kernel, has_warp_groups) → head dimension up to which a configuration holds, for half precision. Each is the fastest
# of those tried: on Hopper as an H200 ran them, before as simulated (`smca cost`) and without a spilled register.
CONFIGURATIONS: dict[tuple[str, bool], dict[int, Configuration]] = {
    ("forward", False): {
        32: Configuration(64, 64, 32, 4, 3, 128, 4),
        64: Configuration(64, 64, 32, 4, 3, 168, 3),
        128: Configuration(64, 64, 16, 4, 2, None, 2),
    },
    ("forward", True): {
        32: Configuration(64, 64, 32, 4, 3, 96, 5),
        64: Configuration(64, 64, 32, 4, 3, 168, 3),
        128: Configuration(64, 64, 16, 4, 2, None, 2),
    },
    ("query_major", False): {
        32: Configuration(64, 64, 16, 4, 3, 152, 3),
        64: Configuration(64, 32, 16, 4, 3, 168, 3),
        128: Configuration(64, 32, 16, 8, 2, None, 1),
    },
    ("query_major", True): {
        32: Configuration(64, 64, 16, 4, 3, 160, 3),
        64: Configuration(64, 32, 16, 4, 3, 128, 4),
        128: Configuration(64, 32, 16, 4, 2, None, 2),
    },
    ("key_major", False): {  # up to 32: KEY_MAJOR_32
        64: Configuration(64, 64, 16, 4, 3, None, 2, tile_n=32),
        128: Configuration(64, 32, 16, 4, 2, None, 2),
    },
    ("key_major", True): {
        32: Configuration(64, 64, 32, 4, 3, 168, 3),
        64: Configuration(64, 64, 32, 4, 3, None, 2),
        128: Configuration(64, 64, 16, 4, 2, None, 2),  # simulated; it spills, but below 64 keys there is no wgmma
    },
}
# (sm_80, with a plan) → that of the key-major kernel before Hopper: where ptxas has just what three blocks leave it,
# whether it spills is luck.
KEY_MAJOR_32 = {
    (True, False): Configuration(64, 64, 16, 4, 3, None, 3),
    (True, True): Configuration(64, 64, 16, 4, 3, 168, 3),
    (False, False): Configuration(64, 64, 32, 4, 3, 168, 3),
    (False, True): Configuration(64, 64, 16, 4, 3, None, 2),
}
# Where products are FMAs the kernels are alike: below sm_80, and of fp32 where the table below says so.
FMA_CONFIGURATIONS = {
    32: Configuration(32, 16, 16, 2, 1, blocks_per_sm=4, tile_n=32),
    128: Configuration(32, 16, 16, 2, 2, blocks_per_sm=2, tile_n=32),
}
# The same of fp32, whose products are several on the tensor cores. Its tiles are those of the direct path: of
# `direct` keys, in the key-major kernel of `keys` and `direct` queries.
FLOAT32_CONFIGURATIONS: dict[tuple[str, bool], dict[int, Configuration]] = {
    ("forward", False): {
        32: Configuration(64, 16, 16, 4, 1, 168, 3),
        64: Configuration(64, 16, 16, 4, 1, None, 2),
        128: FMA_CONFIGURATIONS[128],
    },
    ("forward", True): {
        32: Configuration(64, 32, 32, 4, 1, 168, 3),
        64: Configuration(64, 32, 32, 4, 1, None, 2),
        128: Configuration(64, 16, 16, 4, 1, None, 2),
    },
    ("query_major", False): {
        64: Configuration(64, 16, 16, 4, 1, None, 2),
        128: FMA_CONFIGURATIONS[128],
    },
    ("query_major", True): {
        64: Configuration(64, 32, 32, 4, 1, None, 2),
        128: Configuration(64, 16, 16, 4, 1, None, 1),
    },
    ("key_major", False): {
        64: Configuration(64, 64, 16, 4, 1, None, 2, tile_n=16),
        128: FMA_CONFIGURATIONS[128],
    },
    ("key_major", True): {
        32: Configuration(64, 64, 32, 4, 1, 168, 3, tile_n=32),
        64: Configuration(64, 64, 32, 4, 1, None, 2, tile_n=32),
        128: Configuration(64, 64, 16, 4, 1, None, 1, tile_n=16),
    },
}


def configuration(kernel: str, arch: int, dtype: torch.dtype, head_dim: int, planned: bool = False) -> Configuration:
    """The configuration of a kernel on an architecture (80 is sm_80), with a plan or without."""
    if kernel in ("prepare", "survey", "window"):
        # A window's arithmetic is per query: more warps would repeat it, but fp32 queries need their registers.
        warps = 4
        if kernel == "window":
            warps = max(1, _block_d(head_dim) // 32) if dtype == torch.float32 else 1
        # A plan sums squares over lanes: contracted, the lanes would end with different bits (prior.launch).
        like = configuration("forward", arch, dtype, head_dim)
        return replace(like, num_warps=warps, num_stages=1, max_registers=None, fuses=kernel == "prepare")
    if arch < 80:
        by_head_dim = FMA_CONFIGURATIONS
    elif dtype == torch.float32:
        by_head_dim = FLOAT32_CONFIGURATIONS[kernel, has_warp_groups(arch)]
    elif kernel == "key_major" and not has_warp_groups(arch) and head_dim <= 32:
        return KEY_MAJOR_32[arch == 80, planned]
    else:
        by_head_dim = CONFIGURATIONS[kernel, has_warp_groups(arch)]
    return by_head_dim[min(limit for limit in by_head_dim if limit >= head_dim)]


def has_warp_groups(arch: int) -> bool:
    """Whether tensor cores take products of a whole warp group, as Hopper's and its successors' for data centres."""
    return 90 <= arch < 120


@cache
def architecture(device: torch.device) -> int:
    """80 for compute capability 8.0; also on a CPU, where the interpreter runs what an A100 would."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def constants(
    kernel: str, chosen: Configuration, dtype: torch.dtype, head_dim: int, unit: int, precision: str
) -> dict[str, Any]:
    """The compile-time arguments of a kernel."""
    arguments: dict[str, Any] = {
        "UNIT": unit,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_N": chosen.block_n,
    }
    if kernel in TILED:
        arguments |= {
            "KEYS": chosen.keys,
            "STAGES": chosen.num_stages,
            "PRECISION": precision,
            "DIRECT_ONLY": int(dtype == torch.float32),
        }
        if kernel == "key_major":
            arguments |= {"TILE_N": chosen.tile_n, "DIRECT_N": chosen.direct}
        else:
            arguments["DIRECT_KEYS"] = chosen.direct
    return arguments


def launch_options(chosen: Configuration) -> dict[str, Any]:
    """What Triton compiles a configuration with, beside its compile-time arguments."""
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": chosen.fuses}
    return options if chosen.max_registers is None else options | {"maxnreg": chosen.max_registers}


def launch_arguments(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    unit: int,
    plain: bool = True,
    planned: bool = False,
) -> tuple[Configuration, dict[str, Any]]:
    """The configuration of a kernel, and its compile-time arguments with Triton's launch options, not to be changed.

    Where it is not `plain`, but has a mask or dropout, it takes as many registers as it needs.
    """
    arch = architecture(device)
    chosen = configuration(kernel, arch, dtype, head_dim, planned)
    return _launch_arguments(kernel, chosen, dtype, head_dim, unit, plain, dot_precision(arch, dtype, chosen))


@cache
def _launch_arguments(
    kernel: str, chosen: Configuration, dtype: torch.dtype, head_dim: int, unit: int, plain: bool, precision: str
) -> tuple[Configuration, dict[str, Any]]:
    if not plain:
        chosen = replace(chosen, max_registers=None)
    return chosen, constants(kernel, chosen, dtype, head_dim, unit, precision) | launch_options(chosen)


@cache
def merge_arguments(head_dim: int, unit: int) -> dict[str, Any]:
    """Compile-time arguments and launch options for merging what a kernel's splits have left."""
    sizes = {"UNIT": unit, "HEAD_DIM": head_dim, "BLOCK_D": _block_d(head_dim), "ROWS": MERGED_ROWS}
    # Moments are corrected by a product that is summed over lanes: as of a plan's sums, not contracted.
    return sizes | {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": False}


def dot_precision(arch: int, dtype: torch.dtype, chosen: Configuration) -> str:
    """How products of fp32 are made, which obey torch.set_float32_matmul_precision.

    "highest": in fp32, or on tensor cores as three products of TF32, of the high and low parts of both operands
    (`channels.precise_dot` where that is not enough). Anything lower may use TF32.
    """
    if dtype != torch.float32 or arch < 80:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if chosen in FMA_CONFIGURATIONS.values() else "tf32x3"
