"""`smca demo`: the layer on two photographs (photographs.py), then a detector that learns digits (learning.py).

With --serve, a page instead (serve.py); with --ablations, the paper's ablations in small (ablations.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from smca_kernels.tools.arguments import check_packages, make_folder

from . import ablation_variants, ablations, learning, photographs, serve

PACKAGES = (
    "matplotlib",
    "pycocotools",
    "safetensors",
    "scipy",
    "skimage",
    "sklearn",
    "tensorboard",
    "torchvision",
    "tqdm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca demo`."""
    parser.description = (
        "First, the operator. Two photographs through ResNet-50 and the SMCA layer with 300 queries: parity with naive "
        "PyTorch, a table of time and memory, and a picture of prior and attention. Exit status 1 if parity fails. "
        "Then, the detector: a small SMCA is trained on "
        f"{learning.TRAIN_SCENES} scenes of real digits (five minutes on two CPU cores), evaluated on held-out ones, "
        "and its detections and attention are drawn. --ablations trains the paper's variants instead, for hours."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="train the same without spatial prior, for as long")
    parser.add_argument(
        "--ablations",
        action="store_true",
        help=f"instead of all this, the paper's Tables 2 and 3 in small: {len(ablation_variants.VARIANTS)} variants, "
        f"each with {ablations.SEEDS} seeds, in one CPU thread; what was interrupted goes on where it was",
    )
    seeds = "of the detector's part; of ablations the first one; default: %(default)s"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=seeds)
    serve.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`smca demo`: exit status 0; 1 if a backend is not within the error budget.

    Raises:
        ValueError: when it can't start.
    """
    serve.check_arguments(args)
    if args.serve:
        return serve.run(args)
    check_packages(PACKAGES, "model,demo")
    if args.ablations and args.compare:
        raise ValueError("--compare can't be given with --ablations, which compare with detr-tiny anyway")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if not args.ablations:
        learning.check_replaceable(args.out / "detector")
    make_folder("--out", args.out)
    if args.ablations:
        try:
            ablations.run_ablations(args.out / "ablations", seed=args.seed)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on where it was", file=sys.stderr)
            raise
        return 0
    status = photographs.run_layer(args.out)
    if status:
        return status
    print("\nThe detector")
    try:
        learning.run_detector(args.out, compare=args.compare, seed=args.seed)
    except KeyboardInterrupt:
        print("interrupted: nothing of the detector was kept", file=sys.stderr)
        raise
    return 0
