"""Small Triton kernels under the interface of specializations.py, for the tests of the cost report."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import triton
import triton.language as tl


@triton.jit
def plain_attention(
    query, key, value, out, keys, scale, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """softmax(scale · Q Kᵀ) V in base 2, one tile of queries per program, a loop over tiles of keys."""
    channel = tl.arange(0, HEAD_DIM)
    row = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES))[:, None] * HEAD_DIM + channel[None, :]
    q = tl.load(query + row)
    maximum = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for start in range(0, keys, KEYS):
        tile = (start + tl.arange(0, KEYS))[:, None] * HEAD_DIM + channel[None, :]
        scores = tl.dot(q, tl.trans(tl.load(key + tile))) * scale
        larger = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(value.dtype.element_ty), tl.load(value + tile), mixed * shrink[:, None])
        maximum = larger
    tl.store(out + row, mixed / total[:, None])


@triton.jit
def row_product(left, right, out, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr):
    """A kernel without a loop over keys: the dot product of two rows."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    at = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + row, tl.sum(tl.load(left + at).to(tl.float32) * tl.load(right + at).to(tl.float32), 1))


@triton.jit
def uncompilable(out):
    tl.static_assert(False, "this kernel never compiles")


@dataclasses.dataclass
class Specialization:
    kernel: str
    pass_: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    elements_per_iteration: int = 0
    tensor_flops_per_element: int = 0
    elements_per_program: int = 0
    rare_loops: int = 0
    max_registers: int | None = None
    fuses: bool = True


class EndsTheProcess(dict):  # type: ignore[type-arg]
    def get(self, *_: Any) -> Any:
        os._exit(134)


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """A forward kernel and two backward ones; on sm_86 one that fails, on sm_89 one that ends its process."""
    pointer = f"*{dtype}"
    attention = dict.fromkeys(("query", "key", "value", "out"), pointer) | {"keys": "i32", "scale": "fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    constexprs = {"HEAD_DIM": head_dim, "QUERIES": 64, "KEYS": 64}
    flops = 4 * head_dim
    product = {"left": pointer, "right": pointer, "out": "*fp32"}
    row_constexprs = {"HEAD_DIM": head_dim, "QUERIES": 64}
    forward = Specialization(
        "forward", "forward", plain_attention, attention, constexprs, aligned, 4, 2, 64 * 64, flops
    )
    if arch == 86:
        return [forward, Specialization("broken", "backward", uncompilable, {"out": pointer}, {})]
    if arch == 89:
        return [forward, Specialization("crashing", "backward", uncompilable, EndsTheProcess(), {})]
    return [
        forward,
        dataclasses.replace(forward, kernel="attention", pass_="backward"),
        Specialization("rows", "backward", row_product, product, row_constexprs, elements_per_program=64 * 5523),
    ]
