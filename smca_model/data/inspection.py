"""What is in a data folder, and what is wrong with it: every annotation read, every image decoded."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .annotations import some_of
from .coco import CocoDetection
from .images import DataError, load_annotated_image, read_header
from .layouts import Annotations, NoSplitError, find_split, missing_files, read_split
from .yolo import YoloSplit, find_images

SPLITS = ("train", "val", "test")
AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}  # COCO's, in pixels
AT_ONCE = 1000  # images that wait to be decoded


@dataclass
class Split:
    """What is in a split, and what is wrong with it.

    Attributes:
        name: train, val or test.
        annotations: where they are.
        errors: what training would refuse.
        warnings: what it would not.
        classes: names, in order of the labels.
        images: entries of COCO's format: id, file_name, height, width; none where annotations can't be read.
        boxes: [n, 4] x, y, width, height in pixels; those of crowds are not among them.
        labels, rows: [n] the class of each box, and the place of its image in `images`.
        areas: counts of small, medium and large boxes.
        crowds: number of them.
        empty: images without boxes.
        digests: hash of each image file's content, by file name, of those that can be decoded.
    """

    name: str
    folder: Path
    annotations: Annotations
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    images: list[dict[str, Any]] = field(default_factory=list)
    boxes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    areas: dict[str, int] = field(default_factory=dict)
    crowds: int = 0
    empty: int = 0
    digests: dict[str, bytes] = field(default_factory=dict)

    @property
    def upright(self) -> bool:
        """Whether boxes are those of upright images, whatever else is said."""
        return isinstance(self.annotations, YoloSplit)

    @property
    def counts(self) -> dict[str, int]:
        """Boxes of each class, by name."""
        counted = Counter(self.labels.tolist())
        return {name: counted[label] for label, name in enumerate(self.classes)}


@dataclass
class Report:
    """The splits of a data folder, and what is wrong with them together."""

    splits: list[Split]
    errors: list[str]
    warnings: list[str]

    @property
    def all_errors(self) -> list[str]:
        """Those of the splits included."""
        return [*self.errors, *(error for split in self.splits for error in split.errors)]

    @property
    def all_warnings(self) -> list[str]:
        """Those of the splits included."""
        return [*self.warnings, *(warning for split in self.splits for warning in split.warnings)]


def check_data(folder: Path, *, upright: bool = False, progress: bool = True) -> Report:
    """Read every annotation and decode every image of a data folder.

    Args:
        folder: as `layouts.find_split` takes it.
        upright: as in training.
        progress: show bars.

    Raises:
        ValueError: when neither train nor val is there, naming what was looked for.
    """
    report = Report([], [], [])
    for name in SPLITS:
        told = ""
        try:
            with _telling(report.warnings):
                report.splits.append(Split(name, *find_split(folder, name)))
        except NoSplitError as error:
            told = "" if name == "test" else str(error)
        except ValueError as error:
            told = str(error)
        report.errors += [told] if told else []
    report.errors, report.warnings = list(dict.fromkeys(report.errors)), list(dict.fromkeys(report.warnings))
    if not report.splits:
        raise ValueError("\n".join(report.errors))
    classes: tuple[str, ...] | None = None
    for split in report.splits:
        _read(split, classes, upright, progress)
        classes = classes or split.classes or None
    _compare(report)
    return report


def _read(split: Split, classes: Sequence[str] | None, upright: bool, progress: bool) -> None:
    try:
        data = read_split(split.annotations, classes=classes, mistakes=split.errors, progress=progress)
    except ValueError as error:
        split.errors.append(str(error))
        return
    split.images = data["images"]
    categories = sorted(data["categories"], key=lambda category: category["id"])
    split.classes = tuple(category["name"] for category in categories)
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    row_of = {image["id"]: row for row, image in enumerate(split.images)}
    objects = [each for each in data["annotations"] if not each["iscrowd"]]
    split.crowds = len(data["annotations"]) - len(objects)
    split.boxes = np.array([each["bbox"] for each in objects], float).reshape(-1, 4)
    split.labels = np.array([label_of[each["category_id"]] for each in objects], int)
    split.rows = np.array([row_of[each["image_id"]] for each in objects], int)
    split.empty = len(split.images) - len(np.unique(split.rows))
    areas = np.array([each["area"] for each in objects], float)
    split.areas = {name: int(((areas >= low) & (areas < high)).sum()) for name, (low, high) in AREAS.items()}

    names = [image["file_name"] for image in split.images]
    missing = missing_files(split.folder, names)
    split.errors += [f"{split.annotations}: there is no image {split.folder / name}" for name in missing]
    _warn_of_boxes(split)
    _warn_of_files(split)
    _decode(split, set(missing), upright, progress)
    besides, lacking = set(split.classes) - set(classes or split.classes), set(classes or ()) - set(split.classes)
    if besides or lacking:
        split.errors.append(
            f"{split.annotations}: classes must be those of the splits before; "
            f"{some_of(sorted(besides)) or 'none'} are new, {some_of(sorted(lacking)) or 'none'} are missing"
        )
    if split.errors:
        return
    try:  # the last word is that of what training opens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CocoDetection(split.folder, split.annotations, train=False, classes=classes)
    except ValueError as error:
        split.errors.append(str(error))


def _warn_of_boxes(split: Split) -> None:
    sides = np.array([(each["width"], each["height"]) for each in split.images], float).reshape(-1, 2)[split.rows]
    low, size = split.boxes[:, :2], split.boxes[:, 2:]
    flat = np.any(size <= 0, axis=1)
    # Less than a pixel is rounding in the file, as in training.
    beyond = np.any((low < -1) | (low + size > sides + 1), axis=1) & ~flat
    keys = np.column_stack([split.rows, split.labels, split.boxes])
    _, place, count = np.unique(keys, axis=0, return_index=True, return_counts=True)
    repeated = np.zeros(len(keys), bool)
    repeated[place[count > 1]] = True
    for wrong, what in (
        (flat, "boxes have no width or height, and are left out"),
        (np.any(size < 1, axis=1) & ~flat, "boxes have a side of less than a pixel"),
        (beyond, "boxes reach beyond their image, and are clipped"),
        (repeated, "boxes are there more than once, with the same class"),
    ):
        if wrong.any():
            files = [split.images[row]["file_name"] for row in np.unique(split.rows[wrong])]
            split.warnings.append(f"{split.name}: {wrong.sum()} of {len(flat)} {what}: in {some_of(files)}")


def _warn_of_files(split: Split) -> None:
    names = Counter(os.path.normpath(image["file_name"]) for image in split.images)
    if twice := [name for name, count in names.items() if count > 1]:
        split.warnings.append(f"{split.name}: {len(twice)} images are listed more than once: {some_of(twice)}")
    if isinstance(split.annotations, YoloSplit):
        if unused := split.annotations.labels_without_image():
            split.warnings.append(f"{split.name}: {len(unused)} label files have no image: {some_of(unused)}")
    elif split.folder.is_dir():
        there = (os.path.relpath(path, split.folder) for path in find_images(split.folder))
        if unlisted := [name for name in there if name not in names]:
            split.warnings.append(
                f"{split.name}: {len(unlisted)} images in {split.folder} are not in {split.annotations}: "
                f"{some_of(unlisted)}"
            )


def _decode(split: Split, missing: set[str], upright: bool, progress: bool) -> None:
    """Decode the images, hash their files, and note what is wrong with them."""
    upright = upright or split.upright

    def examine(entry: dict[str, Any]) -> tuple[str, bytes, int, str | None]:
        path = split.folder / entry["file_name"]
        try:
            size = (entry["height"], entry["width"])
            load_annotated_image(path, size, annotations=split.annotations, upright=upright)
            with open(path, "rb") as file:
                digest = hashlib.blake2b(usedforsecurity=False)
                while part := file.read(1 << 20):
                    digest.update(part)
            return entry["file_name"], digest.digest(), read_header(path).orientation, None
        except (DataError, OSError) as error:
            return entry["file_name"], b"", 1, str(error)

    Image.init()  # which threads would do all at once
    present = {entry["file_name"]: entry for entry in split.images if entry["file_name"] not in missing}
    turned = []
    # Closed, or what ends the loop would wait for the images at hand to be decoded.
    with closing(_in_threads(examine, list(present.values()))) as results:
        bar = tqdm(results, total=len(present), desc=f"{split.name}: images", unit="image", disable=not progress)
        for name, digest, orientation, error in bar:
            if error is not None:
                split.errors.append(error)
                continue
            split.digests[name] = digest
            if orientation != 1:
                turned.append(name)
    if turned:
        form = "upright" if upright else "as stored, unless their size says that they are upright"
        split.warnings.append(
            f"{split.name}: {len(turned)} images are turned by their EXIF orientation; boxes are taken to be those of "
            f"the images {form}: {some_of(turned)}"
        )
    same: dict[bytes, list[str]] = defaultdict(list)
    for name, digest in split.digests.items():
        same[digest].append(name)
    if copies := [names for names in same.values() if len(names) > 1]:
        told = some_of([" = ".join(names[:3]) for names in copies])
        split.warnings.append(f"{split.name}: {len(copies)} images are there under several names: {told}")


def _in_threads(
    function: Callable[[dict[str, Any]], Any], entries: Sequence[dict[str, Any]]
) -> Generator[Any, None, None]:
    """A function's results, in order; decoders and hashes let other threads run."""
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for start in range(0, len(entries), AT_ONCE):
            yield from executor.map(function, entries[start : start + AT_ONCE])


def _compare(report: Report) -> None:
    for i, one in enumerate(report.splits):
        for other in report.splits[i + 1 :]:
            names = {digest: name for name, digest in one.digests.items()}
            common = [f"{names[d]} = {name}" for name, d in other.digests.items() if d in names]
            if common:
                report.warnings.append(
                    f"{len(common)} images of {other.name} are in {one.name} too, to the byte: {some_of(common)}"
                )
    for split in report.splits:
        unused = [name for name, count in split.counts.items() if not count]
        if unused:
            report.warnings.append(f"{split.name}: {len(unused)} classes have no boxes: {some_of(unused)}")


@contextmanager
def _telling(told: list[str]) -> Iterator[None]:
    """Put warnings into a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told += [str(each.message) for each in caught]
