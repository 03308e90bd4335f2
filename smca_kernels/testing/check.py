"""Backends held against the reference in float64: output and six gradients, each within its error budget.

What the maximum over a tensor hides: errors in rows far smaller than the largest. Gradients of a coarse scale can be
hundreds of times those of a fine one, so everything that belongs to one scale (key, value, center, precision,
scale_weights) is compared scale by scale, and all rows of a case have their prior from one regime.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smca_kernels.attention import smca_attention
from smca_kernels.backends import reference
from smca_kernels.inputs import DIFFERENTIABLE, SpatialShapes
from smca_kernels.testing.budget import Comparison, compare, max_finite, poisoned_memory
from smca_kernels.testing.cases import CaseInputs

TENSORS = ("output", *DIFFERENTIABLE)


def run_reference(inputs: CaseInputs) -> dict[str, Tensor]:
    """Output and gradients of `reference.attention` under native autograd, by name."""
    return _output_and_gradients(reference.attention(inputs), inputs)


def attend(inputs: CaseInputs, backend: str, **options: Any) -> Tensor:
    """`smca_attention` of the inputs with a backend; `options` are other keyword arguments of it."""
    with _plan_any_size(inputs.planned):
        return smca_attention(**inputs.arguments() | options, backend=backend)


def run_backend(inputs: CaseInputs, backend: str, **options: Any) -> dict[str, Tensor]:
    """Output and gradients of `smca_attention` with a backend, by name; `options` as for `attend`."""
    with _plan_any_size(inputs.planned):
        return _output_and_gradients(attend(inputs, backend, **options), inputs)


@contextmanager
def _plan_any_size(always: bool) -> Iterator[None]:
    """In this block, if `always`, the kernels plan calls of any size."""
    if not always or importlib.util.find_spec("triton") is None:
        yield
        return
    from smca_kernels.backends.triton import launch

    limit = launch.MIN_PLANNED_ELEMENTS
    launch.MIN_PLANNED_ELEMENTS = 0
    try:
        yield
    finally:
        launch.MIN_PLANNED_ELEMENTS = limit


def _output_and_gradients(output: Tensor, inputs: CaseInputs) -> dict[str, Tensor]:
    tensors = inputs.differentiable()
    gradients = torch.autograd.grad(output, list(tensors.values()), inputs.grad_output)
    return {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}


def absolute_sums(inputs: CaseInputs) -> dict[str, list[float]]:
    """Largest sum of absolute terms behind an element of output and gradients, scale by scale.

    The terms are α P times value, grad_output, or (through dS, with |dO|·|v| in place of dP - δ) key, query,
    2 p (x - c) and (x - c)². Each counts max(1, |LSE|) times, by which P = exp(logit - LSE) magnifies a
    rounding of its exponent.
    """
    shapes, scale = inputs.spatial_shapes, inputs.scale
    ignored = reference.ignored_keys(shapes, inputs.valid_shapes, inputs.key_padding_mask)
    sizes = inputs.keys_per_scale()
    # The gradients of a shared prior are sums over heads too.
    heads = (1,) if inputs.center.shape[1] == 1 else ()
    sums: dict[str, list[float]] = {name: [] for name in TENSORS}
    with torch.no_grad():
        query, grad_output = inputs.query.abs(), inputs.grad_output.abs()
        keys, values = inputs.key.split(sizes, dim=2), inputs.value.split(sizes, dim=2)
        for s, (height, width) in enumerate(shapes):
            key, value = keys[s].abs(), values[s].abs()
            center, precision = inputs.center[..., s, :], inputs.precision[..., s, :]
            prior = reference.log_prior(center, precision, height, width)
            logits = scale * (inputs.query @ keys[s].transpose(-1, -2)) + prior
            if (mask := ignored[s]) is not None:
                logits = logits.masked_fill(mask[:, None, None], -math.inf)
            lse = logits.logsumexp(-1, keepdim=True)
            # Kernels may measure the prior from its largest value in the grid.
            exponent = (lse - prior.amax(-1, keepdim=True)).abs().clamp(min=1.0).nan_to_num(posinf=0.0)
            weight = torch.exp(logits - lse).nan_to_num(nan=0.0) * exponent
            sums["scale_weights"].append(_largest(grad_output * (weight @ value), (-1, *heads)))
            if inputs.scale_weights is not None:
                weight = weight * inputs.scale_weights[..., s : s + 1].abs()
            sums["output"].append(_largest(weight @ value))
            sums["value"].append(_largest(weight.transpose(-1, -2) @ grad_output))
            weight = weight * (grad_output @ value.transpose(-1, -2))
            sums["query"].append(abs(scale) * _largest(weight @ key))
            sums["key"].append(abs(scale) * _largest(weight.transpose(-1, -2) @ query))
            cells = torch.stack(reference.cell_coordinates(height, width, like=center))
            distance = (cells - center[..., None]).abs()  # [B, H or 1, N, 2, height · width]
            weight = weight[..., None, :]
            sums["center"].append(_largest(2 * precision[..., None] * distance * weight, (-1, *heads)))
            sums["precision"].append(_largest(distance**2 * weight, (-1, *heads)))
    return sums | {name: [sum(sums[name])] for name in ("output", "query")}


def _largest(terms: Tensor, summed: tuple[int, ...] = ()) -> float:
    return (terms.sum(summed) if summed else terms).max().item()


def _by_scale(name: str, tensor: Tensor, spatial_shapes: SpatialShapes) -> Sequence[Tensor]:
    """The parts of a result that are held against a budget of their own."""
    if name in ("key", "value"):
        return tensor.split([height * width for height, width in spatial_shapes], dim=2)
    if name in ("center", "precision", "scale_weights"):
        return tensor.unbind(3)
    return [tensor]


def largest_errors(
    eager: dict[str, Tensor], oracle: dict[str, Tensor], spatial_shapes: SpatialShapes
) -> dict[str, list[float]]:
    """Largest finite difference of output and gradients, by name and scale."""
    return {
        name: [max_finite(part) for part in _by_scale(name, eager[name].double() - exact, spatial_shapes)]
        for name, exact in oracle.items()
    }


# Up to this many elements of query there are too few gradients for the largest of eager's errors to be typical.
MAX_ELEMENTS_WITH_NEIGHBOURS = 2**16
NEIGHBOURS = 4


def neighbours(inputs: CaseInputs) -> Iterator[CaseInputs]:
    """Inputs with every element of query, key, value and grad_output moved by about a rounding step."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(inputs.query.dtype).eps

    def move(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return (tensor.detach().double() * (1 + step * (2 * noise - 1))).to(tensor.dtype)

    for _ in range(NEIGHBOURS):
        moved: dict[str, Any] = {n: move(getattr(inputs, n)).requires_grad_() for n in ("query", "key", "value")}
        yield dataclasses.replace(inputs, **moved, grad_output=move(inputs.grad_output))


@dataclass(frozen=True)
class Expectation:
    """The oracle and the budgets for some inputs' output and gradients; `compare` takes any number of results.

    For small inputs, eager's error is the largest on them and on `NEIGHBOURS` neighbours: the gradients of a few
    queries are few numbers, and eager's rounding errors may happen to be small in all of them.
    """

    inputs: CaseInputs
    oracle: dict[str, Tensor]
    eager: dict[str, Tensor]
    absolute_sums: dict[str, list[float]]
    eager_errors: dict[str, list[float]]

    @classmethod
    def of(cls, inputs: CaseInputs) -> Expectation:
        eager, wide = run_reference(inputs), inputs.double()
        oracle = run_reference(wide)
        eager_errors = largest_errors(eager, oracle, inputs.spatial_shapes)
        for neighbour in neighbours(inputs) if inputs.query.numel() <= MAX_ELEMENTS_WITH_NEIGHBOURS else ():
            results = run_reference(neighbour), run_reference(neighbour.double())
            for name, errors in largest_errors(*results, inputs.spatial_shapes).items():
                eager_errors[name] = [max(pair) for pair in zip(eager_errors[name], errors, strict=True)]
        return cls(inputs, oracle, eager, absolute_sums(wide), eager_errors)

    def compare(self, actual: dict[str, Tensor]) -> list[Comparison]:
        """Compare results by name, those that there are, with their budgets: one comparison per tensor and scale."""
        comparisons = []
        for name in actual:
            each = actual[name], self.oracle[name], self.eager[name]
            parts = [_by_scale(name, tensor, self.inputs.spatial_shapes) for tensor in each]
            for s, (ours, exact, plain) in enumerate(zip(*parts, strict=True)):
                comparisons.append(
                    compare(
                        ours,
                        exact,
                        plain,
                        name if len(parts[0]) == 1 else f"{name} at scale {s}",
                        dtype=self.inputs.query.dtype,
                        absolute_sum=self.absolute_sums[name][s],
                        eager_error=self.eager_errors[name][s],
                    )
                )
        return comparisons


def compare_results(actual: dict[str, Tensor], inputs: CaseInputs) -> list[Comparison]:
    """Compare output and gradients, as from `run_backend`, with their budgets: one comparison per tensor and scale."""
    expectation = Expectation.of(inputs)
    return expectation.compare({name: actual[name] for name in expectation.oracle})


def check(inputs: CaseInputs, backend: str) -> list[Comparison]:
    """Run a backend with poisoned memory and compare output and gradients with their budgets."""
    with poisoned_memory():
        actual = run_backend(inputs, backend)
    return compare_results(actual, inputs)
