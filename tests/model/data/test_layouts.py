"""Layouts of data folders: which one is there, and what is said where none is, or several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from coco_folder import annotation, write_coco
from yolo_folder import write_yolo

from smca_model.data.coco import CocoDetection
from smca_model.data.layouts import NoSplitError, find_split, read_split
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


# --------------------------------------------------------------------------------------------------- Roboflow's project


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
    bad = [{**GOOD, "image_id": 4}, {**GOOD, "bbox": [0, 0, -1, 2]}]
    _, file = write_coco(tmp_path, [bad[0], GOOD, bad[1]])
    mistakes: list[str] = []
    assert len(read_split(file, mistakes=mistakes)["annotations"]) == 1
    assert [each.split(": ", 1)[1] for each in mistakes] == [
        "annotation 1 of image 4: there is no image of that id",
        "annotation 1 of image 1: bbox must be [x, y, width, height] in pixels, got [0, 0, -1, 2]",
    ]
    assert json.loads(file.read_text())["annotations"][0] == bad[0]


# ----------------------------------------------------------------------------------------- the same data in each layout


def as_roboflow(data: Path, folder: Path) -> Path:
    """A data folder of digits in Roboflow's layout."""
    for split, name in (("train", "train"), ("val", "valid")):
        shutil.copytree(data / split, folder / name)
        shutil.copy(data / "annotations" / f"{split}.json", folder / name / "_annotations.coco.json")
    return folder


def as_yolo(data: Path, folder: Path) -> Path:
    """A data folder of digits in YOLO's layout."""
    for split in ("train", "val"):
        shutil.copytree(data / split, folder / split / "images")
        content = json.loads((data / "annotations" / f"{split}.json").read_text())
        lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for each in content["annotations"]:
            (x, y, w, h), side = each["bbox"], content["images"][0]["width"]
            box = [(x + w / 2) / side, (y + h / 2) / side, w / side, h / side]
            lines[each["image_id"]].append(f"{each['category_id'] - 1} {' '.join(f'{part:.6f}' for part in box)}")
        (folder / split / "labels").mkdir()
        for image in content["images"]:
            label = Path(image["file_name"]).with_suffix(".txt")
            (folder / split / "labels" / label).write_text("\n".join(lines[image["id"]]))
    names = [category["name"] for category in content["categories"]]
    (folder / "data.yaml").write_text(f"train: ../train/images\nval: ../val/images\nnc: 10\nnames: {names}\n")
    return folder


@pytest.mark.parametrize("convert", [as_roboflow, as_yolo])
def test_the_same_data_in_another_layout_trains_the_same(
    data: Path, tmp_path: Path, convert: Callable[[Path, Path], Path]
) -> None:
    from smca_model.training.settings import Settings
    from smca_model.training.setup import open_data

    options: dict[str, Any] = {"preset": "smca-tiny", "sizes": (48,), "max_size": 96}
    ours = open_data(Settings(data=str(data), **options))
    theirs = open_data(Settings(data=str(convert(data, tmp_path / "set")), **options))
    for one, other in zip(ours, theirs, strict=True):
        assert one.classes == other.classes
        for (image, target), (same_image, same_target) in zip(one, other, strict=True):
            assert torch.equal(image, same_image)
            torch.testing.assert_close(target.pop("boxes"), same_target.pop("boxes"), atol=2e-6, rtol=0)  # six decimals
            torch.testing.assert_close(target.pop("labels"), same_target.pop("labels"))
            assert target == same_target


@pytest.mark.parametrize("convert", [as_roboflow, as_yolo])
def test_evaluation_reads_every_layout(
    data: Path, tmp_path: Path, convert: Callable[[Path, Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from smca_kernels.tools import cli
    from smca_model import build, weights
    from smca_model.data.digits import CLASSES

    torch.manual_seed(0)
    weights.save(build("smca-tiny", len(CLASSES)), tmp_path / "model.safetensors", CLASSES)
    found = []
    for folder in (data, convert(data, tmp_path / "set")):
        options = [
            "--weights",
            str(tmp_path / "model.safetensors"),
            "--size",
            "48",
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
        assert cli.main(["eval", *options, "--data", str(folder), "--detections", str(tmp_path / "found.json")]) == 0
        assert "2 images of short side 48 pixels" in capsys.readouterr().out
        found.append(json.loads((tmp_path / "found.json").read_text()))
    shift = 1 if convert is as_yolo else 0  # its classes are numbered from 0
    assert found[0] == [{**each, "category_id": each["category_id"] + shift} for each in found[1]]
