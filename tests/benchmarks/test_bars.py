"""Bars: each names something that is measured, and judges the rows that it is stated for."""

from __future__ import annotations

import dataclasses

import pytest
from devices import CPU
from few_cells import FEW_CELLS, NAIVE_AND_OURS, QUICK, report_of
from smca_benchmarks import bench_attention, records
from smca_benchmarks.bars import BARS, Bar
from smca_benchmarks.cases import BenchmarkCase
from smca_benchmarks.peers import PEERS
from smca_benchmarks.records import Parity, Report
from smca_benchmarks.workloads import BOTH, DTYPES, FORWARD, MEASURES, WORKLOADS


def test_every_bar_names_what_is_measured() -> None:
    bases = {*PEERS, "fastest", "limit", "inputs", "inputs + outputs of each scale", "torch SDPA"}
    for bar in BARS:
        assert bar.measure in MEASURES
        assert bar.step in (FORWARD, BOTH)
        assert bar.peer in {*PEERS, "default"}
        assert bar.against in bases
        assert set(bar.workloads) <= set(WORKLOADS)
        assert set(bar.dtypes) <= set(DTYPES["cuda"])
        assert (bar.at_least is None) != (bar.at_most is None)


def verdicts_of(case: BenchmarkCase, bar: Bar, **values: float) -> list[bool]:
    """Verdict of a bar on each row that it judges; one value a peer, "-" in names for "_"."""
    report = report_of(case)
    report.rows = [case.row(bar.measure, bar.step, name.replace("_", "-"), [value]) for name, value in values.items()]
    report.bars = (bar,)
    return [verdict.met for verdict in records.verdicts(report)]


@pytest.mark.parametrize(("value", "met"), [(10.0, True), (100.0, True), (100.1, False)])
def test_speed_bar_is_met_from_its_limit_on(case: BenchmarkCase, value: float, met: bool) -> None:
    bar = Bar("time", FORWARD, "default", "naive", at_least=8.0)
    assert verdicts_of(case, bar, naive=800.0, sdpa=value) == [met]


@pytest.mark.parametrize(("value", "met"), [(49.9, True), (50.1, False)])
def test_bar_with_a_surplus_adds_it_to_the_multiple(case: BenchmarkCase, value: float, met: bool) -> None:
    bar = Bar("overhead", FORWARD, "default", "naive", at_most=2.0, plus=30.0)
    assert verdicts_of(case, bar, naive=10.0, sdpa=value) == [met]


def test_bar_judges_only_its_device_workloads_and_dtypes(case: BenchmarkCase) -> None:
    bar = Bar("time", FORWARD, "default", "naive", at_least=8.0)
    for other in ({"device": "cuda"}, {"workloads": ("full-b2",)}, {"dtypes": ("bfloat16",)}):
        changed = dataclasses.replace(bar, **other)
        assert verdicts_of(case, changed, naive=1.0, sdpa=1.0) == []


def test_bar_of_the_default_backend_does_not_judge_another(case: BenchmarkCase) -> None:
    bar = Bar("time", FORWARD, "default", "naive", at_least=8.0)
    assert verdicts_of(case, bar, naive=1.0, triton=1.0) == []


def test_fastest_is_the_fastest_peer_that_computes_the_same_within_its_budget(case: BenchmarkCase) -> None:
    case = dataclasses.replace(case, peers=PEERS)
    report = report_of(case)
    times = {"naive": 9.0, "sdpa-mask": 6.0, "sdpa-wide": 4.0, "plain-sdpa": 1.0, "triton": 1.0, "sdpa": 5.0}
    report.rows = [case.row("time", FORWARD, name, [value]) for name, value in times.items()]
    report.parity = [Parity(FEW_CELLS.name, "float32", "sdpa-wide", 3.0, "key", "image 0", 7.0)]
    report.bars = (Bar("time", FORWARD, "default", "fastest", at_least=1.3),)
    (verdict,) = records.verdicts(report)
    assert (verdict.against, verdict.base, verdict.met) == ("sdpa-mask", 6.0, False)


def test_missed_bar_fails_the_run(case: BenchmarkCase) -> None:
    report = report_of(case)
    report.bars = (Bar("saved", FORWARD, "sdpa", "inputs", at_most=0.5),)
    bench_attention.measure_all([FEW_CELLS], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, 60.0)
    assert [verdict["met"] for verdict in report.as_json()["bars"]] == [False]
    assert not report.as_json()["passed"]


def test_a_bar_on_time_is_held_against_replays_where_there_are_any(case: BenchmarkCase) -> None:
    report = Report({"device": "cpu"}, bars=(Bar("time", BOTH, "sdpa", "naive", at_least=2.0),))
    report.rows = [case.row("time", BOTH, name, [1.0]) for name in ("sdpa", "naive")]
    (verdict,) = records.verdicts(report)
    assert (verdict.measure, verdict.met) == ("time", False)
    report.rows += [case.row("replay", BOTH, name, [value]) for name, value in (("sdpa", 0.1), ("naive", 0.5))]
    (verdict,) = records.verdicts(report)
    assert (verdict.measure, verdict.value, verdict.base, verdict.met) == ("replay", 0.1, 0.5, True)
