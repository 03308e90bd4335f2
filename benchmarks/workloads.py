"""Workloads and measures of `smca bench`, as tables: shapes, priors, what a device measures by default, units."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from smca_kernels.testing.cases import CaseInputs

FORWARD, BOTH = "forward", "forward + backward"

# One image of 800 × 1344 pixels, or 800 × 1336, at strides of 8 to 64; DC5 is a backbone dilated to stride 16.
GRIDS: dict[str, tuple[tuple[int, int], ...]] = {
    "basic": ((25, 42),),
    "dc5": ((50, 84),),
    "full": ((50, 84), (25, 42), (13, 21)),
    "pyramid": ((100, 167), (50, 84), (25, 42), (13, 21)),
}


@dataclass(frozen=True)
class Workload:
    """Shapes of the operator's inputs."""

    name: str
    batch: int
    spatial_shapes: tuple[tuple[int, int], ...]
    queries: int = 300
    heads: int = 8
    head_dim: int = 32
    prior: str = "random"  # a name of PRIORS, or "random"
    image_share: float = 1.0  # of each grid; images are narrower and lower by turns, as in a batch of mixed sizes

    @property
    def keys(self) -> int:
        """Keys of one image, padding included."""
        return sum(height * width for height, width in self.spatial_shapes)

    @property
    def valid_shapes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(height, width) of the image in each grid, image by image."""
        share = self.image_share
        return tuple(
            tuple(
                (height, math.ceil(width * share)) if image % 2 else (math.ceil(height * share), width)
                for height, width in self.spatial_shapes
            )
            for image in range(self.batch)
        )

    @property
    def elements(self) -> int:
        """Pairs of a query and a key, over all images and heads, padding not counted."""
        keys = sum(height * width for image in self.valid_shapes for height, width in image)
        return self.heads * self.queries * keys

    def inputs(self, dtype: str, seed: int, device: torch.device) -> CaseInputs:
        """Random inputs that require gradients; the prior beside them in float32, and scale weights."""
        import torch

        from smca_kernels.testing.cases import Case, make_inputs

        case = Case(
            self.name,
            self.spatial_shapes,
            batch=self.batch,
            heads=self.heads,
            queries=self.queries,
            head_dim=self.head_dim,
            dtype=dtype,
        )
        inputs = make_inputs(case, torch.Generator().manual_seed(seed), device)
        if self.prior != "random":
            torch.manual_seed(seed)
            center, precision = PRIORS[self.prior](self)
            center, precision = (t.expand(center.shape).to(device).clone() for t in (center, precision))
            inputs = dataclasses.replace(
                inputs, center=center.requires_grad_(), precision=precision.requires_grad_()
            )  # fmt: skip
        if self.image_share == 1.0:
            return inputs
        return dataclasses.replace(inputs, valid_shapes=torch.tensor(self.valid_shapes, device=device))


def _sizes(workload: Workload) -> Tensor:
    """(width, height) of each grid, [S, 2] float32."""
    import torch

    return torch.tensor(workload.spatial_shapes, dtype=torch.float32).flip(-1)


def _spread(workload: Workload) -> Tensor:
    """Centres [B, H, N, S, 2] all over the image, the same in all heads and scales."""
    import torch

    shares = torch.rand(workload.batch, 1, workload.queries, 1, 2).expand(-1, workload.heads, -1, -1, -1)
    return shares * _sizes(workload)


def _initial(workload: Workload) -> tuple[Tensor, Tensor]:
    import torch

    from smca_kernels import SpatialPrior

    strides = [IMAGE_WIDTH / width for _, width in workload.spatial_shapes]
    prior = SpatialPrior(256, workload.heads, strides)
    features, logits = (
        torch.randn(workload.batch, workload.queries, 256),
        torch.rand(workload.batch, workload.queries, 2),
    )
    with torch.no_grad():
        output = prior(features, workload.spatial_shapes, reference_logits=logits.logit(1e-3))
    return output.center, output.precision


def _trained(workload: Workload) -> tuple[Tensor, Tensor]:
    import torch

    center = _spread(workload)
    sigma = 0.1 * torch.exp(0.6 * torch.randn(center.shape)) * _sizes(workload)
    return center + sigma * torch.randn(center.shape), 0.5 / sigma**2


def _narrow(workload: Workload) -> tuple[Tensor, Tensor]:
    return _spread(workload), 0.5 / (0.02 * _sizes(workload)[:, :1]) ** 2


def _off(workload: Workload) -> tuple[Tensor, Tensor]:
    center = _spread(workload)
    return center, center.new_zeros(())


IMAGE_WIDTH = 1336
# "random": σ of 1 to 8 cells, centres on the grids and just beside them.
PRIORS: dict[str, Callable[[Workload], tuple[Tensor, Tensor]]] = {
    "initial": _initial,  # as the authors' code begins: σ of 2 cells at stride 32, offsets of about a cell
    "trained": _trained,  # σ a tenth of the grid's side, by a factor of 1.8 more or less: the detector of digits
    "narrow": _narrow,  # σ a fiftieth of the grid's width
    "off": _off,  # precision 0: no key can be left out
}


def _workloads() -> dict[str, Workload]:
    table = [Workload(f"{name}-b{batch}", batch, grids) for batch in (1, 2, 16) for name, grids in GRIDS.items()]
    table += [
        Workload("basic-b2-padded", 2, GRIDS["basic"], image_share=0.7),
        Workload("full-b2-padded", 2, GRIDS["full"], image_share=0.7),
        Workload("full-b16-padded", 16, GRIDS["full"], image_share=0.7),
        Workload("full-b2-900", 2, GRIDS["full"], queries=900),
        Workload("full-b2-d64", 2, GRIDS["full"], head_dim=64),
        *(Workload(f"pyramid-b2-{prior}", 2, GRIDS["pyramid"], prior=prior) for prior in PRIORS),
        *(Workload(f"pyramid-b16-{prior}", 16, GRIDS["pyramid"], prior=prior) for prior in ("trained", "off")),
    ]
    return {workload.name: workload for workload in table}


WORKLOADS = _workloads()
# So small that only the calls themselves take time. One scale, as torch's SDPA takes no more.
TINY = Workload("tiny", 1, ((2, 2),), queries=4, heads=2)

# Measured on a device by default. The workloads of bars come first, as nothing is compiled after half of the time.
IN_BARS = ("full-b2", "full-b16", "pyramid-b16")
DEFAULT_WORKLOADS = {
    "cpu": ("full-b2", "basic-b1", "basic-b2-padded", "dc5-b1", "full-b1"),
    "cuda": (*IN_BARS, *(name for name in WORKLOADS if name not in (*IN_BARS, "basic-b2-padded"))),
}
# Workloads whose planned elements are counted, wherever the benchmark runs.
PLANNED = ("pyramid-b2", *(f"pyramid-b2-{prior}" for prior in PRIORS))
# Workloads that are measured beside a busy process as well.
CROWDED = ("full-b2",)
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}

MEASURES = {  # name: unit
    "time": "ms",
    "slowdown": "×",
    "replay": "ms",
    "preparation": "ms",
    "compile": "s",
    "overhead": "µs",
    "saved": "MB",
    "peak": "MB",
    "computed": "M",
}
