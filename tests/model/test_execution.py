"""How a detector is run: its precision, and what is told where a batch does not fit into memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")
pytest.importorskip("skimage")
pytest.importorskip("torchvision")

from smca_kernels.tools import cli
from smca_model import SMCA, build, weights
from smca_model.data.digits import CLASSES
from smca_model.execution import PRECISIONS, float32_products, naming_batch

CUDA = "CUDA out of memory. Tried to allocate 1 GiB."
TINY = ("hidden_dim=32", "num_heads=2", "decoder_layers=2", "num_queries=10", "ffn_dim=64")


@pytest.fixture
def commands(data: Path, tmp_path: Path) -> dict[str, list[str]]:
    """`smca train`, `eval` and `detect` of two images at once, to all of which --precision can be added."""
    model = build("smca-tiny", 10, hidden_dim=32, num_heads=2, decoder_layers=2, num_queries=10, ffn_dim=64)
    model.image_size = (48, 96)
    weights.save(model, tmp_path / "w.safetensors", CLASSES)
    options = ["--batch-size", "2"]
    loading = ["--data", str(data), "--workers", "0"]
    trained = ["--preset", "smca-tiny", "--sizes", "48", "--max-size", "96", "--loggers", "--overrides", *TINY]
    saved = ["--weights", str(tmp_path / "w.safetensors"), "--device", "cpu", *options]
    return {
        "train": ["train", *loading, "--out", str(tmp_path / "run"), "--epochs", "1", *options, *trained],
        "eval": ["eval", *loading, *saved],
        "detect": ["detect", str(data / "val"), "--out", str(tmp_path / "found"), *saved],
    }


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_and_convolutions_of_floats_may_be_tf32_where_the_precision_says_so(
    precision: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with float32_products(precision):
        found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert found == (("high", True) if precision == "tf32" else ("highest", False))
    assert torch.backends.cudnn.allow_tf32 is before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("before", [None, ":16:8"])
def test_a_deterministic_run_leaves_the_environment_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    with float32_products("fp32", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[name] == (before or ":4096:8")
    assert os.environ.get(name) == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("command", ["eval", "detect"])
def test_what_is_evaluated_and_detected_is_computed_in_the_precision(
    commands: dict[str, list[str]], command: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = SMCA.forward

    def forward(self: SMCA, images: list[torch.Tensor]) -> Any:
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((half, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return real(self, images)

    monkeypatch.setattr(SMCA, "forward", forward)
    assert cli.main([*commands[command], "--precision", precision]) == 0
    tf32 = precision == "tf32"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    assert set(seen) == {(half, "high" if tf32 else "highest", tf32)}


@pytest.mark.parametrize(("command", "where"), [("train", "step 0: "), ("eval", ""), ("detect", "")])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in create")])
def test_a_batch_that_does_not_fit_into_memory_is_told_in_one_line_with_its_size(
    commands: dict[str, list[str]],
    command: str,
    where: str,
    error: RuntimeError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forward(self: SMCA, images: list[torch.Tensor]) -> Any:
        raise error

    monkeypatch.setattr(SMCA, "forward", forward)
    assert cli.main(commands[command]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    form = rf"smca {command}: error: {where}2 images, padded to \d+ × \d+ pixels, do not fit into memory \(.*\); "
    assert re.match(form, told)
    assert f"({error}); " in told


def test_a_batch_is_named_by_the_size_that_it_is_padded_to() -> None:
    images = [torch.zeros(3, 4, 9), torch.zeros(3, 6, 5)]
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"^here: 2 images, padded to 9 × 6 pixels, .*; less$"),
        naming_batch(images, "here: ", "less"),
    ):
        torch.empty(2**60)  # the allocator of the CPU has an error of its own
    with pytest.raises(RuntimeError, match=r"^a bug$"), naming_batch(images, "", ""):
        raise RuntimeError("a bug")
