"""Where a run's numbers go: what each logger is told, and that none of them ends a run."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

from small_disk import files_of_at_most

from smca_model.training.loggers import LOGGERS, Loggers, check_loggers, open_loggers
from smca_model.training.metrics import Metrics


def package(monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """An empty package of that name, to be imported in place of the real one."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What Weights & Biases was told, in order."""
    told: list[tuple[str, Any]] = []

    class Run:
        id = "abc"

        def log(self, metrics: dict[str, float], step: int) -> None:
            told.append(("log", (step, metrics)))

        def finish(self) -> None:
            told.append(("finish", None))

    def init(**arguments: Any) -> Run:
        told.append(("init", arguments))
        return Run()

    package(monkeypatch, "wandb").init = init  # type: ignore[attr-defined]
    return told


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What MLflow was told, in order."""
    told: list[tuple[str, Any]] = []
    module: Any = package(monkeypatch, "mlflow")

    def start_run(**arguments: Any) -> Any:
        told.append(("start_run", arguments))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="123"))

    module.start_run = start_run
    module.log_params = lambda params: told.append(("log_params", params))
    module.log_metrics = lambda metrics, step: told.append(("log_metrics", (step, metrics)))
    module.end_run = lambda: told.append(("end_run", None))
    return told


def log_once(folder: Path, name: str) -> None:
    """Open a logger, tell it of one step, close it."""
    metrics = Metrics(folder, 0, Loggers(open_loggers((name,), folder, {"lr": 0.1}, 0)))
    metrics.write("val", {"step": 4, "AP": 0.5})
    metrics.loggers.close()


def test_weights_and_biases_is_told_settings_numbers_and_the_end(tmp_path: Path, wandb: list[tuple[str, Any]]) -> None:
    log_once(tmp_path, "wandb")
    begin = {"name": tmp_path.name, "dir": str(tmp_path), "config": {"lr": 0.1}}
    assert wandb == [("init", begin), ("log", (4, {"val/AP": 0.5})), ("finish", None)]


def test_mlflow_is_told_settings_numbers_and_the_end(tmp_path: Path, mlflow: list[tuple[str, Any]]) -> None:
    log_once(tmp_path, "mlflow")
    begin = [("start_run", {"run_name": tmp_path.name}), ("log_params", {"lr": 0.1})]
    assert mlflow == [*begin, ("log_metrics", (4, {"val/AP": 0.5})), ("end_run", None)]


def test_a_resumed_run_goes_on_with_its_own_at_each_service(
    tmp_path: Path, wandb: list[tuple[str, Any]], mlflow: list[tuple[str, Any]]
) -> None:
    open_loggers(("wandb", "mlflow"), tmp_path, {}, 0)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "abc", "mlflow": "123"}
    wandb.clear()
    mlflow.clear()
    open_loggers(("mlflow", "wandb"), tmp_path, {}, 4)
    assert (wandb[0][1]["id"], wandb[0][1]["resume"]) == ("abc", "allow")
    assert mlflow == [("start_run", {"run_id": "123"})]  # its parameters can't be changed


def test_damaged_ids_are_named(tmp_path: Path) -> None:
    (tmp_path / "loggers.json").write_text("[1")
    with pytest.raises(ValueError, match=r"loggers\.json must be JSON"):
        open_loggers((), tmp_path, {}, 0)


def test_a_service_that_cant_be_reached_at_the_start_is_told(
    tmp_path: Path, wandb: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_login(**arguments: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_login)
    with pytest.raises(ValueError, match=r"loggers can't start wandb \(no API key\)"):
        open_loggers(("tensorboard", "wandb"), tmp_path, {}, 0)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_told_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs {name}: pip install "):
        check_loggers((name,))


class Failing:
    """A logger whose network is gone."""

    def __init__(self) -> None:
        self.tried = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.tried += 1
        raise ConnectionError("no route to host")

    def close(self) -> None:
        raise ConnectionError("no route to host")


class Recording(Failing):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


def test_a_logger_that_fails_is_warned_of_once_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    failing, recording = Failing(), Recording()
    loggers = Loggers({"mine": failing, "other": recording})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            loggers.log(step, {"train/loss": 1.0})
        loggers.close()
    assert [record.getMessage() for record in caplog.records] == [
        "mine failed and may lack numbers, which metrics.jsonl has: no route to host"
    ]
    assert failing.tried == 2
    assert recording.steps == [1, 2, -1]


def test_a_full_disk_for_tensorboard_is_a_warning_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loggers = Loggers(open_loggers(("tensorboard",), tmp_path, {}, 0))
    numbers = dict.fromkeys((f"loss_{i}" for i in range(100)), 1.0)
    with files_of_at_most(2000):
        for step in (1, 2, 3):
            loggers.log(step, numbers)
    (record,) = caplog.records
    assert str(tmp_path / "tensorboard") in record.getMessage()
