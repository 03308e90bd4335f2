"""Error budgets, and memory that is poisoned."""

from __future__ import annotations

import math

import pytest
import torch

from smca_kernels.testing.budget import assert_within_budget, error_budget, poisoned_memory, rounding_step


def test_a_rounding_step_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for magnitude in (1.0, 1.5, 2.0, 1000.0, 0.003):
            number = torch.tensor(magnitude, dtype=dtype)
            step = (torch.nextafter(number, torch.tensor(math.inf, dtype=dtype)) - number).item()
            assert rounding_step(dtype, number.item()) == step


def test_a_rounding_step_below_the_normal_numbers_is_the_smallest_number() -> None:
    assert rounding_step(torch.float16, 0.0) == 2.0**-24


def test_the_budget_is_twice_eager_error_and_step() -> None:
    oracle = torch.tensor([1.0, 5.0], dtype=torch.float64)
    eager = torch.tensor([1.25, 5.0], dtype=torch.float16)
    assert error_budget(eager, oracle) == 2 * (0.25 + 4 * 2.0**-10)
    assert error_budget(eager, oracle, dtype=torch.bfloat16) == 2 * (0.25 + 4 * 2.0**-7)


def test_the_step_is_at_least_that_of_float32_at_the_absolute_sum() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert error_budget(zero.float(), zero, absolute_sum=8.0) == 2 * 8 * 2.0**-23
    one = torch.ones(3, dtype=torch.float64)
    assert error_budget(one.half(), one, absolute_sum=8.0) == 2 * 2.0**-10


def test_eager_overflow_gives_no_infinite_budget() -> None:
    oracle = torch.tensor([1.0, 70000.0], dtype=torch.float64)
    assert math.isfinite(error_budget(oracle.half(), oracle))


def test_an_error_within_the_budget_passes_and_a_larger_one_tells_where_it_is() -> None:
    oracle = torch.zeros(2, 3, dtype=torch.float64)
    oracle[0, 0] = 1.0
    eager = oracle.float()
    budget = error_budget(eager, oracle)
    actual = eager.clone()
    actual[1, 2] = 0.9 * budget
    assert_within_budget(actual, oracle, eager)
    actual[1, 2] = 1.1 * budget
    with pytest.raises(AssertionError, match=r"key: error .* is 1\.1 × the budget .* worst at \[1, 2\]"):
        assert_within_budget(actual, oracle, eager, "key")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_passes(bad: float) -> None:
    oracle = torch.ones(3, dtype=torch.float64)
    actual = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_within_budget(actual, oracle, oracle.float())
    # Not even where eager fails the same way.
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_within_budget(actual, oracle, actual)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_the_oracle_says_passes_even_if_it_is_not_finite(bad: float) -> None:
    oracle = torch.tensor([1.0, bad], dtype=torch.float64)
    assert_within_budget(oracle.float(), oracle, oracle.float())
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, 2.0]), oracle, oracle.float())


def test_another_shape_or_dtype_never_passes() -> None:
    oracle = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"eager has shape \[2, 3\], got \[3\]"):
        assert_within_budget(torch.ones(3), oracle, oracle.float())
    with pytest.raises(AssertionError, match=r"eager has dtype torch.float32, got torch.float16"):
        assert_within_budget(oracle.half(), oracle, oracle.float())


def test_uninitialised_memory_is_poisoned_inside_and_settings_return(device: torch.device) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        like = torch.ones(5, device=device)
        for tensor in (
            torch.empty(5, device=device, dtype=torch.float16),
            torch.empty_like(like),
            like.new_empty(5, dtype=torch.bfloat16),
            torch.empty_strided((5, 1), (1, 1), device=device),
        ):
            assert tensor.isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
