"""Text files and the output of other programs are read and written as UTF-8, whatever the machine's locale."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("smca_kernels", "smca_model", "benchmarks")
BINARY_OPENERS = ("Image", "av", "os")  # Image.open, av.open, os.open
ASCII = ROOT / "smca_kernels" / "tools" / "cost"  # PTX and its disassembly


def in_the_locale(tree: ast.Module) -> Iterator[int]:
    """Lines with calls that read or write text without saying in which encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        function, given = call.func, len(call.args)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if isinstance(function, ast.Attribute):
            if (name == "read_text" and given < 1) or (name == "write_text" and given < 2):
                yield call.lineno
            if ast.unparse(function.value) in BINARY_OPENERS:
                continue
        if name in ("open", "fdopen"):
            modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
            if not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes):
                yield call.lineno
        if any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords):
            yield call.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_and_no_output_is_read_or_written_in_the_encoding_of_the_locale(package: str) -> None:
    files = [path for path in (ROOT / package).rglob("*.py") if ASCII not in path.parents]
    assert files
    trees = {path.relative_to(ROOT): ast.parse(path.read_text("utf-8")) for path in files}
    found = [f"{path}:{line}" for path, tree in trees.items() for line in in_the_locale(tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("write_text(path, text)", False),  # that of files.py
        ("open(path)", True),
        ("path.open('a')", True),
        ("path.open(mode='wb')", False),
        ("Image.open(path)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_a_call_that_leaves_the_encoding_open_is_seen_and_no_other(call: str, seen: bool) -> None:
    assert list(in_the_locale(ast.parse(call))) == [1] * seen
