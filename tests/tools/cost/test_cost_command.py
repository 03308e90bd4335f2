"""Arguments, JSON and exit status of `smca cost`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from smca_kernels.tools.cost import command, report


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
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


def fake_rows(error: str | None = None) -> list[report.Row]:
    job = report.Job("", 80, "fp16", 32, 0, "forward", "forward")
    return [report._empty_row(job) | {"error": error, "instructions_per_element": 9.25}]


def test_failed_kernel_makes_the_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(command, "compile_report", lambda *_, **__: fake_rows())
    assert command.run(parse()) == 0
    monkeypatch.setattr(command, "compile_report", lambda *_, **__: fake_rows("ptxas gave up"))
    assert command.run(parse()) == 1
    assert "ptxas gave up" in capsys.readouterr().out


def test_json_holds_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(command, "compile_report", lambda *_, **__: fake_rows())
    assert command.run(parse("--json", str(tmp_path / "cost.json"))) == 0
    assert json.loads((tmp_path / "cost.json").read_text()) == fake_rows()


def test_json_into_a_missing_directory_fails_before_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(command, "compile_report", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ValueError, match="--json must name a file in an existing folder"):
        command.run(parse("--json", str(tmp_path / "missing" / "cost.json")))
