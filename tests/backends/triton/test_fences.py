"""Fences that Triton repeats on Hopper are taken out where they have nothing to order, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from triton import knobs

from smca_kernels.backends.triton import fences, hopper

FENCE = f"\t{fences.FENCE};\n"
PRODUCT = "\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, 1, 1, 1, 0, 0;\n"


@pytest.mark.parametrize(
    "between",
    [
        PRODUCT,
        "\twgmma.wait_group.sync.aligned 0;\n",
        "$L__tmp7:\n\t.loc\t1 58 20\n\t// begin inline asm\n",
        "\t@%p3 ld.global.b32 { %r7 }, [ %rd8 + 0 ];\n\tld.shared.b32 %r8, [%r9];\n",
        "\t{ .reg .pred p; setp.ne.s32 p, %r1, 0; vote.sync.any.pred p, p, -1; selp.s32 %r2, 1, 0, p; }\n",
        "\t@%p1 st.global.v2.b32 [ %rd7 + 0 ], { %r1, %r2 };\n",
    ],
)
def test_a_fence_with_nothing_to_order_is_taken_out(between: str) -> None:
    assert fences.without_repeated_fences(FENCE + between + FENCE + PRODUCT) == FENCE + between + PRODUCT


@pytest.mark.parametrize(
    "between",
    [
        "\tst.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};\n",
        "\t@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n",
        "\tcp.async.wait_group \t1;\n",
        "\tbar.sync \t0;\n",
        "\tstmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};\n",
        "\tatom.shared.add.u32 %r1, [%r2], 1;\n",
        "\tld.acquire.gpu.b32 %r1, [%rd1];\n",
        "\tmembar.cta;\n",
        "\t@%p1 bra \t$L__BB0_3;\n",
        "$L__BB0_3:\n",
        "\tcall.uni (retval0), f, (param0);\n",
        "\tsome.new.instruction %r1;\n",
        "\tmov.u32 %r1, %r2; bar.sync 0;\n",
    ],
)
def test_a_fence_that_may_order_something_stays(between: str) -> None:
    ptx = FENCE + between + FENCE + PRODUCT
    assert fences.without_repeated_fences(ptx) == ptx


def test_each_copy_is_followed_by_one_fence() -> None:
    copy = "\tcp.async.wait_group 0;\n\tbar.sync 0;\n"
    trip = copy + FENCE + PRODUCT + FENCE + PRODUCT
    assert fences.without_repeated_fences(trip * 2) == (copy + FENCE + PRODUCT + PRODUCT) * 2


def compiled_stages() -> dict[str, Any]:
    stages: dict[str, Any] = {"ptx": lambda source, metadata: source, "cubin": lambda source, metadata: source}
    if knobs.runtime.add_stages_inspection_hook is not None:
        knobs.runtime.add_stages_inspection_hook(None, stages, None, None, 90)
    return stages


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_only_hopper_is_compiled_without_them(arch: int) -> None:
    repeated = FENCE + PRODUCT + FENCE + PRODUCT
    with hopper.compiler_for(arch):
        assert (compiled_stages()["ptx"](repeated, {}) != repeated) == (arch == 90)
        assert compiled_stages()["cubin"](repeated, {}) == repeated
    assert knobs.runtime.add_stages_inspection_hook is None


def test_what_is_cached_is_told_from_what_others_compile() -> None:
    with fences.taken_out():
        key, digest = knobs.runtime.add_stages_inspection_hook()
    assert key
    assert digest


def test_a_hook_of_someone_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*arguments: Any) -> tuple[str, str]:
        return "theirs", "theirs"

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", theirs)
    with fences.taken_out():
        assert knobs.runtime.add_stages_inspection_hook is theirs
    assert knobs.runtime.add_stages_inspection_hook is theirs


def test_an_error_while_compiling_leaves_no_hook() -> None:
    with pytest.raises(RuntimeError, match="ptxas"), fences.taken_out():
        raise RuntimeError("ptxas")
    assert knobs.runtime.add_stages_inspection_hook is None
