"""Measurements of `smca bench`: rows, repeats, sizes, rotated inputs, replays and memory."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch
from few_cells import FEW_CELLS, QUICK
from smca_benchmarks import measures
from smca_benchmarks.cases import BenchmarkCase, input_bytes, make_call, output_bytes, per_scale_bytes
from smca_benchmarks.measures import Effort
from smca_benchmarks.peers import PEERS
from smca_benchmarks.records import Row, Skipped
from smca_benchmarks.workloads import BOTH, FORWARD, WORKLOADS

from smca_kernels.profiling import measure as profiling


def test_row_gives_median_and_quantiles(case: BenchmarkCase) -> None:
    row = case.row("time", BOTH, "sdpa", [5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (row.value, row.q20, row.q80, row.repeats, row.unit) == (3.5, 2.0, 5.0, 6, "ms")


def test_sizes_are_those_of_the_tensors(case: BenchmarkCase) -> None:
    inputs = case.inputs()
    given = 4 * (2 * 2 * (5 + 26 + 26) * 16 + 2 * 2 * 5 * 2 * (2 + 2 + 1))
    assert input_bytes(inputs) == given
    assert output_bytes(inputs) == given + 4 * 2 * 2 * 5 * 16
    assert per_scale_bytes(inputs) == 4 * 2 * (2 * 2 * 5 * 16 + 2 * 2 * 5)


def test_repeats_fill_the_time_between_minimum_and_maximum() -> None:
    effort = Effort(6.0, 3, 30, 1)
    assert [effort.repeats(seconds) for seconds in (0.01, 0.5, 6.0)] == [30, 12, 3]


def test_inputs_are_rotated_past_the_caches_by_their_size(case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch) -> None:
    size = input_bytes(case.inputs())
    monkeypatch.setattr(measures, "ROTATED_BYTES", 2.5 * size)
    sets = measures.rotated_inputs(case)
    assert len(sets) == 3
    assert len({inputs.query.sum().item() for inputs in sets}) == 3


def on_a_gpu(case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch) -> BenchmarkCase:
    """The case as if its device were an H100, one with fewer SMs than most."""
    properties = types.SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return dataclasses.replace(case, device=torch.device("cuda"))


def test_limit_is_that_of_the_device_at_hand(case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measures.limit_rows(case)) == []
    half = dataclasses.replace(on_a_gpu(case, monkeypatch), dtype="bfloat16")
    forward, both = measures.limit_rows(half)
    assert (forward.peer, forward.step, both.step) == ("limit", FORWARD, BOTH)
    assert forward.value == pytest.approx(1e3 * FEW_CELLS.elements / (114 * 1.83e9 * 16))


def raise_at_its_end_as_well() -> None:
    """Raise two errors as torch.cuda.graph does, the second of which doesn't name the cause."""
    try:
        raise RuntimeError("not while capturing")
    finally:
        raise RuntimeError("failed due to a previous error")


def test_small_workloads_are_replayed_on_a_gpu_and_what_cant_be_captured_says_so(
    case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [case.inputs()]

    def captured(calls: Sequence[Callable[[], object]]) -> Sequence[Callable[[], object]]:
        assert not torch.is_grad_enabled()  # or what was compiled without gradients would be compiled again
        if calls[0].func is PEERS["naive"].attend:
            raise_at_its_end_as_well()
        return calls

    monkeypatch.setattr(measures, "captured", captured)
    gpu = on_a_gpu(case, monkeypatch)
    names = {FORWARD: ["naive", "sdpa"]}
    monkeypatch.setattr(measures, "seconds_of", lambda call, device: 1.0)
    monkeypatch.setattr(profiling, "interleaved_times", lambda calls, repeats, device: {n: [1.0] for n in calls})
    found = list(measures.measure_time(gpu, sets, names, QUICK))
    assert [(each.measure, each.peer) for each in found if isinstance(each, Row)] == [
        ("time", "naive"), ("time", "sdpa"), ("replay", "sdpa")
    ]  # fmt: skip
    assert [(each.peer, each.step, each.reason) for each in found if isinstance(each, Skipped)] == [
        ("naive", "forward, replay", "RuntimeError: not while capturing")
    ]
    large = dataclasses.replace(gpu, workload=WORKLOADS["full-b16"])
    rows = list(measures.measure_time(large, sets, names, QUICK))
    assert {row.measure for row in rows if isinstance(row, Row)} == {"time"}


def test_step_that_no_peer_can_do_has_no_rows(case: BenchmarkCase) -> None:
    assert list(measures.measure_time(case, [case.inputs()], {FORWARD: []}, QUICK)) == []


def test_calls_take_the_inputs_in_turn() -> None:
    taken: list[str] = []
    for repeat in range(5):
        measures.in_turn([lambda: taken.append("a"), lambda: taken.append("b")], repeat)
    assert "".join(taken) == "ababa"


def test_forward_is_measured_without_gradients_and_both_with_all_six(case: BenchmarkCase) -> None:
    inputs = case.inputs()
    assert not make_call(PEERS["naive"], FORWARD, inputs)().requires_grad
    gradients = make_call(PEERS["naive"], BOTH, inputs)()
    assert [each.shape for each in gradients] == [tensor.shape for tensor in inputs.differentiable().values()]


def test_peak_is_what_goes_beyond_output_and_gradients(case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.inputs()
    outputs = output_bytes(inputs)
    monkeypatch.setattr(profiling, "peak_bytes", lambda call, device: outputs + 5_000_000)
    rows = [row for row in measures.measure_memory(case, inputs, ["naive"]) if isinstance(row, Row)]
    assert [row.value for row in rows if row.measure == "peak"] == [5.0]


def test_slowdown_is_measured_beside_a_process_that_ends_with_it(
    case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Process(subprocess.Popen[bytes]):
        def __init__(self, command: list[str]) -> None:
            super().__init__(command)
            started.append(self)

    monkeypatch.setattr(measures.subprocess, "Popen", Process)
    sets, admitted = [case.inputs()], {FORWARD: ["sdpa"], BOTH: ["naive", "sdpa"]}
    assert list(measures.measure_slowdown(case, sets, admitted, QUICK)) == []
    assert started == []
    monkeypatch.setattr(measures, "CROWDED", (case.workload.name,))
    rows = list(measures.measure_slowdown(case, sets, admitted, QUICK))
    assert [(row.measure, row.step, row.peer, row.unit) for row in rows] == [
        ("slowdown", FORWARD, "sdpa", "×"),
        ("slowdown", BOTH, "naive", "×"),
        ("slowdown", BOTH, "sdpa", "×"),
    ]
    assert all(row.value > 0 for row in rows)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_busy_process_ends_with_the_one_that_started_it() -> None:
    start = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])"
    # It holds the pipe, at whose end `run` waits.
    subprocess.run([sys.executable, "-c", start, measures.BUSY_PROCESS], check=True, stdout=subprocess.PIPE, timeout=60)
