"""Random inputs of awkward shapes and circumstances, as a table: what every backend is held against its budget on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.inputs import MASS_TOLERANCES, AttentionInputs, SpatialShapes

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One set of shapes and circumstances. `layout`, `prior` and `mask` name rows of the tables below."""

    name: str
    spatial_shapes: SpatialShapes
    batch: int = 1
    heads: int = 1
    queries: int = 17
    head_dim: int = 32
    dtype: str = "float32"
    prior_dtype: str | None = "float32"  # of center, precision and scale_weights; None: as query
    prior_heads: int | None = None  # None: as many as heads
    scale_weights: bool = True
    scale: float | None = None
    prior: str = "ordinary"
    mask: str = "none"
    layout: str = "contiguous"
    planned: bool = False  # what the prior makes unlikely is left out, however small the case
    quick: bool = False
    large: bool = False  # too large for the interpreter
    value_dim: int | None = None  # None: as head_dim


@dataclass(frozen=True)
class CaseInputs(AttentionInputs):
    """Inputs that require gradients, with an upstream gradient."""

    grad_output: Tensor  # [B, H, N, D_v]
    planned: bool = False  # as in Case

    def double(self) -> Self:
        """The same values in float64, as fresh leaves that require gradients."""
        return replace(super().double(), grad_output=self.grad_output.double())


def _log_uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.exp(math.log(low) + math.log(high / low) * torch.rand(shape, generator=generator))


def _precision_of_sigma(sigma: Tensor) -> Tensor:
    return 1 / (2 * sigma**2)


def _ordinary_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center = (torch.rand(shape, generator=generator) * 1.2 - 0.1) * (size - 1)
    return center, _precision_of_sigma(_log_uniform(shape, 1.0, 8.0, generator))


def _narrow_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center, _ = _ordinary_prior(shape, size, generator)
    return center, _log_uniform(shape, 1.0, 1e4, generator)


def _wide_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center, _ = _ordinary_prior(shape, size, generator)
    switched_on = torch.rand(shape, generator=generator) < 0.5
    return center, _log_uniform(shape, 1e-8, 1e-2, generator) * switched_on


def _far_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    side = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    distance = _log_uniform(shape, 10.0, 1000.0, generator)
    return side * distance + size / 2, _log_uniform(shape, 1e-5, 1e-1, generator)


PRIORS: dict[str, Callable[[Sequence[int], Tensor, torch.Generator], tuple[Tensor, Tensor]]] = {
    "ordinary": _ordinary_prior,  # centres on and just beside the grid, σ of 1 to 8 cells
    "narrow": _narrow_prior,  # down to a hundredth of a cell: one key takes nearly all
    "wide": _wide_prior,  # hundreds of cells, and 0 (switched off) on half of the axes
    "far": _far_prior,  # centres 10 to 1000 cells from the grid's middle
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    # [B, N, H, D] cut out of a wider projection, as nn.MultiheadAttention's packed weights give it
    "projection": lambda t: _cut_from_wider(t.transpose(1, 2)).transpose(1, 2),
    "sequence_first": lambda t: t.movedim(2, 0).contiguous().movedim(0, 2),
    "last_axis_strided": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda t: t[:1, :1].expand(t.shape),
    "overlapping": lambda t: torch.cat([t[..., 0, :], t[..., 1:, -1]], -1).unfold(-1, t.shape[-1], 1),
}


def _cut_from_wider(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full_like(tensor, math.nan)], dim=2)[:, :, : tensor.shape[2]]


def _valid_shapes(case: Case, generator: torch.Generator) -> Tensor:
    """Draw image sizes [B, S, 2] of at least one cell; the last image, the largest, fills the grids."""
    sizes = torch.tensor(case.spatial_shapes)
    fraction = torch.rand(case.batch, 1, 2, generator=generator)
    fraction[-1:] = 1.0
    return (fraction * sizes).ceil().long().clamp(min=1)


def _padding_mask(valid_shapes: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
    return torch.cat(
        [mask for mask in reference.ignored_keys(spatial_shapes, valid_shapes, None) if mask is not None],
        dim=1,
    )


def _make_masks(case: Case, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """Draw valid_shapes and key_padding_mask of a case."""
    valid_shapes = _valid_shapes(case, generator)
    if case.mask == "none":
        return None, None
    if case.mask == "valid_shapes":
        return valid_shapes, None
    if case.mask == "padding":
        return None, _padding_mask(valid_shapes, case.spatial_shapes)
    if case.mask == "random":
        return None, torch.rand(case.batch, sum(h * w for h, w in case.spatial_shapes), generator=generator) < 0.4
    # The first image has no valid key at the last scale: in no row, or in no column.
    valid_shapes[0, -1, 0] = 0
    if case.mask == "empty_scale":
        return valid_shapes, None
    if case.mask == "empty_scale_padding":
        return None, _padding_mask(valid_shapes, case.spatial_shapes)
    raise ValueError(f"mask must be one of {MASKS}, got {case.mask!r}")


MASKS = ("none", "valid_shapes", "padding", "random", "empty_scale", "empty_scale_padding")


def make_inputs(case: Case, generator: torch.Generator, device: torch.device | str = "cpu") -> CaseInputs:
    """Draw the inputs of a case; the same values on every device.

    Args:
        case: what to draw.
        generator: a CPU generator.
        device: where the tensors go.
    """
    lay_out = LAYOUTS[case.layout]
    dtype = getattr(torch, case.dtype)
    prior_dtype = getattr(torch, case.prior_dtype or case.dtype)
    keys = sum(height * width for height, width in case.spatial_shapes)
    prior_shape = (case.batch, case.prior_heads or case.heads, case.queries, len(case.spatial_shapes), 2)

    def place(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return lay_out(tensor.to(device=device, dtype=dtype))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query = normal(case.batch, case.heads, case.queries, case.head_dim)
    key = normal(case.batch, case.heads, keys, case.head_dim)
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    value = normal(case.batch, case.heads, keys, value_dim)
    size = torch.tensor([(width, height) for height, width in case.spatial_shapes], dtype=torch.float32)
    center, precision = PRIORS[case.prior](prior_shape, size, generator)
    scale_weights = normal(*prior_shape[:-1])
    grad_output = normal(case.batch, case.heads, case.queries, value_dim)
    valid_shapes, key_padding_mask = _make_masks(case, generator)
    return CaseInputs(
        query=place(query, dtype).detach().requires_grad_(),
        key=place(key, dtype).detach().requires_grad_(),
        value=place(value, dtype).detach().requires_grad_(),
        center=place(center, prior_dtype).detach().requires_grad_(),
        precision=place(precision, prior_dtype).detach().requires_grad_(),
        scale_weights=place(scale_weights, prior_dtype).detach().requires_grad_() if case.scale_weights else None,
        spatial_shapes=case.spatial_shapes,
        dropout_p=0.0,
        mass_tolerance=MASS_TOLERANCES[dtype],
        valid_shapes=None if valid_shapes is None else valid_shapes.to(device),
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.to(device),
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        grad_output=place(grad_output, dtype),
        planned=case.planned,
    )


# Kernels tile grids by 4 to 16 cells and queries by 16 to 128: most sizes here lie beside those. The quick
# cases are as small as their purpose allows, since Triton's interpreter takes milliseconds a tile.
CASES: tuple[Case, ...] = (
    Case("one cell", ((1, 1),), batch=2, queries=3, quick=True),
    Case("one cell at five scales", ((1, 1),) * 5, queries=9),
    Case("one query, one row, one column", ((1, 17), (5, 1)), queries=1, quick=True),
    Case("one query", ((9, 17),), heads=3, queries=1),
    Case("300 queries", ((3, 5), (2, 2)), queries=300),
    Case("exact tiles", ((8, 16),), queries=64, head_dim=16),
    Case("one past the tiles", ((9, 17),), queries=65, head_dim=16, quick=True),
    Case("one short of the tiles", ((7, 15),), queries=63),
    Case("head_dim 1", ((5, 9),), head_dim=1),
    Case("head_dim 20", ((5, 9), (3, 5)), head_dim=20, quick=True),
    Case("head_dim 24", ((5, 9),), heads=2, head_dim=24),
    Case("head_dim 64", ((9, 10),), head_dim=64, quick=True),
    Case("head_dim 100", ((5, 9),), head_dim=100),
    Case("head_dim 128", ((9, 10),), head_dim=128, quick=True),
    Case("values half as wide", ((5, 9), (3, 5)), batch=2, value_dim=16, mask="valid_shapes", quick=True),
    Case("values twice as wide", ((9, 10),), heads=2, head_dim=24, value_dim=48, prior_heads=1),
    Case("one scale", ((13, 21),), queries=40),
    Case("three scales, padded batch", ((9, 10), (5, 5), (3, 2)), batch=2, mask="valid_shapes", quick=True),
    Case("four scales", ((9, 13), (5, 7), (3, 4), (2, 2)), batch=2, mask="padding"),
    Case("five scales", ((5, 7), (3, 4), (2, 2), (1, 3), (1, 1)), queries=5),
    Case("eight scales", tuple((8 - i, 9 - i) for i in range(8)), batch=2, queries=5, mask="valid_shapes"),
    Case("random padding mask", ((9, 10), (3, 5)), batch=2, mask="random", quick=True),
    Case("image empty at one scale", ((5, 9), (3, 5)), batch=2, mask="empty_scale", quick=True),
    Case("image masked at one scale", ((5, 9), (3, 5)), batch=2, mask="empty_scale_padding"),
    Case("shared prior", ((9, 10),), heads=2, queries=9, prior_heads=1, quick=True),
    Case("shared prior, no scale weights", ((5, 9), (3, 5)), heads=3, prior_heads=1, scale_weights=False),
    Case("no scale weights", ((5, 9), (3, 5)), batch=2, scale_weights=False, mask="valid_shapes"),
    Case("projections", ((5, 9),), batch=2, heads=2, layout="projection", mask="valid_shapes", quick=True),
    Case("sequence first", ((5, 9),), batch=2, heads=2, layout="sequence_first", mask="padding"),
    Case("last axis strided", ((5, 9),), batch=2, heads=2, layout="last_axis_strided"),
    Case("expanded", ((5, 9),), batch=2, heads=2, queries=9, layout="expanded", quick=True),
    Case("overlapping", ((5, 9),), heads=2, queries=9, layout="overlapping", quick=True),
    Case("narrow prior", ((9, 17),), queries=33, prior="narrow", quick=True),
    Case("terms that nearly cancel", ((3, 167),), queries=33, quick=True),  # up to 7000, in the logits of σ = 1
    # What is left over where a CPU multiplies 512 keys at a time, and the fewest keys, on the widened path of "sdpa".
    Case("few keys left over", ((19, 27), (3, 3)), heads=2, queries=33, prior="narrow", quick=True),
    Case("wide prior", ((9, 17),), queries=33, prior="wide", quick=True),
    Case("far centers", ((9, 17),), queries=33, prior="far", quick=True),
    Case("narrow prior, padded batch", ((9, 17),), batch=2, prior="narrow", mask="valid_shapes"),
    Case("far centers, padded batch", ((9, 17),), batch=2, prior="far", mask="valid_shapes"),
    Case("planned, padded batch", ((11, 35), (9, 11)), batch=2, queries=70, mask="valid_shapes", planned=True),
    Case("planned, narrow prior", ((20, 19),), heads=2, prior="narrow", layout="projection", planned=True, quick=True),
    Case("planned, far centers", ((9, 37), (3, 5)), heads=2, prior="far", prior_heads=1, planned=True),
    Case("planned, random padding mask", ((20, 19), (5, 9)), batch=2, mask="random", planned=True),
    Case("planned, 900 queries", ((50, 84), (25, 42)), batch=2, heads=2, queries=900, planned=True, large=True),
    Case("prior in the inputs' dtype", ((9, 17), (5, 9)), prior_dtype=None),
    Case("scale 0", ((5, 9),), scale=0.0, quick=True),
    Case("scale 1", ((9, 17),), scale=1.0),
    Case("negative scale", ((9, 17),), scale=-0.3),
    Case(
        "detector, three scales",
        ((50, 84), (25, 42), (13, 21)),
        batch=2,
        heads=8,
        queries=300,
        mask="valid_shapes",
        layout="projection",
        large=True,
    ),
    Case(
        "detector, dilated",
        ((67, 84),),
        batch=2,
        heads=8,
        queries=300,
        mask="padding",
        layout="projection",
        large=True,
    ),
    Case("detector, head_dim 64", ((50, 84),), heads=8, queries=300, head_dim=64, prior_heads=1, large=True),
    Case("detector, head_dim 128", ((50, 84),), heads=4, queries=300, head_dim=128, large=True),
)


def case_generator(case: Case, seed: int) -> torch.Generator:
    """Make a generator that depends on seed and name alone, so that any case can be repeated by itself."""
    # torch's CPU generator takes 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {case.name}".encode()))
