"""Records of a run of `smca bench`: rows, parity, skipped measurements, and verdicts on the bars.

`Report` collects them and writes them as JSON after each workload, so that an interrupted run keeps its results.
report.py makes tables and plots of that file, compare.py compares two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smca_kernels.files import write_text

from .bars import Bar


@dataclass(frozen=True)
class Row:
    """One measured value of one peer; a median if there are quantiles."""

    measure: str
    workload: str
    step: str
    dtype: str
    peer: str
    unit: str
    value: float
    q20: float | None
    q80: float | None
    repeats: int


@dataclass(frozen=True)
class Parity:
    """Comparison of a peer with float64.

    Attributes:
        ratio: error / budget of the worst tensor.
        worst: that tensor's name.
        where: the part that was compared, one image and some of its heads, drawn anew in every run.
        logit_error: largest error of a logit, for peers that round their inputs.
    """

    workload: str
    dtype: str
    peer: str
    ratio: float
    worst: str
    where: str
    logit_error: float | None

    @property
    def within(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return f"{self.worst} is off by {self.ratio:.3g} × its budget ({self.where})"


@dataclass(frozen=True)
class Skipped:
    """A measurement that was skipped, with the reason; step "" means all steps, peer "" all peers of a workload."""

    workload: str
    dtype: str
    peer: str
    step: str
    reason: str


def explain(error: BaseException) -> str:
    """Name an error and its message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' * (len(text) > 160)}"


@dataclass(frozen=True)
class Verdict:
    """Judgement of a bar on two rows."""

    bar: str
    measure: str
    workload: str
    step: str
    dtype: str
    peer: str
    against: str
    value: float
    base: float
    met: bool


@dataclass
class Report:
    """Results of a run.

    Attributes:
        bars: judged by verdicts on the rows; none if empty.
        defaults: for each dtype, the backend that backend="auto" chooses.
    """

    environment: dict[str, Any]
    path: Path | None = None
    bars: Sequence[Bar] = ()
    defaults: dict[str, str] = field(default_factory=dict)
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    parity: list[Parity] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    not_measured: list[Skipped] = field(default_factory=list)
    finished: bool = False

    @property
    def broken(self) -> list[Parity]:
        """Parity of those of our backends that exceed their error budget."""
        return [parity for parity in self.parity if self.peers[parity.peer]["ours"] and not parity.within]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        bars = verdicts(self)
        return {
            "environment": self.environment,
            "finished": self.finished,
            "passed": not self.broken and all(verdict.met for verdict in bars),
            "defaults": self.defaults,
            "workloads": self.workloads,
            "peers": self.peers,
            "parity": [dataclasses.asdict(parity) | {"within": parity.within} for parity in self.parity],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "bars": [dataclasses.asdict(verdict) for verdict in bars],
            "not_measured": [dataclasses.asdict(skipped) for skipped in self.not_measured],
        }

    def write(self) -> None:
        """Write the JSON file, if there is a path."""
        if self.path is not None:
            write_text(self.path, json.dumps(self.as_json(), indent=1) + "\n")


def verdicts(report: Report) -> list[Verdict]:
    """Judge the report's bars wherever both rows were measured."""
    values = {(row.measure, row.workload, row.step, row.dtype, row.peer): row.value for row in report.rows}
    over_budget = {(parity.workload, parity.dtype, parity.peer) for parity in report.parity if not parity.within}
    found = []
    for bar in report.bars:
        if bar.device not in (None, report.environment["device"]):
            continue
        for measure, workload, step, dtype, peer in values:
            wanted = report.defaults.get(dtype) if bar.peer == "default" else bar.peer
            if (measure, step, peer) != (bar.measure, bar.step, wanted):
                continue
            if (bar.workloads and workload not in bar.workloads) or (bar.dtypes and dtype not in bar.dtypes):
                continue
            against: str | None = bar.against
            if against == "fastest":
                rivals = {
                    name: values[measure, workload, step, dtype, name]
                    for name, facts in report.peers.items()
                    if facts["same"] and not facts["ours"] and (workload, dtype, name) not in over_budget
                    if (measure, workload, step, dtype, name) in values
                }
                against = min(rivals, key=lambda name: rivals[name], default=None)
            if against is None or (measure, workload, step, dtype, against) not in values:
                continue
            if measure == "time" and all(("replay", workload, step, dtype, name) in values for name in (peer, against)):
                measure = "replay"  # launching takes no part of the time there
            value, base = (values[measure, workload, step, dtype, name] for name in (peer, against))
            met = base >= bar.at_least * value if bar.at_least else value <= (bar.at_most or 0.0) * base + bar.plus
            found.append(Verdict(str(bar), measure, workload, step, dtype, peer, against, value, base, met))
    return found
