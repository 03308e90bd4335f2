"""`smca train --dry-run`: what a run will take, and that it can't be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from smca_kernels.tools import cli
from smca_model.training import distributed, dry_run
from smca_model.training.engine import Trainer
from smca_model.training.settings import Settings

TINY = ("hidden_dim=32", "num_heads=2", "decoder_layers=2", "num_queries=10", "ffn_dim=64")


def command(data: Path, *more: str) -> list[str]:
    options = ["--preset", "smca-tiny", "--overrides", *TINY, "--sizes", "48", "--max-size", "96", "--workers", "0"]
    return ["train", "--dry-run", "--data", str(data), *options, "--loggers", *more]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little for a batch of the largest images."""
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        if batches[0][1][0]["image_id"] == "largest":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_a_dry_run_reports_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(data, "--epochs", "7")) == 0
    told = capsys.readouterr().out
    assert "28 steps: " in told
    assert " s a step, " in told
    assert "peak memory " in told
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_memory")
def test_a_batch_of_the_largest_images_that_does_not_fit_is_told_with_what_was_measured(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(data)) == 0
    told = capsys.readouterr().out
    assert " s a step, " in told
    assert "but a batch of the largest images does not fit" in told


@pytest.mark.usefixtures("small_memory")
def test_of_several_processes_none_goes_on_that_others_may_wait_for(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = distributed.world_size
    trained = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        try:
            return trained(self, batches)
        except torch.OutOfMemoryError:
            monkeypatch.setattr(distributed, "world_size", lambda: 2)
            raise

    monkeypatch.setattr(Trainer, "train_step", train_step)
    chosen = Settings(data=str(data), preset="smca-tiny", overrides=TINY, sizes=(48,), max_size=96, workers=0)
    with pytest.raises(torch.OutOfMemoryError):
        dry_run.dry_run(chosen)
    monkeypatch.setattr(distributed, "world_size", real)
    assert "does not fit" in capsys.readouterr().out


def test_a_step_that_is_not_finite_ends_with_status_1(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(data, "--lr", "1e30", "--clip", "1e30")) == 1
    assert "smca train: step 1: the class head of decoder layer 1 gives values that are not" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--weights", "--detr-weights"])
def test_weights_that_are_not_there_are_refused(option: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(data, option, "nothere")) == 2
    assert f"{option} must be a file, got nothere" in capsys.readouterr().err
