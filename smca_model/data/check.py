"""`smca data check`: what is in a data folder and what is wrong with it, as text and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smca_kernels.tools.arguments import check_output_file, check_packages

if TYPE_CHECKING:
    from .inspection import Report, Split

PURPOSE = "read all of a data set, count what is in it and tell what is wrong with it, before training does"
SHOWN = 100  # warnings, errors, classes


def format_report(report: Report) -> str:
    """A report as text: what is in each split, boxes of each class, warnings and errors."""
    parts = [_describe(split) for split in report.splits if split.images]
    if counted := [split for split in report.splits if split.images]:
        parts.append(_class_table(counted))
    for title, told in (("warnings", report.all_warnings), ("errors", report.all_errors)):
        if told:
            rest = [f"… and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
            parts.append("\n".join([f"{title}:", *(f"  {line}" for line in [*told[:SHOWN], *rest])]))
    return "\n\n".join(parts)


def _describe(split: Split) -> str:
    import numpy as np

    from .images import format_size

    sizes = sorted((image["height"] * image["width"], image["height"], image["width"]) for image in split.images)
    smallest, middle, largest = (format_size(*sizes[i][1:]) for i in (0, len(sizes) // 2, -1))
    areas = ", ".join(f"{count} {name}" for name, count in split.areas.items())
    most = np.bincount(split.rows).max() if len(split.rows) else 0
    lines = [
        f"{split.name}: {split.annotations}",
        f"  {len(split.images)} images, {split.empty} of them without boxes",
        f"  sizes: {smallest} to {largest}, {middle} in the middle",
        f"  {len(split.boxes)} boxes: {areas} (less than 32², less than 96² and more pixels); "
        f"{len(split.boxes) / len(split.images):.1f} an image, {most} at most",
    ]
    if split.crowds:
        lines.append(f"  {split.crowds} crowds besides")
    return "\n".join(lines)


def _class_table(splits: Sequence[Split]) -> str:
    counts = [split.counts for split in splits]
    names = list(dict.fromkeys(name for count in counts for name in count))
    names = names if len(names) <= SHOWN else sorted(names, key=lambda name: -sum(c.get(name, 0) for c in counts))
    width = max(len(name) for name in ["boxes of", *names[:SHOWN]])
    lines = [f"{'boxes of':{width}}" + "".join(f"{split.name:>9}" for split in splits)]
    lines += [f"{name:{width}}" + "".join(f"{c.get(name, '-'):>9}" for c in counts) for name in names[:SHOWN]]
    return "\n".join(lines + ([f"… and {len(names) - SHOWN} classes with fewer"] if len(names) > SHOWN else []))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca data check`."""
    parser.description = (
        f"{PURPOSE[0].upper()}{PURPOSE[1:]}. Exit status 1 if there is something that training would refuse."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="in the layout of COCO, Roboflow or YOLO; or a data.yaml")
    add("--out", type=Path, metavar="FILE", help="draw some of the images with their boxes there, as PNG")
    add("--upright", action="store_true", help="boxes are of upright images where size and EXIF don't say")


def run(args: argparse.Namespace) -> int:
    """`smca data check`: exit status 0; 1 when there is something that training would refuse.

    Raises:
        ValueError: when there is no data.
    """
    check_packages(("matplotlib", "pycocotools", "torchvision", "tqdm"), "model")
    check_output_file("--out", args.out)
    from .inspection import check_data

    report = check_data(args.folder, upright=args.upright)
    print(format_report(report) + "\n")
    if args.out is not None:
        from .sheet import draw_samples

        drawn = draw_samples(report.splits, args.out, upright=args.upright)
        print(f"{drawn} images with their boxes are drawn in {args.out}")
    images = sum(len(split.images) for split in report.splits)
    boxes = sum(len(split.boxes) for split in report.splits)
    errors, told = len(report.all_errors), len(report.all_warnings)
    print(f"{args.folder}: {images} images, {boxes} boxes; {errors} errors, {told} warnings")
    return 1 if errors else 0
