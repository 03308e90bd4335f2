"""Loggers with the packages of Weights & Biases and MLflow themselves, where they are installed; without a network."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smca_model.training.loggers import WAITS, Loggers, open_loggers

SETTINGS = {"lr": 0.1, "weights": "", "overrides": ("dropout=0.0",)}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No service but files in tmp_path, and what the loggers set gone afterwards."""
    for name in WAITS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


def log_a_run_that_is_stopped_and_resumed(name: str, folder: Path) -> str:
    """Numbers of steps 4 and 8, 4 told again after the resume; returns the run's id."""
    folder.mkdir()
    opened = open_loggers((name,), folder, SETTINGS, 0)
    with contextlib.suppress(KeyboardInterrupt), Loggers(opened) as loggers:
        loggers.log(4, {"train/loss": 2.0})
        raise KeyboardInterrupt
    time.sleep(1.0)  # W&B names folders by the second
    resumed = open_loggers((name,), folder, SETTINGS, 4)
    with Loggers(resumed) as loggers:
        loggers.log(4, {"val/AP": 0.25})
        loggers.log(8, {"train/loss": float("inf"), "val/AP": 0.5})
    assert resumed[name].id == opened[name].id
    return resumed[name].id


def test_mlflow_has_settings_numbers_and_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mlflow = pytest.importorskip("mlflow")
    number = log_a_run_that_is_stopped_and_resumed("mlflow", tmp_path / "street")
    client = mlflow.MlflowClient()
    run = client.get_run(number)
    assert (run.info.run_name, run.info.status) == ("street", "FINISHED")
    assert run.data.params == {"lr": "0.1", "weights": "", "overrides": "('dropout=0.0',)"}
    assert [(each.step, each.value) for each in client.get_metric_history(number, "val/AP")] == [(4, 0.25), (8, 0.5)]
    assert [each.step for each in client.get_metric_history(number, "train/loss")] == [4, 8]
    with pytest.raises(KeyboardInterrupt), Loggers(open_loggers(("mlflow",), tmp_path / "street", SETTINGS, 8)):
        raise KeyboardInterrupt
    assert client.get_run(number).info.status == "KILLED"
    assert "failed" not in caplog.text


def test_weights_and_biases_has_settings_numbers_and_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    number = log_a_run_that_is_stopped_and_resumed("wandb", tmp_path / "street")
    files = sorted((tmp_path / "street" / "wandb").glob(f"offline-run-*/run-{number}.wandb"))
    before, after = (list(records(file)) for file in files)
    run = next(each.run for each in before if each.HasField("run"))
    assert (run.run_id, run.display_name) == (number, "street")
    config = {item.key: item.value_json for item in run.config.update}
    assert (config["lr"], config["weights"], config["overrides"]) == ("0.1", '""', '["dropout=0.0"]')
    assert numbers(before) == [{"step": "4", "train/loss": "2"}]
    assert numbers(after)[0] == {"step": "4", "val/AP": "0.25"}
    assert (numbers(after)[1]["step"], numbers(after)[1]["val/AP"]) == ("8", "0.5")
    assert [each.exit.exit_code for each in (*before, *after) if each.HasField("exit")] == [1, 0]
    assert "failed" not in caplog.text


def records(file: Path) -> Iterator[Any]:
    """The records of a W&B file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def numbers(lines: list[Any]) -> list[dict[str, str]]:
    """What was logged, as JSON by name, without what W&B adds."""
    items = [[(".".join(i.nested_key) or i.key, i.value_json) for i in r.history.item] for r in lines]
    return [{name: value for name, value in each if name[0] != "_"} for each in items if each]
