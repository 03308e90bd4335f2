"""A detector ready to be measured by `smca profile`: a preset or saved weights, on an image or on noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import weights
from .data.images import load_image, normalize, resize
from .presets import IMAGE_SIZE, TINY_IMAGE_SIZE, build

SEED = 0


def detector_call(
    detector: str | Path,
    image_file: Path | None,
    *,
    device: torch.device,
    dtype: str,
    backend: str = "auto",
    training: bool = False,
) -> Callable[[], object]:
    """Build a detector and return the call of it on one image.

    Args:
        detector: name of a preset, which is not trained, or a file as `smca train` writes it.
        image_file: what it sees; None: noise of the size that presets are counted with.
        device: where it runs.
        dtype: "float32", or the dtype that it is autocast to.
        backend: of the co-attention.
        training: with gradients and dropout, as it trains.

    Raises:
        ValueError: for an unknown preset, a file that holds no weights, and an image that can't be read.
    """
    torch.manual_seed(SEED)
    if isinstance(detector, Path):
        model = weights.load(detector)
    else:
        model = build(detector)
        if model.config.backbone == "tiny":
            model.image_size = (TINY_IMAGE_SIZE[0], 2 * TINY_IMAGE_SIZE[0])
    if image_file is not None:
        image = normalize(resize(load_image(image_file), *model.image_size))
    else:
        size = TINY_IMAGE_SIZE if model.config.backbone == "tiny" else IMAGE_SIZE
        image = torch.randn(3, *size)
    model, image = model.to(device).train(training), image.to(device)
    model.backend = backend
    is_autocast = dtype != "float32"

    def call() -> None:
        with (
            torch.set_grad_enabled(training),
            torch.autocast(device.type, getattr(torch, dtype) if is_autocast else None, enabled=is_autocast),
        ):
            model([image])

    return call
