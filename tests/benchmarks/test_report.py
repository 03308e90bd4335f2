"""Tables and plots of a run, from its JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from smca_benchmarks import report
from smca_benchmarks.workloads import BOTH, FORWARD


def row(workload: str, step: str, peer: str, value: float, measure: str = "time", unit: str = "ms") -> dict[str, Any]:
    about = {"measure": measure, "workload": workload, "step": step, "dtype": "float32", "peer": peer, "unit": unit}
    return about | {"value": value, "q20": 0.9 * value, "q80": 1.1 * value, "repeats": 9}


@pytest.fixture
def found() -> dict[str, Any]:
    """A run of workloads that exist nowhere else."""
    peers = {
        "naive": {"what": "plain PyTorch", "ours": False, "same": True, "compiled": False},
        "sdpa": {"what": "ours", "ours": True, "same": True, "compiled": False},
        "rounded": {"what": "off", "ours": False, "same": True, "compiled": True},
        "other": {"what": "another function", "ours": False, "same": False, "compiled": False},
    }
    workloads = {
        f"{name}-b3": {
            "name": f"{name}-b3", "batch": 3, "spatial_shapes": [[h, 10]], "queries": 7, "heads": 2, "head_dim": 16,
            "image_share": 1.0, "keys": 10 * h, "elements": 420 * h,
        }
        for name, h in (("basic", 5), ("full", 9))
    }  # fmt: skip
    rows = []
    for workload, factor in (("full-b3", 2.0), ("basic-b3", 1.0)):
        for step in (FORWARD, BOTH):
            times = {"naive": 8.0, "sdpa": 2.0, "rounded": 1.0, "other": 4.0, "limit": 0.5}
            rows += [row(workload, step, peer, factor * value) for peer, value in times.items()]
        peaks = {"naive": 100.0, "sdpa": 3.0}
        rows += [row(workload, BOTH, peer, value, "peak", "MB") for peer, value in peaks.items()]
    rows.append(row("full-b3", BOTH, "rounded", 12.5, "compile", "s"))
    about = {"workload": "full-b3", "dtype": "float32"}
    parity = [
        about | {"peer": "sdpa", "ratio": 0.25, "worst": "key", "logit_error": None, "within": True},
        about | {"peer": "rounded", "ratio": 321.0, "worst": "query", "logit_error": 7.5, "within": False},
    ]
    bars = [
        about | {"bar": "≥ 5 × as fast as naive", "measure": "time", "step": FORWARD, "peer": "sdpa",
                 "against": "naive", "value": 4.0, "base": 16.0, "met": False},
    ]  # fmt: skip
    skipped = [about | {"peer": "flex", "step": BOTH, "reason": "no backward here"}]
    return {
        "environment": {"device": "cpu", "name": "a CPU", "torch": "9.9", "commit": "0123456789abcdef"},
        "finished": True, "passed": False, "defaults": {"float32": "sdpa"}, "workloads": workloads, "peers": peers,
        "parity": parity, "rows": rows, "bars": bars, "not_measured": skipped,
    }  # fmt: skip


def line_of(text: str, workload: str, peer: str) -> str:
    section = text.split(f"## {workload}")[1].split("\n## ")[0]
    return next(line for line in section.split("\n") if line.startswith(f"| {peer}"))


def test_row_has_time_speed_rate_share_of_the_limit_and_parity(found: dict[str, Any]) -> None:
    line = line_of(report.markdown(found), "full-b3", "sdpa")
    for cell in ("sdpa (default)", "4 (3.6–4.4)", "4.00 ×", "25 % / 25 %", "0.25", f"{3780 / 4 / 1e6:.4g}"):
        assert f" {cell} " in line


def test_peer_beyond_its_budget_is_marked_with_its_error(found: dict[str, Any]) -> None:
    line = line_of(report.markdown(found), "full-b3", "rounded")
    assert "rounded†" in line
    assert " 3.2e+02 " in line
    assert " 7.5 " in line
    assert " 12.5 " in line


def test_peer_that_computes_something_else_is_marked_and_has_no_rate(found: dict[str, Any]) -> None:
    line = line_of(report.markdown(found), "full-b3", "other")
    assert "other*" in line
    assert " 2.00 × " in line
    assert "%" not in line
    assert f" {3780 / 8 / 1e6:.4g} " not in line


def test_reasons_bars_and_an_unfinished_run_are_shown(found: dict[str, Any]) -> None:
    text = report.markdown(found | {"finished": False})
    assert "| flex | forward + backward | full-b3 float32 | no backward here |" in text
    assert "4 × naive (16) | **missed** |" in text
    assert "did not finish" in text
    assert "did not finish" not in report.markdown(found)


def test_columns_of_every_table_are_as_many_as_their_headings(found: dict[str, Any]) -> None:
    for block in report.markdown(found).split("\n\n"):
        lines = [line for line in block.split("\n") if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_render_writes_table_and_plots_beside_the_json(tmp_path: Path, found: dict[str, Any]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(found))
    written = report.render(path)
    assert [each.name for each in written] == ["run.md", "run_speedup.png", "run_keys.png"]
    assert written[0].read_text() == report.markdown(found)
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in written[1:])


def test_speedup_plot_has_a_bar_for_each_peer_and_workload(found: dict[str, Any]) -> None:
    figure = report.plot_speedup(found)
    _, both = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["naive", "sdpa", "rounded†", "other*"]
    assert [patch.get_height() for patch in both.patches] == [1.0, 1.0, 4.0, 4.0, 8.0, 8.0, 2.0, 2.0]


def test_keys_plot_shows_time_and_memory_in_order_of_keys(found: dict[str, Any]) -> None:
    time, memory = report.plot_keys(found).axes
    lines = {line.get_label(): line for line in time.get_lines()}
    assert list(lines["sdpa"].get_xdata()) == [50, 90]
    assert list(lines["sdpa"].get_ydata()) == [2.0, 4.0]
    assert {"rounded†", "other*"} < set(lines)
    assert {line.get_label() for line in memory.get_lines()} == {"naive", "sdpa"}


def test_time_of_the_work_alone_is_that_of_a_replay_where_there_is_one(found: dict[str, Any]) -> None:
    found["rows"].append(row("basic-b3", FORWARD, "sdpa", 0.5, "replay"))
    table = report.Table(found)
    assert table.work_time("basic-b3", FORWARD, "float32", "sdpa") == 0.5
    assert table.work_time("full-b3", FORWARD, "float32", "sdpa") == 4.0
    assert table.work_time("full-b3", FORWARD, "float32", "flex") is None


def test_run_of_one_workload_has_no_plot_against_keys(found: dict[str, Any]) -> None:
    found["rows"] = [each for each in found["rows"] if each["workload"] == "full-b3"]
    assert report.plot_keys(found) is None


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "it has no "), ("[", "can't be read as a run's JSON"), ("[1]", "it has no ")]
)
def test_file_that_is_no_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.load(path)
