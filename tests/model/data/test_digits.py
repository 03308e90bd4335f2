"""The digits set: real digits, tight boxes, splits that share nothing, and a folder that is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("tqdm")

from smca_kernels.tools import cli
from smca_model.data import digits

TRAIN, VAL = 30, 12


def make(out: Path, **options: Any) -> Path:
    digits.make_digits(out, **{"train": TRAIN, "val": VAL, "progress": False, **options})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "digits")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_digit(generator_seed: int, background: float) -> tuple[np.ndarray, list[int]]:
    """A scene with one digit on an even ground, and its box."""
    scans, _, _ = digits.load_sources("train", 0)
    even = [np.full((512, 256), background, np.float32)]
    for seed in range(generator_seed, generator_seed + 200):
        scene, boxes, _ = digits.make_scene(np.random.default_rng(seed), scans, even, 96)
        if len(boxes) == 1:
            return scene, boxes[0]
    raise AssertionError("no scene of one digit in 200")


def test_it_is_a_data_folder_of_ten_classes(folder: Path) -> None:
    pytest.importorskip("pycocotools")
    pytest.importorskip("torchvision")
    from smca_model.data.coco import CocoDetection
    from smca_model.data.layouts import find_split

    for split, scenes in (("train", TRAIN), ("val", VAL)):
        dataset = CocoDetection(*find_split(folder, split), train=False, sizes=(96,))
        assert dataset.classes == digits.CLASSES
        assert len(dataset) == scenes
        assert dataset.degenerate_boxes == 0
        for image, target in map(dataset.__getitem__, range(scenes)):
            assert image.shape == (3, 96, 96)
            assert 1 <= len(target["labels"]) <= digits.MAX_DIGITS
            assert target["dropped_boxes"] == 0


def test_no_scan_is_in_both_splits_and_none_is_left_out() -> None:
    splits = [{scan.tobytes() for scan in digits.load_sources(split, 3)[0]} for split in ("train", "val")]
    assert splits[0].isdisjoint(splits[1])
    assert len(splits[0]) + len(splits[1]) == 1797
    assert len(splits[1]) == round(digits.HELD_OUT * 1797)


@pytest.mark.parametrize("split", ["train", "val"])
def test_scans_say_what_scikit_learn_says(split: str) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    says = dict(zip((scan.tobytes() for scan in source.images), source.target, strict=True))
    scans, said, _ = digits.load_sources(split, 5)
    assert [says[(16 * scan.astype(float)).tobytes()] for scan in scans] == said.tolist()


def test_no_part_of_a_photograph_is_in_both_splits() -> None:
    import skimage.data

    for i, name in enumerate(digits.TEXTURES):
        halves = [digits.load_sources(split, 0)[2][i] for split in ("train", "val")]
        whole = getattr(skimage.data, name)()
        assert np.array_equal(np.round(np.concatenate(halves, axis=1) * 255), whole)


def test_a_digit_is_labelled_by_what_it_says(folder: Path) -> None:
    scans, says, textures = digits.load_sources("val", 0)
    annotations = json.loads((folder / "annotations" / "val.json").read_text())
    expected = []
    for i in range(VAL):
        _, _, chosen = digits.make_scene(np.random.default_rng((0, True, i)), scans, textures, 96)
        expected += [digits.CLASSES[says[instance]] for instance in chosen]
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    assert [names[annotation["category_id"]] for annotation in annotations["annotations"]] == expected


@pytest.mark.parametrize("background", [0.1, 0.3, 0.6, 0.9])
def test_boxes_are_tight_around_the_visible_strokes(background: float) -> None:
    scene, (x, y, width, height) = only_digit(int(torch.randint(10000, ())), background)
    change = np.abs(scene / 255 - background)
    assert change.max() > 0.3
    opacity = change / change.max()  # of which the scan's darkest ink has 1
    # A grey level is 1/255 of the scene's range, and so at most 1/75 of the change.
    columns, rows = (np.flatnonzero((opacity >= digits.VISIBLE + 1 / 75).any(axis)) for axis in (0, 1))
    assert x <= columns[0] <= columns[-1] < x + width
    assert y <= rows[0] <= rows[-1] < y + height
    inside = opacity[y : y + height, x : x + width] >= digits.VISIBLE - 1 / 75
    assert inside[0].any()
    assert inside[-1].any()
    assert inside[:, 0].any()
    assert inside[:, -1].any()


def test_digits_hardly_overlap_and_lie_in_the_scene(folder: Path) -> None:
    found: dict[int, list[Sequence[int]]] = {}
    for annotation in json.loads((folder / "annotations" / "train.json").read_text())["annotations"]:
        found.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    assert any(len(boxes) > 1 for boxes in found.values())
    for boxes in found.values():
        for i, (x, y, w, h) in enumerate(boxes):
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= 96
            assert max(w, h) <= 40
            for a, b, c, d in boxes[:i]:
                shared = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
                assert shared <= digits.MAX_OVERLAP * min(w * h, c * d)


def test_the_same_seed_gives_the_same_folder_and_another_seed_another(folder: Path, tmp_path: Path) -> None:
    assert contents(make(tmp_path / "again")) == contents(folder)
    other = contents(make(tmp_path / "other", seed=1))
    assert not {other[name] for name in other if name.endswith(".png")} & set(contents(folder).values())


def test_a_scene_does_not_depend_on_how_many_there_are(folder: Path, tmp_path: Path) -> None:
    fewer = contents(make(tmp_path / "fewer", train=3, val=2))
    scenes = [name for name in fewer if name.endswith(".png")]
    assert len(scenes) == 5
    assert all(fewer[name] == contents(folder)[name] for name in scenes)


def test_sizes_scale_the_digits(tmp_path: Path) -> None:
    out = make(tmp_path / "large", size=192, train=4, val=1)
    data = json.loads((out / "annotations" / "train.json").read_text())
    with Image.open(out / "train" / data["images"][0]["file_name"]) as scene:
        assert scene.size == (192, 192)
    heights = [annotation["bbox"][3] for annotation in data["annotations"]]
    assert 16 < min(heights) <= max(heights) <= 80


def test_it_says_that_digits_are_real_and_placement_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "Real digits, synthetic placement" in (folder / "README.md").read_text()
    for split in ("train", "val"):
        data = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert "Real digits, synthetic placement" in data["info"]["description"]
    assert cli.main(["data", "digits", "--out", str(tmp_path / "set"), "--train", "2", "--val", "1"]) == 0
    assert "2 scenes to train on, 1 held out. Real digits, synthetic placement" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "digits", "--help"])
    assert "Real digits, synthetic placement" in capsys.readouterr().out


def test_the_folder_has_its_name_only_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = digits.make_scene, []

    def watched(*args: Any) -> Any:
        seen.append((tmp_path / "set").exists())
        return whole(*args)

    monkeypatch.setattr(digits, "make_scene", watched)
    make(tmp_path / "set")
    assert seen == [False] * (TRAIN + VAL)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    whole, calls = digits.make_scene, iter(range(100))

    def failing(*args: Any) -> Any:
        if next(calls) == TRAIN + 3:
            raise error
        return whole(*args)

    monkeypatch.setattr(digits, "make_scene", failing)
    with pytest.raises(error):
        make(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="out must be a new or empty folder, got"):
        make(tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"precious"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    make(tmp_path / "empty" / "set", train=1, val=1)
    (tmp_path / "set").mkdir()
    assert contents(make(tmp_path / "set", train=1, val=1)) == contents(tmp_path / "empty" / "set")


@pytest.mark.parametrize("option", [{"train": 0}, {"val": -1}, {"size": 47}, {"size": 257}, {"seed": -1}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path: Path, option: dict[str, int]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        make(tmp_path / "set", **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "modes"), [(0o077, (0o700, 0o600)), (0o002, (0o775, 0o664))])
def test_the_folder_is_as_the_umask_says(tmp_path: Path, umask: int, modes: tuple[int, int]) -> None:
    before = os.umask(umask)
    try:
        folder = make(tmp_path / ("d" * 255))  # the longest name that a folder can have
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == modes[path.is_file()], path
