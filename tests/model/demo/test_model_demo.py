"""`smca demo`, the detector's part: what it leaves behind, and that it leaves nothing half done."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from smca_model.demo.command import PACKAGES

for package in PACKAGES:
    pytest.importorskip(package)

from smca_kernels.tools import cli  # noqa: E402
from smca_model.demo import learning, photographs  # noqa: E402
from smca_model.presets import build  # noqa: E402
from smca_model.training import loop  # noqa: E402
from smca_model.training.engine import Trainer  # noqa: E402
from smca_model.training.settings import Settings  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on a handful of scenes, after an operator's part that does nothing."""
    monkeypatch.setattr(learning, "TRAIN_SCENES", 8)
    monkeypatch.setattr(learning, "VAL_SCENES", 3)
    monkeypatch.setattr(learning, "WITH_ATTENTION", 1)
    monkeypatch.setattr(learning, "SCORE", 0.0)
    training = {"batch_size": 4, "epochs": 1, "lr_drop": 1, "lr": 1e-4}
    monkeypatch.setattr(learning, "TRAINING", {"cpu": training, "cuda": training})
    monkeypatch.setattr(photographs, "run_layer", lambda out: 0)


def write_earlier_demo(out: Path) -> list[Path]:
    """Files of a demo before, by which it is told and others."""
    folder = out / "detector"
    (folder / "smca-tiny").mkdir(parents=True)
    files = [folder / "of_an_earlier_demo", folder / "smca-tiny" / "model.safetensors"]
    for file in files:
        file.touch()
    return files


def test_compare_trains_both_and_leaves_weights_curves_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_earlier_demo(out)
    assert cli.main(["demo", "--out", str(out), "--compare"]) == 0
    assert [path.name for path in out.iterdir()] == ["detector"]
    left = {path.name for path in (out / "detector").iterdir()}
    (attention,) = (name for name in left if name.startswith("attention_"))
    pictures = {attention, "detections.png", "learning.png"}
    assert left == {"data", "smca-tiny", "detr-tiny", "results.json", *pictures}
    results = json.loads((out / "detector" / "results.json").read_text())
    assert {"smca-tiny", "detr-tiny"} == results["evaluations"].keys()
    assert "AP50" in results["evaluations"]["smca-tiny"][-1]
    told = capsys.readouterr().out
    assert "smca-tiny: AP 0." in told
    command = told[told.index("smca eval") :].split("\n")[0]
    assert cli.main(command.split()[1:]) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o002, 0o775)])
def test_the_folder_is_as_the_umask_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, mode: int
) -> None:
    def train(settings: Settings) -> None:
        Path(settings.out).mkdir()
        (Path(settings.out) / "checkpoint.pt").touch()

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(learning, "use_fastest_threads", lambda _: "")
    monkeypatch.setattr(learning, "_evaluations", lambda _: [{"AP": 0.0, "AP50": 0.0, "seconds": 1.0}])
    for drawing in ("draw_results", "draw_curves"):
        monkeypatch.setattr(learning, drawing, lambda *_: None)
    before = os.umask(umask)
    try:
        learning.run_detector(tmp_path, compare=False, seed=1)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]
    folder = tmp_path / "detector"
    for path in (folder, folder / "smca-tiny"):
        assert path.stat().st_mode & 0o777 == mode, path


def test_the_twin_differs_in_the_prior_alone() -> None:
    smca, detr = (build(preset, 10).config for preset in ("smca-tiny", "detr-tiny"))
    assert (smca.modulation, detr.modulation) == ("per_head", "none")
    assert {**vars(smca), "modulation": ""} == {**vars(detr), "modulation": ""}


def test_another_number_of_epochs_drops_the_learning_rate_at_the_same_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRAINING", {"cpu": {"epochs": 6, "lr_drop": 4, "lr": 1e-4}})
    longer = learning.settings_for("detr-tiny", Path("data"), Path("out"), "cpu", 0, epochs=9)
    assert (longer.epochs, longer.lr_drop) == (9, 6)


def test_an_interrupted_demo_says_so_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Trainer.train_step

    def interrupt(self: Trainer, batches: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    out = tmp_path / "out"
    earlier = write_earlier_demo(out)
    assert cli.main(["demo", "--out", str(out)]) == 130
    assert "interrupted: nothing of the detector was kept" in capsys.readouterr().err
    assert [path for path in out.rglob("*") if not path.is_dir()] == earlier


def test_the_detector_is_left_out_where_the_operator_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "run_layer", lambda out: 1)
    monkeypatch.setattr(learning, "run_detector", lambda *a, **k: pytest.fail("the detector was trained"))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("skimage", "scikit-image")])
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert f"smca demo: error: needs {package}: pip install 'smca_kernels[model,demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_detector_that_no_demo_left_is_refused_before_any_work(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "detector"
    if kind == "folder":
        folder.mkdir()
        (folder / "of_mine.py").touch()
    elif kind == "file":
        folder.touch()
    else:
        write_earlier_demo(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere" / "detector")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    told = f"--out must have nothing called detector but an earlier demo's, which {folder} is not"
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_out_that_is_a_file_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert cli.main(["demo", "--out", str(path)]) == 2
    assert "smca demo: error: --out must be a folder" in capsys.readouterr().err


def test_the_number_of_threads_is_the_fastest_and_put_back_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("threads matter on a CPU")
    before = torch.get_num_threads()
    trained_with: list[int] = []
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        trained_with.append(torch.get_num_threads())
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    # As on a busy machine: the more threads, the slower.
    monkeypatch.setattr(learning, "interleaved_times", lambda *_: {"step": [float(torch.get_num_threads())]})
    torch.set_num_threads(2)
    try:
        learning.run_detector(tmp_path, compare=False, seed=1)
        assert trained_with == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "2: 2.00 s a step, 1: 1.00 s a step; 1 it is" in capsys.readouterr().out
