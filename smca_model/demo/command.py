"""`smca demo`: the layer on two photographs (photographs.py), then a detector that learns digits (learning.py).

With --serve, a page instead (serve.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from smca_kernels.tools.arguments import check_packages

from . import learning, photographs, serve

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
        "and its detections and attention are drawn."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="train the same without spatial prior, for as long")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the detector's part; default: 0")
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
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written, got {args.out} ({error})") from None
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
