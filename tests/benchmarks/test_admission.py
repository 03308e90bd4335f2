"""Admission of peers: parity with float64 first, then reasons against peers that can't be measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from few_cells import NAIVE_AND_OURS, report_of, wrong_in
from smca_benchmarks import admission
from smca_benchmarks.admission import Clock, ParityCheck
from smca_benchmarks.cases import BenchmarkCase
from smca_benchmarks.peers import PEERS, Peer
from smca_benchmarks.records import Report
from smca_benchmarks.workloads import BOTH, FORWARD
from torch import Tensor

from smca_kernels.testing.cases import CaseInputs


@pytest.mark.parametrize("name", ["output", "query", "key", "value", "center", "precision", "scale_weights"])
def test_parity_check_sees_an_error_in_the_output_and_in_each_gradient(case: BenchmarkCase, name: str) -> None:
    parity = ParityCheck.of(case, case.inputs()).check(wrong_in(name), BOTH)
    assert not parity.within
    if name != "output":
        assert parity.worst.split(" ")[0] == name


def test_parity_check_passes_naive_and_ours_and_needs_no_backward(case: BenchmarkCase) -> None:
    checked = ParityCheck.of(case, case.inputs())
    assert all(checked.check(peer, step).within for peer in NAIVE_AND_OURS.values() for step in (FORWARD, BOTH))
    assert checked.check(wrong_in("key"), FORWARD).within
    assert not checked.check(wrong_in("output"), FORWARD).within


def test_parity_check_compares_some_heads_of_one_image_of_a_large_workload(
    case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_ELEMENTS", {"cpu": 5 * 26})
    checked = ParityCheck.of(case, case.inputs())
    assert checked.part.query.shape == (1, 1, 5, 16)
    assert torch.equal(checked.part.key, checked.inputs.key[checked.image : checked.image + 1, checked.heads])
    assert checked.check(PEERS["naive"], BOTH).within


def admitted(case: BenchmarkCase, *others: Peer, clock: Clock | None = None) -> tuple[dict[str, list[str]], Report]:
    case = dataclasses.replace(case, peers={**NAIVE_AND_OURS, **{peer.name: peer for peer in others}})
    report = report_of(case)
    return admission.admit(case, case.inputs(), clock or Clock(60.0), report), report


def test_backend_of_ours_off_parity_is_not_measured_and_fails_the_run(case: BenchmarkCase) -> None:
    ours = dataclasses.replace(wrong_in("key"), name="sdpa", ours=True)
    names, report = admitted(case, ours)
    assert names == {FORWARD: ["naive"], BOTH: ["naive"]}
    assert "PARITY FAILED: key" in report.not_measured[0].reason
    assert not report.as_json()["passed"]


def test_other_peer_off_parity_is_measured_and_its_error_published(case: BenchmarkCase) -> None:
    names, report = admitted(case, wrong_in("key"))
    assert "wrong" in names[BOTH]
    (parity,) = (each for each in report.as_json()["parity"] if each["peer"] == "wrong")
    assert not parity["within"]
    assert parity["ratio"] > 1
    assert report.as_json()["passed"]


def test_peer_that_fails_says_why_and_the_others_go_on(case: BenchmarkCase) -> None:
    def fail(inputs: CaseInputs) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    names, report = admitted(case, Peer("failing", "", fail))
    assert names == {FORWARD: ["naive", "sdpa"], BOTH: ["naive", "sdpa"]}
    assert [(each.peer, each.step, each.reason) for each in report.not_measured] == [
        ("failing", "", "RuntimeError: no kernel for this")
    ]


def test_peer_without_a_backward_is_measured_forward(case: BenchmarkCase) -> None:
    reason = "no backward here"
    peer = dataclasses.replace(
        PEERS["naive"], name="half", unsupported=lambda inputs, with_gradients: reason if with_gradients else None
    )
    names, report = admitted(case, peer)
    assert "half" in names[FORWARD]
    assert "half" not in names[BOTH]
    assert [(each.peer, each.step, each.reason) for each in report.not_measured] == [("half", BOTH, reason)]


def test_compiling_takes_its_time_apart_and_only_while_that_lasts(case: BenchmarkCase) -> None:
    compiled = dataclasses.replace(PEERS["naive"], name="compiled", compiled=True)
    names, report = admitted(case, compiled)
    assert "compiled" in names[BOTH]
    assert [(row.measure, row.step) for row in report.rows] == [("compile", BOTH), ("compile", FORWARD)]
    late = Clock(60.0)
    late.start -= 31.0
    names, report = admitted(case, compiled, clock=late)
    assert "compiled" not in names[FORWARD]
    assert "time for that was up" in report.not_measured[0].reason
