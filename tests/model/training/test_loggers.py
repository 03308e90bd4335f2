"""Where a run's numbers go: what each logger is told, and that none of them ends a run."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

from small_disk import files_of_at_most

from smca_model.training.loggers import LOGGERS, WAITS, Loggers, check_loggers, open_loggers
from smca_model.training.metrics import Metrics


def package(monkeypatch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    """An empty package of that name, to be imported in place of the real one."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that the loggers set, now or afterwards."""
    for name in WAITS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What Weights & Biases was told, in order."""
    told: list[tuple[str, Any]] = []

    class Run:
        id, url, dir = "abc", None, "/runs/wandb/offline-run-abc/files"

        def define_metric(self, name: str, step_metric: str) -> None:
            told.append(("define_metric", (name, step_metric)))

        def log(self, data: dict[str, float]) -> None:  # with a step of its own, it drops those before the last
            told.append(("log", data))

        def finish(self, exit_code: int | None = None) -> None:
            told.append(("finish", exit_code))

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
    module.get_tracking_uri = lambda: "postgresql://me:secret@host/runs"
    module.log_params = lambda params: told.append(("log_params", params))
    module.log_metrics = lambda metrics, step: told.append(("log_metrics", (step, metrics)))
    module.end_run = lambda status="FINISHED": told.append(("end_run", status))
    return told


def log_once(folder: Path, name: str) -> None:
    """Open a logger, tell it of one step, close it."""
    with Loggers(open_loggers((name,), folder, {"lr": 0.1}, 0)) as loggers:
        Metrics(folder, 0, loggers).write("val", {"step": 4, "AP": 0.5})


def test_weights_and_biases_is_told_settings_numbers_and_the_end(tmp_path: Path, wandb: list[tuple[str, Any]]) -> None:
    log_once(tmp_path, "wandb")
    begin = ("init", {"name": tmp_path.name, "dir": str(tmp_path), "config": {"lr": 0.1}})
    numbers = ("log", {"val/AP": 0.5, "step": 4})
    assert wandb == [begin, ("define_metric", ("*", "step")), numbers, ("finish", None)]


def test_mlflow_is_told_settings_numbers_and_the_end(tmp_path: Path, mlflow: list[tuple[str, Any]]) -> None:
    log_once(tmp_path, "mlflow")
    begin = [("start_run", {"run_name": tmp_path.name}), ("log_params", {"lr": 0.1})]
    assert mlflow == [*begin, ("log_metrics", (4, {"val/AP": 0.5})), ("end_run", "FINISHED")]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "KILLED"), (ValueError(), "FAILED")])
def test_a_run_that_ends_before_its_end_has_not_finished_there(
    tmp_path: Path,
    wandb: list[tuple[str, Any]],
    mlflow: list[tuple[str, Any]],
    error: BaseException,
    status: str,
) -> None:
    mine = Recording()
    opened = open_loggers(("tensorboard", "wandb", "mlflow"), tmp_path, {}, 0)
    with pytest.raises(type(error)), Loggers({**opened, "mine": mine}):
        raise error
    assert (wandb[-1], mlflow[-1], mine.steps) == (("finish", 1), ("end_run", status), [-1])


def test_what_was_open_is_closed_where_another_logger_cant_start(
    tmp_path: Path, mlflow: list[tuple[str, Any]], wandb: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["wandb"], "init")
    with pytest.raises(ValueError, match="can't start wandb"):
        open_loggers(("mlflow", "wandb"), tmp_path, {}, 0)
    assert mlflow[-1] == ("end_run", "FAILED")


def test_what_was_open_is_closed_where_its_id_cant_be_written(tmp_path: Path, mlflow: list[tuple[str, Any]]) -> None:
    with files_of_at_most(3), pytest.raises(OSError, match="File too large"):
        open_loggers(("mlflow",), tmp_path, {}, 0)
    assert mlflow[-1] == ("end_run", "FAILED")


def test_places_are_told_without_a_password(
    tmp_path: Path, wandb: list[tuple[str, Any]], mlflow: list[tuple[str, Any]]
) -> None:
    opened = open_loggers(("tensorboard", "wandb", "mlflow"), tmp_path, {}, 0)
    assert {name: logger.place for name, logger in opened.items()} == {
        "tensorboard": str(tmp_path / "tensorboard"),
        "wandb": "/runs/wandb/offline-run-abc",
        "mlflow": "run 123 in postgresql://host/runs",
    }


def test_services_are_not_waited_for_without_end_unless_the_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "600")
    open_loggers((), tmp_path, {}, 0)
    assert {name: os.environ[name] for name in WAITS} == {**WAITS, "WANDB_FINISH_TIMEOUT": "600"}


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


def test_a_new_run_in_the_folder_of_one_before_is_a_new_one_at_each_service(
    tmp_path: Path, wandb: list[tuple[str, Any]], mlflow: list[tuple[str, Any]]
) -> None:
    (tmp_path / "loggers.json").write_text('{"wandb": "old", "mlflow": "1"}')
    open_loggers(("mlflow", "wandb"), tmp_path, {}, 0)
    assert "id" not in wandb[0][1]
    assert mlflow[0] == ("start_run", {"run_name": tmp_path.name})
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "abc", "mlflow": "123"}


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


def test_a_logger_whose_failures_take_long_is_left_alone_for_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Failing):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            now[0] += 4.0
            super().log(step, metrics)

    slow, recording = Slow(), Recording()
    loggers = Loggers({"slow": slow, "other": recording})
    for step in range(100):
        now[0] += 1.0
        loggers.log(step, {"train/loss": 1.0})
    assert slow.tried == 3  # every 4 s are followed by 40
    assert recording.steps == list(range(100))
    assert len(caplog.records) == 1


def test_a_full_disk_for_tensorboard_is_a_warning_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loggers = Loggers(open_loggers(("tensorboard",), tmp_path, {}, 0))
    numbers = dict.fromkeys((f"loss_{i}" for i in range(100)), 1.0)
    with files_of_at_most(2000):
        for step in (1, 2, 3):
            loggers.log(step, numbers)
    (record,) = caplog.records
    assert str(tmp_path / "tensorboard") in record.getMessage()
