"""`smca profile`: what co-attention costs, scale by scale, for a workload of the benchmarks or for a detector."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.tools import profile
from smca_kernels.tools.arguments import check_packages, choose_device

if TYPE_CHECKING:
    import torch

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
    parser.add_argument("--image", type=Path, metavar="FILE", help="what the detector sees; default: noise")
    profile.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`smca profile`: print the table, write what is asked for.

    Raises:
        ValueError: when it can't start.
    """
    if args.image is not None and args.workload is not None:
        raise ValueError("--image must go with --preset or --weights; a workload has none")
    profile.check(args)
    if args.workload is None:
        check_packages(("torchvision",), "model,demo")
    device = choose_device()
    dtype = profile.dtype_name(args, device)
    call = _workload_call(args, device, dtype) if args.workload is not None else _detector_call(args, device, dtype)
    profile.measure(call, args, device, _subject(args), _environment)
    return 0


def _workload_call(args: argparse.Namespace, device: torch.device, dtype: str) -> Callable[[], object]:
    import torch

    from smca_kernels.attention import smca_attention

    from .workloads import WORKLOADS

    if args.workload not in WORKLOADS:
        raise ValueError(f"--workload must be one of {', '.join(WORKLOADS)}, got {args.workload}")
    arguments = WORKLOADS[args.workload].inputs(dtype, SEED, device).arguments()

    def call() -> None:
        with torch.set_grad_enabled(args.training):
            smca_attention(**arguments, backend=args.backend)

    return call


def _detector_call(args: argparse.Namespace, device: torch.device, dtype: str) -> Callable[[], object]:
    from smca_model.profile import detector_call

    detector = args.preset if args.weights is None else args.weights
    return detector_call(detector, args.image, device=device, dtype=dtype, backend=args.backend, training=args.training)


def _subject(args: argparse.Namespace) -> dict[str, Any]:
    names = ("workload", "preset", "weights", "image", "training", "backend")
    values = {name: getattr(args, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _environment(device: torch.device) -> dict[str, Any]:
    from .bench_attention import environment

    return environment(device)
