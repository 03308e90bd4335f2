"""The cases that backends are held against their budgets on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from smca_kernels.backends import reference
from smca_kernels.testing.cases import CASES, LAYOUTS, MASKS, PRIORS, Case, case_generator, make_inputs


def test_the_cases_cover_what_the_design_asks_for() -> None:
    def values(field: str) -> set[Any]:
        return {getattr(case, field) for case in CASES}

    assert {16, 24, 32, 64, 128} <= values("head_dim")
    assert {1, 300} <= values("queries")
    assert {1, 2, 3, 4, 5, 8} <= {len(case.spatial_shapes) for case in CASES}
    assert set(PRIORS) == values("prior")
    assert set(LAYOUTS) == values("layout")
    assert set(MASKS) == values("mask")
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_have_the_shapes_of_their_case(case: Case, generator: torch.Generator) -> None:
    inputs = make_inputs(case, generator)
    keys, scales = sum(height * width for height, width in case.spatial_shapes), len(case.spatial_shapes)
    prior = (case.batch, case.prior_heads or case.heads, case.queries, scales)
    assert inputs.query.shape == (case.batch, case.heads, case.queries, case.head_dim)
    assert inputs.key.shape == (case.batch, case.heads, keys, case.head_dim)
    assert inputs.value.shape == (case.batch, case.heads, keys, case.value_dim or case.head_dim)
    assert inputs.center.shape == inputs.precision.shape == (*prior, 2)
    assert inputs.scale_weights is None or inputs.scale_weights.shape == prior
    assert (inputs.precision >= 0).all()
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in inputs.differentiable().values())


def test_layouts_have_the_strides_that_they_promise(generator: torch.Generator) -> None:
    query = {
        name: make_inputs(Case("", ((3, 5),), batch=2, heads=3, queries=33, layout=name), generator).query
        for name in LAYOUTS
    }
    assert query["contiguous"].is_contiguous()
    assert query["projection"].stride() == (33 * 2 * 3 * 32, 32, 2 * 3 * 32, 1)
    assert query["sequence_first"].stride() == (3 * 32, 32, 2 * 3 * 32, 1)
    assert query["last_axis_strided"].stride()[2:] == (1, 33)
    assert query["expanded"].stride()[:2] == (0, 0)


def test_scale_weights_come_with_either_sign(generator: torch.Generator) -> None:
    weights = make_inputs(Case("", ((3, 5),)), generator).scale_weights
    assert (weights < 0).any()
    assert (weights > 0).any()


def test_masks_that_empty_a_scale_do_so_for_the_first_image_alone(generator: torch.Generator) -> None:
    for mask in ("empty_scale", "empty_scale_padding"):
        inputs = make_inputs(Case("", ((5, 9), (3, 5)), batch=2, mask=mask), generator)
        last = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)[-1]
        assert last.all(1).tolist() == [True, False]


def test_the_same_seed_and_name_give_the_same_inputs() -> None:
    case = Case("this", ((3, 5),))
    query = [make_inputs(case, case_generator(case, seed)).query for seed in (1, 1, 2)]
    assert torch.equal(query[0], query[1])
    assert not torch.equal(query[0], query[2])
    other = dataclasses.replace(case, name="that")
    assert not torch.equal(query[0], make_inputs(other, case_generator(other, 1)).query)
