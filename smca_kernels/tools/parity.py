"""`smca parity`: is every backend that can run here as right as PyTorch itself?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from smca_kernels import backends
from smca_kernels.files import write_text
from smca_kernels.testing.budget import Comparison
from smca_kernels.testing.cases import CASES, DTYPES, Case, case_generator, make_inputs
from smca_kernels.testing.check import TENSORS, check
from smca_kernels.tools.arguments import check_output_file, choose_device

BACKENDS = ("triton", "sdpa")
STATUSES = ("passed", "failed", "error", "skipped")


@dataclass
class Row:
    """The outcome of one case on one backend in one dtype."""

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
    check_output_file("--json", args.json)
    check_output_file("--junit", args.junit)
    device = choose_device(args.device)
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
        reason = backends.unsupported(backend, inputs)
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
