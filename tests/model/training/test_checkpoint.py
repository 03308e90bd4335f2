"""A checkpoint is whole or not there, and says so when it isn't one."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from small_disk import files_of_at_most

from smca_model.training import checkpoint


def test_a_checkpoint_that_cant_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def full(state: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("limit", [100, 10_000, 1_000_000])
def test_a_full_disk_is_an_os_error_with_the_file_s_name_and_nothing_half_written(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})
    with files_of_at_most(limit), pytest.raises(OSError, match=re.escape(str(path))) as raised:
        checkpoint.save(path, {"step": 2, "model": {"a": torch.zeros(300_000), "b": torch.zeros(300_000)}})
    assert raised.value.errno == errno.EFBIG
    assert checkpoint.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_without_a_word_is_an_os_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: Any, file: BinaryIO) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="RuntimeError") as raised:
        checkpoint.save(tmp_path / "checkpoint.pt", {"step": 1})
    assert raised.value.filename == str(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", json.dumps({"step": 1}).encode()])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} can't be read as a checkpoint"):
        checkpoint.load(path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="must be a training checkpoint of format 1, got None"):
        checkpoint.load(path)


def test_a_checkpoint_damaged_anywhere_is_named_or_loads(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "settings": {"data": "ünicode"}, "model": {"weight": torch.randn(50)}})
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for damaged in (whole[:position], whole[:position] + b"\xff\xfe\x00" + whole[position + 3 :]):
            path.write_bytes(damaged)
            try:
                checkpoint.load(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017, some bytes mean nothing


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("step", None, "its step must be a int, got NoneType"),
        ("settings", [1], "its settings must be a dict, got list"),
        ("seconds", "1", "its seconds must be a number, got str"),
        ("model", ..., "its model must be a dict, got nothing"),
    ],
)
def test_a_checkpoint_with_a_part_of_another_kind_is_refused(part: str, value: Any, message: str) -> None:
    state: dict[str, Any] = {"settings": {}, "facts": {}, "step": 1, "seconds": 1.0}
    state |= {"model": {}, "optimizer": {}, "scaler": {}}
    checkpoint.check(state, Path("run/checkpoint.pt"))
    if value is ...:
        del state[part]
    else:
        state[part] = value
    with pytest.raises(ValueError, match=f"run/checkpoint.pt is a damaged checkpoint: {message}"):
        checkpoint.check(state, Path("run/checkpoint.pt"))
