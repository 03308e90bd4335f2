"""A detector to profile: `smca profile --preset` and `--weights`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED = 0


def detector_call(args: argparse.Namespace, device: torch.device, dtype: str) -> Callable[[], object]:
    """A call of the detector that `--preset` or `--weights` names, on `--image` or on noise."""
    import torch

    from . import build, weights
    from .data.images import load_image, normalize, resize
    from .presets import IMAGE_SIZE, TINY_IMAGE_SIZE

    torch.manual_seed(SEED)
    if args.weights is not None:
        model = weights.load(args.weights)
    else:
        model = build(args.preset)
        if model.config.backbone == "tiny":
            model.image_size = (TINY_IMAGE_SIZE[0], 2 * TINY_IMAGE_SIZE[0])
    if args.image is not None:
        image = normalize(resize(load_image(args.image), *model.image_size))
    else:
        sizes = TINY_IMAGE_SIZE if model.config.backbone == "tiny" else IMAGE_SIZE
        image = torch.randn(3, *sizes)
    model, image = model.to(device).train(args.training), image.to(device)
    model.backend = args.backend
    is_autocast = dtype != "float32"

    def call() -> None:
        with (
            torch.set_grad_enabled(args.training),
            torch.autocast(device.type, getattr(torch, dtype) if is_autocast else None, enabled=is_autocast),
        ):
            model([image])

    return call
