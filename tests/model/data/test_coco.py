"""COCO-format data: labels, targets, DETR's augmentation, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from coco_folder import CATEGORIES, annotation, write_coco

from smca_model.data import coco
from smca_model.data.coco import CocoDetection
from smca_model.data.images import DataError, load_image


def validation(paths: tuple[Path, Path], **options: Any) -> CocoDetection:
    return CocoDetection(*paths, **{"train": False, "sizes": (40,), **options})


def write_squares(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """White rectangles on black, as boxes of images of several shapes."""
    shapes = [(60, 90), (90, 60), (64, 64)]
    sizes = {i: shapes[i % 3] for i in range(1, count + 1)}
    boxes = {i: [10.0 + i, 20.0, 25.0, 15.0 + i] for i in sizes}
    paths = write_coco(folder, [annotation(i, i, 3, box) for i, box in boxes.items()], sizes=sizes, split="train")
    for i, (x, y, w, h) in boxes.items():
        pixels = np.zeros((*sizes[i], 3), np.uint8)
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = 255
        Image.fromarray(pixels).save(paths[0] / f"{i}.png")
    return paths


# --------------------------------------------------------------------------------------------------- labels and targets


def test_labels_follow_the_order_of_ids_whatever_their_gaps(tmp_path: Path) -> None:
    boxes = [annotation(1, 1, 7, [0, 0, 9, 9]), annotation(2, 1, 3, [9, 9, 9, 9])]
    dataset = validation(write_coco(tmp_path, boxes))
    assert dataset.classes == ("dog", "cat")
    assert dataset.category_ids == (3, 7)
    assert dataset[0][1]["labels"].tolist() == [1, 0]


def test_a_models_class_list_gives_the_labels_by_name(tmp_path: Path) -> None:
    boxes = [annotation(1, 1, 7, [0, 0, 9, 9]), annotation(2, 1, 3, [9, 9, 9, 9])]
    dataset = validation(write_coco(tmp_path, boxes), classes=("N/A", "cat", "N/A", "dog"))
    assert dataset.category_ids == (None, 7, None, 3)
    assert dataset[0][1]["labels"].tolist() == [1, 3]


def test_a_model_of_other_classes_is_refused_with_both_lists(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, [annotation(1, 1, 7, [0, 0, 9, 9])])
    with pytest.raises(ValueError, match=r"the model has 2 \(cat, fish\), the dataset has 2 \(dog, cat\)"):
        validation(paths, classes=("cat", "N/A", "fish"))


def test_boxes_are_centres_and_sizes_in_parts_of_the_image(tmp_path: Path) -> None:
    (_, target), *_ = validation(write_coco(tmp_path, [annotation(1, 1, 3, [15, 10, 30, 20])]), sizes=(20,))
    assert target["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64
    del target["boxes"], target["labels"]
    assert target == {"image_id": 1, "size": (20, 30), "orig_size": (40, 60), "dropped_boxes": 0}


def test_images_come_in_order_of_id_and_those_without_boxes_too(tmp_path: Path) -> None:
    sizes = {9: (40, 40), 2: (40, 50), 5: (40, 60)}
    boxes = [annotation(1, 9, 3, [0, 0, 9, 9]), annotation(2, 2, 3, [0, 0, 9, 9]), annotation(3, 9, 7, [1, 1, 9, 9])]
    targets = [target for _, target in map(validation(write_coco(tmp_path, boxes, sizes=sizes)).__getitem__, range(3))]
    assert [target["image_id"] for target in targets] == [2, 5, 9]
    assert [target["orig_size"] for target in targets] == [(40, 50), (40, 60), (40, 40)]
    assert [target["labels"].tolist() for target in targets] == [[0], [], [0, 1]]
    assert targets[1]["boxes"].shape == (0, 4)


def test_crowds_are_no_targets_and_evaluated_as_crowds(tmp_path: Path) -> None:
    crowd = {**annotation(2, 1, 3, [5, 5, 30, 30]), "iscrowd": 1}
    dataset = validation(write_coco(tmp_path, [annotation(1, 1, 7, [0, 0, 9, 9]), crowd]))
    assert dataset[0][1]["labels"].tolist() == [1]
    assert [a["iscrowd"] for a in dataset.coco.loadAnns(dataset.coco.getAnnIds())] == [0, 1]


def test_area_and_iscrowd_may_be_missing(tmp_path: Path) -> None:
    entry = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 8, 5]}
    dataset = validation(write_coco(tmp_path, [entry]))
    (found,) = dataset.coco.dataset["annotations"]
    assert (found["area"], found["iscrowd"]) == (40, 0)


def test_area_and_iscrowd_that_are_null_are_as_good_as_missing(tmp_path: Path) -> None:
    entry = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 8, 5], "area": None, "iscrowd": None}
    dataset = validation(write_coco(tmp_path, [entry, {**entry, "area": 12.5, "iscrowd": 1.0}]))
    found = dataset.coco.dataset["annotations"]
    assert [(each["area"], each["iscrowd"]) for each in found] == [(40, 0), (12.5, 1)]
    assert dataset[0][1]["labels"].tolist() == [0]


def test_numbers_that_no_integer_type_holds_are_pixels_like_others(tmp_path: Path) -> None:
    boxes = [[-(10**30), 0, 2 * 10**30, 20], [-1e12, 0, 1e12 + 30, 40], [0, 0, 1e300, 40]]
    paths = write_coco(tmp_path, [annotation(i, 1, 3, box) for i, box in enumerate(boxes, 1)])
    with pytest.warns(UserWarning, match="3 of 3 boxes reach beyond their image"):
        dataset = validation(paths)
    expected = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
    torch.testing.assert_close(dataset[0][1]["boxes"], expected)
    assert np.isfinite(np.array([each["bbox"] for each in dataset.coco.dataset["annotations"]], float)).all()


def test_ids_may_take_all_of_64_bits(tmp_path: Path) -> None:
    sizes = {2**63 - 1: (40, 60), -(2**63): (40, 60)}
    boxes = [annotation(1, image, 3, [0, 0, 70, 40]) for image in sizes]
    with pytest.warns(UserWarning, match=f"in the images with ids -{2**63}, {2**63 - 1}$"):
        dataset = validation(write_coco(tmp_path, boxes, sizes=sizes))
    assert dataset[1][1]["image_id"] == 2**63 - 1


def test_boxes_without_width_or_height_are_left_out_and_counted(tmp_path: Path) -> None:
    boxes = [[0, 0, 0, 9], [5, 5, 9, 0], [3, 3, 9, 9]]
    dataset = validation(write_coco(tmp_path, [annotation(i, 1, 3, box) for i, box in enumerate(boxes, 1)]))
    assert dataset.degenerate_boxes == 2
    assert len(dataset[0][1]["boxes"]) == 1


def test_boxes_that_reach_beyond_the_image_are_clipped_with_a_warning(tmp_path: Path) -> None:
    boxes = [annotation(1, 1, 3, [30, -20, 60, 40]), annotation(2, 1, 3, [0, 0, 60.5, 40])]
    paths = write_coco(tmp_path, boxes)
    with pytest.warns(UserWarning, match="1 of 2 boxes reach beyond their image and are clipped, in .* ids 1$"):
        dataset = validation(paths)
    assert dataset[0][1]["boxes"].tolist() == [[0.75, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]


def test_boxes_given_as_parts_of_the_image_are_refused(tmp_path: Path) -> None:
    boxes = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.25, 0.5], [0, 0, 1, 0.9], [0.5, 0.5, 0, 0.1]]
    crowd = {**annotation(9, 1, 3, [0, 0, 30, 30]), "iscrowd": 1}
    paths = write_coco(tmp_path, [crowd, *(annotation(i, 1, 3, box) for i, box in enumerate(boxes))])
    told = r"val\.json: 3 of 3 boxes have a side of less than a pixel; bbox must be .* in pixels, not in parts of the"
    with pytest.raises(ValueError, match=told):
        validation(paths)


def test_boxes_of_less_than_a_pixel_among_others_are_told_when_the_file_is_opened(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    boxes = [[0.1, 0.2, 0.3, 0.4], [5, 5, 20, 0.5], [0, 0, 1, 1], [33.3, 9.7, 1, 1]]
    paths = write_coco(tmp_path, [annotation(i, 1, 3, box) for i, box in enumerate(boxes)])
    validation(paths)
    (told,) = [str(each.message) for each in recwarn]
    assert f"{paths[1]}: 2 of 4 boxes have a side of less than a pixel" in told


def test_collate_gives_lists(tmp_path: Path) -> None:
    sizes = {1: (40, 60), 2: (50, 40)}
    dataset = validation(write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 9, 9])], sizes=sizes))
    images, targets = coco.collate([dataset[0], dataset[1]])
    assert [tuple(image.shape) for image in images] == [(3, 40, 60), (3, 50, 40)]
    assert [target["image_id"] for target in targets] == [1, 2]


def test_batches_of_many_images_take_few_file_descriptors(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    sizes = {i: (10 + i, 30) for i in range(1, 65)}
    boxes = [annotation(i, i, 3, [0, 0, 9, i % 5 + 1]) for i in sizes if i % 3]
    dataset = validation(write_coco(tmp_path, boxes, sizes=sizes))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(tmp_path / "last", "wb") as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 60, hard))
    try:
        ((images, targets),) = coco.load_batches(dataset, torch.device("cpu"), 1, batch_size=64, timeout=60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        assert torch.equal(image, dataset[i][0])
        assert all(torch.equal(target.pop(name), dataset[i][1][name]) for name in ("boxes", "labels"))
        assert target == {name: value for name, value in dataset[i][1].items() if name not in ("boxes", "labels")}


# --------------------------------------------------------------------------------------------------------------- images


def test_images_are_normalised_with_imagenets_mean_and_deviation(tmp_path: Path) -> None:
    image, _ = validation(write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 9, 9])]))[0]
    assert image.dtype == torch.float32
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 40, 60))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_are_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(load_image(path), torch.full((3, 4, 5), 255, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (3, 5000)])
def test_no_side_is_resized_to_nothing(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, width, height])], sizes={1: size})
    image, target = validation(paths, sizes=(800,), max_size=1333)[0]
    assert sorted(image.shape[1:]) == [1, 1333]
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


@pytest.mark.parametrize(("max_size", "expected"), [(1333, (20, 30)), (24, (16, 24))])
def test_the_short_side_is_resized_unless_the_longest_would_exceed_its_limit(
    tmp_path: Path, max_size: int, expected: tuple[int, int]
) -> None:
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 30, 20])])
    image, target = validation(paths, sizes=(10, 20), max_size=max_size)[0]
    assert tuple(image.shape[1:]) == target["size"] == expected
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5]]))


@pytest.mark.parametrize("upright", [False, True])
def test_photographs_are_turned_as_their_boxes_are(tmp_path: Path, upright: bool) -> None:
    # White where the box is: the first is annotated upright, the second as stored, and the third may be either.
    sizes = {1: (60, 40), 2: (40, 60), 3: (50, 50)}
    stored = {1: [0, 10, 20, 30], 2: [0, 10, 20, 30], 3: [0, 15, 20, 30]}
    turned = [0, 0, 30, 20]  # by 90°, clockwise
    boxes = {1: turned, 2: stored[2], 3: [5, 0, 30, 20] if upright else stored[3]}
    paths = write_coco(tmp_path, [annotation(i, i, 3, box) for i, box in boxes.items()], sizes=sizes)
    exif = Image.Exif()
    exif[274] = 6
    for i, (x, y, width, height) in stored.items():
        pixels = np.zeros((50, 50, 3) if i == 3 else (40, 60, 3), np.uint8)
        pixels[y : y + height, x : x + width] = 255
        Image.fromarray(pixels).save(paths[0] / f"{i}.png", exif=exif)
    dataset = validation(paths, upright=upright)
    for image, target in map(dataset.__getitem__, range(3)):
        height, width = target["size"]
        x, y, w, h = (target["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        white = (image[0] > 0).nonzero()
        extent = [white[:, 1].min(), white[:, 0].min(), white[:, 1].max() + 1, white[:, 0].max() + 1]
        assert [v.item() for v in extent] == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1)


# --------------------------------------------------------------------------------------------------------- augmentation


def test_boxes_stay_on_what_they_enclose_through_every_augmentation(tmp_path: Path) -> None:
    dataset = CocoDetection(*write_squares(tmp_path), train=True, sizes=(48, 80), max_size=110)
    seen = set()
    for epoch in range(15):
        dataset.set_epoch(epoch)
        for image, target in map(dataset.__getitem__, range(len(dataset))):
            white = (image[0] > 0).nonzero()  # above ImageNet's mean
            if len(target["boxes"]) == 0:
                continue
            height, width = target["size"]
            x, y, w, h = (target["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
            extent = [white[:, 1].min(), white[:, 0].min(), white[:, 1].max() + 1, white[:, 0].max() + 1]
            # Twice the resize rounds a side to whole pixels, and the threshold lies within a pixel of the edge.
            assert [v.item() for v in extent] == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=2)
            seen.add((target["image_id"], round(w), round(h)))
    assert len(seen) > 3 * len(dataset)


def test_sizes_are_among_those_given_and_the_longest_side_is_limited(tmp_path: Path) -> None:
    dataset = CocoDetection(*write_squares(tmp_path), train=True, sizes=(48, 80), max_size=110, crop=False)
    seen = set()
    for epoch in range(10):
        dataset.set_epoch(epoch)
        seen |= {dataset[i][1]["size"] for i in range(3)}
    assert seen == {(48, 72), (72, 48), (73, 110), (110, 73), (48, 48), (80, 80)}


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_images_are_mirrored_unless_flip_is_off(tmp_path: Path, flip: bool) -> None:
    paths = write_squares(tmp_path, count=1)
    dataset = CocoDetection(*paths, train=True, sizes=(60,), crop=False, flip=flip)
    centres = []
    for epoch in range(64):
        dataset.set_epoch(epoch)
        centres.append(round(dataset[0][1]["boxes"][0, 0].item() * dataset[0][1]["size"][1], 1))
    # Image 1 is 60 wide; its box reaches from 11 to 36.
    assert set(centres) == ({23.5, 36.5} if flip else {23.5})
    if flip:
        assert 8 <= centres.count(36.5) <= 56  # six standard deviations around a half


def test_crops_cut_boxes_off_and_count_those_they_lose(tmp_path: Path) -> None:
    corners = [[0, 0, 8, 8], [112, 0, 8, 8], [0, 92, 8, 8], [112, 92, 8, 8]]
    boxes = [annotation(i, 1, 3, box) for i, box in enumerate(corners, 1)]
    paths = write_coco(tmp_path, boxes, sizes={1: (100, 120)}, split="train")
    dataset = CocoDetection(*paths, train=True, sizes=(100,))
    dropped = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        _, target = dataset[0]
        assert len(target["boxes"]) == len(target["labels"]) == 4 - target["dropped_boxes"]
        dropped.append(target["dropped_boxes"])
    assert 0 in dropped
    assert max(dropped) >= 3


def test_boxes_of_less_than_a_pixel_after_the_resize_are_dropped_and_counted(tmp_path: Path) -> None:
    boxes = [annotation(1, 1, 3, [0, 0, 3, 30]), annotation(2, 1, 7, [10, 10, 5, 5])]
    (_, target), *_ = validation(write_coco(tmp_path, boxes), sizes=(10,))
    assert target["labels"].tolist() == [1]
    assert target["dropped_boxes"] == 1


def test_a_box_of_the_whole_image_survives_the_rounding_of_a_resize(tmp_path: Path) -> None:
    # Its right edge comes to 214.00002 of 214 pixels.
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 83, 31])], sizes={1: (31, 83)})
    _, target = validation(paths, sizes=(80,))[0]
    assert target["size"] == (80, 214)
    assert target["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_a_panorama_is_cropped_at_full_height(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 800, 80])], sizes={1: (80, 800)}, split="train")
    dataset = CocoDetection(*paths, train=True, sizes=(80,), max_size=120)
    shapes = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        shapes.add(dataset[0][1]["size"])
    # Uncropped it is limited to 120 pixels; crops have sides of 38 to 60, the height 40 at least in the image.
    assert (12, 120) in shapes
    assert len(shapes) > 5
    assert all(min(shape) >= 38 / 60 * max(shape) - 1 for shape in shapes - {(12, 120)})


@pytest.mark.parametrize(
    ("shapes", "crop", "of_many", "of_one"),
    [
        ([(48, 64)], False, (80, 106), (80, 106)),
        ([(64, 48), (48, 64)], False, (106, 106), (106, 80)),
        ([(10, 100)], False, (13, 133), (13, 133)),
        # Crops have sides of 38 to 60 pixels, so wide images have high ones.
        ([(48, 64)], True, (126, 126), (126, 80)),
        ([(64, 48), (48, 64)], True, (126, 126), (126, 80)),
        ([(10, 100)], True, (45, 133), (45, 133)),
    ],
)
def test_no_batch_is_larger_than_the_largest(
    tmp_path: Path, shapes: list[tuple[int, int]], crop: bool, of_many: tuple[int, int], of_one: tuple[int, int]
) -> None:
    sizes = dict(enumerate(shapes, 1))
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 9, 9])], sizes=sizes, split="train")
    dataset = CocoDetection(*paths, train=True, sizes=(48, 80), max_size=133, crop=crop)
    assert (dataset.largest_size(2), dataset.largest_size(1)) == (of_many, of_one)
    for epoch in range(50):
        dataset.set_epoch(epoch)
        for height, width in (dataset[i][1]["size"] for i in range(len(shapes))):
            assert height <= of_many[0]
            assert width <= of_many[1]
            assert height * width <= of_one[0] * of_one[1]


@pytest.mark.parametrize("size", [(3, 2600), (2600, 3), (1, 5000), (2, 1000), (60, 900)])
def test_long_thin_images_are_enlarged_no_further_than_their_final_long_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    height, width = size
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, width, height])], sizes={1: size}, split="train")
    dataset = CocoDetection(*paths, train=True)
    made: list[torch.Size] = []
    real = coco.resize_to
    monkeypatch.setattr(coco, "resize_to", lambda *call: made.append((result := real(*call)).shape[1:]) or result)
    for epoch in range(12):
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        assert 1 <= min(image.shape[1:]) <= max(image.shape[1:]) <= 1333
        assert len(target["boxes"]) == 1
    assert len(made) >= 12
    assert max(max(shape) for shape in made) <= max(1333, *size)


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    paths = write_squares(tmp_path)

    def items(order: list[int], epoch: int = 3, seed: int = 5) -> dict[int, tuple[Any, ...]]:
        dataset = CocoDetection(*paths, train=True, sizes=(32, 48, 64), seed=seed)
        dataset.set_epoch(epoch)
        return {i: dataset[i] for i in order}

    first = items(list(range(6)))
    torch.manual_seed(0)
    again = items([4, 1, 0, 5])
    for i, (image, target) in again.items():
        assert torch.equal(image, first[i][0])
        assert torch.equal(target["boxes"], first[i][1]["boxes"])
    for other in (items(list(range(6)), epoch=4), items(list(range(6)), seed=6)):
        assert any(image.shape != first[i][0].shape for i, (image, _) in other.items())


def test_loading_leaves_torchs_own_generator_alone(tmp_path: Path) -> None:
    dataset = CocoDetection(*write_squares(tmp_path), train=True, sizes=(48,))
    before = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_that_live_on_see_a_new_epoch(tmp_path: Path) -> None:
    dataset = CocoDetection(*write_squares(tmp_path), train=True, sizes=(32, 48, 64))
    loader = DataLoader(dataset, 3, collate_fn=coco.collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        loaded = [image for images, _ in loader for image in images]
        here = [dataset[i][0] for i in range(len(dataset))]
        assert all(torch.equal(a, b) for a, b in zip(loaded, here, strict=True))


@pytest.mark.parametrize(("sizes", "max_size"), [((), 1333), ((0, 4), 1333), ((64, 97), 96)])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, sizes: tuple[int, ...], max_size: int) -> None:
    paths = write_coco(tmp_path, [annotation(1, 1, 3, [0, 0, 9, 9])])
    with pytest.raises(ValueError, match="sizes must be at least one, from 1 to max_size"):
        validation(paths, sizes=sizes, max_size=max_size)


# ----------------------------------------------------------------------------------------------------------- wrong data


GOOD = annotation(1, 1, 3, [0, 0, 9, 9])
IMAGE = {"id": 1, "file_name": "1.png", "height": 40, "width": 60}


@pytest.mark.parametrize(
    ("annotations", "parts", "message"),
    [
        (
            [annotation(5, 1, 4, [0, 0, 9, 9])],
            {},
            r"annotation 5 of image 1: category_id must be one of .*3 dog.*got 4",
        ),
        ([annotation(5, 8, 3, [0, 0, 9, 9])], {}, "annotation 5 of image 8: there is no image of that id"),
        ([annotation(5, 1, 3, [60, 0, 9, 9])], {}, r"\[60, 0, 9, 9\] lies outside the image, 60 × 40 pixels"),
        ([annotation(5, 1, 3, [0, -9, 9, 9])], {}, "annotation 5 of image 1: bbox .* lies outside the image"),
        (
            [annotation(5, 1, 3, [0, 0, -9, 9])],
            {},
            r"bbox must be \[x, y, width, height\] in pixels, got \[0, 0, -9, 9\]",
        ),
        ([annotation(5, 1, 3, [0, 0, 9])], {}, r"bbox must be \[x, y, width, height\] in pixels, got \[0, 0, 9\]"),
        ([annotation(5, 1, 3, [0, 0, 9, float("nan")])], {}, r"bbox must be .*, got \[0, 0, 9, nan\]"),
        ([annotation(5, 1, 3, [0, 0, 9, "9"])], {}, r"bbox must be .*, got \[0, 0, 9, '9'\]"),
        ([{"image_id": 1, "category_id": 3}], {}, r"annotations\[0\] must have bbox \(list\), got {"),
        (
            [GOOD],
            {"images": [{**IMAGE, "id": 2**63}]},
            r"json: images\[0\]: id must fit 64 bits, got 9223372036854775808",
        ),
        ([{**GOOD, "image_id": -(10**400)}], {}, r"annotations\[0\]: image_id must fit 64 bits, got -10000"),
        ([GOOD], {"images": [{**IMAGE, "id": True}]}, r"images\[0\] must have id \(int\), got .*true"),
        (
            [GOOD],
            {"images": [IMAGE, {**IMAGE, "id": 2, "height": 0}]},
            r"json: images\[1\], id 2: height must be 1 to .* pixels, got 0",
        ),
        ([GOOD], {"images": [{**IMAGE, "width": -1}]}, r"images\[0\], id 1: width must be 1 to .* pixels, got -1"),
        ([GOOD], {"images": [{**IMAGE, "width": 2**70}]}, r"images\[0\]: width must fit 64 bits"),
        ([GOOD], {"images": [{**IMAGE, "width": 2**40}]}, r"images\[0\], id 1: width must be 1 to 2147483647 pixels"),
        ([{**GOOD, "bbox": [0, 0, 9, 10**400]}], {}, r"annotation 1 of image 1: bbox must be .*, got \[0, 0, 9, 1000"),
        ([{**GOOD, "bbox": [0, 0, 9, True]}], {}, r"annotation 1 of image 1: bbox must be .*, got \[0, 0, 9, True\]"),
        *(
            (
                [{**GOOD, "iscrowd": value}],
                {},
                f"val.json: annotation 1 of image 1: iscrowd must be 0 or 1.*, got {told}",
            )
            for value, told in (
                ("0", '"0"'),
                ("", '""'),
                ([], r"\[\]"),
                ({}, "{}"),
                (2, "2"),
                (-1, "-1"),
                (0.5, "0.5"),
                (float("nan"), "NaN"),
                (False, "false"),
                (10**400, "1000"),
            )
        ),
        *(
            ([{**GOOD, "area": value}], {}, f"val.json: annotation 1 of image 1: area must be a number.*, got {told}")
            for value, told in (
                ("81", '"81"'),
                ([81], r"\[81\]"),
                ({}, "{}"),
                (True, "true"),
                (float("inf"), "Infinity"),
                (float("nan"), "NaN"),
                (-1, "-1"),
                (10**400, "1000"),
            )
        ),
        ([GOOD], {"images": [IMAGE, {**IMAGE, "id": "2"}]}, r"images\[1\] must have id \(int\), got"),
        ([GOOD], {"images": [IMAGE, IMAGE]}, "each id in images must be there once, repeated: 1"),
        ([GOOD], {"categories": [*CATEGORIES, {"id": 9, "name": "cat"}]}, "each name in categories .* repeated: cat"),
        ([], {"images": []}, "images must not be empty"),
        ([], {}, "annotations must have at least one box that is no crowd"),
        ([{**GOOD, "iscrowd": 1}], {}, "annotations must have at least one box that is no crowd"),
        (
            [GOOD],
            {"annotations": {}},
            "annotations must be a JSON object with the lists images, categories, annotations",
        ),
        ([GOOD], {"images": [{**IMAGE, "file_name": "nowhere.png"}]}, "1 of 1 are not in .*val: nowhere.png"),
    ],
)
def test_wrong_annotations_are_refused(
    tmp_path: Path, annotations: list[Any], parts: dict[str, Any], message: str
) -> None:
    paths = write_coco(tmp_path, annotations, **parts)
    with pytest.raises(ValueError, match=message):
        validation(paths)


def test_annotations_that_are_not_there_or_no_json_are_refused(tmp_path: Path) -> None:
    images, file = write_coco(tmp_path, [GOOD])
    with pytest.raises(ValueError, match=r"annotations must be a file that can be read, got .*no\.json: No such file"):
        validation((images, tmp_path / "no.json"))
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"annotations must be JSON, got .*val\.json: "):
        validation((images, file))
    file.write_text('{"images": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"annotations must be JSON, got .*val\.json: "):
        validation((images, file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"annotations must be JSON, got .*val\.json: "):
        validation((images, file))


def test_a_folder_of_images_that_is_not_there_is_refused(tmp_path: Path) -> None:
    _, file = write_coco(tmp_path, [GOOD])
    with pytest.raises(ValueError, match=r"images must be a folder, got .*elsewhere"):
        validation((tmp_path / "elsewhere", file))


def test_images_may_lie_in_subfolders(tmp_path: Path) -> None:
    images, file = write_coco(tmp_path, [GOOD], images=[{**IMAGE, "file_name": "a/1.png"}])
    (images / "a").mkdir()
    (images / "1.png").rename(images / "a" / "1.png")
    assert len(validation((images, file))) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut off", "no image"])
def test_a_broken_image_is_named_also_by_a_worker(tmp_path: Path, damage: str, workers: int) -> None:
    images, file = write_coco(tmp_path, [GOOD])
    content = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(content[:60] if damage == "cut off" else b"GIF89a, or is it?")
    loader = DataLoader(validation((images, file)), collate_fn=coco.collate, num_workers=workers)
    with pytest.raises(ValueError, match=r"^image .*1\.png can't be read: .+"):
        next(iter(loader))


def test_processes_that_load_end_with_an_error_though_somebody_keeps_it(tmp_path: Path) -> None:
    # They ignore the signal by which a process ends its children, so one that they outlived would never end.
    images, file = write_coco(tmp_path, [GOOD])
    (images / "1.png").write_bytes(b"no image")
    before = multiprocessing.active_children()
    with pytest.raises(DataError) as kept:
        list(coco.load_batches(validation((images, file)), torch.device("cpu"), 1, batch_size=1))
    assert set(multiprocessing.active_children()) <= set(before)
    assert "1.png" in str(kept.value)


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    dataset = validation(write_coco(tmp_path, [GOOD], images=[{**IMAGE, "height": 60, "width": 40}]))
    with pytest.raises(
        ValueError, match=r"1\.png must be of the size in .*val\.json, 40 × 60 pixels, got 60 × 40 pixels"
    ):
        dataset[0]


def test_loading_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = validation(write_coco(tmp_path, [GOOD]))
    assert len(dataset.coco.anns) == 1
    assert capsys.readouterr() == ("", "")


def test_training_does_not_hold_masks(tmp_path: Path) -> None:
    dataset = validation(write_coco(tmp_path, [{**GOOD, "segmentation": [[0, 0, 9, 0, 9, 9]]}]))
    assert "segmentation" not in json.dumps(dataset.coco.dataset)
