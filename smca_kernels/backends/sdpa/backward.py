"""Backward pass of the portable backend, with P recomputed in blocks of queries.

    dS = α P (dP - Σ P dP) with dP = dO·v,     dp = -Σ dS (x - n) (x + n - 2c),     dc = 2 p Σ dS (x - n)

As Σ dS = 0, moments around any origin do; n, the cell nearest to the center c, leaves no large terms to cancel.
SDPA's own backward would not do: its widened columns give moments around the grid's middle, where terms a thousand
times as large cancel after they were rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from smca_kernels.autocast import autocast_off
from smca_kernels.backends.reference import ignored_keys
from smca_kernels.backends.sdpa.columns import exact_dtype
from smca_kernels.backends.sdpa.forward import (
    CPU_BLOCK,
    DEVICE_BLOCK,
    MAX_DENSE_SCORES,
    full_dtype,
    grid_cells,
    keys_and_values,
    narrow,
    nearest_cells,
)
from smca_kernels.backends.sdpa.tables import kept_on_device
from smca_kernels.backends.sdpa.threads import share_out
from smca_kernels.inputs import AttentionInputs, SpatialShapes

# Far keys' probabilities must not become subnormal numbers, with which CPUs compute up to 100 times slower.
MIN_LOGIT = {torch.float32: -70.0, torch.float64: -650.0}
# Channels that are summed at once: a CPU adds up a product's terms one by one, and its error grows with their number.
MAX_SUM = 16


def backward(grad_out: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors of the inputs; that of absent scale_weights is empty."""
    query, center, precision, scale_weights = inputs.query, inputs.center, inputs.precision, inputs.scale_weights
    batch, heads, queries, _ = query.shape
    gradients = GradientAccumulator(grad_out, inputs)
    is_dense = batch * heads * queries * inputs.key.shape[2] <= MAX_DENSE_SCORES
    with autocast_off(query.device.type):  # of a caller whose backward is inside of its region
        grad_center, grad_precision = (backward_dense if is_dense else backward_in_blocks)(gradients, inputs)

    def shaped(gradient: Tensor, like: Tensor) -> Tensor:
        gradient = gradient.view(batch, heads, *like.shape[2:])
        if like.shape[1] < heads:
            gradient = gradient.sum(1, keepdim=True)
        return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)

    grad_weights = gradients.grad_weights
    return (
        shaped(gradients.grad_q.mul_(inputs.scale), query),
        shaped(gradients.grad_k, inputs.key),
        shaped(gradients.grad_v, inputs.value),
        shaped(grad_center, center),
        shaped(grad_precision, precision),
        grad_weights if scale_weights is None else shaped(grad_weights, scale_weights),
    )


def merge_heads(tensor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, H or 1, ...] → [B · H, ...]."""
    if tensor.shape[1] < heads:
        tensor = tensor.expand(-1, heads, *tensor.shape[2:])
    tensor = tensor.flatten(0, 1)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class GradientAccumulator:
    """Operands of the backward with batch and heads merged, and the gradients that blocks of them add up to."""

    def __init__(self, grad_out: Tensor, inputs: AttentionInputs) -> None:
        heads, dtype = inputs.query.shape[1], full_dtype(inputs.query)
        self.ignored_keys = ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
        key, value = keys_and_values(inputs, self.ignored_keys)
        q, self.k, self.v, self.grad = (
            merge_heads(tensor, heads, dtype) for tensor in (inputs.query, key, value, grad_out)
        )
        self.q = q * inputs.scale  # [B · H, N, D]
        weights = inputs.scale_weights
        self.weights = None if weights is None else merge_heads(weights, heads, dtype)  # [B · H, N, S]
        # per scale [B · H, 1, height · width]
        self.ignored = [
            None if mask is None else mask[:, None, None].expand(-1, heads, -1, -1).flatten(0, 1)
            for mask in self.ignored_keys
        ]
        self.grad_q = torch.zeros_like(q)  # [B · H, N, D], of the scaled queries
        self.grad_k = torch.zeros_like(self.k)  # [B · H, T, D]
        self.grad_v = torch.zeros_like(self.v)  # [B · H, T, D_v]
        self.grad_weights = q.new_empty(0) if self.weights is None else torch.empty_like(self.weights)

    def add(
        self,
        workspace: Tensor,  # [3, heads or tiles, n, keys]: logG, and space for two more
        block: tuple[slice, slice, slice, int],  # heads, queries, keys, scale
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of a block: all keys of a scale for some heads, or for one head in tiles.

        Returns dS without a factor [heads or tiles, n, keys], and that factor of each row [heads, n, 1].
        """
        h, n, t, s = block
        scores, grad_p, grad_s = workspace
        batch = scores.shape[0]
        is_tiled = batch > h.stop - h.start

        def per_tile(keys: Tensor) -> Tensor:
            return keys.view(batch, -1, keys.shape[-1]) if is_tiled else keys

        def over_tiles(rows: Tensor) -> Tensor:
            return rows.sum(0, keepdim=True) if is_tiled else rows

        q, grad, k, v = self.q[h, n], self.grad[h, n], per_tile(self.k[h, t]), per_tile(self.v[h, t])
        channels = MAX_SUM if scores.is_cpu else q.shape[2]
        for q_part, k_part in zip(q.split(channels, -1), k.split(channels, -1), strict=True):
            scores.baddbmm_(q_part.expand(batch, -1, -1), k_part.transpose(1, 2))
        ignored = self.ignored[s]
        if ignored is not None:
            ignored = ignored[h].view(batch, 1, -1) if is_tiled else ignored[h]
            scores.masked_fill_(ignored, -torch.inf)
        highest = scores.amax(-1, keepdim=True)
        scores.sub_(highest.amax(0, keepdim=True) if is_tiled else highest)
        if scores.device.type == "cpu" and scores.numel() > MAX_DENSE_SCORES:
            scores.clamp_(min=MIN_LOGIT[scores.dtype])
        p_s = scores.exp_()  # but for the factor 1 / total
        if ignored is not None:
            p_s.masked_fill_(ignored, 0.0)
        total = over_tiles(p_s.sum(-1, keepdim=True))
        factor = total.clamp_(min=1.0).reciprocal_()  # it is less than 1 only where every key is ignored
        torch.bmm(grad.expand(batch, -1, -1), v.transpose(1, 2), out=grad_p)
        torch.mul(p_s, grad_p, out=grad_s)
        delta = over_tiles(grad_s.sum(-1, keepdim=True)) * factor
        grad_s.addcmul_(p_s, delta, value=-1)
        if self.weights is not None:
            self.grad_weights[h, n, s : s + 1] = delta
            factor *= self.weights[h, n, s : s + 1]
        per_tile(self.grad_v[h, t]).baddbmm_(p_s.transpose(1, 2), (grad * factor).expand(batch, -1, -1))
        per_tile(self.grad_k[h, t]).baddbmm_(grad_s.transpose(1, 2), (q * factor).expand(batch, -1, -1))
        self.grad_q[h, n].addcmul_(over_tiles(torch.bmm(grad_s, k)), factor)
        return grad_s, factor


def backward_dense(gradients: GradientAccumulator, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Gradients of center and precision [B · H, N, S, 2] by distances of queries × keys, for a few scores."""
    q, heads, shapes = gradients.q, inputs.query.shape[1], inputs.spatial_shapes
    batch_heads, queries, _ = q.shape
    nearest, mirrored = (
        merge_heads(tensor, heads, q.dtype)
        for tensor in nearest_cells(inputs.center, gradients.ignored_keys, shapes, q.dtype)
    )
    precision = merge_heads(inputs.precision, heads, q.dtype)
    grad_center, grad_precision, start = [], [], 0
    for s, cells in enumerate(grid_cells(shapes, q.dtype, q)):
        p, keys = narrow(precision, 2, s, 1), cells.shape[0]
        behind = narrow(nearest, 2, s, 1) - cells  # [B · H, N, keys, 2]
        product = behind * (cells + narrow(mirrored, 2, s, 1))
        workspace = q.new_empty(3, *behind.shape[:-1])
        torch.linalg.vecdot(product, p, out=workspace[0])
        block = slice(0, batch_heads), slice(0, queries), slice(start, start + keys), s
        grad_s, factor = gradients.add(workspace, block)
        grad_s, factor = grad_s.view(-1, 1, keys), factor.unsqueeze(-1)
        grad_center.append(torch.bmm(grad_s, behind.flatten(0, 1)).view(p.shape).mul_(p).mul_(factor).mul_(-2.0))
        grad_precision.append(torch.bmm(grad_s, product.flatten(0, 1)).view(p.shape).mul_(factor))
        start += keys
    return torch.cat(grad_center, 2), torch.cat(grad_precision, 2)


def backward_in_blocks(gradients: GradientAccumulator, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Gradients of center and precision [B · H, N, S, 2] without a tensor of queries × keys.

    Sums over x need dS summed over y only, and the other way round: queries × (width + height).
    """
    q, heads, shapes = gradients.q, inputs.query.shape[1], inputs.spatial_shapes
    batch_heads, queries, _ = q.shape
    exact = exact_dtype(q.device)
    axes = grid_axes(shapes, exact, q)
    total = axes.total.to(q.dtype)
    nearest, mirrored, precision = (
        merge_heads(tensor, heads, exact).flatten(2)
        for tensor in (*nearest_cells(inputs.center, gradients.ignored_keys, shapes, exact), inputs.precision)
    )
    grad_center, grad_precision = (q.new_empty(batch_heads, queries, 2 * len(shapes)) for _ in range(2))

    def of_heads(first: int, last: int) -> None:
        limit = max_block_scores(q.device)
        # Reused from block to block: fresh memory would cost a page fault every 4 KiB.
        most_keys = max(inputs.keys_per_scale())
        workspace = q.new_empty(3, max(most_keys, min(limit, (last - first) * queries * most_keys)))
        step = max(1, limit // 4 // (queries * len(axes.coordinate)))
        for start in range(first, last, step):
            group = slice(start, min(start + step, last))
            index = axes.of_coordinate.expand(group.stop - start, queries, -1)
            origin, mirror, p = (tensor[group].gather(2, index) for tensor in (nearest, mirrored, precision))
            distance = axes.coordinate - origin  # [heads of the group, N, Σ width + height]
            product = (axes.coordinate + mirror).mul_(distance)
            prior = (product * p).to(q.dtype)
            distance, product, p = distance.to(q.dtype), product.to(q.dtype), p.to(q.dtype)
            over_other = torch.empty_like(p)  # dS summed over the other axis
            for s, (height, width) in enumerate(shapes):
                keys, columns, rows = axes.slices[s]
                prior_x, prior_y = prior[..., columns], prior[..., rows]
                for h, n in blocks_of(group.stop - start, queries, height * width, limit):
                    tiles = tiles_per_head(height, width) if h.stop - h.start == 1 else 1
                    size = tiles * (h.stop - h.start), n.stop - n.start, height * width // tiles
                    scores = workspace[:, : math.prod(size)].view(3, *size)
                    # [heads, n, tiles, rows of a tile], of which heads or tiles are 1, and [heads, n, 1, width]
                    of_rows, of_columns = prior_y[h, n].unflatten(2, (tiles, -1)), prior_x[h, n].unsqueeze(2)
                    grid = scores[0].unflatten(2, (-1, width))
                    torch.add(of_rows.transpose(1, 2).flatten(0, 1).unsqueeze(3), of_columns, out=grid)
                    grid.neg_()
                    block = slice(start + h.start, start + h.stop), n, keys, s
                    grad_s, factor = gradients.add(scores, block)
                    grid = grad_s.unflatten(2, (-1, width)).unflatten(0, (-1, tiles))  # [heads, tiles, n, rows, width]
                    over_other[h, n, columns] = grid.sum(3).sum(1) * factor
                    over_other[h, n, rows] = grid.sum(4).transpose(1, 2).flatten(2) * factor
            torch.matmul(over_other * product, -total, out=grad_precision[group])
            torch.matmul(over_other.mul_(distance).mul_(p), total * 2, out=grad_center[group])

    share_out(of_heads, batch_heads, batch_heads * queries * gradients.k.shape[1], q)
    shape = batch_heads, queries, len(shapes), 2
    return grad_center.view(shape), grad_precision.view(shape)


@lru_cache(maxsize=64)
def tiles_per_head(height: int, width: int) -> int:
    """The number of tiles of whole rows to cut a grid into, for products with rows of 2 KiB or less.

    Long rows lie on a page of memory each, which makes writing a product slow on some machines.
    """
    rows = next(rows for rows in range(height, 0, -1) if height % rows == 0 and (rows == 1 or rows * width <= 512))
    return height // rows


class GridAxes(NamedTuple):
    """The columns and the rows of each grid, one scale after the other, along one dimension of Σ width + height."""

    coordinate: Tensor  # [Σ width + height]
    of_coordinate: Tensor  # [Σ width + height]: axis 2 s for a column, 2 s + 1 for a row of scale s
    total: Tensor  # [Σ width + height, 2 S]: 1 for the axis that a coordinate is of
    slices: list[tuple[slice, slice, slice]]  # of each scale: keys, columns, rows


@kept_on_device
def grid_axes(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> GridAxes:
    """The axes of the grids, coordinates and `total` in `dtype`."""
    sizes = [size for height, width in shapes for size in (width, height)]
    coordinate = torch.cat([torch.arange(size, dtype=dtype, device=device) for size in sizes])
    repeats = torch.tensor(sizes, device=device)
    of_coordinate = torch.arange(len(sizes), device=device).repeat_interleave(repeats)
    slices, key, place = [], 0, 0
    for height, width in shapes:
        columns, rows = slice(place, place + width), slice(place + width, place + width + height)
        slices.append((slice(key, key + height * width), columns, rows))
        key, place = key + height * width, rows.stop
    return GridAxes(coordinate, of_coordinate, one_hot(of_coordinate, len(sizes)).to(dtype), slices)


def max_block_scores(device: torch.device) -> int:
    """The most scores of a block: few enough for a CPU's cache, where they are read several times."""
    return min(CPU_BLOCK * torch.get_num_threads(), 2**22) if device.type == "cpu" else DEVICE_BLOCK


def blocks_of(heads: int, queries: int, keys: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cover [heads, queries] with blocks of up to `limit` scores with all keys: several heads, or a part of one."""
    head_step = min(heads, max(1, limit // (queries * keys)))
    parts = 1 if head_step > 1 else -(-queries // max(1, limit // keys))
    query_step = -(-queries // parts)
    for h in range(0, heads, head_step):
        for n in range(0, queries, query_step):
            yield slice(h, min(h + head_step, heads)), slice(n, min(n + query_step, queries))
