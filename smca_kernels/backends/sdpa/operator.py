"""The portable backend: torch's own scaled_dot_product_attention, the prior as extra columns of queries and keys.

    logG[k] = Σ_axis -p (x_k - c)²  =  Σ_columns coefficient(query) · feature(key)  +  a constant of the row

with the features -x², 2x of both axes and 1, so that softmax(scale · q·k + logG) is plain attention of widened queries
to widened keys. Coefficients are split into terms that add up exactly: plain ones leave in every score the rounding of
large terms that cancel (docs/sdpa.md).

The backward recomputes P in blocks of queries instead of asking SDPA's own: the gradients of center and precision are
moments of dS around each query's own center, and columns give moments around the grid's middle, where terms a thousand
times as large cancel after they were rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention

from smca_kernels.backends.reference import SpatialShapes, cell_coordinates, ignored_keys
from smca_kernels.backends.sdpa.columns import (
    HALF_DTYPES,
    IGNORED_FEATURE,
    exact_dtype,
    key_features,
    query_coefficients,
    valid_ranges,
)

DENSE_LIMIT = 2**14  # scores; up to here a bias of queries × keys costs less than widened keys
CPU_BLOCK = 2**19  # scores of a block, a thread
DEVICE_BLOCK = 2**24
# Far keys' probabilities must not become subnormal numbers, with which CPUs compute up to 100 times slower.
LOWEST_LOGIT = {torch.float32: -70.0, torch.float64: -650.0}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    spatial_shapes: SpatialShapes,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    mass_tolerance: float = 0.0,
) -> Tensor:
    """The backend "sdpa"; arguments as in `smca_kernels.smca_attention`, already validated."""
    if dropout_p > 0.0:
        # Only SDPA knows what it dropped, so its own backward has to follow, in float32 for the columns' sake.
        outputs = _widened(
            query, key, value, center, precision, spatial_shapes, valid_shapes, key_padding_mask, dropout_p, scale,
            _wide_dtype(query),
        )  # fmt: skip
        return _combined(outputs, scale_weights).to(query.dtype)
    tensors = (query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask)
    out: Tensor
    if _is_traced(query):
        out = _forward_operator(*tensors, _flat(spatial_shapes), scale)
    else:
        out = _Attention.apply(*tensors, spatial_shapes, scale)
    return out


def _is_traced(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def unsupported(query: Tensor, *_: object) -> str | None:
    """Why SDPA can't serve these inputs, or None if it can."""
    if query.shape[0] == 0 or query.shape[2] == 0:
        return f"needs at least one image and one query; query is {list(query.shape)}"
    return None


# -------------------------------------------------------------------------------------------------------------- forward


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    shapes: SpatialShapes,
    scale: float,
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    if batch * heads * queries * keys <= DENSE_LIMIT:
        outputs = _dense(query, key, value, center, precision, shapes, valid_shapes, key_padding_mask, scale)
        out = _combined(outputs, scale_weights)
        return out if out.dtype == query.dtype else out.to(query.dtype)
    dtype = _forward_dtype(query, shapes)
    out = torch.empty_like(query)
    some = _heads_at_once(batch, heads, queries, keys * 2 * head_dim, query.device)
    for first in range(0, heads, some):
        group = slice(first, first + some)
        q, k, v, c, p = (
            tensor if tensor.shape[1] == 1 else tensor[:, group] for tensor in (query, key, value, center, precision)
        )
        outputs = _widened(q, k, v, c, p, shapes, valid_shapes, key_padding_mask, 0.0, scale, dtype)
        weights = scale_weights
        if weights is not None and weights.shape[1] > 1:
            weights = weights[:, group]
        out[:, group] = _combined(outputs, weights)
    return out


def _heads_at_once(batch: int, heads: int, queries: int, numbers: int, device: torch.device) -> int:
    """How many heads to widen together: few, so that their copies stay in a CPU's cache, but work for every thread."""
    if device.type != "cpu":
        return heads
    threads = torch.get_num_threads()
    busy = -(-8 * threads // (batch * -(-queries // 32)))  # SDPA's threads share blocks of 32 queries or more
    return min(heads, max(CPU_BLOCK * threads // (batch * numbers), busy, 1))


def _wide_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _forward_dtype(query: Tensor, shapes: SpatialShapes) -> torch.dtype:
    """In which SDPA computes. Half precision is slower on a CPU, and has no exact coordinates beyond ±255."""
    if query.dtype in HALF_DTYPES and (query.device.type == "cpu" or max(map(max, shapes)) > 511):
        return torch.float32
    return query.dtype


def _combined(outputs: list[Tensor], scale_weights: Tensor | None) -> Tensor:
    """Σ_s α_s O_s (Eq. 7–9)."""
    if scale_weights is not None:
        outputs = [output * _part(scale_weights, 3, s, 1) for s, output in enumerate(outputs)]
    out = outputs[0]
    for output in outputs[1:]:
        out = out + output
    return out


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    shapes: SpatialShapes,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """O_s of each scale [B, H, N, D] with logG as SDPA's mask, for a few scores."""
    dtype = _wide_dtype(query)
    if query.dtype != dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    ignored = ignored_keys(shapes, valid_shapes, key_padding_mask)
    outputs, start = [], 0
    for s, cells in enumerate(_cells(shapes, dtype, query.device)):
        distance = cells - _part(center, 3, s, 1)  # [B, H or 1, N, height · width, 2]
        bias = torch.linalg.vecdot(distance * _part(precision, 3, s, 1), distance).neg_()
        mask = ignored[s]
        if mask is not None:
            bias = bias.masked_fill(mask[:, None, None], -torch.inf)
        keys = cells.shape[0]
        k, v = _part(key, 2, start, keys), _part(value, 2, start, keys)
        output = scaled_dot_product_attention(query, k, v, bias, scale=scale)
        outputs.append(output if mask is None else _zero_where(mask.all(1), output))
        start += keys
    return outputs


def _part(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`narrow` that costs nothing where it is the whole tensor."""
    return tensor if tensor.shape[dim] == length else tensor.narrow(dim, start, length)


@lru_cache(maxsize=64)
def _cells(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(x, y) of every cell of each grid, row-major [height · width, 2]."""
    with torch.inference_mode(False):
        like = torch.empty(0, dtype=dtype, device=device)
        return [torch.stack(cell_coordinates(*shape, like=like), -1) for shape in shapes]


def _widened(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    shapes: SpatialShapes,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """O_s of each scale [B, H, N, D] by widened queries and keys, computed in `dtype`."""
    batch, heads, queries, head_dim = query.shape
    build = key_features.__wrapped__ if _is_traced(query) else key_features
    table = build(shapes, dtype, query.device)
    features, lowest, highest = table.columns.expand(batch, heads, -1, -1), table.lowest, table.highest
    ignored = ignored_keys(shapes, valid_shapes, key_padding_mask)
    masks = [mask for mask in ignored if mask is not None]
    if masks:
        column = torch.cat(masks, 1)[:, None, :, None] * IGNORED_FEATURE[dtype]
        features = torch.cat([column.to(dtype).expand(-1, heads, -1, -1), features[..., 1:]], -1)
        lowest, highest = valid_ranges(masks, shapes, lowest.dtype)
    coefficients = query_coefficients(center, precision, table, lowest, highest, dtype).expand(-1, heads, -1, -1, -1)
    q, k, v = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    if head_dim % 8:  # fused kernels on a GPU want multiples of 8
        q, k, v = (pad(tensor, (0, -head_dim % 8)) for tensor in (q, k, v))
    q = torch.cat([coefficients, q.unsqueeze(3).expand(-1, -1, -1, len(shapes), -1)], -1)
    # Products with fewer rows than 8 are summed in an order in which the terms are not exact.
    q = pad(q, (0, 0, 0, 0, 0, -queries % 8))
    # Fused kernels want keys and values of equal width: the values' surplus columns are whatever stands before them.
    features_keys_values = torch.cat([features, k, v], -1)
    k = features_keys_values.narrow(3, 0, q.shape[-1])
    v = features_keys_values.narrow(3, k.shape[-1] - table.columns.shape[1], q.shape[-1])
    outputs, start = [], 0
    for s, (height, width) in enumerate(shapes):
        k_s, v_s = k.narrow(2, start, height * width), v.narrow(2, start, height * width)
        output = scaled_dot_product_attention(q.select(3, s), k_s, v_s, dropout_p=dropout_p, scale=1.0)
        output = output[:, :, :queries, table.columns.shape[1] :][..., :head_dim]
        outputs.append(_zero_where(masks[s].all(1), output) if masks else output)
        start += height * width
    return outputs


def _zero_where(empty: Tensor, output: Tensor) -> Tensor:
    return output.masked_fill(empty[:, None, None, None], 0.0)


# ------------------------------------------------------------------------------------------------------------- backward


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    shapes: SpatialShapes,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs; that of absent scale_weights is empty.

    dS = α P (dP - Σ P dP) with dP = dO·v,     dp = -Σ dS (x - c)²,     dc = 2 p Σ dS (x - c)
    """
    batch, heads, queries, _ = query.shape
    dtype = _wide_dtype(query)
    q, k, v, grad = (_of_every_head(tensor, heads, dtype) for tensor in (query, key, value, grad_out))
    q = q * scale
    weights = None if scale_weights is None else _of_every_head(scale_weights, heads, dtype)
    grad_weights = q.new_empty(0) if weights is None else torch.empty_like(weights)
    sums = _Sums(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), grad_weights)
    ignored = [
        None if mask is None else mask.repeat_interleave(heads, 0).unsqueeze(1)
        for mask in ignored_keys(shapes, valid_shapes, key_padding_mask)
    ]
    few = batch * heads * queries * key.shape[2] <= DENSE_LIMIT
    prior = _backward_dense if few else _backward_in_blocks
    grad_center, grad_precision = prior(q, k, v, grad, weights, center, precision, ignored, shapes, sums)

    def shaped(gradient: Tensor, like: Tensor) -> Tensor:
        gradient = gradient.view(batch, heads, *like.shape[2:])
        if like.shape[1] < heads:
            gradient = gradient.sum(1, keepdim=True)
        return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)

    return (
        shaped(sums.query.mul_(scale), query), shaped(sums.key, key), shaped(sums.value, value),
        shaped(grad_center, center), shaped(grad_precision, precision),
        grad_weights if scale_weights is None else shaped(grad_weights, scale_weights),
    )  # fmt: skip


def _of_every_head(tensor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, H or 1, ...] → [B · H, ...]."""
    if tensor.shape[1] < heads:
        tensor = tensor.expand(-1, heads, *tensor.shape[2:])
    tensor = tensor.flatten(0, 1)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _Sums(NamedTuple):
    """Gradients that blocks of queries and keys add to."""

    query: Tensor  # [B · H, N, D], of the scaled queries
    key: Tensor  # [B · H, T, D]
    value: Tensor  # [B · H, T, D]
    weights: Tensor  # [B · H, N, S]; empty without scale weights

    def add(
        self,
        room: Tensor,  # [3, heads or tiles, n, keys]: -logG, and space for two more
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor,
        weights: Tensor | None,
        ignore: Tensor | None,
        block: tuple[slice, slice, slice, int],  # heads, queries, keys, scale
    ) -> tuple[Tensor, Tensor]:
        """Add what a block gives: all keys of a scale for some heads, or for one head in tiles.

        Returns dS without a factor [heads or tiles, n, keys], and that factor of each row [heads, n, 1].
        """
        h, n, t, s = block
        scores, grad_p, grad_s = room
        batch = scores.shape[0]
        is_tiled = batch > h.stop - h.start

        def per_tile(keys: Tensor) -> Tensor:
            return keys.view(batch, -1, keys.shape[-1]) if is_tiled else keys

        def over_tiles(rows: Tensor) -> Tensor:
            return rows.sum(0, keepdim=True) if is_tiled else rows

        q, grad, k, v = q[h, n], grad[h, n], per_tile(k[h, t]), per_tile(v[h, t])
        scores.baddbmm_(q.expand(batch, -1, -1), k.transpose(1, 2), beta=-1)
        if ignore is not None:
            ignore = ignore[h].view(batch, 1, -1) if is_tiled else ignore[h]
            scores.masked_fill_(ignore, -torch.inf)
        highest = scores.amax(-1, keepdim=True)
        scores.sub_(highest.amax(0, keepdim=True) if is_tiled else highest)
        if scores.device.type == "cpu" and scores.numel() > DENSE_LIMIT:
            scores.clamp_(min=LOWEST_LOGIT[scores.dtype])
        p_s = scores.exp_()  # but for the factor 1 / total
        if ignore is not None:
            p_s.masked_fill_(ignore, 0.0)
        total = over_tiles(p_s.sum(-1, keepdim=True))
        factor = total.clamp_(min=1.0).reciprocal_()  # it is less than 1 only where every key is ignored
        torch.bmm(grad.expand(batch, -1, -1), v.transpose(1, 2), out=grad_p)
        torch.mul(p_s, grad_p, out=grad_s)
        delta = over_tiles(grad_s.sum(-1, keepdim=True)) * factor
        grad_s.addcmul_(p_s, delta, value=-1)
        if weights is not None:
            self.weights[h, n, s : s + 1] = delta
            factor *= weights[h, n, s : s + 1]
        per_tile(self.value[h, t]).baddbmm_(p_s.transpose(1, 2), (grad * factor).expand(batch, -1, -1))
        per_tile(self.key[h, t]).baddbmm_(grad_s.transpose(1, 2), (q * factor).expand(batch, -1, -1))
        self.query[h, n].addcmul_(over_tiles(torch.bmm(grad_s, k)), factor)
        return grad_s, factor


def _backward_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    weights: Tensor | None,
    center: Tensor,
    precision: Tensor,
    ignored: list[Tensor | None],
    shapes: SpatialShapes,
    sums: _Sums,
) -> tuple[Tensor, Tensor]:
    """Gradients of center and precision [B · H, N, S, 2] by distances of queries × keys, for a few scores."""
    every, queries, _ = q.shape
    heads = every // len(center)
    center, precision = (_of_every_head(tensor, heads, q.dtype) for tensor in (center, precision))
    grad_center, grad_precision, start = [], [], 0
    for s, cells in enumerate(_cells(shapes, q.dtype, q.device)):
        p, keys = _part(precision, 2, s, 1), cells.shape[0]
        distance = cells - _part(center, 2, s, 1)  # [B · H, N, keys, 2]
        room = q.new_empty(3, *distance.shape[:-1])
        torch.linalg.vecdot(distance * p, distance, out=room[0])
        block = slice(0, every), slice(0, queries), slice(start, start + keys), s
        grad_s, factor = sums.add(room, q, k, v, grad, weights, ignored[s], block)
        grad_s, distance = grad_s.view(-1, 1, keys), distance.flatten(0, 1)
        factor = factor.unsqueeze(-1)
        grad_center.append(torch.bmm(grad_s, distance).view(p.shape).mul_(p).mul_(factor).mul_(2.0))
        grad_precision.append(torch.bmm(grad_s, distance.mul_(distance)).view(p.shape).mul_(factor).neg_())
        start += keys
    return torch.cat(grad_center, 2), torch.cat(grad_precision, 2)


def _backward_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    weights: Tensor | None,
    center: Tensor,
    precision: Tensor,
    ignored: list[Tensor | None],
    shapes: SpatialShapes,
    sums: _Sums,
) -> tuple[Tensor, Tensor]:
    """Gradients of center and precision [B · H, N, S, 2] without a tensor of queries × keys.

    Sums over x need dS summed over y only, and the other way round: queries × (width + height).
    """
    every, queries, _ = q.shape
    heads = every // len(center)
    exact = exact_dtype(q.device)
    axes = _axes(shapes, exact, q.device)
    total = axes.total.to(q.dtype)
    center, precision = (_of_every_head(tensor, heads, exact).flatten(2) for tensor in (center, precision))
    grad_center, grad_precision = (q.new_empty(every, queries, 2 * len(shapes)) for _ in range(2))
    limit = _block_limit(q.device)
    # Reused from block to block: fresh memory would cost a page fault every 4 KiB.
    most = max(height * width for height, width in shapes)
    workspace = q.new_empty(3, max(most, min(limit, every * queries * most)))
    some = max(1, limit // 4 // (queries * len(axes.coordinate)))
    for first in range(0, every, some):
        group = slice(first, min(first + some, every))
        index = axes.of_coordinate.expand(group.stop - first, queries, -1)
        p, c = (tensor[group].gather(2, index) for tensor in (precision, center))
        distance = axes.coordinate - c  # [heads of the group, N, Σ width + height]
        # Rounded to q's dtype only where it is small, near the center.
        prior = (distance * distance).mul_(p)
        p, distance = p.to(q.dtype), distance.to(q.dtype)
        over_other = torch.empty_like(p)  # dS summed over the other axis
        for s, (height, width) in enumerate(shapes):
            keys, columns, rows = axes.slices[s]
            prior_x, prior_y = (
                (part - part.amin(-1, keepdim=True)).to(q.dtype) for part in (prior[..., columns], prior[..., rows])
            )
            for h, n in _blocks(group.stop - first, queries, height * width, limit):
                tiles = _tiles(height, width) if h.stop - h.start == 1 else 1
                size = tiles * (h.stop - h.start), n.stop - n.start, height * width // tiles
                room = workspace[:, : math.prod(size)].view(3, *size)
                # [heads, n, tiles, rows of a tile], of which heads or tiles are 1, and [heads, n, 1, width]
                of_rows, of_columns = prior_y[h, n].unflatten(2, (tiles, -1)), prior_x[h, n].unsqueeze(2)
                grid = room[0].unflatten(2, (-1, width))
                torch.add(of_rows.transpose(1, 2).flatten(0, 1).unsqueeze(3), of_columns, out=grid)
                block = slice(first + h.start, first + h.stop), n, keys, s
                grad_s, factor = sums.add(room, q, k, v, grad, weights, ignored[s], block)
                grid = grad_s.unflatten(2, (-1, width)).unflatten(0, (-1, tiles))  # [heads, tiles, n, rows, width]
                over_other[h, n, columns] = grid.sum(3).sum(1) * factor
                over_other[h, n, rows] = grid.sum(4).transpose(1, 2).flatten(2) * factor
        over_other *= distance
        torch.matmul(over_other * p, total * 2, out=grad_center[group])
        torch.matmul(over_other.mul_(distance), -total, out=grad_precision[group])
    shape = every, queries, len(shapes), 2
    return grad_center.view(shape), grad_precision.view(shape)


@lru_cache(maxsize=64)
def _tiles(height: int, width: int) -> int:
    """Into how many tiles of whole rows to cut a grid, for products with rows of 2 KiB or less.

    Long rows lie on a page of memory each, which makes writing a product slow on some machines.
    """
    rows = next(rows for rows in range(height, 0, -1) if height % rows == 0 and (rows == 1 or rows * width <= 512))
    return height // rows


class _Axes(NamedTuple):
    """The columns and the rows of each grid, one scale after the other, along one dimension of Σ width + height."""

    coordinate: Tensor  # [Σ width + height]
    of_coordinate: Tensor  # [Σ width + height]: axis 2 s for a column, 2 s + 1 for a row of scale s
    total: Tensor  # [Σ width + height, 2 S]: 1 for the axis that a coordinate is of
    slices: list[tuple[slice, slice, slice]]  # of each scale: keys, columns, rows


@lru_cache(maxsize=64)
def _axes(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> _Axes:
    with torch.inference_mode(False):
        sizes = [size for height, width in shapes for size in (width, height)]
        coordinate = torch.cat([torch.arange(size, dtype=dtype, device=device) for size in sizes])
        repeats = torch.tensor(sizes, device=device)
        of_coordinate = torch.arange(len(sizes), device=device).repeat_interleave(repeats)
        slices, key, place = [], 0, 0
        for height, width in shapes:
            columns, rows = slice(place, place + width), slice(place + width, place + width + height)
            slices.append((slice(key, key + height * width), columns, rows))
            key, place = key + height * width, rows.stop
        return _Axes(coordinate, of_coordinate, one_hot(of_coordinate, len(sizes)).to(dtype), slices)


def _block_limit(device: torch.device) -> int:
    """Most scores of a block: few enough for a CPU's cache, where they are read several times."""
    return min(CPU_BLOCK * torch.get_num_threads(), 2**22) if device.type == "cpu" else DEVICE_BLOCK


def _blocks(heads: int, queries: int, keys: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cover [heads, queries] with blocks of up to `limit` scores with all keys: several heads, or a part of one."""
    some_heads = min(heads, max(1, limit // (queries * keys)))
    parts = 1 if some_heads > 1 else -(-queries // max(1, limit // keys))
    some_queries = -(-queries // parts)
    for h in range(0, heads, some_heads):
        for n in range(0, queries, some_queries):
            yield slice(h, min(h + some_heads, heads)), slice(n, min(n + some_queries, queries))


# ------------------------------------------------------------------------------------------------ operator and autograd


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor center, Tensor precision, Tensor? scale_weights, "
    "Tensor? valid_shapes, Tensor? key_padding_mask, SymInt[] spatial_shapes, float scale"
)


@torch.library.custom_op("smca_kernels::sdpa_forward", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def _forward_operator(*inputs: Any) -> Tensor:
    *tensors, sizes, scale = inputs
    return _forward(*(*tensors, _pairs(sizes), scale)).contiguous()  # as its fake is


@torch.library.custom_op(
    "smca_kernels::sdpa_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_operator(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, sizes, scale = inputs
    return tuple(gradient.contiguous() for gradient in _backward(*(*tensors, _pairs(sizes), scale)))


@_forward_operator.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@_backward_operator.register_fake
def _(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    scale_weights = inputs[0].new_empty(0) if inputs[5] is None else inputs[5]
    return tuple(tensor.new_empty(tensor.shape) for tensor in (*inputs[:5], scale_weights))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shapes, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _wanted(ctx, _backward_operator(grad_out, *ctx.saved_tensors, ctx.shapes, ctx.scale))


def _wanted(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    pairs = zip(gradients, ctx.needs_input_grad[:6], strict=True)
    return *(gradient if is_wanted else None for gradient, is_wanted in pairs), *(None,) * 4


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "smca_attention: backend 'sdpa' has no double backward; use backend='reference' for second derivatives"
    )


_forward_operator.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward_operator.register_autograd(_refuse)


class _Attention(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than a small call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_for_backward(ctx, inputs, inputs[0])
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of this backward is wanted, which the operator's refuses to be
            ctx.shapes = _flat(ctx.shapes)
            return _differentiate(ctx, grad_out)
        return _wanted(ctx, _backward(*(grad_out, *ctx.saved_tensors, ctx.shapes, ctx.scale)))


def _flat(shapes: SpatialShapes) -> list[int]:
    return [size for shape in shapes for size in shape]


def _pairs(sizes: Sequence[int]) -> SpatialShapes:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))
