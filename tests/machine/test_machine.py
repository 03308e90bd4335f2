"""The PTX machine itself: kernels whose results are known, faults planted in them, barriers taken away.

Functions of machine_kernels.py run in a process in which Triton compiles; what is written in PTX here needs no Triton.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import machine_kernels
from machine_kernels import BARRIERS, IS_UNFENCED, KNOWN, PLANTED

from smca_kernels.testing.machine import arithmetic
from smca_kernels.testing.machine.codegen import Program
from smca_kernels.testing.machine.execution import run_launch
from smca_kernels.testing.machine.memory import KINDS, Faults, Region
from smca_kernels.testing.machine.ptx import PtxError

Compiled = Callable[..., Any]


@pytest.mark.parametrize(("name", "arch"), [(case.name, case.arch) for case in KNOWN if case.quick])
def test_a_known_kernel_computes_what_it_should_and_nothing_is_reported(
    name: str, arch: int, compiled: Compiled
) -> None:
    faults, error, tolerance = compiled(machine_kernels.run_known, name, arch)
    assert faults.kinds <= ({"proxy fence"} if IS_UNFENCED else set()), faults.report()
    assert error <= tolerance


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_reported_or_spoils_the_result(name: str, compiled: Compiled) -> None:
    kinds, is_right = compiled(machine_kernels.run_planted, name)
    if PLANTED[name].kinds:
        assert set(PLANTED[name].kinds) <= kinds
    else:
        assert not is_right


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_noticed(name: str, compiled: Compiled) -> None:
    count, unnoticed = compiled(machine_kernels.run_without_barriers, name)
    assert count >= 2
    assert len(unnoticed) <= BARRIERS[name][3], unnoticed


def test_kernels_are_forgotten_before_they_fill_the_memory(compiled: Compiled) -> None:
    assert compiled(machine_kernels.kernels_kept, 9) == (3, 3)
    assert compiled(machine_kernels.kernels_kept, 2) == (2, 2)


def test_bytes_of_a_result_that_no_kernel_wrote_are_counted(compiled: Compiled) -> None:
    assert compiled(machine_kernels.bytes_left_unwritten) == 100 * 4


# --- what is written in PTX ---

TEMPLATE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 16 out
) .reqntid {threads}
{{
    .reg .pred %p<4>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<8>;
    ld.param.b64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, global_smem;
    add.s32 %r4, %r3, %r2;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
    {body}
    ret;
}}
"""
# Shared memory of a warp's 32 words; %r4 is a thread's own word, %r5 its neighbour's; %rd3 its own word of `out`.
NEIGHBOUR = "st.shared.b32 [%r4], %r1; xor.b32 %r5, %r4, {distance}; {between} ld.shared.b32 %r6, [%r5];"
COPY = "cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group;"
COPY_WAIT, READ = "cp.async.wait_group 0;", "ld.shared.b32 %r6, [%r4];"
DESCRIPTORS = "mov.b64 %rd4, 0x4000000000000040; mov.b64 %rd5, {right};"
WRITE = "st.shared.v4.b32 [%r9], {%r1, %r1, %r1, %r1};"
WGMMA = (
    "wgmma.fence.sync.aligned; "
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r20, %r21, %r22, %r23}, %rd4, %rd5, 0, 1, 1, 0, 0; "
    "wgmma.commit_group.sync.aligned; "
)
SUM = "mul.f32 %r7, %r1, %r2; shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1; {}"
OWN_16_BYTES = "shl.b32 %r8, %r1, 4; add.s32 %r9, %r3, %r8;"
FENCE, BARRIER, WAIT = "fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.wait_group.sync.aligned 0;"


def wgmma(before: str = WRITE + FENCE + BARRIER, after: str = WAIT, right: str = "0x4000000000000040") -> str:
    return OWN_16_BYTES + DESCRIPTORS.format(right=right) + before + WGMMA + after


# name: (threads, body, the kinds that are reported)
WRITTEN: dict[str, tuple[int, str, set[str]]] = {
    "lanes exchange without bar.warp.sync": (
        32, NEIGHBOUR.format(distance=4, between=""), {"racecheck shared, one warp"}
    ),
    "lanes exchange after bar.warp.sync": (32, NEIGHBOUR.format(distance=4, between="bar.warp.sync -1;"), set()),
    "warps exchange after bar.warp.sync": (
        64, NEIGHBOUR.format(distance=128, between="bar.warp.sync -1;"), {"racecheck shared"}
    ),
    "warps exchange after a barrier": (64, NEIGHBOUR.format(distance=128, between="bar.sync 0;"), set()),
    "lanes store different words to one shared place": (
        32, "st.shared.b32 [%r3], %r1;", {"threads write different values"}
    ),
    "lanes store the same word to one shared place": (32, "st.shared.b32 [%r3], %r3;", set()),
    "lanes store different words to one global place": (
        32, "st.global.b32 [%rd1], %r1;", {"threads write different values"}
    ),
    "lanes store the same word to one global place": (32, "st.global.b32 [%rd1], %r3;", set()),
    "lanes add a product of their own, unrounded": (
        32, SUM.format("fma.rn.f32 %r9, %r1, %r2, %r8;"), {"lanes disagree"}
    ),
    "lanes add what they have shuffled": (32, SUM.format("add.f32 %r9, %r7, %r8;"), set()),
    "shared memory read, never written": (32, "ld.shared.b32 %r6, [%r4];", {"initcheck shared"}),
    "shared memory beyond its size": (32, "st.shared.b32 [%r4+8192], %r1;", {"memcheck shared"}),
    "shared address misaligned": (32, "st.shared.b32 [%r4+2], %r1;", {"misaligned shared"}),
    "global address of no tensor": (32, "ld.global.b32 %r6, [%rd2];", {"memcheck"}),
    "global address misaligned": (32, "ld.global.b32 %r6, [%rd1+2];", {"misaligned"}),
    "threads exchange through global memory without a barrier": (
        32, "st.global.b32 [%rd3], %r1; xor.b64 %rd4, %rd3, 4; ld.global.b32 %r6, [%rd4];", {"racecheck global"}
    ),
    "copy read before the wait": (
        32, f"st.shared.b32 [%r4], %r1; {COPY} {READ} {COPY_WAIT}", {"cp.async not waited for"}
    ),
    "copy overwritten before the wait": (
        32, f"{COPY} st.shared.b32 [%r4], %r1; {COPY_WAIT}", {"cp.async not waited for"}
    ),
    "copy left at the end": (32, COPY, {"cp.async not waited for"}),
    "copy read after the wait": (32, f"{COPY} {COPY_WAIT} {READ}", set()),
    "parameters read beyond their end": (32, "mov.b32 %r6, 4096; ld.param.b64 %rd4, [%r6];", {"memcheck"}),
    "a warp exits before a barrier": (
        64, "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; bar.sync 0; $L1:", {"synccheck"}
    ),
    "half a warp at bar.warp.sync": (
        32, "setp.lt.u32 %p1, %r1, 16; @%p1 bra $L1; bar.warp.sync -1; $L1:", {"synccheck"}
    ),
    "both halves of a warp meet": (
        32,
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra $L2; bra.uni $L1; $L3: bar.warp.sync -1; bra.uni $L4; "
        "$L1: mov.b32 %r6, 1; bra.uni $L3; $L2: mov.b32 %r6, 2; bra.uni $L3; $L4:",
        set(),
    ),
    "wgmma": (128, wgmma(), set()),
    "wgmma without a proxy fence": (128, wgmma(WRITE + BARRIER), {"proxy fence"}),
    "wgmma without a barrier": (128, wgmma(WRITE + FENCE), {"racecheck shared"}),
    "wgmma of what nobody wrote": (128, wgmma(FENCE + BARRIER), {"initcheck shared"}),
    "wgmma of what a copy is about to write": (
        128,
        wgmma(WRITE + FENCE + BARRIER + COPY, WAIT + BARRIER + COPY_WAIT),
        {"cp.async not waited for"},
    ),
    "wgmma left at the end": (128, wgmma(after=""), {"wgmma not waited for"}),
    "wgmma's result read before the wait": (128, wgmma(after=f"mov.b32 %r10, %r20; {WAIT}"), {"wgmma register"}),
    "wgmma's operand overwritten before the wait": (
        128, wgmma(after=f"st.shared.b32 [%r9], %r1; {WAIT}"), {"wgmma not waited for", "racecheck shared"}
    ),
    "wgmma with descriptors that differ": (128, wgmma(right="%rd2"), {"wgmma operand"}),
}  # fmt: skip


def run_written(threads: int, body: str) -> tuple[set[str], np.ndarray]:
    """Kinds of faults that a kernel of one CTA has, and the bytes of `out`."""
    out, faults = np.zeros(4 * threads, np.uint8), Faults()
    region = Region(1, "out", out, 0, 4, None, None)
    program = Program(TEMPLATE.format(threads=threads, body=body))
    run_launch(program, [region], {"out": region.address}, (1, 1, 1), threads, 4096, faults, np.arange(1))
    return faults.kinds, out


@pytest.mark.parametrize("name", WRITTEN)
def test_the_checks_report_exactly_what_is_written_in_ptx(name: str) -> None:
    threads, body, kinds = WRITTEN[name]
    found, _ = run_written(threads, body)
    if "wgmma with" in name:  # such a descriptor points anywhere
        assert kinds <= found
    else:
        assert found == kinds


def test_every_kind_of_fault_is_planted_somewhere() -> None:
    planted = {kind for fault in PLANTED.values() for kind in fault.kinds}
    written = {kind for _, _, kinds in WRITTEN.values() for kind in kinds}
    assert planted | written == set(KINDS)


@pytest.mark.parametrize(
    "instruction",
    ["frobnicate.b32 %r5, %r1;", "add.rz.f32 %r5, %r1, %r1;", "add.s32 %r5, %rd1, %r1;", "add.s32 %r5, %r99, %r1;"],
)
def test_what_the_machine_does_not_know_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError, match=re.escape(instruction.split()[0]) + "|%r99"):
        Program(TEMPLATE.format(threads=32, body=instruction))


@pytest.mark.parametrize(
    ("threads", "body", "message"),
    [
        (32, "shfl.sync.bfly.b32 %r8, %r1, 1, 31, 0xffff;", "members that are a part of a warp: shfl.sync"),
        (32, f"mov.b32 %r8, 2; {COPY.replace(', 4;', ', 4, %r8;')} {COPY_WAIT}", "cp.async of a part of its bytes"),
        (128, wgmma(right="0x4002000000000040"), "wgmma descriptor with a base offset"),
    ],
)  # fmt: skip
def test_forms_that_the_machine_does_not_execute_are_refused(threads: int, body: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        run_written(threads, body)


# --- arithmetic ---


@pytest.mark.parametrize(("opcode", "expected"), [("cvt.s64.s32", -3), ("cvt.s64.u32", 2**32 - 3)])
def test_a_conversion_reads_the_low_half_of_a_register_that_is_wider(opcode: str, expected: int) -> None:
    body = f"mov.b64 %rd4, 0x7fffffffd; {opcode} %rd5, %rd4; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b64 [%rd1], %rd5;"
    kinds, out = run_written(32, body)
    assert not kinds
    assert out[:8].view(np.int64).tolist() == [expected]


def nearest_float32(exact: Fraction) -> np.float32:
    """The float32 that is nearest, ties to even."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.uint32)) & 1))


def test_a_fused_multiply_add_rounds_once() -> None:
    numbers = np.random.default_rng(0)
    a, b = (numbers.standard_normal(2000).astype(np.float32) for _ in range(2))
    # Sums near a tie of float32: half a unit in the last place of c, give or take next to nothing.
    c = np.float32(2.0) ** numbers.integers(-3, 30, 2000).astype(np.float32)
    b[::2] = (c[::2] * np.float32(2.0**-24) / a[::2]).astype(np.float32)
    out = np.empty_like(a)
    arithmetic.fma32(a, b, c, out)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert [float(x) for x in out] == [float(nearest_float32(x)) for x in exact]


def test_integer_instructions_do_what_python_does() -> None:
    numbers = np.random.default_rng(0)
    a, b = (numbers.integers(0, 2**32, 100, np.uint32) for _ in range(2))
    position, length = (numbers.integers(0, n, 100, np.uint32) for n in (32, 33))
    signed, divisor = a.view(np.int32), (b % np.uint32(99) + np.uint32(1)).view(np.int32)

    def check(function: Callable[..., None], *operands: Any, expected: Callable[..., int]) -> None:
        out = np.empty_like(operands[0])
        function(*operands, out)
        wanted = [expected(*map(int, each)) for each in zip(*operands, strict=True)]
        assert [int(x) % 2**32 for x in out] == [x % 2**32 for x in wanted]

    check(arithmetic.popc, a, expected=lambda x: x.bit_count())
    check(arithmetic.clz, a, expected=lambda x: 32 - x.bit_length())
    check(arithmetic.brev, a, expected=lambda x: int(f"{x:032b}"[::-1], 2))
    check(arithmetic.mul_hi_u32, a, b, expected=lambda x, y: x * y >> 32)
    check(arithmetic.div_signed, signed, divisor, expected=lambda x, y: abs(x) // y * (1 if x >= 0 else -1))
    check(arithmetic.rem_signed, signed, divisor, expected=lambda x, y: x - abs(x) // y * y * (1 if x >= 0 else -1))
    check(arithmetic.bfe_u32, a, position, length, expected=lambda x, p, n: x >> p & (1 << n) - 1)
    check(arithmetic.shf(True, True), a, b, position, expected=lambda x, y, n: ((y << 32 | x) << n) >> 32)
    check(arithmetic.shf(False, True), a, b, position, expected=lambda x, y, n: (y << 32 | x) >> n)
    mask = lambda p, n: (1 << n) - 1 << p  # noqa: E731
    check(
        arithmetic.bfi_b32, a, b, position, length,
        expected=lambda x, y, p, n: (y & ~mask(p, n) | x << p & mask(p, n)) & 0xFFFFFFFF,
    )  # fmt: skip
