"""Rows of the cost report: every kernel compiled, analyzed and scheduled on all CPU cores, and totals of a pass.

A row is a dictionary that JSON can hold; docs/cost.md explains its keys.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing, write_text
from smca_kernels.tools.cost.architectures import ARCHITECTURES
from smca_kernels.tools.cost.kernel import (
    MissingTool,
    StaticCost,
    analyze,
    compile_kernel,
    listing,
    ptxas_warnings,
    unit_cycles,
)
from smca_kernels.tools.cost.machine_code import CLASSES
from smca_kernels.tools.cost.schedule import Schedule, schedule

if TYPE_CHECKING:
    from smca_kernels.tools.cost.specializations import Specialization

DTYPES = ("fp16", "bf16", "fp32")

SCHEDULE_KEYS = (
    *("blocks_per_sm", "num_warps", "cycles_per_trip", "cycles_alone", "elements_per_trip", "elements_per_cycle"),
    *("elements_per_second", "issue_share", "busy", "scheduled_bound_by", "waits", "start_cycles", "scale_cycles"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One kernel to compile: the `index`-th of a module's `specializations(arch, dtype, head_dim)`."""

    module: str
    arch: int
    dtype: str
    head_dim: int
    index: int
    kernel: str
    pass_: str


def _cost_cells(cost: StaticCost, specialization: Specialization) -> Row:
    """Cells that the analysis adds to a row of the report."""
    limits = ARCHITECTURES[cost.arch]
    row: Row = {
        "registers": cost.registers,
        "spill_bytes": cost.spill_bytes,
        "local_bytes": cost.local_bytes,
        "shared_bytes": cost.shared_bytes,
        "resident_warps": cost.resident_warps,
        "num_warps": specialization.num_warps,
        "num_stages": specialization.num_stages,
        "counts_elements": bool(specialization.elements_per_iteration or specialization.elements_per_program),
        "elements_per_iteration": specialization.elements_per_iteration,
        "constexprs": {name: _plain(value) for name, value in specialization.constexprs.items()},
        "loops": [asdict(loop) | {"instructions_per_element": loop.total} for loop in cost.loops],
        "note": cost.note,
    }
    if cost.resident_warps == 0:
        row["error"] = (
            f"does not fit: {cost.shared_bytes} B of shared memory a block "
            f"(limit {limits.block_shared_bytes}), {cost.threads} threads of {cost.registers} registers"
        )
    if cost.loop is not None:
        cycles = unit_cycles(cost.loop, cost.arch)
        binding = max(cycles, key=lambda unit: cycles[unit])
        row |= cost.loop.per_element
        row["instructions_per_element"] = cost.loop.total
        row["bound_by"] = binding
        row["predicted_elements_per_second"] = limits.multiprocessors * limits.clock_hz / cycles[binding]
    return row


def _schedule_cells(cost: StaticCost, specialization: Specialization) -> Row:
    """Cells that the simulation adds to a row of the report; why there are none is in the row's "schedule_note"."""
    elements = specialization.elements_per_iteration or specialization.elements_per_program
    if not elements:
        return {}
    try:
        scheduled: Schedule = schedule(cost, elements)
    except (ValueError, RuntimeError) as error:
        return {"schedule_note": f"not scheduled: {error}"}
    limits = ARCHITECTURES[cost.arch]
    rate = scheduled.elements_per_cycle * limits.multiprocessors * limits.clock_hz
    return scheduled.row() | {"elements_per_second": rate}


def _warning_cells(compiled: Any, arch: int) -> Row:
    try:
        return {"ptxas_warnings": ptxas_warnings(compiled.asm["ptx"], arch)}
    except MissingTool as error:
        return {"ptxas_note": str(error)}


def total_row(rows: Sequence[Row]) -> Row:
    """Sum of all kernels of one pass, for one (arch, dtype, head_dim): they run one after the other.

    Instructions and time per element add up, resources are the largest of any kernel. What is done once a call, not
    for every element, is not in the sums.
    """
    job = Job("", int(rows[0]["arch"][3:]), rows[0]["dtype"], rows[0]["head_dim"], 0, "", rows[0]["pass"])
    total = _empty_row(job) | {"kernel": f"{job.pass_} total", "triton": rows[0]["triton"]}
    for name in ("registers", "spill_bytes", "local_bytes", "shared_bytes"):
        total[name] = max((row[name] for row in rows if row[name] is not None), default=None)
    rows = [row for row in rows if row.get("counts_elements", True)]
    missing = [row["kernel"] for row in rows if row["instructions_per_element"] is None]
    if missing:
        total["note"] = "incomplete: nothing counted for " + ", ".join(missing)
        return total
    for name in (*CLASSES, "instructions_per_element"):
        total[name] = sum(row[name] for row in rows)
    total["predicted_elements_per_second"] = 1 / sum(1 / row["predicted_elements_per_second"] for row in rows)
    if all(row["elements_per_second"] for row in rows):
        total["elements_per_second"] = 1 / sum(1 / row["elements_per_second"] for row in rows)
    total["bound_by"] = min(rows, key=lambda row: row["predicted_elements_per_second"])["bound_by"]
    total["note"] = " + ".join(f"{row['kernel']} {row['instructions_per_element']:.2f}" for row in rows)
    return total


def _empty_row(job: Job) -> Row:
    unknown = ["registers", "spill_bytes", "local_bytes", "shared_bytes", "resident_warps"]
    unknown += ["instructions_per_element", *CLASSES, "bound_by", "predicted_elements_per_second"]
    unknown += [*SCHEDULE_KEYS, "ptxas_warnings", "cubin", "triton", "error"]
    return {
        "kernel": job.kernel,
        "pass": job.pass_,
        "arch": f"sm_{job.arch}",
        "product": ARCHITECTURES[job.arch].product,
        "dtype": job.dtype,
        "head_dim": job.head_dim,
        "note": "",
        "schedule_note": "",
        "ptxas_note": "",
    } | dict.fromkeys(unknown)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _leave_interpreter() -> None:
    """Unset TRITON_INTERPRET in a worker before it imports Triton: interpreted kernels can't be compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def _list_jobs(module: str, arch: int, dtype: str, head_dim: int) -> list[Job]:
    specializations = importlib.import_module(module).specializations(arch, dtype, head_dim)
    return [Job(module, arch, dtype, head_dim, i, s.kernel, s.pass_) for i, s in enumerate(specializations)]


def _run_job(job: Job, sass_directory: Path | None, cubin_directory: Path | None) -> Row:
    """Compile, analyze and schedule one kernel; what goes wrong becomes the row's error."""
    import triton

    row = _empty_row(job) | {"triton": triton.__version__}
    try:
        # Triton prints the whole PTX when ptxas fails; its exception carries the message as well.
        with contextlib.redirect_stdout(io.StringIO()):
            specializations = importlib.import_module(job.module).specializations
            chosen = specializations(job.arch, job.dtype, job.head_dim)[job.index]
            compiled = compile_kernel(
                chosen.function, chosen.signature, chosen.constexprs, job.arch, chosen.num_warps,
                chosen.num_stages, chosen.attrs, chosen.max_registers, chosen.fuses,
            )  # fmt: skip
            # FLOP are counted at FP16's rate, TF32 runs at half of it.
            flops = chosen.tensor_flops_per_element * (2 if job.dtype == "fp32" else 1)
            cost = analyze(
                compiled, chosen.elements_per_iteration, flops, chosen.elements_per_program, chosen.rare_loops
            )
            name = f"{job.kernel}-sm_{job.arch}-{job.dtype}-{job.head_dim}".replace(" ", "_")
            if sass_directory is not None and cost.instructions is not None:
                write_text(sass_directory / f"{name}.sass", listing(compiled))
            if cubin_directory is not None:
                with replacing(cubin_directory / f"{name}.cubin") as temporary:
                    temporary.write_bytes(compiled.asm["cubin"])
                write_text(cubin_directory / f"{name}.ptx", compiled.asm["ptx"])
                row["cubin"] = str(cubin_directory / f"{name}.cubin")
        row |= _cost_cells(cost, chosen)
        return row | _schedule_cells(cost, chosen) | _warning_cells(compiled, job.arch)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}


def compile_report(
    combinations: Sequence[tuple[int, str, int]],
    *,
    module: str = "smca_kernels.tools.cost.specializations",
    sass_directory: Path | None = None,
    cubin_directory: Path | None = None,
) -> list[Row]:
    """Cost of every kernel for each (arch, dtype, head_dim), on all CPU cores; progress goes to stderr.

    Args:
        combinations: (compute capability, "fp16" | "bf16" | "fp32", head_dim) triples.
        module: where `specializations(arch, dtype, head_dim)` is found.
        sass_directory: write the annotated loops of every kernel there.
        cubin_directory: write the cubin and the PTX of every kernel there.

    Returns:
        One row per kernel, and one "<pass> total" row where a pass has several kernels. A kernel that does
        not compile, or whose block does not fit the GPU, has the reason in its row's "error".
    """
    rows: list[Row] = []
    jobs: list[Job] = []
    results: dict[Job, Row] = {}
    with _worker_pool(os.cpu_count() or 1) as pool:
        listed = [pool.submit(_list_jobs, module, *combination) for combination in combinations]
        for listing_job in listed:
            jobs += listing_job.result()
        futures: dict[Future[Row], Job] = {}
        with contextlib.suppress(BrokenProcessPool):
            for job in jobs:
                futures[pool.submit(_run_job, job, sass_directory, cubin_directory)] = job
        for future in concurrent.futures.as_completed(futures):
            job = futures[future]
            with contextlib.suppress(BrokenProcessPool):
                results[job] = future.result()
                _progress(len(results), len(jobs), job)
    # LLVM ends its process on an internal error, and the jobs that shared the pool with it.
    for job in jobs:
        if job not in results:
            with _worker_pool(1) as pool:
                try:
                    results[job] = pool.submit(_run_job, job, sass_directory, cubin_directory).result()
                except BrokenProcessPool:
                    results[job] = _empty_row(job) | {"error": "the compiler ended its process"}
            _progress(len(results), len(jobs), job)
    for _, group in itertools.groupby(jobs, key=lambda job: (job.arch, job.dtype, job.head_dim)):
        group_rows = [results[job] for job in group]
        rows += group_rows
        for pass_ in dict.fromkeys(row["pass"] for row in group_rows):
            of_pass = [row for row in group_rows if row["pass"] == pass_]
            if len(of_pass) > 1:
                rows.append(total_row(of_pass))
    return rows


def _worker_pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, so that no worker inherits a Triton that was imported for the interpreter.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _leave_interpreter)


def _progress(done: int, total: int, job: Job) -> None:
    text = f"[{done}/{total}] {job.kernel} sm_{job.arch} {job.dtype} {job.head_dim}"
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done % 10 == 0 or done == total:
        print(text, file=sys.stderr, flush=True)
