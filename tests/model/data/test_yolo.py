"""YOLO's layout: the same annotations as COCO's, and mistakes named by file, line and value."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from PIL import Image
from yolo_folder import SETTINGS, write_image, write_yolo

from smca_model.data import yolo
from smca_model.data.coco import CocoDetection
from smca_model.data.images import load_image
from smca_model.data.layouts import find_split

BOX = "1 0.5 0.5 0.5 0.25"


def read(file: Path, split: str = "val") -> dict[str, Any]:
    opened = yolo.open_yolo(file, split)
    assert opened is not None
    return opened.read()


def boxes_of(folder: Path, text: str | bytes) -> list[tuple[int, list[float]]]:
    """Classes and boxes that one label file gives an image of 60 × 40 pixels."""
    annotations = read(write_yolo(folder, {"val/a.png": text}))["annotations"]
    return [(each["category_id"], each["bbox"]) for each in annotations]


def validation(folder: Path) -> CocoDetection:
    return CocoDetection(*find_split(folder, "val"), train=False, sizes=(40,))


# --------------------------------------------------------------------------------------------------------- what is read


def test_labels_become_annotations_of_cocos_format(tmp_path: Path) -> None:
    labels = {"val/b.png": f"{BOX}\n0 0.25 0.5 0.5 1\n", "val/a.jpg": None, "train/c.png": BOX}
    data = read(write_yolo(tmp_path, labels))
    assert data["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert data["images"] == [
        {"id": 1, "file_name": os.path.join("images", "val", "a.jpg"), "height": 40, "width": 60},
        {"id": 2, "file_name": os.path.join("images", "val", "b.png"), "height": 40, "width": 60},
    ]
    assert data["annotations"] == [
        {"id": 1, "image_id": 2, "category_id": 1, "bbox": [15, 15, 30, 10], "area": 300, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 0, "bbox": [0, 0, 30, 40], "area": 1200, "iscrowd": 0},
    ]


def test_a_dataset_of_it_has_its_boxes_classes_and_ground_truth(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"val/a.png": BOX, "val/b.png": None})
    dataset = validation(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset[0][1]["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.25]]
    assert dataset[0][1]["labels"].tolist() == [1]
    assert len(dataset[1][1]["boxes"]) == 0
    assert [each["bbox"] for each in dataset.coco.dataset["annotations"]] == [[15, 15, 30, 10]]
    assert pickle.loads(pickle.dumps(dataset)).files == dataset.files  # as for a worker that is no fork


def test_a_polygon_stands_for_the_box_around_it(tmp_path: Path) -> None:
    assert boxes_of(tmp_path, "0 0.25 0.5 0.75 0.25 0.5 1.0 0.3 0.3") == [(0, [15, 10, 30, 30])]


@pytest.mark.parametrize(
    "text",
    [
        f"\ufeff{BOX}\n",
        f"\r\n{BOX}\r\n\r\n",
        f"  \n\t\n{BOX}   \n\n",
        BOX.replace(" ", "\t"),
        BOX.replace("1", "1.0", 1),
    ],
    ids=["BOM", "CRLF", "blank lines", "tabs", "class 1.0"],
)
def test_text_is_read_as_windows_and_others_write_it(tmp_path: Path, text: str) -> None:
    assert boxes_of(tmp_path, text) == [(1, [15, 15, 30, 10])]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path: Path, end: str) -> None:
    assert len(boxes_of(tmp_path, end.join([BOX] * 3))) == 3
    with pytest.raises(ValueError, match=r"a\.txt, line 2: class 7, but"):
        boxes_of(tmp_path, end.join([BOX, "7 0.5 0.5 0.5 0.5", BOX]))


def test_an_empty_label_file_is_an_image_without_boxes(tmp_path: Path) -> None:
    assert boxes_of(tmp_path, "\n") == []


def test_rounding_beyond_the_image_is_none(tmp_path: Path) -> None:
    text = f"0 0.5 0.5 1.0000001 {1 + yolo.ROUNDING}\n1 -0.00001 0.5 0.5 0.5"
    assert boxes_of(tmp_path, text) == [(0, [0, 0, 60, 40]), (1, [-15, 10, 30, 20])]


def test_boxes_without_width_or_height_are_left_out_and_counted(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"val/a.png": f"0 0.5 0.5 0 0.5\n0 0.5 0.5 0.5 0\n{BOX}"})
    dataset = validation(tmp_path)
    assert dataset.degenerate_boxes == 2
    assert len(dataset[0][1]["boxes"]) == 1


def test_boxes_that_reach_beyond_the_image_are_clipped_with_a_warning(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"val/a.png": "0 0.9 0.5 0.4 0.5"})
    with pytest.warns(UserWarning, match=r"data\.yaml \(val\): 1 of 1 boxes reach beyond their image and are clipped"):
        dataset = validation(tmp_path)
    torch.testing.assert_close(dataset[0][1]["boxes"], torch.tensor([[0.85, 0.5, 0.3, 0.5]]))


def test_boxes_below_a_pixel_are_told_and_refused_if_all_are(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"val/a.png": f"{BOX}\n0 0.5 0.5 0.001 0.5"})
    with pytest.warns(UserWarning, match=r"1 of 2 boxes have a side of less than a pixel$"):
        validation(tmp_path)
    write_yolo(tmp_path, {"val/a.png": "0 0.5 0.5 0.001 0.5"})
    with pytest.raises(ValueError, match=r"1 of 1 boxes have a side of less .*; .* must be in parts of the image"):
        validation(tmp_path)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_boxes_are_those_of_the_upright_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    file = write_yolo(tmp_path, {"val/a.png": None, "val/b.png": BOX})
    turned = tmp_path / "images" / "val" / f"a{suffix}"
    (tmp_path / "images" / "val" / "a.png").unlink()
    pixels = Image.new("RGB", (60, 40))
    pixels.paste((255, 0, 0), (0, 0, 30, 20))
    exif = Image.Exif()
    exif[274] = orientation
    pixels.save(turned, exif=exif.tobytes())
    upright = load_image(turned)
    entry = read(file)["images"][0]
    assert (entry["height"], entry["width"]) == tuple(upright.shape[1:])
    normalised = validation(tmp_path)[0][0]
    whole = torch.nn.functional.interpolate(upright[None].float(), size=normalised.shape[1:])[0]
    assert torch.equal(normalised[0] > 0, whole[0] > 128) or suffix in (".jpg", ".webp")  # those blur the edge


def test_sizes_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile, PngImagePlugin

    write_yolo(tmp_path, {"val/a.png": BOX, "val/b.jpg": BOX, "val/c.webp": BOX, "val/d.tif": BOX, "val/e.bmp": BOX})
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "somebody's")
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "val" / "a.png", pnginfo=info)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert len(read(tmp_path / "data.yaml")["images"]) == 5


def test_suffixes_may_be_in_capitals_and_folders_nested(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {"val/a.JPG": BOX, "val/deep/er/b.PNG": BOX, "val/deep/a.png": "0 0.5 0.5 1 1"})
    label = tmp_path / "labels" / "val" / "a.txt"
    label.rename(label.with_suffix(".TXT"))
    (tmp_path / "images" / "val" / "._a.JPG").write_bytes(b"a Mac's")
    (tmp_path / "images" / "val" / "notes.md").write_text("no image")
    data = read(file)
    places = ["a.JPG", os.path.join("deep", "a.png"), os.path.join("deep", "er", "b.PNG")]
    assert [each["file_name"] for each in data["images"]] == [os.path.join("images", "val", each) for each in places]
    assert [each["category_id"] for each in data["annotations"]] == [1, 0, 1]


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    write_yolo(tmp_path / "far", {"val/deep/a.png": BOX})
    file = write_yolo(tmp_path / "near", {})
    try:
        (tmp_path / "near" / "images").symlink_to(tmp_path / "far" / "images")
    except OSError:
        pytest.skip("needs links")
    (tmp_path / "near" / "labels").symlink_to(tmp_path / "far" / "labels")
    (tmp_path / "far" / "images" / "val" / "deep" / "back").symlink_to(tmp_path / "far" / "images" / "val")
    data = read(file)
    assert [len(data["images"]), len(data["annotations"])] == [1, 1]


def test_one_stem_in_two_formats_is_refused_where_it_has_boxes(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {"val/a.jpg": BOX, "val/a.png": BOX, "val/b.jpg": None, "val/b.png": None})
    with pytest.raises(ValueError, match=r"labels.val.a\.txt: the boxes can't be those of both .*a\.jpg and .*a\.png$"):
        read(file)


def test_labels_may_lie_beside_the_images(tmp_path: Path) -> None:
    # `images` above the data is none of its parts.
    folder = tmp_path / "images" / "set"
    folder.mkdir(parents=True)
    file = folder / "data.yaml"
    file.write_text("train: train\nval: val\nnames: [cat, dog]")
    write_image(folder / "val" / "a.png", (40, 60))
    (folder / "val" / "a.txt").write_text(BOX)
    assert len(read(file)["annotations"]) == 1


def test_a_split_without_any_label_file_is_refused_and_told_where_they_were_looked_for(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {"val/a.png": None, "train/a.png": BOX})
    expected = (
        r"no image has a label file; that of .*a\.png was looked for as .*labels.val.a\.txt and .*images.val.a\.txt"
    )
    with pytest.raises(ValueError, match=expected):
        read(file)


@pytest.mark.parametrize("source", ["images/val", "val.txt"])
def test_each_folder_is_listed_a_few_times_however_many_files_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    count = 2000
    write_yolo(tmp_path, {"val/a.png": BOX}, settings=SETTINGS.replace("images/val", source))
    images, labels = (tmp_path / kind / "val" for kind in ("images", "labels"))
    for i in range(count):
        (images / f"{i}.png").hardlink_to(images / "a.png")
        (labels / f"{i}.txt").hardlink_to(labels / "a.txt")
    (tmp_path / "val.txt").write_text("".join(f"images/val/{i}.png\n" for i in range(count)))
    asked: dict[str, int] = {"listdir": 0, "stat": 0}
    for name in asked:
        real = getattr(os, name)

        def counted(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            asked[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(os, name, counted)
    assert len(validation(tmp_path)) >= count
    assert asked["listdir"] <= 3  # for the list, the labels, and the dataset
    assert asked["stat"] < 50


# -------------------------------------------------------------------------------------------------- lines with mistakes


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("7 0.5 0.5 0.5 0.5", r"class 7, but data\.yaml names 2"),
        ("2.0 0.5 0.5 0.5 0.5", r"class 2, but data\.yaml names 2"),
        ("-1 0.5 0.5 0.5 0.5", "class must be a whole number from 0, got '-1'"),
        ("0.5 0.5 0.5 0.5 0.5", "class must be a whole number from 0, got '0.5'"),
        ("cat 0.5 0.5 0.5 0.5", "must be numbers with blanks between them, got 'cat'"),
        ("0 nan 0.5 0.5 0.5", "must be numbers with blanks between them, got 'nan'"),
        ("inf 0.5 0.5 0.5 0.5", "must be numbers with blanks between them, got 'inf'"),
        ("0,0.5,0.5,0.5,0.5", "must be numbers with blanks between them, got '0,0.5,0.5,0.5,0.5'"),
        ("0 0.5 0.5 0.5", "or class and the x and y of three points or more, got 4 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9", "got 6 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "got 8 numbers"),
        ("0 320 0.5 0.5 0.5", r"centre x must be in parts of the image, 0 to 1 \(within 0.0001\), got 320"),
        ("0 0.5 -0.1 0.5 0.5", r"centre y must be .*, got -0\.1"),
        ("0 0.5 0.5 1.001 0.5", r"width must be .*, got 1\.001"),
        ("0 0.5 0.5 0.5 -0.5", r"height must be .*, got -0\.5"),
        ("0 0.1 0.1 0.2 0.2 0.3 1.5", r"y of point 3 must be .*, got 1\.5"),
    ],
)
def test_a_mistake_is_named_by_file_line_and_value(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(ValueError, match=rf"labels.val.a\.txt, line 3: .*{told}$"):
        boxes_of(tmp_path, f"{BOX}\n\n{line}\n")


def test_text_that_is_not_utf8_is_named_by_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.txt, line 2: text must be UTF-8, got the byte 0xe9$"):
        boxes_of(tmp_path, f"{BOX}\n".encode() + b"caf\xe9 1 1")
    with pytest.raises(ValueError, match=r"a\.txt, line 1: text must be UTF-8, got the byte 0xff$"):
        boxes_of(tmp_path, BOX.encode("utf-16"))


def test_mistakes_of_all_files_are_told_at_once_and_counted(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {f"val/{i}.png": "9 0 0 0 0\n8 0 0 0 0" for i in range(4)})
    (tmp_path / "images" / "val" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.txt, line 1: class 9") as caught:
        read(file)
    lines = str(caught.value).splitlines()
    assert lines[3].endswith("1.txt, line 2: class 8, but data.yaml names 2")
    assert lines[5:] == ["… and 2 more; `smca data check` lists them"]
    opened = yolo.open_yolo(file, "val")
    mistakes: list[str] = []
    assert opened is not None
    assert len(opened.read(mistakes=mistakes)["images"]) == 3
    assert len(mistakes) == 7
    assert "3.png can't be read" in mistakes[-1]


# ----------------------------------------------------------------------------------------------------- where images are


@pytest.mark.parametrize(
    "settings",
    [
        "path: .\nval: images/val",
        "path: ''\nval: images/val/",
        "path: ../set\nval: ./images/val",
        "path: images\nval: val",
        "val: ../images/val",  # Roboflow's, of a folder beside data.yaml
        "val: images\\val",
        "valid: images/val",
        "validation: images/val",
        "val: [images/val/one, images/val/two]",
        "val:\n  - images/val/one\n  - two.txt",
        "val: both.txt",
        "val: lists/both.txt",
    ],
)
def test_a_split_is_a_folder_or_a_list_or_several(tmp_path: Path, settings: str) -> None:
    labels: dict[str, str | bytes | None] = {"val/one/a.png": BOX, "val/two/b.png": BOX}
    file = write_yolo(tmp_path / "set", labels, settings=f"{settings}\nnames: [cat, dog]")
    (file.parent / "two.txt").write_text("./images/val/two/b.png")
    (file.parent / "both.txt").write_bytes(b"\xef\xbb\xbfimages/val/one/a.png\r\n\r\nimages\\val\\two\\b.png\r\n")
    (file.parent / "lists").mkdir()  # paths count from there, or from the data's folder
    (file.parent / "lists" / "both.txt").write_text("../images/val/one/a.png\nimages/val/two/b.png\n")
    data = read(file)
    assert [Path(each["file_name"]).name for each in data["images"]] == ["a.png", "b.png"]
    assert [each["image_id"] for each in data["annotations"]] == [1, 2]


def test_images_may_lie_outside_of_the_data_folder(tmp_path: Path) -> None:
    write_yolo(tmp_path / "far", {"val/a.png": BOX})
    file = tmp_path / "data.yaml"
    file.write_text(f"val: {tmp_path / 'far' / 'images'}\nnames: [cat, dog]")
    file = file.rename(tmp_path / "far" / "labels" / "data.yaml")
    assert len(validation(file)) == 1


def test_an_image_of_a_list_that_is_not_there_is_named_by_line(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {"val/a.png": BOX}, settings="val: val.txt\nnames: [cat, dog]")
    (tmp_path / "val.txt").write_text("images/val/a.png\nimages/val/b.png\ndata.yaml\n")
    with pytest.raises(
        ValueError, match=r"val\.txt, line 2: there is no image images/val/b\.png, neither from"
    ) as caught:
        read(file)
    assert str(caught.value).splitlines()[1].endswith(".webp, got data.yaml")


def test_a_path_of_another_machine_is_told_and_passed_over(tmp_path: Path) -> None:
    file = write_yolo(tmp_path, {"val/a.png": BOX}, settings=f"path: /content/nowhere\n{SETTINGS}")
    with pytest.warns(
        UserWarning, match=r"data\.yaml, line 1: path is /content/nowhere, which is not there; .* is taken"
    ):
        assert len(read(file)["images"]) == 1


# ------------------------------------------------------------------------------------------------------------ data.yaml


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[cat, dog]", ("cat", "dog")),
        ("{0: cat, 1: dog}", ("cat", "dog")),
        ("\n  1: dog\n  0: cat", ("cat", "dog")),
        ("{'0': cat, '1': dog}", ("cat", "dog")),
        ("[no, 1]", ("no", "1")),
        ("[2024-01-01, 1e3]", ("2024-01-01", "1e3")),
        ("['null', käse]", ("null", "käse")),
    ],
)
def test_names_are_the_text_that_they_are_written_as(tmp_path: Path, names: str, expected: tuple[str, ...]) -> None:
    file = write_yolo(tmp_path, {"val/a.png": BOX}, settings=f"val: images/val\nnc: 2\nnames: {names}")
    assert validation(file).classes == expected


@pytest.mark.parametrize("content", [SETTINGS.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + SETTINGS.encode()])
def test_a_data_yaml_is_read_as_windows_writes_it(tmp_path: Path, content: bytes) -> None:
    assert len(read(write_yolo(tmp_path, {"val/a.png": BOX}, settings=content))["images"]) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("val: images/val", r"data\.yaml: must have names, the list of the classes"),
        ("val: images/val\nnames:", "must have names"),
        ("nc: 3\nnames: [a, b]", r"data\.yaml, line 1: nc is '3', but names has 2 classes"),
        ("nc: two\nnames: [a, b]", "nc is 'two', but names has 2 classes"),
        ("\nnames: {1: a, 2: b}", r"data\.yaml, line 2: names must be numbered 0 to 1, got \['2'\]"),
        ("names: {a: 0, b: 1}", r"names must be numbered 0 to 1, got \['a', 'b'\]"),
        ("names: cat", "names must be a list of texts, or number them, got 'cat'"),
        ("names: [a, [b]]", r"names must be a list .*, got \['a', \['b'\]\]"),
        ("names: [a, '']", "names must be a list"),
        ("names: []", "names must be a list"),
        ("names: [a, b, a]", r"each of names must be there once, repeated: \['a'\]"),
        ("names: [a]\nval: {a: b}", r"line 2: val must be a folder, a list of images \(.txt\), or several, got {"),
        ("names: [a]\nval: []", "val must be a folder"),
        ("names: [a]\nval: ../images/nowhere", r"line 2: val is ../images/nowhere, but there is no .* and no .*images"),
        ("names: [a]\nval: data.yaml", r"val must be folders and lists of images \(.txt\), got the file .*data\.yaml"),
        ("names: [a]\nval: empty", r"data\.yaml \(val\): images \(.bmp, .*\) must be in .*empty, which has none"),
        ("names: [a]\nval: empty\npath: [a]", r"line 3: path must be a folder, got \['a'\]"),
        ("names: [a]\nval: images/val\nkpt_shape: [17, 3]", "line 3: labels must be boxes or polygons, not keypoints"),
        ("names: [a\nval: b", r"data\.yaml, line \d: must be YAML: "),
        ("names:\n\t- a", r"data\.yaml, line 2: must be YAML: "),
        ("- a", "must be keys and values"),
        ("", "must be keys and values"),
        (b"names: [caf\xe9]", r"data\.yaml: must be YAML in UTF-8: "),
        ("names: " + "[" * 5000, "nested too deep|must be YAML"),
    ],
)
def test_a_data_yaml_that_can_not_be_used_is_told_why(tmp_path: Path, settings: str | bytes, told: str) -> None:
    (tmp_path / "empty").mkdir()
    file = write_yolo(tmp_path, {"val/a.png": BOX}, settings=settings)
    with pytest.raises(ValueError, match=told):
        read(file)


def test_a_data_yaml_that_is_not_there_or_has_no_such_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.yaml can't be read: No such file"):
        yolo.open_yolo(tmp_path / "data.yaml", "val")
    file = write_yolo(tmp_path, {}, settings="names: [a]\nval: # none\ntest: null")
    assert yolo.open_yolo(file, "val") is None
    assert yolo.open_yolo(file, "test") is None
    with pytest.raises(ValueError, match=r"data\.yaml: must have val, the folder of its images or a list of them"):
        find_split(tmp_path, "val")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!unknown"])
def test_no_tag_of_a_data_yaml_runs_anything(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    file = write_yolo(tmp_path, {}, settings=f"val: images/val\nnames: {tag} ['{made}']")
    with pytest.raises(ValueError, match=r"data\.yaml, line 2: must be YAML: could not determine a constructor"):
        yolo.open_yolo(file, "val")
    assert not made.exists()


@pytest.mark.parametrize(
    "value",
    ["!!bool x", "!!int x", "!!int ''", "!!float x", "!!timestamp x", "!!timestamp 2020-13-45", "[a, !!bool x]"],
)
def test_a_value_that_does_not_fit_its_tag_is_refused_by_the_file(tmp_path: Path, value: str) -> None:
    file = write_yolo(tmp_path, {}, settings=f"val: images/val\nnames: [a]\nd: {value}")
    with pytest.raises(ValueError, match=r"data\.yaml: every value must fit its tag, such as !!int \("):
        yolo.open_yolo(file, "val")


def test_anchors_that_stand_for_billions_of_names_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["l0: &l0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    for last in ("names: *l11", "names: {0: *l11}", "names: [a]\nval: *l11", "names: [a]\npath: *l11\nval: images"):
        file = write_yolo(tmp_path, {}, settings="\n".join([*lines, last]))
        with pytest.raises(ValueError, match="must be") as caught:
            yolo.open_yolo(file, "val")
        assert len(str(caught.value)) < 1000
