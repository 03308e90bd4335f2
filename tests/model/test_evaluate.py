"""AP on made predictions with a known answer, against pycocotools on files, and `smca eval`."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

from coco_folder import annotation, write_coco

from smca_model import evaluate as module
from smca_model.coco_results import NAMES, PYCOCOTOOLS, measure
from smca_model.data.coco import CocoDetection

CPU = torch.device("cpu")
SIZES = {4: (40, 60), 9: (80, 50), 11: (64, 64)}


class Prepared(nn.Module):
    """Says the same for each image of a dataset whatever it shows: xywh boxes in pixels, with labels and scores."""

    def __init__(self, dataset: CocoDetection, found: dict[int, list[tuple[int, list[float], float]]]) -> None:
        super().__init__()
        self.images = iter(dataset.image_ids)
        self.sizes = dict(zip(dataset.image_ids, dataset.orig_sizes, strict=True))
        self.classes, self.found = len(dataset.classes), found
        self.queries = max(map(len, found.values()), default=0) + 1

    def forward(self, images: list[Tensor]) -> dict[str, Any]:
        assert not self.training
        logits = torch.full((len(images), self.queries, self.classes), -50.0)
        boxes = torch.full((len(images), self.queries, 4), 1e-3)  # of the other queries: too small to match anything
        for b in range(len(images)):
            image = next(self.images)
            height, width = self.sizes[image]
            for query, (label, (x, y, w, h), score) in enumerate(self.found.get(image, ())):
                logits[b, query, label] = torch.tensor(score).logit()
                boxes[b, query] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
        return {"pred_logits": logits, "pred_boxes": boxes}


def open_dataset(folder: Path, objects: list[dict[str, Any]], **options: Any) -> CocoDetection:
    return CocoDetection(*write_coco(folder, objects, sizes=SIZES), train=False, sizes=(32,), **options)


def evaluated(dataset: CocoDetection, found: dict[int, list[tuple[int, list[float], float]]]) -> dict[str, float]:
    return module.evaluate(Prepared(dataset, found), dataset, batch_size=2, device=CPU, progress=False)


# Category 3 is label 0, 7 is label 1. Ids begin at 0, which pycocotools alone would take for "not matched".
OBJECTS = [
    annotation(0, 4, 3, [5, 5, 20, 20]),
    annotation(1, 9, 7, [10, 20, 30, 50]),
    annotation(2, 11, 3, [1, 2, 30, 40]),
    annotation(3, 11, 7, [30, 30, 20, 20]),
]
PERFECT = {
    4: [(0, [5, 5, 20, 20], 0.9)],
    9: [(1, [10, 20, 30, 50], 0.8)],
    11: [(0, [1, 2, 30, 40], 0.7), (1, [30, 30, 20, 20], 0.6)],
}


def test_finding_everything_is_an_ap_of_1(tmp_path: Path) -> None:
    numbers = evaluated(open_dataset(tmp_path, OBJECTS), PERFECT)
    assert tuple(numbers)[:12] == NAMES
    # No box is of 96² pixels or more.
    expected = dict.fromkeys(NAMES, 1.0) | {"APl": -1.0, "ARl": -1.0}
    assert {name: numbers[name] for name in NAMES} == pytest.approx(expected)
    assert numbers["images_per_second"] > 0


def test_finding_one_of_two_is_the_ap_of_half_the_recall(tmp_path: Path) -> None:
    objects = [annotation(1, 4, 3, [5, 5, 20, 20]), annotation(2, 9, 3, [10, 20, 30, 50])]
    numbers = evaluated(open_dataset(tmp_path, objects), {4: [(0, [5, 5, 20, 20], 0.9)]})
    # Precision is 1 at the recalls 0, 0.01 … 0.50 of 101, and 0 beyond.
    assert numbers["AP"] == numbers["AP50"] == pytest.approx(51 / 101)
    assert numbers["AR100"] == pytest.approx(0.5)


def test_a_box_counts_up_to_the_threshold_of_its_iou(tmp_path: Path) -> None:
    objects = [annotation(1, 4, 3, [5, 5, 30, 30])]
    numbers = evaluated(open_dataset(tmp_path, objects), {4: [(0, [5, 5, 30, 21.9], 0.9)]})
    # IoU 0.73: found at 0.50, 0.55 … 0.70, five of ten thresholds.
    assert (numbers["AP50"], numbers["AP75"]) == pytest.approx((1.0, 0.0))
    assert numbers["AP"] == pytest.approx(0.5)


def test_a_false_detection_costs_precision_by_its_rank(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, [annotation(1, 4, 3, [5, 5, 20, 20])])
    right, wrong = (0, [5, 5, 20, 20], 0.5), [30, 5, 20, 20]
    assert evaluated(dataset, {4: [right, (0, wrong, 0.9)]})["AP"] == pytest.approx(0.5)
    assert evaluated(dataset, {4: [right, (0, wrong, 0.1)]})["AP"] == pytest.approx(1.0)


def test_what_is_found_in_a_crowd_does_not_count_against(tmp_path: Path) -> None:
    found = {4: [(0, [5, 5, 20, 20], 0.5), (0, [30, 5, 10, 10], 0.9), (0, [40, 8, 10, 10], 0.8)]}
    alone = [annotation(1, 4, 3, [5, 5, 20, 20])]
    crowd = {**annotation(2, 4, 3, [28, 2, 30, 30]), "iscrowd": 1}
    assert evaluated(open_dataset(tmp_path / "alone", alone), found)["AP"] == pytest.approx(1 / 3)
    assert evaluated(open_dataset(tmp_path / "crowd", [*alone, crowd]), found)["AP"] == pytest.approx(1.0)


def test_finding_nothing_is_an_ap_of_0(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, OBJECTS)
    numbers = measure(dataset.coco, []).numbers
    assert numbers["AP"] == numbers["AR100"] == 0.0
    assert numbers["APl"] == -1.0


def random_found(objects: list[dict[str, Any]]) -> dict[int, list[tuple[int, list[float], float]]]:
    """The objects moved, mislabelled and scored at random, among others."""
    found: dict[int, list[tuple[int, list[float], float]]] = {image: [] for image in SIZES}
    for each in objects:
        for _ in range(3):
            box = (torch.tensor(each["bbox"]) + 4 * torch.rand(4) - 2).tolist()
            label = int((each["category_id"] == 7) ^ (torch.rand(()) < 0.3))
            found[each["image_id"]].append((label, box, torch.rand(()).item()))
    return found


def test_numbers_are_pycocotools_own_on_the_files(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [
        annotation(i, image, (3, 7)[i % 2], [*(15 * torch.rand(2)).tolist(), *(5 + 20 * torch.rand(2)).tolist()])
        for i, image in enumerate(sorted([*SIZES] * 6), 1)
    ]
    objects = [{**each, "area": each["bbox"][2] * each["bbox"][3]} for each in objects]
    dataset = open_dataset(tmp_path, objects)
    model = Prepared(dataset, random_found(objects))
    detections, _ = module.detect_all(model, dataset, batch_size=2, device=CPU, progress=False)
    # By pycocotools, for the same bits; test_coco_results.py compares the other library with it.
    results = module.measure(dataset.coco, detections, library=PYCOCOTOOLS)
    numbers, table = results.numbers, results.table

    (tmp_path / "results.json").write_text(json.dumps(detections))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        truth = COCO(str(dataset.annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert list(numbers.values()) == evaluation.stats.tolist()
    assert 0 < numbers["AP"] < 1
    assert printed.getvalue().rstrip().endswith(table)
    assert len(table.splitlines()) == 12


def test_detections_are_in_pixels_of_the_file_and_the_datasets_own_ids(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, OBJECTS, classes=("N/A", "cat", "dog"))
    # A label that means nothing is left out, however sure.
    found = {9: [(1, [10.0, 20.0, 30.0, 50.0], 0.75), (0, [1.0, 2.0, 3.0, 4.0], 0.99)]}
    detections, _ = module.detect_all(Prepared(dataset, found), dataset, batch_size=3, device=CPU, progress=False)
    assert {detection["category_id"] for detection in detections} == {3, 7}
    (best,) = (detection for detection in detections if detection["score"] > 0.5)
    assert (best["image_id"], best["category_id"]) == (9, 7)
    assert best["bbox"] == pytest.approx([10, 20, 30, 50])
    assert best["score"] == pytest.approx(0.75)
    assert set(best) == {"image_id", "category_id", "bbox", "score"}


def test_evaluation_leaves_the_model_in_training_and_the_generator_alone(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, OBJECTS)
    model = Prepared(dataset, PERFECT).train()
    before = torch.get_rng_state()
    module.evaluate(model, dataset, batch_size=2, device=CPU, progress=False)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_prints_nothing_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(open_dataset(tmp_path, OBJECTS), PERFECT)
    assert capsys.readouterr() == ("", "")


def test_a_process_may_have_no_image_to_evaluate(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, OBJECTS)
    nothing: Any = Subset(dataset, range(0))
    nothing.classes, nothing.category_ids = dataset.classes, dataset.category_ids
    assert module.detect_all(Prepared(dataset, {}), nothing, batch_size=2, device=CPU, progress=False) == ([], 0.0)


def test_a_model_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    dataset = open_dataset(tmp_path, OBJECTS)
    model = Prepared(dataset, PERFECT)
    model.classes = 5
    with pytest.raises(ValueError, match="model must have the 2 classes of the dataset, got one with 5"):
        module.evaluate(model, dataset, batch_size=2, device=CPU, progress=False)


# ----------------------------------------------------------------------------------------------------------- smca eval


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    pytest.importorskip("safetensors")
    from smca_model import build, weights

    model = build("smca-tiny", 2, hidden_dim=32, num_heads=2, decoder_layers=2, ffn_dim=32, num_queries=5)
    model.image_size = (32, 64)
    weights.save(model, tmp_path / "w.safetensors", ("cat", "dog"))
    return tmp_path / "w.safetensors"


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))


def test_smca_eval_prints_the_twelve_numbers_and_writes_them(
    tmp_path: Path, weights_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "set", OBJECTS, sizes=SIZES)
    numbers, found = tmp_path / "numbers.json", tmp_path / "found.json"
    common = ("--data", tmp_path / "set", "--workers", 0, "--device", "cpu")
    assert run("--weights", weights_file, *common, "--json", numbers, "--detections", found) == 0
    printed = capsys.readouterr().out
    assert printed.count("Average Precision") == printed.count("Average Recall") == 6
    assert "3 images of short side 32 pixels: " in printed
    assert f"AP by {json.loads(numbers.read_text())['ap_by']}" in printed
    assert [line.split()[0] for line in printed.splitlines()[12:15]] == ["class", "dog", "cat"]
    assert " images per second on cpu" in printed
    report = json.loads(numbers.read_text())
    assert {*NAMES, "images_per_second", "images", "weights"} <= set(report)
    assert (report["size"], report["max_size"]) == (32, 64)
    detections = json.loads(found.read_text())
    assert len(detections) == 3 * 5 * 2  # every query and class
    assert {detection["category_id"] for detection in detections} == {3, 7}
    assert all(set(detection) == {"image_id", "category_id", "bbox", "score"} for detection in detections)


def test_smca_eval_writes_what_people_read_into_a_folder(tmp_path: Path, weights_file: Path) -> None:
    pytest.importorskip("matplotlib")
    write_coco(tmp_path / "set", OBJECTS, sizes=SIZES)
    out, found = tmp_path / "new" / "results", tmp_path / "found.json"
    common = ("--weights", weights_file, "--data", tmp_path / "set", "--workers", 0, "--device", "cpu")
    assert run(*common, "--out", out, "--threshold", 0, "--detections", found) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(module.FILES)
    classes = json.loads((out / "classes.json").read_text())
    assert [(each["class"], each["boxes"]) for each in classes] == [("dog", 2), ("cat", 2)]
    confusions = json.loads((out / "confusion_matrix.json").read_text())
    assert (confusions["score"], confusions["iou"]) == (0.0, 0.5)
    # Every detection is somewhere, and every box.
    columns = torch.tensor(confusions["found_as"])
    assert columns[:, :2].sum() == len(json.loads(found.read_text()))
    assert columns[:2].sum(1).tolist() == [2, 2]


def test_smca_eval_takes_another_size_where_it_is_given(tmp_path: Path, weights_file: Path) -> None:
    write_coco(tmp_path / "set", OBJECTS, sizes=SIZES)
    options = ("--size", 40, "--max-size", 100, "--workers", 0, "--device", "cpu", "--json", tmp_path / "n.json")
    assert run("--weights", weights_file, "--data", tmp_path / "set", *options) == 0
    report = json.loads((tmp_path / "n.json").read_text())
    assert (report["size"], report["max_size"]) == (40, 100)


def test_smca_eval_refuses_weights_of_other_classes(tmp_path: Path, weights_file: Path) -> None:
    parts = {"categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "fish"}]}
    write_coco(tmp_path / "set", OBJECTS, sizes=SIZES, **parts)
    with pytest.raises(ValueError, match=r"the model has 2 \(cat, dog\), the dataset has 2 \(dog, fish\)"):
        run("--weights", weights_file, "--data", tmp_path / "set", "--json", tmp_path / "numbers.json")
    assert not (tmp_path / "numbers.json").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--json", "nowhere/n.json"), "--json must name a file in an existing folder, got nowhere/n.json"),
        (("--detections", "nowhere/d.json"), "--detections must name a file in an existing folder"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--workers", "-1"), "--workers must be at least 0, got -1"),
        (("--device", "gpux"), "--device gpux can't be used: "),
        (("--device", "cpu"), "--weights must be a file of weights, got w: "),
        (("--threshold", "50"), r"--threshold must be a score in 0 … 1, got 50"),
    ],
)
def test_smca_eval_refuses_wrong_options_before_any_work(option: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("--weights", "w", "--data", "d", *option)


@pytest.mark.parametrize("options", [(), ("--upright",)])
def test_upright_reaches_the_data_of_evaluation_and_training(
    tmp_path: Path, weights_file: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    from smca_model.training import settings, setup

    seen: list[bool] = []
    real = CocoDetection.__init__

    def keep(self: CocoDetection, *paths: Path, **given: Any) -> None:
        seen.append(given["upright"])
        real(self, *paths, **given)

    monkeypatch.setattr(CocoDetection, "__init__", keep)
    for split in ("train", "val"):
        write_coco(tmp_path / "set", OBJECTS, sizes=SIZES, split=split)
    assert run("--weights", weights_file, "--data", tmp_path / "set", "--workers", 0, "--device", "cpu", *options) == 0
    setup.open_data(settings.Settings(data=str(tmp_path / "set"), preset="smca-tiny", upright=bool(options)))
    assert seen == [bool(options)] * 3
