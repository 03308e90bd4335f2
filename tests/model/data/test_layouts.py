"""Layouts of data folders: which one is there, and what is said where none is, or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from coco_folder import annotation, write_coco
from yolo_folder import write_yolo

from smca_model.data.coco import CocoDetection
from smca_model.data.layouts import NoSplitError, find_split
from smca_model.data.yolo import YoloSplit

GOOD = annotation(1, 1, 3, [0, 0, 9, 9])
# As Roboflow writes it: the project, and its classes.
PROJECT = {"id": 0, "name": "pets", "supercategory": "none"}
PETS = [{"id": 1, "name": "cat", "supercategory": "pets"}, {"id": 2, "name": "dog", "supercategory": "pets"}]


def write_roboflow(folder: Path, split: str, *, category: int = 1, **parts: Any) -> tuple[Path, Path]:
    images, file = write_coco(folder, [annotation(0, 1, category, [0, 0, 9, 9])], split=split, **parts)
    file = file.rename(images / "_annotations.coco.json")
    (folder / "annotations").rmdir()
    return images, file


def test_a_split_is_found_in_the_digits_layout_and_in_cocos(tmp_path: Path) -> None:
    plain = write_coco(tmp_path / "plain", [GOOD])
    assert find_split(tmp_path / "plain", "val") == plain
    images, file = write_coco(tmp_path / "coco", [GOOD], split="train2017")
    file = file.rename(file.with_name("instances_train2017.json"))
    assert find_split(tmp_path / "coco", "train") == (images, file)


@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("valid", "val"), ("val", "val"), ("test", "test")])
def test_a_split_is_found_in_roboflows_layout(tmp_path: Path, name: str, split: str) -> None:
    paths = write_roboflow(tmp_path, name)
    assert find_split(tmp_path, split) == paths


@pytest.mark.parametrize("name", ["data.yaml", "data.yml"])
def test_a_split_is_found_in_yolos_layout(tmp_path: Path, name: str) -> None:
    write_yolo(tmp_path, {"val/a.png": "0 0.5 0.5 0.5 0.5"}).rename(tmp_path / name)
    images, split = find_split(tmp_path, "val")
    assert images == tmp_path
    assert isinstance(split, YoloSplit)
    assert split.sources == (tmp_path / "images" / "val",)


def test_the_file_of_yolos_layout_may_be_given_itself_whatever_its_name(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {"val/a.png": "0 0.5 0.5 0.5 0.5"}).rename(tmp_path / "pets.YAML")
    assert len(CocoDetection(*find_split(file, "val"), train=False)) == 1
    with pytest.raises(NoSplitError):
        find_split(tmp_path, "val")


def test_a_folder_without_the_split_is_refused_and_told_what_was_looked_for(tmp_path: Path) -> None:
    write_coco(tmp_path, [GOOD])
    expected = (
        r"val/ and annotations/val\.json, or val2017/ and annotations/instances_val2017\.json, or "
        r"valid/_annotations\.coco\.json, or val/_annotations\.coco\.json, or data\.yaml, or data\.yml"
    )
    (tmp_path / "annotations" / "val.json").unlink()
    with pytest.raises(NoSplitError, match=f"data must be a folder with {expected}; .* has none of them"):
        find_split(tmp_path, "val")
    with pytest.raises(ValueError, match=r"data must be a folder, or a data.yaml, got .*nowhere"):
        find_split(tmp_path / "nowhere", "train")


def test_a_folder_in_two_layouts_is_refused_and_told_which_they_are(tmp_path: Path) -> None:
    write_coco(tmp_path, [GOOD])
    file = write_yolo(tmp_path, {"val/a.png": "0 0.5 0.5 0.5 0.5"})
    with pytest.raises(ValueError, match=r"has val/ and annotations/val\.json as well as data\.yaml; give it"):
        find_split(tmp_path, "val")
    assert isinstance(find_split(file, "val")[1], YoloSplit)


# ------------------------------------------------------------------------------------------------- Roboflow's project


def test_roboflows_project_is_no_class(tmp_path: Path) -> None:
    dataset = CocoDetection(*write_roboflow(tmp_path, "train", categories=[PROJECT, *PETS]), train=False)
    assert dataset.classes == ("cat", "dog")
    assert [category["name"] for category in dataset.coco.dataset["categories"]] == ["cat", "dog"]


def test_roboflows_project_may_be_called_as_its_only_class(tmp_path: Path) -> None:
    categories = [{**PROJECT, "name": "cat"}, {"id": 1, "name": "cat", "supercategory": "cat"}]
    paths = write_roboflow(tmp_path, "train", categories=categories)
    assert CocoDetection(*paths, train=False).category_ids == (1,)
    assert CocoDetection(*paths, train=False, classes=("cat",)).category_ids == (1,)


def test_a_project_with_boxes_of_its_own_is_a_class_of_every_split(tmp_path: Path) -> None:
    train = write_roboflow(tmp_path, "train", category=0, categories=[PROJECT, *PETS])
    valid = write_roboflow(tmp_path, "valid", category=1, categories=[PROJECT, *PETS])
    classes = CocoDetection(*train, train=False).classes
    assert classes == ("pets", "cat", "dog")
    assert CocoDetection(*valid, train=False, classes=classes).category_ids == (0, 1, 2)


@pytest.mark.parametrize("supercategory", ["none", "animal", None, ["none"]])
def test_other_categories_are_classes_whether_they_are_used_or_not(tmp_path: Path, supercategory: Any) -> None:
    categories = [{"id": 0, "name": "fish", "supercategory": supercategory}, *PETS]
    paths = write_roboflow(tmp_path, "train", categories=categories)
    assert CocoDetection(*paths, train=False).classes == ("fish", "cat", "dog")


def test_mistakes_are_collected_where_a_list_is_given(tmp_path: Path) -> None:
    from smca_model.data.layouts import read_split

    bad = [{**GOOD, "image_id": 4}, {**GOOD, "bbox": [0, 0, -1, 2]}]
    _, file = write_coco(tmp_path, [bad[0], GOOD, bad[1]])
    mistakes: list[str] = []
    assert len(read_split(file, mistakes=mistakes)["annotations"]) == 1
    assert [each.split(": ", 1)[1] for each in mistakes] == [
        "annotation 1 of image 4: there is no image of that id",
        "annotation 1 of image 1: bbox must be [x, y, width, height] in pixels, got [0, 0, -1, 2]",
    ]
    assert json.loads(file.read_text())["annotations"][0] == bad[0]
