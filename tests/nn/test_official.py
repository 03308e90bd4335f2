"""The authors' decoder layer: what the released code computes, and our layer made from its parameters."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_layers import assert_same
from torch import Tensor, nn

from smca_kernels.nn import SpatiallyModulatedCoAttention, official_layer_state


def official_state(prefix: str, type_: str, scales: int, first: bool) -> dict[str, Tensor]:
    """Random values under the released decoder layer's names and shapes: hidden size 256, 8 heads."""
    e, outputs = 256, {"type1": 0, "type2": 8 * scales, "type3": 16 * scales, "type4": 24 * scales}[type_]
    shapes = {"multihead_attn.in_proj_weight": (3 * e, e), "multihead_attn.in_proj_bias": (3 * e,)}
    widths = {"multihead_attn.out_proj": e, "point2": 16 * scales, "linear1": 2048}
    widths |= {f"point1.layers.{i}": (e, e, 2)[i] for i in range(3)} if first else {}
    widths |= {"point3": outputs} if outputs else {}
    widths |= {"point4": scales} if scales > 1 else {}
    for name, width in widths.items():
        shapes |= {f"{name}.weight": (width, e), f"{name}.bias": (width,)}
    shapes |= {f"norm{i}.{part}": (e,) for i in (1, 2, 3, 4) for part in ("weight", "bias")}
    state = {name: 0.05 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    state["norm4.weight"] += 1.0
    if outputs:
        state["point3.bias"] += 1.0
    return {prefix + name: tensor for name, tensor in state.items()}


def official_co_attention(
    state: dict[str, Tensor],
    type_: str,
    before: Tensor,  # [N, B, E]: tgt + query_pos before self-attention
    query: Tensor,  # [N, B, E]
    key: Tensor,  # [T, B, E]
    value: Tensor,  # [T, B, E]
    reference: Tensor,  # [N, B, 2], after the sigmoid
    image_sizes: Tensor,  # [B, 2] (height, width)
    shapes: list[tuple[int, int]],
    strides: tuple[int, ...],
    factors: tuple[float, ...],
) -> Tensor:
    """Output of the released decoder layer between norm1 and dropout2, head by head."""
    scales, outputs = len(strides), torch.zeros_like(query)
    features = nn.functional.layer_norm(before, (256,), state["norm4.weight"], state["norm4.bias"])
    offset = (features @ state["point2.weight"].T + state["point2.bias"]).unflatten(-1, (scales, 8, 2))
    if type_ == "type1":
        squared = torch.ones_like(offset)
    else:
        squared = (features @ state["point3.weight"].T + state["point3.bias"]).square()
        squared = squared.unflatten(-1, (scales, 8, 2 if type_ == "type3" else 1)).expand_as(offset)
    selection = torch.ones(*before.shape[:2], 1, dtype=torch.float64)
    if scales > 1:
        selection = (features @ state["point4.weight"].T + state["point4.bias"]).softmax(-1)
    weight, bias = state["multihead_attn.in_proj_weight"], state["multihead_attn.in_proj_bias"]
    for b, head in itertools.product(range(query.shape[1]), range(8)):
        rows = [part * 256 + head * 32 + i for part in range(3) for i in range(32)]
        w_q, w_k, w_v = weight[rows].chunk(3)
        b_q, b_k, b_v = bias[rows].chunk(3)
        q, k, v = query[:, b] @ w_q.T + b_q, key[:, b] @ w_k.T + b_k, value[:, b] @ w_v.T + b_v
        first = 0
        for s, (height, width) in enumerate(shapes):
            grid = torch.tensor([(x, y) for y in range(height) for x in range(width)]).double()
            center = reference[:, b] * image_sizes[b].flip(0) / strides[s] + offset[:, b, s, head]
            distance = (center[:, None] - grid) ** 2 * squared[:, b, None, s, head]
            part = slice(first, first + height * width)
            logits = q @ k[part].T / 32**0.5 - factors[s] * distance.sum(-1) / 8
            attended = logits.softmax(-1) @ v[part]
            outputs[:, b, head * 32 : head * 32 + 32] += selection[:, b, s, None] * attended
            first += height * width
    return outputs @ state["multihead_attn.out_proj.weight"].T + state["multihead_attn.out_proj.bias"]


@pytest.mark.parametrize("scales", [1, 4])
@pytest.mark.parametrize("type_", ["type1", "type2", "type3"])
def test_loaded_official_layer_computes_what_the_released_one_does(type_: str, scales: int) -> None:
    strides, factors = ((32,), (1.0,)) if scales == 1 else ((16, 16, 32, 64), (0.5, 0.5, 1.0, 2.0))
    shapes = [(3, 5)] if scales == 1 else [(5, 9), (5, 9), (3, 5), (2, 3)]
    sizes = torch.tensor([[70, 130], [96, 90]])
    prefix = "transformer.decoder.layers.0."
    state = official_state("", type_, scales, first=True)
    layer = SpatiallyModulatedCoAttention.from_official_layer(
        {prefix + name: tensor for name, tensor in state.items()}, prefix, strides=strides
    ).double()
    before, query = torch.randn(2, 4, 2, 256, dtype=torch.float64)
    key, value = torch.randn(2, sum(h * w for h, w in shapes), 2, 256, dtype=torch.float64)

    features = nn.functional.layer_norm(before, (256,), state["norm4.weight"], state["norm4.bias"])
    for i in range(3):
        features = features @ state[f"point1.layers.{i}.weight"].T + state[f"point1.layers.{i}.bias"]
        features = features.relu() if i < 2 else features
    expected = official_co_attention(
        state, type_, before, query, key, value, features.sigmoid(), sizes, shapes, strides, factors
    )
    output, prior = layer(query, key, value, shapes, prior_features=before, image_sizes=sizes)
    assert layer.prior.scale_type == {"type1": "fixed", "type2": "single", "type3": "independent"}[type_]
    # Parameters pass through the layer's own float32.
    assert_same(output, expected, 1e-5)
    assert_same(prior.reference_logits, features.transpose(0, 1), 1e-5)


def test_later_official_layer_takes_the_centre_of_the_first() -> None:
    prefix = "transformer.decoder.layers.3."
    layer = SpatiallyModulatedCoAttention.from_official_layer(official_state(prefix, "type3", 1, first=False), prefix)
    query, memory = torch.randn(2, 1, 256), torch.randn(6, 1, 256)
    with pytest.raises(ValueError, match="reference_logits must be given"):
        layer(query, memory, memory, [(2, 3)], prior_features=query)
    logits = torch.randn(1, 2, 2)
    prior = layer(query, memory, memory, [(2, 3)], prior_features=query, reference_logits=logits)[1]
    assert prior.reference_logits is logits


def test_official_layers_that_fit_nothing_are_refused() -> None:
    load = SpatiallyModulatedCoAttention.from_official_layer
    with pytest.raises(ValueError, match=r"point3 must have .* got 24"):
        load(official_state("", "type4", 1, first=True), "")
    with pytest.raises(ValueError, match=r"point2 must have .* got 16"):
        load(official_state("", "type3", 1, first=True), "", strides=(16, 32))
    for change, message in (
        ({"multihead_attn.bias_k": torch.zeros(1, 1, 256)}, 'Unexpected key.*"bias_k"'),
        ({"point1.layers.0.weight": torch.zeros(64, 256)}, "size mismatch for prior.center_mlp.0.weight"),
        ({"multihead_attn.in_proj_weight": torch.zeros(768)}, "size mismatch for in_proj_weight"),
    ):
        with pytest.raises(ValueError, match=f"state must hold a supported decoder layer (?s:.*){message}"):
            load(official_state("", "type3", 1, first=True) | change, "")
    with pytest.raises(TypeError, match="state must be a state dict, got Linear"):
        load(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="under the prefix 'decoder'"):
        official_layer_state(official_state("", "type3", 1, first=True), "decoder")
