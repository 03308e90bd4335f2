"""Rows of the report, on small kernels that are compiled once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from smca_kernels.tools.cost import kernel
from smca_kernels.tools.cost.architectures import ARCHITECTURES
from smca_kernels.tools.cost.machine_code import CLASSES
from smca_kernels.tools.cost.report import compile_report
from smca_kernels.tools.cost.tables import format_programs, format_table, format_timeline

pytest.importorskip("triton")

FAKE_KERNELS = "cost_kernels"
REQUIRED_KEYS = {
    "kernel", "pass", "arch", "dtype", "head_dim", "registers", "spill_bytes", "shared_bytes",
    "instructions_per_element", "bound_by", "cycles_per_trip", "elements_per_trip", "elements_per_second",
    "issue_share", "blocks_per_sm", "num_warps", "ptxas_warnings", "cubin",
}  # fmt: skip


@pytest.fixture(scope="module")
def fake_report(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Rows of the kernels in cost_kernels.py, by (arch, kernel), compiled once."""
    directory = tmp_path_factory.mktemp("sass")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        combinations = [(arch, "fp16", 32) for arch in (70, 80, 86, 89, 90)]
        rows = compile_report(combinations, module=FAKE_KERNELS, sass_directory=directory, cubin_directory=directory)
    return SimpleNamespace(rows={(row["arch"], row["kernel"]): row for row in rows}, directory=directory, all=rows)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_small_kernel_has_one_exp2_and_its_flop_per_element(fake_report: SimpleNamespace, arch: str):
    row = fake_report.rows[arch, "forward"]
    (loop,) = row["loops"]
    # 128 threads, 64 × 64 elements: an exp2 each, and one per row for the correction in each of 4 × 8 lanes.
    assert 1.0 <= row["ex2"] <= 1.1
    assert loop["tensor_flops"] == 4 * 32
    assert loop["tiles"] == 1
    assert row["instructions_per_element"] == pytest.approx(sum(row[name] for name in CLASSES))
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
        assert "forward sm_70" in format_table(fake_report.all)
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


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_loop_is_scheduled_below_its_ceiling(fake_report: SimpleNamespace, arch: str):
    row = fake_report.rows[arch, "forward"]
    assert row["schedule_note"] == ""
    assert row["elements_per_trip"] == 64 * 64
    assert row["blocks_per_sm"] * row["num_warps"] == row["resident_warps"]
    rate = row["elements_per_trip"] * row["blocks_per_sm"] / row["cycles_per_trip"]
    limits = ARCHITECTURES[int(arch[3:])]
    assert row["elements_per_second"] == pytest.approx(rate * limits.multiprocessors * limits.clock_hz)
    assert 0.2 < row["elements_per_second"] / row["predicted_elements_per_second"] <= 1
    assert all(0 <= share <= 1.05 for share in row["busy"].values())
    assert row["waits"][0]["source"].startswith(("cost_kernels.py:", "standard.py:"))


def test_total_of_a_pass_adds_the_time_of_its_kernels(fake_report: SimpleNamespace):
    total, *rows = (fake_report.rows["sm_90", k] for k in ("backward total", "attention", "rows"))
    assert 1 / total["elements_per_second"] == pytest.approx(sum(1 / row["elements_per_second"] for row in rows))


def test_architecture_that_is_not_modelled_says_so(fake_report: SimpleNamespace):
    row = fake_report.rows["sm_70", "forward"]
    assert row["cycles_per_trip"] is None
    assert row["schedule_note"] == "not scheduled: cycles of sm_70 are not modelled"
    assert "not scheduled: cycles of sm_70 are not modelled" in format_table(fake_report.all)


def test_cubin_and_ptx_are_written(fake_report: SimpleNamespace):
    path = Path(fake_report.rows["sm_90", "forward"]["cubin"])
    assert path == fake_report.directory / "forward-sm_90-fp16-32.cubin"
    assert path.read_bytes().startswith(b"\x7fELF")
    assert ".target sm_90a" in path.with_suffix(".ptx").read_text()


def test_waits_are_listed_with_their_source_line(fake_report: SimpleNamespace):
    text = format_timeline(fake_report.all, 1)
    assert "cycles a trip of" in text
    assert "cost_kernels.py:" in text
    assert "\nforward sm_70" not in text


def test_cycles_of_programs_are_listed_for_trips_per_scale(fake_report: SimpleNamespace):
    row = fake_report.rows["sm_80", "forward"]
    (line,) = (line for line in format_programs([row], [66, 17]).splitlines() if line.startswith("forward sm_80"))
    expected = row["start_cycles"] + 2 * row["scale_cycles"] + 83 * row["cycles_per_trip"]
    assert f"{expected:.0f} =" in line


def test_ptxas_has_no_complaint_about_the_small_kernels(fake_report: SimpleNamespace):
    assert fake_report.rows["sm_80", "forward"]["ptxas_warnings"] == []


@pytest.mark.parametrize("name", ["nvdisasm", "cuobjdump"])
def test_missing_tool_is_named_and_not_passed_over(name: str, monkeypatch: pytest.MonkeyPatch):
    from triton import knobs

    monkeypatch.setattr(knobs, "nvidia", SimpleNamespace(**{name: SimpleNamespace(path="/nowhere/tool")}))
    with pytest.raises(kernel.MissingTool, match=f"{name}, which comes with Triton, can't be run"):
        kernel._tool(name, [], b"")


def test_missing_ptxas_is_named_and_not_passed_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "_ptxas", lambda _: SimpleNamespace(path="/nowhere/ptxas", version="none"))
    with pytest.raises(kernel.MissingTool, match="ptxas can't be run, its warnings were not read"):
        kernel.ptxas_warnings(".target sm_90a", 90)


def test_warning_of_ptxas_becomes_code_and_text():
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x"
    assert (
        kernel._warning(line)
        == "C7510: Potential Performance Loss: wgmma.mma_async instructions are serialized due to x"
    )
