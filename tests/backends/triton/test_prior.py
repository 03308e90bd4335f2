"""The prior in one launch against its PyTorch form: outputs and gradients within their budgets, and to the bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from prior_problems import DTYPES, LAYOUTS, OPTIONS, Problem, make_problem
from torch import Tensor

pytest.importorskip("triton")

from smca_kernels.nn import SpatialPriorOutput
from smca_kernels.nn.prior import MIN_SQUARED_OBJECT_SCALE
from smca_kernels.testing.budget import assert_within_budget, poisoned_memory


def by_scale(name: str, tensor: Tensor, scales: int) -> list[Tensor]:
    """Parts that are compared each with a budget of its own: scales differ in size by orders of magnitude."""
    if name in ("center", "precision"):
        return list(tensor.unbind(3))
    if name in ("grad offset", "grad object_scale"):
        return list(tensor.unflatten(2, (scales, -1)).unbind(2))
    return [tensor]


def check(problem: Problem) -> None:
    with poisoned_memory():
        actual = problem.run("triton")
    wide = problem.double()
    eager, oracle, sums = problem.run("reference"), wide.run("reference"), wide.absolute_sums()
    assert actual.keys() == oracle.keys()
    for name in oracle:
        parts = [by_scale(name, results[name], len(problem.shapes)) for results in (actual, oracle, eager)]
        for s, (ours, exact, plain) in enumerate(zip(*parts, strict=True)):
            assert_within_budget(ours, exact, plain, f"{name} {s}", absolute_sum=sums.get(name, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_every_configuration_is_within_its_budget(
    geometry: str,
    modulation: str,
    scale_type: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    options = {"geometry": geometry, "modulation": modulation, "scale_type": scale_type}
    check(make_problem(generator, device, dtype=dtype, queries=33, **options))


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5, 8])
def test_any_number_of_scales_heads_and_queries_is_within_its_budget(
    scales: int, heads: int, queries: int, device: torch.device, generator: torch.Generator
) -> None:
    check(make_problem(generator, device, batch=1, scales=scales, heads=heads, queries=queries))


@pytest.mark.parametrize("heads", [3, 12, 60])
def test_heads_need_not_be_a_power_of_two(heads: int, device: torch.device, generator: torch.Generator) -> None:
    check(make_problem(generator, device, heads=heads, queries=5, geometry="paper", scale_type="single"))


@pytest.mark.parametrize("part", ["grid", "image_sizes", "float image_sizes", "cells", "strided cells"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_description_of_the_images_is_within_its_budget(
    part: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    check(make_problem(generator, device, batch=3, part=part, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale_type", ["independent", "single"])
def test_every_layout_of_the_projections_is_within_its_budget(
    layout: str, dtype: torch.dtype, scale_type: str, device: torch.device, generator: torch.Generator
) -> None:
    check(make_problem(generator, device, layout=layout, dtype=dtype, scale_type=scale_type, part="image_sizes"))


def test_without_scale_selection_there_are_no_weights(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device, scale_selection=False)
    assert problem.locate("triton").scale_weights is None
    check(problem)


def test_the_projections_may_differ_in_dtype(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device)
    dtypes = dict(zip(problem.raw, (torch.float32, torch.float16, torch.bfloat16, torch.float32), strict=True))
    raw = {name: t.detach().to(dtypes[name]).requires_grad_() for name, t in problem.raw.items()}
    check(dataclasses.replace(problem, raw=raw))


@pytest.mark.parametrize("logit", [0.0, 20.0, 88.0, 1e4, math.inf])
def test_saturated_logits_neither_overflow_nor_lose_their_gradient(logit: float, device: torch.device) -> None:
    problem = make_problem(torch.Generator().manual_seed(0), device, modulation="shared", scales=1)
    logits = torch.tensor([logit, -logit], device=device).expand(2, 7, 2).clone().requires_grad_()
    center = dataclasses.replace(problem, raw=problem.raw | {"reference_logits": logits}).locate("triton").center
    (gradient,) = torch.autograd.grad(center.sum(), logits)
    share = torch.tensor([logit, -logit], dtype=torch.float64).sigmoid()
    extent = torch.tensor([34.0, 21.0], dtype=torch.float64)
    # Below 2⁻¹²⁶ a float32 may be flushed to 0.
    close = {"rtol": 2e-5, "atol": 1e-36}
    torch.testing.assert_close(center[0, 0, 0, 0].double().cpu(), share * extent, **close)
    torch.testing.assert_close(gradient[0, 0].double().cpu(), share.prod() * extent, **close)


def test_the_clamp_of_the_paper_stops_the_gradient_where_torch_does(
    device: torch.device, generator: torch.Generator
) -> None:
    problem = make_problem(generator, device, geometry="paper", modulation="shared", scales=1, queries=4)
    edge = MIN_SQUARED_OBJECT_SCALE**0.5
    scales = torch.tensor([[0.0, -0.0], [0.9 * edge, -0.9 * edge], [1.1 * edge, -1.1 * edge], [2.0, -2.0]])
    object_scale = scales.expand(2, 4, 2).clone().to(device).requires_grad_()
    problem = dataclasses.replace(problem, raw=problem.raw | {"object_scale": object_scale})
    actual, expected = problem.run("triton"), problem.run("reference")
    torch.testing.assert_close(actual["precision"], expected["precision"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(actual["grad object_scale"], expected["grad object_scale"], rtol=1e-6, atol=0.0)
    assert (actual["grad object_scale"] == 0).any(-1).tolist() == [[True, True, False, False]] * 2


def test_only_what_is_used_has_a_gradient(device: torch.device, generator: torch.Generator) -> None:
    """Zero where the derivative is; elsewhere not, but for what underflows.

    Sigmoid's derivative of a float32 is off by 2⁻²⁴ times an extent of 34 cells and an upstream gradient of 6: 1.2e-5,
    less than float16's smallest normal number, 6.1e-5.
    """
    problem = make_problem(generator, device, dtype=torch.float16)
    exact = problem.double()
    for index in range(4):
        gradients = []
        for of, backend in ((problem, "triton"), (exact, "reference")):
            output = of.locate(backend)[index]
            with poisoned_memory():
                gradients.append(
                    torch.autograd.grad(output, list(of.raw.values()), of.upstream[index], materialize_grads=True)
                )
        for ours, derivative in zip(*gradients, strict=True):
            assert not ours[derivative == 0].any()
            assert (ours[derivative.abs() >= torch.finfo(torch.float16).smallest_normal] != 0).all()


def test_an_image_alone_and_in_a_batch_gives_the_same_bits(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device, batch=3, queries=50, part="image_sizes")
    alone = dataclasses.replace(
        problem,
        raw={name: t.detach()[1:2].requires_grad_() for name, t in problem.raw.items()},
        part=(problem.part[0][1:2], None),
        upstream=SpatialPriorOutput(*(t[1:2] for t in problem.upstream)),
    )
    results, repeated = problem.run("triton"), problem.run("triton")
    for name, expected in alone.run("triton").items():
        assert torch.equal(results[name][1:2], expected), name
        assert torch.equal(results[name], repeated[name]), name
