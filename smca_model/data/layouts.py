"""The layouts of a data folder, told apart by what is in it, and the annotations of each in COCO's format.

COCO        train2017/, val2017/ and annotations/instances_{train,val}2017.json
            train/, val/ and annotations/{train,val}.json, as `smca data digits` writes it
Roboflow    {train,valid,test}/_annotations.coco.json, with the images beside it
YOLO        data.yaml, which names the rest (`yolo`)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .annotations import read_annotations
from .yolo import YoloSplit, open_yolo

# The folder of images and the annotation file of each split, and the words that its name is put together from.
COCO = (("{}", "annotations/{}.json"), ("{}2017", "annotations/instances_{}2017.json"))
ROBOFLOW = "_annotations.coco.json"
ROBOFLOW_NAMES = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
YOLO = ("data.yaml", "data.yml")

Annotations = Path | YoloSplit


class NoSplitError(ValueError):
    """A data folder without the split that was looked for."""


def find_split(folder: Path, split: str) -> tuple[Path, Annotations]:
    """The folder of images and the annotations of a split, "train", "val" or "test", of a data folder.

    Args:
        folder: in one of the layouts; or the file of YOLO's, whatever its name.
        split: which one.

    Raises:
        NoSplitError: when no layout is there, naming what was looked for; it is a ValueError.
        ValueError: when several are, and for a data.yaml that can't be used.
    """
    if folder.suffix.lower() in (".yaml", ".yml") and folder.is_file():
        return _open_yolo(folder, split)
    if not folder.is_dir():
        raise ValueError(f"data must be a folder, or a data.yaml, got {folder}")
    wanted: list[str] = []
    found: list[tuple[str, Path, Path]] = []
    pairs = [(images.format(split), file.format(split)) for images, file in COCO]
    pairs += [(name, f"{name}/{ROBOFLOW}") for name in ROBOFLOW_NAMES[split]]
    for images, file in pairs:
        what = f"{images}/ and {file}" if not file.startswith(images) else file
        wanted.append(what)
        if (folder / images).is_dir() and (folder / file).is_file():
            found.append((what, folder / images, folder / file))
    for name in YOLO:
        wanted.append(name)
        if (folder / name).is_file():
            found.append((name, folder, folder / name))
    if not found:
        raise NoSplitError(f"data must be a folder with {', or '.join(wanted)}; {folder} has none of them")
    if len(found) > 1:
        several = " as well as ".join(what for what, *_ in found)
        raise ValueError(
            f"data must be a folder in one layout, {folder} has {several}; give it the data.yaml itself, or keep one"
        )
    ((name, images_folder, annotations),) = found
    return _open_yolo(annotations, split) if name in YOLO else (images_folder, annotations)


def _open_yolo(file: Path, split: str) -> tuple[Path, YoloSplit]:
    opened = open_yolo(file, split)
    if opened is None:
        raise NoSplitError(f"{file}: must have {split}, the folder of its images or a list of them")
    return opened.root, opened


def read_split(
    annotations: Annotations,
    *,
    classes: Sequence[str] | None = None,
    mistakes: list[str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The images, categories and annotations of a split, checked, in COCO's format, whatever its layout.

    Args:
        annotations: of `find_split`.
        classes, mistakes: as `annotations.read_annotations`.
        progress: show a bar where many files are to be read.

    Raises:
        ValueError: for annotations that can't be used, naming file, place and value.
    """
    if isinstance(annotations, YoloSplit):
        return annotations.read(mistakes=mistakes, progress=progress)
    return read_annotations(annotations, classes=classes, mistakes=mistakes)


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of some names of files, as seen from a folder, that are not there.

    Each folder is listed, instead of asking for each file, which takes minutes on network disks.
    """
    parts = [os.path.split(folder / name) for name in names]
    present = {parent: set(os.listdir(parent)) for parent in {parent for parent, _ in parts} if os.path.isdir(parent)}
    return [
        name
        for name, (parent, last) in zip(names, parts, strict=True)
        if last not in present.get(parent, ()) and not (folder / name).is_file()
    ]
