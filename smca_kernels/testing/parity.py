"""Is a backend as right as PyTorch itself? Error budgets, the sweep they are held against, and `smca parity`.

    budget = 2 · (max |eager - oracle| + one rounding step)

The oracle is `reference.py` in float64 on the same values. Eager is `reference.py` in the inputs' own dtypes
with native autograd: what a user would have written. The budget comes from data, so it needs no tolerance per
dtype or shape.

What the maximum over a tensor hides: errors in rows far smaller than the largest. Gradients of a coarse scale
can be hundreds of times those of a fine one, so everything that belongs to one scale (key, value, center,
precision, scale_weights) is compared scale by scale, and all rows of a case have their prior from one regime.

The rounding step is that of the dtype of query, key and value at the oracle's largest magnitude, also for
the float32 gradients of center, precision and scale_weights beside half-precision inputs: they are sums
of products of half-precision numbers. It is never less than a float32 step at the sum of the absolute
terms behind an element, which is what another order of summation may change. That matters where terms
cancel: dS = P (dP - δ) is 0 for a single key and next to 0 under a narrow prior, exactly so in eager's
order and in no other. P itself, recomputed from a stored log-sum-exp as a backward pass must, carries the
rounding of an exponent that large.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from smca_kernels import attention
from smca_kernels.backends import reference
from smca_kernels.files import write_text

TENSORS = ("output", "query", "key", "value", "center", "precision", "scale_weights")
BACKENDS = ("triton", "sdpa")
DTYPES = ("float32", "float16", "bfloat16")


# --- budgets ---


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
    error = max(_largest_finite(eager.double() - oracle), eager_error)
    step = rounding_step(dtype or eager.dtype, _largest_finite(oracle))
    return 2.0 * (error + max(step, rounding_step(torch.float32, absolute_sum)))


def _largest_finite(tensor: Tensor) -> float:
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
    """AssertionError, telling error, budget and worst index, if `actual` is beyond `error_budget`."""
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
    """Meanwhile, tensors from torch.empty and its kin are full of NaN (integers: of the largest value)."""
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


# --- cases ---


@dataclass(frozen=True)
class Case:
    """One set of shapes and circumstances. `layout`, `prior` and `mask` name rows of the tables below."""

    name: str
    spatial_shapes: tuple[tuple[int, int], ...]
    batch: int = 1
    heads: int = 1
    queries: int = 17
    head_dim: int = 32
    dtype: str = "float32"
    prior_dtype: str | None = "float32"  # of center, precision and scale_weights; None: as query
    prior_heads: int | None = None  # None: as many as heads
    scale_weights: bool = True
    scale: float | None = None
    prior: str = "ordinary"
    mask: str = "none"
    layout: str = "contiguous"
    planned: bool = False  # what the prior makes unlikely is left out, however small the case
    quick: bool = False
    large: bool = False  # too large for the interpreter


@dataclass(frozen=True)
class Inputs:
    """Arguments of `smca_attention`, shapes as there, that require gradients, and an upstream gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    center: Tensor
    precision: Tensor
    scale_weights: Tensor | None
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_shapes: Tensor | None
    key_padding_mask: Tensor | None
    scale: float | None
    grad_output: Tensor
    planned: bool = False  # as in Case

    def backend_arguments(self) -> tuple[Any, ...]:
        """The arguments of every backend function, in order."""
        tensors = (self.query, self.key, self.value, self.center, self.precision, self.scale_weights)
        masks = (self.spatial_shapes, self.valid_shapes, self.key_padding_mask)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return *tensors, *masks, 0.0, scale

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `smca_attention`."""
        names = {field.name for field in dataclasses.fields(self)} - {"grad_output", "planned"}
        return {name: getattr(self, name) for name in names}

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by name."""
        return {name: t for name in TENSORS[1:] if (t := getattr(self, name)) is not None}

    def double(self) -> Inputs:
        """The same values in float64, as fresh leaves."""
        wide: dict[str, Any] = {name: t.detach().double().requires_grad_() for name, t in self.differentiable().items()}
        return dataclasses.replace(self, **wide, grad_output=self.grad_output.double())


def _log_uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.exp(math.log(low) + math.log(high / low) * torch.rand(shape, generator=generator))


def _precision_of_sigma(sigma: Tensor) -> Tensor:
    return 1 / (2 * sigma**2)


def _ordinary_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center = (torch.rand(shape, generator=generator) * 1.2 - 0.1) * (size - 1)
    return center, _precision_of_sigma(_log_uniform(shape, 1.0, 8.0, generator))


def _narrow_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center, _ = _ordinary_prior(shape, size, generator)
    return center, _log_uniform(shape, 1.0, 1e4, generator)


def _wide_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center, _ = _ordinary_prior(shape, size, generator)
    switched_on = torch.rand(shape, generator=generator) < 0.5
    return center, _log_uniform(shape, 1e-8, 1e-2, generator) * switched_on


def _far_prior(shape: Sequence[int], size: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    side = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    distance = _log_uniform(shape, 10.0, 1000.0, generator)
    return side * distance + size / 2, _log_uniform(shape, 1e-5, 1e-1, generator)


PRIORS: dict[str, Callable[[Sequence[int], Tensor, torch.Generator], tuple[Tensor, Tensor]]] = {
    "ordinary": _ordinary_prior,  # centres on and just beside the grid, σ of 1 to 8 cells
    "narrow": _narrow_prior,  # down to a hundredth of a cell: one key takes nearly all
    "wide": _wide_prior,  # hundreds of cells, and 0 (switched off) on half of the axes
    "far": _far_prior,  # centres 10 to 1000 cells from the grid's middle
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    # [B, N, H, D] cut out of a wider projection, as nn.MultiheadAttention's packed weights give it
    "projection": lambda t: _cut_from_wider(t.transpose(1, 2)).transpose(1, 2),
    "sequence_first": lambda t: t.movedim(2, 0).contiguous().movedim(0, 2),
    "last_axis_strided": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}


def _cut_from_wider(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full_like(tensor, math.nan)], dim=2)[:, :, : tensor.shape[2]]


def _valid_shapes(case: Case, generator: torch.Generator) -> Tensor:
    """Random image sizes [B, S, 2] of at least one cell; the last image, the largest, fills the grids."""
    sizes = torch.tensor(case.spatial_shapes)
    fraction = torch.rand(case.batch, 1, 2, generator=generator)
    fraction[-1:] = 1.0
    return (fraction * sizes).ceil().long().clamp(min=1)


def _padding_mask(valid_shapes: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat(
        [mask for mask in reference.ignored_keys(spatial_shapes, valid_shapes, None) if mask is not None],
        dim=1,
    )


def _make_masks(case: Case, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """valid_shapes and key_padding_mask of a case."""
    valid_shapes = _valid_shapes(case, generator)
    if case.mask == "none":
        return None, None
    if case.mask == "valid_shapes":
        return valid_shapes, None
    if case.mask == "padding":
        return None, _padding_mask(valid_shapes, case.spatial_shapes)
    if case.mask == "random":
        return None, torch.rand(case.batch, sum(h * w for h, w in case.spatial_shapes), generator=generator) < 0.4
    # The first image has no valid key at the last scale: in no row, or in no column.
    valid_shapes[0, -1, 0] = 0
    if case.mask == "empty_scale":
        return valid_shapes, None
    if case.mask == "empty_scale_padding":
        return None, _padding_mask(valid_shapes, case.spatial_shapes)
    raise ValueError(f"mask must be one of {MASKS}, got {case.mask!r}")


MASKS = ("none", "valid_shapes", "padding", "random", "empty_scale", "empty_scale_padding")


def make_inputs(case: Case, generator: torch.Generator, device: torch.device | str = "cpu") -> Inputs:
    """Random inputs of a case; the same values on every device.

    Args:
        case: what to draw.
        generator: a CPU generator.
        device: where the tensors go.
    """
    lay_out = LAYOUTS[case.layout]
    dtype = getattr(torch, case.dtype)
    prior_dtype = getattr(torch, case.prior_dtype or case.dtype)
    keys = sum(height * width for height, width in case.spatial_shapes)
    prior_shape = (case.batch, case.prior_heads or case.heads, case.queries, len(case.spatial_shapes), 2)

    def place(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return lay_out(tensor.to(device=device, dtype=dtype))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query = normal(case.batch, case.heads, case.queries, case.head_dim)
    key = normal(case.batch, case.heads, keys, case.head_dim)
    value = normal(case.batch, case.heads, keys, case.head_dim)
    size = torch.tensor([(width, height) for height, width in case.spatial_shapes], dtype=torch.float32)
    center, precision = PRIORS[case.prior](prior_shape, size, generator)
    scale_weights = normal(*prior_shape[:-1])
    grad_output = normal(*query.shape)
    valid_shapes, key_padding_mask = _make_masks(case, generator)
    return Inputs(
        query=place(query, dtype).detach().requires_grad_(),
        key=place(key, dtype).detach().requires_grad_(),
        value=place(value, dtype).detach().requires_grad_(),
        center=place(center, prior_dtype).detach().requires_grad_(),
        precision=place(precision, prior_dtype).detach().requires_grad_(),
        scale_weights=place(scale_weights, prior_dtype).detach().requires_grad_() if case.scale_weights else None,
        spatial_shapes=case.spatial_shapes,
        valid_shapes=None if valid_shapes is None else valid_shapes.to(device),
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.to(device),
        scale=case.scale,
        grad_output=place(grad_output, dtype),
        planned=case.planned,
    )


# Kernels tile grids by 4 to 16 cells and queries by 16 to 128: most sizes here lie beside those. The quick
# cases are as small as their purpose allows, since Triton's interpreter takes milliseconds a tile.
CASES: tuple[Case, ...] = (
    Case("one cell", ((1, 1),), batch=2, queries=3, quick=True),
    Case("one cell at five scales", ((1, 1),) * 5, queries=9),
    Case("one query, one row, one column", ((1, 17), (5, 1)), queries=1, quick=True),
    Case("one query", ((9, 17),), heads=3, queries=1),
    Case("300 queries", ((3, 5), (2, 2)), queries=300),
    Case("exact tiles", ((8, 16),), queries=64, head_dim=16),
    Case("one past the tiles", ((9, 17),), queries=65, head_dim=16, quick=True),
    Case("one short of the tiles", ((7, 15),), queries=63),
    Case("head_dim 1", ((5, 9),), head_dim=1),
    Case("head_dim 20", ((5, 9), (3, 5)), head_dim=20, quick=True),
    Case("head_dim 24", ((5, 9),), heads=2, head_dim=24),
    Case("head_dim 64", ((9, 10),), head_dim=64, quick=True),
    Case("head_dim 100", ((5, 9),), head_dim=100),
    Case("head_dim 128", ((9, 10),), head_dim=128, quick=True),
    Case("one scale", ((13, 21),), queries=40),
    Case("three scales, padded batch", ((9, 10), (5, 5), (3, 2)), batch=2, mask="valid_shapes", quick=True),
    Case("four scales", ((9, 13), (5, 7), (3, 4), (2, 2)), batch=2, mask="padding"),
    Case("five scales", ((5, 7), (3, 4), (2, 2), (1, 3), (1, 1)), queries=5),
    Case("eight scales", tuple((8 - i, 9 - i) for i in range(8)), batch=2, queries=5, mask="valid_shapes"),
    Case("random padding mask", ((9, 10), (3, 5)), batch=2, mask="random", quick=True),
    Case("image empty at one scale", ((5, 9), (3, 5)), batch=2, mask="empty_scale", quick=True),
    Case("image masked at one scale", ((5, 9), (3, 5)), batch=2, mask="empty_scale_padding"),
    Case("shared prior", ((9, 10),), heads=2, queries=9, prior_heads=1, quick=True),
    Case("shared prior, no scale weights", ((5, 9), (3, 5)), heads=3, prior_heads=1, scale_weights=False),
    Case("no scale weights", ((5, 9), (3, 5)), batch=2, scale_weights=False, mask="valid_shapes"),
    Case("projections", ((5, 9),), batch=2, heads=2, layout="projection", mask="valid_shapes", quick=True),
    Case("sequence first", ((5, 9),), batch=2, heads=2, layout="sequence_first", mask="padding"),
    Case("last axis strided", ((5, 9),), batch=2, heads=2, layout="last_axis_strided"),
    Case("expanded", ((5, 9),), batch=2, heads=2, queries=9, layout="expanded", quick=True),
    Case("narrow prior", ((9, 17),), queries=33, prior="narrow", quick=True),
    Case("wide prior", ((9, 17),), queries=33, prior="wide", quick=True),
    Case("far centers", ((9, 17),), queries=33, prior="far", quick=True),
    Case("narrow prior, padded batch", ((9, 17),), batch=2, prior="narrow", mask="valid_shapes"),
    Case("far centers, padded batch", ((9, 17),), batch=2, prior="far", mask="valid_shapes"),
    Case("planned, padded batch", ((11, 35), (9, 11)), batch=2, queries=70, mask="valid_shapes", planned=True),
    Case("planned, narrow prior", ((20, 19),), heads=2, prior="narrow", layout="projection", planned=True, quick=True),
    Case("planned, far centers", ((9, 37), (3, 5)), heads=2, prior="far", prior_heads=1, planned=True),
    Case("planned, random padding mask", ((20, 19), (5, 9)), batch=2, mask="random", planned=True),
    Case("planned, 900 queries", ((50, 84), (25, 42)), batch=2, heads=2, queries=900, planned=True, large=True),
    Case("prior in the inputs' dtype", ((9, 17), (5, 9)), prior_dtype=None),
    Case("scale 0", ((5, 9),), scale=0.0, quick=True),
    Case("scale 1", ((9, 17),), scale=1.0),
    Case("negative scale", ((9, 17),), scale=-0.3),
    Case(
        "detector, three scales",
        ((50, 84), (25, 42), (13, 21)),
        batch=2,
        heads=8,
        queries=300,
        mask="valid_shapes",
        layout="projection",
        large=True,
    ),
    Case(
        "detector, dilated",
        ((67, 84),),
        batch=2,
        heads=8,
        queries=300,
        mask="padding",
        layout="projection",
        large=True,
    ),
    Case("detector, head_dim 64", ((50, 84),), heads=8, queries=300, head_dim=64, prior_heads=1, large=True),
    Case("detector, head_dim 128", ((50, 84),), heads=4, queries=300, head_dim=128, large=True),
)


# --- check ---


def run_reference(inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of `reference.attention` under native autograd, by name."""
    return _output_and_gradients(reference.attention(*inputs.backend_arguments()), inputs)


def attend(inputs: Inputs, backend: str, **options: Any) -> Tensor:
    """`smca_attention` of the inputs with a backend; `options` are other keyword arguments of it."""
    with _planning(inputs.planned):
        return attention.smca_attention(**inputs.arguments(), backend=backend, **options)


def run_backend(inputs: Inputs, backend: str, **options: Any) -> dict[str, Tensor]:
    """Output and gradients of `smca_attention` with a backend, by name; `options` as for `attend`."""
    with _planning(inputs.planned):
        return _output_and_gradients(attend(inputs, backend, **options), inputs)


@contextmanager
def _planning(always: bool) -> Iterator[None]:
    """Meanwhile, if `always`, the kernels plan calls of any size."""
    if not always or not _has_triton():
        yield
        return
    from smca_kernels.backends.triton import launch

    least = launch.LEAST_PLANNED_ELEMENTS
    launch.LEAST_PLANNED_ELEMENTS = 0
    try:
        yield
    finally:
        launch.LEAST_PLANNED_ELEMENTS = least


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _output_and_gradients(output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    tensors = inputs.differentiable()
    gradients = torch.autograd.grad(output, list(tensors.values()), inputs.grad_output)
    return {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}


def absolute_sums(inputs: Inputs) -> dict[str, list[float]]:
    """Largest sum of absolute terms behind an element of output and gradients, scale by scale.

    The terms are α P times value, grad_output, or (through dS, with |dO|·|v| in place of dP - δ) key, query,
    2 p (x - c) and (x - c)². Each counts max(1, |LSE|) times, by which P = exp(logit - LSE) magnifies a
    rounding of its exponent.
    """
    shapes, scale = inputs.spatial_shapes, inputs.backend_arguments()[-1]
    ignored = reference.ignored_keys(shapes, inputs.valid_shapes, inputs.key_padding_mask)
    sizes = [height * width for height, width in shapes]
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


def _by_scale(name: str, tensor: Tensor, spatial_shapes: tuple[tuple[int, int], ...]) -> Sequence[Tensor]:
    """Parts of a result that are held against a budget of their own."""
    if name in ("key", "value"):
        return tensor.split([height * width for height, width in spatial_shapes], dim=2)
    if name in ("center", "precision", "scale_weights"):
        return tensor.unbind(3)
    return [tensor]


def largest_errors(
    eager: dict[str, Tensor], oracle: dict[str, Tensor], spatial_shapes: tuple[tuple[int, int], ...]
) -> dict[str, list[float]]:
    """Largest finite difference of output and gradients, by name and scale."""
    return {
        name: [_largest_finite(part) for part in _by_scale(name, eager[name].double() - exact, spatial_shapes)]
        for name, exact in oracle.items()
    }


# Inputs up to this many elements of query have too few gradients for the largest of eager's errors to be typical.
FEW = 2**16
NEIGHBOURS = 4


def neighbours(inputs: Inputs) -> Iterator[Inputs]:
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
    """What output and gradients of some inputs are held against; `compare` may be asked about any number of results.

    Of small inputs, eager's error is the largest on them and on `NEIGHBOURS` neighbours: the gradients of a few
    queries are few numbers, and eager's rounding errors may happen to be small in all of them.
    """

    inputs: Inputs
    oracle: dict[str, Tensor]
    eager: dict[str, Tensor]
    absolute_sums: dict[str, list[float]]
    eager_errors: dict[str, list[float]]

    @classmethod
    def of(cls, inputs: Inputs) -> Expectation:
        eager, wide = run_reference(inputs), inputs.double()
        oracle = run_reference(wide)
        eager_errors = largest_errors(eager, oracle, inputs.spatial_shapes)
        for neighbour in neighbours(inputs) if inputs.query.numel() <= FEW else ():
            results = run_reference(neighbour), run_reference(neighbour.double())
            for name, errors in largest_errors(*results, inputs.spatial_shapes).items():
                eager_errors[name] = [max(pair) for pair in zip(eager_errors[name], errors, strict=True)]
        return cls(inputs, oracle, eager, absolute_sums(wide), eager_errors)

    def compare(self, actual: dict[str, Tensor]) -> list[Comparison]:
        """Results by name, those that there are, against their budgets: one a tensor and scale."""
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


def compare_results(actual: dict[str, Tensor], inputs: Inputs) -> list[Comparison]:
    """Output and gradients, as from `run_backend`, against their budgets: one a tensor and scale."""
    expectation = Expectation.of(inputs)
    return expectation.compare({name: actual[name] for name in expectation.oracle})


def check(inputs: Inputs, backend: str) -> list[Comparison]:
    """Run a backend with poisoned memory and compare output and gradients with their budgets."""
    with poisoned_memory():
        actual = run_backend(inputs, backend)
    return compare_results(actual, inputs)


def case_generator(case: Case, seed: int) -> torch.Generator:
    """A generator that depends on seed and name alone, so that any case can be repeated by itself."""
    # torch's CPU generator takes 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {case.name}".encode()))


# --- command line ---


STATUSES = ("passed", "failed", "error", "skipped")


@dataclass
class Row:
    """What became of one case on one backend in one dtype."""

    backend: str
    dtype: str
    case: str
    status: str  # one of STATUSES
    reason: str = ""
    seconds: float = 0.0
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)

    @property
    def ran(self) -> bool:
        return self.status in ("passed", "failed")

    def worst(self, name: str) -> Comparison | None:
        """The comparison of a tensor, over all scales, with the largest ratio."""
        parts = [c for c in self.comparisons if c.name.split(" ")[0] == name]
        return max(parts, key=lambda c: c.ratio, default=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca parity`."""
    parser.description = (
        "Compare output and gradients of every backend that can run here with a float64 reference. The "
        "budget of each is twice plain PyTorch's own error in the same dtype plus one rounding step. Exit "
        "status 1 if one is exceeded, or if no case ran."
    )
    parser.add_argument("--quick", action="store_true", help="only the cases that tell most")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: all; one that is named must serve")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: all")
    parser.add_argument("--device", help="a torch device; default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=_seed, help="an integer from 0 to 2**31 - 1; default: a fresh one, printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**31 - 1, got {text!r}")
    return seed


def run(args: argparse.Namespace) -> int:
    """`smca parity`: exit status 0 if every case kept its budget, 1 if one did not or none ran.

    Raises:
        ValueError: for a device that can't be used, or a file whose folder does not exist.
    """
    for option, path in (("--json", args.json), ("--junit", args.junit)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{option} must name a file in an existing folder, got {path}")
    device = _device(args.device)
    if device.type == "cpu":
        # Triton reads this when it is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    environment = _environment(device)
    print(" · ".join(f"{name} {value}" for name, value in environment.items()))
    print(f"seed {seed} (repeat with --seed {seed}); numbers are error / budget, at most 1 passes\n")
    cases = [case for case in CASES if case.quick or not args.quick]
    rows = _run_cases(args.backend or BACKENDS, args.dtype, cases, device, seed)
    _print_summary(rows)
    idle = [name for name in args.backend or () if not any(row.ran for row in rows if row.backend == name)]
    for name in idle:
        print(f"no case ran on {name}")
    if args.json is not None:
        write_text(args.json, json.dumps(_json_report(rows, seed, environment), indent=2) + "\n")
    if args.junit is not None:
        write_text(args.junit, _junit_report(rows, seed, environment))
    passed = any(row.ran for row in rows) and all(row.status in ("passed", "skipped") for row in rows)
    return 0 if passed and not idle else 1


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from None
    return device


def _environment(device: torch.device) -> dict[str, str]:
    from smca_kernels.tools.env import describe, versions

    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    return {"device": str(device), **describe(device), **versions(), "interpreter": str(interpreted)}


def _run_cases(
    backends: Sequence[str], dtypes: Sequence[str], cases: Sequence[Case], device: torch.device, seed: int
) -> list[Row]:
    titles = "".join(f"{name[:9]:>10}" for name in TENSORS)
    print(f"{'backend':7} {'dtype':8} {'case':32}{titles}  seconds")
    rows = []
    for backend in backends:
        for dtype in dtypes:
            for case in cases:
                row = _run_case(dataclasses.replace(case, dtype=dtype), backend, device, seed)
                _print_row(row)
                rows.append(row)
    return rows


def _run_case(case: Case, backend: str, device: torch.device, seed: int) -> Row:
    row = Row(backend, case.dtype, case.name, "passed")
    if case.large and backend == "triton" and device.type == "cpu":
        row.status, row.reason = "skipped", "too large for Triton's interpreter"
        return row
    start = time.perf_counter()
    try:
        inputs = make_inputs(case, case_generator(case, seed), device)
        reason = attention._unsupported(backend, inputs.backend_arguments())
        if reason is not None:
            row.status, row.reason = "skipped", reason
            return row
        row.comparisons = check(inputs, backend)
    except Exception as error:  # a crash of one case must not hide the others
        row.status, row.reason = "error", f"{type(error).__name__}: {error}"
        return row
    row.seconds = time.perf_counter() - start
    over = [str(c) for c in row.comparisons if not c.ratio <= 1.0]
    if over:
        row.status, row.reason = "failed", "; ".join(over)
    return row


def _print_row(row: Row) -> None:
    head = f"{row.backend:7} {row.dtype:8} {row.case:32}"
    if row.ran:
        note = f"  FAILED {row.reason}" if row.reason else ""
        print(f"{head}{_ratios([row])}  {row.seconds:7.2f}{note}", flush=True)
    else:
        print(f"{head}  {row.status}: {row.reason}", flush=True)


def _ratios(rows: list[Row]) -> str:
    """Worst error / budget of each tensor over some rows, as columns of the table."""
    columns = []
    for name in TENSORS:
        found = [comparison.ratio for row in rows if (comparison := row.worst(name))]
        columns.append(f"{max(found):10.2f}" if found else f"{'–':>10}")
    return "".join(columns)


def _print_summary(rows: list[Row]) -> None:
    print("\nworst of all cases")
    for backend, dtype in dict.fromkeys((row.backend, row.dtype) for row in rows):
        ran = [row for row in rows if (row.backend, row.dtype) == (backend, dtype) and row.ran]
        seconds = sum(row.seconds for row in ran)
        print(f"{backend:7} {dtype:8} {f'{len(ran)} cases':32}{_ratios(ran)}  {seconds:7.2f}")
    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))


def _json_report(rows: list[Row], seed: int, environment: dict[str, str]) -> dict[str, Any]:
    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)  # JSON has no infinity

    def measured(comparison: Comparison) -> dict[str, float | str]:
        return {key: number(getattr(comparison, key)) for key in ("error", "budget", "ratio")}

    return {
        "seed": seed,
        **environment,
        "rows": [
            {
                **{key: getattr(row, key) for key in ("backend", "dtype", "case", "status", "reason", "seconds")},
                "tensors": {name: measured(c) for name in TENSORS if (c := row.worst(name))},
            }
            for row in rows
        ],
    }


def _junit_report(rows: list[Row], seed: int, environment: dict[str, str]) -> str:
    count = {status: str(sum(row.status == status for row in rows)) for status in ("failed", "error", "skipped")}
    suite = ElementTree.Element(
        "testsuite",
        name="smca parity",
        tests=str(len(rows)),
        failures=count["failed"],
        errors=count["error"],
        skipped=count["skipped"],
        time=f"{sum(row.seconds for row in rows):.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in {"seed": str(seed), **environment}.items():
        ElementTree.SubElement(properties, "property", name=key, value=value)
    for row in rows:
        element = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"{row.backend}.{row.dtype}",
            name=row.case,
            time=f"{row.seconds:.3f}",
        )
        if row.status != "passed":
            tag = "failure" if row.status == "failed" else row.status
            ElementTree.SubElement(element, tag, message=row.reason)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
