"""SMCA co-attention in plain PyTorch, equation by equation: this file defines what is correct.

    logG[k] = -(p_x (x - c_x)² + p_y (y - c_y)²)        log of the spatial prior (Eq. 4), in cells of each scale's grid
    P_s     = softmax_k(scale · q·k + logG)             over the keys of scale s alone (Eq. 6)
    out     = Σ_s α_s Σ_k P_s[k] v[k]                   scale-selection weights α (Eq. 7–9)

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.
It builds every queries × keys tensor, in any floating dtype, and is differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smca_kernels.inputs import AttentionInputs, SpatialShapes


def cell_coordinates(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Column x and row y of every cell of a grid, row-major: two [height · width], device and dtype of `like`."""
    # Expanded, not repeated: repeat_interleave is exported wrongly to ONNX where sizes are dynamic.
    x = torch.arange(width, device=like.device, dtype=like.dtype).expand(height, width)
    y = torch.arange(height, device=like.device, dtype=like.dtype).unsqueeze(1).expand(height, width)
    return x.reshape(-1), y.reshape(-1)


def log_prior(center: Tensor, precision: Tensor, height: int, width: int) -> Tensor:
    """logG (Eq. 4) of one scale: center and precision [..., 2] as (x, y) → [..., height · width]."""
    x, y = cell_coordinates(height, width, like=center)
    p_x, p_y = precision[..., 0:1], precision[..., 1:2]
    return -(p_x * (x - center[..., 0:1]) ** 2 + p_y * (y - center[..., 1:2]) ** 2)


def ignored_keys(
    spatial_shapes: SpatialShapes, valid_shapes: Tensor | None, key_padding_mask: Tensor | None
) -> list[Tensor | None]:
    """Mark the keys of each scale that do not count: a bool tensor [B, height · width], or None where all count."""
    if key_padding_mask is not None:
        return list(key_padding_mask.split([height * width for height, width in spatial_shapes], dim=1))
    if valid_shapes is None:
        return [None] * len(spatial_shapes)
    masks: list[Tensor | None] = []
    for s, (height, width) in enumerate(spatial_shapes):
        x, y = cell_coordinates(height, width, like=valid_shapes)
        masks.append((y >= valid_shapes[:, s, 0:1]) | (x >= valid_shapes[:, s, 1:2]))
    return masks


def zeroed(rows: Tensor, ignored: Tensor | None) -> Tensor:
    """Keys or values [B, H, T, …] with 0 where they are ignored [B, T]: a weight of 0 times NaN would be NaN."""
    return rows if ignored is None else rows.masked_fill(ignored[:, None, :, None], 0.0)


def scale_probabilities(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, height · width, D]: the keys of one scale
    center: Tensor,  # [B, H or 1, N, 2]
    precision: Tensor,  # [B, H or 1, N, 2]
    height: int,
    width: int,
    ignored: Tensor | None,  # [B, height · width]
    scale: float,
) -> Tensor:
    """P_s [B, H, N, height · width] of one scale (Eq. 6); all zero for an image with no valid key."""
    if ignored is None:
        logits = scale * (query @ key.transpose(-1, -2)) + log_prior(center, precision, height, width)
        return logits.softmax(-1)
    key, ignored = zeroed(key, ignored), ignored[:, None, None, :]
    logits = scale * (query @ key.transpose(-1, -2)) + log_prior(center, precision, height, width)
    # Where no key is valid, nothing is -inf, for gradients of zero instead of NaN.
    logits = logits.masked_fill(ignored & ~ignored.all(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1).masked_fill(ignored, 0.0)


def attention(inputs: AttentionInputs) -> Tensor:
    """The output [B, H, N, D_v] of the backend "reference"."""
    query, value, shapes = inputs.query, inputs.value, inputs.spatial_shapes
    keys, values = inputs.key.split(inputs.keys_per_scale(), dim=2), value.split(inputs.keys_per_scale(), dim=2)
    ignored = ignored_keys(shapes, inputs.valid_shapes, inputs.key_padding_mask)
    out = torch.zeros((), dtype=query.dtype, device=query.device)
    for s, (height, width) in enumerate(shapes):
        center, precision = inputs.center[..., s, :], inputs.precision[..., s, :]
        probabilities = scale_probabilities(query, keys[s], center, precision, height, width, ignored[s], inputs.scale)
        if inputs.dropout_p > 0.0:
            probabilities = torch.dropout(probabilities, inputs.dropout_p, train=True)
        output = probabilities.to(value.dtype) @ zeroed(values[s], ignored[s])
        out = out + (output if inputs.scale_weights is None else inputs.scale_weights[..., s : s + 1] * output)
    return out.to(query.dtype)


def unsupported(inputs: AttentionInputs) -> str | None:
    """None: the reference serves everything that validates."""
    return None
