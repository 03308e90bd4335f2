"""Samples of a data set on one sheet: images with their boxes and the names of their classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smca_kernels.files import replacing

if TYPE_CHECKING:
    from .inspection import Split

IN_A_ROW, ROWS = 4, 4
SIDE = 4.0  # of a picture, in inches
DOTS = 120  # an inch
PIXELS = 480  # most of the shorter side of an image; it is drawn on in full before
LONGEST_NAME = 40  # letters


def draw_samples(splits: Sequence[Split], path: Path, *, upright: bool = False) -> int:
    """Write or replace a PNG file with up to 16 images, which show as many of the classes as they can.

    Args:
        splits: checked; images that can't be decoded are left out.
        path: the file.
        upright: as in training.

    Returns:
        The number of images; there is no file where that is 0.
    """
    import torch
    from matplotlib.figure import Figure
    from torchvision.ops import box_convert

    from ..pictures import draw_boxes
    from .images import load_annotated_image, resize

    chosen = choose(splits)
    if not chosen:
        return 0
    rows = -(-len(chosen) // IN_A_ROW)
    columns = min(len(chosen), IN_A_ROW)
    figure = Figure(figsize=(SIDE * columns, SIDE * rows), dpi=DOTS, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for panel, (split, row) in zip(panels, chosen, strict=False):
        entry = split.images[row]
        image = load_annotated_image(
            split.folder / entry["file_name"],
            (entry["height"], entry["width"]),
            annotations=split.annotations,
            upright=upright or split.upright,
        )
        here = (split.rows == row) & (split.boxes[:, 2:] > 0).all(1)
        limits = torch.tensor(image.shape[:0:-1]).repeat(2)
        boxes = box_convert(torch.from_numpy(split.boxes[here]), "xywh", "xyxy").clamp(min=0).minimum(limits)
        found = {"boxes": boxes, "labels": torch.from_numpy(split.labels[here])}
        drawn = draw_boxes(image, found, split.classes)
        drawn = resize(drawn, min(PIXELS, *drawn.shape[1:]), 2 * PIXELS)
        panel.imshow(drawn.movedim(0, -1).numpy())
        name = (
            entry["file_name"] if len(entry["file_name"]) <= LONGEST_NAME else f"…{entry['file_name'][-LONGEST_NAME:]}"
        )
        panel.set_title(f"{split.name}: {name}", fontsize=8, parse_math=False)
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters of names that the font lacks
        figure.savefig(temporary, format="png")
    return len(chosen)


def choose(splits: Sequence[Split]) -> list[tuple[Split, int]]:
    """Up to 16 images, as split and place in it: one of each class, of the rarest first, then any that have boxes."""
    import numpy as np

    generator = np.random.default_rng(0)
    places: list[tuple[Split, int]] = []
    classes_of: list[set[str]] = []
    counts: dict[str, int] = {}
    for split in splits:
        shown: dict[int, set[str]] = {}
        for row, label in zip(split.rows.tolist(), split.labels.tolist(), strict=True):
            shown.setdefault(row, set()).add(split.classes[label])
        for row, names in shown.items():
            if split.images[row]["file_name"] in split.digests:
                places.append((split, row))
                classes_of.append(names)
        for name, count in split.counts.items():
            counts[name] = counts.get(name, 0) + count
    order = generator.permutation(len(places)).tolist()
    first: dict[str, int] = {}
    for place in order:
        for name in classes_of[place]:
            first.setdefault(name, place)
    chosen: dict[int, None] = {}
    seen: set[str] = set()
    for name in sorted(first, key=lambda name: counts[name]):
        if name not in seen and len(chosen) < IN_A_ROW * ROWS:
            chosen[first[name]] = None
            seen |= classes_of[first[name]]
    for place in order:
        if len(chosen) < IN_A_ROW * ROWS:
            chosen[place] = None
    return [places[place] for place in sorted(chosen)]
