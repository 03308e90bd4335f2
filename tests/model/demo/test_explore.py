"""A photograph to explore: one pass of the model, the box under a point, and pictures of what the query looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

from PIL import Image
from tiny_detector import MULTI, SINGLE, tiny_detector

from smca_model import SMCA
from smca_model.data.images import DataError, load_image, normalize, resize
from smca_model.demo import explore
from smca_model.detect import detect
from smca_model.pictures import attention_of

CLASSES = ("one", "two", "three", "four", "fünf")


def detector(preset: str = SINGLE) -> SMCA:
    model = tiny_detector(preset)
    model.classes, model.image_size = CLASSES, (48, 96)
    return model


def write_noise(path: Path, width: int = 64, height: int = 48) -> Path:
    Image.effect_noise((width, height), 80).convert("RGB").save(path)
    return path


def with_boxes(boxes: list[list[float]], scores: list[float], size: tuple[int, int] = (100, 200)) -> explore.Explored:
    """What explore finds, boxes [x1, y1, x2, y2] in pixels."""
    picture = torch.zeros(3, *(4 * side for side in size), dtype=torch.uint8)
    found = {"boxes": torch.tensor(boxes).reshape(-1, 4), "scores": torch.tensor(scores)}
    found |= {name: torch.arange(len(boxes)) for name in ("labels", "queries")}
    return explore.Explored(size, picture, picture, found, lambda queries: pytest.fail("asked"), CLASSES, (8,))


def test_the_model_runs_once_for_boxes_and_any_number_of_clicks(tmp_path: Path) -> None:
    model, file = detector(), write_noise(tmp_path / "noise.png")
    (expected,) = detect(model, [load_image(file)], threshold=0.0)
    runs: list[Any] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    explored = explore.explore(model, file)
    for i in (0, 3):
        explore.picture_of_boxes(explored, 0.0)
        explore.picture_of_attention(explored, i)
    assert len(runs) == 1
    torch.testing.assert_close(explored.found, expected, rtol=0, atol=0)
    assert explored.size == (48, 64)


@pytest.mark.parametrize("preset", [SINGLE, MULTI])
def test_the_attention_is_that_of_the_query_behind_the_box(preset: str, tmp_path: Path) -> None:
    model, file = detector(preset), write_noise(tmp_path / "noise.png")
    explored = explore.explore(model, file)
    seen = resize(load_image(file), *model.image_size)
    torch.testing.assert_close(explored.seen, seen, rtol=0, atol=0)
    with torch.no_grad():
        logits = model([normalize(seen)])["pred_logits"][0].sigmoid()
    for i in (0, 5):
        query, label = int(explored.found["queries"][i]), int(explored.found["labels"][i])
        torch.testing.assert_close(logits[query, label], explored.found["scores"][i], rtol=0, atol=0)
        maps, _ = explored.attention([query])
        expected, _ = attention_of(model, normalize(seen), queries=[query])
        torch.testing.assert_close(maps, expected, rtol=0, atol=0)


def test_the_picture_is_of_the_query_behind_the_box(tmp_path: Path) -> None:
    explored = explore.explore(detector(), write_noise(tmp_path / "noise.png"))
    asked: list[list[int]] = []

    def attention(queries: list[int]) -> Any:
        asked.append(queries)
        return explored.attention(queries)

    for i in (0, 5):
        explore.picture_of_attention(replace(explored, attention=attention), i)
    assert asked == [[int(explored.found["queries"][i])] for i in (0, 5)]


def test_attention_stays_that_of_its_photograph_when_the_model_sees_another(tmp_path: Path) -> None:
    model = detector()
    first = explore.explore(model, write_noise(tmp_path / "first.png"))
    before, _ = first.attention([2])
    explore.explore(model, write_noise(tmp_path / "second.png"))
    after, _ = first.attention([2])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_smallest_box_around_a_point_is_chosen() -> None:
    boxes = [[0.0, 0.0, 100.0, 100.0], [20.0, 20.0, 60.0, 60.0], [40.0, 40.0, 140.0, 90.0], [20.0, 20.0, 60.0, 60.0]]
    explored = with_boxes(boxes, [0.9, 0.8, 0.7, 0.6])
    assert explore.box_at(explored, (10.0, 10.0), 0.0) == 0
    assert explore.box_at(explored, (50.0, 50.0), 0.0) == 1  # not 3, which is as small
    assert explore.box_at(explored, (70.0, 50.0), 0.0) == 2
    assert explore.box_at(explored, (60.0, 30.0), 0.0) == 1  # its edge
    assert explore.box_at(explored, (150.0, 50.0), 0.0) is None
    assert explore.box_at(explored, (130.0, 95.0), 0.0) is None


def test_a_box_below_the_score_is_not_there() -> None:
    explored = with_boxes([[0.0, 0.0, 100.0, 100.0], [20.0, 20.0, 60.0, 60.0]], [0.75, 0.5])
    assert [explored.count(threshold) for threshold in (0.4, 0.5, 0.6, 0.8)] == [2, 2, 1, 0]
    assert explore.box_at(explored, (50.0, 50.0), 0.5) == 1
    assert explore.box_at(explored, (50.0, 50.0), 0.6) == 0
    assert explore.box_at(explored, (50.0, 50.0), 0.8) is None
    assert explored.describe(1) == "two 0.50"


@pytest.mark.parametrize(("width", "height", "most"), [(64, 48, 1600), (300, 200, 150)])
def test_a_click_on_a_drawn_edge_is_on_the_edge_of_the_box(
    width: int, height: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an enlarged photograph and of one made smaller."""
    monkeypatch.setattr(explore, "LONG_SIDE_OF_PICTURES", most)
    explored = explore.explore(detector(), write_noise(tmp_path / "noise.png", width, height))
    left, top, right, bottom = 0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height
    explored.found.update(boxes=torch.tensor([[left, top, right, bottom]]), scores=torch.tensor([0.5]))
    explored.found.update(labels=torch.tensor([1]), queries=torch.tensor([0]))
    plain = explored.picture.movedim(0, -1).numpy()
    drawn = explore.picture_of_boxes(explored, 0.5)
    assert drawn.shape == plain.shape
    assert (explore.picture_of_boxes(explored, 0.6) == plain).all()
    different = (drawn != plain).any(-1)
    # Below the name, which is as high as the box's corner.
    columns = np.flatnonzero(different[round(0.7 * len(different))])
    rows = np.flatnonzero(different[:, round(0.7 * different.shape[1])])
    line = max(2, min(drawn.shape[:2]) // 200)  # its thickness, half of it on either side
    pixel = line * width / drawn.shape[1]
    x1, _ = explored.position((columns[0], 0))
    x2, y2 = explored.position((columns[-1], rows[-1]))
    assert (x1, x2, y2) == pytest.approx((left, right, bottom), abs=pixel)


def odd_images() -> dict[str, Image.Image]:
    noise = np.random.default_rng(torch.initial_seed()).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    return {
        "one.png": Image.new("RGB", (1, 1), "red"),
        "strip.png": Image.new("RGB", (900, 1)),
        "deep.png": Image.fromarray(noise[..., 0].astype(np.uint16) * 257),
        "clear.png": Image.fromarray(noise),
        "palette.gif": Image.fromarray(noise[..., :3]).quantize(8),
        "turned.jpg": Image.fromarray(noise[..., :3]),
    }


@pytest.mark.parametrize("name", ["one.png", "strip.png", "deep.png", "clear.png", "palette.gif", "turned.jpg"])
def test_odd_photographs_are_shown(name: str, tmp_path: Path) -> None:
    image = odd_images()[name]
    width, height = image.size
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[274] = 6
        width, height = height, width
    image.save(tmp_path / name, exif=exif)
    explored = explore.explore(detector(), tmp_path / name)
    assert explored.size == (height, width)
    drawn = explore.picture_of_boxes(explored, 0.0)
    assert drawn.shape == (*explored.picture.shape[1:], 3)
    assert drawn.shape[1] / drawn.shape[0] == pytest.approx(width / height)
    assert explore.picture_of_attention(explored, 0).std() > 0


def test_a_file_that_is_no_image_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(DataError, match=r"^image words\.png can't be read: cannot identify image file 'words\.png'$"):
        explore.explore(detector(), tmp_path / "words.png")


@pytest.mark.parametrize("preset", [SINGLE, MULTI, "detr-tiny"])
def test_the_picture_of_attention_has_a_row_a_scale(preset: str, tmp_path: Path) -> None:
    explored = explore.explore(detector(preset), write_noise(tmp_path / "noise.png", 64, 64))
    height, width, channels = explore.picture_of_attention(explored, 0).shape
    scales = len(explored.strides)
    assert (height, width, channels) == (110 + 245 * scales, round(100 * (2.2 * (2 + 2) + 1.2)), 3)
