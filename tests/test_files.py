"""Files are replaced as a whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from smca_kernels.files import replacing, write_text


def test_text_takes_the_place_of_the_old_file_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half, then \ud800", "utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interruption_at_the_last_moment_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "cost.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "results.json"
    before = os.umask(umask)
    try:
        write_text(path, "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_and_the_process_s_own_output_are_not_replaced(tmp_path: Path) -> None:
    pipe, output = tmp_path / "pipe", tmp_path / "output"
    os.mkfifo(pipe)
    (tmp_path / "stdout").symlink_to(output)
    saved = os.dup(1)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        for path in (pipe, output, tmp_path / "stdout"):
            with pytest.raises(OSError, match=f"not a regular file, and not replaced by one: '{path}'"):
                write_text(path, "text")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "output", "stdout"}
    assert (tmp_path / "stdout").is_symlink()


@pytest.mark.parametrize("name", ["m" * 255, "é" * 127, "model.safetensors", "picture.png", "a"])
def test_every_name_that_fits_its_folder_can_be_written(tmp_path: Path, name: str) -> None:
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("text")
        # The shortest names leave too little for one that nobody has.
        assert len(os.fsencode(temporary.name)) <= max(8, len(os.fsencode(name)))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_error_keeps_the_name_of_the_innermost_file(tmp_path: Path) -> None:
    outer, inner = replacing(tmp_path / "outer"), replacing(tmp_path / "inner")
    with pytest.raises(OSError, match="No space left") as raised, outer, inner:
        raise OSError(errno.ENOSPC, "No space left")
    assert raised.value.filename == str(tmp_path / "inner")
    assert not list(tmp_path.iterdir())
