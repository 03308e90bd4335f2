"""Detection data in YOLO's layout, as the annotations of COCO's format that all else reads.

    data.yaml                  names of the classes, and for every split the folders (or lists) of its images
    images/train/a.jpg         an image; folders may be nested, and called as one likes
    labels/train/a.txt         its boxes, one a line: class, centre x and y, width, height in parts of the upright image

A line of more numbers is a polygon, class x y x y x y …, and stands for the box around it. An image without a label
file has no boxes. The format is that of https://docs.ultralytics.com/datasets/detect/.
"""

from __future__ import annotations

import math
import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smca_kernels.tools.arguments import check_packages

from ..config import IMAGE_SUFFIXES
from .images import DataError, read_header

ROUNDING = 1e-4  # how far beyond 0…1 a number counts as rounded: twice what four decimals do
KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # of data.yaml
NOTHING = {"", "~", "null", "Null", "NULL"}
BOX = ("centre x", "centre y", "width", "height")
NO_LABELS = {"classes.txt"}  # which labelImg writes beside the labels
SHOWN = 5  # mistakes in one message


@dataclass(frozen=True)
class YoloSplit:
    """A split of a data.yaml; as text, where that is, for messages.

    Attributes:
        file: the data.yaml.
        key: of the split in it.
        root: the folder that the names of image files are relative to, where they are below it.
        names: of the classes; their places are the categories' ids.
        sources: folders of images, and text files that list images.
    """

    file: Path
    key: str
    root: Path
    names: tuple[str, ...]
    sources: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.file} ({self.key})"

    def read(self, *, mistakes: list[str] | None = None, progress: bool = False) -> dict[str, Any]:
        """The images, categories and annotations, as `annotations.read_annotations` gives those of a file.

        Images are numbered from 1, those of a folder in order of their paths. Sizes are those of upright images, read
        from the headers of their files. Boxes are in pixels.

        Args:
            mistakes: where to put what is wrong; lines, label files and images with mistakes are left out. None: they
                are an error.
            progress: show a bar, after a while.

        Raises:
            ValueError: naming the first files and lines with a mistake, and saying how many there are; when there are
                no images; when none of them has a label file.
            OSError: for a folder that can't be read.
        """
        from tqdm import tqdm

        found: list[str] = [] if mistakes is None else mistakes
        before = len(found)
        labels = LabelFiles()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        paths = list(self._images(found))
        if not paths and len(found) == before:
            places = ", ".join(map(str, self.sources))
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{self}: images ({suffixes}) must be in {places}, which has none")
        image_of: dict[Path, Path] = {}  # by label file
        for path in tqdm(paths, desc=f"{self.key}: sizes and boxes", unit="image", disable=not progress, delay=2):
            label_file = labels.of(path)
            if label_file is not None and image_of.setdefault(label_file, path) != path:
                found.append(f"{label_file}: the boxes can't be those of both {image_of[label_file]} and {path}")
                continue
            try:
                header = read_header(path)
            except DataError as error:
                found.append(str(error))
                continue
            number = len(images) + 1
            images.append({"id": number, "file_name": self._name(path), "height": header.height, "width": header.width})
            if label_file is None:
                continue
            for category, box in read_labels(label_file, self, found):
                x, y, width, height = box
                width, height = width * header.width, height * header.height
                bbox = [x * header.width - width / 2, y * header.height - height / 2, width, height]
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": bbox}
                annotations.append(annotation | {"area": width * height, "iscrowd": 0})
        if not image_of and paths:
            found.append(
                f"{self}: no image has a label file; that of {paths[0]} was looked for as "
                f"{' and '.join(str(folder / paths[0].stem) + '.txt' for folder in label_folders(paths[0].parent))}"
            )
        if mistakes is None and found:
            more = f"\n… and {len(found) - SHOWN} more; `smca data check` lists them" if len(found) > SHOWN else ""
            raise ValueError("\n".join(found[:SHOWN]) + more)
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names)]
        return {"images": images, "categories": categories, "annotations": annotations}

    def labels_without_image(self) -> list[Path]:
        """The label files in the folders of labels that no image of the split has."""
        labels = LabelFiles()
        used = {labels.of(path) for path in self._images([])}
        unused = []
        for source in filter(Path.is_dir, self.sources):
            folder = next((each for each in label_folders(source) if each.is_dir()), source)
            texts = (file for file in _walk(folder) if file.suffix.lower() == ".txt")
            unused += [file for file in texts if file not in used and file.name not in NO_LABELS]
        return unused

    def _name(self, path: Path) -> str:
        """An image's path as seen from `root`."""
        try:
            return str(path.relative_to(self.root))
        except ValueError:
            return str(path.absolute())

    def _images(self, mistakes: list[str]) -> Iterator[Path]:
        for source in self.sources:
            if source.is_dir():
                yield from find_images(source)
            else:
                yield from _listed(source, self.root, mistakes)


class LabelFiles:
    """The label files of images, by listing each folder once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, Path]] = {}  # folder of images: label files by stem

    def of(self, image: Path) -> Path | None:
        """The label file of an image, None where it has none."""
        return self.beside(image.parent).get(image.stem)

    def beside(self, folder: Path) -> dict[str, Path]:
        """The label files for the images of a folder, by stem."""
        if folder not in self._listed:
            labels = next((each for each in label_folders(folder) if each.is_dir()), folder)
            files = sorted(os.listdir(labels)) if labels.is_dir() else []
            self._listed[folder] = {Path(n).stem: labels / n for n in files if n.lower().endswith(".txt")}
        return self._listed[folder]


def label_folders(folder: Path) -> list[Path]:
    """Where the labels of a folder of images may be, the first that is there: the mirrored folder, or the same one.

    The last part `images` of its path becomes `labels`.
    """
    # `images` may be a part that a relative path leaves out.
    for parts in (folder.parts, folder.absolute().parts):
        if "images" in parts:
            last = len(parts) - 1 - parts[::-1].index("images")
            return [Path(*parts[:last], "labels", *parts[last + 1 :]), folder]
    return [folder]


def find_images(folder: Path) -> Iterator[Path]:
    """The image files in a folder and those inside it, in order of their paths; hidden ones are none.

    Links are followed, but those that lead back to a folder around them.
    """
    return (file for file in _walk(folder) if file.suffix.lower() in IMAGE_SUFFIXES)


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _leads_back(os.path.join(parent, name))
        )
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _leads_back(path: str) -> bool:
    return os.path.islink(path) and f"{os.path.realpath(os.path.dirname(path))}{os.sep}".startswith(
        f"{os.path.realpath(path).rstrip(os.sep)}{os.sep}"
    )


def _listed(file: Path, root: Path, mistakes: list[str]) -> Iterator[Path]:
    """The images that a text file lists, a path a line, from its own folder or from `root`."""
    listings: dict[Path, frozenset[str]] = {}

    def exists(path: Path) -> bool:
        if path.parent not in listings:
            listings[path.parent] = frozenset(os.listdir(path.parent) if path.parent.is_dir() else ())
        return path.name in listings[path.parent]

    for number, line in _lines(file, mistakes):
        candidates = [_join(base, form) for form in _forms(line) for base in (file.parent, root)]
        image = next((path for path in candidates if exists(path)), None)
        if image is None:
            mistakes.append(f"{file}, line {number}: there is no image {line}, neither from {file.parent} nor {root}")
        elif image.suffix.lower() not in IMAGE_SUFFIXES:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            mistakes.append(f"{file}, line {number}: images must be {suffixes}, got {line}")
        else:
            yield image


def _forms(path: str) -> list[str]:
    """A path as written, and as Windows would read it."""
    return [path] if os.sep == "\\" or "\\" not in path else [path, path.replace("\\", "/")]


def _join(base: Path, path: str) -> Path:
    return Path(os.path.normpath(base / path))


# ---------------------------------------------------------------------------------------------------------- label files


def read_labels(file: Path, split: YoloSplit, mistakes: list[str]) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Class and box (centre x and y, width, height, in 0…1) of each line of a label file that has no mistake."""
    for number, line in _lines(file, mistakes):
        try:
            parsed = _parse(line, split)
        except ValueError as error:
            mistakes.append(f"{file}, line {number}: {error}")
            continue
        yield parsed


def _lines(file: Path, mistakes: list[str]) -> Iterator[tuple[int, str]]:
    """Number and text of the lines of a file that are not blank."""
    try:
        content = file.read_bytes()
    except OSError as error:
        mistakes.append(f"{file} can't be read: {error.strerror}")
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        mistakes.append(f"{file}, line {number}: text must be UTF-8, got the byte 0x{content[error.start]:02x}")
        return
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line := line.strip():
            yield number, line


def _parse(line: str, split: YoloSplit) -> tuple[int, tuple[float, ...]]:
    tokens = line.split()
    numbers = [_number(token) for token in tokens]
    category, coordinates = numbers[0], numbers[1:]
    if category != int(category) or category < 0:
        raise ValueError(f"class must be a whole number from 0, got {_short(tokens[0])}")
    if category >= len(split.names):
        raise ValueError(f"class {category:.0f}, but {split.file.name} names {len(split.names)}")
    box = len(coordinates) == len(BOX)
    if not box and (len(coordinates) < 6 or len(coordinates) % 2):
        raise ValueError(
            f"must be class and {', '.join(BOX)}, or class and the x and y of three points or more, got "
            f"{len(numbers)} numbers"
        )
    for place, value in enumerate(coordinates):
        if not -ROUNDING <= value <= 1 + ROUNDING:
            name = BOX[place] if box else f"{'xy'[place % 2]} of point {place // 2 + 1}"
            raise ValueError(
                f"{name} must be in parts of the image, 0 to 1 (within {ROUNDING:g}), got {tokens[1 + place]}"
            )
    coordinates = [min(max(value, 0.0), 1.0) for value in coordinates]
    if not box:
        low, high = zip(*((min(axis), max(axis)) for axis in (coordinates[::2], coordinates[1::2])), strict=True)
        coordinates = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        coordinates += [b - a for a, b in zip(low, high, strict=True)]
    return int(category), tuple(coordinates)


def _number(token: str) -> float:
    try:
        value = float(token)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be numbers with blanks between them, got {_short(token)}")
    return value


# ------------------------------------------------------------------------------------------------------------ data.yaml


def open_yolo(file: Path, split: str) -> YoloSplit | None:
    """A split, "train", "val" or "test", of a data.yaml; None where it names none.

    Raises:
        ValueError: for a file that can't be used, naming the line and the value; for sources that are not there.
    """
    settings, line_of = read_yaml(file)
    names = _names(settings, line_of, file)
    if "kpt_shape" in settings:
        raise ValueError(f"{file}, line {line_of['kpt_shape']}: labels must be boxes or polygons, not keypoints")
    key = next((key for key in KEYS[split] if not _is_nothing(settings.get(key))), None)
    if key is None:
        return None
    where = f"{file}, line {line_of[key]}"
    value = settings[key]
    given = value if isinstance(value, list) else [value]
    if not given or not all(isinstance(each, str) for each in given):
        raise ValueError(f"{where}: {key} must be a folder, a list of images (.txt), or several, got {_short(value)}")
    root = _root(settings, line_of, file)
    sources = []
    for each in given:
        # Roboflow writes ../train/images for what is beside data.yaml.
        forms = [form for path in _forms(each) for form in (path, path.removeprefix("../"))]
        candidates = list(dict.fromkeys(_join(root, form) for form in forms))
        source = next((path for path in candidates if path.exists()), None)
        if source is None:
            raise ValueError(f"{where}: {key} is {each}, but there is no {' and no '.join(map(str, candidates))}")
        if source.is_file() and source.suffix.lower() != ".txt":
            raise ValueError(f"{where}: {key} must be folders and lists of images (.txt), got the file {source}")
        sources.append(source)
    return YoloSplit(file, key, root, names, tuple(sources))


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The keys and values of a YAML file, and the line of each key.

    Numbers, no and null stay the text that they are written as, so that they can be names. No tag makes an object.

    Raises:
        ValueError: for a file that can't be read, or is no mapping.
    """
    check_packages(("yaml",), "model")
    import yaml

    try:
        loader = yaml.SafeLoader(file.read_bytes())
        try:
            loader.yaml_implicit_resolvers = {}
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ValueError(f"{file}: must be keys and values, such as train, val and names")
            try:
                settings: dict[str, Any] = loader.construct_document(node)
            # PyYAML raises whatever comes of a value that doesn't fit its tag: !!bool x, !!int "", !!timestamp x.
            except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
                raise ValueError(f"{file}: every value must fit its tag, such as !!int ({error})") from None
        finally:
            loader.dispose()
    except OSError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{file}: lists and mappings are nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{file}{line}: must be YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # of the encoding
        raise ValueError(f"{file}: must be YAML in UTF-8: {' '.join(str(error).split())}") from None
    return settings, {key.value: key.start_mark.line + 1 for key, _ in node.value}


def _names(settings: dict[str, Any], line_of: dict[str, int], file: Path) -> tuple[str, ...]:
    names = settings.get("names")
    if _is_nothing(names):
        raise ValueError(f"{file}: must have names, the list of the classes")
    where = f"{file}, line {line_of['names']}"
    if isinstance(names, dict):
        wanted = [str(number) for number in range(len(names))]
        if set(names) != set(wanted):
            got = [key for key in names if key not in wanted]
            raise ValueError(f"{where}: names must be numbered 0 to {len(names) - 1}, got {_short(got)}")
        names = [names[number] for number in wanted]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{where}: names must be a list of texts, or number them, got {_short(names)}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: each of names must be there once, repeated: {_short(repeated)}")
    number = settings.get("nc")
    if not _is_nothing(number) and number != str(len(names)):
        raise ValueError(f"{file}, line {line_of['nc']}: nc is {_short(number)}, but names has {len(names)} classes")
    return tuple(names)


def _root(settings: dict[str, Any], line_of: dict[str, int], file: Path) -> Path:
    """The folder that a data.yaml calls path, from its own folder; that folder itself where it calls none."""
    path = settings.get("path")
    if _is_nothing(path):
        return file.parent
    where = f"{file}, line {line_of['path']}"
    if not isinstance(path, str):
        raise ValueError(f"{where}: path must be a folder, got {_short(path)}")
    root = next((base for form in _forms(path) if (base := _join(file.parent, form)).is_dir()), None)
    if root is None:
        warnings.warn(f"{where}: path is {path}, which is not there; {file.parent} is taken for it", stacklevel=2)
        return file.parent
    return root


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in NOTHING)


def _short(value: object) -> str:
    """A value in few characters, however deep it is and however often its parts are the same."""
    form = reprlib.Repr()
    form.maxlevel = 2
    return form.repr(value)
