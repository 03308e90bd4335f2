"""The numbers of a run, as JSON that every reader takes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

from smca_model.training.metrics import Metrics, read_metrics


def test_a_number_that_json_has_not_is_null(tmp_path: Path) -> None:
    Metrics(tmp_path, 0).write("train", {"step": 1, "grad_norm": float("inf"), "loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "loss": 2.0}\n'


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_what_follows_the_checkpoint_is_dropped_and_its_own_evaluation_too(tmp_path: Path) -> None:
    lines = ['{"step": 4, "AP": 0.1}', '{"step": 8, "loss": 2.0}', '{"step": 8, "AP": 0.2}', '{"step": 9, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Metrics(tmp_path, 8)
    assert read_metrics(tmp_path) == [{"step": 4, "AP": 0.1}, {"step": 8, "loss": 2.0}]
