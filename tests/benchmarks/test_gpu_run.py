"""benchmarks/gpu_run.sh and its step for compute-sanitizer: order, time limits, exit status, summary."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from smca_benchmarks import sanitize

PARITY_STEPS = {f"parity-{dtype}" for dtype in ("float32", "float16", "bfloat16")}
SCRIPT = Path(sanitize.__file__).with_name("gpu_run.sh")


def test_sanitize_refuses_to_run_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main() == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_gpu_run_goes_on_after_failures_and_records_each_step(tmp_path: Path) -> None:
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
    names = {"env", *PARITY_STEPS, "tests", "memcheck", "racecheck", "kernels", "bench", "bench-model", "profile"}
    assert set(steps) == names
    assert (steps["bench"]["status"], steps["bench"]["exit_code"]) == ("failed", 3)
    assert f"bench --bars --seconds 140 --json {out}/bench.json" in (out / "bench.log").read_text()


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


def test_gpu_run_makes_smca_benchmarks_importable_and_leaves_nothing_behind(tmp_path: Path) -> None:
    python, temporary = tmp_path / "python", tmp_path / "temporary"
    python.write_text('#!/bin/sh\nIFS=:\nfor folder in $PYTHONPATH; do ls -d "$folder"/smca_benchmarks/*.py; done\n')
    python.chmod(0o755)
    temporary.mkdir()
    environment = {**os.environ, "PYTHON": str(python), "TMPDIR": str(temporary)}
    subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, timeout=60)
    assert f"{temporary}/" in (tmp_path / "out/env.log").read_text()
    assert "/smca_benchmarks/sanitize.py" in (tmp_path / "out/env.log").read_text()
    assert list(temporary.iterdir()) == []


def test_gpu_run_fits_into_ten_minutes() -> None:
    """Sum of its steps' limits; those between `&` and `wait` run side by side."""
    total, together = 0, [0]
    for line in SCRIPT.read_text().split("\n"):
        found = re.match(r"\s*(?:smca|sanitize|step) \S+ (\d+)\b", line)
        if line.strip() == "wait":
            total, together = total + max(together), [0]
        elif found and line.rstrip().endswith("&"):
            together.append(int(found[1]))
        elif found:
            total += int(found[1])
    assert 400 < total <= 570  # and a step that has to be killed takes five seconds more


def test_gpu_run_without_a_folder_is_refused() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage" in done.stderr
