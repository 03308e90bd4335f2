"""`smca bench --base FILE`: an earlier run against this one, and which differences are more than noise.

A time is a regression if its median grew by more than noise explains, which is the sum of

- both runs' relative spreads, (q80 - q20) / median of 20 and 80 % quantiles,
- and the median growth of what isn't ours, naive PyTorch and other peers, over all workloads: nobody changed these, so
  it is what the machine itself moved by.

Memory has no quantiles; there, 1 % is a difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMED = ("time", "replay", "overhead")
COMPARED = (*TIMED, "saved", "peak")
MEMORY_TOLERANCE = 0.01
SAME = ("device", "name", "threads", "float32_matmul_precision")  # of the environment, or nothing can be said

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One row in two runs; `allowed` is the growth that would still be noise."""

    measure: str
    workload: str
    step: str
    dtype: str
    peer: str
    unit: str
    before: float
    after: float | None  # None: not measured any more, though the rest of its workload was
    allowed: float
    regression: bool

    @property
    def growth(self) -> float | None:
        return None if self.after is None else self.after / self.before - 1


def check_comparable(base: dict[str, Any], environment: dict[str, Any]) -> None:
    """ValueError, telling what differs, if two runs were not made on the same kind of device."""
    for name in SAME:
        if base.get(name) != environment.get(name):
            raise ValueError(
                f"--base must come from a run like this one: its {name} is {base.get(name)}, here {environment[name]}"
            )


def _rows(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    keys = ("measure", "workload", "step", "dtype", "peer")
    return {tuple(row[key] for key in keys): row for row in report["rows"]}


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


def compare(base: dict[str, Any], found: dict[str, Any]) -> list[Change]:
    """Rows of our backends in both runs, the earlier one first; those gone from a workload that was measured as well.

    Args:
        base: the earlier run's JSON.
        found: this run's.
    """
    before, after = _rows(base), _rows(found)
    measured = {key[:4] for key in after}
    drifts = {measure: _drift(measure, base, before, after) for measure in TIMED}
    changes = []
    for key, old in before.items():
        measure, peer = key[0], key[-1]
        if measure not in COMPARED or not base["peers"].get(peer, {}).get("ours") or key[:4] not in measured:
            continue
        new = after.get(key)
        if new is None:
            if peer in found["peers"]:
                changes.append(Change(*key, old["unit"], old["value"], None, 0.0, regression=True))
            continue
        growth = new["value"] / old["value"] - 1
        noise = _spread(old) + _spread(new) + max(drifts.get(measure, 0.0), 0.0)
        allowed = noise if measure in TIMED else MEMORY_TOLERANCE
        changes.append(Change(*key, old["unit"], old["value"], new["value"], allowed, regression=growth > allowed))
    return changes


def markdown(changes: Sequence[Change], base: Path) -> str:
    """The changes as a table, regressions marked."""
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
