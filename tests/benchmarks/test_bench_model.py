"""`smca bench-model`: its rows, the batch that it finds, and the errors that stop it, on a detector of few weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import CPU

pytest.importorskip("scipy")
pytest.importorskip("torchvision")

from smca_benchmarks import bench_model
from smca_benchmarks.bench_model import FUSED, NAIVE, DetectorCase, Repeats, Row

from smca_kernels.profiling import measure as profiling
from smca_kernels.profiling.recorder import Profile
from smca_kernels.tools import cli
from smca_model import presets

REPEATS = Repeats(step=2, image=2, operator=1, search=False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `smca-tiny` smaller, and a measurement as short as can be."""
    config = dataclasses.replace(
        presets.PRESETS["smca-tiny"], hidden_dim=32, num_heads=2, ffn_dim=32, decoder_layers=2, num_queries=10
    )
    monkeypatch.setitem(presets.PRESETS, "smca-tiny", config)
    monkeypatch.setitem(bench_model.REPEATS, "cpu", REPEATS)


def detector_case(precision: str = "fp32") -> DetectorCase:
    return DetectorCase("smca-tiny", precision, (40, 48), 2, CPU)


@pytest.fixture
def no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.profiler takes seconds to say what a step allocates."""
    monkeypatch.setattr(profiling, "peak_bytes", lambda call, device: (call(), 3_000_000)[1])


def test_a_step_trains_every_parameter_and_leaves_the_weights_as_they_are() -> None:
    case = detector_case()
    before = [parameter.detach().clone() for parameter in case.trainer.model.parameters()]
    case.step(FUSED)
    parameters = list(case.trainer.model.parameters())
    assert all(parameter.grad is not None for parameter in parameters if parameter.requires_grad)
    assert all(map(torch.equal, before, parameters))


@pytest.mark.usefixtures("no_profiler")
def test_naive_and_fused_give_a_row_each_whose_share_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[str] = []
    calls = Profile.calls
    monkeypatch.setattr(
        Profile, "calls", lambda self: [dataclasses.replace(call, milliseconds=0.25) for call in calls(self)]
    )
    case = detector_case()
    case.trainer.model.register_forward_hook(lambda model, *_: backends.append(model.backend))
    naive, fused = bench_model.measure(case, REPEATS)
    assert isinstance(naive, Row)
    assert isinstance(fused, Row)
    assert (naive.co_attention, naive.backend) == (NAIVE, "reference")
    assert (fused.co_attention, fused.backend) == (FUSED, "sdpa")
    assert set(backends) == {"reference", "auto"}
    for row in (naive, fused):
        assert (row.height, row.width, row.batch) == (40, 48, 2)
        assert row.operator_ms == 0.5  # of two decoder layers
        assert row.share == pytest.approx(0.5 / row.step.median)
        assert row.speedup == pytest.approx(naive.step.median / row.step.median)
        assert row.step_peak_mb == 3.0
        assert row.largest_batch is None


def test_nothing_is_measured_where_parity_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "check_parity", lambda profile, precision: ["output: error 1 is 9 × the budget"])
    (line,) = bench_model.measure(detector_case(), REPEATS)
    assert line == "parity failed, not measured: output: error 1 is 9 × the budget"


def test_parity_is_that_of_the_operator_at_the_models_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from smca_kernels import profile
    from smca_kernels.testing import check as checks
    from smca_kernels.testing.budget import Comparison
    from smca_kernels.testing.cases import CaseInputs

    checked: list[Any] = []
    real = checks.check

    def check(inputs: CaseInputs, backend: str) -> list[Comparison]:
        checked.append((inputs, backend))
        return real(inputs, backend)

    monkeypatch.setattr(checks, "check", check)
    case = detector_case()
    with profile(1) as measured:
        case.step(FUSED)
    assert bench_model.check_parity(measured, "fp32") == []
    ((inputs, backend),) = checked
    assert backend == "sdpa"
    assert inputs.query.shape == (2, 2, 10, 16)
    assert inputs.spatial_shapes == ((5, 6),)


@pytest.mark.parametrize("fitting", range(13))
def test_largest_batch_is_found_in_few_trials(fitting: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= fitting

    assert bench_model.largest_batch(fits, limit=11) == min(fitting, 11)
    assert len(tried) == len(set(tried)) <= 7
    assert max(tried) <= 11


def test_a_step_beyond_memory_does_not_fit_and_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    case = detector_case()
    assert case.fits(FUSED, 1)
    weight = case.trainer.model.query_embed.weight

    def out_of_memory(micro_batches: Any) -> None:
        assert [len(part) for part in micro_batches[0]] == [3, 3]
        weight.grad = torch.zeros_like(weight)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(case.trainer, "train_step", out_of_memory)
    assert not case.fits(FUSED, 3)
    assert weight.grad is None


@pytest.mark.usefixtures("no_profiler")
def test_table_and_json_agree_and_name_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["smca-tiny", "--size", "32", "32", "--batch-size", "1", "--json", str(tmp_path / "model.json")]
    assert cli.main(["bench-model", *options]) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "model.json").read_text("utf-8"))
    lines = [line.split(" | ") for line in printed.out.splitlines() if line.startswith("| smca-tiny")]
    for row, cells in zip(found["rows"], lines, strict=True):
        assert cells[1] == f"{row['co_attention']} ({row['backend']})"
        assert cells[2].startswith(f"{row['step']['median']:.1f} (")
        assert cells[7] == "not measured"
    assert "The largest batch was not measured: there is no GPU." in printed.out
    assert "smca-tiny: 2 steps of each" in printed.err
    assert found["environment"]["device"] == "cpu"
    assert found["failures"] == {}


def test_a_preset_that_does_not_fit_is_reported_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(case: DetectorCase, repeats: Repeats) -> Any:
        if case.preset == "smca-tiny":
            raise torch.OutOfMemoryError("CUDA out of memory.\nlong advice")
        yield "parity failed"

    monkeypatch.setattr(bench_model, "measure", measure)
    assert cli.main(["bench-model", "smca-tiny", "detr-tiny", "--size", "32", "32"]) == 1
    printed = capsys.readouterr().out
    assert "smca-tiny: not measured: CUDA out of memory.\n" in printed
    assert "detr-tiny: parity failed\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no-such"], "PRESET must be among detr-r50"),
        (["--batch-size", "0"], "--batch-size and --size must be at least 1, got 0 and None"),
        (["--json", "no/such/folder.json"], "--json must name a file in an existing folder"),
    ],
)
def test_wrong_options_are_reported_in_a_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench-model", *options]) == 2
    assert f"smca bench-model: error: {message}" in capsys.readouterr().err


def test_every_default_preset_is_one_and_dc5_is_among_those_of_a_gpu() -> None:
    chosen = [presets.PRESETS[name] for names in bench_model.PRESETS.values() for name in names]
    assert any(config.dilation for config in chosen)
    assert {"detr-r50", "smca-r50", "smca-ms-r50"} <= set(bench_model.PRESETS["cuda"])
