"""The spatial prior as extra columns of queries and keys, for a product that adds it to q·k (docs/sdpa.md).

    logG[k] = Σ_axis -p (x_k - c)²  =  Σ_columns coefficient(query) · feature(key)  +  a constant of the row

Every coefficient is split into terms whose sums are exact while they are large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from smca_kernels.backends.reference import cell_coordinates
from smca_kernels.backends.sdpa.tables import kept_on_device
from smca_kernels.inputs import SpatialShapes

HALF_DTYPES = (torch.float16, torch.bfloat16)

# Columns: one for ignored keys, then the terms of the coefficients, the coarsest first: sums start with them and are
# exact while they are large. In half precision these stand alone in the first 16 columns, so that no matrix instruction
# aligns finer terms to them.
IGNORED_COEFFICIENT = 2.0**15
# The product is below every score that counts, as the rest of an ignored key is 0. It is not -inf, of which SDPA's
# kernels make NaN where a whole block of keys is ignored. For float16 it is the largest that its columns hold.
IGNORED_FEATURE = dict.fromkeys((torch.float64, torch.float32, torch.bfloat16), -(2.0**80)) | {
    torch.float16: -(2.0**15)
}


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype for what is computed once a query: float64, which Metal lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


class Features(NamedTuple):
    """Columns of the keys, and what those of the queries need; positions are counted from each grid's middle."""

    columns: Tensor  # [T, columns]
    middle: Tensor  # [S, 2]: (x, y)
    lowest: Tensor  # [S, 2]: position of the first cell
    highest: Tensor  # [S, 2]: of the last
    largest: Tensor  # [S, coefficients]: of the features' magnitudes
    units: Tensor  # [coefficients]: powers of two in which coefficients are stored
    steepest: Tensor  # [S, 1]: precision up to which no product of float16 columns overflows, σ of 0.016 cells or less


@kept_on_device
def key_features(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> Features:
    """Columns of all keys in `dtype`, the one for ignored keys first and 0; the rest in `exact_dtype`."""
    wide = exact_dtype(device)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=wide, device=device)
    middle = sizes // 2
    units = sizes.new_tensor([1.0] * 4 + [2.0**-6] * 2 + [2.0**-15] if dtype in HALF_DTYPES else [1.0] * 5)
    columns, largest = [], []
    for s, (height, width) in enumerate(shapes):
        cells = torch.stack(cell_coordinates(height, width, like=sizes), -1) - middle[s]
        squares, one = cells**2, torch.ones_like(cells[:, :1])
        if dtype in HALF_DTYPES:  # 8 bits each
            high = squares.div(256, rounding_mode="floor") * 256
            term = torch.cat([-high, high - squares, 2 * cells, one], 1) / units
            columns.append(torch.cat([pad(term, (1, 8)), term, pad(term, (0, 2))], 1))
        else:
            term = torch.cat([-squares, 2 * cells, one], 1)
            columns.append(pad(term.repeat(1, 3), (1, 0)))
        largest.append(term.abs().amax(0))
    steepest = (2.0**27 / middle.clamp(min=1).amax(1, keepdim=True) ** 2).clamp(max=2.0**15)
    return Features(
        torch.cat(columns).to(dtype), middle, -middle, sizes - 1 - middle, torch.stack(largest), units, steepest
    )


def query_coefficients(
    center: Tensor,  # [B, H or 1, N, S, 2]
    precision: Tensor,  # [B, H or 1, N, S, 2]
    table: Features,
    lowest: Tensor,  # [S, 2] or [B, 1, 1, S, 2]: position of the first valid cell
    highest: Tensor,  # of the last
    dtype: torch.dtype,
) -> Tensor:
    """Columns of the queries [B, H or 1, N, S, columns]; the row's constant is such that the largest logG is 0.

    logG + constant = -p x² + 2 p c x + n (p n - 2 p c), with n the position of the valid cell nearest to c.
    """
    p, c = torch.broadcast_tensors(precision.to(table.middle.dtype), center - table.middle)
    nearest = torch.clamp(c.detach().round(), lowest, highest)
    if dtype == torch.float16:
        p = torch.minimum(p, table.steepest)
    slope = p * c
    if dtype == torch.float16:
        limit = 2 * table.steepest * table.middle.clamp(min=1)
        slope = torch.clamp(slope, -limit, limit)
    constant = (nearest * (p * nearest - 2 * slope)).sum(-1, keepdim=True)
    half = dtype in HALF_DTYPES
    rest = torch.cat([p, p, slope, constant] if half else [p, slope, constant], -1) * table.units
    # Adding and subtracting `coarse` rounds to a common step, of which no partial sum has more than 2^24.
    bound = (rest.detach().abs() * table.largest).sum(-1, keepdim=True)
    coarse = bound * (2.0**-23 / torch.finfo(bound.dtype).eps) * table.units
    terms = []
    for _ in range(2):
        terms.append(((rest.detach() + coarse) - coarse).to(dtype).to(bound.dtype))
        rest = rest - terms[-1]
        coarse = coarse * 2.0**-8
    mask = torch.full_like(bound, IGNORED_COEFFICIENT)
    if half:
        terms[0], rest = pad(terms[0], (0, 8)), pad(rest, (0, 2))
    return torch.cat([mask, *terms, rest], -1).to(dtype)


def valid_ranges(masks: list[Tensor], shapes: SpatialShapes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and last column and row with a valid cell, [B, 1, 1, S, 2] each, counted from each grid's middle."""
    lowest, highest = [], []
    for mask, (height, width) in zip(masks, shapes, strict=True):
        valid = ~mask.unflatten(1, (height, width))
        for some, size in ((valid.any(1), width), (valid.any(2), height)):
            position = torch.arange(size, device=mask.device, dtype=dtype) - size // 2
            lowest.append(torch.where(some, position, size).amin(1))
            highest.append(torch.where(some, position, -size).amax(1))
    batch, scales = len(masks[0]), len(shapes)
    low, high = (torch.stack(ends, 1).view(batch, 1, 1, scales, 2) for ends in (lowest, highest))
    return low, high
