"""The cases of `smca bench` through pytest-benchmark: `pytest benchmarks -k "full-b2 and sdpa"`.

Each case is checked against float64 first. A backend of ours that is off fails; of another peer, the error is in
`extra_info`. Times are wall time of calls that wait for the device; `smca bench` reads the device's own clock.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .gate import Gate
from .measures import in_turn, rotated_inputs
from .peers import PEERS
from .subject import Subject, grad_mode, make_call, seconds_of
from .workloads import BOTH, DEFAULT_WORKLOADS, DTYPES, FORWARD, WORKLOADS

KIND = "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=1)  # the cases of one workload follow each other
def gate(workload: str, dtype: str, device: torch.device) -> tuple[Gate, list[Any]]:
    torch.compiler.reset()  # shapes pile up, and compilers give up after some
    subject = Subject(WORKLOADS[workload], dtype, device, PEERS)
    sets = rotated_inputs(subject)
    return Gate.of(subject, sets[0]), sets


@pytest.mark.parametrize("step", [FORWARD, BOTH])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("workload", DEFAULT_WORKLOADS[KIND])
@pytest.mark.parametrize("dtype", DTYPES[KIND])
def test_attention(benchmark: Any, dtype: str, workload: str, peer: str, step: str, device: torch.device) -> None:
    checked, sets = gate(workload, dtype, device)
    chosen = PEERS[peer]
    reason = chosen.unsupported(sets[0], step == BOTH)
    if reason is not None:
        pytest.skip(reason)
    if chosen.same:
        parity = checked.check(chosen, step)
        assert parity.within or not chosen.ours, str(parity)
        benchmark.extra_info.update(error_over_budget=parity.ratio, logit_error=parity.logit_error)
    benchmark.group = f"{workload}, {dtype}, {step}"
    calls = [make_call(chosen, step, inputs) for inputs in sets]
    count = iter(range(10**9))
    with grad_mode(step):
        benchmark(lambda: seconds_of(lambda: in_turn(calls, next(count)), device))
