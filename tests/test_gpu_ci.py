"""The workflow for a GPU: `smca` takes its commands, they fail when they should, and the page shows them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from smca_kernels.tools.cli import COMMANDS

ROOT = Path(__file__).parents[1]
WORKFLOW = (ROOT / ".github/workflows/gpu.yml").read_text("utf-8")
PAGE = (ROOT / "docs/gpu-ci.md").read_text("utf-8")
SCRIPT = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[0]


def commands(text: str) -> list[str]:
    """Arguments of each `.venv/bin/smca`, up to the end of the command."""
    return [found.strip() for found in re.findall(r"\.venv/bin/smca ([^|\n]*)", text)]


def step(name: str) -> str:
    """The shell commands of a step of the workflow."""
    block = WORKFLOW.split(f"- name: {name}\n")[1].split("\n\n")[0]
    return re.sub(r"\s*run:( \|)?\s*", "", block, count=1)


@pytest.mark.parametrize("command", sorted({*commands(WORKFLOW), *commands(SCRIPT)}))
def test_command_is_one_that_smca_takes(command: str) -> None:
    name, *options = shlex.split(command)
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(COMMANDS[name][0]).add_arguments(parser)
    parser.parse_args(options)


def test_workflow_checks_parity_and_compares_with_the_base() -> None:
    named = {command.split()[0]: command for command in commands(WORKFLOW)}
    assert "--junit" in named["parity"]
    assert "--base out/base.json" in named["bench"]
    assert "--bars" in named["bench"]


@pytest.mark.parametrize("text", [WORKFLOW, SCRIPT], ids=["workflow", "script"])
def test_base_runs_its_own_benchmarks(text: str) -> None:
    before, after = text.split("PYTHONPATH=base")
    assert "ln -s benchmarks base/smca_benchmarks" in before
    assert "bench --bars" in after


def test_the_script_without_github_runs_the_same_commands() -> None:
    assert commands(SCRIPT) == [command for command in commands(WORKFLOW) if not command.startswith("env")]


@pytest.mark.parametrize("status", [0, 1])
def test_comparison_fails_as_the_bench_does_though_its_output_is_piped(tmp_path: Path, status: int) -> None:
    program = tmp_path / ".venv/bin/smca"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho table\nexit {status}\n")
    program.chmod(0o755)
    assert "shell: bash #" in WORKFLOW  # GitHub then runs what follows
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Speed, compared with the base")]
    environment = os.environ | {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "summary.md").read_text() == "table\n"
