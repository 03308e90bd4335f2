"""Arguments, JSON and exit status of `smca cost`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from smca_kernels.tools.cost import command, published, report


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
    "arguments",
    [("--arch", "sm_81"), ("--arch", "ampere"), ("--dtype", "fp8"), ("--head-dim", "129"), ("--trips", "-1")],
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


def test_plain_adds_rows_of_flash_attention(monkeypatch: pytest.MonkeyPatch):
    modules = []
    monkeypatch.setattr(
        command, "compile_report", lambda *_, module="ours", **__: modules.append(module) or fake_rows()
    )
    assert command.run(parse("--plain")) == 0
    assert modules == ["ours", "smca_kernels.tools.cost.plain"]


def test_timeline_takes_a_threshold_or_its_default():
    assert (parse().timeline, parse("--timeline").timeline, parse("--timeline", "30").timeline) == (None, 12.0, 30.0)


def test_check_prints_the_comparison_and_compiles_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(published, "compile_report", lambda *_, **__: published_rows())
    monkeypatch.setattr(command, "compile_report", lambda *_, **__: pytest.fail("compiled"))
    assert command.run(parse("--check")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(published.MEASUREMENTS)
    assert any("triton-lang/triton pull 1917" in line for line in lines)


def published_rows() -> list[report.Row]:
    cases = {(each.card.arch, each.head_dim) for each in published.MEASUREMENTS}
    rows = []
    for arch, head_dim in cases:
        empty = report._empty_row(report.Job("", arch, "fp16", head_dim, 0, "plain forward", "plain forward"))
        rows += [empty | {"elements_per_cycle": rate, "spill_bytes": 0} for rate in (4.0, 5.0)]
    return rows


def test_published_is_compared_with_the_fastest_shape_at_the_cards_clock():
    for each, modelled in published.compare(published_rows()):
        card = each.card
        assert modelled == pytest.approx(5.0 * card.multiprocessors * card.clock_hz * 4 * each.head_dim / 1e12)


def test_measurement_without_a_scheduled_kernel_is_an_error():
    rows = [row | {"elements_per_cycle": None, "error": "ptxas gave up"} for row in published_rows()]
    with pytest.raises(ValueError, match=r"no kernel was scheduled for sm_80, head_dim 64: .*ptxas gave up"):
        published.compare(rows)
