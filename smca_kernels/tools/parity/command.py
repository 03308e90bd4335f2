"""`smca parity`: the cases of smca_kernels.testing on the backends that can run here, or on what Triton compiles."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from smca_kernels import backends
from smca_kernels.files import write_text
from smca_kernels.testing.cases import CASES, DTYPES, Case, case_generator, make_inputs
from smca_kernels.testing.check import check
from smca_kernels.tools.arguments import check_output_files, choose_device
from smca_kernels.tools.env import describe, versions
from smca_kernels.tools.parity.compiled import OUTSIDE, parse_architecture, run_compiled
from smca_kernels.tools.parity.rows import Row, json_report, junit_report, print_header, print_row, print_summary

BACKENDS = ("triton", "sdpa")


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
    parser.add_argument(
        "--compiled",
        type=parse_architecture,
        metavar="SM",
        help="execute what this Triton compiles for a card (sm_80, sm_86, sm_89, sm_90) on the CPU instead",
    )
    parser.add_argument("--device", help="a torch device; default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=_seed, help="an integer from 0 to 2**31 - 1; default: a fresh one, printed")
    parser.add_argument(
        "--draws", type=_draws, default=1, metavar="N", help="run each case with N seeds, from --seed on; default: 1"
    )
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


def _draws(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 2**31 - 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """`smca parity`: exit status 0 if every case kept its budget, 1 if one did not or none ran.

    Raises:
        ValueError: for options that exclude each other, draws whose seeds could not be repeated, a device that can't
            be used, a file whose folder does not exist, and for --compiled without Triton.
    """
    check_output_files({"--json": args.json, "--junit": args.junit})
    if args.compiled is not None and (args.backend is not None or args.device is not None):
        raise ValueError("--compiled runs on the CPU, in place of backends: give neither --backend nor --device")
    device = choose_device("cpu" if args.compiled is not None else args.device)
    if device.type == "cpu" and args.compiled is None:
        # Triton reads this when it is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    seed = secrets.randbelow(2**31 - args.draws + 1) if args.seed is None else args.seed
    if seed + args.draws > 2**31:
        raise ValueError(f"--draws must leave the last seed below 2**31, got {args.draws} from seed {seed} on")
    seeds = range(seed, seed + args.draws)
    environment = _environment(device)
    if args.compiled is not None:
        environment["compiled"] = f"sm_{args.compiled}"
    print(" · ".join(f"{name} {value}" for name, value in environment.items()))
    each = f"; {args.draws} draws a case, from this seed on" * (args.draws > 1)
    print(f"seed {seed} (repeat with --seed {seed}){each}; numbers are error / budget, at most 1 passes\n")
    print_header()
    if args.compiled is not None:
        rows = run_compiled(args.compiled, args.quick, seeds, args.dtype, print_row)
    else:
        cases = [case for case in CASES if case.quick or not args.quick]
        rows = _run_cases(args.backend or BACKENDS, args.dtype, cases, device, seeds)
    print_summary(rows)
    if args.compiled is not None:
        print(f"\n{OUTSIDE}")
    idle = [name for name in args.backend or () if not any(row.ran for row in rows if row.backend == name)]
    for name in idle:
        print(f"no case ran on {name}")
    if args.json is not None:
        write_text(args.json, json.dumps(json_report(rows, seeds, environment), indent=2) + "\n")
    if args.junit is not None:
        write_text(args.junit, junit_report(rows, seeds, environment))
    passed = any(row.ran for row in rows) and all(row.status in ("passed", "skipped") for row in rows)
    return 0 if passed and not idle else 1


def _environment(device: torch.device) -> dict[str, str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    return {"device": str(device), **describe(device), **versions(), "interpreter": str(interpreted)}


def _run_cases(
    backends: Sequence[str], dtypes: Sequence[str], cases: Sequence[Case], device: torch.device, seeds: range
) -> list[Row]:
    rows = []
    for backend in backends:
        for dtype in dtypes:
            for case in cases:
                row = _run_case(dataclasses.replace(case, dtype=dtype), backend, device, seeds)
                print_row(row)
                rows.append(row)
    return rows


def _run_case(case: Case, backend: str, device: torch.device, seeds: range) -> Row:
    row = Row(backend, case.dtype, case.name, "passed")
    if case.large and backend == "triton" and device.type == "cpu":
        row.status, row.reason = "skipped", "too large for Triton's interpreter"
        return row
    start = time.perf_counter()
    try:
        for seed in seeds:
            inputs = make_inputs(case, case_generator(case, seed), device)
            reason = backends.unsupported(backend, inputs)
            if reason is not None:
                row.status, row.reason = "skipped", reason
                return row
            comparisons = check(inputs, backend)
            row.add(seed, comparisons, [str(c) for c in comparisons if not c.ratio <= 1.0])
    except Exception as error:  # a crash of one case must not hide the others
        row.status, row.reason = "error", f"seed {seed}: {type(error).__name__}: {error}"
        return row
    row.seconds = time.perf_counter() - start
    return row
