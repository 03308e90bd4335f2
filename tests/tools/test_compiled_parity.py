"""`smca parity --compiled`: its rows, what it says is outside, and what it does where something is missing."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from smca_kernels.testing.cases import CASES, Case
from smca_kernels.testing.machine.check import CompiledCase
from smca_kernels.tools import cli
from smca_kernels.tools.parity import compiled
from smca_kernels.tools.parity.compiled import compiled_cases, parse_architecture, run_compiled

ONE_CELL = Case("one cell", ((1, 1),), batch=2, queries=3)


def run_only(monkeypatch: pytest.MonkeyPatch, *cases: CompiledCase) -> None:
    monkeypatch.setattr(compiled, "compiled_cases", lambda arch, quick, dtypes: list(cases))


def test_rows_are_those_of_the_other_backends_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    half = replace(ONE_CELL, dtype="float16")
    broken = replace(half, name="broken", mask="no such mask")
    refused = replace(half, name="refused", scale=0.0)
    run_only(monkeypatch, *(CompiledCase(90, case) for case in (half, broken, refused)))
    reported: list[str] = []
    rows = run_compiled(90, quick=True, seeds=range(3, 5), report=lambda row: reported.append(row.case))
    assert reported == ["one cell", "broken", "refused"]
    assert [(row.backend, row.dtype, row.status) for row in rows] == [
        ("sm_90", "float16", "passed"),
        ("sm_90", "float16", "error"),
        ("sm_90", "float16", "skipped"),
    ]
    assert len([c for c in rows[0].comparisons if c.name == "output"]) == 2
    assert "not checked: seed 3: ValueError: mask must be one of" in rows[1].reason
    assert "softmax scale" in rows[2].reason


def test_the_report_says_what_is_outside_and_an_error_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_only(monkeypatch, CompiledCase(80, replace(ONE_CELL, mask="no such mask")))
    assert cli.main(["parity", "--compiled", "sm_80", "--quick", "--seed", "7"]) == 1
    printed = capsys.readouterr().out
    assert "repeat with --seed 7" in printed
    assert "Not checked: ptxas" in printed
    assert "timing" in printed


def test_every_case_that_is_not_large_runs_in_every_dtype_with_splits_and_dropout() -> None:
    cases = compiled_cases(90, quick=False, dtypes=("float16", "float32"))
    for dtype in ("float16", "float32"):
        of_dtype = [each for each in cases if each.case.dtype == dtype]
        assert {case.name for case in CASES if not case.large} < {each.case.name for each in of_dtype}
        assert any(each.schedules == 3 for each in of_dtype)
        assert any(each.dropout_p > 0 for each in of_dtype)
    assert len(compiled_cases(90, quick=True, dtypes=("float16", "float32"))) < len(cases)


def test_without_triton_there_is_nothing_to_execute_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs triton"):
        run_compiled(90, quick=True, seeds=range(1))


@pytest.mark.parametrize(("text", "arch"), [("sm_90", 90), ("sm_90a", 90), ("80", 80)])
def test_architectures_have_the_names_that_compilers_give_them(text: str, arch: int) -> None:
    assert parse_architecture(text) == arch


@pytest.mark.parametrize("text", ["sm_75", "sm_100", "hopper", ""])
def test_an_architecture_that_is_not_executed_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"one of sm_80, sm_86, sm_89, sm_90, got"):
        parse_architecture(text)


@pytest.mark.parametrize("option", ["--backend sdpa", "--device cpu"])
def test_what_chooses_a_backend_or_device_does_not_go_with_it(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(f"parity --compiled sm_80 {option}".split()) == 2
    assert "give neither --backend nor --device" in capsys.readouterr().err
