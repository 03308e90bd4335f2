"""`smca bench`: the operator against naive PyTorch. Parity first; then time, overhead of a call, and memory.

- time: forward (without gradients) and forward + backward, backends in turns, inputs rotated past the caches.
- overhead: one call on tiny inputs that require gradients, as the host sees it, beside torch's own SDPA.
- saved: what autograd keeps between forward and backward, as distinct storages, the inputs' own among them.
- peak: most that torch's allocator held during forward + backward beyond what it held before.

Rows that a bar in workloads.py names are held against it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import write_text

from .workloads import BARS, BOTH, FORWARD, MEASURES, WORKLOADS, Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smca_kernels.parity import Inputs

SEED = 0
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "float16", "bfloat16")}
ROTATED_BYTES = 256e6  # of inputs taken in turns, so that none is still in a cache
MOST_ROTATED = 16
OVERHEAD_CALLS = 100  # in one measurement, so that the clock's own cost does not count


@dataclass(frozen=True)
class Repeats:
    """How often each call is measured."""

    time: int
    overhead: int


REPEATS = {"cpu": Repeats(time=9, overhead=31), "cuda": Repeats(time=100, overhead=31)}
QUICK_REPEATS = {"cpu": Repeats(time=3, overhead=5), "cuda": Repeats(time=20, overhead=5)}


@dataclass(frozen=True)
class Row:
    """One number: `value` (a median, where there are quantiles) beside `base`, both in `unit`."""

    measure: str
    workload: str
    step: str
    dtype: str
    backend: str
    default: bool  # what backend="auto" chooses here
    unit: str
    value: float
    q20: float | None
    q80: float | None
    repeats: int
    base: float
    base_name: str
    ratio: float
    bar: str | None
    met: bool | None


@dataclass(frozen=True)
class Subject:
    """What a table of rows is about."""

    workload: Workload
    dtype: str
    device: torch.device
    backends: dict[str, str]  # name → argument `backend`; "auto" for the one that "auto" chooses

    def inputs(self, seed: int = SEED) -> Inputs:
        """Random inputs that require gradients."""
        import torch

        from smca_kernels.parity import make_inputs

        return make_inputs(self.workload.case(self.dtype), torch.Generator().manual_seed(seed), self.device)

    def row(self, measure: str, step: str, backend: str, values: list[float], base: float) -> Row:
        """A row from values in the measure's unit, held against the bar that names it."""
        kind = MEASURES[measure]
        value = statistics.median(values)
        cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else None
        default = self.backends[backend] == "auto"
        names = (backend, "default") if default else (backend,)
        met, limit = None, None
        for bar in BARS:
            wanted = (bar.measure, bar.step) == (measure, step) and bar.backend in names
            if wanted and bar.device in (None, self.device.type):
                limit = str(bar)
                best = base / bar.limit if kind.more_is_better else base * bar.limit
                met = value <= best + bar.plus
        return Row(
            measure=measure,
            workload=self.workload.name,
            step=step,
            dtype=self.dtype,
            backend=backend,
            default=default,
            unit=kind.unit,
            value=value,
            q20=cuts[0] if cuts else None,
            q80=cuts[-1] if cuts else None,
            repeats=len(values),
            base=base,
            base_name=kind.base,
            ratio=base / value if kind.more_is_better else value / base,
            bar=limit,
            met=met,
        )


# -------------------------------------------------------------------------------------------- calls and sizes


def forward_call(inputs: Inputs, backend: str) -> Callable[[], Tensor]:
    """`smca_attention` on inputs, ready to be called."""
    from smca_kernels import smca_attention

    return partial(smca_attention, **inputs.arguments(), backend=backend)


def both_call(inputs: Inputs, backend: str) -> Callable[[], object]:
    """The same with its backward to all six tensors."""
    import torch

    forward, leaves = forward_call(inputs, backend), list(inputs.differentiable().values())
    return lambda: torch.autograd.grad(forward(), leaves, inputs.grad_output)


def input_bytes(inputs: Inputs) -> int:
    """Bytes of the operator's six tensors."""
    return sum(t.numel() * t.element_size() for t in inputs.differentiable().values())


def per_scale_bytes(inputs: Inputs) -> int:
    """Bytes of an output for every scale, in query's dtype, with a float32 log-sum-exp for every row."""
    rows = inputs.query.shape[:3].numel()
    return len(inputs.spatial_shapes) * (inputs.query.numel() * inputs.query.element_size() + rows * 4)


def host_times(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds that one host thread spends on each call, not waiting for the device."""
    import torch

    values: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking the others would be most of the time, and is not the call's overhead
    try:
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(OVERHEAD_CALLS):
                    call()
                seconds = time.perf_counter() - start
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if repeat > 0:  # the first warms up
                    values[name].append(1e6 * seconds / OVERHEAD_CALLS)
    finally:
        torch.set_num_threads(threads)
    return values


# --------------------------------------------------------------------------------------------------- measures


def measure_time(subject: Subject, repeats: int) -> Iterator[Row]:
    """Rows of time, naive among them, against which all are compared."""
    import torch

    from smca_kernels.profiling import interleaved_times

    first = subject.inputs()
    count = min(MOST_ROTATED, 1 + int(ROTATED_BYTES // input_bytes(first)))
    sets = [first, *(subject.inputs(SEED + i) for i in range(1, count))]

    def in_turn(calls: list[Callable[[], object]], repeat: int) -> None:
        calls[repeat % count]()

    for step, make_call in ((FORWARD, forward_call), (BOTH, both_call)):
        calls = {
            name: partial(in_turn, [make_call(inputs, backend) for inputs in sets])
            for name, backend in subject.backends.items()
        }
        with torch.set_grad_enabled(step == BOTH):
            seconds = interleaved_times(calls, repeats, subject.device)
        naive = 1e3 * statistics.median(seconds["reference"])
        for name in calls:
            yield subject.row("time", step, name, [1e3 * s for s in seconds[name]], naive)


def measure_overhead(subject: Subject, repeats: int) -> Iterator[Row]:
    """Rows of what one call costs on the host, recording for its backward, and what it costs with that."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    inputs = subject.inputs()
    plain = (inputs.query, inputs.key, inputs.value)

    def plain_both() -> None:
        torch.autograd.grad(scaled_dot_product_attention(*plain), plain, inputs.grad_output)

    torch_calls: dict[str, Callable[[], object]] = {
        FORWARD: partial(scaled_dot_product_attention, *plain),
        BOTH: plain_both,
    }
    for step, make_call in ((FORWARD, forward_call), (BOTH, both_call)):
        calls = {"torch": torch_calls[step]}
        fused = [name for name in subject.backends if name != "reference"]
        calls |= {name: make_call(inputs, subject.backends[name]) for name in fused}
        values = host_times(calls, repeats, subject.device)
        for name in fused:
            yield subject.row("overhead", step, name, values[name], statistics.median(values["torch"]))


def measure_memory(subject: Subject) -> Iterator[Row]:
    """Rows of bytes saved for backward and of peak memory, in MB."""
    from smca_kernels.profiling import peak_bytes, saved_bytes

    inputs = subject.inputs()
    given = input_bytes(inputs) / 1e6
    for name, backend in subject.backends.items():
        saved = saved_bytes(forward_call(inputs, backend)) / 1e6
        yield subject.row("saved", FORWARD, name, [saved], given)
        if name == "triton":
            yield subject.row("saved per scale", FORWARD, name, [saved], given + per_scale_bytes(inputs) / 1e6)
    peaks = {
        name: peak_bytes(both_call(inputs, backend), subject.device) / 1e6 for name, backend in subject.backends.items()
    }
    for name, peak in peaks.items():
        yield subject.row("peak", BOTH, name, [peak], peaks["reference"])


def check_parity(subject: Subject) -> list[str]:
    """What is wrong with the fused backends: nothing, or a line for each tensor over its error budget."""
    from smca_kernels.parity import check

    return [
        f"{name}, {subject.dtype}: {comparison}"
        for name, backend in subject.backends.items()
        if name != "reference"
        for comparison in check(subject.inputs(), backend)
        if not comparison.ratio <= 1.0
    ]


def available_backends(inputs: Inputs) -> tuple[dict[str, str], dict[str, str]]:
    """What can be measured here, as `Subject.backends`, naive first; and the reason against each other."""
    from smca_kernels import explain_backend
    from smca_kernels.profiling import available_backends as fused_backends

    default = explain_backend(**inputs.arguments()).backend
    fused, reasons = fused_backends(inputs)
    backends = {name: "auto" if name == default else name for name in fused}
    return {"reference": "reference", **backends}, reasons


def measure_all(large: Workload, tiny: Workload, device: torch.device, repeats: Repeats) -> tuple[dict[str, Any], bool]:
    """A report of all rows, and whether parity holds and no bar is missed; no parity, no measurement.

    Args:
        large: what time and memory are measured on.
        tiny: what the overhead of a call is measured on.
        device: where.
        repeats: how often.
    """
    rows: list[Row] = []
    wrong: list[str] = []
    reasons: dict[str, str] = {}
    for dtype in DTYPES[device.type]:
        subject = Subject(large, dtype, device, {})
        backends, reasons = available_backends(subject.inputs())
        subject = dataclasses.replace(subject, backends=backends)
        print(f"{dtype}: parity of {', '.join(backends)} …", flush=True)
        over = check_parity(subject)
        wrong += over
        if over:
            print("\n".join(f"PARITY FAILED, not measured: {line}" for line in over), flush=True)
            continue
        print(f"{dtype}: time, {repeats.time} repeats …", flush=True)
        rows += measure_time(subject, repeats.time)
        print(f"{dtype}: overhead of a call, {repeats.overhead} × {OVERHEAD_CALLS} repeats …", flush=True)
        rows += measure_overhead(dataclasses.replace(subject, workload=tiny), repeats.overhead)
        print(f"{dtype}: memory …", flush=True)
        rows += measure_memory(subject)
    report = {
        "parity": wrong or "passed",
        "rows": [dataclasses.asdict(row) for row in rows],
        "not_measured": reasons,
    }
    print("\n" + "\n".join(format_rows(rows)) + "\n")
    for name, reason in reasons.items():
        print(f"{name} was not measured: {reason}.")
    return report, not wrong and all(row.met is not False for row in rows)


# ----------------------------------------------------------------------------------------------------- report


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: device, versions, threads and commit."""
    import torch

    from smca_kernels.environment import describe, versions

    return {
        "device": device.type,
        **describe(device),
        **versions(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": _git("status", "--porcelain") != "",
        "seed": SEED,
    }


def _git(*arguments: str) -> str:
    """What git says about the source tree; "" where there is no git or no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def format_rows(rows: list[Row]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| measure | workload | step | dtype | backend | value | 20–80 % | against | bar | |"
    yield "|---|---|---|---|---|---:|---:|---|---|---|"
    verdicts = {None: "", True: "met", False: "**missed**"}
    for row in rows:
        backend = "naive" if row.backend == "reference" else row.backend + " (default)" * row.default
        spread = "" if row.q20 is None else f"{row.q20:.4g}–{row.q80:.4g}"
        sign = "× faster than" if MEASURES[row.measure].more_is_better else "×"
        against = f"{row.ratio:.2f} {sign} {row.base_name} ({row.base:.4g})"
        cells = [row.measure, row.workload, row.step, row.dtype, backend, f"{row.value:.4g} {row.unit}"]
        cells += [spread, against, row.bar or "", verdicts[row.met]]
        yield f"| {' | '.join(cells)} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca bench`."""
    parser.description = (
        "Time and memory of every backend that can run here against naive PyTorch, after a parity check. "
        "Exit status 1 if parity fails or a bar is missed."
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a rough look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows as JSON")


def run(args: argparse.Namespace) -> int:
    """`smca bench`: exit status 0, or 1 if parity fails or a bar is missed."""
    import torch

    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json must name a file in an existing folder, got {args.json}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device)
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()) + "\n", flush=True)
    repeats = (QUICK_REPEATS if args.quick else REPEATS)[device.type]
    report, passed = measure_all(WORKLOADS["detector"], WORKLOADS["tiny"], device, repeats)
    if args.json is not None:
        write_text(args.json, json.dumps({"environment": facts, **report}, indent=1) + "\n")
    return 0 if passed else 1
