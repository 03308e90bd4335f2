"""The console script `smca`: subcommands are found, run, and fail as a user expects."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smca_kernels import __version__
from smca_kernels.tools import cli

ROOT = Path(__file__).parents[2]
AddCommand = Callable[[str], None]


@pytest.fixture
def add_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AddCommand:
    """Makes a subcommand `example` from the body of its `run`, beside one that can't be imported."""

    def add(body: str) -> None:
        source = (
            "def add_arguments(parser):\n    parser.add_argument('--times', type=int, default=1)\n\n"
            f"def run(args):\n    {body}\n"
        )
        (tmp_path / "example_command.py").write_text(source)
        monkeypatch.delitem(sys.modules, "example_command", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        table = {
            "example": ("example_command", "an example"),
            "broken": ("no_such_module", "can't be imported"),
        }
        monkeypatch.setattr(cli, "COMMANDS", table)

    return add


def test_the_exit_status_is_what_the_subcommand_returns(add_command: AddCommand) -> None:
    add_command("return 3 * args.times")
    assert cli.main(["example", "--times", "2"]) == 6


def test_only_the_chosen_subcommand_is_imported(add_command: AddCommand) -> None:
    add_command("return 0")
    assert cli.main(["example"]) == 0
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["broken"])


def test_help_tells_every_subcommand_without_importing_any(
    add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command("return 0")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "an example" in told
    assert "can't be imported" in told
    assert "example_command" not in sys.modules


def test_an_unknown_subcommand_is_an_error_that_tells_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prity"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "smca: error: argument NAME: invalid choice: 'prity'" in told
    assert all(name in told for name in cli.COMMANDS)


def test_no_subcommand_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "smca: error: the following arguments are required: NAME" in capsys.readouterr().err


def test_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"smca_kernels {__version__}\n"


def test_a_value_error_of_a_subcommand_is_told_in_one_line(
    add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command("raise ValueError('times must be positive, got 0')")
    assert cli.main(["example"]) == 2
    assert capsys.readouterr().err == "smca example: error: times must be positive, got 0\n"


def test_any_other_error_of_a_subcommand_keeps_its_traceback(add_command: AddCommand) -> None:
    add_command("raise RuntimeError('a bug')")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["example"])


def test_a_file_that_cant_be_written_is_told_in_one_line_with_status_1(
    add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command("raise OSError(28, 'No space left on device', 'runs/checkpoint.pt')")
    assert cli.main(["example"]) == 1
    assert capsys.readouterr().err == "smca example: error: runs/checkpoint.pt: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (r"__import__('torch').OutOfMemoryError('CUDA out of memory. Tried\nadvice')", "CUDA out of memory. Tried"),
        ("MemoryError()", "MemoryError"),
    ],
)
def test_what_does_not_fit_into_memory_is_told_in_one_line_with_status_1(
    error: str, told: str, add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command(f"raise {error}")
    assert cli.main(["example"]) == 1
    assert capsys.readouterr().err == f"smca example: error: {told}\n"


def test_a_loading_process_that_the_system_ended_is_told_in_one_line_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loading_command.py").write_text(
        "import os, signal\n"
        "from torch.utils.data import DataLoader, Dataset\n\n"
        "class Killed(Dataset):\n"
        "    def __len__(self): return 1\n"
        "    def __getitem__(self, index): os.kill(os.getpid(), signal.SIGKILL)\n\n"
        "def add_arguments(parser): pass\n\n"
        "def run(args): list(DataLoader(Killed(), num_workers=1))\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "loading", ("loading_command", "load"))
    assert cli.main(["loading"]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("smca loading: error: DataLoader worker")
    assert told.endswith("fewer --workers take less")


def test_an_error_without_a_number_of_the_system_keeps_its_traceback(add_command: AddCommand) -> None:
    add_command("raise OSError('could not get source code')")
    with pytest.raises(OSError, match="source code"):
        cli.main(["example"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_told_in_one_line() -> None:
    program = "import sys; from smca_kernels.tools.cli import main; sys.exit(main(['env']))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (1, "smca env: error: output: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1251:strict", "cp437", "latin-1:surrogateescape"])
def test_characters_that_the_output_cant_show_are_replaced(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "words_command.py").write_text(
        "import sys\n"
        "def add_arguments(parser): parser.add_argument('--fail', action='store_true', help='800×1120 – …')\n\n"
        "def run(args):\n"
        "    print('800×1120 – … 漢')\n"
        "    print('800×1120 – … 漢', file=sys.stderr)\n"
        "    if args.fail: raise ValueError('at least 1×1, got –')\n"
        "    return 0\n",
        "utf-8",
    )
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from smca_kernels.tools import cli\n"
        "cli.COMMANDS = {'words': ('words_command', 'a × b')}\n"
        "sys.exit(cli.main(['words', *sys.argv[1:]]))\n"
    )
    for argument, status in (("", 0), ("--fail", 2), ("--help", 0)):
        command = [sys.executable, "-c", program, *argument.split()]
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        ended = subprocess.run(command, env=environment, capture_output=True)
        assert ended.returncode == status, ended.stderr
        assert all(part in ended.stdout for part in (b"800", b"1120 "))
        assert b"Traceback" not in ended.stderr
        assert (b"smca words: error: at least 1" in ended.stderr) == (argument == "--fail")


def test_an_interrupt_exits_with_130(add_command: AddCommand) -> None:
    add_command("raise KeyboardInterrupt")
    assert cli.main(["example"]) == 130


def test_a_reader_that_stops_early_gets_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "long_command.py").write_text(
        "def add_arguments(parser): pass\n\n"
        "def run(args):\n    for line in range(100_000):\n        print(line)\n    return 0\n"
    )
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from smca_kernels.tools import cli\n"
        "cli.COMMANDS = {'long': ('long_command', 'prints and prints')}\n"
        "sys.exit(cli.main(['long']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 1
    assert told == b""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: smca {name}" in capsys.readouterr().out
