"""A small data folder in YOLO's layout, for the tests of what reads one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SETTINGS = "train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n"


def write_yolo(
    folder: Path,
    labels: dict[str, str | bytes | None],
    *,
    size: tuple[int, int] = (40, 60),  # height, width
    settings: str | bytes = SETTINGS,
) -> Path:
    """Grey images by their paths below images/, such as val/a.png, each with the text of its label file, None for none.

    Returns:
        The data.yaml.
    """
    for name, text in labels.items():
        write_image(folder / "images" / name, size)
        if text is not None:
            file = (folder / "labels" / name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.yaml"
    data.write_bytes(settings if isinstance(settings, bytes) else settings.encode())
    return data


def write_image(path: Path, size: tuple[int, int], orientation: int | None = None) -> Path:
    """A grey image of a height and a width as stored, with an EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    Image.fromarray(np.full((*size, 3), 128, np.uint8)).save(path, exif=exif.tobytes())
    return path
