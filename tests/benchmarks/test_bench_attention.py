"""`smca bench`: its rows, its JSON file, its exit status, and runs that are cut short."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import CPU
from few_cells import FEW_CELLS, NAIVE_AND_OURS, QUICK, report_of, wrong_in
from smca_benchmarks import bench_attention, peers
from smca_benchmarks.admission import Clock
from smca_benchmarks.bars import Bar
from smca_benchmarks.cases import BenchmarkCase
from smca_benchmarks.peers import PEERS
from smca_benchmarks.records import Report
from smca_benchmarks.workloads import BOTH, FORWARD


def test_compilers_find_nothing_of_an_earlier_run(case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def admit(*rest: Any) -> dict[str, list[str]]:
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        assert list(folders[-1].iterdir()) == []
        return {FORWARD: [], BOTH: []}

    monkeypatch.setattr(bench_attention, "admit", admit)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    for _ in range(2):
        bench_attention.measure(case, Clock(60.0), QUICK, report_of(case))
    assert len(set(folders)) == 2
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


def arguments(**changed: Any) -> argparse.Namespace:
    given = dict.fromkeys(("workload", "dtype", "peer", "seconds", "json", "base", "render"))
    return argparse.Namespace(**(given | {"quick": True, "bars": False} | changed))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`smca bench` on a few cells."""
    monkeypatch.setattr(bench_attention, "WORKLOADS", {FEW_CELLS.name: FEW_CELLS})
    monkeypatch.setattr(bench_attention, "PLANNED", (FEW_CELLS.name,))
    monkeypatch.setattr(bench_attention, "DEFAULT_WORKLOADS", {"cpu": (FEW_CELLS.name,)})
    monkeypatch.setattr(bench_attention, "QUICK_EFFORTS", {"cpu": QUICK})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("small")
def test_bench_reports_every_measure_of_every_peer_and_survives_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those that compile are tested by what they would compile.
    monkeypatch.setattr(peers, "PEERS", {name: peer for name, peer in PEERS.items() if not peer.compiled})
    path = tmp_path / "bench.json"
    assert bench_attention.run(arguments(json=path)) == 0
    found = json.loads(path.read_text())
    assert {"device", "name", "torch", "triton", "commit", "dirty", "threads"} <= set(found["environment"])
    assert found["finished"]
    assert found["passed"]
    assert {each["peer"] for each in found["not_measured"]} == {"triton", "triton-all"}
    same, context = {"naive", "sdpa", "sdpa-mask", "sdpa-wide"}, {"plain-sdpa", "deformable"}
    keys = {(row["measure"], row["step"], row["peer"]) for row in found["rows"]}
    assert keys == {
        *(("time", step, peer) for step in (FORWARD, BOTH) for peer in same | context),
        *(("preparation", FORWARD, peer) for peer in ("sdpa-mask", "sdpa-wide")),
        *(("overhead", step, peer) for step in (FORWARD, BOTH) for peer in ("torch SDPA", "sdpa")),
        *(("saved", FORWARD, peer) for peer in same | {"inputs", "inputs + outputs of each scale"}),
        *(("peak", BOTH, peer) for peer in same),
        *(("computed", FORWARD, peer) for peer in (("triton", "triton-all") if find_spec("triton") else ())),
    }
    assert all(row["value"] > 0 for row in found["rows"] if row["measure"] != "peak")
    assert (tmp_path / "bench.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "bench_speedup.png").exists()


@pytest.mark.usefixtures("small")
def test_base_that_was_faster_than_noise_explains_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, base = tmp_path / "bench.json", tmp_path / "base.json"
    assert bench_attention.run(arguments(peer=["naive"], json=base)) == 0
    found = json.loads(base.read_text())
    generous = [row | {"value": 1e3 * row["value"], "q20": 1e3, "q80": 1e9} for row in found["rows"]]
    for rows, status in ((generous, 0), ([shrunk(row) for row in found["rows"]], 1)):
        base.write_text(json.dumps(found | {"rows": rows}))
        assert bench_attention.run(arguments(peer=["naive"], json=path, base=base)) == status
        assert ("**regression**" in capsys.readouterr().out) == bool(status)


def shrunk(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ours as if it had taken a thousandth of the time."""
    if row["peer"] != "sdpa" or row["q20"] is None:
        return row
    return row | {name: row[name] / 1e3 for name in ("value", "q20", "q80")}


@pytest.mark.usefixtures("small")
def test_what_was_done_is_in_the_file_when_a_later_workload_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(FEW_CELLS, name="other")
    once = bench_attention.measure

    def interrupted(case: BenchmarkCase, *rest: Any) -> None:
        if case.workload is other:
            raise KeyboardInterrupt
        once(case, *rest)

    monkeypatch.setattr(bench_attention, "measure", interrupted)
    path = tmp_path / "bench.json"
    report = Report({"device": "cpu"}, path)
    with pytest.raises(KeyboardInterrupt):
        bench_attention.measure_all([FEW_CELLS, other], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, 60.0)
    found = json.loads(path.read_text())
    assert not found["finished"]
    assert {row["workload"] for row in found["rows"]} == {"tiny", "few cells"}


def test_workload_that_fails_or_comes_too_late_is_reported_and_the_run_ends_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*rest: Any) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(bench_attention, "measure", fail)
    for seconds, reason in ((60.0, "OutOfMemoryError: too large"), (0.0, "not begun after 0 s")):
        report = Report({"device": "cpu"})
        bench_attention.measure_all([FEW_CELLS], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, seconds)
        assert [(each.workload, each.reason) for each in report.not_measured] == [("few cells", reason)]
        assert report.finished


def test_overhead_that_cant_be_measured_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: Any) -> None:
        raise RuntimeError("no kernel for this dtype")

    monkeypatch.setattr(bench_attention, "measure_overhead", fail)
    report = Report({"device": "cpu"})
    bench_attention.measure_all([FEW_CELLS], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, 60.0)
    assert [(each.workload, each.reason) for each in report.not_measured] == [
        ("tiny", "RuntimeError: no kernel for this dtype")
    ]
    assert {row.workload for row in report.rows} == {"few cells"}


def test_commit_is_what_the_caller_says_or_git(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "0123abcd", "status": " M benchmarks/peers.py"}
    monkeypatch.setattr(bench_attention, "_git", lambda command, *rest: answers[command])
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    expected = [("0123abcd", True), ("0123abcd", False), ("unknown", "unknown")]
    for status, commit in ((" M benchmarks/peers.py", "0123abcd"), ("", "0123abcd"), ("", "")):
        answers |= {"rev-parse": commit, "status": status}
        facts = bench_attention.environment(CPU)
        assert (facts["commit"], facts["dirty"]) == expected.pop(0)
    monkeypatch.setenv("GIT_COMMIT", "4567cdef")
    facts = bench_attention.environment(CPU)
    assert (facts["commit"], facts["dirty"]) == ("4567cdef", "unknown")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("judge", "status"), [(False, 0), (True, 1)])
def test_bars_are_judged_only_when_asked_for(
    judge: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_attention, "BARS", (Bar("saved", FORWARD, "sdpa", "inputs", at_most=0.0),))
    path = tmp_path / "bench.json"
    assert bench_attention.run(arguments(peer=["naive"], json=path, bars=judge)) == status
    found = json.loads(path.read_text())
    assert ([bar["met"] for bar in found["bars"]], found["passed"]) == ([False] * judge, not judge)
    assert ("**missed**" in capsys.readouterr().out) == judge


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("judge", [False, True])
def test_failed_parity_fails_a_run_with_and_without_bars(judge: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(wrong_in("key"), name="sdpa", ours=True)
    monkeypatch.setattr(peers, "PEERS", {"naive": PEERS["naive"], "sdpa": wrong})
    monkeypatch.setattr(bench_attention, "BARS", ())
    assert bench_attention.run(arguments(bars=judge)) == 1


def test_render_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "measure_all", None)
    path = tmp_path / "bench.json"
    Report({"device": "cpu"}, path).write()
    assert bench_attention.run(arguments(render=path)) == 0
    assert (tmp_path / "bench.md").exists()


def test_json_in_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--json must name a file in an existing folder"):
        bench_attention.run(arguments(json=tmp_path / "none" / "bench.json"))


@pytest.mark.usefixtures("small")
def test_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--peer must be among naive, .*, got cuda"):
        bench_attention.run(arguments(peer=["cuda"]))
