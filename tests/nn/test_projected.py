"""`ProjectedCoAttention` between projections that a host made, and the boxes around its reference points."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_layers import DEVICE, EMBED_DIM, HEADS, KEYS, QUERIES, STRIDES, assert_same, make_inputs, make_layer
from torch import Tensor

from smca_kernels.nn import ProjectedCoAttention, boxes_around


def make_projected(**options: Any) -> ProjectedCoAttention:
    layer = ProjectedCoAttention(EMBED_DIM, HEADS, STRIDES, **options)
    return layer.to(DEVICE, torch.float64).eval()


@pytest.mark.parametrize("geometry", ["official", "paper"])
def test_between_the_projections_of_the_layer_it_is_the_layer(geometry: str) -> None:
    layer, inputs = make_layer(geometry=geometry), make_inputs()
    others: dict[str, Any] = {"valid_shapes": [[(4, 6), (2, 3)], [(3, 5), (1, 2)]]}
    expected, prior = layer(**inputs, **others)
    projected = make_projected(geometry=geometry)
    projected.prior.load_state_dict(layer.prior.state_dict())
    heads = [
        F.linear(inputs[name], weight, bias)
        for name, weight, bias in zip(
            ("query", "key", "value"), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
        )
    ]
    output, same_prior = projected(*heads, inputs["spatial_shapes"], prior_features=inputs["prior_features"], **others)
    assert_same(layer.out_proj(output), expected)
    assert_same(same_prior.center, prior.center)


def test_its_softmax_scale_can_be_the_hosts() -> None:
    layer, inputs = make_projected(modulation="none", scale_selection=False), make_inputs()
    uniform, _ = layer(**inputs, scale=0.0)
    value = inputs["value"]
    expected = value[:, :24].mean(1, keepdim=True) + value[:, 24:].mean(1, keepdim=True)
    assert_same(uniform, expected.expand_as(uniform))


def test_values_may_have_half_the_width_of_keys() -> None:
    layer, inputs = make_projected(), make_inputs()
    output, _ = layer(**inputs)
    halves = [
        layer(**inputs | {"value": torch.cat(part, -1)})[0]
        for part in zip(*(head.split(2, -1) for head in inputs["value"].split(4, -1)), strict=True)
    ]
    expected = [torch.cat(part, -1) for part in zip(*(head.split(2, -1) for head in output.split(4, -1)), strict=True)]
    assert_same(torch.stack(halves), torch.stack(expected))


def test_it_drops_attention_weights_in_training_alone() -> None:
    layer, inputs = make_projected(dropout=0.5), make_inputs()
    before, _ = layer(**inputs)
    assert torch.equal(layer(**inputs)[0], before)
    assert not torch.allclose(layer.train()(**inputs)[0], before)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("query", (2, QUERIES, 7), r"query must have a multiple of num_heads=2 channels, got \[2, 3, 7\]"),
        ("key", (2, KEYS), r"key must be \[B, T, channels\], got \[2, 30\]"),
        ("value", (2, KEYS - 1, EMBED_DIM), r"value must be \[B=2, H=2, T=30, .* got \[2, 2, 29, 4\]"),
        ("prior_features", (2, QUERIES, 5), r"prior_features must be \[B=2, N=3, E=8\], got \[2, 3, 5\]"),
        ("prior_features", (2, QUERIES + 1, EMBED_DIM), r"prior_features must be \[B=2, N=3, E=8\], got \[2, 4, 8\]"),
        ("prior_features", (1, QUERIES, EMBED_DIM), r"prior_features must be \[B=2, N=3, E=8\], got \[1, 3, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = make_inputs() | {name: torch.zeros(shape, device=DEVICE, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        make_projected()(**inputs)


@pytest.mark.parametrize(("heads", "error"), [(0, ValueError), (2.0, TypeError)])
def test_a_number_of_heads_that_is_none_is_refused(heads: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_heads"):
        ProjectedCoAttention(EMBED_DIM, heads)


def test_boxes_lie_around_the_reference_point_in_every_layer() -> None:
    logits, reference = torch.randn(5, 2, 3, 4).double(), torch.randn(2, 3, 2).double()
    boxes = boxes_around(logits, reference)
    assert_same(boxes[..., :2], (logits[..., :2] + reference).sigmoid())
    assert_same(boxes[..., 2:], logits[..., 2:].sigmoid())
    assert_same(boxes_around(logits[0], reference), boxes[0])


def test_half_precision_boxes_keep_the_precision_of_the_point() -> None:
    assert boxes_around(torch.randn(2, 3, 4).half(), torch.randn(2, 3, 2)).dtype == torch.float32


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs/hosts.md").read_text("utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Projected" in block)
    namespace: dict[str, Any] = {}
    exec(example, namespace)
    assert namespace["output"].shape == (2, 100, 256)
    assert namespace["boxes"].shape == (2, 100, 4)


@pytest.mark.parametrize(
    ("logits", "reference", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), ValueError, r"reference_logits must be \[B, N, xy=2\]"),
        (torch.zeros(3, 3, 4), torch.zeros(2, 3, 2), ValueError, r"box_logits must be \[..., B=2, N=3, 4\], got \[3,"),
        (torch.zeros(3, 4), torch.zeros(1, 3, 2), ValueError, r"box_logits must be .* got \[3, 4\]"),
        ([0.0], torch.zeros(1, 3, 2), TypeError, "box_logits must be a tensor, got list"),
    ],
)
def test_boxes_of_other_queries_are_refused(
    logits: Any, reference: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        boxes_around(logits, reference)
