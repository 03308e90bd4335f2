"""`smca profile`: workloads, presets and weights; table, JSON, picture and trace; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from smca_benchmarks import workloads
from smca_benchmarks.workloads import Workload

from smca_kernels.tools import cli

FEW_CELLS = Workload("few cells", 2, ((4, 5), (2, 3)), queries=5, heads=2, head_dim=16)


@pytest.fixture(autouse=True)
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "few cells", FEW_CELLS)


def run(*options: str) -> int:
    return cli.main(["profile", "--repeats", "1", *options])


def report(tmp_path: Path, *options: str) -> dict[str, Any]:
    assert run(*options, "--json", str(tmp_path / "profile.json")) == 0
    return json.loads((tmp_path / "profile.json").read_text("utf-8"))


def test_a_workload_is_one_call_without_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(tmp_path, "--workload", "few cells")
    (call,) = found["calls"]
    assert (call["step"], call["batch"], call["queries"]) == ("forward", 2, 5)
    assert [(row["height"], row["width"]) for row in found["rows"]] == [(4, 5), (2, 3)]
    assert found["subject"]["workload"] == "few cells"
    assert {"torch", "name", "smca_kernels"} <= set(found["environment"])
    assert "4×5" in capsys.readouterr().out


def test_training_measures_the_backward_too(tmp_path: Path) -> None:
    found = report(tmp_path, "--workload", "few cells", "--training")
    assert found["calls"][0]["step"] == "forward + backward"


@pytest.mark.parametrize("options", [(), ("--training",)])
def test_a_detector_trains_only_if_it_is_to(monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    pytest.importorskip("torchvision")
    from smca_model import SMCA

    seen: set[tuple[bool, bool]] = set()
    forward = SMCA.forward

    def noted(model: SMCA, images: list[torch.Tensor]) -> dict[str, Any]:
        seen.add((model.training, torch.is_grad_enabled()))
        return forward(model, images)

    monkeypatch.setattr(SMCA, "forward", noted)
    assert run("--preset", "smca-tiny", *options) == 0
    assert seen == {(bool(options), bool(options))}


def test_the_backend_is_the_one_asked_for(tmp_path: Path) -> None:
    found = report(tmp_path, "--workload", "few cells", "--backend", "reference", "--dtype", "bfloat16")
    assert [(call["backend"], call["dtype"]) for call in found["calls"]] == [("reference", "bfloat16")]


def test_a_preset_with_an_image_has_a_call_a_decoder_layer(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from PIL import Image

    Image.new("RGB", (80, 60)).save(tmp_path / "image.png")
    found = report(
        tmp_path, "--preset", "smca-ms-tiny", "--image", str(tmp_path / "image.png"), "--backend", "reference"
    )
    assert [(call["call"], call["backend"]) for call in found["calls"]] == [(n, "reference") for n in (1, 2, 3)]
    # 60 × 80 pixels become 96 × 128, at strides 8, 16 and 32.
    assert [(row["height"], row["width"]) for row in found["rows"]] == 3 * [(12, 16), (6, 8), (3, 4)]


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("torchvision")
    from smca_model import build, weights

    model = build("smca-tiny", 2, decoder_layers=1)
    with torch.no_grad():
        model.decoder.layers[0].co_attn.prior.object_scale.bias.fill_(4.0)
    weights.save(model, tmp_path / "model.safetensors", ("a", "b"))
    (row,) = report(tmp_path, "--weights", str(tmp_path / "model.safetensors"))["rows"]
    assert row["sigma_median"] == pytest.approx((2 * 4.0**2 / 8) ** -0.5)


def test_trace_names_the_call_and_each_scale_on_its_own(tmp_path: Path) -> None:
    assert run("--workload", "few cells", "--trace", str(tmp_path / "trace.json")) == 0
    events = json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"]
    names = {event["name"] for event in events}
    assert "co-attention 1" in names
    assert {f"co-attention 1, forward, scale {s}" for s in ("1 (4x5)", "2 (2x3)")} <= names


def test_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("--workload", "few cells", "--picture", str(tmp_path / "bars.png")) == 0
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--workload", "no such"), "--workload must be one of "),
        (("--preset", "no such"), "preset must be one of"),
        (("--workload", "few cells", "--image", "image.png"), "--image must go with --preset or --weights"),
        (("--workload", "few cells", "--trace", "no/such/folder.json"), "--trace must name a file in an existing"),
        (("--workload", "few cells", "--repeats", "0"), "--repeats must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_told_in_a_line(
    options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    assert f"smca profile: error: {told}" in capsys.readouterr().err
