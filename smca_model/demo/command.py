"""`smca demo`: the layer on two photographs (smca_kernels/tools/demo.py), then a detector that learns digits."""

from __future__ import annotations

import argparse
import sys

from smca_kernels.tools import demo as layer_demo
from smca_kernels.tools.arguments import check_packages

from . import learning

PACKAGES = ("pycocotools", "safetensors", "scipy", "sklearn", "tensorboard", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca demo`."""
    layer_demo.add_arguments(parser)
    parser.description = (
        f"First, the operator. {parser.description} Then, the detector: a small SMCA is trained on "
        f"{learning.TRAIN_SCENES} scenes of real digits (five minutes on two CPU cores), evaluated on held-out ones, "
        "and its detections and attention are drawn."
    )
    parser.add_argument("--compare", action="store_true", help="train the same without spatial prior, for as long")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the detector's part; default: 0")


def run(args: argparse.Namespace) -> int:
    """`smca demo`: exit status 0; 1 if a backend is not within the error budget.

    Raises:
        ValueError: when it can't start.
    """
    check_packages(PACKAGES, "model,demo")
    status = layer_demo.run(args)
    if status:
        return status
    print("\nThe detector")
    try:
        learning.run_detector(args.out, compare=args.compare, seed=args.seed)
    except KeyboardInterrupt:
        print("interrupted: nothing of the detector was kept", file=sys.stderr)
        raise
    return 0
