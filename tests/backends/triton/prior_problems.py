"""Priors of random projections that the tests of its launch share, and what says which operators a call runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smca_kernels.nn import GEOMETRIES, SCALE_TYPES, SpatialPrior, SpatialPriorOutput

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = list(itertools.product(GEOMETRIES, ("per_head", "shared"), SCALE_TYPES))
GRIDS = ((21, 34), (11, 17), (5, 9), (3, 4), (1, 1), (7, 2), (9, 9), (2, 50))
STRIDES = (8, 12, 32, 40, 64, 100, 7, 48)
BETA = 5.0
OUTPUTS = ("center", "precision", "scale_weights")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Raw projections of a prior, what says how large its images are, and a gradient for everything that comes out."""

    prior: SpatialPrior
    raw: dict[str, Tensor | None]  # reference_logits, offset, object_scale, selection
    part: tuple[Tensor | None, Tensor | None]  # image_sizes, cells
    shapes: tuple[tuple[int, int], ...]
    upstream: SpatialPriorOutput

    def double(self) -> Problem:
        raw = {name: None if t is None else t.detach().double().requires_grad_() for name, t in self.raw.items()}
        upstream = SpatialPriorOutput(*(None if t is None else t.double() for t in self.upstream))
        return dataclasses.replace(self, raw=raw, upstream=upstream)

    def locate(self, backend: str) -> SpatialPriorOutput:
        return self.prior._locate(*self.raw.values(), *self.part, self.shapes, backend)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs by their names, gradients by those of the raw projections with "grad " before."""
        outputs, inputs = self.locate(backend), {name: t for name, t in self.raw.items() if t is not None}
        reached = [i for i, out in enumerate(outputs) if out is not None and out.requires_grad]
        gradients = torch.autograd.grad(
            [outputs[i] for i in reached], list(inputs.values()), [self.upstream[i] for i in reached]
        )
        results = {name: out.detach() for name in OUTPUTS if (out := getattr(outputs, name)) is not None}
        return results | {f"grad {name}": g for name, g in zip(inputs, gradients, strict=True)}

    def absolute_sums(self) -> dict[str, float]:
        """Largest sum of absolute terms behind an element, for results that are sums: the problem is in float64."""
        positive = SpatialPriorOutput(*(None if t is None else t.abs() for t in self.upstream))
        # Extents, and the derivatives of sigmoid and of s², have one sign for all terms of a sum.
        of_positive = dataclasses.replace(self, upstream=positive).run("reference")
        sums = {name: of_positive[name].abs().max().item() for name in of_positive if name.startswith("grad")}
        share, offset = self.raw["reference_logits"].sigmoid(), self.raw["offset"]
        largest = max(max(shape) for shape in self.shapes) if self.part == (None, None) else 400.0
        sums["center"] = share.max().item() * largest + (0.0 if offset is None else offset.abs().max().item())
        if self.raw["selection"] is not None:
            sums["grad selection"] = 2 * self.upstream.scale_weights.abs().max().item()
        return sums


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    # what a slice of one larger projection looks like, at an odd place
    "cut from wider": lambda t: torch.cat([torch.full_like(t[..., :1], math.nan), t, t], -1)[..., 1 : t.shape[-1] + 1],
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other query": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "last axis strided": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def make_problem(
    generator: torch.Generator,
    device: torch.device,
    *,
    batch: int = 2,
    queries: int = 7,
    heads: int = 2,
    scales: int = 3,
    dtype: torch.dtype = torch.float32,
    part: str = "grid",
    layout: str = "contiguous",
    **options: Any,
) -> Problem:
    prior = SpatialPrior(8, heads, STRIDES[:scales], beta=BETA, **options)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(shape, generator=generator)

    maps, axes = prior.map_heads, prior.axes
    # Some sigmoids and softmaxes are saturated, some far from it.
    spread = torch.tensor([1.0, 5.0, 100.0])[torch.arange(queries) % 3, None]
    raw = {
        "reference_logits": spread * normal(batch, queries, 2),
        "offset": normal(batch, queries, scales * maps * 2, spread=3.0) if prior.offset is not None else None,
        # Around 0, where the paper's clamp is, to 5.
        "object_scale": normal(batch, queries, scales * maps * axes) ** 3 if axes else None,
        "selection": spread[:, :1] * normal(batch, queries, scales) if prior.scale_selection is not None else None,
    }
    laid_out = {
        name: None if t is None else LAYOUTS[layout](t.to(device, dtype)).detach().requires_grad_()
        for name, t in raw.items()
    }
    shapes = GRIDS[:scales]
    sizes = torch.randint(1, 400, (batch, 2), generator=generator).to(device)
    cells = torch.stack([torch.randint(0, 60, (batch, 2), generator=generator) for _ in shapes], 1).to(device)
    parts = {
        "grid": (None, None),
        "image_sizes": (sizes, None),
        "float image_sizes": (sizes.flip(-1).half().flip(-1), None),
        "cells": (None, cells),
        "strided cells": (None, cells.transpose(0, 1).contiguous().transpose(0, 1)),
    }
    of_maps = (batch, maps, queries, scales)
    upstream = (normal(*of_maps, 2), normal(*of_maps, 2), normal(batch, 1, queries, scales), normal(batch, queries, 2))
    absent = raw["selection"] is None
    center, precision, weights, logits = (t.to(device) for t in upstream)
    return Problem(
        prior, laid_out, parts[part], shapes, SpatialPriorOutput(center, precision, None if absent else weights, logits)
    )


def make_prior(device: torch.device, **options: Any) -> tuple[SpatialPrior, Tensor]:
    prior = SpatialPrior(8, 2, STRIDES[:3], **options).to(device)
    return prior, torch.randn(2, 5, 8, device=device)


def operators(function: Callable[[], Any]) -> list[str]:
    """Names of the operators that a call runs, views left out."""
    names = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            returns = func._schema.returns
            if not any(each.alias_info is not None and not each.alias_info.is_write for each in returns):
                names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Recording():
        function()
    return [name for name in names if name not in ("promote_types", "_unsafe_view")]
