"""`smca bench`: its tables, parity gate, rows, bars and the JSON it writes, on workloads of a few cells."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from smca_benchmarks import bench_attention, gate, measures, peers, records, small_shapes
from smca_benchmarks import test_attention as pytest_cases
from smca_benchmarks.counted import counted_rows
from smca_benchmarks.gate import Clock, Gate
from smca_benchmarks.measures import Effort
from smca_benchmarks.peers import PEERS, Peer
from smca_benchmarks.records import Left, Parity, Report, Row
from smca_benchmarks.subject import Subject, input_bytes, make_call, output_bytes, per_scale_bytes
from smca_benchmarks.workloads import BARS, BOTH, DEFAULT_WORKLOADS, DTYPES, FORWARD, MEASURES, WORKLOADS, Bar, Workload
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.profiling import measure as profiling
from smca_kernels.testing.parity import Inputs

CPU = torch.device("cpu")
FEW_CELLS = Workload("few cells", 2, ((4, 5), (2, 3)), queries=5, heads=2, head_dim=16)
QUICK = Effort(0.0, 2, 2, 2)
NAIVE_AND_OURS = {name: PEERS[name] for name in ("naive", "sdpa")}
PARITY_STEPS = {f"parity-{dtype}" for dtype in ("float32", "float16", "bfloat16")}
SCRIPT = Path(bench_attention.__file__).with_name("gpu_run.sh")


@pytest.fixture
def subject() -> Subject:
    return Subject(FEW_CELLS, "float32", CPU, NAIVE_AND_OURS)


def report_of(subject: Subject) -> Report:
    described = {name: bench_attention.describe_peer(peer) for name, peer in subject.peers.items()}
    return Report({"device": subject.device.type}, defaults={subject.dtype: "sdpa"}, peers=described)


# --------------------------------------------------------------------------------------------------------- workloads


def test_detector_workload_is_the_one_that_the_bars_are_stated_for() -> None:
    detector = WORKLOADS["full-b2"]
    assert (detector.batch, detector.queries, detector.heads, detector.head_dim) == (2, 300, 8, 32)
    assert detector.spatial_shapes == ((50, 84), (25, 42), (13, 21))


def test_every_grid_is_measured_at_every_batch_size() -> None:
    found = {(workload.name.split("-")[0], workload.batch) for workload in WORKLOADS.values()}
    assert {(grid, batch) for grid in ("basic", "dc5", "full", "pyramid") for batch in (1, 2, 16)} <= found
    assert WORKLOADS["full-b2-900"].queries == 900
    assert WORKLOADS["full-b2-d64"].head_dim == 64


def test_defaults_of_a_device_exist_and_start_with_what_the_bars_name() -> None:
    for names in DEFAULT_WORKLOADS.values():
        assert set(names) <= set(WORKLOADS)
        assert names[0] == "full-b2"


def test_workload_has_the_inputs_that_it_says(subject: Subject) -> None:
    inputs = subject.inputs()
    assert inputs.query.shape == (2, 2, 5, 16)
    assert inputs.key.shape == (2, 2, 26, 16)
    assert inputs.center.shape == (2, 2, 5, 2, 2)
    assert inputs.valid_shapes is None
    assert all(tensor.requires_grad for tensor in inputs.differentiable().values())


def test_padded_workload_is_three_tenths_padding_and_counts_no_padded_element() -> None:
    padded = Workload("padded", 2, ((10, 20),), queries=3, heads=2, image_share=0.7)
    inputs = padded.inputs("float32", 0, CPU)
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, None)[0]
    assert ignored is not None
    assert ignored.float().mean().item() == pytest.approx(0.3)
    assert padded.elements == 2 * 3 * int((~ignored).sum())


# -------------------------------------------------------------------------------------------------------------- bars


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


def judged(subject: Subject, bar: Bar, monkeypatch: pytest.MonkeyPatch, **values: float) -> list[bool]:
    """Whether a bar is met, for every row that it judges; one value a peer, "-" in names for "_"."""
    report = report_of(subject)
    report.rows = [
        subject.row(bar.measure, bar.step, name.replace("_", "-"), [value]) for name, value in values.items()
    ]
    monkeypatch.setattr(records, "BARS", (bar,))
    return [verdict.met for verdict in records.verdicts(report)]


@pytest.mark.parametrize(("value", "met"), [(10.0, True), (100.0, True), (100.1, False)])
def test_speed_bar_is_met_from_its_limit_on(
    subject: Subject, value: float, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar("time", FORWARD, "default", "naive", at_least=8.0)
    assert judged(subject, bar, monkeypatch, naive=800.0, sdpa=value) == [met]


@pytest.mark.parametrize(("value", "met"), [(49.9, True), (50.1, False)])
def test_bar_with_a_surplus_adds_it_to_the_multiple(
    subject: Subject, value: float, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar("overhead", FORWARD, "default", "naive", at_most=2.0, plus=30.0)
    assert judged(subject, bar, monkeypatch, naive=10.0, sdpa=value) == [met]


def test_bar_judges_only_its_device_workloads_and_dtypes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar("time", FORWARD, "default", "naive", at_least=8.0)
    for other in ({"device": "cuda"}, {"workloads": ("full-b2",)}, {"dtypes": ("bfloat16",)}):
        changed = dataclasses.replace(bar, **other)
        assert judged(subject, changed, monkeypatch, naive=1.0, sdpa=1.0) == []


def test_bar_of_the_default_backend_does_not_judge_another(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar("time", FORWARD, "default", "naive", at_least=8.0)
    assert judged(subject, bar, monkeypatch, naive=1.0, triton=1.0) == []


def test_fastest_is_the_fastest_peer_that_computes_the_same_within_its_budget(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = dataclasses.replace(subject, peers=PEERS)
    report = report_of(subject)
    times = {"naive": 9.0, "sdpa-mask": 6.0, "sdpa-wide": 4.0, "plain-sdpa": 1.0, "triton": 1.0, "sdpa": 5.0}
    report.rows = [subject.row("time", FORWARD, name, [value]) for name, value in times.items()]
    report.parity = [Parity(FEW_CELLS.name, "float32", "sdpa-wide", 3.0, "key", "image 0", 7.0)]
    monkeypatch.setattr(records, "BARS", (Bar("time", FORWARD, "default", "fastest", at_least=1.3),))
    (verdict,) = records.verdicts(report)
    assert (verdict.against, verdict.base, verdict.met) == ("sdpa-mask", 6.0, False)


def test_missed_bar_fails_the_run(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BARS", (Bar("saved", FORWARD, "sdpa", "inputs", at_most=0.5),))
    report = report_of(subject)
    bench_attention.measure_all([FEW_CELLS], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, 60.0)
    assert [verdict["met"] for verdict in report.as_json()["bars"]] == [False]
    assert not report.as_json()["passed"]


# -------------------------------------------------------------------------------------------------------------- rows


def test_elements_are_counted_that_a_plan_leaves_to_compute() -> None:
    # Narrow priors at σ/W = 0.02 with 300 queries: at most 1/1.8 of all; without a prior, all.
    workloads = [WORKLOADS[f"pyramid-b2-{prior}"] for prior in ("narrow", "off")]
    counts = {(row.workload, row.dtype, row.peer): row.value for row in counted_rows(workloads)}
    for dtype in DTYPES["cuda"]:
        everything = workloads[0].elements / 1e6
        assert counts["pyramid-b2-narrow", dtype, "triton"] < everything / 1.8
        assert counts["pyramid-b2-off", dtype, "triton"] == everything
        assert {counts[workload.name, dtype, "triton-all"] for workload in workloads} == {everything}


def test_a_bar_on_time_is_held_against_replays_where_there_are_any(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BARS", (Bar("time", BOTH, "sdpa", "naive", at_least=2.0),))
    report = Report({"device": "cpu"}, peers={})
    report.rows = [subject.row("time", BOTH, name, [1.0]) for name in ("sdpa", "naive")]
    (verdict,) = records.verdicts(report)
    assert (verdict.measure, verdict.met) == ("time", False)
    report.rows += [subject.row("replay", BOTH, name, [value]) for name, value in (("sdpa", 0.1), ("naive", 0.5))]
    (verdict,) = records.verdicts(report)
    assert (verdict.measure, verdict.value, verdict.base, verdict.met) == ("replay", 0.1, 0.5, True)


def test_row_gives_median_and_quantiles(subject: Subject) -> None:
    row = subject.row("time", BOTH, "sdpa", [5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (row.value, row.q20, row.q80, row.repeats, row.unit) == (3.5, 2.0, 5.0, 6, "ms")


def test_sizes_are_those_of_the_tensors(subject: Subject) -> None:
    inputs = subject.inputs()
    given = 4 * (2 * 2 * (5 + 26 + 26) * 16 + 2 * 2 * 5 * 2 * (2 + 2 + 1))
    assert input_bytes(inputs) == given
    assert output_bytes(inputs) == given + 4 * 2 * 2 * 5 * 16
    assert per_scale_bytes(inputs) == 4 * 2 * (2 * 2 * 5 * 16 + 2 * 2 * 5)


def test_repeats_fill_the_time_between_least_and_most() -> None:
    effort = Effort(6.0, 3, 30, 1)
    assert [effort.repeats(seconds) for seconds in (0.01, 0.5, 6.0)] == [30, 12, 3]


def test_inputs_are_rotated_past_the_caches_by_their_size(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    size = input_bytes(subject.inputs())
    monkeypatch.setattr(measures, "ROTATED_BYTES", 2.5 * size)
    sets = measures.rotated_inputs(subject)
    assert len(sets) == 3
    assert len({inputs.query.sum().item() for inputs in sets}) == 3


def on_a_gpu(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The subject as if its device were an H100, one with fewer SMs than most."""
    properties = types.SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return dataclasses.replace(subject, device=torch.device("cuda"))


def test_limit_is_that_of_the_device_at_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measures.limit_rows(subject)) == []
    half = dataclasses.replace(on_a_gpu(subject, monkeypatch), dtype="bfloat16")
    forward, both = measures.limit_rows(half)
    assert (forward.peer, forward.step, both.step) == ("limit", FORWARD, BOTH)
    assert forward.value == pytest.approx(1e3 * FEW_CELLS.elements / (114 * 1.83e9 * 16))


def raise_at_its_end_as_well() -> None:
    """As torch.cuda.graph does, with a message that tells nothing."""
    try:
        raise RuntimeError("not while capturing")
    finally:
        raise RuntimeError("failed due to a previous error")


def test_small_workloads_are_replayed_on_a_gpu_and_what_cant_be_captured_says_so(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [subject.inputs()]

    def captured(calls: Sequence[Callable[[], object]]) -> Sequence[Callable[[], object]]:
        assert not torch.is_grad_enabled()  # or what was compiled without gradients would be compiled again
        if calls[0].func is PEERS["naive"].attend:
            raise_at_its_end_as_well()
        return calls

    monkeypatch.setattr(measures, "captured", captured)
    gpu = on_a_gpu(subject, monkeypatch)
    names = {FORWARD: ["naive", "sdpa"]}
    monkeypatch.setattr(measures, "seconds_of", lambda call, device: 1.0)
    monkeypatch.setattr(profiling, "interleaved_times", lambda calls, repeats, device: {n: [1.0] for n in calls})
    found = list(measures.measure_time(gpu, sets, names, QUICK))
    assert [(each.measure, each.peer) for each in found if isinstance(each, Row)] == [
        ("time", "naive"), ("time", "sdpa"), ("replay", "sdpa")
    ]  # fmt: skip
    assert [(each.peer, each.step, each.reason) for each in found if isinstance(each, Left)] == [
        ("naive", "forward, replay", "RuntimeError: not while capturing")
    ]
    large = dataclasses.replace(gpu, workload=WORKLOADS["full-b16"])
    rows = list(measures.measure_time(large, sets, names, QUICK))
    assert {row.measure for row in rows if isinstance(row, Row)} == {"time"}


def test_step_that_no_peer_can_do_has_no_rows(subject: Subject) -> None:
    assert list(measures.measure_time(subject, [subject.inputs()], {FORWARD: []}, QUICK)) == []


def test_calls_take_the_inputs_in_turn() -> None:
    taken: list[str] = []
    for repeat in range(5):
        measures.in_turn([lambda: taken.append("a"), lambda: taken.append("b")], repeat)
    assert "".join(taken) == "ababa"


def test_forward_is_measured_without_gradients_and_both_with_all_six(subject: Subject) -> None:
    inputs = subject.inputs()
    assert not make_call(PEERS["naive"], FORWARD, inputs)().requires_grad
    gradients = make_call(PEERS["naive"], BOTH, inputs)()
    assert [each.shape for each in gradients] == [tensor.shape for tensor in inputs.differentiable().values()]


def test_peak_is_what_goes_beyond_output_and_gradients(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = subject.inputs()
    outputs = output_bytes(inputs)
    monkeypatch.setattr(profiling, "peak_bytes", lambda call, device: outputs + 5_000_000)
    rows = [row for row in measures.measure_memory(subject, inputs, ["naive"]) if isinstance(row, Row)]
    assert [row.value for row in rows if row.measure == "peak"] == [5.0]


# ------------------------------------------------------------------------------------------------------- parity gate


def wrong_in(name: str) -> Peer:
    """Naive with a gradient, or its output, a thousandth too large."""

    def attend(inputs: Inputs) -> Tensor:
        if name == "output":
            return peers.naive(inputs) * 1.001
        tensor = getattr(inputs, name)
        return peers.naive(dataclasses.replace(inputs, **{name: tensor + 1e-3 * (tensor - tensor.detach())}))

    return Peer("wrong", "", attend)


@pytest.mark.parametrize("name", ["output", "query", "key", "value", "center", "precision", "scale_weights"])
def test_gate_sees_an_error_in_the_output_and_in_each_gradient(subject: Subject, name: str) -> None:
    parity = Gate.of(subject, subject.inputs()).check(wrong_in(name), BOTH)
    assert not parity.within
    if name != "output":
        assert parity.worst.split(" ")[0] == name


def test_gate_passes_naive_and_ours_and_does_without_a_backward(subject: Subject) -> None:
    gated = Gate.of(subject, subject.inputs())
    assert all(gated.check(peer, step).within for peer in NAIVE_AND_OURS.values() for step in (FORWARD, BOTH))
    assert gated.check(wrong_in("key"), FORWARD).within
    assert not gated.check(wrong_in("output"), FORWARD).within


def test_gate_compares_some_heads_of_one_image_of_a_large_workload(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "ELEMENTS", {"cpu": 5 * 26})
    gated = Gate.of(subject, subject.inputs())
    assert gated.part.query.shape == (1, 1, 5, 16)
    assert torch.equal(gated.part.key, gated.inputs.key[gated.image : gated.image + 1, gated.heads])
    assert gated.check(PEERS["naive"], BOTH).within


def admitted(subject: Subject, *others: Peer, clock: Clock | None = None) -> tuple[dict[str, list[str]], Report]:
    subject = dataclasses.replace(subject, peers={**NAIVE_AND_OURS, **{peer.name: peer for peer in others}})
    report = report_of(subject)
    return gate.admit(subject, subject.inputs(), clock or Clock(60.0), report), report


def test_backend_of_ours_off_parity_is_not_measured_and_fails_the_run(subject: Subject) -> None:
    ours = dataclasses.replace(wrong_in("key"), name="sdpa", ours=True)
    names, report = admitted(subject, ours)
    assert names == {FORWARD: ["naive"], BOTH: ["naive"]}
    assert "PARITY FAILED: key" in report.not_measured[0].reason
    assert not report.as_json()["passed"]


def test_other_peer_off_parity_is_measured_and_its_error_published(subject: Subject) -> None:
    names, report = admitted(subject, wrong_in("key"))
    assert "wrong" in names[BOTH]
    (parity,) = (each for each in report.as_json()["parity"] if each["peer"] == "wrong")
    assert not parity["within"]
    assert parity["ratio"] > 1
    assert report.as_json()["passed"]


def test_peer_that_fails_says_why_and_the_others_go_on(subject: Subject) -> None:
    def fail(inputs: Inputs) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    names, report = admitted(subject, Peer("failing", "", fail))
    assert names == {FORWARD: ["naive", "sdpa"], BOTH: ["naive", "sdpa"]}
    assert [(left.peer, left.step, left.reason) for left in report.not_measured] == [
        ("failing", "", "RuntimeError: no kernel for this")
    ]


def test_peer_without_a_backward_is_measured_forward(subject: Subject) -> None:
    reason = "no backward here"
    peer = dataclasses.replace(
        PEERS["naive"], name="half", unsupported=lambda inputs, with_gradients: reason if with_gradients else None
    )
    names, report = admitted(subject, peer)
    assert "half" in names[FORWARD]
    assert "half" not in names[BOTH]
    assert [(left.peer, left.step, left.reason) for left in report.not_measured] == [("half", BOTH, reason)]


def test_compiling_takes_its_time_apart_and_only_while_that_lasts(subject: Subject) -> None:
    compiled = dataclasses.replace(PEERS["naive"], name="compiled", compiled=True)
    names, report = admitted(subject, compiled)
    assert "compiled" in names[BOTH]
    assert [(row.measure, row.step) for row in report.rows] == [("compile", BOTH), ("compile", FORWARD)]
    late = Clock(60.0)
    late.start -= 31.0
    names, report = admitted(subject, compiled, clock=late)
    assert "compiled" not in names[FORWARD]
    assert "time for that was up" in report.not_measured[0].reason


def test_compilers_find_nothing_of_an_earlier_run(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def admit(*rest: Any) -> dict[str, list[str]]:
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        assert list(folders[-1].iterdir()) == []
        return {FORWARD: [], BOTH: []}

    monkeypatch.setattr(bench_attention, "admit", admit)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    for _ in range(2):
        bench_attention.measure(subject, Clock(60.0), QUICK, report_of(subject))
    assert len(set(folders)) == 2
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


# ------------------------------------------------------------------------------------------------------------ a run


def arguments(**changed: Any) -> argparse.Namespace:
    given = dict.fromkeys(("workload", "dtype", "peer", "seconds", "json", "base", "render"))
    return argparse.Namespace(**(given | {"quick": True} | changed))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`smca bench` on a few cells, without bars that these could miss."""
    monkeypatch.setattr(bench_attention, "WORKLOADS", {FEW_CELLS.name: FEW_CELLS})
    monkeypatch.setattr(bench_attention, "COUNTED", (FEW_CELLS.name,))
    monkeypatch.setattr(bench_attention, "DEFAULT_WORKLOADS", {"cpu": (FEW_CELLS.name,)})
    monkeypatch.setattr(bench_attention, "QUICK_EFFORTS", {"cpu": QUICK})
    monkeypatch.setattr(records, "BARS", ())
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
    assert {left["peer"] for left in found["not_measured"]} == {"triton", "triton-all"}
    same, context = {"naive", "sdpa", "sdpa-mask", "sdpa-wide"}, {"plain-sdpa", "deformable"}
    keys = {(row["measure"], row["step"], row["peer"]) for row in found["rows"]}
    assert keys == {
        *(("time", step, peer) for step in (FORWARD, BOTH) for peer in same | context),
        *(("preparation", FORWARD, peer) for peer in ("sdpa-mask", "sdpa-wide")),
        *(("overhead", step, peer) for step in (FORWARD, BOTH) for peer in ("torch SDPA", "sdpa")),
        *(("saved", FORWARD, peer) for peer in same | {"inputs", "inputs + outputs of each scale"}),
        *(("peak", BOTH, peer) for peer in same),
        *(("computed", FORWARD, peer) for peer in ("triton", "triton-all")),
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

    def interrupted(subject: Subject, *rest: Any) -> None:
        if subject.workload is other:
            raise KeyboardInterrupt
        once(subject, *rest)

    monkeypatch.setattr(bench_attention, "measure", interrupted)
    path = tmp_path / "bench.json"
    report = Report({"device": "cpu"}, path)
    with pytest.raises(KeyboardInterrupt):
        bench_attention.measure_all([FEW_CELLS, other], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, 60.0)
    found = json.loads(path.read_text())
    assert not found["finished"]
    assert {row["workload"] for row in found["rows"]} == {"tiny", "few cells"}


def test_workload_that_fails_or_comes_too_late_is_told_and_the_run_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: Any) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(bench_attention, "measure", fail)
    for seconds, reason in ((60.0, "OutOfMemoryError: too large"), (0.0, "not begun after 0 s")):
        report = Report({"device": "cpu"})
        bench_attention.measure_all([FEW_CELLS], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, seconds)
        assert [(left.workload, left.reason) for left in report.not_measured] == [("few cells", reason)]
        assert report.finished


def test_overhead_that_cant_be_measured_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: Any) -> None:
        raise RuntimeError("no kernel for this dtype")

    monkeypatch.setattr(bench_attention, "measure_overhead", fail)
    report = Report({"device": "cpu"})
    bench_attention.measure_all([FEW_CELLS], ["float32"], NAIVE_AND_OURS, CPU, QUICK, report, 60.0)
    assert [(left.workload, left.reason) for left in report.not_measured] == [
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


def test_render_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "measure_all", None)
    path = tmp_path / "bench.json"
    Report({"device": "cpu"}, path).write()
    assert bench_attention.run(arguments(render=path)) == 0
    assert (tmp_path / "bench.md").exists()


def test_json_in_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--json must name a file in an existing folder"):
        bench_attention.run(arguments(json=tmp_path / "none" / "bench.json"))


class Benchmark:
    """What pytest-benchmark's fixture offers, calling once."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.seconds: float | None = None

    def __call__(self, call: Callable[[], float]) -> None:
        self.seconds = call()


def pytest_case(monkeypatch: pytest.MonkeyPatch, peer: Peer, step: str) -> Benchmark:
    """A case of `pytest benchmarks`, run on a few cells."""
    monkeypatch.setattr(pytest_cases, "WORKLOADS", {"few cells": FEW_CELLS})
    monkeypatch.setattr(pytest_cases, "PEERS", {peer.name: peer})
    pytest_cases.gate.cache_clear()
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


@pytest.mark.usefixtures("small")
def test_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--peer must be among naive, .*, got cuda"):
        bench_attention.run(arguments(peer=["cuda"]))


def test_small_shapes_refuse_to_run_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert small_shapes.main() == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_gpu_run_goes_on_after_failures_and_tells_each_step(tmp_path: Path) -> None:
    # An interpreter that answers every command but the look for pytest with an error.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *"import pytest"*) exit 0;; *) exit 3;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["all_passed"]
    steps = {step["step"]: step for step in summary["steps"]}
    names = {"env", *PARITY_STEPS, "tests", "memcheck", "racecheck", "bench", "bench-model", "profile"}
    assert set(steps) == names
    assert (steps["bench"]["status"], steps["bench"]["exit_code"]) == ("failed", 3)
    assert f"bench --seconds 170 --json {out}/bench.json" in (out / "bench.log").read_text()


def test_gpu_run_passes_when_every_step_does(tmp_path: Path) -> None:
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": path}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["all_passed"]
    assert {step["status"] for step in summary["steps"]} == {"passed"}


def test_gpu_run_fits_into_ten_minutes() -> None:
    """Its steps' limits, those between `&` and `wait` side by side."""
    total, together = 0, [0]
    for line in SCRIPT.read_text().split("\n"):
        found = re.match(r"\s*(?:smca|sanitize|step) \S+ (\d+)\b", line)
        if line.strip() == "wait":
            total, together = total + max(together), [0]
        elif found and line.rstrip().endswith("&"):
            together.append(int(found[1]))
        elif found:
            total += int(found[1])
    assert 400 < total <= 570  # and a step that has to be killed takes five seconds more


def test_gpu_run_without_a_folder_is_refused() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage" in done.stderr
