"""`smca parity`: exit statuses, reports, and arguments that can't work."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.backends.sdpa import operator as sdpa
from smca_kernels.inputs import AttentionInputs
from smca_kernels.testing.cases import Case
from smca_kernels.tools.parity import command as parity


def run_parity(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    return parity.run(parser.parse_args(["--device", "cpu", *arguments]))


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (
        Case("one grid", ((3, 5),), queries=5, quick=True),
        Case("two grids", ((2, 3), (1, 1)), queries=5),
    )
    monkeypatch.setattr(parity, "CASES", cases)


@pytest.fixture
def right_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "attention", reference.attention)


def wrong_attention(inputs: AttentionInputs) -> Tensor:
    return 1.2 * reference.attention(inputs)


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_all_within_budget_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parity("--backend", "sdpa", "--seed", "7") == 0
    out = capsys.readouterr().out
    assert "seed 7 " in out
    assert "6 passed, 0 failed, 0 error, 0 skipped" in out


@pytest.mark.usefixtures("two_cases")
def test_a_backend_that_is_wrong_is_status_1_and_named_in_every_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sdpa, "attention", wrong_attention)
    files = ["--json", str(tmp_path / "a.json"), "--junit", str(tmp_path / "a.xml")]
    assert run_parity("--backend", "sdpa", "--dtype", "float32", *files) == 1
    assert re.search(r"FAILED seed \d+: output: error", capsys.readouterr().out)
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["failed", "failed"]
    assert report["rows"][0]["tensors"]["output"]["ratio"] > 1
    suite = ElementTree.parse(tmp_path / "a.xml").getroot()[0]
    assert suite.get("failures") == "2"
    assert len(suite.findall("testcase/failure")) == 2


@pytest.mark.usefixtures("two_cases")
def test_a_crash_is_status_1_and_hides_no_other_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash_on_one_scale(inputs: AttentionInputs) -> Tensor:
        if len(inputs.spatial_shapes) == 1:
            raise RuntimeError("out of luck")
        return reference.attention(inputs)

    monkeypatch.setattr(sdpa, "attention", crash_on_one_scale)
    assert run_parity("--backend", "sdpa", "--dtype", "float32") == 1
    out = capsys.readouterr().out
    assert re.search(r"error: seed \d+: RuntimeError: out of luck", out)
    assert "1 passed, 0 failed, 1 error" in out


@pytest.mark.usefixtures("two_cases")
def test_nan_left_in_an_output_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_an_element(inputs: AttentionInputs) -> Tensor:
        output = torch.empty_like(inputs.query)
        output[:, :, 1:] = reference.attention(inputs)[:, :, 1:]
        return output

    monkeypatch.setattr(sdpa, "attention", forget_an_element)
    assert run_parity("--backend", "sdpa", "--dtype", "float32") == 1


@pytest.mark.usefixtures("two_cases")
@pytest.mark.parametrize("named", [True, False])
def test_a_backend_that_never_serves_is_status_1_if_it_was_named(
    named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "BACKENDS", ("sdpa",))
    monkeypatch.setattr(sdpa, "unsupported", lambda inputs: "not on Sundays")
    # If none is named, no case runs at all.
    assert run_parity(*(["--backend", "sdpa"] if named else []), "--dtype", "float16") == 1
    assert "skipped: not on Sundays" in capsys.readouterr().out


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_quick_runs_the_quick_cases_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parity("--backend", "sdpa", "--dtype", "float32", "--quick") == 0
    out = capsys.readouterr().out
    assert "one grid" in out
    assert "two grids" not in out


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_reports_carry_the_seed_and_the_environment(tmp_path: Path) -> None:
    run_parity("--backend", "sdpa", "--seed", "11", "--json", str(tmp_path / "a"), "--junit", str(tmp_path / "b"))
    report = json.loads((tmp_path / "a").read_text())
    assert (report["seed"], report["torch"]) == (11, torch.__version__)
    assert len(report["rows"]) == 6
    properties = ElementTree.parse(tmp_path / "b").getroot().findall("testsuite/properties/property")
    assert {"name": "seed", "value": "11"} in [each.attrib for each in properties]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_the_same_seed_gives_the_same_report_and_another_does_not(tmp_path: Path) -> None:
    def tensors(seed: str) -> list[Any]:
        path = tmp_path / "report"
        run_parity("--backend", "sdpa", "--dtype", "float16", "--seed", seed, "--json", str(path))
        return [row["tensors"] for row in json.loads(path.read_text())["rows"]]

    assert tensors("3") == tensors("3")
    assert tensors("3") != tensors("4")


@pytest.mark.usefixtures("two_cases")
def test_draws_are_of_the_seeds_that_follow_and_a_failure_names_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = 0

    def wrong_in_one_draw(inputs: AttentionInputs) -> Tensor:
        nonlocal calls
        calls += 1
        return wrong_attention(inputs) if calls == 2 else reference.attention(inputs)

    monkeypatch.setattr(sdpa, "attention", wrong_in_one_draw)
    arguments = ["--backend", "sdpa", "--dtype", "float32", "--quick", "--json", str(tmp_path / "report")]
    assert run_parity(*arguments, "--seed", "7", "--draws", "3") == 1
    assert calls == 3
    out = capsys.readouterr().out
    assert "FAILED seed 8: output" in out
    assert "seed 7: " not in out
    assert "seed 9: " not in out
    report = json.loads((tmp_path / "report").read_text())
    assert (report["seed"], report["draws"]) == (7, 3)
    assert report["rows"][0]["tensors"]["output"]["ratio"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "missing/file"], "--json must name a file in an existing folder, got missing/file"),
        (["--junit", "."], "--junit must name a file in an existing folder, got ."),
        (["--device", "toaster"], "--device toaster can't be used"),
        (["--device", "cuda:99"], "--device cuda:99 can't be used"),
        (["--seed", "2147483647", "--draws", "2"], "--draws must leave .*, got 2 from seed 2147483647 on"),
    ],
)  # fmt: skip
def test_arguments_that_can_not_work_raise_before_any_case(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_parity(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--dtype", "int8"],
        ["--backend", "auto"],
        ["--draws", "0"],
        ["--draws", "many"],
    ],
)
def test_arguments_out_of_range_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        run_parity(*arguments)
    assert exit_status.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_on_a_cpu_the_kernels_run_through_the_interpreter_without_being_told() -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = (
        "import sys; from smca_kernels.tools.parity import command as parity; from smca_kernels.tools.cli import main;"
        "parity.CASES = parity.CASES[:1];"
        "sys.exit(main('parity --device cpu --backend triton --dtype float16 --quick'.split()))"
    )
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "1 passed, 0 failed, 0 error, 0 skipped" in finished.stdout, finished.stdout + finished.stderr
    assert finished.returncode == 0
