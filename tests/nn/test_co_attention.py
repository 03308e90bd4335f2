"""The layer against the equations by hand and nn.MultiheadAttention; in batches, dtypes and torch.compile."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from by_hand import layer_by_hand
from small_layers import (
    DEVICE,
    EMBED_DIM,
    HEADS,
    KEYS,
    QUERIES,
    SHAPES,
    STRIDES,
    assert_same,
    make_inputs,
    make_layer,
    padding_mask,
    randomised,
)
from torch import Tensor, nn

from smca_kernels.nn import GEOMETRIES, MODULATIONS, SCALE_TYPES, SpatiallyModulatedCoAttention
from smca_kernels.testing.budget import assert_within_budget

OPTIONS = list(itertools.product(GEOMETRIES, MODULATIONS, SCALE_TYPES))


# --- the equations, by hand ---


@pytest.mark.parametrize(
    ("geometry", "modulation"), [("official", "per_head"), ("paper", "shared"), ("paper", "per_head")]
)
def test_layer_equals_the_equations_written_out(geometry: str, modulation: str) -> None:
    layer, inputs = make_layer(geometry=geometry, modulation=modulation).cpu(), make_inputs(device="cpu")
    output = layer(**inputs)[0]
    for b, n in itertools.product(range(2), range(QUERIES)):
        assert_same(output[b, n], layer_by_hand(layer, inputs, b, n))


# --- nn.MultiheadAttention ---


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


def test_multihead_attention_loads_from_its_state_dict_alone() -> None:
    with pytest.raises(TypeError, match="state must be a state dict, got MultiheadAttention"):
        SpatiallyModulatedCoAttention(EMBED_DIM, HEADS).load_multihead_attention(
            nn.MultiheadAttention(EMBED_DIM, HEADS)
        )


def test_sequence_first_and_batch_first_agree() -> None:
    layer, inputs = make_layer(), make_inputs()
    output, prior = layer(**inputs)
    layer.batch_first = False
    swapped = {name: x.transpose(0, 1) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    sequence_output, sequence_prior = layer(**swapped)
    assert_same(sequence_output.transpose(0, 1), output)
    assert_same(sequence_prior.center, prior.center)


# --- batches, gradients, dtypes, attention maps ---


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


# --- torch.compile, export, copies, CUDA graphs ---


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


def test_tracing_on_a_cpu_or_gpu_does_not_ask_whether_there_is_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch 2.8 and 2.11 can't trace that question.
    def untraceable(device_type: str) -> bool:
        raise AssertionError(f"torch.amp.is_autocast_available({device_type!r}) was called")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    layer, inputs = make_layer(), make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_same(compiled(**inputs)[0], layer(**inputs)[0])
    with torch.autocast(DEVICE):
        torch._dynamo.reset()
        assert_same(compiled(**inputs)[1].center, layer(**inputs)[1].center)


def test_layer_exports() -> None:
    layer, inputs = make_layer(), make_inputs()
    program = torch.export.export(layer, (), inputs)
    assert_same(program.module()(**inputs)[0], layer(**inputs)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same(copied: Any) -> None:
    layer, inputs = make_layer(), make_inputs()
    assert_same(copied(layer)(**inputs)[0], layer(**inputs)[0], 0.0)


def test_reset_parameters_undoes_a_blanket_initialisation() -> None:
    layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert layer.prior.object_scale.weight.any()
    layer.reset_parameters()
    assert not layer.prior.object_scale.weight.any()


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


# --- errors ---


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
        ({"batch_first": "no"}, TypeError, "batch_first must be True or False, got 'no'"),
        ({"scale_selection": "no"}, TypeError, "scale_selection must be True or False, got 'no'"),
        ({"predicts_center": None}, TypeError, "predicts_center must be True or False, got None"),
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
        ({"prior_features": [0.0]}, TypeError, "prior_features must be a tensor shaped as query, got list"),
        ({"prior_features": torch.zeros(2, 3, 8).int()}, TypeError, "prior_features must be of a floating dtype"),
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
        ({"key": torch.zeros(2, KEYS, 8).to_sparse()}, TypeError, "key must be dense, got .*sparse_coo"),
        ({"image_sizes": torch.ones(2, 2).to_sparse()}, TypeError, "image_sizes must be dense, got .*sparse_coo"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of \('auto', 'triton', .*\), got 'cuda'"),
    ],
)
def test_wrong_inputs_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, STRIDES, batch_first=True)
    with pytest.raises(error, match=message):
        layer(**(make_inputs(dtype=torch.float32, device="cpu") | changed))
