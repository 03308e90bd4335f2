"""The part of `smca profile` that any code shares which calls co-attention: options, measuring, and what is written.

The command itself is where its workloads and detectors are known; it hands over a function to call. For code of your
own there is `smca_kernels.profile`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.backends import BACKENDS
from smca_kernels.files import replacing, write_text
from smca_kernels.tools.arguments import check_output_files, check_packages

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments about how to measure and what to write."""
    add = parser.add_argument
    add("--training", action="store_true", help="with gradients, and a detector's dropout; default: inference")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU; a detector runs under autocast")
    add("--backend", default="auto", choices=("auto", *BACKENDS), help="default: %(default)s")
    add("--repeats", type=int, default=10, metavar="N", help="measurements of each scale; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write environment and rows as JSON")
    add("--picture", type=Path, metavar="FILE", help="draw a bar for every scale (PNG)")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the run and of each scale alone (JSON)")


def check(args: argparse.Namespace) -> None:
    """Check the options before any work.

    Raises:
        ValueError: naming the option that is wrong, or a package that is missing.
    """
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    check_output_files({"--json": args.json, "--picture": args.picture, "--trace": args.trace})
    if args.picture is not None:
        check_packages(("matplotlib",), "model,demo")


def dtype_name(args: argparse.Namespace, device: torch.device) -> str:
    """The dtype asked for, or the device's usual one."""
    return args.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def measure(
    call: Callable[[], object],
    args: argparse.Namespace,
    device: torch.device,
    subject: Mapping[str, Any],
    environment: Callable[[torch.device], Mapping[str, Any]],
) -> None:
    """Measure the co-attention of a call scale by scale, print the table, and write what the options ask for.

    Args:
        call: the code to measure, in the dtype and with the backend that the options say.
        args: of `add_arguments`.
        device: where the call works.
        subject: what was run, for the JSON file.
        environment: makes the device's description for the JSON file.
    """
    from smca_kernels.profiling.recorder import profile

    call()  # compilation and the like are not what a trace should show
    with profile(args.repeats, progress=True) as measured:
        call()
    print(measured.table())
    if args.json is not None:
        report = {"subject": dict(subject), "environment": environment(device), **measured.as_dict()}
        write_text(args.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if args.picture is not None:
        measured.picture(args.picture)
    if args.trace is not None:
        _write_trace(call, args.trace, device)


def _write_trace(call: Callable[[], object], path: Path, device: torch.device) -> None:
    """Record one run of the call and, after it, each scale on its own, under names of their own."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from smca_kernels.profiling.recorder import profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start on stderr otherwise
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with record(activities=activities) as trace, profile(repeats=1):
        call()
    with replacing(path) as temporary:
        trace.export_chrome_trace(str(temporary))
