"""Error budgets: a result may be off by twice what eager PyTorch is off by in the same dtype, plus one rounding step.

    budget = 2 · (max |eager - oracle| + one rounding step)

The oracle is the reference in float64 on the same values; eager is the reference in the inputs' own dtypes with native
autograd, what a user would have written. The budget comes from data, so it needs no tolerance per dtype or shape.

The rounding step is that of the dtype of query, key and value at the oracle's largest magnitude, also for the float32
gradients of center, precision and scale_weights beside half-precision inputs: they are sums of products of
half-precision numbers. It is never less than a float32 step at the sum of the absolute terms behind an element, which
is what another order of summation may change. That matters where terms cancel: dS = P (dP - δ) is 0 for a single key
and next to 0 under a narrow prior, exactly so in eager's order and in no other. P itself, recomputed from a stored
log-sum-exp as a backward pass must, carries the rounding of an exponent that large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def rounding_step(dtype: torch.dtype, magnitude: float) -> float:
    """Distance between neighbouring numbers of a floating dtype at a magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(magnitude, info.smallest_normal)))


def error_budget(
    eager: Tensor,
    oracle: Tensor,
    *,
    dtype: torch.dtype | None = None,
    absolute_sum: float = 0.0,
    eager_error: float = 0.0,
) -> float:
    """Largest absolute error that a result may have: twice eager PyTorch's own plus one rounding step.

    Args:
        eager: what plain PyTorch computes, any shape. Elements that are not finite count no error: eager's
            overflow buys nobody an infinite budget.
        oracle: the same in float64, same shape.
        dtype: dtype whose rounding step at the oracle's largest magnitude counts; None: eager's.
        absolute_sum: largest sum of absolute terms behind an element, if known; the step is at least
            float32's there.
        eager_error: eager's error on like inputs; it counts if it is the larger.
    """
    error = max(max_finite(eager.double() - oracle), eager_error)
    step = rounding_step(dtype or eager.dtype, max_finite(oracle))
    return 2.0 * (error + max(step, rounding_step(torch.float32, absolute_sum)))


def max_finite(tensor: Tensor) -> float:
    return tensor.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()


@dataclass(frozen=True)
class Comparison:
    """A tensor against its budget. `error` is infinite where the result is not finite and the oracle is."""

    name: str
    error: float
    budget: float
    index: tuple[int, ...]
    actual: float
    oracle: float

    @property
    def ratio(self) -> float:
        return self.error / self.budget

    def __str__(self) -> str:
        return (
            f"{self.name or 'tensor'}: error {self.error:.3g} is {self.ratio:.3g} × the budget "
            f"{self.budget:.3g}; worst at {list(self.index)}, {self.actual:.9g} for {self.oracle:.9g}"
        )


def compare(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    name: str = "",
    *,
    dtype: torch.dtype | None = None,
    absolute_sum: float = 0.0,
    eager_error: float = 0.0,
) -> Comparison:
    """Worst element of `actual` against `error_budget`; ValueError where shapes or dtypes differ."""
    for other, whose in ((eager, "eager"), (oracle, "the oracle")):
        if actual.shape != other.shape:
            raise ValueError(f"{name}: {whose} has shape {list(other.shape)}, got {list(actual.shape)}")
    if actual.dtype != eager.dtype:
        raise ValueError(f"{name}: eager has dtype {eager.dtype}, got {actual.dtype}")
    wide = actual.double()
    # NaN - NaN and inf - inf are no error; every other difference that is not a number is an infinite one.
    same = (wide == oracle) | (wide.isnan() & oracle.isnan())
    difference = torch.where(same, 0.0, (wide - oracle).abs().nan_to_num(nan=math.inf))
    flat = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))
    budget = error_budget(eager, oracle, dtype=dtype, absolute_sum=absolute_sum, eager_error=eager_error)
    return Comparison(name, difference[index].item(), budget, index, wide[index].item(), oracle[index].item())


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    name: str = "",
    *,
    dtype: torch.dtype | None = None,
    absolute_sum: float = 0.0,
    eager_error: float = 0.0,
) -> None:
    """Raise AssertionError with error, budget and worst index if `actual` is beyond `error_budget`."""
    try:
        comparison = compare(
            actual, oracle, eager, name, dtype=dtype, absolute_sum=absolute_sum, eager_error=eager_error
        )
    except ValueError as error:
        raise AssertionError(str(error)) from None
    if not comparison.ratio <= 1.0:
        raise AssertionError(str(comparison))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill tensors from torch.empty and its kin with NaN in this block (integers: with the largest value)."""
    settings = torch.utils.deterministic
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory  # type: ignore[attr-defined]  # a property of the module
    # Torch fills in deterministic mode only, which rejects cuBLAS without warn_only.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
