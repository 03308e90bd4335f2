"""A small set of digits, an exported detector and a signal while one detects, which tests share.

This folder's helpers can be imported from its subfolders.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

CLASSES = ("one", "two", "three", "four", "fünf")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes of digits, 48 × 48 pixels, to train on, two held out."""
    pytest.importorskip("skimage")
    from smca_model.data.digits import make_digits

    folder = tmp_path_factory.mktemp("digits") / "data"
    make_digits(folder, train=8, val=2, size=48, progress=False)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a detector of random weights, model.safetensors, and what `smca export` makes of it, model.onnx."""
    for package in ("onnx", "onnxruntime", "onnxscript", "safetensors", "torchvision"):
        pytest.importorskip(package)
    from tiny_detector import tiny_detector

    from smca_kernels.tools import cli
    from smca_model import weights

    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = tiny_detector()
    model.image_size = (48, 96)
    weights.save(model, folder / "model.safetensors", CLASSES)
    assert cli.main(["export", str(folder / "model.safetensors"), "--format", "onnx"]) == 0
    return folder


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def stopped_in_second_batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of a signal that the process gets when a detector is called for the second time."""
    pytest.importorskip("torchvision")
    from smca_model import SMCA

    calls = []
    real = SMCA.forward

    def forward(self: SMCA, images: list[torch.Tensor]) -> Any:
        calls.append(len(images))
        if len(calls) == 2:
            os.kill(os.getpid(), request.param)
        return real(self, images)

    monkeypatch.setattr(SMCA, "forward", forward)
    return int(request.param)
