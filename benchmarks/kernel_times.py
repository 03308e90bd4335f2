"""What each kernel takes on this GPU, beside flash attention without a prior from the same compiler.

    python -m smca_benchmarks.kernel_times --json kernels.json [--workload full-b2 …] [--dtype bfloat16 …]

The GPU's own record of every launch (CUPTI, through torch.profiler) gives the times: launching and gaps do not count,
inputs may still be in the L2 cache. All keys are computed, as with mass_tolerance=0. Plain flash attention
(smca_kernels/tools/cost/plain.py) runs on as many keys in one scale, both rounded up to whole tiles. What
`smca predict --schedule` says of the same kernels is a prediction of these numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smca_kernels.files import write_text
from smca_kernels.testing.cases import CaseInputs
from smca_kernels.testing.check import run_backend
from smca_kernels.tools.arguments import check_output_file

from .bench_attention import environment
from .workloads import DTYPES, WORKLOADS, Workload

REPEATS = 20
DEFAULT = tuple(f"{name}-b{batch}" for name in ("basic", "dc5", "full", "pyramid") for batch in (1, 2, 16))


@dataclass(frozen=True)
class KernelTime:
    """Median time of one kernel of one workload, all its launches of a step together."""

    workload: str
    dtype: str
    kernel: str  # "plain …" for flash attention without a prior
    microseconds: float
    q20: float
    q80: float
    elements_per_second: float  # of the elements that the workload needs

    def __str__(self) -> str:
        rate = self.elements_per_second / 1e12
        return f"{self.workload:<18}{self.dtype:<10}{self.kernel:<34}{self.microseconds:>9.1f} µs{rate:>7.2f} T/s"


def times_of_kernels(step: Callable[[], object], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Microseconds that each kernel takes in one step, by its name, once for each repeat.

    A kernel that is launched several times in a step counts with the sum.
    """
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type.name == "CUDA":
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return {name: _sums(times, repeats) for name, times in found.items() if len(times) % repeats == 0}


def _sums(times: Sequence[float], repeats: int) -> list[float]:
    launches = len(times) // repeats
    return [sum(times[i * launches : (i + 1) * launches]) for i in range(repeats)]


def smca_step(inputs: CaseInputs) -> Callable[[], object]:
    """Forward and backward of the kernels on some inputs, all keys computed."""
    inputs = dataclasses.replace(inputs, mass_tolerance=0.0)
    return lambda: run_backend(inputs, "triton")


def plain_step(workload: Workload, dtype: str, device: torch.device) -> Callable[[], object]:
    """The three kernels of flash attention without a prior, on whole tiles."""
    from smca_kernels.backends.triton.configurations import has_warp_groups
    from smca_kernels.tools.cost import plain

    arch = 10 * torch.cuda.get_device_capability(device)[0]
    shapes = {
        kernel: by_head_dim[min(limit for limit in by_head_dim if limit >= workload.head_dim)]
        for kernel in plain.KERNELS
        for by_head_dim in [plain.SHAPES[kernel, has_warp_groups(arch)]]
    }
    of_queries, of_keys = (max(each) for each in zip(*((s.block_n, s.keys) for s in shapes.values()), strict=True))
    queries, keys = -(-workload.queries // of_queries) * of_queries, -(-workload.keys // of_keys) * of_keys
    pairs, head_dim = workload.batch * workload.heads, workload.head_dim
    rows = max(queries, keys)
    # All tensors have the same stride between heads; queries beyond theirs are not touched.
    q, k, v, grad, *outputs = (
        torch.randn(pairs, rows, head_dim, device=device).to(getattr(torch, dtype)) for _ in range(8)
    )
    lse, delta = torch.randn(2, rows, device=device)
    lse = lse + 20.0
    out, grad_query, grad_key, grad_value = outputs
    stride, scale = rows * head_dim, 0.1

    def step() -> None:
        for kernel, function in plain.KERNELS.items():
            shape = shapes[kernel]
            sizes = {
                "BLOCK_N": shape.block_n, "KEYS": shape.keys, "HEAD_DIM": head_dim, "STAGES": shape.num_stages,
                "num_warps": shape.num_warps, "num_stages": shape.num_stages,
            }  # fmt: skip
            if kernel == "forward":
                function[(queries // shape.block_n, pairs)](q, k, v, out, lse, stride, keys, scale, **sizes)
            elif kernel == "query_major":
                grid = queries // shape.block_n, pairs
                function[grid](q, k, v, grad, lse, delta, grad_query, stride, keys, scale, **sizes)
            else:
                grid = keys // shape.keys, pairs
                function[grid](q, k, v, grad, lse, delta, grad_key, grad_value, stride, queries, scale, **sizes)

    return step


def measure(workload: Workload, dtype: str, device: torch.device) -> Iterator[KernelTime]:
    """Time every kernel of a workload, its own and, in half precision, plain flash attention's."""
    from smca_kernels.backends.triton.hopper import right_compiler

    steps = {"": smca_step(workload.inputs(dtype, 0, device))}
    if dtype != "float32":
        steps["plain "] = plain_step(workload, dtype, device)
    for prefix, step in steps.items():
        with right_compiler(device):
            times = times_of_kernels(step)
        for kernel, each in sorted(times.items()):
            if not kernel.endswith("_kernel"):
                continue  # of torch, which fills and copies
            median = statistics.median(each)
            cuts = statistics.quantiles(each, n=5, method="inclusive")
            name = prefix + kernel.removesuffix("_kernel")
            yield KernelTime(workload.name, dtype, name, median, cuts[0], cuts[-1], workload.elements / median * 1e6)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the times. Exit status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="smca_benchmarks.kernel_times", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=tuple(WORKLOADS), default=DEFAULT)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES["cuda"], default=("bfloat16",))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each workload")
    args = parser.parse_args(arguments)
    check_output_file("--json", args.json)
    if not torch.cuda.is_available():
        print("smca_benchmarks.kernel_times needs a GPU, whose own clock it reads", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    rows: list[KernelTime] = []
    for dtype in args.dtype:
        for name in args.workload:
            for row in measure(WORKLOADS[name], dtype, device):
                print(row, flush=True)
                rows.append(row)
            if args.json is not None:
                found = {
                    "environment": environment(device),
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                write_text(args.json, json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
