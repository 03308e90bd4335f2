"""Annotations in COCO's format: read from a file and checked, and as pycocotools takes them."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import format_size

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MAX_SIDE = 2**31 - 1  # pixels; no file format has more


def read_annotations(
    path: Path, *, classes: Sequence[str] | None = None, mistakes: list[str] | None = None
) -> dict[str, Any]:
    """The images, categories and annotations of a file, checked; without masks, with every area and iscrowd.

    A category that no annotation uses is a category like others, but for the name of a whole project among them, which
    Roboflow writes as one: of supercategory "none", and the supercategory of others. It is left out.

    Args:
        path: the file.
        classes: names that are known to be those of categories; a project's name among them is left in.
        mistakes: where to put what is wrong with annotations, which are left out then. None: it is an error.

    Raises:
        ValueError: for a file that can't be read or is not in COCO's format, naming the first entry that is wrong.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"annotations must be a file that can be read, got {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # the second for brackets a thousand deep
        raise ValueError(f"annotations must be JSON, got {path}: {error}") from None
    parts = ("images", "categories", "annotations")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in parts):
        raise ValueError(f"annotations must be a JSON object with the lists {', '.join(parts)}, got {path}")
    fields = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "categories": {"id": int, "name": str},
        "annotations": {"image_id": int, "category_id": int, "bbox": list},
    }
    for part, kinds in fields.items():
        for place, entry in enumerate(data[part]):
            for field, kind in kinds.items():
                value = entry.get(field) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(
                        f"{path}: {part}[{place}] must have {field} ({kind.__name__}), got {_short(entry)}"
                    )
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise ValueError(f"{path}: {part}[{place}]: {field} must fit 64 bits, got {_short(value)}")
    _leave_out_project(data, classes or ())
    for part, field in (("images", "id"), ("categories", "id"), ("categories", "name")):
        values = [entry[field] for entry in data[part]]
        if len(set(values)) < len(values):
            repeated = [value for value, count in Counter(values).items() if count > 1]
            raise ValueError(f"{path}: each {field} in {part} must be there once, repeated: {some_of(repeated)}")
    for part in ("images", "categories"):
        if not data[part]:
            raise ValueError(f"{path}: {part} must not be empty")
    for place, entry in enumerate(data["images"]):
        for field in ("height", "width"):
            if not 1 <= entry[field] <= MAX_SIDE:
                raise ValueError(
                    f"{path}: images[{place}], id {entry['id']}: {field} must be 1 to {MAX_SIDE} pixels, "
                    f"got {entry[field]}"
                )
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    right: list[dict[str, Any]] = []
    for annotation in data["annotations"]:
        annotation.pop("segmentation", None)
        try:
            _check_annotation(annotation, sizes, names, path)
        except ValueError as error:
            if mistakes is None:
                raise
            mistakes.append(str(error))
        else:
            right.append(annotation)
    return {"images": data["images"], "categories": data["categories"], "annotations": right}


def _leave_out_project(data: dict[str, Any], classes: Sequence[str]) -> None:
    categories = data["categories"]
    groups = {str(category.get("supercategory")) for category in categories} - {"none"}
    used = {annotation["category_id"] for annotation in data["annotations"]}
    names = Counter(category["name"] for category in categories)
    data["categories"] = [
        category
        for category in categories
        if category.get("supercategory") != "none"
        or category["name"] not in groups
        or category["id"] in used
        or (category["name"] in classes and names[category["name"]] == 1)
    ]


def _check_annotation(
    annotation: dict[str, Any], sizes: dict[int, tuple[int, int]], names: dict[int, str], path: Path
) -> None:
    """Refuse an annotation with a value that can't be; give it an area and iscrowd where it has none."""
    image, category, bbox = annotation["image_id"], annotation["category_id"], annotation["bbox"]
    what = f"{path}: annotation {annotation.get('id', '')} of image {image}"
    if image not in sizes:
        raise ValueError(f"{what}: there is no image of that id")
    if category not in names:
        known = ", ".join(f"{number} {name}" for number, name in names.items())
        raise ValueError(f"{what}: category_id must be one of the categories ({known}), got {category}")
    if len(bbox) != 4 or not all(map(_is_finite, bbox)) or min(bbox[2:]) < 0:
        raise ValueError(f"{what}: bbox must be [x, y, width, height] in pixels, got {_short(bbox, repr)}")
    if any(isinstance(v, int) and abs(v) > 2**53 for v in bbox):  # more than NumPy and PyTorch take as an int
        bbox = annotation["bbox"] = [float(v) for v in bbox]
    x, y, width, height = bbox
    rows, columns = sizes[image]
    if min(width, height) > 0 and not (x < columns and y < rows and x + width > 0 and y + height > 0):
        raise ValueError(
            f"{what}: bbox [x, y, width, height] = {bbox} lies outside the image, {format_size(rows, columns)}"
        )
    crowd, area = annotation.get("iscrowd"), annotation.get("area")
    if crowd is not None and not (_is_finite(crowd) and crowd in (0, 1)):
        raise ValueError(f"{what}: iscrowd must be 0 or 1, or absent, got {_short(crowd)}")
    if area is not None and not (_is_finite(area) and area >= 0):
        raise ValueError(f"{what}: area must be a number of square pixels, or absent, got {_short(area)}")
    annotation["iscrowd"] = int(crowd or 0)
    annotation["area"] = width * height if area is None else area


def _is_finite(value: object) -> bool:
    """Whether a value is a number, and one that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def make_coco(data: dict[str, Any]) -> COCO:
    """pycocotools' object for a dict in COCO's format, without what it would print."""
    from pycocotools.coco import COCO  # what evaluates needs it, what detects does not

    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def some_of(values: Sequence[object], shown: int = 5) -> str:
    """The first values of a list, for a message."""
    return ", ".join(map(str, values[:shown])) + (", …" if len(values) > shown else "")


def _short(entry: object, form: Callable[[object], str] = json.dumps, length: int = 200) -> str:
    text = form(entry)
    return text if len(text) <= length else text[:length] + "…"
