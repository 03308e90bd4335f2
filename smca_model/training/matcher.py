"""DETR's bipartite matching: the query that each ground-truth box trains, by the cheapest assignment.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, Eq. 1; the class cost is the focal
one of Zhu et al., "Deformable DETR", 2021, as in SMCA's experiments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou

COST_CLASS, COST_BBOX, COST_GIOU = 2.0, 5.0, 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


@torch.no_grad()
def match(
    logits: Tensor,  # [B, N, C]
    boxes: Tensor,  # [B, N, 4]
    targets: Sequence[Mapping[str, Any]],
) -> list[tuple[Tensor, Tensor]]:
    """The assignment of queries to ground-truth boxes with the least total cost, for each image on its own.

    cost = 2 · class + 5 · L1 of the boxes + 2 · (-GIoU), with the class cost of `class_cost`.

    Args:
        logits: [B, N, C], class scores before the sigmoid.
        boxes: [B, N, 4], cxcywh in 0…1 of the image.
        targets: of each image, ``labels`` [n] int64 below C and ``boxes`` [n, 4] in the form of boxes.

    Returns:
        For each image (query indices, target indices), int64 on the CPU, both of length min(N, n), queries in
        ascending order: with more targets than queries, the targets that would cost most go without.

    Raises:
        ValueError: for a cost that is not finite; the message names the images.
    """
    counts = [len(target["labels"]) for target in targets]
    if not any(counts):
        return [(torch.empty(0, dtype=torch.int64),) * 2 for _ in targets]
    logits, boxes = logits.float(), boxes.float()
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    # Padding with a whole image keeps its cost finite, so that whatever isn't finite comes from the predictions.
    padded = pad_sequence([target["boxes"].float() for target in targets], batch_first=True)
    padded[padded.new_tensor(counts)[:, None] <= torch.arange(padded.shape[1], device=padded.device)] = 0.5
    giou = torch.vmap(generalized_box_iou)(_corners(boxes), _corners(padded))
    cost = COST_CLASS * class_cost(logits, labels) + COST_BBOX * torch.cdist(boxes, padded, p=1) - COST_GIOU * giou
    cost = cost.cpu()  # all images in one transfer
    if not cost.isfinite().all():
        wrong = (~cost.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        images = dict.fromkeys(str(targets[i].get("image_id", i)) for i in wrong)
        raise ValueError(
            "pred_logits and pred_boxes must give a finite matching cost, got NaN or infinity for the images with "
            f"ids {', '.join(images)}"
        )
    assignments = [linear_sum_assignment(c[:, :count]) for c, count in zip(cost.numpy(), counts, strict=True)]
    return [(torch.from_numpy(queries), torch.from_numpy(chosen)) for queries, chosen in assignments]


def class_cost(
    logits: Tensor,  # [B, N, C]
    labels: Tensor,  # [B, M] int64
) -> Tensor:
    """Focal loss of calling a query by a label less that of calling it background there, [B, N, M].

    α (1 - p)^γ (-log p) - (1 - α) p^γ (-log(1 - p)) at p = sigmoid(logit of the label).
    """
    logits = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
    probability = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * F.softplus(-logits)
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * F.softplus(logits)
    return positive - negative


def _corners(boxes: Tensor) -> Tensor:
    """Boxes as corners, cxcywh → xyxy."""
    return box_convert(boxes, "cxcywh", "xyxy")
