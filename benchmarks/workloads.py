"""What is measured, and on what: the workloads, the measures and the bars as tables."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from smca_kernels.parity import Inputs

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
    image_share: float = 1.0  # of each grid; images are narrower and lower in turns, as in a batch of mixed sizes

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
        """Pairs of a query and a key that is not padding, over all images and heads."""
        keys = sum(height * width for image in self.valid_shapes for height, width in image)
        return self.heads * self.queries * keys

    def inputs(self, dtype: str, seed: int, device: torch.device) -> Inputs:
        """Random inputs that require gradients: priors of 1 to 8 cells beside them in float32, scale weights."""
        import torch

        from smca_kernels.parity import Case, make_inputs

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
        if self.image_share == 1.0:
            return inputs
        return dataclasses.replace(inputs, valid_shapes=torch.tensor(self.valid_shapes, device=device))


def _workloads() -> dict[str, Workload]:
    table = [Workload(f"{name}-b{batch}", batch, grids) for batch in (1, 2, 16) for name, grids in GRIDS.items()]
    table += [
        Workload("basic-b2-padded", 2, GRIDS["basic"], image_share=0.7),
        Workload("full-b2-padded", 2, GRIDS["full"], image_share=0.7),
        Workload("full-b16-padded", 16, GRIDS["full"], image_share=0.7),
        Workload("full-b2-900", 2, GRIDS["full"], queries=900),
        Workload("full-b2-d64", 2, GRIDS["full"], head_dim=64),
    ]
    return {workload.name: workload for workload in table}


WORKLOADS = _workloads()
# So small that only the calls themselves take time. One scale: torch's SDPA knows no more.
TINY = Workload("tiny", 1, ((2, 2),), queries=4, heads=2)

# What a device measures when nothing else is asked for. Those that bars name come first: compiling, which only what
# compiles has to wait for, ends with the time for it.
FIRST = ("full-b2", "full-b16", "pyramid-b16")
DEFAULT_WORKLOADS = {
    "cpu": ("full-b2", "basic-b1", "basic-b2-padded", "dc5-b1", "full-b1"),
    "cuda": (*FIRST, *(name for name in WORKLOADS if name not in (*FIRST, "basic-b2-padded"))),
}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}

MEASURES = {  # name: unit
    "time": "ms",
    "replay": "ms",
    "preparation": "ms",
    "compile": "s",
    "overhead": "µs",
    "saved": "MB",
    "peak": "MB",
}


@dataclass(frozen=True)
class Bar:
    """A limit on value / base, or on base / value where that is to be large, for rows of one measure and step.

    `peer` and `against` name peers; "default" is what backend="auto" chooses, and "fastest" the fastest peer that
    computes the same function and is not ours.
    """

    measure: str
    step: str
    peer: str
    against: str
    at_least: float | None = None  # base / value
    at_most: float | None = None  # value / base
    plus: float = 0.0  # on top of at_most × base, in the measure's unit
    workloads: tuple[str, ...] = ()  # none: all that were measured
    dtypes: tuple[str, ...] = ()
    device: str | None = None  # None: any

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g} × as fast as {self.against}"
        return f"≤ {self.at_most:g} × {self.against}" + (f" + {self.plus:g} {MEASURES[self.measure]}" * (self.plus > 0))


_DETECTORS, _HALF = ("full-b2", "full-b16"), ("bfloat16",)
BARS: tuple[Bar, ...] = (
    Bar("time", FORWARD, "default", "naive", at_least=8.0, workloads=("full-b2",), device="cpu"),
    Bar("time", BOTH, "default", "naive", at_least=5.0, workloads=("full-b2",), device="cpu"),
    Bar("time", FORWARD, "default", "naive", at_least=10.0, workloads=_DETECTORS, dtypes=_HALF, device="cuda"),
    Bar("time", BOTH, "default", "naive", at_least=6.0, workloads=_DETECTORS, dtypes=_HALF, device="cuda"),
    Bar("time", FORWARD, "default", "fastest", at_least=1.3, dtypes=_HALF, device="cuda"),
    Bar("time", BOTH, "default", "fastest", at_least=1.3, dtypes=_HALF, device="cuda"),
    Bar("time", FORWARD, "default", "limit", at_least=0.45, workloads=("pyramid-b16",), dtypes=_HALF, device="cuda"),
    Bar("time", BOTH, "default", "plain-sdpa", at_most=1.15, dtypes=_HALF, device="cuda"),
    Bar("peak", BOTH, "default", "naive", at_most=0.05, workloads=("full-b16",), dtypes=_HALF, device="cuda"),
    Bar("overhead", FORWARD, "default", "torch SDPA", at_most=2.0, plus=30.0),
    Bar("saved", FORWARD, "sdpa", "inputs", at_most=2.5),
    Bar("saved", FORWARD, "triton", "inputs + outputs of each scale", at_most=1.1),
)
