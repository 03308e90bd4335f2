"""Well-known Triton kernels whose results are known, each run on the machine, and faults to plant in them.

For test_machine.py and hunt.py, which run these functions in a process in which Triton compiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from smca_kernels import smca_attention
from smca_kernels.testing.machine import launcher
from smca_kernels.testing.machine.launcher import Session, on_machine, run_kernel
from smca_kernels.testing.machine.memory import Faults

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Strides of these allow asynchronous copies, and every tile is whole.
EVEN = {"sizes": (64, 64, 256)}
# Triton 3.6 puts no fence.proxy.async between cp.async and the wgmma that reads what it copied; 3.7 does.
IS_UNFENCED = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask) + tl.load(y + i, mask=mask), mask=mask)


@triton.jit
def softmax_kernel(out, x, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + i, mask=i < columns, other=-float("inf"))
    values = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + i, values / tl.sum(values, 0), mask=i < columns)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, a_m, a_k, b_k, b_n, c_m, c_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        left_at = a + m[:, None] * a_m + (start + k)[None, :] * a_k
        right_at = b + (start + k)[:, None] * b_k + n[None, :] * b_n
        left = tl.load(left_at, mask=rows & inside[None, :], other=0.0)
        right = tl.load(right_at, mask=inside[:, None] & columns, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * c_m + n[None, :] * c_n, acc.to(c.dtype.element_ty), mask=rows & columns)


@triton.jit
def attention_kernel(q, k, v, out, scale, N, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The forward of Triton's tutorial on fused attention, without causality."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    head = tl.program_id(1) * N * HEAD_DIM
    queries = tl.load(q + head + m[:, None] * HEAD_DIM + d[None, :])
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = tl.load(k + head + n[None, :] * HEAD_DIM + d[:, None])
        logits = tl.dot(queries, keys) * (scale * 1.44269504)
        new = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp2(logits - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        values = tl.load(v + head + n[:, None] * HEAD_DIM + d[None, :])
        acc = tl.dot(p.to(values.dtype), values, acc)
        largest = new
    tl.store(out + head + m[:, None] * HEAD_DIM + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty))


@triton.jit
def split_sum_kernel(x, partial, counter, out, n, BLOCK: tl.constexpr):
    """Each program leaves a partial sum; the last to arrive adds them up in order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + i, tl.load(x + i, mask=i < n, other=0.0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for p in range(tl.num_programs(0)):
            total += tl.load(partial + p * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK))
        tl.store(out + tl.arange(0, BLOCK), total)


# --- runs: (session, largest error, tolerance) ---

Run = Callable[..., tuple[Session, float, float]]


def add(arch: int, **options: Any) -> tuple[Session, float, float]:
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1000,), float("nan"))
    session = run_kernel(add_kernel, arch, (x, y, out, 1000), (4,), BLOCK=256, **options)
    return session, (out - (x + y)).abs().max().item(), 0.0


def add_beyond_view(arch: int, **options: Any) -> tuple[Session, float, float]:
    """Ten elements more than the view has; the storage has them."""
    x, y, out = torch.randn(1024)[:1000], torch.randn(1024), torch.zeros(1024)
    return run_kernel(add_kernel, arch, (x, y, out, 1010), (4,), BLOCK=256, **options), 0.0, 0.0


def add_uninitialised(arch: int, **options: Any) -> tuple[Session, float, float]:
    out = torch.zeros(1000)
    with on_machine(arch, **options) as session:
        x, y = torch.empty(1000), torch.randn(1000)
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    return session, 0.0, 0.0


def softmax(arch: int, **options: Any) -> tuple[Session, float, float]:
    x, out = torch.randn(5, 700), torch.full((5, 700), float("nan"))
    session = run_kernel(softmax_kernel, arch, (out, x, 700, 700), (5,), BLOCK=1024, **options)
    return session, (out.double() - x.double().softmax(-1)).abs().max().item(), 2e-7


def matmul(
    arch: int, dtype: str = "fp16", left: bool = False, right: bool = False, precision: str = "ieee",
    blocks: tuple[int, int, int] = (64, 64, 32), stages: int = 3, sizes: tuple[int, int, int] = (100, 90, 200),
    **options: Any,
) -> tuple[Session, float, float]:  # fmt: skip
    """`left` and `right`: whether that operand is transposed in memory."""
    m, n, k = sizes
    a = torch.randn(k, m).to(DTYPES[dtype]).t() if left else torch.randn(m, k).to(DTYPES[dtype])
    b = torch.randn(n, k).to(DTYPES[dtype]).t() if right else torch.randn(k, n).to(DTYPES[dtype])
    c = torch.full((m, n), float("nan"))
    grid = -(-m // blocks[0]), -(-n // blocks[1])
    session = run_kernel(
        matmul_kernel, arch, (a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride()), grid, BLOCK_M=blocks[0],
        BLOCK_N=blocks[1], BLOCK_K=blocks[2], PRECISION=precision, num_stages=stages, **options,
    )  # fmt: skip
    return session, (c.double() - a.double() @ b.double()).abs().max().item(), 0.1 if precision == "tf32" else 5e-5


def attention(arch: int, dtype: str = "fp16", head_dim: int = 64, **options: Any) -> tuple[Session, float, float]:
    q, k, v = (torch.randn(2, 128, head_dim).to(DTYPES[dtype]) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    session = run_kernel(
        attention_kernel, arch, (q, k, v, out, head_dim**-0.5, 128), (2, 2), HEAD_DIM=head_dim, BLOCK_M=64,
        BLOCK_N=32, num_stages=2, **options,
    )  # fmt: skip
    exact = (q.double() @ k.double().transpose(-1, -2) * head_dim**-0.5).softmax(-1) @ v.double()
    return session, (out.double() - exact).abs().max().item(), 2e-3 if dtype == "fp16" else 2e-2


def split_sum(arch: int, **options: Any) -> tuple[Session, float, float]:
    x = torch.randn(5 * 128)
    partial, out, counter = torch.full((640,), float("nan")), torch.zeros(128), torch.zeros(1, dtype=torch.int32)
    session = run_kernel(split_sum_kernel, arch, (x, partial, counter, out, 640), (5,), BLOCK=128, **options)
    return session, (out - x.view(5, 128).flip(1).sum(0)).abs().max().item(), 1e-5


def split_sum_uncounted(arch: int, **options: Any) -> tuple[Session, float, float]:
    """A counter that nobody set to zero."""
    x, out = torch.randn(640), torch.zeros(128)
    with on_machine(arch, **options) as session:
        partial, counter = torch.full((640,), float("nan")), torch.empty(1, dtype=torch.int32)
        split_sum_kernel[(5,)](x, partial, counter, out, 640, BLOCK=128)
    return session, 0.0, 0.0


def bytes_left_unwritten() -> int:
    """Of a result of 1000 numbers whose first 900 are written."""
    with on_machine(80) as session:
        out = torch.empty(1000)
        add_kernel[(4,)](torch.randn(1000), torch.randn(1000), out, 900, BLOCK=256)
    assert out[900:].isnan().all()
    return session.unwritten(out)


# --- known results ---


@dataclass(frozen=True)
class Known:
    """A kernel whose result is known; `quick` ones are in the suite, all in the hunt."""

    name: str
    run: Run
    arch: int
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = True


def known_of(arch: int) -> list[Known]:
    cases = [Known("add", add, arch), Known("softmax", softmax, arch), Known("split sum", split_sum, arch)]
    orders = [{"order": order, "at_once": 2} for order in ("reversed", "shuffled")]
    cases += [Known(f"split sum, {options['order']}", split_sum, arch, options) for options in orders]
    for dtype in ("fp16", "bf16"):
        is_quick = dtype == ("fp16" if arch < 90 else "bf16")
        for left in (False, True):
            for right in (False, True):
                name = f"matmul {dtype}, transposed {left:d}{right:d}"
                options = {"dtype": dtype, "left": left, "right": right}
                cases.append(Known(name, matmul, arch, options, is_quick))
        for k in (16, 64, 128):
            for n in (16, 32, 128):
                for left in (False, True):
                    options = {"dtype": dtype, "left": left, "right": not left, "blocks": (64, n, k), "stages": 2}
                    name = f"matmul {dtype}, 64 x {n} x {k}, transposed {left:d}{not left:d}"
                    is_in_suite = is_quick and (n, k) in ((16, 16), (32, 64), (128, 128)) and left == (n == 32)
                    cases.append(Known(name, matmul, arch, options, is_in_suite))
        for head_dim in (16, 32, 64, 128):
            options = {"dtype": dtype, "head_dim": head_dim}
            is_in_suite = not is_quick and head_dim in (32, 128)
            cases.append(Known(f"attention {dtype}, head_dim {head_dim}", attention, arch, options, is_in_suite))
    for precision in ("ieee", "tf32", "tf32x3"):
        for side in (False, True):
            options = {"dtype": "fp32", "left": side, "right": side, "precision": precision}
            name = f"matmul fp32 {precision}, transposed {side:d}{side:d}"
            cases.append(Known(name, matmul, arch, options, side == (arch < 90)))
    return cases


KNOWN = [*known_of(80), *known_of(90)]


def run_known(name: str, arch: int) -> tuple[Faults, float, float]:
    """What the checks found, the largest error and its tolerance."""
    case = next(case for case in KNOWN if (case.name, case.arch) == (name, arch))
    torch.manual_seed(0)
    session, error, tolerance = case.run(arch, **case.options)
    return session.faults, error, tolerance


def value_and_output_of_one_key(arch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A single key's value and what the compiled kernels make of it, which is its value times a weight of 1."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 4, 2, 1, 32, generator=generator)
    center, precision = torch.rand(2, 4, 2, 1, 1, 2, generator=generator)
    with launcher.smca_on_machine(arch):
        return value, smca_attention(query, key, value, center, precision, [(1, 1)], backend="triton")


def kernels_kept(limit: int) -> tuple[int, int]:
    """How many programs and compiled kernels are kept after three known ones, with room for `limit`."""
    with (
        mock.patch.object(launcher, "MAX_KEPT", limit),
        mock.patch.dict(launcher._programs, clear=True),
        mock.patch.dict(launcher._compiled, clear=True),
    ):
        for case in KNOWN[:3]:
            case.run(case.arch, **case.options)
        return len(launcher._programs), len(launcher._compiled)


# --- planted faults ---

BARRIER = r"\n\tbar\.sync\s+0;"
WGMMA = r"(wgmma\.mma_async[^;]*?)(%rd\d+), (%rd\d+)(, \S+, 1, 1, \d, \d;)"
SKIP_BARRIER = (
    "\n\t{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.b32 q, t, 5; @q bra $$SKIP; }"
    "\n\tbar.sync 0;\n$$SKIP:\n"
)


def replaced(pattern: str, by: str = "", which: int = 0, times: int = 1) -> Callable[[str], str]:
    """An edit: the `which`-th match of a pattern replaced, `times` times over."""

    def edit(text: str) -> str:
        for _ in range(times):
            match = list(re.finditer(pattern, text))[which]
            text = text[: match.start()] + match.expand(by) + text[match.end() :]
        return text

    return edit


def replaced_everywhere(pattern: str, by: str = "") -> Callable[[str], str]:
    return lambda text: re.sub(pattern, by, text)


@dataclass(frozen=True)
class Planted:
    """A fault in a kernel that is right without it.

    Attributes:
        edit: of the PTX.
        kinds: of `memory.KINDS` that must be reported; empty: no check can see it, the result must be wrong.
    """

    run: Run
    arch: int
    edit: Callable[[str], str] | None
    kinds: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


LOAD = r"(ld\.global\.b32 .*\+ )0( \];)"
LDMATRIX = r"(ldmatrix[^;]*\[%r\d+)(?:\+\d+)?\]"
PLANTED = {
    "load shifted out of bounds": Planted(add, 80, replaced(LOAD, r"\g<1>65536\g<2>"), ("memcheck",)),
    "load before the beginning": Planted(add, 80, replaced(LOAD, r"\g<1>-8\g<2>"), ("memcheck",)),
    "load shifted by half an element": Planted(add, 80, replaced(LOAD, r"\g<1>2\g<2>"), ("misaligned",)),
    "view passed inside its storage": Planted(add_beyond_view, 80, None, ("memcheck: outside of the view",)),
    "torch.empty read": Planted(add_uninitialised, 80, None, ("initcheck",)),
    "atomic on torch.empty": Planted(split_sum_uncounted, 80, None, ("initcheck",)),
    "store without its mask": Planted(add, 80, replaced(r"@%p\d+ (st\.global)", r"\1"), ("memcheck",)),
    "store lost": Planted(add, 80, replaced(r"@%p\d+ st\.global[^;]*;")),
    "softmax, no barrier before a read": Planted(softmax, 80, replaced(BARRIER), ("racecheck shared",)),
    "softmax, shared store lost": Planted(
        softmax, 80, replaced(r"(@%p\d+ )?st\.shared(::cta)?\.b32[^;]*;"), ("initcheck shared",)
    ),
    "matmul, copies not waited for": Planted(
        matmul, 80, replaced_everywhere(r"cp\.async\.wait_group\s+\d+;"), ("cp.async not waited for",), EVEN
    ),
    "matmul, waits for a group too few": Planted(
        matmul, 80, replaced_everywhere(r"(cp\.async\.wait_group\s+)2;", r"\g<1>4;"), ("cp.async not waited for",), EVEN
    ),
    "matmul, ldmatrix not transposed": Planted(
        matmul, 80, replaced(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1")
    ),
    "matmul, mma lost": Planted(matmul, 80, replaced(r"mma\.sync[^;]*;")),
    "matmul, shared address beyond the end": Planted(
        matmul, 80, replaced(LDMATRIX, r"\1+65536]"), ("memcheck shared",)
    ),
    "matmul, shared address off by 8": Planted(matmul, 80, replaced(LDMATRIX, r"\1+8]"), ("misaligned shared",)),
    "matmul, one thread skips a barrier": Planted(matmul, 80, replaced(BARRIER, SKIP_BARRIER), ("synccheck",)),
    "matmul sm_90, wgmma not waited for": Planted(
        matmul, 90, replaced(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", which=-1),
        ("wgmma register", "wgmma not waited for"),
    ),
    "matmul sm_90, a copy not waited for": Planted(
        matmul, 90, replaced(r"cp\.async\.wait_group\s+\d+;"), ("cp.async not waited for",), EVEN
    ),
    "matmul sm_90, no proxy fence": Planted(
        matmul, 90, replaced_everywhere(r"fence\.proxy\.async\.shared::cta;"), ("proxy fence",)
    ),
    "matmul sm_90, descriptor beyond the end": Planted(
        matmul, 90, replaced(WGMMA, r"add.s64 \g<2>, \g<2>, 4096; \g<1>\g<2>, \g<3>\g<4>"), ("memcheck shared",)
    ),
    "matmul sm_90, another swizzle": Planted(
        matmul, 90, replaced(WGMMA, r"xor.b64 \g<2>, \g<2>, 0xC000000000000000; \g<1>\g<2>, \g<3>\g<4>")
    ),
    "split sum, relaxed atomic": Planted(
        split_sum, 80, replaced_everywhere("acq_rel", "relaxed"), ("racecheck global",), {"at_once": 1}
    ),
    "split sum, no barrier before the atomic": Planted(
        split_sum, 80, replaced(BARRIER, times=2), ("racecheck global",), {"at_once": 1}
    ),
}  # fmt: skip


def run_planted(name: str, plant: bool = True) -> tuple[set[str], bool]:
    """Kinds of the faults that are reported, and whether the result is right."""
    planted = PLANTED[name]
    torch.manual_seed(0)
    session, error, tolerance = planted.run(planted.arch, **planted.options, edit=planted.edit if plant else None)
    return session.faults.kinds, error <= tolerance


# --- barriers removed ---

# kernel: how it runs, and how many of its barriers may go unnoticed: another follows, or nothing shares memory there.
# Releases of Triton differ in them.
BARRIERS: dict[str, tuple[Run, int, dict[str, Any], int]] = {
    "softmax, sm_80": (softmax, 80, {}, 0),
    "matmul, sm_80": (matmul, 80, {}, 0),
    "matmul with copies, sm_80": (matmul, 80, EVEN, 2),
    "attention, sm_80": (attention, 80, {}, 1),
    "split sum, sm_80": (split_sum, 80, {"at_once": 1}, 2),
    "matmul, sm_90": (matmul, 90, {}, 0),
    "matmul with copies, sm_90": (matmul, 90, EVEN, 1),
    "attention, sm_90": (attention, 90, {}, 1),
}


def run_without_barriers(name: str) -> tuple[int, list[int]]:
    """The number of a kernel's barriers, and those of them whose removal no check noticed."""
    run, arch, options, _ = BARRIERS[name]
    found: list[int] = []

    def count(text: str) -> str:
        found.append(len(re.findall(BARRIER, text)))
        return text

    run(arch, edit=count, **options)
    sessions = [run(arch, edit=replaced(BARRIER, which=n), **options)[0] for n in range(found[0])]
    return found[0], [n for n, session in enumerate(sessions) if not len(session.faults)]
