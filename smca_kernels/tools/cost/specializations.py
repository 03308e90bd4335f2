"""Kernels as launches compile them: signature, compile-time arguments and launch options of each, by pass.

`specializations` lists what `smca cost` compiles for an architecture, dtype and head dimension: the configurations of
the launch table, with the types that a launch would pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from smca_kernels.backends.triton.configurations import TILED, configuration, constants, dot_precision
from smca_kernels.backends.triton.forward import forward_kernel
from smca_kernels.backends.triton.key_major import key_major_kernel
from smca_kernels.backends.triton.prepare import prepare_kernel
from smca_kernels.backends.triton.query_major import query_major_kernel
from smca_kernels.backends.triton.windows import survey_kernel, window_kernel

# pass → kernels in the order of their launches. What is planned reads the plan that the first two make.
BACKWARD_KERNELS = {"prepare": prepare_kernel, "query_major": query_major_kernel, "key_major": key_major_kernel}
PASSES: dict[str, dict[str, Any]] = {
    "forward": {"forward": forward_kernel},
    "backward": BACKWARD_KERNELS,
    "planned forward": {"survey": survey_kernel, "window": window_kernel, "forward": forward_kernel},
    "planned backward": BACKWARD_KERNELS,
}
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Triton type of every run-time argument of these kernels; "*input" points at elements of the inputs' dtype.
ARGUMENT_TYPES: dict[str, str] = {
    **dict.fromkeys(("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value"), "*input"),
    **dict.fromkeys(("ordered_query", "weighted_grads"), "*input"),
    **dict.fromkeys(("positions", "coefficients", "whole_coefficients"), "*fp16"),
    **dict.fromkeys(("center", "precision", "scale_weights", "grad_center", "grad_precision", "grad_weights"), "*fp32"),
    **dict.fromkeys(("scale_outputs", "lse", "partial_outputs", "partial_lse", "terms", "norms"), "*fp32"),
    **dict.fromkeys(("partial_queries", "partial_sums", "partial_keys", "partial_values"), "*fp32"),
    **dict.fromkeys(("valid_shapes", "seed"), "*i64"),
    **dict.fromkeys(("plan", "direct_blocks", "whole_direct_blocks"), "*i32"),
    "key_padding_mask": "*u8",
    **dict.fromkeys(("q_b", "q_h", "q_n", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "o_b", "o_h", "o_n"), "i32"),
    **dict.fromkeys(("dq_b", "dq_h", "dq_n", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t"), "i32"),
    **dict.fromkeys(("heads", "center_heads", "precision_heads", "weight_heads"), "i32"),
    **dict.fromkeys(("queries", "keys", "scales", "tiles_per_head", "patches_per_head"), "i32"),
    **dict.fromkeys(("plan_size", "widest", "dropout_threshold"), "i32"),
    **dict.fromkeys(("scale", "log2_scale", "inverse_scale", "direct_limit"), "fp32"),
    **dict.fromkeys(("dropout_scale", "keep_p", "log_tolerance"), "fp32"),
    **dict.fromkeys(("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"), "i64"),
}
# Optional arguments that a launch without mask, dropout and split work leaves out.
SPLIT = ("partial_outputs", "partial_lse", "partial_queries", "partial_sums", "partial_keys", "partial_values")
ABSENT = ("key_padding_mask", "seed", *SPLIT)
FULL_WORKLOAD = ((50, 84), (25, 42), (13, 21))  # grids of the benchmarks' workload of that name


@dataclass(frozen=True)
class Specialization:
    """One kernel as a launch with aligned inputs, scale weights and valid shapes, without dropout, compiles it."""

    kernel: str
    pass_: str  # of PASSES
    function: Any  # the JIT function
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int
    elements_per_iteration: int  # queries × keys of one tile; 0 without a loop over tiles
    tensor_flops_per_element: int
    elements_per_program: int = 0  # without such a loop: queries × a scale's keys in `full`, on average; 0: of a plan
    rare_loops: int = 0  # loops that only unusual inputs take: the direct path
    max_registers: int | None = None  # of a thread
    fuses: bool = True  # whether products and sums are contracted


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """List what a launch would compile on an architecture (80 is sm_80), for "fp16", "bf16" or "fp32" and head_dim."""
    kernels = [(pass_, name, kernel) for pass_, of_pass in PASSES.items() for name, kernel in of_pass.items()]
    return [_specialization(arch, dtype, head_dim, *each) for each in kernels]


def _specialization(arch: int, dtype: str, head_dim: int, pass_: str, name: str, function: Any) -> Specialization:
    torch_dtype = TORCH_DTYPES[dtype]
    planned = pass_.startswith("planned")
    chosen = configuration(name, arch, torch_dtype, head_dim, planned)
    absent = ABSENT if planned else (*ABSENT, "plan")
    constexprs = constants(name, chosen, torch_dtype, head_dim, 8, dot_precision(arch, torch_dtype, chosen))
    constexprs |= {argument: None for argument in absent if argument in function.arg_names}
    signature = {
        argument: "constexpr" if argument in constexprs else ARGUMENT_TYPES[argument].replace("input", dtype)
        for argument in function.arg_names
    }
    flops = {"forward": 4 * head_dim + 32, "query_major": 6 * head_dim + 64, "key_major": 8 * head_dim + 32}
    if torch_dtype == torch.float32:
        # Three products of TF32 make one, or six of bfloat16 at twice the rate; none is of the prior.
        flops = {"forward": 12 * head_dim, "query_major": 18 * head_dim, "key_major": 24 * head_dim}
    queries = chosen.tile_n if name == "key_major" else chosen.block_n
    keys_of_scale = sum(height * width for height, width in FULL_WORKLOAD) // len(FULL_WORKLOAD)
    return Specialization(
        kernel=f"planned {name}" if planned and name in (*TILED, "prepare") else name,
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
        max_registers=chosen.max_registers,
        fuses=chosen.fuses,
        elements_per_iteration=queries * chosen.keys if name in TILED else 0,
        tensor_flops_per_element=flops.get(name, 0),
        elements_per_program=chosen.block_n * keys_of_scale if name == "prepare" else 0,
        rare_loops=int(name in TILED and torch_dtype != torch.float32),
    )
