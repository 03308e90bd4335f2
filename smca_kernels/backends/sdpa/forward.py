"""Forward pass of the portable backend: torch's scaled_dot_product_attention on widened queries and keys.

    logG[k] = Σ_axis -p (x_k - c)²  =  Σ_columns coefficient(query) · feature(key)  +  a constant of the row

with the features -x², 2x of both axes and 1, so that softmax(scale · q·k + logG) is plain attention of widened queries
to widened keys. Coefficients are split into terms that add up exactly: plain ones leave in every score the rounding of
large terms that cancel (docs/sdpa.md). For a few scores the prior is SDPA's mask instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from smca_kernels.backends.reference import cell_coordinates, ignored_keys, zeroed
from smca_kernels.backends.sdpa.columns import (
    HALF_DTYPES,
    IGNORED_FEATURE,
    key_features,
    query_coefficients,
    valid_ranges,
)
from smca_kernels.backends.sdpa.tables import kept_on_device
from smca_kernels.backends.sdpa.threads import share_out
from smca_kernels.backends.transforms import is_traced
from smca_kernels.inputs import AttentionInputs, SpatialShapes

MAX_DENSE_SCORES = 2**14  # up to here a bias of queries × keys costs less than widened keys
DEVICE_BLOCK = 2**24  # scores of a block on anything but a CPU
CPU_BLOCK = 2**19  # scores of a block, per thread
# A CPU's kernel multiplies so many keys at once. What is left over at the end has to be at least so many: products with
# fewer are summed in an order in which the columns' terms have not cancelled when finer ones are added.
KEYS_AT_ONCE, MIN_LEFT_OVER = 512, 16


def forward(inputs: AttentionInputs) -> Tensor:
    """The output [B, H, N, D_v] without dropout, in query's dtype."""
    query, scale_weights = inputs.query, inputs.scale_weights
    batch, heads, queries, head_dim = query.shape
    _, _, keys, value_dim = inputs.value.shape
    scores = batch * heads * queries * keys
    if scores <= MAX_DENSE_SCORES:
        out = combine_scales(dense_outputs(inputs), scale_weights)
        return out if out.dtype == query.dtype else out.to(query.dtype)
    dtype = sdpa_dtype(query, inputs.spatial_shapes)
    out = torch.empty_like(query) if value_dim == head_dim else query.new_empty(batch, heads, queries, value_dim)
    is_dense = fused_rounds_to_tf32(query.device, dtype)
    tensors = inputs.differentiable()

    def of_heads(first: int, last: int) -> None:
        if is_dense:
            step = max(1, DEVICE_BLOCK // (4 * batch * queries * max(inputs.keys_per_scale())))
        else:
            step = heads_at_once(batch, last - first, queries, keys * (head_dim + value_dim), query.device)
        for start in range(first, last, step):
            group = slice(start, min(start + step, last))
            part: dict[str, Any] = {n: t if t.shape[1] == 1 else t[:, group] for n, t in tensors.items()}
            some_heads = replace(inputs, **part)
            outputs = dense_outputs(some_heads) if is_dense else widened_outputs(some_heads, dtype)
            out[:, group] = combine_scales(outputs, some_heads.scale_weights)

    share_out(of_heads, heads, scores, query)
    return out


def fused_rounds_to_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA's fused kernel multiplies the halves of float32 numbers on tensor cores, as CUTLASS does on GPUs.

    That costs two bits of every product, and many times the error budget in a narrow prior's columns.
    """
    return device.type == "cuda" and dtype == torch.float32


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout_p: float, scale: float) -> Tensor:
    """SDPA, but plain products where its fused kernel would be too inexact."""
    if not fused_rounds_to_tf32(query.device, query.dtype):
        return scaled_dot_product_attention(query, key, value, bias, dropout_p, scale=scale)
    probabilities = (bias + scale * (query @ key.transpose(-1, -2))).softmax(-1)
    return dropout(probabilities, dropout_p) @ value


def heads_at_once(batch: int, heads: int, queries: int, numbers: int, device: torch.device) -> int:
    """How many heads to widen together: few, so that their copies stay in a CPU's cache, but work for every thread."""
    if device.type != "cpu":
        return heads
    threads = torch.get_num_threads()
    busy = -(-8 * threads // (batch * -(-queries // 32)))  # SDPA's threads share blocks of 32 queries or more
    return min(heads, max(CPU_BLOCK * threads // (batch * numbers), busy, 1))


def full_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def sdpa_dtype(query: Tensor, shapes: SpatialShapes) -> torch.dtype:
    """The dtype that SDPA computes in. Half is slower on a CPU, and has no exact coordinates beyond ±255."""
    if query.dtype in HALF_DTYPES and (query.device.type == "cpu" or max(map(max, shapes)) > 511):
        return torch.float32
    return query.dtype


def combine_scales(outputs: list[Tensor], scale_weights: Tensor | None) -> Tensor:
    """Σ_s α_s O_s (Eq. 7–9)."""
    if scale_weights is not None:
        outputs = [output * narrow(scale_weights, 3, s, 1) for s, output in enumerate(outputs)]
    out = outputs[0]
    for output in outputs[1:]:
        out = out + output
    return out


def dense_outputs(inputs: AttentionInputs) -> list[Tensor]:
    """O_s of each scale [B, H, N, D_v] with logG as SDPA's mask and the inputs' dropout, for a few scores."""
    query, shapes = inputs.query, inputs.spatial_shapes
    ignored = ignored_keys(shapes, inputs.valid_shapes, inputs.key_padding_mask)
    key, value = keys_and_values(inputs, ignored)
    dtype = full_dtype(query)
    if query.dtype != dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.stride(3) in query.stride()[:3]:
        query = query.contiguous()  # torch's output is laid out like the query, wrongly where that overlaps itself
    nearest, mirrored = nearest_cells(inputs.center, ignored, shapes, dtype)
    outputs, start = [], 0
    for s, cells in enumerate(grid_cells(shapes, dtype, query)):
        behind = narrow(nearest, 3, s, 1) - cells  # [B, H or 1, N, height · width, 2]
        bias = torch.linalg.vecdot(behind * narrow(inputs.precision, 3, s, 1), cells + narrow(mirrored, 3, s, 1))
        mask = ignored[s]
        if mask is not None:
            empty = mask.all(1)  # computed and thrown away: from nothing but -∞, gradients would be NaN
            bias = bias.masked_fill((mask & ~empty[:, None])[:, None, None], -torch.inf)
        keys = cells.shape[0]
        k, v = narrow(key, 2, start, keys), narrow(value, 2, start, keys)
        output = attend(query, k, v, bias, inputs.dropout_p, inputs.scale)
        outputs.append(output if mask is None else _zero_where(empty, output))
        start += keys
    return outputs


def keys_and_values(inputs: AttentionInputs, ignored: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, …] with 0 in those that are ignored, so that nothing that stood there can matter."""
    masks = [mask for mask in ignored if mask is not None]
    if not masks:
        return inputs.key, inputs.value
    mask = masks[0] if len(masks) == 1 else torch.cat(masks, 1)
    return zeroed(inputs.key, mask), zeroed(inputs.value, mask)


def nearest_cells(
    center: Tensor, ignored: list[Tensor | None], shapes: SpatialShapes, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """n and n - 2c [B, H or 1, N, S, 2] in `dtype`, with n the position of the valid cell nearest to the center c.

    Seen from there nothing cancels, however far outside c lies or however narrow the prior is:

        p (x - c)² = p (x - n) (x + n - 2c)  +  a constant of the row
    """
    if center.dtype != dtype:
        center = center.to(dtype)
    masks = [mask for mask in ignored if mask is not None]
    first, last = grid_corners(shapes, dtype, center)
    if masks:
        middle = (last + 1).div(2, rounding_mode="floor")
        low, high = valid_ranges(masks, shapes, dtype)
        first, last = low + middle, high + middle
    nearest = torch.clamp(center.round(), first, last)
    return nearest, torch.add(nearest, center, alpha=-2)


@kept_on_device
def grid_corners(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x, y) of the first and the last cell of each grid, [S, 2] each."""
    last = torch.tensor([(width - 1, height - 1) for height, width in shapes], dtype=dtype, device=device)
    return torch.zeros_like(last), last


def narrow(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`Tensor.narrow` that costs nothing where it is the whole tensor."""
    return tensor if tensor.shape[dim] == length else tensor.narrow(dim, start, length)


@kept_on_device
def grid_cells(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(x, y) of every cell of each grid, row-major [height · width, 2]."""
    like = torch.empty(0, dtype=dtype, device=device)
    return [torch.stack(cell_coordinates(*shape, like=like), -1) for shape in shapes]


def widened_outputs(inputs: AttentionInputs, dtype: torch.dtype) -> list[Tensor]:
    """O_s of each scale [B, H, N, D_v] by widened queries and keys, computed in `dtype`, with the inputs' dropout."""
    query, shapes = inputs.query, inputs.spatial_shapes
    batch, heads, queries, head_dim = query.shape
    value_dim = inputs.value.shape[3]
    table = key_features(shapes, dtype, query)
    features, lowest, highest = table.columns.expand(batch, heads, -1, -1), table.lowest, table.highest
    ignored = ignored_keys(shapes, inputs.valid_shapes, inputs.key_padding_mask)
    masks = [mask for mask in ignored if mask is not None]
    if masks:
        column = torch.cat(masks, 1)[:, None, :, None] * IGNORED_FEATURE[dtype]
        features = torch.cat([column.to(dtype).expand(-1, heads, -1, -1), features[..., 1:]], -1)
        lowest, highest = valid_ranges(masks, shapes, lowest.dtype)
    coefficients = query_coefficients(inputs.center, inputs.precision, table, lowest, highest, dtype)
    coefficients = coefficients.expand(-1, heads, -1, -1, -1)
    k, v = keys_and_values(inputs, ignored)
    q, k, v = query.to(dtype) * inputs.scale, k.to(dtype), v.to(dtype)
    missing = max(value_dim - head_dim, 0)  # in keys, whose columns have to hold the values
    if (head_dim + missing) % 8:  # fused kernels on a GPU want multiples of 8
        missing += -(head_dim + missing) % 8
    if missing:
        q, k = pad(q, (0, missing)), pad(k, (0, missing))
    if value_dim % 8:
        v = pad(v, (0, -value_dim % 8))
    q = torch.cat([coefficients, q.unsqueeze(3).expand(-1, -1, -1, len(shapes), -1)], -1)
    # Products with fewer rows than 8 are summed in an order in which the terms are not exact.
    q = pad(q, (0, 0, 0, 0, 0, -queries % 8))
    # Fused kernels want keys and values of equal width: the values' surplus columns are whatever stands before them.
    width, value_width = q.shape[-1], v.shape[-1]
    features_keys_values = torch.cat([features, k, v], -1)
    surplus = width - value_width
    outputs, start = [], 0
    for s, keys in enumerate(inputs.keys_per_scale()):
        rows = features_keys_values.narrow(2, start, keys)
        # While tracing for all, as the sizes must not become conditions.
        if query.is_cpu and (is_traced(query) or 0 < keys % KEYS_AT_ONCE < MIN_LEFT_OVER):
            ignored_row = pad(rows.new_full((1, 1, 1, 1), IGNORED_FEATURE[dtype]), (0, width + value_width - 1))
            rows = torch.cat([rows, ignored_row.expand(batch, heads, -keys % MIN_LEFT_OVER, -1)], 2)
        k_s, v_s = rows.narrow(3, 0, width), rows.narrow(3, value_width, width)
        output = scaled_dot_product_attention(q.select(3, s), k_s, v_s, dropout_p=inputs.dropout_p, scale=1.0)
        output = output[:, :, :queries, surplus:][..., :value_dim]
        outputs.append(_zero_where(masks[s].all(1), output) if masks else output)
        start += keys
    return outputs


def _zero_where(empty: Tensor, output: Tensor) -> Tensor:
    return output.masked_fill(empty[:, None, None, None], 0.0)
