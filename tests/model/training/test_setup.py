"""The start of a run: what its backbone starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

from smca_model import weights
from smca_model.training import setup
from smca_model.training.settings import Settings

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
