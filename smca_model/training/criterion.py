"""The training losses of DETR's decoder layers: focal classification, L1 and GIoU of the matched boxes.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020; weights and focal loss as in SMCA's
experiments.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from .matcher import FOCAL_ALPHA, FOCAL_GAMMA, match

WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def build_criterion(num_classes: int) -> Criterion:
    """The criterion of a model with that many logits a query."""
    return Criterion(num_classes)


class Criterion:
    """Weighted losses of every decoder layer, each matched to the targets on its own.

    Args:
        num_classes: logits of a query, C.
    """

    def __init__(self, num_classes: int) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an int, got {type(num_classes).__name__}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The losses, weighted 2 / 5 / 2, whose sum is to be minimised.

        Each is a sum over queries (loss_ce: over all of them and all classes; the others: over the matched ones)
        divided by the number of target boxes, which is averaged over the processes of torch.distributed, and at
        least 1. Without any target, loss_bbox and loss_giou are 0 and still part of the graph.

        Args:
            outputs: ``pred_logits`` [B, N, C] and ``pred_boxes`` [B, N, 4] (cxcywh in 0…1), and optionally
                ``aux_outputs``, a list of the same for the decoder layers before the last.
            targets: of each image, ``labels`` [n] int64 and ``boxes`` [n, 4] float as pred_boxes.

        Returns:
            ``loss_ce``, ``loss_bbox``, ``loss_giou``, scalars in float32, and the same names with ``_0``, ``_1`` …
            for the auxiliary outputs.

        Raises:
            ValueError: for outputs and targets that don't fit each other, and predictions that are not finite.
        """
        layers = [*outputs.get("aux_outputs", ()), outputs]
        # All layers at once: one matching, so one wait for the device, instead of one for each layer.
        logits = torch.stack([layer["pred_logits"].float() for layer in layers])  # [L, B, N, C]
        boxes = torch.stack([layer["pred_boxes"].float() for layer in layers])  # [L, B, N, 4]
        self._check(logits, targets)
        labels, wanted = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
        matches = match(logits.flatten(0, 1), boxes.flatten(0, 1), [*targets] * len(layers))
        starts = [0, *itertools.accumulate(len(target["labels"]) for target in targets)]
        pairs = [  # image of all layers' images, query of it, target of all targets
            torch.stack([torch.full_like(queries, i), queries, starts[i % len(targets)] + chosen])
            for i, (queries, chosen) in enumerate(matches)
        ]
        image, query, target = torch.cat(pairs, 1).to(logits.device)
        count = self._average_boxes(targets, logits.device)

        one_hot = torch.zeros_like(logits)
        one_hot.flatten(0, 1)[image, query, labels[target]] = 1
        focal = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA)
        predicted, wanted = boxes.flatten(0, 1)[image, query], wanted.float()[target]
        l1 = F.l1_loss(predicted, wanted, reduction="none")
        giou = generalized_box_iou_loss(*(box_convert(each, "cxcywh", "xyxy") for each in (predicted, wanted)))
        # Every layer has the same number of matches, so the pairs divide evenly.
        totals = {"loss_ce": focal, "loss_bbox": l1, "loss_giou": giou}
        names = [f"_{layer}" for layer in range(len(layers) - 1)] + [""]
        return {
            name + suffix: loss
            for name, elements in totals.items()
            for suffix, loss in zip(
                names, (WEIGHTS[name] * elements.reshape(len(layers), -1).sum(1) / count).unbind(), strict=True
            )
        }

    def _check(self, logits: Tensor, targets: Sequence[Mapping[str, Any]]) -> None:
        _, batch, _, classes = logits.shape
        if classes != self.num_classes:
            raise ValueError(
                f"pred_logits must be [B, N, num_classes={self.num_classes}], got {list(logits.shape[1:])}"
            )
        if len(targets) != batch:
            raise ValueError(f"targets must be one dict an image, B={batch}, got {len(targets)}")
        labels = torch.cat([target["labels"] for target in targets])
        if labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"labels must be from 0 to num_classes-1={classes - 1}, got {labels.min()} to {labels.max()}"
            )

    @staticmethod
    def _average_boxes(targets: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Target boxes of one process, on average over all processes; at least 1."""
        count = torch.tensor(float(sum(len(target["labels"]) for target in targets)), device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            count /= torch.distributed.get_world_size()
        return count.clamp(min=1)
