"""The layers against equations 3–9 by hand, nn.MultiheadAttention and the authors' layer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from smca_kernels.nn.co_attention import (
    GEOMETRIES,
    MIN_SQUARED_OBJECT_SCALE,
    MODULATIONS,
    SCALE_TYPES,
    SpatiallyModulatedCoAttention,
    SpatialPrior,
    official_layer_state,
)
from smca_kernels.testing.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = list(itertools.product(GEOMETRIES, MODULATIONS, SCALE_TYPES))
EMBED_DIM, HEADS, QUERIES = 8, 2, 3
SHAPES, STRIDES = ((4, 6), (2, 3)), (16, 32)
KEYS = 4 * 6 + 2 * 3


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter off its initial value: a zero weight or a unit scale would hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def make_layer(**options: Any) -> SpatiallyModulatedCoAttention:
    options = {"strides": STRIDES, "batch_first": True} | options
    layer = randomised(SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, **options))
    assert isinstance(layer, SpatiallyModulatedCoAttention)
    return layer.to(DEVICE, torch.float64).eval()


def make_inputs(batch: int = 2, **options: Any) -> dict[str, Any]:
    kind = {"device": DEVICE, "dtype": torch.float64} | options
    return {
        "query": torch.randn(batch, QUERIES, EMBED_DIM, **kind),
        "key": torch.randn(batch, KEYS, EMBED_DIM, **kind),
        "value": torch.randn(batch, KEYS, EMBED_DIM, **kind),
        "spatial_shapes": SHAPES,
        "prior_features": torch.randn(batch, QUERIES, EMBED_DIM, **kind),
    }


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# -------------------------------------------------------- the equations, by hand


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def prior_by_hand(prior: SpatialPrior, features: Tensor, cells: Tensor) -> dict[str, Tensor]:
    """One query of one image: features [E], cells [S, 2] (width, height) → center [H, S, 2] …."""
    state = {name: parameter.detach() for name, parameter in prior.state_dict().items()}
    scales, official = len(prior.strides), prior.geometry == "official"
    if official and "norm.weight" in state:
        centred = features - features.mean()
        features = centred / (centred.square().mean() + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    heads = prior.num_heads if prior.modulation == "per_head" else 1
    result = {"center": cells.new_zeros(heads, scales, 2), "precision": cells.new_zeros(heads, scales, 2)}
    if "scale_selection.weight" in state:
        exponentials = linear(state, "scale_selection", features).exp()
        result["scale_weights"] = exponentials / exponentials.sum()
    if prior.modulation == "none":
        return result | {"reference_logits": cells.new_zeros(2)}
    x, depth = features, 3 if official else 2
    for index in range(depth):
        x = linear(state, f"center_mlp.{2 * index}", x)
        x = x.relu() if index < depth - 1 else x
    result["reference_logits"] = x
    offsets = linear(state, "offset", features) if heads > 1 else None
    spreads = linear(state, "object_scale", features) if prior.scale_type != "fixed" else None
    for s, head, axis in itertools.product(range(scales), range(heads), range(2)):
        center = cells[s, axis] / (1 + math.exp(-x[axis]))
        if offsets is not None:
            center = center + offsets[(s * heads + head) * 2 + axis]
        spread = 1.0
        if prior.scale_type == "independent":
            spread = float(spreads[(s * heads + head) * 2 + axis])
        elif prior.scale_type == "single":
            spread = float(spreads[s * heads + head])
        if official:
            precision = spread**2 * (prior.strides[s] / 32 if scales > 1 else 1.0) / prior.beta
        else:
            precision = 1 / (prior.beta * max(spread**2, MIN_SQUARED_OBJECT_SCALE))
        result["center"][head, s, axis] = center
        result["precision"][head, s, axis] = precision
    return result


def layer_by_hand(layer: SpatiallyModulatedCoAttention, inputs: dict[str, Any], b: int, n: int) -> Tensor:
    """Output [E] for query n of image b, every cell in turn (Eq. 3–9)."""
    cells = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64)
    prior = prior_by_hand(layer.prior, inputs["prior_features"][b, n], cells)
    w_q, w_k, w_v = layer.in_proj_weight.detach().split(EMBED_DIM)
    b_q, b_k, b_v = layer.in_proj_bias.detach().split(EMBED_DIM)
    head_dim = EMBED_DIM // HEADS
    heads = []
    for head in range(HEADS):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        query = w_q[rows] @ inputs["query"][b, n] + b_q[rows]
        first, output = 0, torch.zeros(head_dim, dtype=torch.float64)
        for s, (height, width) in enumerate(SHAPES):
            m = head if layer.prior.modulation == "per_head" else 0
            (c_x, c_y), (p_x, p_y) = prior["center"][m, s], prior["precision"][m, s]
            logits, values = [], []
            for k, (y, x) in enumerate(itertools.product(range(height), range(width)), start=first):
                key = w_k[rows] @ inputs["key"][b, k] + b_k[rows]
                log_gaussian = -p_x * (x - c_x) ** 2 - p_y * (y - c_y) ** 2
                logits.append(query @ key / math.sqrt(head_dim) + log_gaussian)
                values.append(w_v[rows] @ inputs["value"][b, k] + b_v[rows])
            first += height * width
            weights = [torch.exp(logit - max(logits)) for logit in logits]
            attended = torch.stack(weights) / sum(weights) @ torch.stack(values)
            output = output + prior["scale_weights"][s] * attended
        heads.append(output)
    return layer.out_proj.weight.detach() @ torch.cat(heads) + layer.out_proj.bias.detach()


@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_prior_equals_the_equations_written_out(geometry: str, modulation: str, scale_type: str) -> None:
    strides = (8, 32, 48)
    options = {"geometry": geometry, "modulation": modulation, "scale_type": scale_type, "beta": 5.0}
    prior = randomised(SpatialPrior(EMBED_DIM, HEADS, strides, **options)).double()
    features, sizes = torch.randn(2, QUERIES, EMBED_DIM).double(), torch.tensor([[75, 130], [200, 91]])
    actual = prior(features, ((25, 17), (7, 5), (5, 3)), image_sizes=sizes)
    for b, n in itertools.product(range(2), range(QUERIES)):
        height, width = sizes[b].tolist()
        cells = torch.tensor([[width, height]]).double() / torch.tensor(strides).double()[:, None]
        expected = prior_by_hand(prior, features[b, n], cells)
        assert_same(actual.center[b, :, n], expected["center"])
        assert_same(actual.precision[b, :, n], expected["precision"])
        assert_same(actual.scale_weights[b, 0, n], expected["scale_weights"])
        assert_same(actual.reference_logits[b, n], expected["reference_logits"])


@pytest.mark.parametrize(
    ("geometry", "modulation"), [("official", "per_head"), ("paper", "shared"), ("paper", "per_head")]
)
def test_layer_equals_the_equations_written_out(geometry: str, modulation: str) -> None:
    layer, inputs = make_layer(geometry=geometry, modulation=modulation).cpu(), make_inputs(device="cpu")
    output = layer(**inputs)[0]
    for b, n in itertools.product(range(2), range(QUERIES)):
        assert_same(output[b, n], layer_by_hand(layer, inputs, b, n))


# --------------------------------------------------------------------- the prior


@pytest.mark.parametrize("scales", [1, 2, 8])
@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_outputs_have_the_documented_shapes(geometry: str, modulation: str, scale_type: str, scales: int) -> None:
    strides = [4 * 2**s for s in range(scales)]
    prior = SpatialPrior(EMBED_DIM, HEADS, strides, geometry=geometry, modulation=modulation, scale_type=scale_type)
    output = prior(torch.randn(2, QUERIES, EMBED_DIM), [(3, 4)] * scales)
    maps = HEADS if modulation == "per_head" else 1
    assert output.center.shape == output.precision.shape == (2, maps, QUERIES, scales, 2)
    assert output.reference_logits.shape == (2, QUERIES, 2)
    if scales == 1:
        assert output.scale_weights is None
    else:
        assert output.scale_weights.shape == (2, 1, QUERIES, scales)


def test_without_scale_selection_there_are_no_scale_weights() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, scale_selection=False)
    assert prior(torch.randn(1, QUERIES, EMBED_DIM), SHAPES).scale_weights is None


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modulation", ["shared", "per_head"])
@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_sigma_is_two_cells_at_the_start(geometry: str, modulation: str, scale_type: str) -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, (16,), geometry=geometry, modulation=modulation, scale_type=scale_type)
    precision = prior(torch.randn(2, QUERIES, EMBED_DIM), SHAPES[:1]).precision
    sigma = (2 * precision) ** -0.5
    torch.testing.assert_close(sigma, torch.full_like(sigma, 2.0))


def test_official_precision_grows_with_the_stride_of_several_scales() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, (16, 32, 64), geometry="official")
    precision = prior(torch.randn(1, 1, EMBED_DIM), [(4, 4)] * 3).precision
    torch.testing.assert_close(precision[0, 0, 0, :, 0], torch.tensor([0.5, 1.0, 2.0]) / 8)


def test_paper_precision_stays_finite_where_the_object_scale_is_zero() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, geometry="paper")
    nn.init.zeros_(prior.object_scale.bias)
    precision = prior(torch.randn(1, QUERIES, EMBED_DIM), SHAPES[:1]).precision
    precision.sum().backward()
    assert precision.isfinite().all()
    assert prior.object_scale.bias.grad.isfinite().all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_head_offsets_are_added_in_cells_of_each_scale(geometry: str) -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, geometry=geometry)
    features, sizes = torch.randn(1, 1, EMBED_DIM), torch.tensor([[64, 96]])
    nn.init.zeros_(prior.offset.weight)
    nn.init.zeros_(prior.offset.bias)
    before = prior(features, SHAPES, image_sizes=sizes).center
    offsets = torch.tensor([[[1.0, -2.0], [0.5, 90.0]], [[-3.0, 4.0], [7.0, -8.0]]])  # scale, head, xy
    with torch.no_grad():
        prior.offset.bias.copy_(offsets.flatten())
    moved = prior(features, SHAPES, image_sizes=sizes).center - before
    torch.testing.assert_close(moved[0, :, 0], offsets.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_centre_is_unnormalised_by_the_image_and_the_stride() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, modulation="shared")
    center = prior(
        torch.randn(1, 1, EMBED_DIM),
        SHAPES,
        reference_logits=torch.zeros(1, 1, 2),
        image_sizes=torch.tensor([[50, 90]]),
    ).center
    torch.testing.assert_close(center[0, 0, 0], torch.tensor([[45 / 16, 25 / 16], [45 / 32, 25 / 32]]))


def test_centre_falls_back_to_valid_cells_then_the_mask_then_the_grid() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, modulation="shared")
    features, logits = torch.randn(1, 1, EMBED_DIM), torch.zeros(1, 1, 2)
    valid = [[(3, 5), (1, 2)]]
    from_valid = prior(features, SHAPES, reference_logits=logits, valid_shapes=valid).center
    from_mask = prior(features, SHAPES, reference_logits=logits, key_padding_mask=padding_mask(valid)).center
    from_grid = prior(features, SHAPES, reference_logits=logits).center
    torch.testing.assert_close(from_valid[0, 0, 0], torch.tensor([[2.5, 1.5], [1.0, 0.5]]))
    torch.testing.assert_close(from_mask, from_valid)
    torch.testing.assert_close(from_grid[0, 0, 0], torch.tensor([[3.0, 2.0], [1.5, 1.0]]))


def padding_mask(valid_shapes: list[list[tuple[int, int]]]) -> Tensor:
    """[B, T] bool, True outside the top-left part of each grid."""
    rows = []
    for image in valid_shapes:
        parts = []
        for (height, width), (valid_height, valid_width) in zip(SHAPES, image, strict=True):
            part = torch.ones(height, width, dtype=torch.bool)
            part[:valid_height, :valid_width] = False
            parts.append(part.flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def test_given_reference_logits_replace_the_predicted_centre() -> None:
    first = SpatialPrior(EMBED_DIM, HEADS, modulation="shared")
    later = SpatialPrior(EMBED_DIM, HEADS, modulation="shared", predicts_center=False)
    features = torch.randn(1, QUERIES, EMBED_DIM)
    one = first(features, SHAPES[:1])
    two = later(torch.randn_like(features), SHAPES[:1], reference_logits=one.reference_logits)
    torch.testing.assert_close(two.center, one.center)
    assert two.reference_logits is one.reference_logits
    assert later.center_mlp is None


def test_reset_parameters_undoes_a_blanket_initialisation() -> None:
    layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert layer.prior.object_scale.weight.any()
    layer.reset_parameters()
    assert not layer.prior.object_scale.weight.any()


# --------------------------------------------------------- nn.MultiheadAttention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_modulation_the_layer_is_multihead_attention(batch_first: bool, geometry: str) -> None:
    kind = {"device": DEVICE, "dtype": torch.float64}
    attention = randomised(nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=batch_first)).to(**kind)
    layer = SpatiallyModulatedCoAttention(
        EMBED_DIM, HEADS, geometry=geometry, modulation="none", batch_first=batch_first
    ).to(**kind)
    layer.load_state_dict(attention.state_dict())
    tensors = [torch.randn(2, length, EMBED_DIM, **kind) for length in (QUERIES, 24, 24)]
    if not batch_first:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    mask = torch.rand(2, 24, device=DEVICE) < 0.4
    mask[:, 0] = False
    expected = attention(*tensors, key_padding_mask=mask)
    output = layer(*tensors, [(4, 6)], key_padding_mask=mask)
    assert_same(output[0], expected[0])


def test_multihead_attention_loads_beside_a_prior_and_leaves_it() -> None:
    attention, layer = (
        nn.MultiheadAttention(EMBED_DIM, HEADS),
        SpatiallyModulatedCoAttention(EMBED_DIM, HEADS),
    )
    before = {name: parameter.clone() for name, parameter in layer.prior.state_dict().items()}
    layer.load_multihead_attention(randomised(attention).state_dict())
    for name, parameter in attention.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], parameter)
    for name, parameter in layer.prior.state_dict().items():
        torch.testing.assert_close(parameter, before[name])


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 4}, {"add_bias_kv": True}])
def test_multihead_attention_with_other_parameters_does_not_load(options: dict[str, Any]) -> None:
    attention = nn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    with pytest.raises(ValueError, match="state must have the keys"):
        SpatiallyModulatedCoAttention(EMBED_DIM, HEADS).load_multihead_attention(attention.state_dict())


def test_sequence_first_and_batch_first_agree() -> None:
    layer, inputs = make_layer(), make_inputs()
    output, prior = layer(**inputs)
    layer.batch_first = False
    swapped = {name: x.transpose(0, 1) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    sequence_output, sequence_prior = layer(**swapped)
    assert_same(sequence_output.transpose(0, 1), output)
    assert_same(sequence_prior.center, prior.center)


# ------------------------------------------------------------ the authors' layer


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
    """What the released decoder layer computes between norm1 and dropout2, head by head."""
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
    with pytest.raises(ValueError, match="under the prefix 'decoder'"):
        official_layer_state(official_state("", "type3", 1, first=True), "decoder")


# --------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("given", ["image_sizes", "valid_shapes"])
def test_image_alone_in_a_batch_and_padded_gives_the_same(geometry: str, given: str) -> None:
    layer = make_layer(geometry=geometry)
    small, padded = ((3, 5), (2, 3)), SHAPES
    alone = make_inputs(1)
    maps = [torch.randn(1, h, w, EMBED_DIM, device=DEVICE, dtype=torch.float64) for h, w in small]
    alone |= {"key": torch.cat([m.flatten(1, 2) for m in maps], 1), "spatial_shapes": small}
    alone["value"] = alone["key"]
    sizes = torch.tensor([[48, 80], [64, 96]], device=DEVICE)
    alone_sizes = {"image_sizes": sizes[:1]} if given == "image_sizes" else {}
    expected = layer(**alone, **alone_sizes)[0]

    batch = make_inputs(2)
    filled = []
    for m, (height, width) in zip(maps, padded, strict=True):
        canvas = torch.randn(2, height, width, EMBED_DIM, device=DEVICE, dtype=torch.float64)
        canvas[:1, : m.shape[1], : m.shape[2]] = m
        filled.append(canvas.flatten(1, 2))
    batch["key"] = batch["value"] = torch.cat(filled, 1)
    for name in ("query", "prior_features"):
        batch[name][:1] = alone[name]
    valid = torch.tensor([small, padded], device=DEVICE)
    batch_sizes = {"image_sizes": sizes} if given == "image_sizes" else {}
    assert_same(layer(**batch, valid_shapes=valid, **batch_sizes)[0][:1], expected)
    mask = padding_mask(valid.tolist()).to(DEVICE)
    assert_same(layer(**batch, key_padding_mask=mask, **batch_sizes)[0][:1], expected)


@pytest.mark.parametrize("predicts_center", [True, False])
@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_gradients_reach_every_parameter(
    geometry: str, modulation: str, scale_type: str, predicts_center: bool
) -> None:
    options = {"geometry": geometry, "modulation": modulation, "scale_type": scale_type}
    layer = SpatiallyModulatedCoAttention(
        EMBED_DIM, HEADS, STRIDES, batch_first=True, predicts_center=predicts_center, **options
    ).to(DEVICE)
    inputs = make_inputs(dtype=torch.float32)
    logits = torch.randn(2, QUERIES, 2, device=DEVICE, requires_grad=True)
    output, _ = layer(**inputs, reference_logits=None if predicts_center else logits)
    (output * torch.randn_like(output)).sum().backward()
    silent = [name for name, parameter in layer.named_parameters() if not parameter.grad.any()]
    assert silent == []
    if not predicts_center and modulation != "none":
        assert logits.grad.any()


def test_gradient_of_a_later_layer_reaches_the_centre_of_the_first() -> None:
    first, later = make_layer(), make_layer(predicts_center=False)
    inputs = make_inputs()
    reference_logits = first(**inputs)[1].reference_logits
    later(**inputs, reference_logits=reference_logits)[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in first.prior.center_mlp.parameters())


def test_under_autocast_the_prior_stays_float32() -> None:
    layer, inputs = make_layer().float(), make_inputs(dtype=torch.float32)
    plain = layer(**inputs)[1]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output, prior = layer(**inputs)
    assert output.dtype == torch.bfloat16
    for actual, expected in zip(prior, plain, strict=True):
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_runs_in_a_dtype_within_its_error_budget(dtype: torch.dtype) -> None:
    exact, inputs = make_layer(), make_inputs()
    inputs = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    layer = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(layer.state_dict())
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    output, prior = layer(**inputs)
    assert output.dtype == dtype
    assert prior.center.dtype == prior.precision.dtype == torch.float32
    assert_within_budget(output, exact(**wide)[0], layer(**inputs, backend="reference")[0])


def test_half_precision_layer_takes_a_float32_prior() -> None:
    layer, inputs = make_layer().float(), make_inputs(dtype=torch.float32)
    expected = layer.prior(inputs["prior_features"].bfloat16(), SHAPES)
    layer.bfloat16().prior.float()
    half = {name: x.bfloat16() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    # .bfloat16() has rounded the prior's parameters, so only dtypes are compared.
    output, prior = layer(**half)
    assert output.dtype == torch.bfloat16
    assert prior.center.dtype == expected.center.dtype == torch.float32


def test_mass_tolerance_is_that_of_the_attention() -> None:
    with pytest.raises(ValueError, match=r"mass_tolerance must be in \[0, 1\), got 2"):
        make_layer()(**make_inputs(), mass_tolerance=2)


def test_dropout_acts_only_while_training() -> None:
    layer, inputs = make_layer(dropout=1.0), make_inputs()
    expected = make_layer()
    expected.load_state_dict(layer.state_dict())
    assert_same(layer(**inputs)[0], expected(**inputs)[0])
    dropped = layer.train()(**inputs)[0]
    assert_same(dropped, layer.out_proj.bias.expand_as(dropped))


def test_attention_map_is_the_attention_of_the_chosen_queries() -> None:
    layer, inputs = make_layer(strides=(16,), geometry="paper", modulation="none"), make_inputs()
    attention = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True).to(DEVICE, torch.float64)
    attention.load_state_dict(layer.state_dict())
    query, key = inputs["query"], inputs["key"][:, :24]
    expected = attention(query, key, key, average_attn_weights=False)[1][:, :, [2, 0]]
    (actual,) = layer.attention_map(query, key, SHAPES[:1], queries=[2, 0])
    assert_same(actual.flatten(3), expected)


def test_attention_map_follows_the_prior() -> None:
    layer, inputs = make_layer(), make_inputs()
    nn.init.zeros_(layer.in_proj_weight)
    del inputs["value"]
    prior = layer.prior(inputs["prior_features"], SHAPES)
    maps = layer.attention_map(**inputs)
    for s, (height, width) in enumerate(SHAPES):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((x, y), -1).to(DEVICE)  # [height, width, 2]
        center, precision = (t[..., None, None, s, :] for t in (prior.center, prior.precision))
        logits = -(precision * (grid - center) ** 2).sum(-1)
        assert_same(maps[s], logits.flatten(3).softmax(-1).unflatten(3, (height, width)))


# --------------------------------------------------------------- torch around it


@pytest.mark.parametrize("given", ["key_padding_mask", "valid_shapes"])
def test_one_compiled_graph_serves_changing_grids_and_batches(given: str) -> None:
    layer = make_layer()
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes of the first call are equal: the compiler would take them for one.
    for batch, height, width in [(5, 9, 14), (4, 7, 6), (3, 11, 13)]:
        shapes = ((height, width), (height // 2, width // 2))
        keys = height * width + (height // 2) * (width // 2)
        kind = {"device": DEVICE, "dtype": torch.float64}
        query = torch.randn(batch, QUERIES, EMBED_DIM, **kind)
        memory = torch.randn(batch, keys, EMBED_DIM, **kind)
        padding = {
            "key_padding_mask": {
                "key_padding_mask": torch.zeros(batch, keys, dtype=torch.bool, device=DEVICE),
                "image_sizes": torch.full((batch, 2), 70, device=DEVICE),
            },
            "valid_shapes": {"valid_shapes": torch.tensor([shapes] * batch, device=DEVICE)},
        }[given]
        inputs = {"prior_features": query, **padding}
        with torch.no_grad():
            actual = compiled(query, memory, memory, shapes, **inputs)[0]
            assert_same(actual, layer(query, memory, memory, shapes, **inputs)[0])
    assert counter.frame_count == 1


def test_compiled_layer_trains_like_the_eager_one() -> None:
    layer, inputs = make_layer(), make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        module(**inputs)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        assert_same(traced, eager)


def test_compiled_layer_drops_out_while_training() -> None:
    layer, inputs = make_layer(dropout=1.0).train(), make_inputs()
    torch._dynamo.reset()
    output = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")(**inputs)[0]
    assert_same(output, layer.out_proj.bias.expand_as(output))


def test_layer_exports() -> None:
    layer, inputs = make_layer(), make_inputs()
    program = torch.export.export(layer, (), inputs)
    assert_same(program.module()(**inputs)[0], layer(**inputs)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same(copied: Any) -> None:
    layer, inputs = make_layer(), make_inputs()
    assert_same(copied(layer)(**inputs)[0], layer(**inputs)[0], 0.0)


def test_representation_names_the_configuration() -> None:
    text = repr(SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, (16, 32), geometry="paper"))
    for part in (
        "embed_dim=8",
        "num_heads=2",
        "strides=(16, 32)",
        "geometry='paper'",
        "modulation='per_head'",
    ):
        assert part in text


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_forward_is_captured_into_a_cuda_graph() -> None:
    layer, inputs = make_layer().float(), make_inputs(dtype=torch.float32)
    inputs["valid_shapes"] = torch.tensor([SHAPES] * 2, device=DEVICE)
    with torch.no_grad():
        expected = layer(**inputs)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(**inputs)[0]
        graph.replay()
    assert_same(output, expected, 1e-6)


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 9}, ValueError, "embed_dim must be a multiple of num_heads=2, got 9"),
        ({"embed_dim": 8.0}, TypeError, "embed_dim must be an int, got float"),
        ({"embed_dim": 512}, ValueError, "embed_dim must be at most 128 per head, got 512"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"strides": ()}, ValueError, "strides must have 1 to 8 scales, got 0"),
        ({"strides": (8,) * 9}, ValueError, "strides must have 1 to 8 scales, got 9"),
        ({"strides": (16, -1)}, ValueError, r"strides\[1\] must be finite and above 0, got -1"),
        ({"strides": 32}, TypeError, "strides must be a sequence"),
        ({"geometry": "offical"}, ValueError, "geometry must be one of 'official', 'paper', got 'offical'"),
        ({"modulation": None}, ValueError, "modulation must be one of"),
        ({"scale_type": "type3"}, ValueError, "scale_type must be one of .* got 'type3'"),
        ({"beta": 0.0}, ValueError, "beta must be finite and above 0, got 0.0"),
        ({"beta": "8"}, TypeError, "beta must be a number, got str"),
        ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_constructor_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpatiallyModulatedCoAttention(**({"embed_dim": EMBED_DIM, "num_heads": HEADS} | options))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": torch.zeros(2, 3)}, ValueError, r"query must be \[B, N, E=8\], got \[2, 3\]"),
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"key": torch.zeros(1, KEYS, 8)}, ValueError, r"key must be \[B=2, T, E=8\], got \[1, 30, 8\]"),
        ({"value": torch.zeros(2, KEYS, 9)}, ValueError, r"value must be \[B=2, T, E=8\], got \[2, 30, 9\]"),
        ({"value": torch.zeros(2, KEYS, 8).int()}, TypeError, "value must be of a floating dtype"),
        ({"prior_features": None}, ValueError, "prior_features must be given with geometry='official'"),
        ({"prior_features": torch.zeros(2, 1, 8)}, ValueError, "prior_features must be shaped as query"),
        ({"spatial_shapes": SHAPES[:1]}, ValueError, r"strides \(16, 32\), got \(\(4, 6\),\)"),
        ({"spatial_shapes": (4, 6)}, TypeError, "spatial_shapes"),
        ({"spatial_shapes": ((4, 6), (3, 3))}, ValueError, "key must be"),
        ({"reference_logits": torch.zeros(2, 2)}, ValueError, r"reference_logits must be \[B=2, N=3, xy=2\]"),
        ({"image_sizes": torch.zeros(2, 3)}, ValueError, "image_sizes must be"),
        ({"image_sizes": [(4, 6)]}, TypeError, "image_sizes must be a tensor, got list"),
        ({"valid_shapes": [[(4, 6)]]}, ValueError, "valid_shapes must be"),
        ({"valid_shapes": torch.zeros(2, 2, 2)}, TypeError, "valid_shapes must be an integer tensor"),
        ({"key_padding_mask": torch.zeros(2, 9).bool()}, ValueError, "key_padding_mask must be"),
        ({"key_padding_mask": torch.zeros(2, KEYS)}, TypeError, "key_padding_mask must be a torch.bool"),
        ({"key_padding_mask": torch.zeros(2, KEYS, device="meta").bool()}, ValueError, "must be on cpu as features"),
        ({"image_sizes": torch.zeros(2, 2, device="meta")}, ValueError, "must be on cpu as features, got meta"),
        ({"reference_logits": torch.zeros(2, 3, 2, device="meta")}, ValueError, "must be on cpu as features, got meta"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of \('auto', 'triton', .*\), got 'cuda'"),
    ],
)
def test_wrong_inputs_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, STRIDES, batch_first=True)
    with pytest.raises(error, match=message):
        layer(**(make_inputs(dtype=torch.float32, device="cpu") | changed))
