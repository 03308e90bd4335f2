"""Results of an evaluation as files to read: precision–recall curves, a confusion matrix, AP class by class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smca_kernels.files import replacing, write_text

from .coco_results import CocoResults
from .pictures import legible

FILES = (
    "classes.json",
    "precision_recall.json",
    "precision_recall.png",
    "confusion_matrix.json",
    "confusion_matrix.png",
)
MAX_CURVES = 10  # of more classes, half as many of the best and of the worst are drawn
MAX_CLASSES_WITH_COUNTS, MAX_CLASSES_WITH_NAMES = 25, 100  # written into a confusion matrix
INCHES_OF_A_CLASS, MAX_INCHES = 0.24, 30.0
BACKGROUND = "background"


def write_results(folder: Path, results: CocoResults, matrix: NDArray[np.int64], *, score: float, iou: float) -> None:
    """Write or replace `FILES` in a folder.

    classes.json: a list with class, AP, AP50 and boxes of each. precision_recall.json: recall [101], and by class
    precision at an IoU of 0.5 ("IoU 0.5") and its mean over the IoUs 0.5 … 0.95 ("mean"), both [101]; classes without
    boxes are left out. confusion_matrix.json: score, iou, classes and counts, rows as `confusion_matrix` has them.

    Args:
        folder: an existing one.
        results: of `measure`.
        matrix, score, iou: of `confusion_matrix`, and what it was called with.

    Raises:
        OSError: with the file's name, when it can't be written.
    """
    write_text(folder / "classes.json", json.dumps(class_records(results), indent=1, ensure_ascii=False) + "\n")
    present = np.flatnonzero(results.boxes)
    curves = {
        results.classes[c]: {
            "IoU 0.5": results.precision[0, :, c].tolist(),
            "mean": results.precision[:, :, c].mean(0).tolist(),
        }
        for c in present
    }
    recall = results.recall.tolist()
    _write_json(folder / "precision_recall.json", {"recall": recall, "precision": curves})
    draw_precision_recall(results, folder / "precision_recall.png")
    named = [*results.classes, BACKGROUND]
    counts = {"score": score, "iou": iou, "classes": named, "found_as": matrix.tolist()}
    _write_json(folder / "confusion_matrix.json", counts)
    draw_confusion_matrix(matrix, results.classes, folder / "confusion_matrix.png", score=score, iou=iou)


def class_records(results: CocoResults) -> list[dict[str, Any]]:
    """class, AP, AP50 (-1 without boxes) and boxes of each class, in order of category id."""
    columns = zip(results.classes, results.ap.tolist(), results.ap50.tolist(), results.boxes.tolist(), strict=True)
    return [{"class": name, "AP": ap, "AP50": ap50, "boxes": boxes} for name, ap, ap50, boxes in columns]


def format_classes(results: CocoResults) -> str:
    """A table of `class_records`."""
    width = max(len("class"), *map(len, results.classes))
    lines = [f"{'class':{width}}     AP   AP50   boxes"]
    for each in class_records(results):
        numbers = (f"{each[name]:.3f}" if each["boxes"] else "–" for name in ("AP", "AP50"))
        lines.append(f"{each['class']:{width}}{''.join(f'{number:>7}' for number in numbers)}{each['boxes']:8}")
    return "\n".join(lines)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False) + "\n")


def draw_precision_recall(results: CocoResults, path: Path) -> None:
    """A picture file of precision over recall, at an IoU of 0.5 and as the mean over IoUs: all classes, and their mean.

    Of more than `MAX_CURVES` classes the best and the worst are drawn. Classes without boxes are left out.

    Args:
        results: of `measure`.
        path: PNG file to write or replace.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.font_manager import FontProperties

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), dpi=100, layout="constrained")
    present = np.flatnonzero(results.boxes)
    both = (results.precision[0], results.ap50, "IoU 0.5"), (results.precision.mean(0), results.ap, "IoU 0.5 … 0.95")
    for axes, (precision, ap, title) in zip(panels, both, strict=True):
        best_first = present[np.argsort(-ap[present], kind="stable")]
        half = MAX_CURVES // 2
        shown = [*best_first[:half], *best_first[-half:]] if len(best_first) > MAX_CURVES else list(best_first)
        font, names = legible([results.classes[c] for c in shown], shown)
        colors = matplotlib.colormaps["coolwarm"](np.linspace(0, 1, max(2, len(shown))))
        lines = [
            axes.plot(results.recall, precision[:, c], color=color)[0]
            for c, color in zip(shown, colors[: len(shown)], strict=True)
        ]
        labels = [f"{ap[c]:.3f} {name}" for c, name in zip(shown, names, strict=True)]
        if len(present):
            mean = precision[:, present].mean(1)
            lines.append(axes.plot(results.recall, mean, color="black", linewidth=2.5)[0])
            labels.append(f"{ap[present].mean():.3f} mean of {len(present)} classes")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
        axes.grid(alpha=0.3)
        best_and_worst = f", the {half} best and the {half} worst" if len(best_first) > MAX_CURVES else ""
        legend = axes.legend(
            lines,
            labels,
            prop=FontProperties(fname=font, size=8),
            title=f"AP{best_and_worst}",
            loc="upper left",
            bbox_to_anchor=(1, 1),
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


def draw_confusion_matrix(
    matrix: NDArray[np.int64], classes: Sequence[str], path: Path, *, score: float, iou: float
) -> None:
    """A picture file of a confusion matrix; colours are parts of a row.

    Args:
        matrix: [C + 1, C + 1] of `confusion_matrix`.
        classes: names of the C classes.
        path: PNG file to write or replace.
        score, iou: what it was made with.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.font_manager import FontProperties

    count = len(matrix)
    with_counts, with_names = len(classes) <= MAX_CLASSES_WITH_COUNTS, len(classes) <= MAX_CLASSES_WITH_NAMES
    side = min(MAX_INCHES, 3.5 + count * (2.2 if with_counts else 1.0) * INCHES_OF_A_CLASS)
    figure, axes = pyplot.subplots(figsize=(side + 1, side), dpi=100, layout="constrained")
    parts = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.7, label="part of the row")
    axes.set(xlabel="found as", ylabel="ground truth")
    axes.set_title(f"detections of score {score:g} or more, IoU {iou:g} or more", fontsize=10)
    if with_names:
        font, names = legible(classes, range(len(classes)))
        named = FontProperties(fname=font, size=9 if with_counts else 7)
        axes.set_xticks(range(count), [*names, BACKGROUND], rotation=90, fontproperties=named, parse_math=False)
        axes.set_yticks(range(count), [*names, BACKGROUND], fontproperties=named, parse_math=False)
    if with_counts:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                color = "white" if parts[row, column] > 0.5 else "black"
                axes.text(column, row, str(number), ha="center", va="center", color=color, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
