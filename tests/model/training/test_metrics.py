"""The numbers of a run, as JSON that every reader takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_disk import files_of_at_most

from smca_model.training.loggers import Loggers
from smca_model.training.metrics import Metrics, read_metrics


def test_a_number_that_json_has_not_is_null(tmp_path: Path) -> None:
    Metrics(tmp_path, 0, Loggers({})).write("train", {"step": 1, "grad_norm": float("inf"), "loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "loss": 2.0}\n'


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("end", [b'{"step": 2, "lo', b"\x00\x00\x00", b"\xff", b"7", b'{"loss": 1.0}'])
def test_a_last_line_that_is_none_is_left_out(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + end)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "line", [b'{"step": 2, "lo', b"\x00\x00\x00", b"\xff\xfe", b"7", b'{"loss": 1.0}', b'{"step": "2"}']
)
def test_a_damaged_line_is_told_with_file_and_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: must be a JSON object with a step, got ")):
        read_metrics(tmp_path)


def test_what_is_no_file_of_metrics_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'metrics.jsonl'} can't be read")):
        read_metrics(tmp_path)


def test_what_follows_the_checkpoint_is_dropped_and_its_own_evaluation_too(tmp_path: Path) -> None:
    lines = ['{"step": 4, "AP": 0.1}', '{"step": 8, "loss": 2.0}', '{"step": 8, "AP": 0.2}', '{"step": 9, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Metrics(tmp_path, 8, Loggers({}))
    assert read_metrics(tmp_path) == [{"step": 4, "AP": 0.1}, {"step": 8, "loss": 2.0}]


@pytest.mark.parametrize("limit", [100, 50])
def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path: Path, limit: int) -> None:
    metrics = Metrics(tmp_path, 0, Loggers({}))
    metrics.write("train", {"step": 1, "loss": 2.0})
    numbers = dict.fromkeys((f"loss_{i}" for i in range(10)), 1.0)

    def write() -> None:
        for step in (2, 3, 4):
            metrics.write("train", {"step": step, **numbers})

    with files_of_at_most(limit), pytest.raises(OSError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
        write()
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert all(json.loads(line) for line in lines.splitlines())
    assert lines.endswith("\n")
