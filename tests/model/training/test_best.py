"""The best weights of a run, patience, a frozen backbone, and who is told the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytest.importorskip("torchvision")

from small_disk import files_of_at_most

from smca_kernels.tools import cli
from smca_model import weights
from smca_model.training import checkpoint, engine
from smca_model.training.best import Best
from smca_model.training.engine import Trainer
from smca_model.training.loop import train
from smca_model.training.metrics import read_metrics
from smca_model.training.settings import Settings

TINY = ("hidden_dim=32", "num_heads=2", "decoder_layers=2", "num_queries=10", "ffn_dim=64", "encoder=1intra")


def settings(data: Path, out: Path, **changes: Any) -> Settings:
    """Epochs of one step."""
    fixed: dict[str, Any] = {"preset": "smca-tiny", "overrides": TINY, "sizes": (48,), "max_size": 96, "loggers": ()}
    fixed |= {"epochs": 5, "batch_size": 8, "log_every": 1, "workers": 0}
    return Settings(data=str(data), out=str(out), **fixed | changes)


@pytest.fixture
def give_ap(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the next evaluations come to the APs given, without looking at an image."""

    def give(*numbers: float) -> None:
        coming = iter(numbers)
        monkeypatch.setattr("smca_model.evaluate.detect_all", lambda *_, **__: ([], 0.0))
        monkeypatch.setattr(
            "smca_model.coco_results.measure", lambda *_: SimpleNamespace(numbers={"AP": next(coming), "AP50": 0.0})
        )

    return give


def best_of(run: Path) -> dict[str, float]:
    return weights.read_evaluation(run / "best.safetensors")


# ---------------------------------------------------------------------------------------------------------------- best


def test_the_best_weights_are_those_of_the_best_epoch(
    data: Path, tmp_path: Path, give_ap: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[torch.Tensor] = []
    update = Best.update

    def spy(self: Best, model: Any, *arguments: Any) -> None:
        queries.append(model.query_embed.weight.detach().clone())
        update(self, model, *arguments)

    monkeypatch.setattr(Best, "update", spy)
    give_ap(0.1, 0.3, 0.3, 0.2)
    train(settings(data, tmp_path, epochs=4, ema=0.5))
    assert best_of(tmp_path) == {"step": 2, "epoch": 2, "AP": 0.3}
    model = weights.load(tmp_path / "best.safetensors")
    assert torch.equal(model.query_embed.weight, queries[1])
    assert not torch.equal(model.query_embed.weight, queries[2])
    assert model.classes[7] == "seven"


def test_eval_and_detect_take_the_best_weights(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(data, tmp_path / "run", epochs=1))
    file = str(tmp_path / "run" / "best.safetensors")
    assert cli.main(["eval", "--weights", file, "--data", str(data), "--workers", "0"]) == 0
    image = next(path for path in (data / "val").iterdir() if path.suffix in (".png", ".jpg"))
    assert cli.main(["detect", str(image), "--weights", file, "--out", str(tmp_path / "found")]) == 0


def test_a_resumed_run_keeps_the_best_so_far(data: Path, tmp_path: Path, give_ap: Callable[..., None]) -> None:
    give_ap(0.1, 0.3)
    train(settings(data, tmp_path, epochs=2))
    give_ap(0.3, 0.2, 0.25)  # the evaluation at the checkpoint is repeated
    train(settings(data, tmp_path, epochs=4), resume=True)
    assert best_of(tmp_path) == {"step": 2, "epoch": 2, "AP": 0.3}
    give_ap(0.25, 0.28)
    train(settings(data, tmp_path, epochs=5), resume=True)
    assert best_of(tmp_path) == {"step": 2, "epoch": 2, "AP": 0.3}


def test_a_full_disk_keeps_the_best_before(
    data: Path, tmp_path: Path, give_ap: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Best.update

    def on_a_full_disk(self: Best, model: Any, classes: Any, evaluation: Any) -> None:
        with files_of_at_most(1000 if evaluation["epoch"] == 2 else 10**9):
            update(self, model, classes, evaluation)

    monkeypatch.setattr(Best, "update", on_a_full_disk)
    give_ap(0.1, 0.3)
    with pytest.raises(OSError, match=r"best\.safetensors"):
        train(settings(data, tmp_path))
    assert best_of(tmp_path) == {"step": 1, "epoch": 1, "AP": 0.1}
    weights.load(tmp_path / "best.safetensors")


def test_a_new_run_takes_no_notice_of_a_best_that_lies_there(
    data: Path, tmp_path: Path, give_ap: Callable[..., None]
) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"something else")
    give_ap(0.1)
    train(settings(data, tmp_path, epochs=1))
    assert best_of(tmp_path)["AP"] == 0.1
    (tmp_path / "best.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"path must be a file of weights, got .*best\.safetensors"):
        train(settings(data, tmp_path, epochs=2), resume=True)


def test_a_run_resumed_before_its_first_evaluation_has_no_best_of_a_run_before(
    data: Path, tmp_path: Path, give_ap: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_ap(0.9)
    train(settings(data, tmp_path, epochs=1))
    (tmp_path / "checkpoint.pt").unlink()

    def fail(*_: Any) -> Any:
        raise ValueError("loggers can't start")

    with monkeypatch.context() as patched:
        patched.setattr("smca_model.training.loop.open_loggers", fail)
        with pytest.raises(ValueError, match="can't start"):
            train(settings(data, tmp_path))
    assert best_of(tmp_path)["AP"] == 0.9
    assert (tmp_path / "model.safetensors").exists()

    step = Trainer.train_step

    def crash(self: Trainer, batches: Any) -> dict[str, float]:
        if self.step == 1:
            raise MemoryError
        return step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", crash)
        with pytest.raises(MemoryError):
            train(settings(data, tmp_path, epochs=2, eval_every=0))
    assert not (tmp_path / "model.safetensors").exists()
    give_ap(0.2)
    train(settings(data, tmp_path, epochs=2, eval_every=0), resume=True)
    assert best_of(tmp_path) == {"step": 2, "epoch": 2, "AP": 0.2}


@pytest.mark.parametrize("file", ["model.safetensors", "best.safetensors"])
def test_a_start_from_weights_that_the_run_replaces_is_refused(data: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(
        ValueError, match=rf"--weights must be a file that the run in --out does not replace, got .*{file}"
    ):
        train(settings(data, tmp_path / ".", weights=str(tmp_path / file)))
    assert (tmp_path / file).exists()


# ------------------------------------------------------------------------------------------------------------ patience


def test_a_run_ends_after_so_many_evaluations_without_a_better_ap(
    data: Path, tmp_path: Path, give_ap: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    give_ap(0.3, 0.1, 0.3)
    assert [line["AP"] for line in train(settings(data, tmp_path, patience=2))] == [0.3, 0.1, 0.3]
    told = "after epoch 3, no better AP than 0.300 of epoch 1 in 2 evaluations"
    assert f"the run ends {told}" in capsys.readouterr().out
    give_ap()  # what is resumed evaluates nothing, and writes nothing
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    assert f"has ended: {told}" in capsys.readouterr().out
    assert [line["AP"] for line in read_metrics(tmp_path) if "AP" in line] == [0.3, 0.1, 0.3]
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before
    give_ap(0.3, 0.4, 0.2)  # of epochs 3, 4 and 5
    evaluations = train(settings(data, tmp_path, patience=3), resume=True)
    assert [line["AP"] for line in evaluations] == [0.3, 0.1, 0.3, 0.4, 0.2]
    assert "ended" not in checkpoint.load(tmp_path / "checkpoint.pt")


def test_patience_counts_over_a_stop(data: Path, tmp_path: Path, give_ap: Callable[..., None]) -> None:
    give_ap(0.3, 0.1, 0.1)
    train(settings(data, tmp_path, epochs=3))
    give_ap(0.1, 0.1)
    assert len(train(settings(data, tmp_path, patience=3), resume=True)) == 4


# ----------------------------------------------------------------------------------------------------- frozen backbone


def test_a_frozen_backbone_is_not_trained_and_stays_frozen(
    data: Path, tmp_path: Path, give_ap: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    step = Trainer.train_step

    def spy(self: Trainer, batches: Any) -> dict[str, float]:
        backbone = self.model.backbone
        hook = backbone.register_forward_hook(lambda _, __, maps: kept.append(maps[8].requires_grad))
        found = step(self, batches)
        hook.remove()
        optimised = {id(each) for group in self.optimizer.param_groups for each in group["params"]}
        assert not any(id(each) in optimised or each.grad is not None for each in backbone.parameters())
        assert not backbone.training
        assert optimised == {id(each) for each in self.model.parameters()} - {id(e) for e in backbone.parameters()}
        return found

    monkeypatch.setattr(Trainer, "train_step", spy)
    give_ap(0.1)
    train(settings(data, tmp_path, epochs=1, freeze_backbone=True, weight_decay=0.1, lr=0.1))
    before = weights.load(tmp_path / "model.safetensors").state_dict()
    give_ap(0.1, 0.1)
    assert cli.main(["train", "--resume", str(tmp_path), "--epochs", "2"]) == 0
    after = weights.load(tmp_path / "model.safetensors").state_dict()
    assert kept == [False, False]  # autograd has nothing of the backbone's
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    assert not torch.equal(before["query_embed.weight"], after["query_embed.weight"])


def test_a_frozen_backbone_leaves_autograd_less_to_keep() -> None:
    from smca_model import build

    def saved_bytes(freeze: bool) -> int:
        model = build("smca-tiny", 5).requires_grad_(True)
        Trainer(model, Settings(preset="smca-tiny", freeze_backbone=freeze), 1)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model([torch.randn(3, 128, 128)])
        return sum(sizes.values())

    # The first map of the backbone alone has 32 channels of 64 × 64 floats.
    assert saved_bytes(False) - saved_bytes(True) > 32 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_backbone": True, "lr_backbone": 1e-4}, "lr_backbone can't be given with freeze_backbone, got 0.0001"),
        ({"patience": 1, "eval_every": 0}, "patience counts evaluations, of which eval_every=0 has one, got 1"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        (
            {"loggers": ("wandb", "wandb")},
            "loggers must be among tensorboard, wandb, mlflow, each once, got wandb wandb",
        ),
        ({"loggers": ("comet",)}, "loggers must be one of .*, got 'comet'"),
    ],
)
def test_settings_that_dont_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(Path("data"), Path("out"), **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loggers", "wandb"], "loggers with wandb needs wandb: pip install wandb"),
        (["--loggers", "tensorboard"], "needs tensorboard: pip install 'smca_kernels[model]'"),
        (["--overrides", "backbone=timm/resnet18"], "needs timm: pip install 'smca_kernels[timm]'"),
    ],
)
def test_missing_packages_are_told_before_data_is_opened(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    missing = ("wandb", "timm", "tensorboard")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else real(name))
    rest = [] if "--loggers" in options else ["--loggers"]
    assert cli.main(["train", "--data", "missing", "--out", "missing", *options, *rest]) == 2
    assert f"smca train: error: {message}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- loggers


class Recording:
    """A logger that loses its network at a step."""

    def __init__(self, fails_at: int = 0) -> None:
        self.told: list[tuple[int, str]] = []
        self.fails_at = fails_at

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("gone")
        self.told += [(step, name) for name in metrics if name in ("train/loss", "val/AP")]

    def close(self) -> None:
        self.told.append((0, "closed"))


def test_loggers_of_your_own_are_told_everything_and_end_no_run(
    data: Path, tmp_path: Path, give_ap: Callable[..., None]
) -> None:
    give_ap(0.1, 0.2)
    mine, weak = Recording(), Recording(fails_at=1)
    assert len(train(settings(data, tmp_path, epochs=2), loggers={"mine": mine, "weak": weak})) == 2
    assert mine.told == [(1, "train/loss"), (1, "val/AP"), (2, "train/loss"), (2, "val/AP"), (0, "closed")]
    assert weak.told == [(2, "train/loss"), (2, "val/AP"), (0, "closed")]
    assert not (tmp_path / "tensorboard").exists()


def test_loggers_are_told_what_ended_a_run_before_its_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Recording):
        def fail(self, error: BaseException) -> None:
            self.told.append((0, type(error).__name__))

    def train_step(self: engine.Trainer, batches: Any) -> dict[str, float]:
        raise engine.TrainingError("step 0: the loss giou is nan")

    monkeypatch.setattr(engine.Trainer, "train_step", train_step)
    mine = Told()
    with pytest.raises(engine.TrainingError):
        train(settings(data, tmp_path), loggers={"mine": mine})
    assert mine.told == [(0, "TrainingError")]


def test_process_0_alone_logs(
    data: Path, tmp_path: Path, give_ap: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(engine, "batches", lambda length, *_: [list(range(length))])
    give_ap()
    mine = Recording()
    assert train(settings(data, tmp_path / "run", epochs=1, loggers=("tensorboard",)), loggers={"mine": mine}) == []
    assert mine.told == []
    assert not (tmp_path / "run").exists()
