"""The start of a run: its data, its model, and how many steps it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smca_kernels.tools.arguments import check_packages

from ..presets import build, configure
from . import distributed
from .best import BEST_FILE
from .loggers import check_loggers
from .seeds import INITIAL_WEIGHTS, derived_seed

MODEL_FILE = "model.safetensors"  # the weights of a run's last evaluation, in its folder

if TYPE_CHECKING:  # these need the packages of the `model` extra, which `smca train --help` does without
    from ..data.coco import CocoDetection
    from ..detector import SMCA
    from .settings import Settings


def open_data(settings: Settings) -> tuple[CocoDetection, CocoDetection]:
    """The training and the validation images, with one list of classes."""
    from ..data.coco import CocoDetection
    from ..data.layouts import find_split

    folder = Path(settings.data)
    options: dict[str, Any] = {"sizes": settings.sizes, "max_size": settings.max_size, "upright": settings.upright}
    options["progress"] = distributed.rank() == 0
    train_split, val_split = (find_split(folder, split) for split in ("train", "val"))
    train_set = CocoDetection(
        *train_split, train=True, flip=settings.flip, crop=settings.crop, seed=settings.seed, **options
    )
    return train_set, CocoDetection(*val_split, train=False, classes=train_set.classes, **options)


def check_packages_of(settings: Settings) -> None:
    """Check that the packages that the settings ask for can be imported, without importing them.

    Raises:
        ValueError: naming what is missing, and what installs it.
    """
    check_loggers(settings.loggers)
    if configure(settings.preset, **settings.model_overrides()).backbone.startswith("timm/"):
        check_packages(("timm",), "timm")


def check_start(settings: Settings) -> None:
    """Check that the files of weights that a run is to start from are there, and not those that it removes.

    Raises:
        ValueError: naming option and file.
    """
    # Unlike Path.resolve, realpath takes links that lead in a circle.
    replaced = [os.path.realpath(Path(settings.out) / name) for name in (MODEL_FILE, BEST_FILE) if settings.out]
    for option, file in (("--weights", settings.weights), ("--detr-weights", settings.detr_weights)):
        if file and not Path(file).is_file():
            raise ValueError(f"{option} must be a file, got {file}")
        if file and os.path.realpath(file) in replaced:
            raise ValueError(f"{option} must be a file that the run in --out does not replace, got {file}")


def build_model(
    settings: Settings,
    num_classes: int,
    *,
    from_weights: bool,
    device: torch.device,
    classes: Sequence[str] = (),
) -> SMCA:
    """The preset's model on its device, the same in every process; `from_weights` fetches those it starts from.

    Args:
        settings: of the run.
        num_classes: logits of a query.
        from_weights: whether to start from weights, the backbone's or a file's.
        device: where to put it.
        classes: the name of every label, for a start from `settings.weights`.
    """
    from .. import weights

    torch.manual_seed(derived_seed(settings.seed, INITIAL_WEIGHTS))
    overrides = settings.model_overrides()
    model = build(settings.preset, num_classes, backend=settings.backend, **overrides)
    brought = from_weights and _file_brings_backbone(settings, model.config.backbone)
    wanted = settings.pretrained_backbone
    if wanted is None:
        wanted = model.config.backbone != "tiny" and not brought
    if from_weights and wanted:
        # Process 0 fetches the file, the others find it in the cache.
        for turn in (True, False):
            if turn == (distributed.rank() == 0):
                torch.manual_seed(derived_seed(settings.seed, INITIAL_WEIGHTS))
                model = build(
                    settings.preset, num_classes, backend=settings.backend, pretrained_backbone=True, **overrides
                )
            distributed.barrier()
    model.image_size = (max(settings.sizes), settings.max_size)
    if from_weights and settings.weights:
        distributed.log(weights.start(model, settings.weights, classes))
    if from_weights and settings.detr_weights:
        distributed.log(str(weights.load_detr(model, settings.detr_weights)))
    if settings.freeze_backbone and from_weights and not (wanted or brought):
        distributed.log("the backbone is frozen with random weights")
    return model.to(device)


def _file_brings_backbone(settings: Settings, backbone: str) -> bool:
    from .. import weights

    if settings.detr_weights:
        return backbone.startswith("resnet")
    return bool(settings.weights) and weights.brings_backbone(settings.weights, backbone)


def images_per_step(settings: Settings) -> int:
    """The number of images that one step of the optimiser sees, over all processes."""
    return settings.batch_size * settings.accumulate * distributed.world_size()


def count_steps(settings: Settings, images: int) -> int:
    """The steps of an epoch on that many images.

    Raises:
        ValueError: when there are too few for one.
    """
    steps = images // images_per_step(settings)
    if not steps:
        raise ValueError(
            f"batch_size must leave a step of at most the {images} training images, got a step of "
            f"{images_per_step(settings)}: batch_size {settings.batch_size} × accumulate {settings.accumulate} × "
            f"{distributed.world_size()} processes"
        )
    return steps
