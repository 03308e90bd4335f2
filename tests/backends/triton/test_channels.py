"""Each helper that the kernels share against its PyTorch twin, written from the formulas in channels.py."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from smca_kernels.backends.triton import channels, launch, merge, operator  # noqa: E402
from smca_kernels.backends.triton.key_major import cells_in_strips, invalid_cells  # noqa: E402

ROWS, KEYS = 16, 32
EPS = torch.finfo(torch.float32).eps


# ------------------------------------------------------------------------------------------------------- twins


def features_twin(x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[KEYS, 16] in float64; what isn't a key's is as documented for one that doesn't count."""

    def of_axis(position: torch.Tensor, last: float) -> list[torch.Tensor]:
        square = position.double() ** 2
        low = square % 256
        high = square - low
        one = torch.full_like(low, 16.0)
        return [high / 256, high / 256, low / 256, low / 256, position.double(), position.double(), one, one * last]

    features = torch.stack([*of_axis(x, 0.0), *of_axis(y, 1.0)], 1)
    nothing = torch.zeros(16, dtype=torch.float64)
    nothing[7] = 65504.0
    return torch.where(counts[:, None], features, nothing)


def nearest_twin(c: torch.Tensor, side: int) -> torch.Tensor:
    return torch.floor(c.clamp(0, side - 1) + 0.5)


def largest_term_twin(p: torch.Tensor, e: torch.Tensor, n: torch.Tensor, side: int) -> torch.Tensor:
    reach = max(side / 2, 1.0)
    return p * torch.maximum(reach * (2 * e.abs()).clamp(min=reach), (n * (2 * e - n)).abs())


# ----------------------------------------------------------------------------------------------------- kernels


@triton.jit
def features_kernel(out, positions, x, y, counts, KEYS: tl.constexpr, IN_BFLOAT16: tl.constexpr):
    keys = tl.arange(0, KEYS)
    x, y, counts = tl.load(x + keys), tl.load(y + keys), tl.load(counts + keys) != 0
    features = channels.load_features(positions, x, y, counts, IN_BFLOAT16)
    tl.store(out + keys[:, None] * 16 + tl.arange(0, 16)[None, :], features.to(tl.float32))


@triton.jit
def coefficients_kernel(out, prior, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    p_x = tl.load(prior + rows)
    p_y = tl.load(prior + ROWS + rows)
    e_x = tl.load(prior + 2 * ROWS + rows)
    e_y = tl.load(prior + 3 * ROWS + rows)
    n_x = tl.load(prior + 4 * ROWS + rows)
    n_y = tl.load(prior + 5 * ROWS + rows)
    log_sum = tl.load(prior + 6 * ROWS + rows)
    coefficients = channels.prior_coefficients(p_x, p_y, e_x, e_y, n_x, n_y, log_sum)
    tl.store(out + rows[:, None] * 16 + tl.arange(0, 16)[None, :], coefficients.to(tl.float32))


@triton.jit
def row_kernel(out, prior, side, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    p = tl.load(prior + rows)
    c = tl.load(prior + ROWS + rows)
    x = tl.load(prior + 2 * ROWS + rows)
    n = channels.nearest_cell(c, side)
    tl.store(out + rows, n)
    nothing = tl.zeros([ROWS], tl.float32)
    tl.store(out + ROWS + rows, -channels.direct_logits(nothing, 1.0, p, nothing, x - n, nothing, c - n, nothing))


@triton.jit
def is_direct_kernel(out, prior, across, down, inverse_scale, limit, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    p_x = tl.load(prior + rows)
    p_y = tl.load(prior + ROWS + rows)
    e_x = tl.load(prior + 2 * ROWS + rows)
    e_y = tl.load(prior + 3 * ROWS + rows)
    n_x = tl.load(prior + 4 * ROWS + rows)
    n_y = tl.load(prior + 5 * ROWS + rows)
    tl.store(out, channels.is_direct(p_x, p_y, e_x, e_y, n_x, n_y, across, down, inverse_scale, limit))


@triton.jit
def window_kernel(out, x0, y0, x1, width, tiles, KEYS: tl.constexpr):
    across = x1 - x0
    keys = tl.arange(0, KEYS)
    x = x0 + keys % across
    y = y0 + keys // across
    cell = y * width + x
    for tile in range(tiles):
        tl.store(out + (tile * KEYS + keys) * 3, x)
        tl.store(out + (tile * KEYS + keys) * 3 + 1, y)
        tl.store(out + (tile * KEYS + keys) * 3 + 2, cell)
        x, y, cell = channels.next_cells(x, y, cell, x1, across, width, KEYS)


@triton.jit
def strips_kernel(out, valid_height, valid_width, width, count, outside, KEYS: tl.constexpr):
    for start in range(0, count, KEYS):
        t = start + tl.arange(0, KEYS)
        x, y = cells_in_strips(tl.minimum(t, count - 1), valid_height, valid_width)
        tl.store(out + t * 2, x, mask=t < count)
        tl.store(out + t * 2 + 1, y, mask=t < count)
    for start in range(0, outside, KEYS):
        u = start + tl.arange(0, KEYS)
        x, y = invalid_cells(u, valid_height, valid_width, width)
        tl.store(out + (count + u) * 2, x, mask=u < outside)
        tl.store(out + (count + u) * 2 + 1, y, mask=u < outside)


@triton.jit
def splits_kernel(out, tiles_of_scales, scales, splits, SPLITS: tl.constexpr):
    all_tiles = 0
    for s in range(scales):
        all_tiles += channels.tiles_to_share(tl.load(tiles_of_scales + s))
    before = 0
    i = tl.arange(0, SPLITS)
    for s in range(scales):
        tiles = tl.load(tiles_of_scales + s)
        first, run = channels.run_of_split(all_tiles, i, splits, before, tiles)
        first_split, end_split = merge.splits_of_run(all_tiles, splits, before, tiles)
        at = out + (s * SPLITS + i) * 3
        tl.store(at, first)
        tl.store(at + 1, run)
        tl.store(at + 2, ((i >= first_split) & (i < end_split)).to(tl.int32))
        before += channels.tiles_to_share(tiles)


@triton.jit(do_not_specialize=["batch_head", "threshold"])
def keeps_kernel(out, seed, batch_head, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
    row_key = channels.dropout_row_key(tl.load(seed), batch_head, rows)
    kept = channels.keeps(row_key[:, None], channels.dropout_key_key(keys)[None, :], threshold)
    tl.store(out + rows[:, None] * KEYS + keys[None, :], kept.to(tl.int32))


@triton.jit
def grids_kernel(out, valid_shapes, scales, g0, g1, g2, g3, g4, g5, g6, g7):
    for s in range(scales):
        height, width = channels.grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
        valid_height, valid_width = channels.valid_part(valid_shapes, 0, s, scales, height, width)
        tl.store(out + 4 * s, height)
        tl.store(out + 4 * s + 1, width)
        tl.store(out + 4 * s + 2, valid_height)
        tl.store(out + 4 * s + 3, valid_width)


# ------------------------------------------------------------------------------------------------------- tests


def coefficients_of(device, *rows: torch.Tensor) -> torch.Tensor:
    """What the kernels make of p_x, p_y, e_x, e_y, n_x, n_y and log_sum, [ROWS, 16] float64."""
    out = torch.empty(ROWS, 16, device=device)
    coefficients_kernel[(1,)](out, torch.stack(rows).float().to(device), ROWS)
    return out.cpu().double()


def features_of(device, x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor, in_bfloat16: bool) -> torch.Tensor:
    out = torch.empty(len(x), 16, device=device)
    arguments = (each.int().to(device) for each in (x, y, counts))
    features_kernel[(1,)](out, launch.position_table(out.device), *arguments, len(x), in_bfloat16)
    return out.cpu().double()


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_features_are_the_squares_and_positions_in_the_documented_channels(in_bfloat16, device):
    x = torch.cat([torch.arange(-255, 256), torch.tensor([0])])
    y = x.flip(0)[torch.randperm(512)]
    counts = torch.arange(512) % 5 != 0
    expected = features_twin(x, y, counts)
    if in_bfloat16:
        expected[:, 7] = torch.where(counts, 0.0, 65504.0).bfloat16().double()
    assert torch.equal(features_of(device, x, y, counts, in_bfloat16), expected)


def test_features_are_the_same_whatever_the_default_dtype(device):
    expected, default = launch.make_position_table(device), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(launch.make_position_table(device), expected)
    finally:
        torch.set_default_dtype(default)


def test_coefficients_are_sums_of_float16_terms(device):
    p, e = (torch.randn(2, ROWS) * 10.0 ** torch.randint(-4, 1, (2, ROWS)) for _ in range(2))
    p, n = p.abs(), torch.randint(-255, 256, (2, ROWS)).float()
    log_sum = 100.0 * torch.randn(ROWS)
    rows = coefficients_of(device, *p, *e, *n, log_sum)
    assert torch.equal(rows, rows.half().double())
    assert torch.equal(rows[:, 7], torch.full((ROWS,), -65504.0, dtype=torch.float64))
    base = -log_sum.double()
    largest = log_sum.double().abs()
    for i, channels_of_axis in enumerate((rows[:, :6], rows[:, 8:14])):
        square, square_rest, high, high_rest, linear, linear_rest = channels_of_axis.T
        assert torch.equal(torch.stack([square, square_rest]), torch.stack([high, high_rest]))
        # A product is rounded to float32, its second term to float16: 2⁻²⁴ and 2⁻²³ of it, or half of float16's last.
        for terms, exact in (
            (square + square_rest, -256 * p[i].double()),
            (linear + linear_rest, 2 * p[i].double() * e[i].double()),
        ):
            assert ((terms - exact).abs() <= 3 * 2.0**-24 * exact.abs() + 2.0**-25).all()
        base -= n[i].double() * (linear + linear_rest + (square + square_rest) * n[i].double() / 256)
        largest += (n[i].double() * linear).abs() + (n[i].double() ** 2 * square / 256).abs()
    # Of the terms as they are: no more is lost than float32 rounds, five times.
    assert ((16 * rows[:, [6, 14, 15]].sum(1) - base).abs() <= 5 * 2.0**-24 * largest + 16 * 2.0**-25).all()


def truncated_sums(coefficients: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Products [ROWS, KEYS] as tensor cores of sm_80 sum them: terms cut to 2⁻²⁴ of the largest, in float64."""
    terms = coefficients[:, None] * features[None]
    unit = 2.0 ** (terms.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 24)
    return ((terms / unit).trunc() * unit).sum(-1)


# Windows (across, down), the largest precision, and how far outside of it centres lie.
REGIMES = {
    "ordinary": ((84, 50), 0.25, 0.0),
    "narrow": ((20, 11), 4.0, 0.0),
    "wide": ((167, 100), 1e-3, 0.0),
    "hardly any": ((84, 50), 1e-7, 0.0),
    "far outside": ((42, 25), 0.01, 1000.0),
    "as large as can be": ((511, 511), 0.005, 0.0),
    "one cell": ((1, 1), 50.0, 3.0),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_product_is_the_log_prior_up_to_some_parts_in_2_to_the_24_of_its_largest_term(regime, device):
    (across, down), largest_p, away = REGIMES[regime]
    p = largest_p * torch.rand(2, ROWS).float()
    side = torch.tensor([[across], [down]])
    origin = side // 2
    c = (torch.rand(2, ROWS) * side + away * torch.randn(2, ROWS).sign() * torch.rand(2, ROWS)).float()
    n = torch.stack([nearest_twin(c[0], across), nearest_twin(c[1], down)])
    e, n = c - origin, n - origin
    rows = coefficients_of(device, *p, *e, *n, torch.zeros(ROWS))
    x = torch.cat([torch.arange(across), torch.randint(across, (across,)), n[0].long() + origin[0]]) - origin[0]
    y = torch.cat([torch.randint(down, (2 * across,)), n[1].long() + origin[1]]) - origin[1]
    features = features_twin(x, y, torch.ones(len(x), dtype=torch.bool))
    p, e, n = (each.double()[:, :, None] for each in (p, e, n))
    largest = torch.maximum(*(largest_term_twin(p[i], e[i], n[i], (across, down)[i]) for i in (0, 1)))
    # Each of 15 terms is cut by less than a part, and 5 are for the float32 arithmetic that makes the base.
    bound = (15 + 5) * 2.0**-24 * largest + 16 * 2.0**-25
    exact = torch.zeros(ROWS, len(x), dtype=torch.float64)
    for i, z in ((0, x.double()), (1, y.double())):
        exact -= p[i] * ((z - e[i]) ** 2 - (n[i] - e[i]) ** 2)
        # What float16 loses of a square's coefficient and a position's is nothing at the nearest cell.
        square, position = (z * z - n[i] ** 2).abs(), (z - n[i]).abs()
        bound = bound + 2.0**-23 * p[i] * (square + 3 * e[i].abs() * position) + 2.0**-25 * (square / 256 + position)
    assert ((truncated_sums(rows, features) - exact).abs() <= bound).all()


@pytest.mark.parametrize(("beyond", "direct"), [(0.999, 0), (1.001, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_block_is_direct_where_a_term_of_one_query_passes_the_limit(dtype, beyond, direct, device):
    limit, (across, down) = launch.DIRECT_LIMITS[dtype], (84, 50)
    p, e = torch.full((2, ROWS), 1e-3), 20 * torch.rand(2, ROWS)
    n = e.floor()
    row = int(torch.randint(ROWS, (1,)))
    axis = int(torch.randint(2, (1,)))
    p[axis, row] *= beyond * limit / largest_term_twin(p[axis], e[axis], n[axis], (across, down)[axis])[row]
    out = torch.empty(1, dtype=torch.int32, device=device)
    rows = torch.cat([p, e, n]).to(device)
    is_direct_kernel[(1,)](out, rows, across, down, 1.0, limit, ROWS)
    assert out.item() == direct


@pytest.mark.parametrize(
    ("change", "window", "inverse_scale", "direct"),
    [
        ({}, (511, 511), 1.0, 0),
        ({}, (512, 3), 1.0, 1),  # positions are exact to 255 cells from the origin
        ({}, (3, 512), 1.0, 1),
        ({0: 0.01}, (3, 3), 1e6, 1),  # 256 p / scale overflows float16
        ({0: 1e-3, 2: 1e30}, (3, 3), 1.0, 1),
        ({0: math.nan}, (3, 3), 1.0, 1),
        ({1: math.inf}, (3, 3), 1.0, 1),
    ],
)
def test_a_block_is_direct_where_positions_or_coefficients_do_not_fit(change, window, inverse_scale, direct, device):
    rows = torch.zeros(6, ROWS)
    for i, value in change.items():
        rows[i, 5] = value
    out = torch.empty(1, dtype=torch.int32, device=device)
    is_direct_kernel[(1,)](out, rows.to(device), *window, inverse_scale, 4096.0, ROWS)
    assert out.item() == direct


def test_coefficients_of_a_block_that_is_not_direct_fit_float16(device):
    across, down = 84, 50
    taken = torch.empty(1, dtype=torch.int32, device=device)
    not_direct = 0
    for draw in range(60):
        inverse_scale = 2.0 ** (10 * torch.rand(1).item())
        side = torch.tensor([[across], [down]])
        e = (torch.rand(2, ROWS) - 0.5) * 20 * side  # far outside, where the base is the largest term
        n = torch.stack([nearest_twin(e[0] + across // 2, across), nearest_twin(e[1] + down // 2, down)]) - side // 2
        # Together the largest terms of the first query's axes are about as much as its base may be, or less.
        p = torch.full((2, ROWS), 1e-3)
        largest = torch.stack(
            [largest_term_twin(*each) for each in zip(torch.ones(2, ROWS), e, n, (84, 50), strict=True)]
        )
        share = 0.47 + 0.03 * torch.rand(1) if draw % 2 else torch.rand(1) / 2
        p[:, 0] = share * 16 * 65504.0 / inverse_scale / largest[:, 0]
        is_direct_kernel[(1,)](taken, torch.cat([p, e, n]).to(device), across, down, inverse_scale, 1e30, ROWS)
        if not taken.item():
            not_direct += 1
            log_sum = torch.full((ROWS,), 65503.0)
            assert coefficients_of(device, *(p * inverse_scale), *e, *n, log_sum).isfinite().all()
    assert not_direct > 0


def test_rows_see_their_nearest_cell_and_the_direct_prior(device):
    side = 7
    prior = torch.randn(3, ROWS) * 10.0 ** torch.randint(-4, 4, (3, ROWS))
    prior[0].abs_()
    prior[2] = torch.randint(side, (ROWS,)).float()
    out = torch.empty(2, ROWS, device=device)
    row_kernel[(1,)](out, prior.to(device), side, ROWS)
    p, c, x = prior
    n = nearest_twin(c, side)
    assert torch.equal(out.cpu()[0], n)
    p, c, x, n = (row.double() for row in (p, c, x, n))
    # c - n, x - n - 2 (c - n), its product with x - n and that with p are rounded once each.
    d, u = c - n, x - n
    bound = EPS / 2 * p * u.abs() * (2 * d.abs() + 3 * (u - 2 * d).abs())
    assert ((out.cpu()[1].double() - p * u * (u - 2 * d)).abs() <= 1.001 * bound).all()


def test_the_prior_is_1_at_the_nearest_cell_of_a_centre_far_outside(device):
    side = 7
    p, c, x = torch.rand(ROWS), 1000.0 + 9000.0 * torch.rand(ROWS), torch.full((ROWS,), 6.0)
    out = torch.empty(2, ROWS, device=device)
    row_kernel[(1,)](out, torch.stack([p, c, x]).to(device), side, ROWS)
    assert not out.cpu()[1].any()


@pytest.mark.parametrize("across", [1, 3, 31, 32, 33, 200])
def test_a_window_is_enumerated_row_by_row(across, device):
    x0, y0, width, tiles = 5, 7, 211, 9
    out = torch.empty(tiles * KEYS, 3, dtype=torch.int32, device=device)
    window_kernel[(1,)](out, x0, y0, x0 + across, width, tiles, KEYS)
    i = torch.arange(tiles * KEYS)
    x, y = x0 + i % across, y0 + i // across
    assert torch.equal(out.cpu(), torch.stack([x, y, y * width + x], 1).int())


@pytest.mark.parametrize("valid", [(13, 9), (8, 9), (1, 9), (13, 1), (5, 4), (13, 5), (0, 9), (13, 0)])
def test_strips_and_what_lies_outside_are_every_cell_once(valid, device):
    (height, width), (valid_height, valid_width) = (13, 9), valid
    count = valid_height * valid_width
    out = torch.empty(height * width, 2, dtype=torch.int32, device=device)
    strips_kernel[(1,)](out, valid_height, valid_width, width, count, height * width - count, KEYS)
    x, y = out.cpu().unbind(1)
    assert sorted((y * width + x).tolist()) == list(range(height * width))
    assert ((x[:count] < valid_width) & (y[:count] < valid_height)).all()
    for tile in range(count // KEYS if valid == (8, 9) else 0):  # a full strip: patches as wide as high
        assert x[tile * KEYS : (tile + 1) * KEYS].max() - x[tile * KEYS : (tile + 1) * KEYS].min() <= KEYS // 8


@pytest.mark.parametrize("most", [2, 30])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16])
def test_splits_share_all_tiles_equally_and_their_places_differ(splits, most, device):
    tiles = [int(t) for t in torch.randint(0, most, (4,))]
    tiles[int(torch.randint(4, (1,)))] = 0
    out = torch.empty(4, 16, 3, dtype=torch.int32, device=device)
    splits_kernel[(1,)](out, torch.tensor(tiles, dtype=torch.int32, device=device), 4, splits, 16)
    first, run, seen = out.cpu()[:, :splits].unbind(-1)
    # One after the other: what it costs to start a scale, and its tiles.
    units = [(s, t) for s, count in enumerate(tiles) if count for t in range(-channels.SCALE_TILES.value, count)]
    in_use = min(splits, len(units))
    assert not run[:, in_use:].any()
    for i in range(in_use):
        own = units[len(units) * i // in_use : len(units) * (i + 1) // in_use]
        for s in range(4):
            run_of_scale = [t for scale, t in own if scale == s and t >= 0]
            assert list(range(first[s, i], first[s, i] + run[s, i])) == run_of_scale
    # Start costs alone are no run, and no split between a scale's first and last is without one.
    assert torch.equal(seen.bool(), run > 0)
    places = [int(i) + s for s in range(4) for i in (run[s] > 0).nonzero()]
    assert len(set(places)) == len(places)


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
