"""Which keys the kernels look at, against the PyTorch twin, and that forward and backward look at the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.backends.triton import locality
from smca_kernels.inputs import MASS_TOLERANCES
from smca_kernels.testing.budget import Comparison, poisoned_memory
from smca_kernels.testing.cases import DTYPES, Case, CaseInputs, make_inputs
from smca_kernels.testing.check import Expectation, attend, run_backend

pytest.importorskip("triton")

from smca_kernels.backends.triton import launch

GRIDS = ((9, 40), (5, 6))
PYRAMID = ((100, 167), (50, 84), (25, 42), (13, 21))


pytestmark = pytest.mark.usefixtures("always_planned")


def kernel_plan(inputs: CaseInputs, tolerance: float) -> locality.Plan:
    """The kernels' plan, made in memory that held NaN."""
    with torch.no_grad(), poisoned_memory():
        plan = launch.read_plan(dataclasses.replace(inputs, mass_tolerance=tolerance))
    assert plan is not None
    return plan


def elements(inputs: CaseInputs) -> int:
    batch, heads, queries, _ = inputs.query.shape
    return batch * heads * queries * inputs.key.shape[2]


# ----------------------------------------------------------------------------------------- order and windows


def twin_windows(inputs: CaseInputs, tolerance: float, like: locality.Plan, factor: float = 1.0) -> Tensor:
    """The twin's windows in float64 for the order and blocks of a plan, with every threshold t times a factor."""
    thresholds = locality.thresholds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality, "thresholds", lambda *arguments: thresholds(*arguments) * factor)
        patch.setattr(locality, "order_of", lambda *_: like.order)
        wide = dataclasses.replace(inputs.double(), mass_tolerance=tolerance)
        plan = locality.plan(wide, block=like.block)
    return plan.windows


def assert_plan_is_the_twin_s(inputs: CaseInputs, tolerance: float) -> None:
    plan = kernel_plan(inputs, tolerance)
    each_once = torch.arange(plan.order.shape[2], device=plan.order.device).expand_as(plan.order)
    assert torch.equal(plan.order.sort(-1).values, each_once)
    # What float32 rounds away is far less than a thousandth of t, and of nothing else does a window depend so finely.
    least, most = (twin_windows(inputs, tolerance, plan, factor) for factor in (0.999, 1.001))
    # Of an image without a cell every window is empty, along one axis at least: the other then says nothing.
    holds, should_hold = ((each[..., 2:] > each[..., :2]).all(-1) for each in (plan.windows, most))
    assert torch.equal(holds, should_hold)
    windows, least, most = plan.windows[holds], least[holds], most[holds]
    assert (most[..., :2] <= windows[..., :2]).all()
    assert (windows[..., :2] <= least[..., :2]).all()
    assert (least[..., 2:] <= windows[..., 2:]).all()
    assert (windows[..., 2:] <= most[..., 2:]).all()


@pytest.mark.parametrize("queries", [5, 17, 64, 300])
@pytest.mark.parametrize("grid", [(9, 17), (40, 6)])
def test_the_order_is_the_twin_s(
    grid: tuple[int, int], queries: int, device: torch.device, generator: torch.Generator
) -> None:
    case = Case("", ((3, 5), grid), queries=queries, head_dim=16, dtype="bfloat16")
    inputs = make_inputs(case, generator, device)
    (height, width), blocks = grid, -(-queries // 64)
    # No centre on the edge of two strips, and no two at nearly the same place in one, but for some that are equal.
    strips = max(round(math.sqrt(blocks * height / width)), 1)
    strip = torch.randint(strips, (queries,), generator=generator)
    x = torch.randperm(queries, generator=generator) / queries * (width - 1)
    y = (strip + 0.1 + 0.8 * torch.rand(queries, generator=generator)) / strips * (height - 1)
    y[0], y[1] = 0.0, height - 1
    x[queries // 2 + 2 :], y[queries // 2 + 2 :] = x[2], y[2]
    with torch.no_grad():
        inputs.center[0, 0, :, 1] = torch.stack((x, y), -1)
    order = kernel_plan(inputs, 0.1).order
    assert torch.equal(order, locality.order_of(inputs.center.detach().double(), case.spatial_shapes, block=64))


@pytest.mark.parametrize("away", [math.nan, math.inf, -math.inf, 1e30])
def test_centres_that_are_nowhere_have_a_place_in_the_order(
    away: float, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(Case("", ((4, 40),), queries=70, head_dim=16, dtype="float16"), generator, device)
    with torch.no_grad():
        inputs.center[:, :, ::3] = away
    order = kernel_plan(inputs, 0.1).order
    assert torch.equal(order.sort(-1).values, torch.arange(70, device=device)[None, None])


def test_neighbours_in_the_order_are_neighbours_in_the_image(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((40, 60),), queries=300, head_dim=16), generator, device)
    order = kernel_plan(inputs, 0.1).order
    center = inputs.center.detach()[..., 0, :]
    in_order = center.gather(2, order[..., None].expand_as(center))

    def extent(of: Tensor) -> float:
        return sum((part.amax(2) - part.amin(2)).prod(-1).item() for part in of.split(64, 2))

    assert extent(in_order) < 0.5 * extent(center)


WINDOW_CASES = [
    Case("narrow", GRIDS, queries=70, prior="narrow"),
    Case("ordinary", ((20, 24), (7, 9)), heads=2, queries=40, head_dim=64),
    Case("ordinary in a batch", GRIDS, batch=2, queries=17, mask="valid_shapes", head_dim=16),
    Case("wide", GRIDS, queries=33, prior="wide", head_dim=16),
    Case("far", GRIDS, batch=2, queries=33, prior="far", mask="valid_shapes", head_dim=16),
    Case("shared by heads", GRIDS, heads=3, queries=9, prior_heads=1, prior="narrow"),
    Case("padding", GRIDS, batch=2, queries=17, prior="narrow", mask="padding"),
    Case("random mask", GRIDS, batch=2, queries=2, prior="narrow", mask="random"),
    Case("empty scale", GRIDS, batch=2, queries=9, prior="narrow", mask="empty_scale"),
    Case("one query", ((33, 70),), queries=1),
    Case("300 queries", ((33, 20),), queries=300, prior="narrow", head_dim=16),
    Case("one cell", ((1, 1), (1, 40), (37, 1), (2, 2)), queries=5, head_dim=20),
    Case("small logits", GRIDS, batch=2, queries=33, scale=1e-3, mask="valid_shapes"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.5), ("bfloat16", 2.0**-11)])
@pytest.mark.parametrize("case", WINDOW_CASES, ids=lambda case: case.name)
def test_windows_are_the_twin_s_to_the_cell(
    case: Case,
    dtype: str,
    tolerance: float,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    assert_plan_is_the_twin_s(make_inputs(dataclasses.replace(case, dtype=dtype), generator, device), tolerance)


def prior_of_width(fraction: float, dtype: str, generator: torch.Generator) -> CaseInputs:
    """300 queries anywhere on `PYRAMID`, with σ a fraction of each grid's width."""
    inputs = make_inputs(Case("", PYRAMID, heads=2, queries=300, dtype=dtype), generator)
    sides = torch.tensor([(width, height) for height, width in PYRAMID])
    relative = torch.rand(1, 2, 300, 1, 2, generator=generator)
    precision = 1 / (2 * (fraction * sides[:, :1]) ** 2)
    return dataclasses.replace(
        inputs, center=relative * sides - 0.5, precision=precision.expand(inputs.precision.shape).contiguous()
    )


def computed_of_pyramid(inputs: CaseInputs) -> float:
    """Elements that the twin computes with blocks as on a GPU, as a fraction of all."""
    return locality.plan(inputs).computed().sum().item() / elements(inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_prior_leaves_out_nearly_half(dtype: str, generator: torch.Generator) -> None:
    assert computed_of_pyramid(prior_of_width(0.02, dtype, generator)) <= 1 / 1.8


def test_a_wide_prior_leaves_out_nothing(generator: torch.Generator) -> None:
    assert computed_of_pyramid(prior_of_width(1.0, "bfloat16", generator)) == 1.0


# ------------------------------------------------------------------------------------ output and gradients


@contextmanager
def seen_alone(seen: list[Tensor], inputs: CaseInputs) -> Iterator[None]:
    """In this block, the reference has a prior of 0 at all keys that a query doesn't see."""
    of_shape = dict(zip(inputs.spatial_shapes, seen, strict=True))
    assert len(of_shape) == len(seen)
    log_prior = reference.log_prior

    def windowed(center: Tensor, precision: Tensor, height: int, width: int) -> Tensor:
        return torch.where(of_shape[height, width], log_prior(center, precision, height, width), -math.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "log_prior", windowed)
        yield


def assert_all_within_budget(comparisons: list[Comparison]) -> None:
    over = [str(comparison) for comparison in comparisons if not comparison.ratio <= 1.0]
    assert not over, "\n".join(over)


def gathered_inputs(case: Case, generator: torch.Generator, device: torch.device) -> CaseInputs:
    """Queries that look at the left of the image, so that narrow priors leave out the right.

    If they are more than a few, a few more than a block has.
    """
    if case.queries > 9:
        case = dataclasses.replace(case, queries=35 if case.dtype == "float32" else 67)
    inputs = make_inputs(case, generator, device)
    with torch.no_grad():
        inputs.center[..., 0] *= 0.2
    return inputs


TOLERANCES = [0.0, None, 1e-6, 1e-3, 0.1, 0.5, 0.9]
NARROW = Case("narrow", ((4, 25), (5, 4)), prior="narrow", head_dim=16)
ATTENTION_CASES = [
    NARROW,
    Case("ordinary", ((5, 25), (4, 6)), scale=0.02, head_dim=16),
    Case("far", ((5, 25),), batch=2, queries=9, prior="far", mask="valid_shapes", head_dim=16),
    Case("padding", ((4, 25), (18, 3)), batch=2, queries=9, prior="narrow", mask="padding"),
    Case("wide", ((5, 9), (5, 4)), queries=9, prior="wide", head_dim=16),
    Case("shared by heads", ((4, 25),), heads=2, queries=9, prior_heads=1, prior="narrow", head_dim=16),
    Case("one query", ((9, 25), (3, 3)), queries=1, prior="narrow", head_dim=64),
]
SWEEP = [
    (dataclasses.replace(ATTENTION_CASES[(i + 2 * j) % len(ATTENTION_CASES)], dtype=dtype), tolerance)
    for i, tolerance in enumerate(TOLERANCES)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(
    ("case", "tolerance"), SWEEP, ids=[f"{case.name}-{case.dtype}-{tolerance}" for case, tolerance in SWEEP]
)
def test_output_and_gradients_are_those_of_the_keys_in_the_windows(
    case: Case, tolerance: float | None, device: torch.device, generator: torch.Generator
) -> None:
    inputs = gathered_inputs(case, generator, device)
    with poisoned_memory():
        actual = run_backend(inputs, "triton", mass_tolerance=tolerance)
    tolerance = MASS_TOLERANCES[inputs.query.dtype] if tolerance is None else tolerance
    if tolerance == 0.0:
        expectation = Expectation.of(inputs)
    else:
        plan = kernel_plan(inputs, tolerance)
        if case.prior == "narrow":
            assert plan.computed().sum() < elements(inputs)
        with seen_alone(plan.seen(case.spatial_shapes), inputs):
            expectation = Expectation.of(inputs)
    assert_all_within_budget(expectation.compare(actual))


def dropped_mass(inputs: CaseInputs, seen: Tensor) -> float:
    """Largest mass that a query loses at the only scale, in float64."""
    wide, (height, width) = inputs.double(), inputs.spatial_shapes[0]
    center, precision = wide.center[..., 0, :], wide.precision[..., 0, :]
    with torch.no_grad():
        probabilities = reference.scale_probabilities(
            wide.query, wide.key, center, precision, height, width, None, inputs.scale
        )
    return probabilities.masked_fill(seen, 0.0).sum(-1).max().item()


def fought_inputs(
    dtype: str, tolerance: float, precision: float, generator: torch.Generator, device: torch.device
) -> tuple[CaseInputs, float]:
    """Inputs whose plan leaves out keys that agree with all queries and have large values; and the mass of those."""
    case = Case("", ((3, 40),), queries=9, scale=1.0, head_dim=16, dtype=dtype)
    inputs = make_inputs(case, generator, device)
    with torch.no_grad():
        # All queries are nearest to the cell (5, 1), whose key agrees with them; those around it don't.
        inputs.center[:] = torch.tensor([5.0, 1.0]) + 0.4 * torch.rand(inputs.center.shape, generator=generator)
        inputs.precision[:] = torch.tensor([precision, 1e-3])
        inputs.query.mul_(0.02)[..., 0] = 4.0
        inputs.key.mul_(0.02)[..., 0] = -1.0
        inputs.key[:, :, 45, 0] = 1.0
        hidden = ~kernel_plan(inputs, tolerance).seen(case.spatial_shapes)[0].any(2)
        inputs.key[..., 0][hidden] = 1.0
        inputs.value[hidden] *= 100
    return inputs, dropped_mass(inputs, kernel_plan(inputs, tolerance).seen(case.spatial_shapes)[0])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-3), ("float32", 0.5), ("float16", 0.9), ("bfloat16", 0.9)]
)
def test_no_gradient_sees_what_the_forward_left_out(
    dtype: str, tolerance: float, device: torch.device, generator: torch.Generator
) -> None:
    tried = [fought_inputs(dtype, tolerance, p, generator, device) for p in (0.01, 0.015, 0.02, 0.03)]
    inputs, mass = max(tried, key=lambda each: each[1])
    assert 1e-3 * tolerance < mass <= tolerance
    with poisoned_memory():
        actual = run_backend(inputs, "triton", mass_tolerance=tolerance)
    with seen_alone(kernel_plan(inputs, tolerance).seen(inputs.spatial_shapes), inputs):
        expectation = Expectation.of(inputs)
    assert_all_within_budget(expectation.compare(actual))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_window_holds_gets_no_gradient(dtype: str, device: torch.device, generator: torch.Generator) -> None:
    inputs = gathered_inputs(dataclasses.replace(NARROW, dtype=dtype), generator, device)
    seen = torch.cat([mask.any(2) for mask in kernel_plan(inputs, 0.1).seen(inputs.spatial_shapes)], -1)
    assert not seen.all()
    gradients = run_backend(inputs, "triton", mass_tolerance=0.1)
    for name in ("key", "value"):
        assert not gradients[name][~seen].any()
        assert gradients[name][seen].any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_image_has_the_same_bits_each_time_and_alone(
    dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    case = Case("", ((4, 25),), batch=2, queries=9, prior="narrow", mask="valid_shapes", head_dim=16)
    inputs = gathered_inputs(dataclasses.replace(case, dtype=dtype), generator, device)
    together = run_backend(inputs, "triton", mass_tolerance=0.1)
    for b in range(2):
        fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
        tensors = {name: t[b : b + 1] for name, t in fields.items() if isinstance(t, Tensor)}
        alone = run_backend(dataclasses.replace(inputs, **tensors), "triton", mass_tolerance=0.1)
        assert all(torch.equal(alone[name], together[name][b : b + 1]) for name in alone)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_programs_that_share_a_window_merge_to_it(
    dtype: str, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "splits_of", lambda *_: 3)
    inputs = gathered_inputs(dataclasses.replace(NARROW, dtype=dtype, queries=9), generator, device)
    with torch.no_grad(), poisoned_memory():
        actual = attend(inputs, "triton", mass_tolerance=0.1)
    with seen_alone(kernel_plan(inputs, 0.1).seen(inputs.spatial_shapes), inputs):
        expectation = Expectation.of(inputs)
    assert_all_within_budget(expectation.compare({"output": actual}))


# -------------------------------------------------------------------------------------- what is not a number


def finite_inputs(generator: torch.Generator, device: torch.device, **changes: object) -> CaseInputs:
    """Of two images, each with five queries that look at the left."""
    case = Case("", ((4, 40),), batch=2, queries=5, head_dim=16)
    inputs = make_inputs(dataclasses.replace(case, **changes), generator, device)
    with torch.no_grad():
        inputs.center[..., 0] = 3.0
        inputs.precision[:] = 1.0
        # So that an infinite key makes an infinite logit for all of them.
        inputs.query[..., 3] = 1.0
    return inputs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_that_is_not_finite_reaches_every_query_however_far_away(
    value: float, dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = finite_inputs(generator, device, dtype=dtype)
    with torch.no_grad():
        inputs.key[0, 0, 39, 3] = value
        assert attend(inputs, "triton", mass_tolerance=0.0)[0].isnan().all()
        ours = attend(inputs, "triton", mass_tolerance=0.5)
    assert ours[0].isnan().all()
    assert ours[1].isfinite().all()
    of_image = kernel_plan(inputs, 0.5).computed().sum((1, 2))
    assert of_image[1] < of_image[0] == elements(inputs) / 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["query", "center", "precision"])
def test_a_query_that_is_not_a_number_is_the_only_one_to_see_it(
    name: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = finite_inputs(generator, device)
    with torch.no_grad():
        getattr(inputs, name)[0, 0, 2] = math.nan
        out = attend(inputs, "triton", mass_tolerance=0.5)
    of_query = torch.arange(5, device=device) == 2
    assert out[0, 0, of_query].isnan().all()
    assert out[0, 0, ~of_query].isfinite().all()


@pytest.mark.parametrize("mask", ["valid_shapes", "padding"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keys_in_padding_change_no_window(
    value: float, mask: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = finite_inputs(generator, device, mask=mask)
    padding = torch.cat(reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask), 1)
    with torch.no_grad():
        expected = kernel_plan(inputs, 0.5)
        inputs.key[:, 0][padding] = value
        ours = kernel_plan(inputs, 0.5)
    assert torch.equal(ours.windows, expected.windows)
