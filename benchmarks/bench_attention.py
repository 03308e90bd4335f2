"""`smca bench`: the operator against everything that could take its place. Parity first; then time, memory, overhead.

The command line and the run. Workloads, rivals and bars are tables: workloads.py, peers.py, bars.py. For each workload
and dtype (cases.py) a run admits peers (admission.py) and measures them (measures.py); it counts the elements that a
plan leaves to compute (planned_elements.py). The results (records.py) are rendered by report.py and compared with an
earlier run by compare.py. docs/benchmarks.md explains the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from smca_kernels import explain_backend
from smca_kernels.tools.arguments import check_output_file, choose_device
from smca_kernels.tools.env import describe, versions

from . import compare
from . import report as reporting
from .admission import Clock, admit
from .bars import BARS
from .cases import SEED, BenchmarkCase
from .measures import (
    Effort,
    limit_rows,
    measure_memory,
    measure_overhead,
    measure_slowdown,
    measure_time,
    rotated_inputs,
)
from .planned_elements import planned_rows
from .records import Report, Row, explain
from .workloads import BOTH, DEFAULT_WORKLOADS, DTYPES, PLANNED, TINY, WORKLOADS, Workload

if TYPE_CHECKING:
    from .peers import Peer

EFFORTS = {"cpu": Effort(5.0, 3, 30, 31), "cuda": Effort(0.6, 10, 100, 31)}
QUICK_EFFORTS = {"cpu": Effort(0.5, 2, 5, 5), "cuda": Effort(0.2, 5, 20, 5)}
# No workload is begun later, and nothing is compiled after half of it.
MAX_SECONDS = {"cpu": 150.0, "cuda": 900.0}
SOURCES = tuple(f":/{package}/*.py" for package in ("smca_kernels", "smca_model", "benchmarks"))


def describe_workload(workload: Workload) -> dict[str, Any]:
    """Entry of a workload in the JSON file."""
    return dataclasses.asdict(workload) | {"keys": workload.keys, "elements": workload.elements}


def describe_peer(peer: Peer) -> dict[str, Any]:
    """Entry of a peer in the JSON file."""
    return {name: getattr(peer, name) for name in ("what", "ours", "same", "compiled")}


def measure(case: BenchmarkCase, clock: Clock, effort: Effort, report: Report) -> None:
    """Measure one case, parity first, then time and memory, and add the results to the report."""
    sets = rotated_inputs(case)
    # An empty cache: loading results of an earlier compilation from the disk would take no time.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        admitted = admit(case, sets[0], clock, report)
    report.rows += limit_rows(case)
    times, sizes = measure_time(case, sets, admitted, effort), measure_memory(case, sets[0], admitted[BOTH])
    for result in itertools.chain(times, measure_slowdown(case, sets, admitted, effort), sizes):
        if isinstance(result, Row):
            report.rows.append(result)
        else:
            report.not_measured.append(result)
    torch.compiler.reset()  # code compiled for one workload is of no use to the next
    if case.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_all(
    workloads: Sequence[Workload],
    dtypes: Sequence[str],
    peers: Mapping[str, Peer],
    device: torch.device,
    effort: Effort,
    report: Report,
    seconds: float,
) -> None:
    """Measure all workloads that can be begun within the seconds; write the report after each."""
    clock = Clock(seconds)
    report.peers = {name: describe_peer(peer) for name, peer in peers.items()}
    for dtype in dtypes:
        tiny = BenchmarkCase(TINY, dtype, device, peers)
        report.defaults[dtype] = explain_backend(**tiny.inputs().arguments()).backend
        report.workloads[TINY.name] = describe_workload(TINY)
        try:
            report.rows += measure_overhead(tiny, effort.overhead_repeats)
        except Exception as error:  # the rest may well work
            report.not_measured.append(tiny.skipped("", "", explain(error)))
        for workload in workloads:
            case = BenchmarkCase(workload, dtype, device, peers)
            report.workloads[workload.name] = describe_workload(workload)
            if not clock.may_begin:
                report.not_measured.append(case.skipped("", "", f"not begun after {seconds:g} s"))
                continue
            print(f"{clock.spent:6.1f} s  {workload.name}, {dtype} …", flush=True)
            try:
                measure(case, clock, effort, report)
            except Exception as error:  # out of memory on a smaller card, say
                report.not_measured.append(case.skipped("", "", explain(error)))
            report.write()
    report.finished = True
    report.write()
    print(f"{clock.spent:6.1f} s  done\n", flush=True)


# ------------------------------------------------------------------------------------------------------ command line


def environment(device: torch.device) -> dict[str, Any]:
    """Facts that the results depend on: device, versions, threads and commit."""
    given = os.environ.get("GIT_COMMIT")  # for sources without their repository
    commit = _git("rev-parse", "HEAD")
    return {
        "device": device.type,
        **describe(device),
        **versions(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": given or commit or "unknown",
        "dirty": "unknown" if given or not commit else _git("status", "--porcelain", "--", *SOURCES) != "",
        "seed": SEED,
    }


def _git(*arguments: str) -> str:
    """Output of a git command in the source tree; "" without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca bench`."""
    parser.description = (
        "Time and memory of every backend that can run here against everything that could take its place, after a "
        "parity check. Exit status 1 if parity fails, --base finds a regression, or with --bars a bar is missed."
    )
    seconds = ", ".join(f"{number:g} ({device})" for device, number in MAX_SECONDS.items())
    dtypes = sorted({dtype for names in DTYPES.values() for dtype in names})
    parser.add_argument("--workload", nargs="+", choices=tuple(WORKLOADS), help="default: those for this device")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="default: those for this device")
    parser.add_argument("--peer", nargs="+", metavar="PEER", help="default: all; naive and ours always take part")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a rough look")
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help=f"begin no workload after S seconds, compile nothing after half of them; default: {seconds}",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there, a table (.md) and two plots (.png) beside"
    )
    parser.add_argument("--base", type=Path, metavar="FILE", help="compare with an earlier run's JSON")
    parser.add_argument("--bars", action="store_true", help="judge the project's own bars on speed and memory")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: table and plots of FILE")


def chosen_peers(names: Sequence[str] | None) -> dict[str, Peer]:
    """Select the peers of these names, all if None; naive and our backends always take part.

    Raises:
        ValueError: for an unknown name.
    """
    from .peers import PEERS  # which imports compilers: seconds

    unknown = [name for name in names or () if name not in PEERS]
    if unknown:
        raise ValueError(f"--peer must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    return {n: peer for n, peer in PEERS.items() if names is None or n in names or peer.ours or n == "naive"}


def run(args: argparse.Namespace) -> int:
    """Run `smca bench`: exit status 1 if parity fails, a bar of --bars is missed, or a regression is found, else 0.

    Raises:
        ValueError: for a file that can't be read, a folder that isn't there, an unknown peer, and a base from
            another device.
    """
    if args.render is not None:
        reporting.render(args.render)
        return 0
    check_output_file("--json", args.json)
    peers = chosen_peers(args.peer)
    device = choose_device()
    report = Report(environment(device), args.json, BARS if args.bars else ())
    base = None
    if args.base is not None:
        base = reporting.load(args.base)
        compare.check_comparable(base["environment"], report.environment)
    print("\n".join(f"{name}: {fact}" for name, fact in report.environment.items()) + "\n", flush=True)
    planned = [WORKLOADS[name] for name in PLANNED if args.workload is None or name in args.workload]
    report.workloads |= {workload.name: describe_workload(workload) for workload in planned}
    report.rows += planned_rows(planned)
    measure_all(
        [WORKLOADS[name] for name in args.workload or DEFAULT_WORKLOADS[device.type]],
        args.dtype or DTYPES[device.type],
        peers,
        device,
        (QUICK_EFFORTS if args.quick else EFFORTS)[device.type],
        report,
        MAX_SECONDS[device.type] if args.seconds is None else args.seconds,
    )
    results = report.as_json()
    print(reporting.markdown(results))
    if args.json is not None:
        reporting.render(args.json)
    regressions = []
    if base is not None:
        changes = compare.compare(base, results)
        print(compare.markdown(changes, args.base))
        regressions = [change for change in changes if change.regression]
    return 0 if results["passed"] and not regressions else 1
