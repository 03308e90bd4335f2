"""Flash attention without a prior, by the same compiler: the reference that SMCA's kernels are read against.

The three kernels compute what SMCA's of the same names do, without prior, mask, scales and dropout, on whole tiles.
`specializations` lists them as specializations.py does the project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from smca_kernels.backends.triton.configurations import has_warp_groups
from smca_kernels.tools.cost.specializations import Specialization


@triton.jit
def forward_kernel(
    query, key, value, out, lse, stride, keys, scale,
    BLOCK_N: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale · q kᵀ) v for BLOCK_N queries; scale includes log2 e."""
    offset = tl.program_id(1) * stride
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, t = tl.arange(0, HEAD_DIM), tl.arange(0, KEYS)
    q = tl.load(query + offset + n[:, None] * HEAD_DIM + d[None, :])
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32) + 1.0
    acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in tl.range(0, keys, KEYS, num_stages=STAGES):
        k = tl.load(key + offset + (start + t)[None, :] * HEAD_DIM + d[:, None])
        logits = tl.dot(q, k)
        m_new = tl.maximum(m, tl.max(logits, 1) * scale)
        p = tl.math.exp2(logits * scale - m_new[:, None])
        rescale = tl.math.exp2(m - m_new)
        v = tl.load(value + offset + (start + t)[:, None] * HEAD_DIM + d[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        total = total * rescale + tl.sum(p, 1)
        m = m_new
    tl.store(out + offset + n[:, None] * HEAD_DIM + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty))
    tl.store(lse + n, m + tl.log2(total))


@triton.jit
def query_major_kernel(
    query, key, value, grad_out, lse, delta, grad_query, stride, keys, scale,
    BLOCK_N: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq = Σ_k dS k for BLOCK_N queries."""
    offset = tl.program_id(1) * stride
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, t = tl.arange(0, HEAD_DIM), tl.arange(0, KEYS)
    q = tl.load(query + offset + n[:, None] * HEAD_DIM + d[None, :])
    do = tl.load(grad_out + offset + n[:, None] * HEAD_DIM + d[None, :])
    log_sum, of_row = tl.load(lse + n), tl.load(delta + n)
    dq = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in tl.range(0, keys, KEYS, num_stages=STAGES):
        k = tl.load(key + offset + (start + t)[:, None] * HEAD_DIM + d[None, :])
        v = tl.load(value + offset + (start + t)[:, None] * HEAD_DIM + d[None, :])
        p = tl.math.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
        ds = p * (tl.dot(do, tl.trans(v)) - of_row[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    tl.store(grad_query + offset + n[:, None] * HEAD_DIM + d[None, :], dq.to(grad_query.dtype.element_ty))


@triton.jit
def key_major_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, stride, queries, scale,
    BLOCK_N: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv = Σ_n P dO and dk = Σ_n dS q for KEYS keys."""
    offset = tl.program_id(1) * stride
    t = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    d, i = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_N)
    k = tl.load(key + offset + t[:, None] * HEAD_DIM + d[None, :])
    v = tl.load(value + offset + t[:, None] * HEAD_DIM + d[None, :])
    dk = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    dv = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    for start in tl.range(0, queries, BLOCK_N, num_stages=STAGES):
        n = start + i
        q = tl.load(query + offset + n[:, None] * HEAD_DIM + d[None, :])
        do = tl.load(grad_out + offset + n[:, None] * HEAD_DIM + d[None, :])
        log_sum, of_row = tl.load(lse + n), tl.load(delta + n)
        p = tl.math.exp2(tl.dot(k, tl.trans(q)) * scale - log_sum[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - of_row[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    tl.store(grad_key + offset + t[:, None] * HEAD_DIM + d[None, :], dk.to(grad_key.dtype.element_ty))
    tl.store(grad_value + offset + t[:, None] * HEAD_DIM + d[None, :], dv.to(grad_value.dtype.element_ty))


KERNELS = {"forward": forward_kernel, "query_major": query_major_kernel, "key_major": key_major_kernel}
PASSES = {"forward": "plain forward", "query_major": "plain backward", "key_major": "plain backward"}
PRODUCTS = {"forward": 2, "query_major": 3, "key_major": 4}
# Types of the arguments that are no tensor of the inputs' dtype.
ARGUMENT_TYPES = {"lse": "*fp32", "delta": "*fp32", "stride": "i32", "keys": "i32", "queries": "i32", "scale": "fp32"}


@dataclass(frozen=True)
class Shape:
    """Size of a tile and launch options."""

    block_n: int
    keys: int
    num_warps: int
    num_stages: int


# (kernel, with products of warp groups) → head dimension up to which a shape holds: of those tried the fastest, as
# simulated.
SHAPES: dict[tuple[str, bool], dict[int, Shape]] = {
    ("forward", False): {32: Shape(64, 64, 4, 3), 64: Shape(128, 64, 4, 3), 128: Shape(64, 64, 4, 2)},
    ("forward", True): {64: Shape(64, 64, 4, 3), 128: Shape(128, 128, 8, 3)},
    ("query_major", False): {128: Shape(64, 64, 4, 3)},
    ("query_major", True): {128: Shape(64, 64, 4, 3)},
    ("key_major", False): {64: Shape(64, 64, 4, 3), 128: Shape(32, 64, 4, 2)},
    ("key_major", True): {128: Shape(64, 64, 4, 3)},
}


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """List the kernels for an architecture with tensor instructions; none for fp32, whose products are FMAs."""
    if dtype == "fp32" or arch < 80:
        return []
    channels = max(16, 1 << (head_dim - 1).bit_length())
    found = []
    for kernel in KERNELS:
        by_head_dim = SHAPES[kernel, has_warp_groups(arch)]
        shape = by_head_dim[min(limit for limit in by_head_dim if limit >= channels)]
        found.append(specialization(kernel, dtype, channels, shape))
    return found


def specialization(kernel: str, dtype: str, head_dim: int, shape: Shape) -> Specialization:
    """Describe one kernel in one shape; head_dim is a power of two."""
    function = KERNELS[kernel]
    constexprs = {
        "BLOCK_N": shape.block_n, "KEYS": shape.keys, "HEAD_DIM": head_dim, "STAGES": shape.num_stages,
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constexprs else ARGUMENT_TYPES.get(name, f"*{dtype}")
        for name in function.arg_names
    }
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name == "stride"]
    return Specialization(
        kernel=f"plain {kernel}",
        pass_=PASSES[kernel],
        function=function,
        signature=signature,
        constexprs=dict(constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        elements_per_iteration=shape.block_n * shape.keys,
        tensor_flops_per_element=PRODUCTS[kernel] * 2 * head_dim,
    )
