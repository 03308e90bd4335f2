"""docs/locality.md, hunted for a counter-example: its theorem, its lemmas and its bounds of output and gradients.

The adversary knows the plan: of keys of one norm, all that a plan leaves out agree with the query as far as
Cauchy–Schwarz lets them, and those that it keeps disagree.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.backends.triton import locality
from smca_kernels.inputs import AttentionInputs

HEAD_DIM = 16


def hunt(examples: int, shrink: bool = True) -> Callable[[Any], Any]:
    """Settings of a property test that draws from the run's seed alone."""
    chosen = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    return lambda test: seed(int(os.environ["SMCA_SEED"]))(chosen(test))


# ------------------------------------------------------------------------------------------------- strategies


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def centers(side: int) -> st.SearchStrategy[float]:
    """Inside, on and between cells, just beside the grid, and far away."""
    far = st.tuples(st.sampled_from([-1.0, 1.0]), powers_of_ten(1, 5.99)).map(math.prod)
    return st.floats(-2.0, side + 1.0) | st.integers(-1, 2 * side).map(lambda n: n / 2) | far


PRECISIONS = st.just(0.0) | powers_of_ten(-8, 4)  # σ from far beyond every grid to a hundredth of a cell


def precisions(side: int) -> st.SearchStrategy[float]:
    """Half of them fall by 3 to 3000 across the grid, where windows have edges inside."""
    return PRECISIONS | powers_of_ten(0.5, 3.5).map(lambda falls: falls / side**2)


TOLERANCES = st.sampled_from([2.0**-24, 2.0**-14, 2.0**-11, 1e-12, 0.5, 0.9]) | powers_of_ten(-12, -0.05)
# Largest |scale · q·k|; at 0 the prior is all there is.
STRENGTHS = st.just(0.0) | powers_of_ten(-2, 2.5)
KEYS = (
    "adversary",  # what is left out agrees, what is kept disagrees, the nearest cell either way
    "far",  # cells far from the centre agree, near ones disagree
    "random",
    "outlier",  # random, one of them a hundred times as large
    "huge",  # random, with logits of thousands
)


@dataclass(frozen=True)
class Problem:
    """Attention of a few queries to one grid."""

    grid: tuple[int, int]
    queries: list[tuple[float, float, float, float]]  # c_x, c_y, p_x, p_y
    mask: str  # none, valid_shapes, random, nearest (of the first query)
    keys: str
    strength: float
    of_nearest: float  # the adversary's q·k of the nearest cell, -1 to 1
    scale: float
    tolerance: float
    seed: int


@st.composite
def problems(draw: st.DrawFn, most: int = 60) -> Problem:
    """Draw problems of all kinds, on grids of at most `most` cells a side."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    query = st.tuples(centers(width), centers(height), precisions(width), precisions(height))
    return Problem(
        grid=(height, width),
        queries=draw(st.lists(query, min_size=1, max_size=4)),
        mask=draw(st.sampled_from(["none", "none", "valid_shapes", "random", "nearest"])),
        keys=draw(st.sampled_from(["adversary", *KEYS])),
        strength=draw(STRENGTHS),
        of_nearest=draw(st.sampled_from([-1.0, 1.0]) | st.floats(-1.0, 1.0)),
        scale=draw(st.sampled_from([1.0, HEAD_DIM**-0.5, -0.3])),
        tolerance=draw(TOLERANCES),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def fights(draw: st.DrawFn) -> Problem:
    """An adversary against one query whose window has edges inside the grid."""
    height, width = draw(st.integers(4, 24)), draw(st.integers(8, 24))
    inside = st.tuples(st.floats(0.0, width - 1.0), st.floats(0.0, height - 1.0))
    falls = draw(powers_of_ten(1.5, 3)) / width**2
    return Problem(
        grid=(height, width),
        queries=[(*draw(inside), falls, falls)],
        mask="none",
        keys="adversary",
        strength=draw(st.floats(2.0, 15.0)),
        of_nearest=draw(st.sampled_from([-1.0, 0.0, 1.0, 1.0])),
        scale=1.0,
        tolerance=draw(powers_of_ten(-7, -0.05)),
        seed=0,
    )


Planner = Callable[[AttentionInputs, float], locality.Plan]


def one_head(
    query: Tensor, key: Tensor, center: Tensor, precision: Tensor, grid: tuple[int, int], scale: float
) -> AttentionInputs:
    """Inputs of one image, head and scale; plans don't look at values."""
    return AttentionInputs(query, key, key, center, precision, None, None, None, (grid,), 0.0, scale, 0.0)


def tensors_of(problem: Problem, dtype: torch.dtype, planner: Planner) -> AttentionInputs:
    """The problem's inputs in a dtype, center and precision in at least float32."""
    rng = np.random.default_rng(problem.seed)
    height, width = problem.grid
    keys = height * width
    prior = torch.tensor(problem.queries, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    center, precision = (part[None, None, :, None].contiguous() for part in prior.split(2, 1))
    valid_shapes, mask = None, None
    size = (height, width)
    if problem.mask == "valid_shapes":
        size = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        valid_shapes = torch.tensor([[size]])
    nearest = nearest_cell(problem, size)
    if problem.mask in ("random", "nearest"):
        ignored = rng.random(keys) < (0.4 if problem.mask == "random" else 0.0)
        ignored[nearest] = problem.mask == "nearest"
        mask = torch.from_numpy(ignored)[None]

    # Two orthogonal directions: along the query, and one that only norms see.
    query = torch.zeros(1, 1, len(problem.queries), HEAD_DIM, dtype=torch.float64)
    query[..., 0] = problem.strength / abs(problem.scale)
    aligned = torch.from_numpy(rng.uniform(-1, 1, keys))
    if problem.keys == "far":
        y, x = np.divmod(np.arange(keys), width)
        c_x, c_y, p_x, p_y = problem.queries[0]
        falls = p_x * (x - c_x) ** 2 + p_y * (y - c_y) ** 2
        aligned = torch.from_numpy(np.where(falls > np.quantile(falls, rng.random()), 1.0, -1.0))
    elif problem.keys == "outlier":
        aligned[int(rng.integers(keys))] *= 100
    elif problem.keys == "huge":
        aligned *= 1e4
    elif problem.keys == "adversary":
        aligned = torch.full((keys,), -1.0, dtype=torch.float64)
        aligned[nearest] = problem.of_nearest
    # At -0.3 the logit is what it would be at 0.3.
    aligned = aligned * math.copysign(1.0, problem.scale)
    key = torch.zeros(1, 1, keys, HEAD_DIM, dtype=torch.float64)
    key[0, 0, :, 0] = aligned
    if problem.keys == "adversary":
        key[0, 0, nearest, 1] = math.sqrt(1 - problem.of_nearest**2)
    inputs = one_head(query.to(dtype), key.to(dtype), center, precision, problem.grid, problem.scale)
    inputs = replace(inputs, valid_shapes=valid_shapes, key_padding_mask=mask)
    if problem.keys == "adversary":
        # Neither the norms change nor the nearest key, so neither does the first query's window.
        left_out = ~planner(inputs, problem.tolerance).seen(inputs.spatial_shapes)[0][0, 0, 0]
        left_out[nearest] = False
        inputs.key[0, 0, left_out, 0] *= -1
    return inputs


def nearest_cell(problem: Problem, size: tuple[int, int]) -> int:
    x, y = (
        math.floor(min(max(c, 0.0), side - 1) + 0.5) for c, side in zip(problem.queries[0][:2], size[::-1], strict=True)
    )
    return y * problem.grid[1] + x


def largest_dropped_mass(inputs: AttentionInputs, seen: list[Tensor]) -> float:
    """Largest mass that the keys that aren't seen hold of a query's softmax, in float64."""
    query, key = inputs.query.double(), inputs.key.double()
    center, precision = inputs.center.double(), inputs.precision.double()
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
    largest, first = 0.0, 0
    for s, (height, width) in enumerate(inputs.spatial_shapes):
        # Counted from a cell near the centre, which softmax doesn't see: so p c² leaves no rounding.
        origin = center[..., s, :].round().clamp(min=0).minimum(torch.tensor([width - 1.0, height - 1.0]).double())
        x, y = reference.cell_coordinates(height, width, like=query)
        cells = torch.stack((x, y), -1) - origin[..., None, :]
        offset = (center[..., s, :] - origin)[..., None, :]
        prior = (precision[..., s, :][..., None, :] * cells * (cells - 2 * offset)).sum(-1)
        logits = inputs.scale * (query @ key[:, :, first : first + height * width].transpose(-1, -2)) - prior
        if (mask := ignored[s]) is not None:
            logits = logits.masked_fill(mask[:, None, None], -math.inf)
        dropped = logits.softmax(-1).nan_to_num(nan=0.0).masked_fill(seen[s], 0.0).sum(-1)
        largest = max(largest, dropped.max().item())
        first += height * width
    return largest


def assert_tolerance_holds(problem: Problem, dtype: torch.dtype, planner: Planner) -> None:
    inputs = tensors_of(problem, dtype, planner)
    seen = planner(inputs, problem.tolerance).seen(inputs.spatial_shapes)
    # 1e-13: of a softmax in float64.
    assert largest_dropped_mass(inputs, seen) <= problem.tolerance * (1 + 1e-9) + 1e-13


# ------------------------------------------------------------------------------------------------ the theorem


def twin(block: int) -> Planner:
    def planner(inputs: AttentionInputs, tolerance: float) -> locality.Plan:
        return locality.plan(replace(inputs, mass_tolerance=tolerance), block)

    return planner


# A window for each query leaves out most.
BLOCKS = st.sampled_from([1, 1, 1, 2, 64])


@hunt(400)
@given(problem=problems() | fights(), block=BLOCKS)
def test_no_query_loses_more_than_the_tolerance_in_float64(problem: Problem, block: int) -> None:
    assert_tolerance_holds(problem, torch.float64, twin(block))


@hunt(300)
@given(problem=problems() | fights(), block=BLOCKS)
def test_no_query_loses_more_than_the_tolerance_in_float32(problem: Problem, block: int) -> None:
    assert_tolerance_holds(problem, torch.float32, twin(block))


@pytest.fixture(scope="module")
def kernels() -> Iterator[Planner]:
    """Plans as the kernels make them, of however few elements, with windows to the cell."""
    pytest.importorskip("triton")
    from smca_kernels.backends.triton import launch

    def planner(inputs: AttentionInputs, tolerance: float) -> locality.Plan:
        tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
        moved = {name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)}
        plan = launch.read_plan(replace(inputs, **moved, mass_tolerance=tolerance))
        assert plan is not None
        return locality.Plan(plan.order.cpu(), plan.windows.cpu(), plan.block)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "MIN_PLANNED_ELEMENTS", 0)
        yield planner


@hunt(30, shrink=False)  # which would take the interpreter minutes
@given(
    problem=fights() | problems(most=24),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
)
def test_no_query_loses_more_than_the_tolerance_in_the_kernels(
    kernels: Planner, problem: Problem, dtype: torch.dtype
) -> None:
    assert_tolerance_holds(problem, dtype, kernels)


def test_a_cell_just_below_a_half_is_taken_for_the_nearest_in_no_dtype() -> None:
    # 0.5 less a step, plus 0.5, rounds to 1.
    for dtype in (torch.float32, torch.float64):
        below = torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.tensor(0.0, dtype=dtype)).expand(1, 1, 1, 2)
        assert not locality.nearest_cells(below, torch.tensor([[3, 3]])).any()


def test_a_bound_twice_as_good_would_be_wrong() -> None:
    """A prior so wide that the sums of the proof are next to integrals, and the adversary's keys."""
    side, strength, tolerance = 501, 7.0, math.exp(-17)
    middle = side // 2 * side + side // 2
    center = torch.full((1, 1, 1, 1, 2), side // 2, dtype=torch.float64)
    key = torch.zeros(1, 1, side * side, 2, dtype=torch.float64)
    key[..., 0] = -strength
    key[0, 0, middle, 0] = strength
    query = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 1, 2)
    inputs = one_head(query, key, center, torch.full_like(center, 6e-4), (side, side), 1.0)
    planner = twin(1)
    seen = planner(inputs, tolerance).seen(inputs.spatial_shapes)
    key[0, 0, ~seen[0][0, 0, 0], 0] = strength
    assert torch.equal(planner(inputs, tolerance).seen(inputs.spatial_shapes)[0], seen[0])
    assert 0.5 * tolerance < largest_dropped_mass(inputs, seen) <= tolerance


# ---------------------------------------------------------------------------------------------------- its lemmas


def falls(c: float, p: float, side: int) -> np.ndarray:
    """g of the cells of one axis, from their distance to the nearest one."""
    cells = np.arange(side, dtype=np.float64)
    nearest = np.clip(np.round(c), 0, side - 1)
    return p * (cells - nearest) * (cells - nearest - 2 * (c - nearest))


@hunt(300)
@given(data=st.data(), side=st.integers(1, 300), p=powers_of_ten(-8, 4))
def test_one_axis_sums_to_at_most_two_and_an_integral(data: st.DataObject, side: int, p: float) -> None:
    g = falls(data.draw(centers(side)), p, side)
    assert g.min() == 0.0
    assert np.exp(-g).sum() <= (2 + math.sqrt(math.pi / p)) * (1 + 1e-12)


@hunt(300)
@given(data=st.data(), side=st.integers(1, 300), p=powers_of_ten(-8, 4), t=powers_of_ten(-3, 3))
def test_one_axis_beyond_t_sums_to_at_most_two_geometric_series(
    data: st.DataObject, side: int, p: float, t: float
) -> None:
    c = data.draw(centers(side))
    series = 1 / -math.expm1(-2 * math.sqrt(p * t))
    g = falls(c, p, side)
    beyond = g[g > t]
    sides = 1 if c < 0 or c > side - 1 else 2
    assert np.exp(t - beyond).sum() <= sides * series * (1 + 1e-12)
    # As the gradients of precision want it.
    assert (beyond * np.exp(t - beyond)).sum() <= sides * series * (t + 1.5) * (1 + 1e-12)


@hunt(300)
@given(data=st.data(), side=st.integers(1, 300), p=powers_of_ten(-8, 4))
def test_a_distance_is_bounded_by_what_the_prior_falls(data: st.DataObject, side: int, p: float) -> None:
    c = data.draw(centers(side))
    from_nearest = np.arange(side) - np.clip(np.round(c), 0, side - 1)
    assert (from_nearest**2 <= (1 + 2 * falls(c, p, side) / p) * (1 + 1e-12)).all()


@hunt(200)
@given(data=st.data(), height=st.integers(1, 60), width=st.integers(1, 60), log_tolerance=powers_of_ten(-2, 1.5))
def test_cells_outside_bounds_their_sum_for_every_larger_t(
    data: st.DataObject, height: int, width: int, log_tolerance: float
) -> None:
    p_x, p_y = data.draw(PRECISIONS), data.draw(PRECISIONS)
    t = log_tolerance + data.draw(st.floats(0.0, 30.0))
    g_x = falls(data.draw(centers(width)), p_x, width)[None, :]
    g_y = falls(data.draw(centers(height)), p_y, height)[:, None]
    outside = (g_x > t) | (g_y > t)
    held = np.where(outside, np.exp(t - g_x - g_y), 0.0).sum()
    bound = locality.cells_outside(torch.tensor([p_x, p_y], dtype=torch.float64), log_tolerance).item()
    assert held <= bound * (1 + 1e-12)


# ------------------------------------------------------------------------------------- output and gradients


@dataclass(frozen=True)
class Gradients:
    """Of one query and scale."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    center: Tensor
    precision: Tensor
    weight: Tensor
    probabilities: Tensor


def gradients(inputs: AttentionInputs, value: Tensor, weight: float, grad_output: Tensor, hidden: Tensor) -> Gradients:
    """Of the reference in float64, without the hidden keys."""
    tensors = [
        inputs.query,
        inputs.key,
        value,
        inputs.center,
        inputs.precision,
        torch.tensor(weight, dtype=torch.float64),
    ]
    query, key, value, center, precision, alpha = leaves = [t.detach().clone().requires_grad_() for t in tensors]
    probabilities = reference.scale_probabilities(
        query, key, center[..., 0, :], precision[..., 0, :], *inputs.spatial_shapes[0], hidden, inputs.scale
    )
    output = alpha * (probabilities @ value)
    found = torch.autograd.grad(output, leaves, grad_output)
    return Gradients(output.detach(), *found, probabilities.detach().flatten())


@hunt(200)
@given(problem=problems(most=24) | fights(), weight=st.floats(-2.0, 2.0))
def test_output_and_gradients_change_by_no_more_than_documented(problem: Problem, weight: float) -> None:
    c_x, c_y, p_x, p_y = problem.queries[0]
    # Of a centre far away the reference's own rounding would drown the rest.
    assume(p_x * c_x**2 + p_y * c_y**2 < 1e6 and problem.mask == "none" and problem.strength < 100)
    problem = replace(problem, queries=problem.queries[:1])
    inputs = tensors_of(problem, torch.float64, twin(1))
    height, width = problem.grid
    hidden = ~twin(1)(inputs, problem.tolerance).seen(inputs.spatial_shapes)[0][:, 0, 0]
    generator = torch.Generator().manual_seed(problem.seed)
    value = torch.randn(1, 1, height * width, 3, generator=generator, dtype=torch.float64)
    if problem.keys == "adversary":
        value[0, 0, hidden[0]] += 5.0
    grad_output = torch.randn(1, 1, 1, 3, generator=generator, dtype=torch.float64)
    full = gradients(inputs, value, weight, grad_output, torch.zeros_like(hidden))
    ours = gradients(inputs, value, weight, grad_output, hidden)

    mass = full.probabilities[hidden[0]].sum().item()
    of_value = (value @ grad_output[0, 0, 0]).flatten()
    spread = (of_value.max() - of_value.min()).item()
    omega = abs(weight) * spread
    nearest = locality.nearest_cells(inputs.center[..., 0, :], torch.tensor([[width, height]]))[0, 0, 0]
    x, y = reference.cell_coordinates(height, width, like=value)
    norm = inputs.key.norm(dim=-1).max().item()
    bounds = {
        "output": abs(weight) * mass * (value.abs().amax((0, 1, 2)) + (ours.output / (weight or 1.0)).abs()),
        "query": 2.5 * abs(inputs.scale) * mass * omega * norm,
        "key": 2 * abs(inputs.scale) * mass * omega * inputs.query.norm(),
        "value": mass * abs(weight) * grad_output.norm(),
        "weight": mass * spread,
    }
    for name, bound in bounds.items():
        change = getattr(ours, name) - getattr(full, name)
        size = change.norm(dim=-1) if name in ("query", "key", "value") else change.abs()
        assert (size <= bound * (1 + 1e-9) + 1e-10).all(), name

    t = locality.thresholds(
        inputs.query, inputs.key, inputs.center[..., 0, :], inputs.precision[..., 0, :], nearest[None, None, None],
        problem.grid, torch.tensor([[width, height]]), None, inputs.scale, problem.tolerance,
    ).item()  # fmt: skip
    for axis, cells in enumerate((x, y)):
        c, p = inputs.center[0, 0, 0, 0, axis].item(), inputs.precision[0, 0, 0, 0, axis].item()
        from_nearest = cells - nearest[axis]
        squared = from_nearest * (from_nearest - 2 * (c - nearest[axis]))
        of_center, of_precision = (
            (getattr(ours, name) - getattr(full, name))[0, 0, 0, 0, axis].abs().item()
            for name in ("center", "precision")
        )
        rounding = 1e-10 * (1 + c * c)
        assert of_precision <= 1.25 * mass * omega * squared.max() + rounding
        assert of_center <= 2.5 * p * mass * omega * (cells.max() - cells.min()) + p * rounding
        if math.isfinite(t) and p > 0.0:
            fallen = p * (ours.probabilities * squared).sum().item()
            epsilon = problem.tolerance
            assert p * of_precision <= epsilon * omega * (t + 1.5 + 2 * fallen) + p * rounding
            distance = math.sqrt(1 + (2 * t + 3) / p) + 2 * math.sqrt(1 + 2 * fallen / p)
            assert of_center <= 2 * p * epsilon * omega * distance + p * rounding
