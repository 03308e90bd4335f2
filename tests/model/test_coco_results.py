"""Numbers of faster-coco-eval beside pycocotools', class by class, and confusion matrices written out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from smca_model.coco_results import FASTER, PYCOCOTOOLS, confusion_matrix, measure
from smca_model.data.annotations import make_coco

CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 9, "name": "cow"}]
LAST_BIT = 2.0**-52


@pytest.fixture
def rng(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))


def truth(*objects: tuple[int, int, list[float], int], images: int = 3) -> Any:
    """Ground truth of (image, category, xywh, crowd)."""
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for n, (image, category, box, crowd) in enumerate(objects, 1)
    ]
    entries = [{"id": i, "width": 500, "height": 500, "file_name": f"{i}.png"} for i in range(images)]
    return make_coco({"images": entries, "annotations": annotations, "categories": CATEGORIES})


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def random_results(rng: np.random.Generator, *, crowds: bool = True) -> tuple[Any, list[dict[str, Any]]]:
    """Objects of all sizes, some images without, and detections near and far, with ties, of one image hundreds."""
    ids = [category["id"] for category in CATEGORIES[:2]]  # the third has none
    large = [100.0, 100.0, 150.0, 150.0]
    objects, detections = [(1, ids[0], large, 0)], [found(1, ids[0], large, 0.5)]
    for image in range(12):
        for _ in range(0 if image % 4 == 0 else rng.integers(1, 12)):
            box = np.concatenate((300 * rng.random(2), np.exp(1 + 4.5 * rng.random(2))))
            category = int(rng.choice(ids))
            objects.append((image, category, box.tolist(), int(crowds and rng.random() < 0.2)))
            for _ in range(rng.integers(0, 6)):
                near = box + 0.1 * rng.normal(size=4) * np.tile(box[2:], 2)
                as_what = category if rng.random() < 0.8 else 9
                detections.append(found(image, as_what, near.clip(0.1).tolist(), round(rng.random(), 1)))
        for _ in range(250 if image % 5 == 0 else 3):
            box = np.concatenate((300 * rng.random(2), 200 * rng.random(2)))
            detections.append(found(image, int(rng.choice(ids)), box.tolist(), round(rng.random(), 2)))
    return truth(*objects, images=12), detections


def test_faster_coco_eval_gives_pycocotools_numbers(rng: np.random.Generator) -> None:
    pytest.importorskip("faster_coco_eval")
    for _ in range(5):
        coco, detections = random_results(rng)
        slow = measure(copy.deepcopy(coco), detections, library=PYCOCOTOOLS)
        fast = measure(coco, detections, library=FASTER)
        # pycocotools divides by 2⁻⁵² more than the number of detections: it matters where that is 1, and nowhere else.
        assert set(np.unique(fast.precision - slow.precision)) <= {0.0, LAST_BIT}
        assert (fast.precision[fast.precision != slow.precision] == 1).all()
        recalls = [name for name in slow.numbers if name.startswith("AR")]
        assert [fast.numbers[name] for name in recalls] == [slow.numbers[name] for name in recalls]
        # Means of terms that differ by a last bit; NumPy adds 128 by eights, and then in pairs, rounding each time.
        roundings = 128 / 8 + 3 + math.log2(slow.precision.size)
        for name in slow.numbers:
            assert abs(fast.numbers[name] - slow.numbers[name]) <= (1 + roundings) * LAST_BIT
        assert np.array_equal(fast.boxes, slow.boxes)
        assert 0 < slow.numbers["AP"] < slow.numbers["AP50"] < 1
        assert slow.numbers["APl"] > 0
        assert fast.table == slow.table
        assert (fast.library.split()[0], slow.library.split()[0]) == (FASTER, PYCOCOTOOLS)


@pytest.mark.parametrize("library", [PYCOCOTOOLS, FASTER])
def test_finding_nothing_is_an_ap_of_0_by_either(library: str) -> None:
    if library == FASTER:
        pytest.importorskip("faster_coco_eval")
    results = measure(truth((0, 2, [0, 0, 9, 9], 0)), [], library=library)
    assert (results.numbers["AP"], results.numbers["AR100"], results.numbers["APl"]) == (0, 0, -1)
    assert results.ap.tolist() == [0, -1, -1]


@pytest.mark.parametrize(("installed", "expected"), [(True, FASTER), (False, PYCOCOTOOLS)])
def test_the_faster_one_is_taken_where_it_is_installed(
    installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    pytest.importorskip("faster_coco_eval")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: real(name) if installed or name != "faster_coco_eval" else None
    )
    assert measure(truth((0, 2, [0, 0, 9, 9], 0)), []).library.startswith(f"{expected} ")


def test_each_class_has_its_own_ap() -> None:
    coco = truth(
        (0, 2, [10, 10, 30, 30], 0), (1, 2, [10, 10, 30, 30], 0), (1, 5, [50, 50, 30, 30], 0), (2, 5, [0] * 4, 1)
    )
    detections = [
        found(0, 2, [10, 10, 30, 30], 0.9),  # one of two cats
        found(1, 5, [50, 50, 30, 21.9], 0.8),  # IoU 0.73: up to a threshold of 0.70, five of ten
    ]
    results = measure(coco, detections)
    assert results.classes == ("cat", "dog", "cow")
    assert results.boxes.tolist() == [2, 1, 0]  # crowds aside
    assert results.ap50.tolist() == pytest.approx([51 / 101, 1, -1])
    assert results.ap.tolist() == pytest.approx([51 / 101, 0.5, -1])
    assert results.numbers["AP"] == pytest.approx((51 / 101 + 0.5) / 2)
    assert results.precision[0, [0, 50, 51, 100], 0].tolist() == pytest.approx([1, 1, 0, 0])


# --------------------------------------------------------------------------------------------------- confusion matrices

CAT, DOG, COW, NOTHING = range(4)


def entries(coco: Any, detections: list[dict[str, Any]], **options: float) -> dict[tuple[int, int], int]:
    """What is not 0 of a confusion matrix."""
    matrix = confusion_matrix(coco, detections, **options)
    assert matrix.shape == (4, 4)
    return {(int(row), int(column)): int(matrix[row, column]) for row, column in np.argwhere(matrix)}


BOX, ELSEWHERE = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 40.0, 40.0]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([found(0, 2, BOX, 0.9)], {(CAT, CAT): 1}),
        ([found(0, 5, BOX, 0.9)], {(CAT, DOG): 1}),
        ([], {(CAT, NOTHING): 1}),
        ([found(0, 2, BOX, 0.4)], {(CAT, NOTHING): 1}),  # below the score
        ([found(0, 2, BOX, 0.5)], {(CAT, CAT): 1}),  # at the score
        ([found(0, 2, ELSEWHERE, 0.9)], {(CAT, NOTHING): 1, (NOTHING, CAT): 1}),
        ([found(1, 2, BOX, 0.9)], {(CAT, NOTHING): 1, (NOTHING, CAT): 1}),  # in another image
        # Twice: the one that fits better is the match, the other is of nothing.
        ([found(0, 2, BOX, 0.6), found(0, 2, [10, 10, 40, 30], 0.9)], {(CAT, CAT): 1, (NOTHING, CAT): 1}),
        # As two classes: the right one is the match, however sure and well placed the other.
        ([found(0, 5, BOX, 0.9), found(0, 2, [10, 10, 40, 30], 0.6)], {(CAT, CAT): 1, (NOTHING, DOG): 1}),
        ([found(0, 2, [10, 10, 40, 20], 0.9)], {(CAT, CAT): 1}),  # IoU 0.5
        ([found(0, 2, [10, 10, 40, 19], 0.9)], {(CAT, NOTHING): 1, (NOTHING, CAT): 1}),
    ],
)
def test_detections_of_one_box(detections: list[dict[str, Any]], expected: dict[tuple[int, int], int]) -> None:
    assert entries(truth((0, 2, BOX, 0)), detections) == expected


def test_a_box_that_is_taken_leaves_its_detection_to_the_next_best() -> None:
    coco = truth((0, 2, [0, 0, 40, 40], 0), (0, 2, [10, 0, 40, 40], 0))
    both = [found(0, 2, [0, 0, 40, 40], 0.6), found(0, 2, [4, 0, 40, 40], 0.9)]
    assert entries(coco, both) == {(CAT, CAT): 2}


@pytest.mark.parametrize(
    ("detection", "expected"),
    [
        (found(0, 2, [310, 310, 20, 20], 0.9), {(DOG, NOTHING): 1}),  # inside, though of a small IoU
        (found(0, 2, [290, 300, 20, 20], 0.9), {(DOG, NOTHING): 1}),  # half of it
        (found(0, 2, [289, 300, 20, 20], 0.9), {(DOG, NOTHING): 1, (NOTHING, CAT): 1}),
        (found(0, 5, [310, 310, 20, 20], 0.9), {(DOG, NOTHING): 1, (NOTHING, DOG): 1}),  # of another class
        (found(0, 5, [410, 310, 20, 20], 0.9), {(DOG, DOG): 1}),
        (found(0, 2, [410, 310, 20, 20], 0.9), {(DOG, NOTHING): 1}),  # the crowd's class, where the dog is
    ],
)
def test_what_is_found_in_a_crowd_of_its_class_does_not_count(
    detection: dict[str, Any], expected: dict[tuple[int, int], int]
) -> None:
    coco = truth((0, 2, [300, 300, 150, 150], 1), (0, 5, [410, 310, 20, 20], 0))
    assert entries(coco, [detection]) == expected


def test_a_box_in_a_crowd_is_matched_before_the_crowd() -> None:
    coco = truth((0, 2, [300, 300, 150, 150], 1), (0, 2, [310, 310, 20, 20], 0))
    inside = found(0, 2, [310, 310, 20, 20], 0.9)
    assert entries(coco, [inside]) == {(CAT, CAT): 1}
    assert entries(coco, [inside, inside]) == {(CAT, CAT): 1}


def test_score_and_iou_are_those_asked_for() -> None:
    coco, detection = truth((0, 2, BOX, 0)), found(0, 2, [10, 10, 40, 30], 0.3)
    assert entries(coco, [detection], score=0.3, iou=0.75) == {(CAT, CAT): 1}
    assert entries(coco, [detection], score=0.31, iou=0.75) == {(CAT, NOTHING): 1}
    assert entries(coco, [detection], score=0.3, iou=0.76) == {(CAT, NOTHING): 1, (NOTHING, CAT): 1}


def test_without_crowds_it_is_supervisions_matrix(rng: np.random.Generator) -> None:
    supervision = pytest.importorskip("supervision")
    coco, detections = random_results(rng, crowds=False)
    label = {category["id"]: i for i, category in enumerate(CATEGORIES)}

    def rows(of: list[dict[str, Any]], image: int, *more: str) -> Any:
        table = [
            [*each["bbox"][:2], *np.add(each["bbox"][:2], each["bbox"][2:]), label[each["category_id"]]]
            + [each[name] for name in more]
            for each in of
            if each["image_id"] == image
        ]
        return np.array(table, np.float64).reshape(-1, 5 + len(more))

    theirs = supervision.ConfusionMatrix.from_tensors(
        [rows(detections, image, "score") for image in coco.imgs],
        [rows(coco.dataset["annotations"], image) for image in coco.imgs],
        classes=[category["name"] for category in CATEGORIES],
        conf_threshold=0.35,
        iou_threshold=0.4,  # theirs must be above it; random boxes never meet it
    )
    ours = confusion_matrix(coco, detections, score=0.35, iou=0.4)
    assert ours.tolist() == theirs.matrix.tolist()
    boxes = measure(coco, detections).boxes
    assert ours[:-1].sum(1).tolist() == boxes.tolist()
