"""The static cost report: loops, instruction counts, rows, and the bars of the real kernels."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smca_kernels.tools.cost import report as static_cost

pytest.importorskip("triton")

FAKE_KERNELS = "cost_kernels"
REQUIRED_KEYS = {
    "kernel", "pass", "arch", "dtype", "head_dim", "registers", "spill_bytes", "shared_bytes",
    "instructions_per_element", "bound_by",
}  # fmt: skip


def sass(*lines: str) -> str:
    """nvdisasm's layout: labels end in a colon, everything else is an instruction."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


def attention_loop_texts(*lines: str) -> list[list[str]]:
    instructions = static_cost.parse_sass(sass(*lines))
    return [
        [instructions[i].text.removesuffix(" ;") for i in body] for body in static_cost.attention_loops(instructions)
    ]


# --- the loop finder -------------------------------------------------------------------------------


def test_loop_body_ends_at_its_backward_branch():
    loops = attention_loop_texts(
        "MOV R1, R2",
        ".L_x_0:",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "MUFU.EX2 R3, R3",
        "@!P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert loops == [["HMMA.16816.F32 R4, R8, R12, R4", "MUFU.EX2 R3, R3", "@!P0 BRA `(.L_x_0)"]]


def test_loop_exit_written_as_a_call_is_a_jump():
    loops = attention_loop_texts(
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)",
        ".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [3, 2]


def test_branch_on_a_uniform_predicate_is_conditional():
    loops = attention_loop_texts(
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "BRA.U !UP0, `(.L_x_0)",
        ".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [2, 2]


def test_only_the_innermost_tensor_loop_counts():
    loops = attention_loop_texts(
        ".L_x_0:", "MOV R1, R2", ".L_x_1:", "HMMA.1688.F32.TF32 R4, R8, R12, R4", "@P1 BRA `(.L_x_1)",
        "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert loops == [["HMMA.1688.F32.TF32 R4, R8, R12, R4", "@P1 BRA `(.L_x_1)"]]


def test_interior_and_edge_loops_are_both_found():
    loops = attention_loop_texts(
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_0)",
        ".L_x_1:", "FSEL R1, R2, R3, P0", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [2, 3]


def test_a_loop_of_waiting_inside_the_body_is_part_of_it():
    loops = attention_loop_texts(
        ".L_x_0:", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR13], tmem[UR16], idesc[UR17], !UPT",
        ".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9], R0", "@!P4 BRA `(.L_x_1)",
        "BRA.U !UP0, `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [4]


def test_conditional_blocks_and_blocks_behind_the_exit_belong_to_the_loop():
    loops = attention_loop_texts(
        ".L_x_0:", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", "@P1 BRA `(.L_x_1)", "FMUL R1, R1, R2",
        ".L_x_1:", "@!P2 BRA `(.L_x_2)",
        ".L_x_3:", "@P0 BRA `(.L_x_0)", "EXIT",
        ".L_x_2:", "FADD R3, R3, R4", "BRA `(.L_x_3)",
    )  # fmt: skip
    assert [len(body) for body in loops] == [7]


def test_a_loop_without_tensor_instructions_is_the_one_with_exp2():
    loops = attention_loop_texts(
        ".L_x_0:",
        "LDG.E R1, [R2]",
        "@P0 BRA `(.L_x_0)",
        ".L_x_1:",
        "MUFU.EX2 R1, R1",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    )
    assert loops == [["MUFU.EX2 R1, R1", "@P0 BRA `(.L_x_1)"]]


def test_straight_code_has_no_loop():
    assert attention_loop_texts("MUFU.EX2 R1, R1", "EXIT", ".L_x_0:", "BRA `(.L_x_0)") == []


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "tensor"), ("HGMMA.64x128x16.F32", "tensor"), ("UTCHMMA", "tensor"),
        ("MUFU.EX2", "ex2"), ("MUFU.RCP", "other"), ("FMNMX3", "fp32"), ("FFMA2", "fp32"), ("FSEL", "fp32"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"), ("HADD2.F32", "conversion"), ("HADD2", "other"),
        ("LDSM.16.M88.4", "memory"), ("LDTM.16dp32bit_t0_t15.x32", "memory"), ("STL.64", "memory"),
        ("UIADD3", "other"), ("WARPGROUP.ARRIVE", "other"), ("LDGDEPBAR", "other"),
    ],
)  # fmt: skip
def test_opcode_class(opcode: str, kind: str):
    assert static_cost.classify(opcode) == kind


# --- counts ----------------------------------------------------------------------------------------


def loop_cost(body: list[str], expected_ex2: int, threads: int = 128, elements: int = 256) -> static_cost.LoopCost:
    return static_cost._loop_cost(static_cost.parse_sass(sass(*body)), threads, elements, expected_ex2)


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
    monkeypatch.setattr(static_cost, "disassemble", lambda _: text)
    monkeypatch.setattr(static_cost, "_resource_usage", lambda _: (64, 0))
    dearest = static_cost.analyze(CompiledLoops, 128)
    assert [loop.total for loop in dearest.loops] == [3.0, 2.0]
    common = static_cost.analyze(CompiledLoops, 128, rare_loops=1)
    assert [loop.total for loop in common.loops] == [2.0, 3.0]
    assert "3.00 instructions per element" in common.note
    assert static_cost.analyze(CompiledLoops, 128, rare_loops=2).loop is None


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps"),
    [
        (80, 256, 64, 0, 32),  # registers: 4 blocks
        (86, 128, 40, 0, 48),  # all warps
        (90, 128, 168, 0, 12),  # registers: 3 blocks
        (80, 128, 32, 65536, 8),  # shared memory: 2 blocks beside 1 KiB each of the driver's
        (75, 64, 32, 0, 32),  # 16 blocks
        (80, 128, 32, 164 << 10, 0),  # does not fit
        (90, 1024, 128, 0, 0),  # nor does this
    ],
)
def test_resident_warps(arch: int, threads: int, registers: int, shared: int, warps: int):
    assert static_cost.resident_warps(arch, threads, registers, shared) == warps


def test_design_limit_of_the_forward_kernel_is_ex2_on_a100_and_h100():
    # design limits at d = 32: 128 FLOP, one exp2, eight instructions of which three are FP32.
    per_element = dict.fromkeys(static_cost.CLASSES, 0.0) | {"ex2": 1.0, "fp32": 3.0, "other": 4.0}
    loop = static_cost.LoopCost("", 0, 1, per_element, tensor_flops=128.0, fp32_operations=3.0, ex2_unit=1.0)
    for arch, elements_per_second in ((80, 2.4e12), (90, 3.9e12)):
        limits = static_cost.ARCHITECTURES[arch]
        cycles = static_cost.unit_cycles(loop, arch)
        assert max(cycles.values()) == cycles["ex2"] == cycles["issue"]
        rate = limits.multiprocessors * limits.clock_hz / cycles["ex2"]
        assert rate == pytest.approx(elements_per_second, rel=0.03)


# --- arguments, JSON, exit status ------------------------------------------------------------------


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    static_cost.add_arguments(parser)
    return parser.parse_args(arguments)


def test_filters_take_several_values_in_any_spelling():
    args = parse("--arch", "sm_80", "90", "8.6", "sm_100", "--dtype", "fp16", "bf16", "--head-dim", "32", "64")
    assert (args.arch, args.dtype, args.head_dim) == ([80, 90, 86, 100], ["fp16", "bf16"], [32, 64])


def test_default_covers_every_architecture_dtype_and_head_dim():
    args = parse()
    assert args.arch == [75, 80, 86, 89, 90, 100]
    assert args.dtype == ["fp16", "bf16", "fp32"]
    assert args.head_dim == [32, 64, 128]


@pytest.mark.parametrize(
    "arguments", [("--arch", "sm_81"), ("--arch", "ampere"), ("--dtype", "fp8"), ("--head-dim", "129")]
)
def test_unknown_filter_value_is_refused(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def fake_rows(error: str | None = None) -> list[static_cost.Row]:
    job = static_cost.Job("", 80, "fp16", 32, 0, "forward", "forward")
    return [static_cost._empty_row(job) | {"error": error, "instructions_per_element": 9.25}]


def test_failed_kernel_makes_the_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(static_cost, "compile_report", lambda *_, **__: fake_rows())
    assert static_cost.run(parse()) == 0
    monkeypatch.setattr(static_cost, "compile_report", lambda *_, **__: fake_rows("ptxas gave up"))
    assert static_cost.run(parse()) == 1
    assert "ptxas gave up" in capsys.readouterr().out


def test_json_holds_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(static_cost, "compile_report", lambda *_, **__: fake_rows())
    assert static_cost.run(parse("--json", str(tmp_path / "cost.json"))) == 0
    assert json.loads((tmp_path / "cost.json").read_text()) == fake_rows()


def test_json_into_a_missing_directory_fails_before_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(static_cost, "compile_report", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ValueError, match="--json must lie in an existing directory"):
        static_cost.run(parse("--json", str(tmp_path / "missing" / "cost.json")))


# --- compiling a small attention kernel ------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_report(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Rows of the kernels in cost_kernels.py, by (arch, kernel), compiled once."""
    directory = tmp_path_factory.mktemp("sass")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        combinations = [(arch, "fp16", 32) for arch in (70, 80, 86, 89, 90)]
        rows = static_cost.compile_report(combinations, module=FAKE_KERNELS, sass_directory=directory)
    return SimpleNamespace(rows={(row["arch"], row["kernel"]): row for row in rows}, directory=directory, all=rows)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_small_kernel_has_one_exp2_and_its_flop_per_element(fake_report: SimpleNamespace, arch: str):
    row = fake_report.rows[arch, "forward"]
    (loop,) = row["loops"]
    # 128 threads, 64 × 64 elements: an exp2 each, and one per row for the correction in each of 4 × 8 lanes.
    assert 1.0 <= row["ex2"] <= 1.1
    assert loop["tensor_flops"] == 4 * 32
    assert loop["tiles"] == 1
    assert row["instructions_per_element"] == pytest.approx(sum(row[name] for name in static_cost.CLASSES))
    assert row["instructions_per_element"] == pytest.approx(loop["instructions"] * 128 / 4096)
    assert 7 < row["instructions_per_element"] < 12
    assert row["resident_warps"] > 0
    assert row["registers"] > 0
    assert row["spill_bytes"] == 0


def test_rows_have_the_promised_keys_and_survive_json(fake_report: SimpleNamespace):
    for row in fake_report.all:
        assert row.keys() >= REQUIRED_KEYS
    assert json.loads(json.dumps(fake_report.all)) == fake_report.all


def test_backward_total_adds_every_backward_kernel(fake_report: SimpleNamespace):
    total, attention, rows = (fake_report.rows["sm_90", k] for k in ("backward total", "attention", "rows"))
    assert total["pass"] == "backward"
    assert 0 < rows["instructions_per_element"] < 1
    summed = attention["instructions_per_element"] + rows["instructions_per_element"]
    assert total["instructions_per_element"] == pytest.approx(summed)
    assert total["bound_by"] == attention["bound_by"]
    assert total["predicted_elements_per_second"] < attention["predicted_elements_per_second"]


def test_architecture_that_the_disassembler_does_not_read_still_compiles(fake_report: SimpleNamespace):
    row = fake_report.rows["sm_70", "forward"]
    assert row["error"] is None
    assert row["registers"] > 0
    if row["instructions_per_element"] is None:  # Triton's nvdisasm reads sm_70 up to CUDA 13.0
        assert "not counted" in row["note"]
        assert "forward sm_70" in static_cost.format_table(fake_report.all)
        assert fake_report.rows["sm_70", "backward total"]["instructions_per_element"] is None


def test_kernel_that_does_not_compile_is_one_row_with_the_error(fake_report: SimpleNamespace):
    assert "never compiles" in fake_report.rows["sm_86", "broken"]["error"]
    assert fake_report.rows["sm_86", "forward"]["error"] is None


def test_compiler_that_dies_takes_only_its_own_row_along(fake_report: SimpleNamespace):
    assert fake_report.rows["sm_89", "crashing"]["error"] == "the compiler ended its process"
    assert fake_report.rows["sm_89", "forward"]["error"] is None


def test_listing_shows_class_and_source_line(fake_report: SimpleNamespace):
    text = (fake_report.directory / "forward-sm_90-fp16-32.sass").read_text()
    assert text.startswith("loop 0: ")
    assert any(line.startswith("tensor") and "cost_kernels.py:" in line for line in text.splitlines())


# --- the bars, on the real kernels -----------------------------------------------------------------


@functools.cache
def real_rows(arch: int, dtype: str, head_dim: int) -> list[static_cost.Row]:
    return static_cost.compile_report([(arch, dtype, head_dim)])


# fp16 and bf16 take the same configuration and the same registers; both are compiled where a bar names them.
# sm_86 and sm_89 compile as sm_80 does, for another number of resident warps.
SPILL_CASES = [
    *((arch, dtype, head_dim) for arch in (80, 90) for dtype in ("bf16", "fp32") for head_dim in (32, 64)),
    *((arch, "bf16", head_dim) for arch in (86, 89) for head_dim in (32, 64)),
    *((80, "fp16", 32), (90, "fp16", 32)),
]


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), SPILL_CASES)
def test_no_spills(arch: int, dtype: str, head_dim: int):
    for row in real_rows(arch, dtype, head_dim):
        assert row["error"] is None
        assert (row["kernel"], row["spill_bytes"], row["local_bytes"]) == (row["kernel"], 0, 0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("arch", "pass_", "bar"),
    [
        *((80, "forward", 10.0), (90, "forward", 9.0), (80, "backward", 32.0), (90, "backward", 26.0)),
        *((80, "planned forward", 10.0), (90, "planned forward", 9.0)),
        *((80, "planned backward", 32.0), (90, "planned backward", 26.0)),
    ],
)
def test_instructions_per_element_stay_under_the_bar(arch: int, pass_: str, bar: float, dtype: str):
    rows = [row for row in real_rows(arch, dtype, 32) if row["pass"] == pass_]
    # A pass of several kernels ends with their total.
    assert rows[-1]["kernel"] == f"{pass_} total" or len(rows) == 1
    assert rows[-1]["instructions_per_element"] <= bar


@pytest.mark.parametrize("arch", [80, 90])
def test_a_plan_adds_at_most_half_an_instruction_per_element(arch: int):
    def total(pass_: str) -> float:
        rows = [row for row in real_rows(arch, "bf16", 32) if row["pass"] == pass_]
        return rows[-1]["instructions_per_element"]

    for pass_ in ("forward", "backward"):
        assert total(f"planned {pass_}") - total(pass_) <= 0.5


# An argument that is None is a constant to the compiler, which then compiles other code than `smca cost` sees.
SPLIT = ("partial_outputs", "partial_lse", "arrivals")
ABSENT = [
    ("valid_shapes", *SPLIT),
    ("valid_shapes", "plan", "scale_weights", "grad_weights"),
    ("key_padding_mask", "seed"),
]


COMPILE_WITHOUT = """
import sys
from smca_kernels.backends.triton import launch
from smca_kernels.tools.cost.report import compile_kernel
launch.ABSENT = tuple(sys.argv[1:])
for chosen in launch.specializations(90, "bf16", 32):
    if not chosen.pass_.startswith("planned") or ("plan" in launch.ABSENT and chosen.kernel in ("survey", "window")):
        continue
    signature = dict(chosen.signature)
    for name, kind in {"key_padding_mask": "*u8", "seed": "*i64"}.items():
        if name in signature and name not in chosen.constexprs:
            signature[name] = kind
    options = (chosen.num_warps, chosen.num_stages, chosen.attrs)
    compile_kernel(chosen.function, signature, chosen.constexprs, 90, *options)
"""


@pytest.mark.parametrize("absent", ABSENT, ids="-".join)
def test_kernels_compile_without_their_optional_arguments(absent: tuple[str, ...]):
    # In a process of its own: here Triton may have been imported to interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE_WITHOUT, *absent]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
