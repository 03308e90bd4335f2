"""The criterion against losses by hand and torchvision's operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")
ops = pytest.importorskip("torchvision.ops")

from smca_model import build_criterion  # noqa: E402
from smca_model.training.matcher import match  # noqa: E402

CLASSES, QUERIES = 4, 6


def random_boxes(*shape: int) -> Tensor:
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.5 * torch.rand(*shape, 2)], -1)


def random_layer(batch: int) -> dict[str, Tensor]:
    return {
        "pred_logits": torch.randn(batch, QUERIES, CLASSES).requires_grad_(),
        "pred_boxes": random_boxes(batch, QUERIES).requires_grad_(),
    }


def random_targets(counts: list[int]) -> list[dict[str, Any]]:
    return [{"labels": torch.randint(CLASSES, (n,)), "boxes": random_boxes(n)} for n in counts]


def test_losses_of_one_query_are_those_computed_by_hand() -> None:
    outputs = {"pred_logits": torch.zeros(1, 1, 1), "pred_boxes": torch.tensor([[[0.5, 0.5, 0.4, 0.4]]])}
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.7, 0.5, 0.4, 0.4]])}]
    losses = build_criterion(1)(outputs, targets)
    assert list(losses) == ["loss_ce", "loss_bbox", "loss_giou"]
    # α (1 - p)² (-log p) at p = ½; 0.2 apart; IoU 0.08 / 0.24, and the hull is the union.
    assert losses["loss_ce"].item() == pytest.approx(2 * 0.25 * 0.25 * math.log(2))
    assert losses["loss_bbox"].item() == pytest.approx(5 * 0.2)
    assert losses["loss_giou"].item() == pytest.approx(2 * (1 - 1 / 3))


def test_losses_are_sums_of_torchvisions_over_the_matched_pairs_by_the_number_of_boxes() -> None:
    outputs, targets = random_layer(3), random_targets([2, 0, 3])
    losses = build_criterion(CLASSES)(outputs, targets)
    focal, l1, giou = 0.0, 0.0, 0.0
    logits, boxes = outputs["pred_logits"].detach(), outputs["pred_boxes"].detach()
    for i, (queries, chosen) in enumerate(match(logits, boxes, targets)):
        one_hot = torch.zeros(QUERIES, CLASSES)
        for q, t in zip(queries.tolist(), chosen.tolist(), strict=True):
            one_hot[q, targets[i]["labels"][t]] = 1
            pair = boxes[i, q], targets[i]["boxes"][t]
            l1 += (pair[0] - pair[1]).abs().sum().item()
            corners = [ops.box_convert(box[None], "cxcywh", "xyxy") for box in pair]
            giou += 1 - ops.generalized_box_iou(*corners).item()
        focal += ops.sigmoid_focal_loss(logits[i], one_hot, reduction="sum").item()
    expected = {"loss_ce": 2 * focal / 5, "loss_bbox": 5 * l1 / 5, "loss_giou": 2 * giou / 5}
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, torch.tensor(expected[name]))


def test_every_auxiliary_layer_has_the_losses_it_would_have_alone() -> None:
    layers, targets = [random_layer(2) for _ in range(3)], random_targets([3, 1])
    criterion = build_criterion(CLASSES)
    losses = criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    expected = {
        name + suffix: loss
        for suffix, layer in zip(["_0", "_1", ""], layers, strict=True)
        for name, loss in criterion(layer, targets).items()
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])


def test_without_targets_every_query_is_background_and_boxes_stay_in_the_graph() -> None:
    outputs, aux = random_layer(2), random_layer(2)
    losses = build_criterion(CLASSES)({**outputs, "aux_outputs": [aux]}, random_targets([0, 0]))
    background = ops.sigmoid_focal_loss(outputs["pred_logits"], torch.zeros(2, QUERIES, CLASSES), reduction="sum")
    torch.testing.assert_close(losses["loss_ce"], 2 * background)
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    for layer in (outputs, aux):
        assert torch.equal(layer["pred_boxes"].grad, torch.zeros(2, QUERIES, 4))
        assert layer["pred_logits"].grad.all()


def test_of_more_targets_than_queries_each_query_learns_one_and_all_are_counted() -> None:
    outputs, targets = random_layer(1), random_targets([3 * QUERIES])
    losses = build_criterion(CLASSES)(outputs, targets)
    torch.stack(list(losses.values())).sum().backward()
    assert outputs["pred_boxes"].grad.any(-1).all()
    ((queries, chosen),) = match(outputs["pred_logits"], outputs["pred_boxes"], targets)
    l1 = (outputs["pred_boxes"][0, queries] - targets[0]["boxes"][chosen]).abs().sum() / (3 * QUERIES)
    torch.testing.assert_close(losses["loss_bbox"], 5 * l1)


def test_boxes_of_unmatched_queries_get_no_gradient() -> None:
    outputs, targets = random_layer(2), random_targets([2, 1])
    losses = build_criterion(CLASSES)(outputs, targets)
    (losses["loss_bbox"] + losses["loss_giou"]).backward()
    matches = match(outputs["pred_logits"], outputs["pred_boxes"], targets)
    for gradient, (queries, _) in zip(outputs["pred_boxes"].grad, matches, strict=True):
        assert gradient.any(-1).nonzero().flatten().tolist() == queries.tolist()


def test_number_of_boxes_is_averaged_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets = random_layer(1), random_targets([3])
    criterion = build_criterion(CLASSES)
    alone = criterion(outputs, targets)
    # As if another process had seven boxes: five on average.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(7))
    for name, loss in criterion(outputs, targets).items():
        torch.testing.assert_close(loss, alone[name] * 3 / 5)


def test_half_precision_predictions_give_float32_losses() -> None:
    outputs = {name: tensor.detach().bfloat16() for name, tensor in random_layer(2).items()}
    targets = random_targets([2, 3])
    losses = build_criterion(CLASSES)(outputs, targets)
    single = build_criterion(CLASSES)({name: tensor.float() for name, tensor in outputs.items()}, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, single[name])


def test_outputs_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pred_logits must be \[B, N, num_classes=5\], got \[1, 6, 4\]"):
        build_criterion(5)(random_layer(1), random_targets([1]))


@pytest.mark.parametrize("counts", [[], [1]])
def test_another_number_of_targets_than_images_is_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=f"targets must be one dict an image, B=2, got {len(counts)}"):
        build_criterion(CLASSES)(random_layer(2), random_targets(counts))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_refused(label: int) -> None:
    targets = [{"labels": torch.tensor([0, label]), "boxes": random_boxes(2)}]
    with pytest.raises(ValueError, match=r"labels must be from 0 to num_classes-1=3, got (-1 to 0|0 to 4)$"):
        build_criterion(CLASSES)(random_layer(1), targets)


@pytest.mark.parametrize(("num_classes", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_num_classes_must_be_a_positive_int(num_classes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_classes must be"):
        build_criterion(num_classes)
