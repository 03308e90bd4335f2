"""Results held against float64, tensor by tensor and scale by scale."""

from __future__ import annotations

import pytest
import torch

from smca_kernels.testing.cases import DTYPES, PRIORS, Case, make_inputs
from smca_kernels.testing.check import absolute_sums, compare_results, run_reference


def test_the_absolute_sum_bounds_every_result(generator: torch.Generator) -> None:
    for prior in PRIORS:
        for prior_heads in (1, None):
            case = Case("", ((5, 9), (1, 3)), heads=2, prior=prior, prior_heads=prior_heads, mask="random")
            inputs = make_inputs(case, generator).double()
            sums = absolute_sums(inputs)
            for name, result in run_reference(inputs).items():
                # |dP - δ| is at most twice the largest |dP|.
                assert result.abs().max() <= 2 * sum(sums[name]), (prior, name)


def test_the_reference_is_within_its_own_budget(generator: torch.Generator) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(Case("", ((5, 9), (1, 3)), dtype=dtype, batch=2, heads=2, mask="valid_shapes"), generator)
        assert all(c.ratio <= 0.5 for c in compare_results(run_reference(inputs), inputs))


@pytest.mark.parametrize("name", ["output", "query", "key", "value", "center", "precision", "scale_weights"])
def test_a_wrong_tensor_is_found_and_named(name: str, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((5, 9), (3, 5)), dtype="bfloat16", heads=2), generator)
    results = run_reference(inputs)
    results[name] = results[name] * 1.1
    over = {c.name.split(" ")[0] for c in compare_results(results, inputs) if c.ratio > 1}
    assert over == {name}


def test_an_error_in_the_smaller_gradients_of_one_scale_is_found(generator: torch.Generator) -> None:
    # Gradients of precision grow with the square of the grid: those of the small grid are lost in a maximum.
    inputs = make_inputs(Case("", ((40, 40), (2, 2)), queries=5, prior="wide"), generator)
    results = run_reference(inputs)
    results["precision"][:, :, :, 1] *= 1.001
    assert [c.name for c in compare_results(results, inputs) if c.ratio > 1] == ["precision at scale 1"]
