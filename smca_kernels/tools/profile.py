"""`smca profile`: what co-attention costs, scale by scale, for a workload of the benchmarks or for a detector."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing, write_text

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca profile`."""
    parser.description = (
        "Time, bytes moved, tiles, scale weight and width of the prior for every scale of every call of the operator. "
        "For code of your own: smca_kernels.profile()."
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--workload", metavar="NAME", help="random inputs of a workload of `smca bench`")
    subject.add_argument("--preset", metavar="NAME", help="a detector as `smca presets` lists them, not trained")
    subject.add_argument("--weights", type=Path, metavar="FILE", help="a detector, as `smca train` writes it")
    add = parser.add_argument
    add("--image", type=Path, metavar="FILE", help="what the detector sees; default: noise")
    add("--training", action="store_true", help="with gradients, and a detector's dropout; default: inference")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU; a detector runs under autocast")
    add("--backend", default="auto", choices=("auto", "triton", "sdpa", "reference"), help="default: %(default)s")
    add("--repeats", type=int, default=10, metavar="N", help="measurements of each scale; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write environment and rows as JSON")
    add("--picture", type=Path, metavar="FILE", help="draw a bar for every scale (PNG)")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the run and of each scale alone (JSON)")


def run(args: argparse.Namespace) -> int:
    """`smca profile`: print the table, write what is asked for."""
    import torch

    from smca_kernels.profiling.recorder import profile

    _check(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    subject = _workload(args, device, dtype) if args.workload is not None else _detector(args, device, dtype)
    subject()  # compilation and the like are not what a trace should show
    with profile(args.repeats, progress=True) as measured:
        subject()
    print(measured.table())
    if args.json is not None:
        from smca_benchmarks.bench_attention import environment

        report = {"subject": _named(args), "environment": environment(device), **measured.as_dict()}
        write_text(args.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if args.picture is not None:
        measured.picture(args.picture)
    if args.trace is not None:
        _write_trace(subject, args.trace, device)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    if args.image is not None and args.workload is not None:
        raise ValueError("--image must go with --preset or --weights; a workload has none")
    for option, path in (("--json", args.json), ("--picture", args.picture), ("--trace", args.trace)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{option} must name a file in an existing folder, got {path}")
    wanted = {"matplotlib": args.picture is not None, "torchvision": args.workload is None}
    missing = [name for name, is_wanted in wanted.items() if is_wanted and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'smca_kernels[model,demo]'")


def _workload(args: argparse.Namespace, device: torch.device, dtype: str) -> Callable[[], object]:
    import torch
    from smca_benchmarks.workloads import WORKLOADS

    from smca_kernels.attention import smca_attention

    if args.workload not in WORKLOADS:
        raise ValueError(f"--workload must be one of {', '.join(WORKLOADS)}, got {args.workload}")
    arguments = WORKLOADS[args.workload].inputs(dtype, SEED, device).arguments()

    def call() -> None:
        with torch.set_grad_enabled(args.training):
            smca_attention(**arguments, backend=args.backend)

    return call


def _detector(args: argparse.Namespace, device: torch.device, dtype: str) -> Callable[[], object]:
    import torch

    from smca_model import build, weights
    from smca_model.data.images import load_image, normalize, resize
    from smca_model.presets import IMAGE_SIZE, TINY_IMAGE_SIZE

    torch.manual_seed(SEED)
    if args.weights is not None:
        model = weights.load(args.weights)
    else:
        model = build(args.preset)
        if model.config.backbone == "tiny":
            model.image_size = (TINY_IMAGE_SIZE[0], 2 * TINY_IMAGE_SIZE[0])
    if args.image is not None:
        image = normalize(resize(load_image(args.image), *model.image_size))
    else:
        sizes = TINY_IMAGE_SIZE if model.config.backbone == "tiny" else IMAGE_SIZE
        image = torch.randn(3, *sizes)
    model, image = model.to(device).train(args.training), image.to(device)
    model.backend = args.backend
    is_autocast = dtype != "float32"

    def call() -> None:
        with (
            torch.set_grad_enabled(args.training),
            torch.autocast(device.type, getattr(torch, dtype) if is_autocast else None, enabled=is_autocast),
        ):
            model([image])

    return call


def _named(args: argparse.Namespace) -> dict[str, Any]:
    """What was run, for the JSON file."""
    names = ("workload", "preset", "weights", "image", "training", "backend")
    values = {name: getattr(args, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _write_trace(subject: Callable[[], object], path: Path, device: torch.device) -> None:
    """One run of the subject and, after it, each scale on its own, under names of their own."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from smca_kernels.profiling.recorder import profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start on stderr otherwise
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with record(activities=activities) as trace, profile(repeats=1):
        subject()
    with replacing(path) as temporary:
        trace.export_chrome_trace(str(temporary))
