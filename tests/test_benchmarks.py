"""`smca bench`: its tables, its rows, and the JSON it writes, on a workload of a few cells."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention, small_shapes
from benchmarks.bench_attention import Repeats, Subject
from benchmarks.workloads import BARS, BOTH, FORWARD, MEASURES, WORKLOADS, Bar, Workload

CPU = torch.device("cpu")
FEW_CELLS = Workload("few cells", 2, 5, 2, 16, ((4, 5), (2, 3)))
BACKENDS = {"reference": "reference", "sdpa": "auto"}
PARITY_STEPS = {f"parity-{dtype}" for dtype in ("float32", "float16", "bfloat16")}
SCRIPT = Path(bench_attention.__file__).with_name("gpu_run.sh")


@pytest.fixture
def subject() -> Subject:
    return Subject(FEW_CELLS, "float32", CPU, BACKENDS)


def test_detector_workload_is_the_one_that_the_bars_are_stated_for() -> None:
    detector = WORKLOADS["detector"]
    assert (detector.batch, detector.queries, detector.heads, detector.head_dim) == (2, 300, 8, 32)
    assert detector.spatial_shapes == ((50, 84), (25, 42), (13, 21))


def test_workload_has_the_inputs_that_it_says(subject: Subject) -> None:
    inputs = subject.inputs()
    assert inputs.query.shape == (2, 2, 5, 16)
    assert inputs.key.shape == (2, 2, 26, 16)
    assert inputs.center.shape == (2, 2, 5, 2, 2)
    assert all(tensor.requires_grad for tensor in inputs.differentiable().values())


def test_every_bar_names_a_measure_and_step_that_are_measured() -> None:
    for bar in BARS:
        assert bar.measure in MEASURES
        assert bar.step in (FORWARD, BOTH)


@pytest.mark.parametrize(
    ("value", "met"), [(10.0, True), (100.0, True), (100.1, False)], ids=["faster", "just", "slower"]
)
def test_speed_bar_is_met_from_its_limit_on(subject: Subject, value: float, met: bool) -> None:
    row = subject.row("time", FORWARD, "sdpa", [value], base=800.0)
    assert (row.bar, row.met) == ("≥ 8 ×", met)
    assert row.ratio == pytest.approx(800.0 / value)


@pytest.mark.parametrize(("value", "met"), [(49.9, True), (50.1, False)])
def test_overhead_bar_adds_its_microseconds_to_the_multiple(subject: Subject, value: float, met: bool) -> None:
    row = subject.row("overhead", FORWARD, "sdpa", [value], base=10.0)
    assert (row.bar, row.met) == ("≤ 2 × + 30 µs", met)


def test_bar_for_a_cpu_does_not_judge_a_gpu() -> None:
    on_gpu = Subject(FEW_CELLS, "float16", torch.device("cuda"), {"triton": "auto"})
    assert on_gpu.row("time", FORWARD, "triton", [1.0], base=2.0).met is None


def test_bar_for_the_default_backend_does_not_judge_another() -> None:
    assert any(bar.backend == "default" and bar.measure == "time" for bar in BARS)
    explicit = Subject(FEW_CELLS, "float32", CPU, {"sdpa": "sdpa"})
    assert explicit.row("time", FORWARD, "sdpa", [1.0], base=2.0).met is None


def test_row_gives_median_and_quantiles(subject: Subject) -> None:
    row = subject.row("time", BOTH, "sdpa", [5.0, 1.0, 2.0, 4.0, 3.0, 100.0], base=35.0)
    assert (row.value, row.q20, row.q80, row.repeats, row.ratio) == (3.5, 2.0, 5.0, 6, 10.0)


def test_sizes_are_those_of_the_tensors(subject: Subject) -> None:
    inputs = subject.inputs()
    assert bench_attention.input_bytes(inputs) == 4 * (2 * 2 * (5 + 26 + 26) * 16 + 2 * 2 * 5 * 2 * (2 + 2 + 1))
    assert bench_attention.per_scale_bytes(inputs) == 4 * 2 * (2 * 2 * 5 * 16 + 2 * 2 * 5)


def test_bench_reports_every_measure_and_its_rows_survive_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Workload("tiny", 1, 2, 1, 16, ((2, 2),))
    monkeypatch.setattr(bench_attention, "WORKLOADS", {"detector": FEW_CELLS, "tiny": tiny})
    monkeypatch.setattr(bench_attention, "QUICK_REPEATS", {"cpu": Repeats(time=2, overhead=2)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "bench.json"
    status = bench_attention.run(argparse.Namespace(quick=True, json=path))
    report = json.loads(path.read_text())
    assert {"device", "name", "torch", "triton", "commit", "dirty", "threads"} <= set(report["environment"])
    assert report["parity"] == "passed"
    assert "triton" in report["not_measured"]
    found = {(row["measure"], row["step"], row["backend"], row["dtype"]) for row in report["rows"]}
    assert {(m, s, b) for m, s, b, _ in found} == {
        *(("time", step, backend) for step in (FORWARD, BOTH) for backend in BACKENDS),
        *(("overhead", step, "sdpa") for step in (FORWARD, BOTH)),
        *(("saved", FORWARD, backend) for backend in BACKENDS),
        *(("peak", BOTH, backend) for backend in BACKENDS),
    }
    assert all(row["value"] > 0 and row["base"] > 0 for row in report["rows"])
    missed = [row for row in report["rows"] if row["met"] is False]
    assert status == (1 if missed else 0)
    table = [line for line in capsys.readouterr().out.split("\n") if line.startswith("| ")]
    assert len(table) == 1 + len(report["rows"])
    assert len({line.count("|") for line in table}) == 1


def test_dtype_off_parity_is_not_measured_and_the_run_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_attention, "check_parity", lambda subject: ["sdpa, float32: key is off"])
    report, passed = bench_attention.measure_all(FEW_CELLS, FEW_CELLS, CPU, Repeats(1, 1))
    assert not passed
    assert report["parity"] == ["sdpa, float32: key is off"]
    assert report["rows"] == []
    assert "key is off" in capsys.readouterr().out


def test_missed_bar_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "BARS", (Bar("time", FORWARD, "default", 1e9, device="cpu"),))
    report, passed = bench_attention.measure_all(FEW_CELLS, FEW_CELLS, CPU, Repeats(2, 1))
    assert report["parity"] == "passed"
    assert not passed


def test_json_in_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--json must name a file in an existing folder"):
        bench_attention.run(argparse.Namespace(quick=True, json=tmp_path / "none" / "bench.json"))


def test_small_shapes_refuse_to_run_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert small_shapes.main() == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_gpu_run_goes_on_after_failures_and_tells_each_step(tmp_path: Path) -> None:
    # An interpreter that answers every command but the look for pytest with an error.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *"import pytest"*) exit 0;; *) exit 3;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["all_passed"]
    steps = {step["step"]: step for step in summary["steps"]}
    assert set(steps) == {"env", *PARITY_STEPS, "tests", "memcheck", "racecheck", "bench"}
    assert (steps["bench"]["status"], steps["bench"]["exit_code"]) == ("failed", 3)
    assert "bench --json" in (out / "bench.log").read_text()


def test_gpu_run_passes_when_every_step_does(tmp_path: Path) -> None:
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": path}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["all_passed"]
    assert {step["status"] for step in summary["steps"]} == {"passed"}


def test_gpu_run_without_a_folder_is_refused() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage" in done.stderr
