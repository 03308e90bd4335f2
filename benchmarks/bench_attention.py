"""`smca bench`: the operator against everything that could take its place. Parity first; then time, memory, overhead.

The command line and the run. What is measured on what, and the bars, are tables in workloads.py; the rivals are in
peers.py. A run asks for each workload who may be measured (gate.py), measures (measures.py), counts what a plan leaves
to compute (counted.py), and keeps what it found (records.py), which report.py renders and compare.py holds against an
earlier run. docs/benchmarks.md tells how to read the tables.
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
from smca_kernels.tools.env import describe, versions

from . import compare
from . import report as reporting
from .counted import counted_rows
from .gate import Clock, admit
from .measures import Effort, limit_rows, measure_memory, measure_overhead, measure_time, rotated_inputs
from .records import Report, Row, explain
from .subject import SEED, Subject
from .workloads import BOTH, COUNTED, DEFAULT_WORKLOADS, DTYPES, TINY, WORKLOADS, Workload

if TYPE_CHECKING:
    from .peers import Peer

EFFORTS = {"cpu": Effort(5.0, 3, 30, 31), "cuda": Effort(0.6, 10, 100, 31)}
QUICK_EFFORTS = {"cpu": Effort(0.5, 2, 5, 5), "cuda": Effort(0.2, 5, 20, 5)}
# No workload is begun later, and nothing compiled after half of it.
SECONDS = {"cpu": 120.0, "cuda": 900.0}
SOURCES = tuple(f":/{package}/*.py" for package in ("smca_kernels", "smca_model", "benchmarks"))


def describe_workload(workload: Workload) -> dict[str, Any]:
    facts = dataclasses.asdict(workload)
    return facts | {"keys": workload.keys, "elements": workload.elements}


def describe_peer(peer: Peer) -> dict[str, Any]:
    return {name: getattr(peer, name) for name in ("what", "ours", "same", "compiled")}


def measure(subject: Subject, clock: Clock, effort: Effort, report: Report) -> None:
    """One workload in one dtype: parity, time, memory."""
    sets = rotated_inputs(subject)
    # Compiled as on a machine that never did so: what an earlier run left on the disk would be there in no time.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        admitted = admit(subject, sets[0], clock, report)
    report.rows += limit_rows(subject)
    times, sizes = measure_time(subject, sets, admitted, effort), measure_memory(subject, sets[0], admitted[BOTH])
    for found in itertools.chain(times, sizes):
        if isinstance(found, Row):
            report.rows.append(found)
        else:
            report.not_measured.append(found)
    torch.compiler.reset()  # what one workload compiled is of no use to the next
    if subject.device.type == "cuda":
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
    """Measure everything into the report, while the time lasts, and write it after each workload."""
    clock = Clock(seconds)
    report.peers = {name: describe_peer(peer) for name, peer in peers.items()}
    for dtype in dtypes:
        tiny = Subject(TINY, dtype, device, peers)
        report.defaults[dtype] = explain_backend(**tiny.inputs().arguments()).backend
        report.workloads[TINY.name] = describe_workload(TINY)
        try:
            report.rows += measure_overhead(tiny, effort.overhead)
        except Exception as error:  # the rest may well work
            report.not_measured.append(tiny.left("", "", explain(error)))
        for workload in workloads:
            subject = Subject(workload, dtype, device, peers)
            report.workloads[workload.name] = describe_workload(workload)
            if not clock.may_begin:
                report.not_measured.append(subject.left("", "", f"not begun after {seconds:g} s"))
                continue
            print(f"{clock.spent:6.1f} s  {workload.name}, {dtype} …", flush=True)
            try:
                measure(subject, clock, effort, report)
            except Exception as error:  # out of memory on a smaller card, say
                report.not_measured.append(subject.left("", "", explain(error)))
            report.write()
    report.finished = True
    report.write()
    print(f"{clock.spent:6.1f} s  done\n", flush=True)


# ------------------------------------------------------------------------------------------------------ command line


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: device, versions, threads and commit."""
    told, commit = os.environ.get("GIT_COMMIT"), _git("rev-parse", "HEAD")  # told of sources without their repository
    return {
        "device": device.type,
        **describe(device),
        **versions(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": told or commit or "unknown",
        "dirty": "unknown" if told or not commit else _git("status", "--porcelain", "--", *SOURCES) != "",
        "seed": SEED,
    }


def _git(*arguments: str) -> str:
    """What git says about the source tree; "" where there is no git or no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca bench`."""
    parser.description = (
        "Time and memory of every backend that can run here against everything that could take its place, after a "
        "parity check. Exit status 1 if parity fails, a bar is missed, or --base finds a regression."
    )
    seconds = ", ".join(f"{number:g} ({device})" for device, number in SECONDS.items())
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
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: table and plots of FILE")


def chosen_peers(names: Sequence[str] | None) -> dict[str, Peer]:
    """PEERS, or those named with naive and ours.

    Raises:
        ValueError: for a name that isn't there.
    """
    from .peers import PEERS  # which imports compilers: seconds

    unknown = [name for name in names or () if name not in PEERS]
    if unknown:
        raise ValueError(f"--peer must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    return {n: peer for n, peer in PEERS.items() if names is None or n in names or peer.ours or n == "naive"}


def run(args: argparse.Namespace) -> int:
    """`smca bench`: exit status 0, or 1 if parity fails, a bar is missed, or a regression is found.

    Raises:
        ValueError: for a file that can't be read, a folder that isn't there, an unknown peer, and a base from
            another device.
    """
    if args.render is not None:
        reporting.render(args.render)
        return 0
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json must name a file in an existing folder, got {args.json}")
    peers = chosen_peers(args.peer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(environment(device), args.json)
    base = None
    if args.base is not None:
        base = reporting.load(args.base)
        compare.check_comparable(base["environment"], report.environment)
    print("\n".join(f"{name}: {fact}" for name, fact in report.environment.items()) + "\n", flush=True)
    counted = [WORKLOADS[name] for name in COUNTED if args.workload is None or name in args.workload]
    report.workloads |= {workload.name: describe_workload(workload) for workload in counted}
    report.rows += counted_rows(counted)
    measure_all(
        [WORKLOADS[name] for name in args.workload or DEFAULT_WORKLOADS[device.type]],
        args.dtype or DTYPES[device.type],
        peers,
        device,
        (QUICK_EFFORTS if args.quick else EFFORTS)[device.type],
        report,
        SECONDS[device.type] if args.seconds is None else args.seconds,
    )
    found = report.as_json()
    print(reporting.markdown(found))
    if args.json is not None:
        reporting.render(args.json)
    regressions = []
    if base is not None:
        changes = compare.compare(base, found)
        print(compare.markdown(changes, args.base))
        regressions = [change for change in changes if change.regression]
    return 0 if found["passed"] and not regressions else 1
