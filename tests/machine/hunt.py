"""The wide hunt on the compiled kernels, `make machine`: hundreds of cases, to be interrupted at will.

Run as `python tests/machine/hunt.py [--arch sm_80 sm_90] [--dtype …] [--only TEXT] [--jobs N]`. What was found right is
kept in --state and not run again with the same seed, sources and Triton; --restart forgets it. docs/machine.md says
what is hunted and how long it takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine_kernels
import machine_prior
import torch

import smca_kernels
from smca_kernels.testing.cases import CASES, DTYPES, Case, case_generator, make_inputs
from smca_kernels.testing.check import run_backend
from smca_kernels.testing.machine.check import CompiledCase, check_compiled
from smca_kernels.testing.machine.processes import compiling_processes
from smca_kernels.tools.parity.compiled import parse_architecture

HOSTILE_VALUES = (math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -3e9)
HOSTILE_PRECISIONS = (math.nan, math.inf, 1e30, 3e9, 1e-40)


@dataclass(frozen=True)
class Job:
    """One thing to try: `run(*arguments)` returns a note and the problems, none if it is right."""

    name: str
    run: Callable[..., tuple[str, list[str]]]
    arguments: tuple[Any, ...]


def run_case(compiled: CompiledCase, seed: int) -> tuple[str, list[str]]:
    outcome = check_compiled(compiled, seed)
    if outcome.refused:
        return f"refused: {outcome.refused}", []
    worst = max(outcome.comparisons, key=lambda c: c.ratio)
    launches = " ".join(f"{name.removesuffix('_kernel')}{list(grid[:2])}" for name, grid in outcome.launches)
    return f"{worst.ratio:.2f} of the budget ({worst.name})  {launches}", outcome.problems


def run_known(name: str, arch: int) -> tuple[str, list[str]]:
    faults, error, tolerance = machine_kernels.run_known(name, arch)
    problems = [str(fault) for fault in faults.found.values()] + [f"error {error:.2e}, tolerance {tolerance:.0e}"] * (
        not error <= tolerance
    )
    return f"error {error:.1e}", problems


def run_prior(arch: int, dtype: str, geometry: machine_prior.Geometry, seed: int) -> tuple[str, list[str]]:
    ratio, report = machine_prior.check_prior(arch, dtype, geometry, seed)
    problems = [report] * bool(report) + [f"{ratio:.3g} × the tolerance"] * (not ratio <= 1.0)
    return f"{ratio:.2f} of the tolerance", problems


def run_hostile(case: Case, arch: int, name: str, seed: int) -> tuple[str, list[str]]:
    """Not numbers, infinite or huge ones in one argument: do the kernels stay inside their tensors?"""
    from smca_kernels.testing.machine.launcher import smca_on_machine

    inputs = make_inputs(case, case_generator(case, seed))
    values = getattr(inputs, name).data.view(-1)
    for n, value in enumerate(HOSTILE_PRECISIONS if name == "precision" else HOSTILE_VALUES):
        values[(n * 97 + 5) % values.numel()] = value
    with smca_on_machine(arch) as session:
        run_backend(inputs, "triton")
    return "", [str(fault) for fault in session.faults.found.values()]


def further_cases(arch: int) -> list[CompiledCase]:
    """What the sweep of every backend does not have together: each head_dim with masks, plans, splits, dropout."""
    cases = []
    for head_dim in (16, 24, 32, 64, 128):
        base = Case(
            f"D{head_dim}", ((11, 19), (5, 9)), batch=2, queries=33, head_dim=head_dim, mask="valid_shapes"
        )  # fmt: skip
        narrow = replace(base, name=f"D{head_dim} narrow", prior="narrow", mask="random")
        planned = replace(
            base, name=f"D{head_dim} planned", planned=True, queries=70, prior_heads=1, heads=2, batch=1, mask="none"
        )  # fmt: skip
        split = replace(base, name=f"D{head_dim} split", spatial_shapes=((40, 50), (20, 25)), batch=1)
        cases += [CompiledCase(arch, case) for case in (base, narrow, planned)]
        cases += [CompiledCase(arch, base, dropout_p=0.3, schedules=2), CompiledCase(arch, split, schedules=3)]
    for queries in (1, 33, 70, 300):
        case = Case(f"N{queries}", ((13, 21), (1, 1), (7, 3)), queries=queries, mask="random")
        planned = Case(
            f"N{queries} planned narrow", ((13, 37), (1, 1), (7, 3)), queries=queries, planned=True, prior="narrow"
        )  # fmt: skip
        cases += [CompiledCase(arch, case), CompiledCase(arch, planned, schedules=2)]
    long = ((40, 50),)
    far = Case(
        "far, projection", ((20, 30),), batch=2, heads=2, queries=33, prior="far", layout="projection", mask="padding"
    )  # fmt: skip
    odd = Case(
        "head_dim 20, planned", ((11, 19),), heads=2, queries=33, head_dim=20, layout="sequence_first", planned=True
    )  # fmt: skip
    empty = Case("empty scale, split", ((30, 40), (16, 20)), batch=2, queries=33, mask="empty_scale")
    narrow_split = Case("narrow, split, planned", long, queries=70, prior="narrow", planned=True)
    wide_split = Case("wide, split", ((40, 50), (1, 1)), queries=33, prior="wide")
    two = Case("two scales", ((13, 21), (5, 9)), queries=70)
    narrow = Case("narrow", ((13, 21),), queries=33, prior="narrow")
    return [
        *cases,
        CompiledCase(arch, narrow_split, schedules=3),
        CompiledCase(arch, wide_split, dropout_p=0.5, schedules=3),
        CompiledCase(arch, empty, schedules=3),
        CompiledCase(arch, far),
        CompiledCase(arch, odd),
        CompiledCase(arch, two, perturbed=True),
        CompiledCase(arch, narrow, perturbed=True),
        CompiledCase(arch, two, truncating=True),
        CompiledCase(arch, Case("terms that nearly cancel", ((3, 167),), queries=33), truncating=True),
        CompiledCase(arch, Case("far", ((9, 17),), queries=33, prior="far"), truncating=True),
        CompiledCase(arch, Case("all dropped", ((5, 9),)), dropout_p=1.0),
        CompiledCase(arch, two, multiprocessors=0),
    ]


def all_jobs(archs: Sequence[int], dtypes: Sequence[str], seed: int) -> list[Job]:
    """All that is hunted, what takes least time first."""
    jobs = [
        Job(f"sm_{known.arch} known: {known.name}", run_known, (known.name, known.arch))
        for known in machine_kernels.KNOWN
        if known.arch in archs
    ]
    for arch in archs:
        for dtype in dtypes:
            head = f"sm_{arch} {dtype}"
            for geometry in machine_prior.GEOMETRIES:
                jobs.append(Job(f"{head} prior: {geometry}", run_prior, (arch, dtype, geometry, seed)))  # noqa: PERF401
            sweep = [CompiledCase(arch, case) for case in CASES if not case.large] + further_cases(arch)
            for each in sweep:
                compiled = replace(each, case=replace(each.case, dtype=dtype))
                jobs.append(Job(f"{head} {compiled.name}", run_case, (compiled, seed)))
            if dtype == "float32":  # products by TF32
                compiled = CompiledCase(arch, Case("D64 split", ((20, 25),), queries=33, head_dim=64), precision="high")
                jobs.append(Job(f"{head} {compiled.name}", run_case, (compiled, seed)))
            for planned in (True, False):
                case = Case("hostile", ((11, 35), (9, 11)), queries=70, dtype=dtype, planned=planned)
                for name in ("center", "precision", "query", "key", "value"):
                    label = f"{head} hostile {name}{', planned' * planned}"
                    jobs.append(Job(label, run_hostile, (case, arch, name, seed)))
    return sorted(jobs, key=lambda job: "float32" in job.name)


def fingerprint() -> str:
    """A hash of what a verdict holds for: sources of the operator and the machine, Triton, torch."""
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    library = Path(smca_kernels.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if path.relative_to(library).parts[0] not in ("nn", "profiling", "tools"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_jobs(jobs: Sequence[Job], processes: int, state: Path, mark: str) -> int:
    """Run jobs, print each, keep the good ones in the state file; the number of those that are not good."""
    bad, start = 0, time.perf_counter()
    with compiling_processes(processes) as pool, state.open("a") as kept:
        running: dict[Future[tuple[str, list[str]]], Job] = {pool.submit(j.run, *j.arguments): j for j in jobs}
        for n, future in enumerate(as_completed(running), 1):
            job = running[future]
            try:
                note, problems = future.result()
            except BrokenProcessPool:
                raise SystemExit("a process was killed, perhaps for want of memory; run again to go on") from None
            except Exception as error:  # a crash of one case must not hide the others
                note, problems = "", [f"{type(error).__name__}: {error}"]
            left = (time.perf_counter() - start) / n * (len(jobs) - n)
            print(f"[{n}/{len(jobs)}, {left / 60:.0f} min left] {job.name}: {note}{'  WRONG' * bool(problems)}")
            for problem in problems:
                print("    " + problem.replace("\n", "\n    "))
            sys.stdout.flush()
            bad += bool(problems)
            if not problems:
                kept.write(json.dumps({"mark": mark, "job": job.name}) + "\n")
                kept.flush()
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="hunt.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=parse_architecture, default=[80, 90], help="default: sm_80 sm_90")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs; default: 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--state", type=Path, default=Path("build/machine_hunt.jsonl"), help="what was found right")
    parser.add_argument("--restart", action="store_true", help="forget what was found right")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # processes import this file, and Triton with it, before all else
    args.state.parent.mkdir(parents=True, exist_ok=True)
    if args.restart:
        args.state.unlink(missing_ok=True)
    mark = f"{fingerprint()} seed {args.seed}"
    lines = args.state.read_text().splitlines() if args.state.exists() else []
    done = {row["job"] for row in map(json.loads, lines) if row["mark"] == mark}
    jobs = [job for job in all_jobs(args.arch, args.dtype, args.seed) if args.only in job.name]
    assert len({job.name for job in jobs}) == len(jobs), "names of jobs must differ"
    left = [job for job in jobs if job.name not in done]
    print(f"{len(jobs)} cases, {len(jobs) - len(left)} found right before, {args.jobs} processes; seed {args.seed}")
    bad = run_jobs(left, args.jobs, args.state, mark)
    print(f"{len(left) - bad} right, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
