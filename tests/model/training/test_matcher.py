"""The matcher against costs by hand, brute force and torchvision's operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("scipy")
torchvision = pytest.importorskip("torchvision")

from smca_model.training.matcher import class_cost, match  # noqa: E402


def random_boxes(*shape: int) -> Tensor:
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.5 * torch.rand(*shape, 2)], -1)


def random_targets(counts: list[int], classes: int) -> list[dict[str, Any]]:
    return [{"labels": torch.randint(classes, (n,)), "boxes": random_boxes(n), "image_id": 40 + n} for n in counts]


def total_cost(logits: Tensor, boxes: Tensor, target: dict[str, Any]) -> Tensor:
    """[N, n] of one image in float64, one pair at a time."""
    cost = torch.empty(len(logits), len(target["labels"]), dtype=torch.float64)
    for q, t in itertools.product(range(cost.shape[0]), range(cost.shape[1])):
        logit = logits[q, target["labels"][t]].double()
        present, absent = (
            torchvision.ops.sigmoid_focal_loss(logit, torch.tensor(y, dtype=torch.float64)) for y in (1.0, 0.0)
        )
        pair = [torchvision.ops.box_convert(b[None].double(), "cxcywh", "xyxy") for b in (boxes[q], target["boxes"][t])]
        l1 = (boxes[q].double() - target["boxes"][t].double()).abs().sum()
        cost[q, t] = 2 * (present - absent) + 5 * l1 - 2 * torchvision.ops.generalized_box_iou(*pair)[0, 0]
    return cost


def test_class_cost_is_the_focal_loss_of_the_label_less_that_of_background() -> None:
    logits, labels = torch.randn(2, 5, 4), torch.randint(4, (2, 3))
    cost = class_cost(logits, labels)
    for b, q, m in itertools.product(range(2), range(5), range(3)):
        logit = logits[b, q, labels[b, m]]
        present, absent = (torchvision.ops.sigmoid_focal_loss(logit, torch.tensor(y)) for y in (1.0, 0.0))
        torch.testing.assert_close(cost[b, q, m], present - absent)


# The first query has the target's box and logit 0: class cost -0.0866, so -2.173 in all. The second lies 0.4 to the
# right of it, where GIoU is 0: 5 · 0.4 + 2 · class cost, with class cost -2.0747 at logit 3.00 and -2.1169 at 3.05.
@pytest.mark.parametrize(("logit", "expected"), [(3.00, 0), (3.05, 1)])
def test_costs_are_weighted_2_for_class_5_for_l1_and_2_for_giou(logit: float, expected: int) -> None:
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.9, 0.5, 0.4, 0.4]]])
    ((queries, chosen),) = match(torch.tensor([[[0.0], [logit]]]), boxes, [target])
    assert queries.tolist() == [expected]
    assert chosen.tolist() == [0]


@pytest.mark.parametrize(("queries", "count"), [(5, 3), (3, 5), (4, 4), (1, 4), (4, 1)])
def test_no_other_assignment_costs_less(queries: int, count: int) -> None:
    logits, boxes = torch.randn(1, queries, 4), random_boxes(1, queries)
    (target,) = random_targets([count], 4)
    cost = total_cost(logits[0], boxes[0], target)
    pairs = min(queries, count)
    cheapest = min(
        (cost[list(q), list(t)].sum().item(), sorted(zip(q, t, strict=True)))
        for q in itertools.combinations(range(queries), pairs)
        for t in itertools.permutations(range(count), pairs)
    )
    ((matched, chosen),) = match(logits, boxes, [target])
    assert list(zip(matched.tolist(), chosen.tolist(), strict=True)) == cheapest[1]


def test_an_image_is_matched_in_a_batch_as_alone() -> None:
    counts = [2, 0, 7, 4]
    logits, boxes, targets = torch.randn(4, 5, 3), random_boxes(4, 5), random_targets(counts, 3)
    together = match(logits, boxes, targets)
    for i, target in enumerate(targets):
        (alone,) = match(logits[i : i + 1], boxes[i : i + 1], [target])
        assert all(torch.equal(a, b) for a, b in zip(together[i], alone, strict=True))
        assert len(alone[0]) == min(5, counts[i])


def test_nothing_is_matched_where_there_is_no_target() -> None:
    for queries, chosen in match(torch.randn(2, 5, 3), random_boxes(2, 5), random_targets([0, 0], 3)):
        assert queries.dtype == chosen.dtype == torch.int64
        assert len(queries) == len(chosen) == 0


def test_a_predicted_box_without_area_has_a_cost() -> None:
    boxes = random_boxes(2, 5)
    boxes[1] = 0  # as a sigmoid gives it that has underflown
    matches = match(torch.randn(2, 5, 3), boxes, random_targets([4, 1], 3))
    assert [len(queries) for queries, _ in matches] == [4, 1]


def test_half_precision_predictions_are_matched_as_the_same_numbers_in_float32() -> None:
    logits, boxes, targets = torch.randn(2, 6, 3).bfloat16(), random_boxes(2, 6).bfloat16(), random_targets([3, 4], 3)
    for half, single in zip(match(logits, boxes, targets), match(logits.float(), boxes.float(), targets), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(half, single, strict=True))


@pytest.mark.parametrize("name", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_raises_and_names_the_image(name: str, value: float) -> None:
    predictions = {"logits": torch.randn(3, 5, 2), "boxes": random_boxes(3, 5)}
    predictions[name][1] = value
    with pytest.raises(ValueError, match=r"finite matching cost, got NaN or infinity for the images with ids 43$"):
        match(**predictions, targets=random_targets([2, 3, 1], 2))
