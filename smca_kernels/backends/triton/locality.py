"""Keys that a query's prior lets it see, in PyTorch: the twin of windows.py. The proof is in docs/locality.md.

A query's window is a rectangle of each scale's grid outside of which all keys together hold at most `mass_tolerance` of
its softmax. Queries are put in an order in which neighbours look at the same place; a block of them has one window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from smca_kernels.backends.reference import cell_coordinates, ignored_keys
from smca_kernels.inputs import AttentionInputs, SpatialShapes

BLOCK = 64  # queries, as the kernels have them for half precision


class Plan(NamedTuple):
    """Elements to compute.

    Attributes:
        order: [B, H, N] int64, the queries in the order in which blocks take them.
        windows: [B, H, blocks, S, 4] int64, (x0, y0, x1, y1) of each block and scale: columns x0 ≤ x < x1 and rows
            y0 ≤ y < y1 are computed.
        block: queries of a block; the last one may have fewer.
    """

    order: Tensor
    windows: Tensor
    block: int

    def computed(self) -> Tensor:
        """Count the pairs of a query and a key that are computed, [B, H, S] float64."""
        widths, heights = (self.windows[..., 2:] - self.windows[..., :2]).double().unbind(-1)
        queries = self.order.shape[2]
        sizes = [min(self.block, queries - start) for start in range(0, queries, self.block)]
        return torch.einsum("bhns,n->bhs", widths * heights, widths.new_tensor(sizes))

    def seen(self, spatial_shapes: SpatialShapes) -> list[Tensor]:
        """Mark the keys of each scale that are computed for each query: bool [B, H, N, height · width]."""
        blocks = torch.arange(self.order.shape[2], device=self.order.device) // self.block
        of_query = torch.empty_like(self.order).scatter_(2, self.order, blocks.expand(self.order.shape))
        masks = []
        for s, (height, width) in enumerate(spatial_shapes):
            x, y = cell_coordinates(height, width, like=self.windows)
            x0, y0, x1, y1 = (edge.gather(2, of_query)[..., None] for edge in self.windows[..., s, :].unbind(-1))
            masks.append((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))
        return masks


def plan(inputs: AttentionInputs, block: int = BLOCK) -> Plan:
    """Plan what the kernels compute of some inputs; in float32, or in center's float64.

    A window also ends at the image's edge (valid_shapes).

    Args:
        inputs: with a mass_tolerance in (0, 1).
        block: queries of a block.
    """
    dtype = torch.promote_types(inputs.center.dtype, torch.float32)
    tensors = inputs.query, inputs.key, inputs.center, inputs.precision
    query, key, center, precision = (tensor.detach().to(dtype) for tensor in tensors)
    shapes, valid_shapes = inputs.spatial_shapes, inputs.valid_shapes
    shape = (*query.shape[:3], len(shapes), 2)
    center, precision = center.expand(shape), precision.expand(shape)
    order = order_of(center, shapes, block)
    padding = ignored_keys(shapes, valid_shapes, inputs.key_padding_mask)
    keys = key.split(inputs.keys_per_scale(), 2)
    windows = []
    for s, (height, width) in enumerate(shapes):
        size = torch.tensor([width, height], device=center.device).expand(query.shape[0], 2)
        if valid_shapes is not None:
            size = torch.minimum(valid_shapes[:, s].flip(-1).clamp(min=0), size)
        edges = query_windows(
            query, keys[s], center[..., s, :], precision[..., s, :], (height, width), size,
            padding[s], inputs.scale, inputs.mass_tolerance,
        )  # fmt: skip
        windows.append(block_windows(edges, order, size, block))
    return Plan(order, torch.stack(windows, 3), block)


def order_of(center: Tensor, spatial_shapes: SpatialShapes, block: int) -> Tensor:
    """Order [B, H, N] by place in the largest grid: strips about as high as blocks are wide, to the right and back."""
    cells = [height * width for height, width in spatial_shapes]
    widest = cells.index(max(cells))
    height, width = spatial_shapes[widest]
    x, y = center[..., widest, :].nan_to_num(nan=0.0).unbind(-1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    blocks = -(-x.shape[-1] // block)
    strips = max(math.floor(math.sqrt(blocks * height / width) + 0.5), 1)
    lowest, highest = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    strip = ((y - lowest) / (highest - lowest + 1e-6) * strips).floor().clamp(max=strips - 1)
    place = strip * width + torch.where(strip % 2 == 1, width - 1 - x, x)
    return place.argsort(dim=-1, stable=True)


def query_windows(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, height · width, D]: the keys of one scale
    center: Tensor,  # [B, H, N, 2]
    precision: Tensor,  # [B, H, N, 2]
    grid: tuple[int, int],  # (height, width)
    size: Tensor,  # [B, 2], (width, height) of the image in it
    padding: Tensor | None,  # [B, height · width]
    scale: float,
    mass_tolerance: float,
) -> Tensor:
    """(x0, y0, x1, y1) of each query at one scale, [B, H, N, 4], before they are cut to the grid."""
    nearest = nearest_cells(center, size)
    t = thresholds(query, key, center, precision, nearest, grid, size, padding, scale, mass_tolerance)
    before, behind = reach(precision, center - nearest, t)
    # A quarter of a cell on each side covers the rounding of `reach`.
    return torch.cat(((nearest - before - 0.25).ceil(), (nearest + behind + 0.25).floor() + 1), -1)


def nearest_cells(center: Tensor, size: Tensor) -> Tensor:
    """k*: for each query the image's cell nearest to its centre, [B, H, N, 2]; (0, 0) where that is not a number."""
    inside = torch.minimum(center.nan_to_num(nan=0.0), size[:, None, None] - 1).clamp(min=0)
    nearest = (inside + 0.5).floor()
    # Of the number just below a half the sum is rounded up.
    return nearest - (inside < nearest - 0.5).to(center.dtype)


def thresholds(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, height · width, D]
    center: Tensor,  # [B, H, N, 2]
    precision: Tensor,  # [B, H, N, 2]
    nearest: Tensor,  # [B, H, N, 2]
    grid: tuple[int, int],  # (height, width)
    size: Tensor,  # [B, 2]
    padding: Tensor | None,  # [B, height · width]
    scale: float,
    mass_tolerance: float,
) -> Tensor:
    """t [B, H, N]: the cells with g_x > t or g_y > t may be left out. Infinite where nothing is known."""
    height, width = grid
    log_tolerance = -math.log(mass_tolerance)
    squared = key.square().sum(-1)
    if padding is not None:
        squared = squared.masked_fill(padding[:, None], 0.0)
    largest_norm = squared.nan_to_num(nan=math.inf).amax(-1, keepdim=True).sqrt()
    # 1 % covers the rounding of norms and logits.
    bound = 1.01 * abs(scale) * query.norm(dim=-1) * largest_norm

    index = (nearest[..., 1] * width + nearest[..., 0]).long()
    nearest_key = key.gather(2, index[..., None].expand_as(query))
    cells = size.prod(-1)[:, None, None].to(center.dtype)
    outside = torch.minimum(cells_outside(precision, log_tolerance), cells).clamp(min=1.0)
    t = log_tolerance + outside.log() + bound - scale * (query * nearest_key).sum(-1) + 0.004

    known = (center.abs() < 1e6).all(-1) & (t < 1e9)
    # A head whose priors are all wide computes everything: the kernels don't even survey its keys.
    falls = precision * torch.tensor([width**2, height**2], device=precision.device)
    known &= (falls > log_tolerance).any(-1).any(-1, keepdim=True)
    if padding is not None:
        known &= ~padding[:, None].expand(*index.shape[:2], -1).gather(2, index)
    return t.masked_fill(~known, math.inf)


def cells_outside(precision: Tensor, log_tolerance: float) -> Tensor:
    """M: e^t Σ e^-(g_x + g_y) over the cells with g_x > t or g_y > t is at most this, [..., 2] → [...]."""
    precision = precision.clamp(min=1e-20)
    falling = -torch.expm1(-2.0 * (precision * log_tolerance).sqrt())
    along, across = 2.0 / falling, 2.0 + (math.pi / precision).sqrt()
    return along[..., 0] * across[..., 1] + along[..., 1] * across[..., 0]


def reach(
    precision: Tensor,  # [..., 2]
    distance: Tensor,  # [..., 2], of the centre from the nearest cell
    t: Tensor,  # [...]
) -> tuple[Tensor, Tensor]:
    """Distances before and behind the nearest cell within which g = p ((x - c)² - d²) ≤ t may hold: two [..., 2]."""
    ratio = t[..., None] / precision.clamp(min=1e-20)
    far = (distance.square() + ratio).sqrt() + distance.abs()
    # √(d² + t/p) - |d|, which would cancel for a centre far outside.
    near = ratio / far
    near, far = near.nan_to_num(nan=1e9).clamp(max=1e9), far.nan_to_num(nan=1e9).clamp(max=1e9)
    return torch.where(distance > 0, near, far), torch.where(distance > 0, far, near)


def block_windows(edges: Tensor, order: Tensor, size: Tensor, block: int) -> Tensor:
    """The smallest windows, cut to the image, of each block of queries: [B, H, blocks, 4] int64."""
    edges = edges.gather(2, order[..., None].expand(*order.shape, 4))
    size = size[:, None]
    windows = []
    for part in edges.split(block, 2):
        end = torch.minimum(part[..., 2:].amax(2).clamp(max=2**31).long(), size)
        first = part[..., :2].amin(2).clamp(min=0, max=2**31).long()
        windows.append(torch.cat((torch.minimum(first, end), end), -1))
    return torch.stack(windows, 2)
