"""The prior as an operator: torch.library, compilation, export, activation checkpointing, autocast."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from devices import ON_GPU
from prior_problems import GRIDS, Problem, make_prior, make_problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from smca_kernels.nn import SpatialPrior
from smca_kernels.nn.prior import MIN_SQUARED_OBJECT_SCALE


def operator_arguments(problem: Problem) -> tuple[Any, ...]:
    """Arguments of torch.ops.smca_kernels.prior."""
    prior = problem.prior
    floor = MIN_SQUARED_OBJECT_SCALE if prior.geometry == "paper" else None
    flat = [side for shape in problem.shapes for side in shape]
    configuration = (list(map(float, prior.strides)), prior._factors(), floor, prior.map_heads)
    return *problem.raw.values(), *problem.part, flat, *configuration


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"part": "image_sizes", "layout": "cut from wider"},
        {"part": "cells", "modulation": "shared", "scale_type": "single", "geometry": "paper"},
        {"dtype": torch.float16, "scale_selection": False, "layout": "last axis strided"},
        {"scale_type": "fixed", "scales": 1, "batch": 1, "queries": 1},
    ],
)
def test_operator_passes_opcheck(options: dict[str, Any], device: torch.device, generator: torch.Generator) -> None:
    arguments = operator_arguments(make_problem(generator, device, **options))
    torch.library.opcheck(torch.ops.smca_kernels.prior.default, arguments)


@pytest.mark.parametrize("frozen", [("reference_logits",), ("offset", "object_scale", "selection")])
def test_operator_passes_opcheck_with_frozen_inputs(
    frozen: tuple[str, ...], device: torch.device, generator: torch.Generator
) -> None:
    problem = make_problem(generator, device)
    raw = {name: t.detach() if name in frozen else t for name, t in problem.raw.items()}
    arguments = operator_arguments(dataclasses.replace(problem, raw=raw))
    torch.library.opcheck(torch.ops.smca_kernels.prior.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("part", ["grid", "image_sizes", "valid_shapes", "key_padding_mask"])
def test_full_graph_compiles_once_for_all_grids_batches_and_queries(part: str, device: torch.device) -> None:
    prior = SpatialPrior(8, 2, (8, 32)).to(device)
    backend, options = "aot_eager", None
    if ON_GPU:
        # Where it finds that faster, inductor of torch 2.11 pads a product, and takes its first stride for fixed.
        backend, options = "inductor", {"shape_padding": False}
    compiled = torch.compile(prior, fullgraph=True, dynamic=True, backend=backend, options=options)
    stance = "default"
    # Dynamo takes sizes that are equal at first for one: these all differ, and none is 2.
    for batch, queries, shapes in [(3, 10, ((6, 7), (4, 5))), (4, 7, ((9, 5), (3, 8))), (5, 4, ((6, 3), (3, 4)))]:
        keys = sum(height * width for height, width in shapes)
        given = {
            "grid": {},
            "image_sizes": {"image_sizes": torch.full((batch, 2), 70, device=device)},
            "valid_shapes": {"valid_shapes": torch.tensor([shapes] * batch, device=device)},
            "key_padding_mask": {"key_padding_mask": torch.zeros(batch, keys, dtype=torch.bool, device=device)},
        }[part]
        features = torch.randn(batch, queries, 8, device=device)
        expected = prior(features, shapes, backend="triton", **given)
        upstream = [torch.randn_like(t) for t in expected]
        parameters = list(prior.parameters())
        with torch.compiler.set_stance(stance):
            actual = compiled(features, shapes, backend="triton", **given)
            gradients = torch.autograd.grad(actual, parameters, upstream)
        torch.testing.assert_close(tuple(actual), tuple(expected))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters, upstream))
        stance = "fail_on_recompile"


@pytest.mark.usefixtures("fresh_dynamo")
def test_an_exported_prior_gives_the_same_outputs(device: torch.device) -> None:
    prior, features = make_prior(device)
    program = torch.export.export(prior, (features, GRIDS[:3]), {"backend": "triton"})
    actual = program.module()(features, GRIDS[:3], backend="triton")
    torch.testing.assert_close(tuple(actual), tuple(prior(features, GRIDS[:3], backend="triton")))


def test_activation_checkpointing_changes_no_bit(device: torch.device) -> None:
    prior, features = make_prior(device)
    parameters = list(prior.parameters())

    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        arguments: Any = (prior, features, GRIDS[:3])
        if checkpointed:
            outputs = checkpoint(*arguments, backend="triton", use_reentrant=False)
        else:
            outputs = prior(*arguments[1:], backend="triton")
        return torch.autograd.grad([t.square().sum() for t in outputs], parameters)

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_changes_no_bit(device: torch.device) -> None:
    prior, features = make_prior(device)
    plain = prior(features, GRIDS[:3], backend="triton")
    with torch.autocast(device.type, torch.bfloat16):
        cast = prior(features, GRIDS[:3], backend="triton")
    for ours, theirs in zip(cast, plain, strict=True):
        assert torch.equal(ours, theirs)
