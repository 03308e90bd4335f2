"""What README.md shows is run here as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smca_kernels.backends import MIN_TRITON

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def code_block(language: str, containing: str = "") -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if containing in block)
    return block


def decoder_layer(sign: str) -> Any:
    """The diff's class before (sign "-") or after ("+") the change, run."""
    lines = [line[1:] for line in code_block("diff").splitlines() if line[:1] in (" ", sign, "")]
    namespace: dict[str, Any] = {"nn": nn}
    exec("\n".join(lines), namespace)
    return namespace["DecoderLayer"]


def test_the_example_of_the_operator_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    exec(code_block("python", "smca_kernels"), namespace)
    assert namespace["output"].shape == (2, 8, 300, 32)
    assert namespace["query"].grad.isfinite().all()
    assert str(namespace["explain_backend"](*namespace["inputs"])) in capsys.readouterr().out


def test_the_example_of_the_detector_runs() -> None:
    pytest.importorskip("torchvision")
    namespace: dict[str, Any] = {}
    exec(code_block("python", "smca_model"), namespace)
    detections, images = namespace["detections"], namespace["images"]
    assert len(detections) == len(images)
    assert all(set(found) == {"scores", "labels", "boxes", "queries"} for found in detections)


def test_the_decoder_layer_runs_before_and_after_the_change() -> None:
    tgt, query_pos = torch.randn(2, 5, 1, 64)
    memory, pos = torch.randn(2, 12, 1, 64)
    padding = torch.zeros(1, 12, dtype=torch.bool)
    before = decoder_layer("-")(64, 4)(tgt, memory, pos, query_pos, padding)
    first, later = decoder_layer("+")(64, 4), decoder_layer("+")(64, 4)
    hidden, logits = first(tgt, memory, pos, query_pos, padding, [(3, 4)])
    after, logits_later = later(hidden, memory, pos, query_pos, padding, [(3, 4)], logits)
    assert after.shape == before.shape
    assert torch.equal(logits_later, logits)


def test_the_change_to_the_decoder_layer_adds_ten_lines() -> None:
    added = [line for line in code_block("diff").splitlines() if line.startswith("+") and line != "+"]
    assert len(added) <= 10


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])  # mkdocs checks those in docs/
def test_files_that_a_page_links_to_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text("utf-8")):
        assert (ROOT / target).exists(), target


def test_oldest_versions_are_the_same_everywhere() -> None:
    metadata = (ROOT / "pyproject.toml").read_text("utf-8")
    (python,) = re.findall(r'^requires-python = ">=(.+)"$', metadata, re.MULTILINE)
    (portable, kernels), (triton,) = (
        re.findall(rf"""["']{name}>=([\d.]+)""", metadata) for name in ("torch", "triton")
    )
    assert tuple(map(int, triton.split("."))) == MIN_TRITON
    assert f"Python ≥ {python}" in README
    assert f"/python-%E2%89%A5%20{python}-" in README
    assert f"the operator and the layer: torch ≥ {portable}\n" in README
    assert f"torch ≥ {kernels} and Triton ≥ {triton}" in README
    assert f"/torch-%E2%89%A5%20{portable}-" in README
    workflow = (ROOT / ".github/workflows/cpu.yml").read_text("utf-8")
    assert f'"torch=={kernels}.*" "triton=={triton}.*"' in workflow
    assert f'".[model,export,timm,hub,eval,video,serve,demo,test]" "torch=={portable}.*"\n' in workflow
    assert f'python: ["{python}", ' in workflow
    (transformers,) = re.findall(r'"transformers>=([\d.]+)"', metadata)
    assert f'"transformers=={transformers}.*"' in workflow
    assert f"transformers ≥ {transformers} |" in (ROOT / "docs/hosts.md").read_text("utf-8")


def test_versions_of_the_constraints_are_in_the_table_of_tested_ones() -> None:
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    found = [re.findall(rf"^{name}==([\d.]+);", constraints, re.MULTILINE) for name in ("torch", "triton")]
    for torch_version, triton in zip(*found, strict=True):
        assert f"| {torch_version} | {triton} |" in README
