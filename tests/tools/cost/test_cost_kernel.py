"""Counts per attention element of one compiled kernel, and the units that limit it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sass_text import sass

from smca_kernels.tools.cost import kernel
from smca_kernels.tools.cost.architectures import ARCHITECTURES
from smca_kernels.tools.cost.kernel import LoopCost, analyze, unit_cycles
from smca_kernels.tools.cost.machine_code import CLASSES, parse_sass


def loop_cost(body: list[str], expected_ex2: int, threads: int = 128, elements: int = 256) -> LoopCost:
    return kernel._loop_cost(parse_sass(sass(*body)), threads, elements, expected_ex2)


def test_unrolled_loop_is_divided_by_its_tiles():
    once = loop_cost(["MUFU.EX2 R1, R1", "MUFU.EX2 R2, R2", "FADD R3, R1, R2"], expected_ex2=2)
    twice = loop_cost(["MUFU.EX2 R1, R1", "MUFU.EX2 R2, R2", "FADD R3, R1, R2"] * 2, expected_ex2=2)
    assert (once.tiles, twice.tiles) == (1, 2)
    assert once.total == twice.total == 1.5


def test_tensor_flop_of_hmma_and_hgmma():
    # One m16n8k16 per warp: 4096 FLOP × 4 warps over 256 elements; TF32 counts twice, at half the rate.
    assert loop_cost(["HMMA.16816.F32 R4, R8, R12, R4"], 0).tensor_flops == 64
    assert loop_cost(["HMMA.1688.F32.TF32 R4, R8, R12, R4"], 0).tensor_flops == 64
    assert loop_cost(["HGMMA.64x16x16.F32 R24, gdesc[UR8], R24"], 0).tensor_flops == 128
    assert loop_cost(["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR13]"], 0).tensor_flops is None


def test_packed_fp32_issues_once_and_works_twice():
    cost = loop_cost(["FFMA2 R4, R8, R12, R4", "FADD R1, R1, R2"], 0)
    assert (cost.per_element["fp32"], cost.fp32_operations) == (1.0, 1.5)


class CompiledLoops:
    """A compiled kernel of two loops, the second dearer, as far as `analyze` looks at it."""

    metadata = SimpleNamespace(target=SimpleNamespace(arch=80), num_warps=4, shared=0, name="kernel")
    asm = {"cubin": b"", "ptx": ""}  # noqa: RUF012


def test_loop_of_rare_inputs_is_told_but_not_the_headline(monkeypatch: pytest.MonkeyPatch):
    tensor, jump = "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_{})"
    text = sass(".L_x_0:", tensor, jump.format(0), ".L_x_1:", tensor, "FADD R1, R1, R2", jump.format(1), "EXIT")
    monkeypatch.setattr(kernel, "disassemble", lambda _: text)
    monkeypatch.setattr(kernel, "_resource_usage", lambda _: (64, 0))
    dearest = analyze(CompiledLoops, 128)
    assert [loop.total for loop in dearest.loops] == [3.0, 2.0]
    common = analyze(CompiledLoops, 128, rare_loops=1)
    assert [loop.total for loop in common.loops] == [2.0, 3.0]
    assert "3.00 instructions per element" in common.note
    assert analyze(CompiledLoops, 128, rare_loops=2).loop is None


def test_design_limit_of_the_forward_kernel_is_ex2_on_a100_and_h100():
    # design limits at d = 32: 128 FLOP, one exp2, eight instructions of which three are FP32.
    per_element = dict.fromkeys(CLASSES, 0.0) | {"ex2": 1.0, "fp32": 3.0, "other": 4.0}
    loop = LoopCost("", 0, 1, per_element, tensor_flops=128.0, fp32_operations=3.0, ex2_unit=1.0)
    for arch, elements_per_second in ((80, 2.4e12), (90, 3.9e12)):
        limits = ARCHITECTURES[arch]
        cycles = unit_cycles(loop, arch)
        assert max(cycles.values()) == cycles["ex2"] == cycles["issue"]
        rate = limits.multiprocessors * limits.clock_hz / cycles["ex2"]
        assert rate == pytest.approx(elements_per_second, rel=0.03)
