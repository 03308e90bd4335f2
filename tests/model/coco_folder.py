"""A small data folder in COCO's format, for the tests of what reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def annotation(number: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    """An entry of `annotations`."""
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


def write_coco(
    folder: Path,
    objects: list[dict[str, Any]],
    *,
    sizes: dict[int, tuple[int, int]] | None = None,  # image id: (height, width)
    split: str = "val",
    **parts: Any,
) -> tuple[Path, Path]:
    """Grey images named by their ids, and annotations of the objects; `parts` replace those of the annotation file."""
    sizes = {1: (40, 60)} if sizes is None else sizes
    images = folder / split
    images.mkdir(parents=True)
    for number, size in sizes.items():
        Image.fromarray(np.full((*size, 3), 128, np.uint8)).save(images / f"{number}.png")
    entries = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in sizes.items()]
    data = {"images": entries, "annotations": objects, "categories": CATEGORIES, **parts}
    file = folder / "annotations" / f"{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(data))
    return images, file
