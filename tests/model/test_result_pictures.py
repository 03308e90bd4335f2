"""Files of an evaluation: what they hold, and pictures for few, many and oddly named classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from PIL import Image

from smca_model import result_pictures
from smca_model.coco_results import NAMES, CocoResults


def made_results(classes: tuple[str, ...], without_boxes: int = 0) -> CocoResults:
    """Random results of classes, of which the last ones have no boxes."""
    precision = np.sort(np.random.default_rng(0).random((10, 101, len(classes))), 1)[:, ::-1]
    boxes = np.full(len(classes), 7)
    if without_boxes:
        precision[:, :, -without_boxes:], boxes[-without_boxes:] = -1, 0
    return CocoResults(dict.fromkeys(NAMES, 0.5), "", "", classes, boxes, np.linspace(0, 1, 101), precision)


def curves_drawn(results: CocoResults, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], str]]:
    """For each panel the precisions that it shows, and the text of its legend."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: kept.append(self) or real(self, *to, **how))
    result_pictures.draw_precision_recall(results, path)
    return [
        (
            [line.get_ydata() for line in axes.lines],
            "\n".join(text.get_text() for text in axes.get_legend().get_texts()),
        )
        for axes in kept[0].axes
    ]


def test_results_are_written_as_json_and_pictures(tmp_path: Path) -> None:
    results = made_results(("cat", "Bär", "cow"), without_boxes=1)
    matrix = np.arange(16).reshape(4, 4)
    result_pictures.write_results(tmp_path, results, matrix, score=0.3, iou=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(result_pictures.FILES)
    classes = json.loads((tmp_path / "classes.json").read_text("utf-8"))
    assert [(each["class"], each["boxes"]) for each in classes] == [("cat", 7), ("Bär", 7), ("cow", 0)]
    assert [each["AP"] for each in classes] == pytest.approx([*results.precision[:, :, :2].mean((0, 1)), -1])
    assert [each["AP50"] for each in classes] == pytest.approx([*results.precision[0, :, :2].mean(0), -1])
    curves = json.loads((tmp_path / "precision_recall.json").read_text("utf-8"))
    assert curves["recall"] == results.recall.tolist()
    assert list(curves["precision"]) == ["cat", "Bär"]
    assert curves["precision"]["Bär"]["IoU 0.5"] == results.precision[0, :, 1].tolist()
    assert curves["precision"]["Bär"]["mean"] == pytest.approx(results.precision[:, :, 1].mean(0))
    counts = json.loads((tmp_path / "confusion_matrix.json").read_text("utf-8"))
    assert counts == {
        "score": 0.3,
        "iou": 0.5,
        "classes": ["cat", "Bär", "cow", "background"],
        "found_as": matrix.tolist(),
    }
    for name in ("precision_recall.png", "confusion_matrix.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300


def test_curves_of_few_classes_are_all_drawn_and_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = made_results(("cat", "dog", "cow"), without_boxes=1)
    (at_50, legend), (mean, _) = curves_drawn(results, tmp_path / "curves.png", monkeypatch)
    of_cat_and_dog = results.precision[0, :, :2].mean(1)
    assert len(at_50) == len(mean) == 3
    assert np.allclose(at_50[-1], of_cat_and_dog)
    assert np.allclose(mean[-1], results.precision[:, :, :2].mean((0, 2)))
    assert "cat" in legend
    assert "cow" not in legend
    assert f"{of_cat_and_dog.mean():.3f} mean of 2 classes" in legend


def test_of_many_classes_the_best_and_the_worst_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = made_results(tuple(f"class {i:02d}" for i in range(30)))
    for (curves, legend), ap in zip(
        curves_drawn(results, tmp_path / "curves.png", monkeypatch), (results.ap50, results.ap), strict=True
    ):
        order = np.argsort(-ap)
        shown = [*order[:5], *order[-5:]]
        assert len(curves) == 11
        assert [line[6:] for line in legend.splitlines()[:-1]] == [f"class {c:02d}" for c in shown]
        assert legend.splitlines()[-1] == f"{ap.mean():.3f} mean of 30 classes"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "classes", [("_hidden", r"$\nothing$", "\U0010fffd"), tuple("abcdefghijklmnopqrstuvwxyz"), ("a",) * 120]
)
def test_pictures_of_classes_of_any_name_and_number(tmp_path: Path, classes: tuple[str, ...]) -> None:
    count = len(classes) + 1
    result_pictures.draw_precision_recall(made_results(classes, without_boxes=len(classes) // 2), tmp_path / "c.png")
    matrix = np.zeros((count, count), np.int64)
    matrix[0, 1] = 3
    result_pictures.draw_confusion_matrix(matrix, classes, tmp_path / "m.png", score=0.5, iou=0.5)
    with Image.open(tmp_path / "m.png") as picture:
        assert max(picture.size) <= 100 * (result_pictures.MAX_INCHES + 1)


@pytest.mark.filterwarnings("error")
def test_curves_of_no_class_at_all_are_an_empty_picture(tmp_path: Path) -> None:
    result_pictures.draw_precision_recall(made_results(("cat", "dog"), without_boxes=2), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_classes_without_a_box_have_a_dash_in_the_table() -> None:
    results = made_results(("cat", "a longer name"), without_boxes=1)
    lines = result_pictures.format_classes(results).splitlines()
    assert lines[0].split() == ["class", "AP", "AP50", "boxes"]
    assert lines[1].split() == ["cat", f"{results.ap[0]:.3f}", f"{results.ap50[0]:.3f}", "7"]
    assert lines[2].split() == ["a", "longer", "name", "–", "–", "0"]
    assert len({len(line) for line in lines}) == 1
