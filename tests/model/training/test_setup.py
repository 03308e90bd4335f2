"""The start of a run: what its backbone starts from, and its arithmetic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

from smca_model import weights
from smca_model.training import setup
from smca_model.training.settings import PRECISIONS, Settings

CPU = torch.device("cpu")
TINY = ("hidden_dim=32", "num_heads=2", "decoder_layers=2", "num_queries=10", "ffn_dim=64", "encoder=1intra")


@pytest.mark.parametrize("option", ["weights", "detr_weights"])
def test_a_start_from_detr_fetches_weights_of_a_backbone_that_detr_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    pytest.importorskip("timm")
    torch.save({"model": {"backbone.0.body.conv1.weight": torch.zeros(1)}}, tmp_path / "detr.pth")
    asked: list[tuple[str, bool]] = []
    real = setup.build

    def build(preset: str, *arguments: Any, pretrained_backbone: bool = False, **overrides: Any) -> Any:
        model = real(preset, *arguments, **overrides)
        asked.append((model.config.backbone, pretrained_backbone))
        return model

    monkeypatch.setattr(setup, "build", build)
    monkeypatch.setattr(weights, "start", lambda *_: "")
    monkeypatch.setattr(weights, "load_detr", lambda *_: "")
    for backbone in ("tiny", "resnet50", "timm/resnet18"):
        changes = (*TINY, f"backbone={backbone}", f"strides={[8] if backbone == 'tiny' else [32]}")
        chosen: dict[str, Any] = {"preset": "smca-tiny", "overrides": changes, option: str(tmp_path / "detr.pth")}
        setup.build_model(Settings(**chosen), 10, from_weights=True, device=CPU)
    assert [backbone for backbone, pretrained in asked if pretrained] == ["timm/resnet18"]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_and_convolutions_of_floats_may_be_tf32_where_the_precision_says_so(
    precision: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with setup.arithmetic(Settings(precision=precision), CPU):
        found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert found == (("high", True) if precision == "tf32" else ("highest", False))
    assert torch.backends.cudnn.allow_tf32 is before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("before", [None, ":16:8"])
def test_a_deterministic_run_leaves_the_environment_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    with setup.arithmetic(Settings(deterministic=True), CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[name] == (before or ":4096:8")
    assert os.environ.get(name) == before
    assert not torch.are_deterministic_algorithms_enabled()
