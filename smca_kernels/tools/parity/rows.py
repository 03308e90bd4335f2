"""Outcomes of cases: on screen, as JSON and as JUnit XML."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from smca_kernels.testing.budget import Comparison
from smca_kernels.testing.check import TENSORS

STATUSES = ("passed", "failed", "error", "skipped")


@dataclass
class Row:
    """The outcome of one case on one backend in one dtype, over all draws."""

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

    def add(self, seed: int, comparisons: list[Comparison], problems: list[str]) -> None:
        """Count a draw, which failed if there are problems."""
        self.comparisons += comparisons
        if problems:
            draw = f"seed {seed}: " + "; ".join(problems)
            self.status, self.reason = "failed", "; ".join(filter(None, (self.reason, draw)))

    def worst(self, name: str) -> Comparison | None:
        """The comparison of a tensor, over all scales, with the largest ratio."""
        parts = [c for c in self.comparisons if c.name.split(" ")[0] == name]
        return max(parts, key=lambda c: c.ratio, default=None)


def print_header() -> None:
    """Print the titles of the columns of `print_row`."""
    titles = "".join(f"{name[:9]:>10}" for name in TENSORS)
    print(f"{'backend':7} {'dtype':8} {'case':32}{titles}  seconds")


def print_row(row: Row) -> None:
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


def print_summary(rows: list[Row]) -> None:
    print("\nworst of all cases")
    for backend, dtype in dict.fromkeys((row.backend, row.dtype) for row in rows):
        ran = [row for row in rows if (row.backend, row.dtype) == (backend, dtype) and row.ran]
        seconds = sum(row.seconds for row in ran)
        print(f"{backend:7} {dtype:8} {f'{len(ran)} cases':32}{_ratios(ran)}  {seconds:7.2f}")
    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))


def json_report(rows: list[Row], seeds: range, environment: dict[str, str]) -> dict[str, Any]:
    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)  # JSON has no infinity

    def measured(comparison: Comparison) -> dict[str, float | str]:
        return {key: number(getattr(comparison, key)) for key in ("error", "budget", "ratio")}

    return {
        "seed": seeds.start,
        "draws": len(seeds),
        **environment,
        "rows": [
            {
                **{key: getattr(row, key) for key in ("backend", "dtype", "case", "status", "reason", "seconds")},
                "tensors": {name: measured(c) for name in TENSORS if (c := row.worst(name))},
            }
            for row in rows
        ],
    }


def junit_report(rows: list[Row], seeds: range, environment: dict[str, str]) -> str:
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
    for key, value in {"seed": str(seeds.start), "draws": str(len(seeds)), **environment}.items():
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
