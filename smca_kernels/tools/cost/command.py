"""`smca cost`: cost of the Triton kernels, by offline compilation.

Every kernel is compiled for a GPU that need not be there, and its machine code (SASS) is read with the disassembler
inside Triton. The innermost loop over tiles gives the instructions issued per attention element, the resource
usage gives spills and resident warps, and the limits of the hardware (tensor cores, EX2 unit, FP32 lanes, issue slots)
a ceiling of elements per second. A cycle model of an SM schedules the same machine code: docs/cost.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
from pathlib import Path

from smca_kernels.files import write_text
from smca_kernels.tools.arguments import check_output_file
from smca_kernels.tools.cost.architectures import ARCHITECTURES
from smca_kernels.tools.cost.report import DTYPES, compile_report
from smca_kernels.tools.cost.tables import format_programs, format_table, format_timeline

PLAIN = "smca_kernels.tools.cost.plain"
HEAD_DIMS = (32, 64, 128)
DEFAULT_ARCHITECTURES = (75, 80, 86, 89, 90, 100)


def parse_architecture(text: str) -> int:
    """Parse "sm_80", "sm80", "80" or "8.0" as 80.

    Raises:
        argparse.ArgumentTypeError: not one of ARCHITECTURES.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)a?", text.strip().lower())
    arch = int(match[1] + match[2]) if match else None
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return arch


def _parse_head_dim(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 128:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 128, got {text!r}")
    return int(text)


def _parse_trips(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `smca cost`."""
    parser.add_argument(
        "--arch", nargs="+", type=parse_architecture, default=list(DEFAULT_ARCHITECTURES), metavar="SM",
        help="architectures, e.g. sm_80 sm_90 (default: 75 80 86 89 90 100)",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument(
        "--head-dim", nargs="+", type=_parse_head_dim, default=list(HEAD_DIMS), metavar="D",
        help="channels per head, 1 to 128 (default: 32 64 128)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="write each kernel's loops there, annotated")
    parser.add_argument("--cubin", type=Path, metavar="DIR", help="write each kernel's cubin and PTX there")
    parser.add_argument(
        "--timeline", nargs="?", type=float, const=12.0, metavar="CYCLES",
        help="list the instructions that wait for at least so many cycles per trip (default: 12), and for what",
    )  # fmt: skip
    parser.add_argument(
        "--trips",
        nargs="+",
        type=_parse_trips,
        metavar="N",
        help="cycles of a program with so many trips over tiles per scale",
    )
    parser.add_argument("--plain", action="store_true", help="add flash attention without a prior, built the same way")
    parser.add_argument("--check", action="store_true", help="compare the model with published measurements, and end")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if a kernel failed to compile or to fit, else 0.

    Raises:
        ValueError: Triton is not installed, or --json can't be written.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("compiles with Triton, which is not installed here")
    check_output_file("--json", args.json)
    if args.check:
        from smca_kernels.tools.cost.published import format_comparison

        print(format_comparison())
        return 0
    for directory in (args.sass, args.cubin):
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    unique = (dict.fromkeys(values) for values in (args.arch, args.dtype, args.head_dim))
    combinations = list(itertools.product(*unique))
    rows = compile_report(combinations, sass_directory=args.sass, cubin_directory=args.cubin)
    if args.plain:
        rows += compile_report(combinations, module=PLAIN, sass_directory=args.sass, cubin_directory=args.cubin)
    print(format_table(rows))
    if args.trips:
        print(format_programs(rows, args.trips))
    if args.timeline is not None:
        print(format_timeline(rows, args.timeline))
    if args.json is not None:
        write_text(args.json, json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["error"] for row in rows) else 0
