"""The prior's columns alone: how precise their products are, and that they stay finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.backends.sdpa import columns
from smca_kernels.testing.cases import PRIORS


def column_logits(center: Tensor, precision: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Products of the columns [N, height · width], summed one column after the other in float32 as matrix units do."""
    table = columns.key_features((shape,), dtype, center)
    prior = (center.view(1, 1, -1, 1, 2), precision.view(1, 1, -1, 1, 2))
    queries = columns.query_coefficients(*prior, table, table.lowest, table.highest, dtype).flatten(0, 3)
    assert queries.isfinite().all()
    total = torch.zeros(len(queries), len(table.columns), device=center.device)
    for column in range(queries.shape[1]):
        total += queries[:, column, None].float() * table.columns[:, column].float()
    return total


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 4e-6), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)]
)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (13, 21), (50, 84), (100, 134)])
def test_columns_give_the_prior_to_the_precision_of_the_dtype(
    shape: tuple[int, int],
    prior: str,
    dtype: torch.dtype,
    limit: float,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    size = torch.tensor([shape[1], shape[0]], dtype=torch.float32)
    center, precision = (t.to(device) for t in PRIORS[prior]((200, 2), size, generator))
    actual = column_logits(center, precision, shape, dtype).double().softmax(-1)
    exact = reference.log_prior(center.double(), precision.double(), *shape).softmax(-1)
    assert (actual - exact).abs().sum(-1).max() < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_columns_stay_finite_and_find_the_nearest_cell_in_extremes(dtype: torch.dtype, device: torch.device) -> None:
    places = torch.tensor([-1e5, -300.25, -0.25, 20.25, 66.75, 133.25, 1e5], device=device)
    center = torch.cartesian_prod(places, places)
    for p in (1e-8, 1.0, 3e4, 1e6):
        logits = column_logits(center, torch.full_like(center, p), (100, 134), dtype)
        assert logits.isfinite().all()
        if p >= 1.0:
            nearest = [center[:, a].round().clamp(0, n - 1) for a, n in ((1, 100), (0, 134))]
            assert torch.equal(logits.argmax(-1), (nearest[0] * 134 + nearest[1]).long())


def test_half_precision_features_are_exact_to_the_largest_grid(device: torch.device) -> None:
    like = torch.empty(0, device=device)
    for dtype in columns.HALF_DTYPES:
        wide = columns.key_features(((511, 3), (2, 511)), torch.float32, like).columns.double()
        half = columns.key_features(((511, 3), (2, 511)), dtype, like).columns.double()
        units = columns.key_features(((511, 3), (2, 511)), dtype, like).units.double()
        term = half[:, 1:8] * units
        for axis in range(2):
            assert torch.equal(term[:, axis] + term[:, 2 + axis], wide[:, 1 + axis])
            assert torch.equal(term[:, 4 + axis], wide[:, 3 + axis])
        assert torch.equal(term[:, 6], wide[:, 5])
