"""The backbone that small detectors start from: its labels, its file, and that a run takes it over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

for package in ("pycocotools", "safetensors", "skimage", "sklearn", "torchvision"):
    pytest.importorskip(package)

from smca_model import weights  # noqa: E402
from smca_model.backbone import build_backbone  # noqa: E402
from smca_model.demo import pretraining  # noqa: E402
from smca_model.demo.ablations import write_start  # noqa: E402
from smca_model.training.settings import Settings  # noqa: E402
from smca_model.training.setup import build_model  # noqa: E402


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Settings:
    start = str(tmp_path / "start.safetensors")
    return Settings(data=str(data), preset="smca-tiny", weights=start, sizes=(48,), max_size=96, flip=False, crop=False)


def test_a_cell_has_the_label_of_the_box_over_its_centre() -> None:
    boxes = torch.tensor([[0.375, 0.25, 0.75, 0.5], [0.875, 0.875, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    found = pretraining.cell_labels(boxes, torch.tensor([3, 7, 5]), 4, nothing=9)
    assert found.tolist() == [[3, 3, 3, 9], [3, 3, 3, 9], [9, 9, 9, 9], [9, 9, 9, 7]]


def test_the_last_of_two_boxes_over_a_cell_counts() -> None:
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]])
    found = pretraining.cell_labels(boxes, torch.tensor([1, 2]), 2, nothing=9)
    assert found.tolist() == [[2, 1], [1, 1]]


def test_the_backbone_learns_scenes_by_heart(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train_alone").mkdir()
    for name in ("train", "val"):  # held out are the scenes that it is trained on
        (tmp_path / "train_alone" / name).symlink_to(data / "train")
    (tmp_path / "train_alone" / "annotations").mkdir()
    for name in ("train", "val"):
        (tmp_path / "train_alone" / "annotations" / f"{name}.json").symlink_to(data / "annotations" / "train.json")
    monkeypatch.setattr(pretraining, "EPOCHS", 25)
    right = pretraining.pretrain_backbone(
        replace(settings, data=str(tmp_path / "train_alone")), tmp_path / "backbone.pt"
    )
    assert right > 0.9  # of 11 labels; it has seen each scene 25 times


def test_a_run_starts_with_that_backbone_and_weights_of_its_seed(settings: Settings, tmp_path: Path) -> None:
    taught = build_backbone("tiny", (8,))
    torch.save(taught.state_dict(), tmp_path / "backbone.pt")
    write_start(settings, tmp_path / "backbone.pt")
    start = weights.load(settings.weights).state_dict()
    fresh = build_model(settings, 10, from_weights=False, device=torch.device("cpu")).state_dict()
    for name, tensor in start.items():
        expected = taught.state_dict()[name.removeprefix("backbone.")] if name.startswith("backbone.") else fresh[name]
        assert torch.equal(tensor, expected), name
