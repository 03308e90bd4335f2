"""The inspection of a data folder: its counts are right, and each thing that is wrong with it is told, by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from coco_folder import CATEGORIES, annotation, write_coco
from PIL import Image
from yolo_folder import SETTINGS, write_image, write_yolo

from smca_model.data import inspection
from smca_model.data.inspection import Report, check_data

BOX = "1 0.5 0.5 0.5 0.25"


def checked(folder: Path, **options: Any) -> Report:
    return check_data(folder, progress=False, **options)


def of_coco(folder: Path, objects: list[dict[str, Any]], **parts: Any) -> Report:
    """The report on these objects as val, beside a train that has nothing wrong with it."""
    sizes = {1: (40, 60)}
    good = [annotation(i, 1, category["id"], [i, 2, 20, 20]) for i, category in enumerate(CATEGORIES, 1)]
    images, _ = write_coco(folder, good, sizes=sizes, split="train")
    Image.fromarray(np.full((40, 60, 3), 7, np.uint8)).save(images / "1.png")  # val has another shade
    write_coco(folder, objects, **{"sizes": sizes, **parts})
    return checked(folder)


def of_yolo(folder: Path, labels: dict[str, str | bytes | None]) -> Report:
    """The report on these images, beside others of another size that have nothing wrong with them."""
    write_yolo(folder, {"train/t.png": f"{BOX}\n0 0.5 0.5 0.5 0.5", "val/v.png": f"{BOX}\n0 0.5 0.5 0.5 0.5"})
    write_image(folder / "images" / "val" / "v.png", (41, 60))
    write_yolo(folder, labels, size=(50, 50))
    return checked(folder)


def test_data_with_nothing_wrong_has_neither_errors_nor_warnings(tmp_path: Path) -> None:
    for report in (
        of_coco(tmp_path / "coco", [annotation(1, 1, 7, [1, 2, 20, 20]), annotation(2, 1, 3, [3, 3, 20, 20])]),
        of_yolo(tmp_path / "yolo", {}),
    ):
        assert (report.all_errors, report.all_warnings) == ([], [])
        assert [split.name for split in report.splits] == ["train", "val"]


def test_counts_are_those_of_images_boxes_classes_and_sizes(tmp_path: Path) -> None:
    sizes = {1: (200, 300), 2: (100, 150), 3: (200, 300)}
    sides = [31, 32, 95, 96, 120]
    objects = [annotation(i, 1 + i % 2, 7, [0, 0, side, side]) for i, side in enumerate(sides)]
    objects += [annotation(9, 1, 3, [0, 0, 50, 50], area=9), {**annotation(10, 1, 3, [0, 0, 99, 99]), "iscrowd": 1}]
    split = of_coco(tmp_path, objects, sizes=sizes).splits[1]
    assert (len(split.images), split.empty, split.crowds) == (3, 1, 1)
    assert split.counts == {"dog": 1, "cat": 5}
    assert split.areas == {"small": 2, "medium": 2, "large": 2}


def test_a_test_split_is_read_where_there_is_one(tmp_path: Path) -> None:
    both = f"{BOX}\n0 0.5 0.5 0.5 0.5"
    labels: dict[str, str | bytes | None] = {"train/a.png": both, "val/a.png": both, "exam/a.png": both}
    write_yolo(tmp_path, labels, settings=f"{SETTINGS}test: images/exam\n")
    assert [split.name for split in checked(tmp_path).splits] == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("objects", "told"),
    [
        ([[0, 0, 0, 9]], "val: 1 of 3 boxes have no width or height, and are left out: in 1.png"),
        ([[5, 5, 0.5, 9]], "val: 1 of 3 boxes have a side of less than a pixel: in 1.png"),
        ([[70, 5, 0, 9]], "val: 1 of 3 boxes have no width or height, and are left out: in 1.png"),
        ([[50, 5, 20, 9]], "val: 1 of 3 boxes reach beyond their image, and are clipped: in 1.png"),
        (
            [[5, 5, 9, 9], [5, 5, 9, 9], [5, 5, 9, 9]],
            "val: 1 of 5 boxes are there more than once, with the same class: in 1.png",
        ),
    ],
)
def test_suspicious_boxes_are_warned_of(tmp_path: Path, objects: list[list[float]], told: str) -> None:
    good = [annotation(1, 1, 7, [1, 2, 20, 20]), annotation(2, 1, 3, [5, 5, 9, 9.5])]
    report = of_coco(tmp_path, good + [annotation(i, 1, 3, box) for i, box in enumerate(objects, 3)])
    assert (report.all_errors, report.all_warnings) == ([], [told])


def test_wrong_annotations_are_listed_one_by_one(tmp_path: Path) -> None:
    objects = [annotation(1, 5, 3, [0, 0, 9, 9]), annotation(2, 1, 3, [90, 0, 9, 9]), annotation(3, 1, 7, [0, 0, 9, 9])]
    report = of_coco(tmp_path, objects)
    assert len(report.all_errors) == 2
    assert "val.json: annotation 1 of image 5: there is no image of that id" in report.all_errors[0]
    assert "annotation 2 of image 1: bbox [x, y, width, height] = [90, 0, 9, 9] lies outside" in report.all_errors[1]
    assert report.all_warnings == ["val: 1 classes have no boxes: dog"]


def test_wrong_lines_of_labels_are_listed_one_by_one(tmp_path: Path) -> None:
    report = of_yolo(tmp_path, {"val/a.png": "9 0 0 0 0\ncat", "train/b.png": f"0 0.5 0.5 0.5\n{BOX}"})
    told = [error.rpartition("labels")[2].replace("\\", "/") for error in report.all_errors]
    assert [each.partition(":")[0] for each in told] == [
        "/train/b.txt, line 1",
        "/val/a.txt, line 1",
        "/val/a.txt, line 2",
    ]


@pytest.mark.parametrize("damage", ["cut off", "no image"])
def test_images_that_can_not_be_decoded_are_listed_and_the_rest_is_read(tmp_path: Path, damage: str) -> None:
    images = {"val/a.png": BOX, "val/b.png": BOX, "val/c.png": f"{BOX}\n0 0.5 0.5 0.25 0.5"}
    of_yolo(tmp_path, images)
    for name in ("a", "b"):
        path = tmp_path / "images" / "val" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:60] if damage == "cut off" else b"GIF89a, or is it?")
    report = checked(tmp_path)
    assert len(report.all_errors) == 2
    assert [f"{name}.png can't be read: " in error for name, error in zip("ab", report.all_errors, strict=True)] == [
        True,
        True,
    ]
    assert len(report.splits[1].digests) == 2  # c and v


def test_an_image_of_another_size_than_annotated_is_an_error(tmp_path: Path) -> None:
    objects = [annotation(1, 1, 7, [1, 2, 20, 20]), annotation(2, 1, 3, [3, 3, 20, 20])]
    entry = {"id": 1, "file_name": "1.png", "height": 60, "width": 40}
    (error,) = of_coco(tmp_path, objects, images=[entry]).all_errors
    assert "must be of the size in" in error


def test_images_that_are_not_there_or_not_listed_are_told(tmp_path: Path) -> None:
    objects = [annotation(1, 1, 7, [1, 2, 20, 20]), annotation(2, 1, 3, [3, 3, 20, 20])]
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    of_coco(tmp_path, objects, images=images)
    write_image(tmp_path / "val" / "more" / "9.png", (40, 60))
    report = checked(tmp_path)
    (error,) = report.all_errors
    assert error.endswith(f"val.json: there is no image {tmp_path / 'val' / '2.png'}")
    (warning,) = report.all_warnings
    assert warning.startswith("val: 1 images in")
    assert warning.endswith(f"are not in {tmp_path / 'annotations' / 'val.json'}: {Path('more', '9.png')}")


def test_labels_without_an_image_are_told(tmp_path: Path) -> None:
    of_yolo(tmp_path, {})
    for name in ("none.txt", "classes.txt", "deep/none.txt"):
        (tmp_path / "labels" / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "labels" / "val" / name).write_text(BOX)
    (warning,) = checked(tmp_path).all_warnings
    assert warning.startswith("val: 2 label files have no image: ")
    assert "classes.txt" not in warning


def test_images_listed_twice_are_told(tmp_path: Path) -> None:
    both = f"{BOX}\n0 0.5 0.5 0.5 0.5"
    write_yolo(tmp_path, {"train/a.png": both, "val/b.png": both}, settings=SETTINGS.replace("images/val", "val.txt"))
    write_image(tmp_path / "images" / "val" / "b.png", (30, 30))
    (tmp_path / "val.txt").write_text("images/val/b.png\n./images/val/b.png\n")
    report = checked(tmp_path)
    assert report.all_errors == []
    assert report.all_warnings == [f"val: 1 images are listed more than once: {Path('images', 'val', 'b.png')}"]


def test_the_same_image_under_two_names_is_told_in_a_split_and_across_splits(tmp_path: Path) -> None:
    report = of_yolo(tmp_path, {"val/a.png": BOX, "val/b.png": BOX, "train/c.png": BOX})
    a, b, c = (str(Path("images", *name.split("/"))) for name in ("val/a.png", "val/b.png", "train/c.png"))
    assert report.all_warnings == [
        f"2 images of val are in train too, to the byte: {c} = {a}, {c} = {b}",
        f"val: 1 images are there under several names: {a} = {b}",
    ]


def test_classes_without_boxes_are_told(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"train/a.png": BOX, "val/b.png": f"{BOX}\n0 0.5 0.5 0.5 0.5"})
    write_image(tmp_path / "images" / "val" / "b.png", (30, 30))
    assert checked(tmp_path).all_warnings == ["train: 1 classes have no boxes: cat"]


def test_turned_images_are_told_with_the_form_that_boxes_are_of(tmp_path: Path) -> None:
    of_yolo(tmp_path / "yolo", {"val/a.png": BOX})
    write_image(tmp_path / "yolo" / "images" / "val" / "a.png", (50, 50), orientation=6)
    (warning,) = checked(tmp_path / "yolo").all_warnings
    assert "val: 1 images are turned by their EXIF orientation; boxes are taken to be those of" in warning
    assert "the images upright: " in warning
    of_coco(tmp_path / "coco", [annotation(1, 1, 7, [1, 2, 20, 20]), annotation(2, 1, 3, [3, 3, 20, 20])])
    write_image(tmp_path / "coco" / "val" / "1.png", (40, 60), orientation=3)
    (warning,) = checked(tmp_path / "coco").all_warnings
    assert "the images as stored, unless" in warning
    (warning,) = checked(tmp_path / "coco", upright=True).all_warnings
    assert "the images upright: " in warning


def test_what_training_alone_would_refuse_is_an_error_too(tmp_path: Path) -> None:
    (error,) = of_coco(tmp_path / "crowds", [{**annotation(1, 1, 7, [1, 2, 20, 20]), "iscrowd": 1}]).all_errors
    assert "must have at least one box that is no crowd" in error
    report = of_coco(tmp_path / "names", [annotation(1, 1, 7, [1, 2, 9, 9])], categories=[{"id": 7, "name": "fish"}])
    (error,) = report.all_errors
    assert error.endswith("classes must be those of the splits before; fish are new, cat, dog are missing")


def test_annotations_that_can_not_be_read_are_an_error_and_the_other_split_is_read(tmp_path: Path) -> None:
    of_coco(tmp_path, [annotation(1, 1, 7, [1, 2, 20, 20])])
    (tmp_path / "annotations" / "train.json").write_text("[")
    report = checked(tmp_path)
    assert len(report.all_errors) == 1
    assert "annotations must be JSON, got" in report.all_errors[0]
    assert len(report.splits[1].images) == 1


def test_images_that_are_all_unreadable_are_no_crash(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"train/a.png": BOX, "val/b.png": BOX})
    for name in ("train/a.png", "val/b.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    assert len(checked(tmp_path).all_errors) == 2


def test_a_missing_split_is_an_error_and_no_data_at_all_ends_it(tmp_path: Path) -> None:
    write_coco(tmp_path / "set", [annotation(1, 1, 7, [1, 2, 20, 20]), annotation(2, 1, 3, [3, 3, 20, 20])])
    (error,) = checked(tmp_path / "set").all_errors
    assert "data must be a folder with train/ and annotations/train.json" in error
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has none of them"):
        checked(tmp_path / "empty")


def test_a_path_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    of_yolo(tmp_path, {})
    file = tmp_path / "data.yaml"
    file.write_text(f"path: /content/nowhere\n{file.read_text()}")
    (warning,) = checked(tmp_path).all_warnings
    assert "path is /content/nowhere, which is not there" in warning


def test_an_interrupt_leaves_nothing_running_though_somebody_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def slow(path: Path, *_: object, **__: object) -> None:
        begun.append(path)
        time.sleep(0.02)

    def interrupted(results: Iterator[Any], **_: object) -> Iterator[Any]:
        yield next(results)
        raise KeyboardInterrupt

    write_yolo(tmp_path, {f"{split}/{i}.png": BOX for split in ("train", "val") for i in range(100)})
    monkeypatch.setattr(inspection, "load_annotated_image", slow)
    monkeypatch.setattr(inspection, "tqdm", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as kept:
        checked(tmp_path)
    assert (threading.active_count(), kept.type) == (before, KeyboardInterrupt)
    assert len(begun) < 50
