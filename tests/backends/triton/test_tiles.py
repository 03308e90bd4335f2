"""Each helper that the kernels share against its PyTorch twin; the twins are written from the formulas in tiles.py."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from smca_kernels.backends.triton import operator, tiles  # noqa: E402
from smca_kernels.backends.triton.backward import moment_weights  # noqa: E402

TILE_H, TILE_W, ROWS = 4, 8, 16
KEYS = TILE_H * TILE_W


# ------------------------------------------------------------------------------------------------------- twins


def cells() -> tuple[torch.Tensor, torch.Tensor]:
    """(u, v) of a tile's keys, counted from its middle."""
    i = torch.arange(KEYS)
    return i % TILE_W - (TILE_W - 1) / 2, i // TILE_W - (TILE_H - 1) / 2


def features_twin(ignored: torch.Tensor) -> torch.Tensor:
    u, v = cells()
    one = torch.ones(KEYS)
    columns = [u * u] * 3 + [u] * 3 + [one] * 2 + [v * v] * 3 + [v] * 3 + [one, ignored.float()]
    return torch.stack(columns, 1)


def terms_twin(x: torch.Tensor) -> list[torch.Tensor]:
    """x as three float32 tensors that keep only the upper 16 bits."""
    terms = []
    for _ in range(3):
        upper = (x.view(torch.int32) & -65536).view(torch.float32)
        terms.append(upper)
        x = x - upper
    return terms


def coefficients_twin(p_x, p_y, e_x, e_y, base) -> torch.Tensor:
    of_base = terms_twin(-base)
    columns = [*terms_twin(-p_x), *terms_twin(2 * p_x * e_x), *of_base[:2]]
    columns += [*terms_twin(-p_y), *terms_twin(2 * p_y * e_y), of_base[2], torch.full_like(base, -1e30)]
    return torch.stack(columns, 1)


def nearest_twin(c: torch.Tensor, side: int) -> torch.Tensor:
    return c - torch.floor(c.clamp(0, side - 1) + 0.5)


# ----------------------------------------------------------------------------------------------------- kernels


@triton.jit
def features_kernel(out, ignored, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    keys = tl.arange(0, TILE_H * TILE_W)
    features = tiles.tile_features(TILE_H, TILE_W, out, False)
    features = tiles.mark_ignored(features, tl.load(ignored + keys) != 0)
    tl.store(out + keys[:, None] * 16 + tl.arange(0, 16)[None, :], features.to(tl.float32))


@triton.jit
def coefficients_kernel(out, prior, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    p_x = tl.load(prior + rows)
    p_y = tl.load(prior + ROWS + rows)
    e_x = tl.load(prior + 2 * ROWS + rows)
    e_y = tl.load(prior + 3 * ROWS + rows)
    base = tl.load(prior + 4 * ROWS + rows)
    fixed = tiles.fixed_coefficients(p_x, p_y, out, False)
    coefficients = tiles.tile_coefficients(fixed, p_x, p_y, e_x, e_y, base)
    tl.store(out + rows[:, None] * 16 + tl.arange(0, 16)[None, :], coefficients.to(tl.float32))


@triton.jit
def row_kernel(out, prior, side, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    p = tl.load(prior + rows)
    c = tl.load(prior + ROWS + rows)
    e = tl.load(prior + 2 * ROWS + rows)
    d = tiles.from_nearest_cell(c, side)
    tl.store(out + rows, d)
    tl.store(out + ROWS + rows, tiles.base_of_tile(p, p, e, e, d, d))
    tl.store(out + 2 * ROWS + rows, tiles.direct_prior(p, e, c, d))


@triton.jit
def moments_kernel(out, prior, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    e_x = tl.load(prior + rows)
    e_y = tl.load(prior + ROWS + rows)
    d_x = tl.load(prior + 2 * ROWS + rows)
    d_y = tl.load(prior + 3 * ROWS + rows)
    tl.store(out + rows[:, None] * 16 + tl.arange(0, 16)[None, :], moment_weights(e_x, e_y, d_x, d_y))


@triton.jit
def keeps_kernel(out, seed, batch_head, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
    row_key = tiles.dropout_row_key(tl.load(seed), batch_head, rows)
    kept = tiles.keeps(row_key[:, None], tiles.dropout_key_key(keys)[None, :], threshold)
    tl.store(out + rows[:, None] * KEYS + keys[None, :], kept.to(tl.int32))


@triton.jit
def grids_kernel(out, valid_shapes, scales, g0, g1, g2, g3, g4, g5, g6, g7):
    for s in range(scales):
        height, width = tiles.grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = tiles.valid_part(valid_shapes, 0, s, scales, height, width)
        tl.store(out + 4 * s, height)
        tl.store(out + 4 * s + 1, width)
        tl.store(out + 4 * s + 2, valid_height)
        tl.store(out + 4 * s + 3, valid_width)


# ------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def prior(device) -> torch.Tensor:
    """Positive and negative float32 rows over many orders of magnitude [5, ROWS]."""
    return (torch.randn(5, ROWS) * 10.0 ** torch.randint(-4, 4, (5, ROWS))).to(device)


def test_tile_features_are_the_cells_squares_and_products_in_the_documented_columns(device):
    ignored = torch.arange(KEYS) % 3 == 0
    out = torch.empty(KEYS, 16, device=device)
    features_kernel[(1,)](out, ignored.int().to(device), TILE_H, TILE_W)
    assert torch.equal(out.cpu(), features_twin(ignored))


def test_tile_features_are_exact_in_bfloat16():
    features = features_twin(torch.zeros(KEYS, dtype=torch.bool))
    assert torch.equal(features.bfloat16().float(), features)
    largest = torch.tensor([(16 - 1) / 2]) ** 2
    assert torch.equal(largest.bfloat16().float(), largest)


def test_coefficients_are_split_into_three_bfloat16_terms(device, prior):
    out = torch.empty(ROWS, 16, device=device)
    coefficients_kernel[(1,)](out, prior, ROWS)
    expected = coefficients_twin(*prior.cpu())
    assert torch.equal(out.cpu()[:, :15], expected[:, :15])
    assert (out.cpu()[:, 15] < -9e29).all()


def test_three_terms_hold_float32_to_its_last_bit(prior):
    values = prior.cpu().flatten()
    terms = torch.stack([t.bfloat16().double() for t in terms_twin(values)]).sum(0)
    assert ((terms - values.double()).abs() <= 2.0**-23 * values.double().abs()).all()


def test_coefficients_times_features_are_the_log_prior_up_to_the_query_s_constant(device):
    p = torch.rand(2, ROWS).double()
    c = torch.rand(2, ROWS).double() * 30 - 10
    d = torch.stack([nearest_twin(c[0], TILE_W), nearest_twin(c[1], TILE_H)])
    e = c - torch.tensor([[(TILE_W - 1) / 2], [(TILE_H - 1) / 2]])
    base = (p * (e * e - d * d)).sum(0)
    out = torch.empty(ROWS, 16, device=device)
    coefficients_kernel[(1,)](out, torch.cat([p, e, base[None]]).float().to(device), ROWS)
    features = features_twin(torch.zeros(KEYS, dtype=torch.bool)).double()
    u, v = cells()
    squared = (u - e[0][:, None]) ** 2 - d[0][:, None] ** 2, (v - e[1][:, None]) ** 2 - d[1][:, None] ** 2
    expected = -(p[0][:, None] * squared[0] + p[1][:, None] * squared[1])
    bound = 2.0**-20 * base.abs().max().item()
    torch.testing.assert_close(out.cpu().double() @ features.T, expected, rtol=0, atol=bound)


def test_rows_see_their_nearest_cell_their_base_and_the_direct_prior(device, prior):
    side = 7
    prior = prior[:3].clone()
    prior[0].abs_()
    out = torch.empty(3, ROWS, device=device)
    row_kernel[(1,)](out, prior, side, ROWS)
    p, c, e = prior.cpu()
    d = nearest_twin(c, side)
    torch.testing.assert_close(out.cpu()[0], d)
    # In float64: a twin in float32 would leave the rounding of its squares, which the kernels factor.
    p, c, e, d = (row.double() for row in (p, c, e, d))
    base, direct = out.cpu()[1:].double()
    half_step = torch.finfo(torch.float32).eps / 2
    # Two sums, two products, and the sum of two equal terms, each rounded once.
    exact = 2 * p * (e - d) * (e + d)
    assert ((base - exact).abs() <= 5 * half_step * exact.abs()).all()
    # x - c is rounded once for both factors; then each of them, their product, and that with p.
    x_c, minus, plus = (e - c).abs(), (e - c - d).abs(), (e - c + d).abs()
    bound = half_step * p * (x_c * (minus + plus) + 5 * minus * plus)
    assert ((direct - p * (e - c - d) * (e - c + d)).abs() <= bound).all()


def test_a_centre_far_outside_leaves_no_rounding_of_its_square(device):
    side, step = 7, torch.finfo(torch.float32).eps
    p, c = torch.rand(ROWS), 1000.0 + 9000.0 * torch.rand(ROWS)
    e = c - 3.5
    out = torch.empty(3, ROWS, device=device)
    row_kernel[(1,)](out, torch.stack([p, c, e]).to(device), side, ROWS)
    p, e, d = p.double(), e.double(), nearest_twin(c, side).double()
    # Two sums and three products of float32, each rounded once.
    torch.testing.assert_close(out.cpu()[1].double(), 2 * p * (e * e - d * d), rtol=5 * step, atol=0)


def test_nearest_cell_of_a_centre_inside_is_at_most_half_a_cell_away():
    inside = torch.rand(1000) * 6
    assert (nearest_twin(inside, 7).abs() <= 0.5).all()
    torch.testing.assert_close(nearest_twin(torch.tensor([-3.0, 9.0]), 7), torch.tensor([-3.0, 3.0]))


def test_weighted_moments_are_the_first_and_second_moment_about_the_centre(device):
    e_x, e_y, d_x, d_y = rows = torch.randn(4, ROWS)
    out = torch.empty(ROWS, 16, device=device)
    moments_kernel[(1,)](out, rows.to(device), ROWS)
    ds = torch.randn(ROWS, KEYS)
    of_moments = features_twin(torch.ones(KEYS, dtype=torch.bool))
    of_moments[:, [1, 9]] = 1.0
    weighted = (ds @ of_moments) * out.cpu()
    u, v = cells()
    for half, w, e, d in ((weighted[:, :8], u, e_x, d_x), (weighted[:, 8:], v, e_y, d_y)):
        second = (ds * ((w - e[:, None]) ** 2 - d[:, None] ** 2)).sum(1)
        first = (ds * (w - e[:, None] + d[:, None])).sum(1)
        torch.testing.assert_close(half[:, [0, 3, 6]].sum(1), second, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(half[:, [4, 7]].sum(1), first, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(half[:, 1], ds.sum(1))
        assert (half[:, [2, 5]] == 0).all()


def test_dropout_keeps_what_its_twin_keeps(device):
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    mask = operator.dropout_mask(seed, 2, 3, ROWS, KEYS, 0.4).cpu().flatten(0, 1)
    for batch_head in range(6):
        out = torch.empty(ROWS, KEYS, dtype=torch.int32, device=device)
        keeps_kernel[(1,)](out, seed, batch_head, round(0.4 * 2**32) - 2**31, ROWS, KEYS)
        assert torch.equal(out.cpu().bool(), mask[batch_head])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_at_its_rate_and_independently_of_neighbours(dropout_p):
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    dropped = ~operator.dropout_mask(seed, 2, 4, 100, 512, dropout_p)
    count, deviation = dropped.numel(), (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(dropped.double().mean().item() - dropout_p) <= 5 * deviation / count**0.5 + 1e-9
    centred = dropped.double() - dropout_p
    for axis in range(4):
        correlation = (centred * centred.roll(1, axis)).mean().item()
        assert abs(correlation) <= 5 * deviation**2 / count**0.5 + 1e-9


def test_grids_unpack_and_valid_parts_are_clamped_to_them(device):
    grids = [(3, 5), (1, 70000), (40000, 2), (1, 1), (7, 9), (11, 13), (17, 19), (23, 29)]
    valid = torch.tensor([[2, 9], [1, 1], [50000, 0], [-1, 1], [7, 9], [3, 4], [0, 0], [23, 1]])
    out = torch.empty(8, 4, dtype=torch.int32, device=device)
    grids_kernel[(1,)](out, valid.to(device), 8, *(height << 32 | width for height, width in grids))
    sides = torch.tensor(grids)
    assert torch.equal(out.cpu(), torch.cat([sides, valid.clamp(min=0).minimum(sides)], 1).int())
