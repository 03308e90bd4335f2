"""`smca train`: a run from its settings to its folder, stopped, resumed, and refused."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
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
from smca_model.training import checkpoint, distributed, setup
from smca_model.training.engine import Trainer, TrainingError
from smca_model.training.loop import train
from smca_model.training.metrics import read_metrics
from smca_model.training.settings import Settings
from smca_model.training.signals import Stopped

ROOT = Path(__file__).parents[2]
SIZE = 48
TINY = ("hidden_dim=32", "num_heads=2", "decoder_layers=2", "num_queries=10", "ffn_dim=64", "dropout=0.1")


def settings(data: Path, out: Path, **changes: Any) -> Settings:
    """Two epochs of four steps."""
    fixed: dict[str, Any] = {"preset": "smca-tiny", "overrides": TINY, "sizes": (40, SIZE), "max_size": 2 * SIZE}
    fixed |= {"epochs": 2, "lr_drop": 1, "log_every": 1, "workers": 0}
    return Settings(data=str(data), out=str(out), **fixed | changes)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Sends this process a signal while that step (counted from 0) runs."""
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        if self.step == step:
            monkeypatch.setattr(Trainer, "train_step", real)
            os.kill(os.getpid(), number)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def state_of(run: Path) -> dict[str, Any]:
    return checkpoint.load(run / "checkpoint.pt")


def assert_same_state(one: Any, other: Any) -> None:
    """Bit for bit, through dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "cpu_seconds", "settings"}:
            assert_same_state(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same_state(first, second)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# ---------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(settings(data, folder, ema=0.9))
    return folder


def test_a_run_leaves_weights_that_load_alone(run: Path) -> None:
    model = weights.load(run / "model.safetensors")
    assert model.config.hidden_dim == 32
    assert model.classes[7] == "seven"
    assert model.image_size == (SIZE, 2 * SIZE)


def test_the_weights_for_use_are_those_of_the_moving_average(run: Path) -> None:
    average = state_of(run)["ema"]["module.class_embed.weight"]
    assert torch.equal(weights.load(run / "model.safetensors").class_embed.weight, average)


def test_metrics_have_a_line_a_step_and_one_an_evaluation(run: Path) -> None:
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "AP" not in line] == list(range(1, 9))
    assert [line["epoch"] for line in lines if "AP" in line] == [1, 2]
    parts = [value for name, value in lines[0].items() if name.startswith("loss_")]
    assert len(parts) == 6
    assert lines[0]["loss"] == pytest.approx(sum(parts))
    assert lines[0]["lr"] == pytest.approx(1e-4)
    assert lines[-2]["lr"] == pytest.approx(1e-5)
    assert lines[-2]["seconds"] == pytest.approx(sum(line["seconds_per_step"] for line in lines if "loss" in line))


def test_tensorboard_has_the_same_numbers(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [event.step for event in events.Scalars("val/AP")] == [4, 8]


def test_a_folder_that_holds_a_run_is_not_written_over(run: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=f"{run} holds one; go on with --resume"):
        train(settings(data, run))


def test_evaluation_is_every_so_many_epochs_and_after_the_last(data: Path, tmp_path: Path) -> None:
    train(settings(data, tmp_path / "run", epochs=3, eval_every=2, batch_size=8))
    assert [line["epoch"] for line in read_metrics(tmp_path / "run") if "AP" in line] == [2, 3]


# ------------------------------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_stopped_anywhere_and_resumed_ends_as_the_uninterrupted_one(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    chosen = settings(data, tmp_path / "run", ema=0.9)
    stop_at(monkeypatch, step)
    with pytest.raises(Stopped):
        train(chosen)
    assert state_of(tmp_path / "run")["step"] == step + 1
    torch.rand(5)
    evaluations = train(chosen, resume=True)
    assert_same_state(state_of(tmp_path / "run"), state_of(run))
    assert [line["epoch"] for line in evaluations] == [1, 2]
    curves = [[line["loss"] for line in read_metrics(each) if "loss" in line] for each in (tmp_path / "run", run)]
    assert curves[0] == curves[1]


def test_workers_change_nothing(run: Path, data: Path, tmp_path: Path) -> None:
    train(settings(data, tmp_path / "run", ema=0.9, workers=1, eval_every=0))
    assert_same_state(state_of(tmp_path / "run"), state_of(run))


def test_after_a_crash_the_lines_of_repeated_steps_are_there_once(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(data, tmp_path / "run", ema=0.9)
    real = Trainer.train_step

    def crash(self: Trainer, batches: Any) -> dict[str, float]:
        if self.step == 6:
            raise MemoryError
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", crash)
    with pytest.raises(MemoryError):
        train(chosen)
    monkeypatch.setattr(Trainer, "train_step", real)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(chosen, resume=True)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "AP" in line] == [4, 8]
    assert_same_state(state_of(tmp_path / "run"), state_of(run))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_processes_that_load_images_too_saves_and_stops(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # As Ctrl-C, torchrun and schedulers send it: from elsewhere.
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        for worker in multiprocessing.active_children():
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
            time.sleep(0.5)  # no join, which would keep the end of a process from whom it concerns
        os.kill(os.getpid(), number)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(Stopped):
        train(settings(data, tmp_path / "run", workers=1))
    assert state_of(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_on_a_signal_saves_and_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    out = tmp_path / "run"
    stop_at(monkeypatch, 1, number)
    command = ["train", "--data", str(data), "--out", str(out), "--preset", "smca-tiny", "--overrides", *TINY]
    command += ["--sizes", "48", "--max-size", "96", "--epochs", "2", "--lr-drop", "1", "--workers", "0"]
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main(command) == 128 + number
    told = capsys.readouterr()
    assert f"go on with  smca train --resume {out}" in told.err
    assert f"numbers go to {out / 'metrics.jsonl'}, tensorboard ({out / 'tensorboard'})" in told.out
    assert state_of(out)["step"] == 2
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert cli.main(["train", "--resume", str(out), "--epochs", "1"]) == 0
    assert state_of(out)["step"] == 4


@pytest.mark.parametrize("place", ["open_data", "build_model"])
def test_a_signal_before_the_first_step_stops_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def send(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # where Python acts on it at the latest
        raise AssertionError("it went on")

    monkeypatch.setattr(f"smca_model.training.loop.{place}", send)
    with pytest.raises(Stopped):
        train(settings(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_checkpoint_of_an_epoch_is_written_leaves_out_the_evaluation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save

    def save(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr("smca_model.evaluate.detect_all", lambda *_, **__: pytest.fail("it evaluates"))
    with pytest.raises(Stopped):
        train(settings(data, tmp_path / "run"))
    assert state_of(tmp_path / "run")["step"] == 4


def test_fewer_epochs_than_are_done_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    stop_at(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(settings(data, out, epochs=3, eval_every=0))
    assert cli.main(["train", "--resume", str(out), "--epochs", "1"]) == 2
    assert f"epochs must be at least the 1.25 that {out / 'checkpoint.pt'} has done, got 1" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


def test_what_a_run_was_made_with_cant_change_under_it(run: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size 2 there, 4 here; seed 0 there, 1 here"):
        train(settings(data, run, ema=0.9, batch_size=4, seed=1), resume=True)


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert f"there is no file {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"colour": "red"}}, "settings can't be used .*colour"),
        ({"settings": {"epochs": 0}}, "settings can't be used .epochs must be at least 1"),
        ({"facts": {}}, "it lacks classes, images, step_images"),
        ({"step": None}, "its step must be a int"),
        ({"model": {}}, "does not fit the run that it is of"),
        ({"optimizer": {}}, "does not fit the run that it is of"),
        ({"scaler": 3}, "its scaler must be a dict, got int"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_its_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    state = state_of(run)
    if changes.get("settings"):
        changes = {"settings": state["settings"] | changes["settings"]}
    checkpoint.save(tmp_path / "checkpoint.pt", state | changes)
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert re.search(f"smca train: error: {re.escape(str(tmp_path))}/checkpoint.pt .*{message}", told)


def test_a_run_that_began_before_a_setting_was_there_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    state = state_of(run)
    del state["settings"]["weights"]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert train(settings(data, tmp_path, ema=0.9), resume=True)[-1]["epoch"] == 2


def test_damaged_metrics_are_refused_by_their_path_before_anything_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", state_of(run))
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1}\n')
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert f"{tmp_path / 'metrics.jsonl'}, line 1: must be a JSON object" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]


# -------------------------------------------------------------------------------------------------- settings and errors


@pytest.mark.parametrize("override", ["num_classes=2", "backend=sdpa", "preset=detr-tiny", "pretrained_backbone=true"])
def test_overrides_that_have_an_option_are_refused_before_data_is_opened(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data", "missing", "--out", "missing", "--overrides", override]) == 2
    assert f"smca train: error: overrides can't set {override.split('=')[0]}" in capsys.readouterr().err


def test_a_step_larger_than_the_data_is_refused_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a step of at most the 8 training images, got a step of 12"):
        train(settings(data, tmp_path / "run", batch_size=4, accumulate=3))
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_folder_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="out must be a folder for the run, got ''"):
        train(Settings(data=str(data)))


def test_a_folder_that_cant_be_made_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out must be a folder that can be made, got .*file/run"):
        train(settings(data, tmp_path / "file" / "run"))
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match=r"out must be a folder that can be made, got .*circle"):
        train(settings(data, tmp_path / "circle"))


def test_a_run_goes_on_in_its_own_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(run), "--out", str(tmp_path)]) == 2
    assert "--out can't be given with --resume" in capsys.readouterr().err


def test_missing_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    assert "--data and --out must be given" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_command_with_status_1(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        raise TrainingError("step 0: the loss giou is nan")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    command = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--preset", "smca-tiny"]
    assert cli.main([*command, "--sizes", "48", "--max-size", "96", "--workers", "0"]) == 1
    assert "smca train: step 0: the loss giou is nan" in capsys.readouterr().err


def test_a_full_disk_ends_the_command_with_the_file_s_name_and_the_last_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stop_at(monkeypatch, 0)
    with pytest.raises(Stopped):
        train(settings(data, out))
    names = sorted(path.name for path in out.iterdir())
    with files_of_at_most((out / "checkpoint.pt").stat().st_size // 2):
        assert cli.main(["train", "--resume", str(out)]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert told == [f"smca train: error: {out / 'checkpoint.pt'}: File too large"]
    assert state_of(out)["step"] == 1
    assert sorted(path.name for path in out.iterdir()) == names
    assert cli.main(["train", "--resume", str(out), "--epochs", "1"]) == 0
    assert state_of(out)["step"] == 4


def test_pretrained_weights_are_the_default_where_the_backbone_has_any(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    asked: list[tuple[str, bool]] = []
    real = setup.build

    def build(preset: str, *arguments: Any, pretrained_backbone: bool = False, **overrides: Any) -> Any:
        asked.append((preset, pretrained_backbone))
        return real(preset, *arguments, **overrides)

    monkeypatch.setattr(setup, "build", build)
    for preset in ("smca-tiny", "smca-r50"):
        chosen = Settings(data=str(data), preset=preset)
        for from_weights in (True, False):
            setup.build_model(chosen, 10, from_weights=from_weights, device=torch.device("cpu"))
    assert [preset for preset, pretrained in asked if pretrained] == ["smca-r50"]


def test_every_command_imports_and_trains_without_the_modules_of_unix(data: Path, tmp_path: Path) -> None:
    command = ["train", "--data", str(data), "--preset", "smca-tiny", "--overrides", *TINY, "--sizes", "48"]
    command += ["--max-size", "96", "--epochs", "1", "--workers", "0"]
    program = (
        "import sys\n"
        "from importlib import import_module\n"
        "import torch, torch.utils.tensorboard\n"  # what they need is theirs to find
        "sys.modules['resource'] = sys.modules['fcntl'] = sys.modules['pwd'] = sys.modules['termios'] = None\n"
        "from smca_kernels.tools.cli import COMMANDS, main\n"
        "for module, _ in COMMANDS.values(): import_module(module)\n"
        f"assert main({[*command, '--dry-run']!r}) == 0\n"
        f"assert main({[*command, '--out', str(tmp_path / 'run')]!r}) == 0\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "peak memory is not known on this system" in ended.stdout


@pytest.mark.parametrize("start", ["from smca_kernels.tools.cli import main; main(['train', *sys.argv[1:]])", ""])
def test_a_run_goes_to_its_end_where_the_output_has_no_multiplication_sign(
    data: Path, tmp_path: Path, start: str
) -> None:
    command = ["-c", f"import sys; {start}"] if start else ["-m", "smca_model.train"]
    command += ["--data", str(data), "--out", str(tmp_path / "run"), "--preset", "smca-tiny", "--overrides", *TINY]
    command += ["--sizes", "48", "--max-size", "96", "--epochs", "1", "--workers", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1251:strict", "PYTHONUTF8": "0"}
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert b"trained parameters, on 1 ? " in ended.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_starts_from_weights_of_a_run_with_other_classes(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    for file in (other / "annotations").glob("*.json"):
        file.write_text(file.read_text().replace('"seven"', '"VII"'))
    command = ["train", "--data", str(other), "--preset", "smca-tiny", "--overrides", *TINY, "--sizes", "48"]
    command += ["--max-size", "96", "--epochs", "1", "--workers", "0", "--lr", "0", "--lr-backbone", "0"]
    source = run / "model.safetensors"
    assert cli.main([*command, "--out", str(tmp_path / "run"), "--weights", str(source)]) == 0
    out = capsys.readouterr().out
    assert f"starts from weights of smca_model in {source}: " in out
    assert "the class layer is made anew: VII is not among the 10 classes there" in out
    before, after = weights.load(source), weights.load(tmp_path / "run" / "model.safetensors")
    assert torch.equal(before.query_embed.weight, after.query_embed.weight)
    assert not torch.equal(before.class_embed.weight, after.class_embed.weight)
    assert after.classes[7] == "VII"
    source = tmp_path / "run" / "model.safetensors"
    assert cli.main([*command, "--out", str(tmp_path / "again"), "--detr-weights", str(source)]) == 2
    assert "--weights starts from" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("option", ["--weights", "--detr-weights"])
def test_weights_that_are_not_there_are_refused_before_data_is_opened(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "missing.pth")
    assert cli.main(["train", "--data", "missing", "--out", str(tmp_path / "run"), option, file]) == 2
    assert f"smca train: error: {option} must be a file, got {file}" in capsys.readouterr().err


def test_a_build_of_torch_without_process_groups_trains_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.summed([1.0], torch.device("cpu")) == [1.0]


def test_every_setting_is_an_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in told
    assert "the largest for evaluation; default: 480 512 544" in told
