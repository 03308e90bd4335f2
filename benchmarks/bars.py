"""Bars that this project sets itself: limits on time, memory and overhead relative to other peers, as a table.

`smca bench --bars` judges them (records.verdicts), for the rows that were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .workloads import BOTH, FORWARD, MEASURES


@dataclass(frozen=True)
class Bar:
    """A limit on value / base, or on base / value where that must be large, for rows of one measure and step.

    Times are those of CUDA-graph replays where both were replayed. `peer` and `against` name peers; "default" is the
    backend that backend="auto" chooses, and "fastest" the fastest peer that computes the same function, is within its
    error budget, and is not a backend of this library.
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
        parts = [f"{self.at_most:.3g} × {self.against}"] * bool(self.at_most)
        return "≤ " + " + ".join([*parts, *[f"{self.plus:g} {MEASURES[self.measure]}"] * bool(self.plus)])


_DETECTORS, _HALF = ("full-b2", "full-b16"), ("bfloat16",)
_TRAINED = ("pyramid-b2-trained", "pyramid-b16-trained")
BARS: tuple[Bar, ...] = (
    Bar("time", FORWARD, "default", "naive", at_least=8.0, workloads=("full-b2",), device="cpu"),
    Bar("time", BOTH, "default", "naive", at_least=5.0, workloads=("full-b2",), device="cpu"),
    *(Bar("slowdown", step, "default", "naive", at_most=0.0, plus=3.0, device="cpu") for step in (FORWARD, BOTH)),
    Bar("time", FORWARD, "default", "naive", at_least=10.0, workloads=_DETECTORS, dtypes=_HALF, device="cuda"),
    Bar("time", BOTH, "default", "naive", at_least=6.0, workloads=_DETECTORS, dtypes=_HALF, device="cuda"),
    Bar("time", FORWARD, "default", "fastest", at_least=1.3, dtypes=_HALF, device="cuda"),
    Bar("time", BOTH, "default", "fastest", at_least=1.3, dtypes=_HALF, device="cuda"),
    Bar("time", FORWARD, "triton-all", "limit", at_least=0.45, workloads=("pyramid-b16",), dtypes=_HALF, device="cuda"),
    Bar("time", BOTH, "default", "plain-sdpa", at_most=1.15, dtypes=_HALF, device="cuda"),
    Bar("computed", FORWARD, "triton", "triton-all", at_most=1 / 1.8, workloads=("pyramid-b2-narrow",)),
    *(
        Bar("time", step, "triton", "triton-all", at_most=1.03, workloads=("pyramid-b16-off",), dtypes=_HALF)
        for step in (FORWARD, BOTH)
    ),
    Bar("time", BOTH, "default", "plain-sdpa", at_most=1.0, workloads=_TRAINED, dtypes=_HALF, device="cuda"),
    Bar("replay", FORWARD, "default", "naive", at_most=0.0, plus=0.015, workloads=("full-b1",), dtypes=_HALF),
    Bar("peak", BOTH, "default", "naive", at_most=0.05, workloads=("full-b16",), dtypes=_HALF, device="cuda"),
    Bar("overhead", FORWARD, "default", "torch SDPA", at_most=2.0, plus=30.0),
    Bar("saved", FORWARD, "sdpa", "inputs", at_most=2.5),
    Bar("saved", FORWARD, "triton", "inputs + outputs of each scale", at_most=1.1),
)
