"""DETR's sine encoding of where a cell is in its image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000


def sine_position_encoding(
    spatial_shape: tuple[int, int],
    valid_shape: Tensor,  # [B, 2]
    dim: int,
) -> Tensor:  # [B, height · width, dim]
    """Sines and cosines of the row (first half of the channels) and of the column (second half) of every cell.

    Rows and columns count from 1 and are divided by the height and width of the part of the grid that is image, so that
    padding does not change them.

    Args:
        spatial_shape: (height, width) of the grid.
        valid_shape: [B, 2], (height, width) in cells of the part that is image; integers.
        dim: number of channels, a multiple of 4.

    Returns:
        [B, height · width, dim], float32, row-major. Cells of padding get the encodings that come after the image's.

    Raises:
        ValueError: when dim is no multiple of 4.

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, after Vaswani et al., 2017.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    height, width = spatial_shape
    device = valid_shape.device
    extent = 2 * math.pi / (valid_shape.float() + 1e-6)  # [B, 2]
    frequencies = TEMPERATURE ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))  # [dim / 4]

    def encode(cells: int, axis: int) -> Tensor:  # [B, cells, dim / 2]
        angles = torch.arange(1, cells + 1, device=device) * extent[:, axis, None]
        angles = angles.unsqueeze(-1) * frequencies
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(2)

    rows = encode(height, 0).unsqueeze(2).expand(-1, -1, width, -1)
    columns = encode(width, 1).unsqueeze(1).expand(-1, height, -1, -1)
    return torch.cat((rows, columns), -1).flatten(1, 2)
