"""`pytest benchmarks`: a case is checked, then timed, or says why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from devices import CPU
from few_cells import FEW_CELLS, wrong_in
from smca_benchmarks import test_attention as pytest_cases
from smca_benchmarks.peers import PEERS, Peer
from smca_benchmarks.workloads import BOTH, FORWARD


class Benchmark:
    """Stand-in for pytest-benchmark's fixture that calls once."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.seconds: float | None = None

    def __call__(self, call: Callable[[], float]) -> None:
        self.seconds = call()


def pytest_case(monkeypatch: pytest.MonkeyPatch, peer: Peer, step: str) -> Benchmark:
    """A case of `pytest benchmarks`, run on a few cells."""
    monkeypatch.setattr(pytest_cases, "WORKLOADS", {"few cells": FEW_CELLS})
    monkeypatch.setattr(pytest_cases, "PEERS", {peer.name: peer})
    pytest_cases.prepared.cache_clear()
    benchmark = Benchmark()
    pytest_cases.test_attention(benchmark, "float32", "few cells", peer.name, step, CPU)
    return benchmark


@pytest.mark.parametrize("step", [FORWARD, BOTH])
def test_case_of_pytest_is_timed_after_its_error_is_known(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    benchmark = pytest_case(monkeypatch, wrong_in("output"), step)
    assert benchmark.seconds is not None
    assert benchmark.extra_info["error_over_budget"] > 1


def test_case_of_pytest_fails_where_ours_is_off_and_is_skipped_where_it_cant_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(AssertionError, match="is off by"):
        pytest_case(monkeypatch, dataclasses.replace(wrong_in("output"), ours=True), FORWARD)
    with pytest.raises(pytest.skip.Exception, match="no backward on a CPU"):
        pytest_case(monkeypatch, PEERS["flex"], BOTH)
