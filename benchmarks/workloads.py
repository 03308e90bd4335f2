"""What is measured, and on what: the workloads, the measures and the bars as tables."""

from __future__ import annotations

from dataclasses import dataclass

from smca_kernels.parity import Case

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Workload:
    """Shapes of the operator's inputs."""

    name: str
    batch: int
    queries: int
    heads: int
    head_dim: int
    spatial_shapes: tuple[tuple[int, int], ...]

    def case(self, dtype: str) -> Case:
        """The same shapes as a parity case: random inputs, priors of 1 to 8 cells, scale weights, no mask."""
        return Case(
            self.name,
            self.spatial_shapes,
            batch=self.batch,
            heads=self.heads,
            queries=self.queries,
            head_dim=self.head_dim,
            dtype=dtype,
        )


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        # The co-attention of one decoder layer for two images of 800 × 1344, at strides 16, 32 and 64.
        Workload("detector", 2, 300, 8, 32, ((50, 84), (25, 42), (13, 21))),
        # So small that only the calls themselves take time. One scale: torch's SDPA knows no more.
        Workload("tiny", 1, 4, 2, 32, ((2, 2),)),
    )
}


@dataclass(frozen=True)
class Measure:
    """What a row's value is, and what it is compared with."""

    unit: str
    base: str
    more_is_better: bool  # the ratio is base / value instead of value / base


MEASURES: dict[str, Measure] = {
    "time": Measure("ms", "naive", more_is_better=True),
    "overhead": Measure("µs", "torch SDPA", more_is_better=False),
    "saved": Measure("MB", "inputs", more_is_better=False),
    "saved per scale": Measure("MB", "inputs + outputs + LSE", more_is_better=False),
    "peak": Measure("MB", "naive", more_is_better=False),
}


@dataclass(frozen=True)
class Bar:
    """A limit on value / base (base / value where more is better), for the rows that it names."""

    measure: str
    step: str
    backend: str  # "default": what backend="auto" chooses
    limit: float
    plus: float = 0.0  # on top of limit × base, in the measure's unit
    device: str | None = None  # None: any

    def __str__(self) -> str:
        sign = "≥" if MEASURES[self.measure].more_is_better else "≤"
        return f"{sign} {self.limit:g} ×" + (f" + {self.plus:g} {MEASURES[self.measure].unit}" if self.plus else "")


BARS: tuple[Bar, ...] = (
    Bar("time", FORWARD, "default", 8.0, device="cpu"),
    Bar("time", BOTH, "default", 5.0, device="cpu"),
    Bar("overhead", FORWARD, "default", 2.0, plus=30.0),
    Bar("saved", FORWARD, "sdpa", 2.5),
    Bar("saved per scale", FORWARD, "triton", 1.1),
)
