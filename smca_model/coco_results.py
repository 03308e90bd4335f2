"""What a detector's results come to beside COCO's ground truth: average precision, its curves, and confusions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# pycocotools' twelve numbers, in its order.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
PYCOCOTOOLS, FASTER = "pycocotools", "faster-coco-eval"
ALL_AREAS, AT_IOU_50, AT_100_DETECTIONS = 0, 0, -1  # places in the arrays of both libraries

Detection = dict[str, Any]


@dataclass(frozen=True)
class CocoResults:
    """Average precision of a detector, as a whole and class by class.

    Attributes:
        numbers: COCO's twelve by name (`NAMES`), in 0…1; -1 where the ground truth has no such box.
        table: pycocotools' text of them.
        library: what computed them, with its version.
        classes: names of the C categories, in order of their ids.
        boxes: [C] how many boxes of the ground truth each has, crowds aside.
        recall: [R = 101] 0, 0.01 … 1.
        precision: [T = 10, R, C] at the IoUs 0.5, 0.55 … 0.95 and each recall, for boxes of any size and at most 100
            detections of a class in an image; -1 for a class without boxes.
    """

    numbers: dict[str, float]
    table: str
    library: str
    classes: tuple[str, ...]
    boxes: NDArray[np.int64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]

    @property
    def ap(self) -> NDArray[np.float64]:
        """[C] AP of each class, the mean over IoUs; -1 for one without boxes."""
        average: NDArray[np.float64] = self.precision.mean((0, 1))
        return average

    @property
    def ap50(self) -> NDArray[np.float64]:
        """[C] AP of each class at an IoU of 0.5; -1 for one without boxes."""
        average: NDArray[np.float64] = self.precision[AT_IOU_50].mean(0)
        return average


def measure(coco: COCO, detections: Sequence[Detection], *, library: str | None = None) -> CocoResults:
    """Average precision by faster-coco-eval where it is installed, else by pycocotools.

    Both find the same matches, and so recalls. pycocotools adds 2⁻⁵² to the number of detections that it divides by,
    which is 1 at the first: its precision is 1 - 2⁻⁵² there, that of faster-coco-eval is 1. Nothing else differs.

    Args:
        coco: the ground truth. Its annotations must not have the id 0, which to pycocotools means "not matched".
        detections: in COCO's results format.
        library: "pycocotools" or "faster-coco-eval"; None chooses.

    Raises:
        KeyError: for a detection without image_id, category_id, bbox or score.
        AssertionError: of pycocotools, for an image that the ground truth has not.
    """
    from pycocotools.cocoeval import COCOeval

    from .data.annotations import make_coco

    if library is None:
        library = FASTER if importlib.util.find_spec("faster_coco_eval") else PYCOCOTOOLS
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        # loadRes writes into what it gets, and refuses an empty list, though finding nothing is a result.
        copies = [dict(detection) for detection in detections]
        results = coco.loadRes(copies) if copies else make_coco({**coco.dataset, "annotations": []})
        evaluation = COCOeval(coco, results, "bbox")
        if library == FASTER:
            from faster_coco_eval import COCOeval_faster

            faster = COCOeval_faster(coco, results, "bbox")
            faster.evaluate()
            faster.accumulate()
            evaluation.eval = faster.eval
        else:
            evaluation.evaluate()
            evaluation.accumulate()
        printed.truncate(0)
        printed.seek(0)
        evaluation.summarize()
    counts: dict[int, int] = defaultdict(int)
    for annotation in coco.dataset["annotations"]:
        counts[annotation["category_id"]] += not annotation["iscrowd"]
    categories = sorted(coco.cats)
    return CocoResults(
        numbers=dict(zip(NAMES, map(float, evaluation.stats), strict=True)),
        table=printed.getvalue().rstrip(),
        library=f"{library} {importlib.metadata.version(library)}",
        classes=tuple(coco.cats[category]["name"] for category in categories),
        boxes=np.array([counts[category] for category in categories]),
        recall=np.asarray(evaluation.params.recThrs),
        precision=np.asarray(evaluation.eval["precision"])[:, :, :, ALL_AREAS, AT_100_DETECTIONS],
    )


def confusion_matrix(
    coco: COCO, detections: Sequence[Detection], *, score: float = 0.5, iou: float = 0.5
) -> NDArray[np.int64]:
    """How many boxes of each class were found as which class.

    In each image every box and every detection is matched at most once: first those of one class, then those of
    different classes, pairs of a higher IoU first. This is the matching of supervision's ConfusionMatrix, with COCO's
    rule for crowds, which that doesn't know: a detection that has no box of its class, and of whose area a crowd of its
    class has a part of at least `iou`, doesn't count.

    Args:
        coco: the ground truth, of C categories.
        detections: in COCO's results format.
        score: least score of a detection that counts.
        iou: least intersection over union of a match.

    Returns:
        [C + 1, C + 1], rows are the ground truth's classes in order of category id, columns the detections'. The last
        row is background: detections where nothing is, a second one of a box included. The last column is background:
        boxes that were not found. So row c sums to the boxes of class c, crowds aside.
    """
    label = {category: i for i, category in enumerate(sorted(coco.cats))}
    background = len(label)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    found: dict[Any, list[Detection]] = defaultdict(list)
    for detection in detections:
        if detection["score"] >= score:
            found[detection["image_id"]].append(detection)
    for image in coco.imgs:
        boxes = [each for each in coco.imgToAnns[image] if not each["iscrowd"]]
        crowds = [each for each in coco.imgToAnns[image] if each["iscrowd"]]
        overlaps, in_crowds = (_overlaps(found[image], each) for each in (boxes, crowds))
        of_found, of_boxes, of_crowds = (
            np.array([label[each["category_id"]] for each in of], np.int64) for of in (found[image], boxes, crowds)
        )
        alike = of_found[:, None] == of_boxes
        matched = _match(overlaps, alike & (overlaps >= iou))
        ignored = ((of_found[:, None] == of_crowds) & (in_crowds >= iou)).any(1)
        left = ~ignored[:, None] & ~alike & (overlaps >= iou)
        left[list(matched)] = False
        left[:, list(matched.values())] = False
        matched |= _match(overlaps, left)
        for row, column in matched.items():
            matrix[of_boxes[column], of_found[row]] += 1
        not_found = np.setdiff1d(np.arange(len(boxes)), list(matched.values()))
        np.add.at(matrix, (of_boxes[not_found], background), 1)
        of_nothing = np.setdiff1d(np.flatnonzero(~ignored), list(matched))
        np.add.at(matrix, (background, of_found[of_nothing]), 1)
    return matrix


def _overlaps(found: Sequence[Detection], annotations: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """[detections, annotations] IoU, or, of crowds, the part of the detection that is inside."""
    from pycocotools import mask

    if not found or not annotations:
        return np.zeros((len(found), len(annotations)))
    boxes = [np.array([each["bbox"] for each in of], np.float64) for of in (found, annotations)]
    overlaps: NDArray[np.float64] = mask.iou(*boxes, [each["iscrowd"] for each in annotations])
    return overlaps


def _match(overlaps: NDArray[np.float64], allowed: NDArray[np.bool_]) -> dict[int, int]:
    """Pairs of a detection and a box, none twice, the highest overlap first."""
    pairs = np.argwhere(allowed)
    matched: dict[int, int] = {}
    taken = set()
    for detection, box in pairs[np.argsort(-overlaps[allowed], kind="stable")].tolist():
        if detection not in matched and box not in taken:
            matched[detection] = box
            taken.add(box)
    return matched
