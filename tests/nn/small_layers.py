"""Layers and inputs small enough to compute by hand, in float64, with random values everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smca_kernels.nn import SpatiallyModulatedCoAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMBED_DIM, HEADS, QUERIES = 8, 2, 3
SHAPES, STRIDES = ((4, 6), (2, 3)), (16, 32)
KEYS = 4 * 6 + 2 * 3


def randomised(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value: a zero weight or a unit scale would hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def make_layer(**options: Any) -> SpatiallyModulatedCoAttention:
    options = {"strides": STRIDES, "batch_first": True} | options
    layer = randomised(SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, **options))
    assert isinstance(layer, SpatiallyModulatedCoAttention)
    return layer.to(DEVICE, torch.float64).eval()


def make_inputs(batch: int = 2, **options: Any) -> dict[str, Any]:
    kind = {"device": DEVICE, "dtype": torch.float64} | options
    return {
        "query": torch.randn(batch, QUERIES, EMBED_DIM, **kind),
        "key": torch.randn(batch, KEYS, EMBED_DIM, **kind),
        "value": torch.randn(batch, KEYS, EMBED_DIM, **kind),
        "spatial_shapes": SHAPES,
        "prior_features": torch.randn(batch, QUERIES, EMBED_DIM, **kind),
    }


def padding_mask(valid_shapes: list[list[tuple[int, int]]]) -> Tensor:
    """Mask [B, T] that is True outside the top-left part of each grid."""
    rows = []
    for image in valid_shapes:
        parts = []
        for (height, width), (valid_height, valid_width) in zip(SHAPES, image, strict=True):
            part = torch.ones(height, width, dtype=torch.bool)
            part[:valid_height, :valid_width] = False
            parts.append(part.flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
