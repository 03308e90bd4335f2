"""The prior's two kernels, compiled, against float64; for test_compiled_kernels.py and hunt.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smca_kernels.testing.machine.launcher import smca_on_machine


@dataclass(frozen=True)
class Geometry:
    """A prior: `axes` of the object scale (0: none), `floor` of its square (None: the official geometry)."""

    scales: int
    heads: int
    axes: int
    floor: float | None
    selects: bool
    extents: str  # "image", "valid" or "grid": where the sizes in cells come from


GEOMETRIES = (
    Geometry(3, 8, 2, None, True, "image"),
    Geometry(1, 1, 0, None, False, "grid"),
    Geometry(4, 8, 1, 0.01, True, "valid"),
    Geometry(2, 1, 2, 0.01, False, "grid"),
    Geometry(5, 8, 2, None, True, "grid"),
)
# Of the largest value: results are fp32, gradients are rounded to the projections' dtype.
TOLERANCE = 2e-6
GRADIENT_TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


def reference(
    raw: Sequence[Tensor | None], geometry: Geometry, image_sizes: Tensor | None, valid_shapes: Tensor | None,
    shapes: Sequence[tuple[int, int]], strides: Sequence[float], factors: Sequence[float],
) -> list[Tensor | None]:  # fmt: skip
    """Center, precision and scale weights from the raw projections, in float64."""
    logits, offset, object_scale, selection = raw
    assert logits is not None
    (batch, queries, _), (scales, heads) = logits.shape, (geometry.scales, geometry.heads)
    shape = batch, heads, queries, scales, 2

    def by_head(projection: Tensor) -> Tensor:
        return projection.view(batch, queries, scales, heads, -1).permute(0, 3, 1, 2, 4)

    if image_sizes is not None:
        extent = torch.stack([image_sizes.flip(-1).double() / stride for stride in strides], 1)
    elif valid_shapes is not None:
        extent = valid_shapes.flip(-1).double()
    else:
        extent = torch.tensor([[width, height] for height, width in shapes]).double()[None].expand(batch, -1, -1)
    center = (logits.sigmoid()[:, :, None] * extent[:, None])[:, None].expand(shape)
    if offset is not None:
        center = center + by_head(offset)
    precision = torch.tensor(factors).double()[:, None].expand(shape)
    if object_scale is not None:
        squared = by_head(object_scale) ** 2
        precision = precision * squared if geometry.floor is None else precision / squared.clamp(min=geometry.floor)
    return [center, precision, None if selection is None else selection.softmax(-1)[:, None]]


def check_prior(arch: int, dtype: str, geometry: Geometry, seed: int, queries: int = 37) -> tuple[float, str]:
    """The largest error over its tolerance, and what the checks report."""
    from smca_kernels.backends.triton import prior

    torch.manual_seed(seed)
    batch, scales, heads = 2, geometry.scales, geometry.heads
    shapes = tuple((20 - 3 * i, 31 - 5 * i) for i in range(scales))
    strides, factors = [8.0 * 2**i for i in range(scales)], [0.1 * (i + 1) for i in range(scales)]
    widths = (2, scales * heads * 2 if scales > 1 else 0, scales * heads * geometry.axes, scales * geometry.selects)
    raw: list[Any] = [None] * 4
    for i, width in enumerate(widths):
        if width:
            raw[i] = torch.randn(batch, queries, width).to(getattr(torch, dtype)).requires_grad_()
    image = torch.tensor([[150, 230], [97, 240]]) if geometry.extents == "image" else None
    valid = torch.tensor([[[h - 1, w - 2] for h, w in shapes], [list(s) for s in shapes]])
    valid_shapes = valid if geometry.extents == "valid" else None
    wanted = [0] + [1] * (raw[2] is not None) + [2] * geometry.selects  # results that depend on the projections
    given = [i for i in range(4) if raw[i] is not None]
    with smca_on_machine(arch) as session:
        results = prior.prior(*raw, image, valid_shapes, shapes, strides, factors, geometry.floor, heads)
        upstream = [torch.randn(results[i].shape) for i in wanted]
        gradients = torch.autograd.grad([results[i] for i in wanted], [raw[i] for i in given], upstream)
    wide = [None if r is None else r.detach().double().requires_grad_() for r in raw]
    exact: list[Any] = reference(wide, geometry, image, valid_shapes, shapes, strides, factors)
    leaves: list[Any] = [wide[i] for i in given]
    exact_gradients = torch.autograd.grad([exact[i] for i in wanted], leaves, [g.double() for g in upstream])
    pairs = [(results[i], exact[i], TOLERANCE) for i in wanted]
    pairs += [(*pair, GRADIENT_TOLERANCES[dtype]) for pair in zip(gradients, exact_gradients, strict=True)]
    errors = [((a.double() - b).abs().max() / (tolerance * b.abs().max())).item() for a, b, tolerance in pairs]
    return max(errors), session.faults.report()
