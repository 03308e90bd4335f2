"""What commands check before any work, and what they tell of another library's error."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from smca_kernels.tools import cli
from smca_kernels.tools.arguments import check_output_file, choose_device, first_line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_output_file_is_no_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert cli.main(["env", "--json", str(pipe)]) == 2
    message = f"smca env: error: --json must name a regular file or a new one, no pipe, device or stream, got {pipe}"
    assert message in capsys.readouterr().err
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_output_file_is_new_or_a_regular_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("old", "link", "broken", "new"):
        check_output_file("--json", tmp_path / name)
    check_output_file("--json", None)


@pytest.mark.parametrize(
    ("command", "options"),
    [(["parity"], ("--json", "--junit")), (["profile", "--workload", "basic-b1"], ("--json", "--trace"))],
)
def test_output_files_of_two_options_are_two(
    command: list[str], options: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    file, same = tmp_path / "file", tmp_path / "folder" / ".." / "file"
    assert cli.main([*command, options[0], str(file), options[1], str(same)]) == 2
    assert f"{options[1]} must name another file than {options[0]}, got {same}" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize("name", ["meta", "meta:0"])
def test_a_device_without_values_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name} can't be used: it has shapes, but no values"):
        choose_device(name)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError("\n  one \ntwo"), "one"),
        (ConnectionError(), "ConnectionError"),
        (EOFError(" \n"), "EOFError"),
    ],
)
def test_of_an_error_its_first_line_is_told_or_what_it_is(error: Exception, told: str) -> None:
    assert first_line(error) == told
