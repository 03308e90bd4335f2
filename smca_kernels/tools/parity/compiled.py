"""`smca parity --compiled sm_90`: the kernels as this Triton compiles them for a card, executed and held to the budget.

No GPU is needed: the PTX is executed by smca_kernels.testing.machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from smca_kernels.testing.cases import CASES, DTYPES, Case
from smca_kernels.testing.machine.check import CompiledCase, check_compiled
from smca_kernels.testing.machine.processes import compiling_processes
from smca_kernels.tools.parity.rows import Row

ARCHITECTURES = (80, 86, 89, 90)  # that the machine executes
MAX_JOBS = 8  # processes, each with a torch of its own
OUTSIDE = (
    "Executed is the PTX that Triton compiled, with the checks of compute-sanitizer (memcheck, initcheck, racecheck, "
    "synccheck) and of asynchronous copies, wgmma and proxy fences.\n"
    "Not checked: ptxas, with its own faults, and the machine code that it makes; timing; the prior's kernels, which "
    "the tests of smca_kernels execute."
)
# Besides the cases of every backend: work split over programs that run in three orders, and dropout.
SPLIT = Case("split, in three orders", ((17, 37), (1, 1), (5, 3)), batch=2, queries=33, mask="valid_shapes")
DROPOUT = Case("dropout, random padding mask", ((9, 17), (3, 5)), heads=2, queries=33, mask="random")


def parse_architecture(text: str) -> int:
    """The architecture that an option names: "sm_90" → 90.

    Raises:
        argparse.ArgumentTypeError: for one that the machine doesn't execute.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)a?", text)
    if match is None or int(match[1]) not in ARCHITECTURES:
        known = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
        raise argparse.ArgumentTypeError(f"must be one of {known}, got {text!r}")
    return int(match[1])


def compiled_cases(arch: int, quick: bool, dtypes: Sequence[str]) -> list[CompiledCase]:
    """List the cases to run, in order."""
    cases = [CompiledCase(arch, case) for case in CASES if not case.large and (case.quick or not quick)]
    cases += [CompiledCase(arch, SPLIT, schedules=3), CompiledCase(arch, DROPOUT, dropout_p=0.3)]
    return [replace(each, case=replace(each.case, dtype=dtype)) for dtype in dtypes for each in cases]


def run_compiled(
    arch: int,
    quick: bool,
    seeds: range,
    dtypes: Sequence[str] = DTYPES,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Execute the compiled kernels of an architecture on the cases of `smca parity`, on all CPU cores.

    Args:
        arch: 90 for sm_90.
        quick: only the cases that tell most.
        seeds: of the inputs, a draw of each case for each.
        dtypes: of query, key and value.
        report: is called with each row as soon as it is known, in order.

    Raises:
        ValueError: Triton is not installed, so that there is nothing to execute.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--compiled needs triton, which compiles the kernels: pip install 'smca_kernels[triton]'")
    cases = compiled_cases(arch, quick, dtypes)
    rows = []
    with compiling_processes(min(os.cpu_count() or 1, MAX_JOBS, len(cases))) as pool:
        for row in pool.map(_run_case, cases, [seeds] * len(cases)):
            report(row)
            rows.append(row)
    return rows


def _run_case(compiled: CompiledCase, seeds: range) -> Row:
    row = Row(f"sm_{compiled.arch}", compiled.case.dtype, compiled.case.name, "passed")
    start = time.perf_counter()
    try:
        for seed in seeds:
            outcome = check_compiled(compiled, seed)
            if outcome.refused:
                row.status, row.reason = "skipped", outcome.refused
                return row
            row.add(seed, outcome.comparisons, outcome.problems)
    except Exception as error:  # a crash of one case must not hide the others
        row.status, row.reason = "error", f"not checked: seed {seed}: {type(error).__name__}: {error}"
        return row
    row.seconds = time.perf_counter() - start
    return row
