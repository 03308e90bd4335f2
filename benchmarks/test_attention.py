"""Single cases of `smca bench` through pytest-benchmark, one test for each workload, dtype, peer and step.

    pytest benchmarks --collect-only -q                     # all cases of this device
    pytest benchmarks -k "full-b2 and sdpa"                 # those whose name says so
    pytest benchmarks -k basic-b1 --benchmark-json out.json

Each case is checked against float64 first: a backend of this library fails when it exceeds its error budget; the error
of another peer is in `extra_info`. Times are wall times of calls that wait for the device, whereas `smca bench` reads
the device's own clock.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .admission import ParityCheck
from .cases import BenchmarkCase, grad_mode, make_call, seconds_of
from .measures import in_turn, rotated_inputs
from .peers import PEERS
from .workloads import BOTH, DEFAULT_WORKLOADS, DTYPES, FORWARD, WORKLOADS

KIND = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(KIND)


@lru_cache(maxsize=1)  # the cases of one workload follow each other
def prepared(workload: str, dtype: str, device: torch.device) -> tuple[ParityCheck, list[Any]]:
    """Expected results and inputs to be timed of one workload."""
    torch.compiler.reset()  # torch.compile gives up after some number of shapes
    case = BenchmarkCase(WORKLOADS[workload], dtype, device, PEERS)
    sets = rotated_inputs(case)
    return ParityCheck.of(case, sets[0]), sets


@pytest.mark.parametrize("step", [FORWARD, BOTH])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("workload", DEFAULT_WORKLOADS[KIND])
@pytest.mark.parametrize("dtype", DTYPES[KIND])
def test_attention(benchmark: Any, dtype: str, workload: str, peer: str, step: str, device: torch.device) -> None:
    parity_check, sets = prepared(workload, dtype, device)
    chosen = PEERS[peer]
    reason = chosen.unsupported(sets[0], step == BOTH)
    if reason is not None:
        pytest.skip(reason)
    if chosen.same:
        parity = parity_check.check(chosen, step)
        assert parity.within or not chosen.ours, str(parity)
        benchmark.extra_info.update(error_over_budget=parity.ratio, logit_error=parity.logit_error)
    benchmark.group = f"{workload}, {dtype}, {step}"
    calls = [make_call(chosen, step, inputs) for inputs in sets]
    count = iter(range(10**9))
    with grad_mode(step):
        benchmark(lambda: seconds_of(lambda: in_turn(calls, next(count)), device))
