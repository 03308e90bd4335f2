"""What every host is asked for: options of the prior, and how its one feature map lies over the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smca_kernels.nn.checks import check_strides

# Arguments of `SpatialPrior` that can be chosen; the host settles the others.
PRIOR_OPTIONS = ("strides", "geometry", "modulation", "scale_type", "beta")


def check_options(options: Mapping[str, Any]) -> None:
    """Check the names of a prior's options, and for one stride.

    Raises:
        TypeError, ValueError: for another name, and for strides that are no list of one positive number.
    """
    for name in options:
        if name not in PRIOR_OPTIONS:
            raise TypeError(f"options of the prior must be among {', '.join(PRIOR_OPTIONS)}, got {name!r}")
    check_strides(options["strides"])
    if len(options["strides"]) != 1:
        raise ValueError(f"strides must have the one stride of the host's feature map, got {options['strides']}")


def checked_shape(feature_map: Tensor, height: int, width: int, stride: float) -> tuple[int, int]:
    """(height, width) in cells of a feature map [B, C, h, w] of images [height, width] in pixels.

    Raises:
        ValueError: where that is not as many as the stride makes; the last cell may be a part of one, or missing.
    """
    rows, columns = feature_map.shape[-2:]
    if not (abs(rows * stride - height) < stride and abs(columns * stride - width) < stride):
        raise ValueError(
            f"strides must be the pixels per cell of the backbone, got ({stride},) where images of "
            f"{height} × {width} pixels have {rows} × {columns} cells"
        )
    return rows, columns


def image_sizes(image: Tensor) -> Tensor:
    """(height, width) [B, 2] in pixels of what a mask [B, height, width] says is image, True or not 0."""
    kept = image.bool()
    return torch.stack((kept.any(2).sum(1), kept.any(1).sum(1)), -1)
