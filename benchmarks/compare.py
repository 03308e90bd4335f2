"""Comparison of a run with an earlier one (`smca bench --base FILE`), and which differences are more than noise.

A time is a regression if its median grew by more than noise explains, which is the sum of

- both runs' relative spreads, (q80 - q20) / median of 20 and 80 % quantiles,
- and the median growth, over all workloads, of naive PyTorch and the other peers that aren't ours: nobody changed
  these, so their growth is the machine's.

Memory has no quantiles; its limit is 1 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMED = ("time", "slowdown", "replay", "overhead")
COMPARED = (*TIMED, "saved", "peak")
MEMORY_TOLERANCE = 0.01
MUST_MATCH = ("device", "name", "threads", "float32_matmul_precision")  # in the environments of two runs

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One row in two runs; `allowed` is the largest growth that noise explains."""

    measure: str
    workload: str
    step: str
    dtype: str
    peer: str
    unit: str
    before: float
    after: float | None  # None: no longer measured, though the rest of its workload was
    allowed: float
    regression: bool

    @property
    def growth(self) -> float | None:
        return None if self.after is None else self.after / self.before - 1


def check_comparable(base: dict[str, Any], environment: dict[str, Any]) -> None:
    """Check that two runs come from the same kind of device.

    Raises:
        ValueError: naming what differs.
    """
    for name in MUST_MATCH:
        if base.get(name) != environment.get(name):
            raise ValueError(
                f"--base must come from a run like this one: its {name} is {base.get(name)}, here {environment[name]}"
            )


def _rows(run: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    keys = ("measure", "workload", "step", "dtype", "peer")
    return {tuple(row[key] for key in keys): row for row in run["rows"]}


def _spread(row: dict[str, Any]) -> float:
    return 0.0 if row["q20"] is None else (row["q80"] - row["q20"]) / row["value"]


def _drift(measure: str, base: dict[str, Any], before: dict[Key, Any], after: dict[Key, Any]) -> float:
    """Median growth of one measure over everything that isn't ours; 0 where nothing else was measured."""
    ours = {name for name, peer in base["peers"].items() if peer["ours"]}
    growths = [
        after[key]["value"] / old["value"] - 1
        for key, old in before.items()
        if key[0] == measure and key[-1] not in ours | {"limit"} and key in after
    ]
    return statistics.median(growths) if growths else 0.0


def compare(base: dict[str, Any], run: dict[str, Any]) -> list[Change]:
    """Compare the rows of our backends in two runs.

    Args:
        base: the earlier run's JSON.
        run: the later run's.

    Returns:
        a change for each row that both have, and for each that is missing from a workload measured in both.
    """
    before, after = _rows(base), _rows(run)
    measured = {key[:4] for key in after}
    drifts = {measure: _drift(measure, base, before, after) for measure in TIMED}
    changes = []
    for key, old in before.items():
        measure, peer = key[0], key[-1]
        if measure not in COMPARED or not base["peers"].get(peer, {}).get("ours") or key[:4] not in measured:
            continue
        new = after.get(key)
        if new is None:
            if peer in run["peers"]:
                changes.append(Change(*key, old["unit"], old["value"], None, 0.0, regression=True))
            continue
        growth = new["value"] / old["value"] - 1
        noise = _spread(old) + _spread(new) + max(drifts.get(measure, 0.0), 0.0)
        allowed = noise if measure in TIMED else MEMORY_TOLERANCE
        changes.append(Change(*key, old["unit"], old["value"], new["value"], allowed, regression=growth > allowed))
    return changes


def markdown(changes: Sequence[Change], base: Path) -> str:
    """Format the changes as a Markdown table, regressions marked."""
    lines = [f"## Against {base.name}", ""]
    lines += ["| measure | workload | step | dtype | backend | before | now | growth | noise | |"]
    lines += ["|---|---|---|---|---|---:|---:|---:|---:|---|"]
    for change in changes:
        now = "gone" if change.after is None else f"{change.after:.4g} {change.unit}"
        growth = "" if change.growth is None else f"{100 * change.growth:+.1f} %"
        cells = [change.measure, change.workload, change.step, change.dtype, change.peer]
        cells += [f"{change.before:.4g} {change.unit}", now, growth, f"{100 * change.allowed:.1f} %"]
        lines.append(f"| {' | '.join(cells)} | {'**regression**' * change.regression} |")
    count = sum(change.regression for change in changes)
    lines += ["", f"{count} of {len(changes)} rows are worse than the noise explains."]
    return "\n".join(lines) + "\n"
