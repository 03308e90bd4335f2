"""The detector as a whole: what it returns, and that neither the batch nor the padding changes it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from devices import TRITON
from tiny_detector import MULTI, SINGLE, tiny_detector, without_parameters

from smca_kernels.testing.budget import assert_within_budget
from smca_model import PRESETS, SMCA, build, build_criterion, postprocess
from smca_model.detector import pad_images, valid_cells

OUTPUTS = ("pred_logits", "pred_boxes")
both = pytest.mark.parametrize("preset", [SINGLE, MULTI])


def layers(outputs):
    return [*outputs["aux_outputs"], outputs]


@both
def test_outputs_have_the_documented_shapes_for_every_decoder_layer(preset):
    outputs = tiny_detector(preset)([torch.randn(3, 40, 56), torch.randn(3, 33, 64)])

    assert len(outputs["aux_outputs"]) == 1
    for layer in layers(outputs):
        assert layer["pred_logits"].shape == (2, 7, 5)
        assert layer["pred_boxes"].shape == (2, 7, 4)
        assert (layer["pred_boxes"] >= 0).all()
        assert (layer["pred_boxes"] <= 1).all()


def test_the_device_is_that_of_the_parameters_else_of_the_buffers_else_the_cpu():
    model = tiny_detector().to("meta")

    assert model.device == torch.device("meta")
    assert without_parameters(model).device == torch.device("meta")
    for module in model.modules():
        module._buffers.clear()
    assert model.device == torch.device("cpu")


@both
def test_an_image_gets_the_same_alone_as_in_a_batch_of_its_size(preset):
    model = tiny_detector(preset)
    images = [torch.randn(3, 50, 70) for _ in range(3)]

    together = model(images)

    for i, image in enumerate(images):
        alone = model([image])
        for layer, alone_layer in zip(layers(together), layers(alone), strict=True):
            for name in OUTPUTS:
                torch.testing.assert_close(layer[name][i], alone_layer[name][0], rtol=0, atol=1e-5)


@both
def test_after_the_backbone_padding_changes_nothing_whatever_stands_in_it(preset):
    model = tiny_detector(preset)
    size = (50, 70)
    maps = model.backbone(torch.randn(1, 3, *size))
    # A second, larger image makes the padding; NaN would show wherever it got through.
    padded = {8: torch.randn(2, 128, 13, 19)}
    padded[8][0] = math.nan
    padded[8][0, :, :7, :9] = maps[8][0]

    alone, together = model.detect(maps, [size]), model.detect(padded, [size, (13 * 8, 19 * 8)])

    for layer, alone_layer in zip(layers(together), layers(alone), strict=True):
        for name in OUTPUTS:
            torch.testing.assert_close(layer[name][0], alone_layer[name][0], rtol=0, atol=1e-5)


@both
def test_padding_gives_no_gradient_to_the_maps(preset):
    model = tiny_detector(preset)
    maps = {8: torch.randn(2, 128, 8, 10, requires_grad=True)}

    outputs = model.detect(maps, [(33, 80), (64, 41)])
    (outputs["pred_logits"].sum() + outputs["pred_boxes"].square().sum()).backward()

    gradient = maps[8].grad.abs().sum(1)
    assert (gradient[0, 5:] == 0).all()
    assert (gradient[1, :, 6:] == 0).all()
    assert (gradient[0, :5] > 0).all()
    assert (gradient[1, :, :6] > 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_trained_parameter_gets_a_gradient(preset):
    # Those that don't would stop DistributedDataParallel.
    small = {"hidden_dim": 16, "num_heads": 2, "ffn_dim": 16, "decoder_layers": 2, "num_queries": 3}
    with torch.device("meta"):
        model = SMCA(replace(PRESETS[preset], **small), backend="reference")
        images = [torch.empty(3, 64, 96), torch.empty(3, 96, 64)]

    outputs = model(images)
    sum(layer[name].square().sum() for layer in layers(outputs) for name in OUTPUTS).backward()

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


def test_the_backend_is_an_attribute_that_may_change():
    model = tiny_detector()
    model.backend = "cudnn"

    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cudnn'"):
        model([torch.randn(3, 40, 56)])


@pytest.mark.parametrize("backend", ["sdpa", TRITON])
@both
def test_another_backend_changes_the_outputs_within_the_error_budget(preset, backend, device):
    model = tiny_detector(preset).to(device)
    images = [torch.randn(3, 40, 56, device=device), torch.randn(3, 33, 64, device=device)]
    exact = copy.deepcopy(model).double()

    model.backend = exact.backend = "reference"
    oracle, eager = exact([image.double() for image in images]), model(images)
    model.backend = backend
    actual = model(images)

    for i, (ours, true, plain) in enumerate(zip(layers(actual), layers(oracle), layers(eager), strict=True)):
        for name in OUTPUTS:
            assert_within_budget(ours[name], true[name], plain[name], f"{name} of layer {i}")


def loss_curve(model, features, targets, steps=20):
    """Losses of AdamW steps on the same maps, from the model as it is."""
    model = copy.deepcopy(model).train()
    criterion = build_criterion(model.config.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = sum(criterion(model.detect({8: features}, [(24, 40), (32, 24)]), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("backend", ["sdpa", TRITON])
def test_training_with_another_backend_follows_the_same_loss_curve(backend, device):
    # One head and one layer: Triton's interpreter takes its time.
    model = tiny_detector(num_heads=1, decoder_layers=1, dropout=0.0).to(device)
    features = torch.randn(2, 128, 4, 5, device=device)
    targets = [
        {"boxes": torch.rand(count, 4, device=device) * 0.5 + 0.25, "labels": torch.arange(count, device=device)}
        for count in (3, 1)
    ]
    double_targets = [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in targets]

    model.backend = "reference"
    oracle = loss_curve(copy.deepcopy(model).double(), features.double(), double_targets)
    eager = loss_curve(model, features, targets)
    # Rounding grows over the steps, by chance: eager's error is the largest over neighbouring inputs.
    neighbours = [loss_curve(model, features * (1 + sign * 2**-23), targets) for sign in (-1, 1)]
    eager_error = max((curve - oracle).abs().max().item() for curve in neighbours)
    model.backend = backend

    assert oracle[-1] < oracle[0]
    assert_within_budget(loss_curve(model, features, targets), oracle, eager, eager_error=eager_error)


@pytest.mark.parametrize("modulation", ["per_head", "shared"])
def test_boxes_begin_as_half_the_image_around_the_reference_point(modulation):
    model = build(SINGLE, 5, modulation=modulation).eval()
    priors = []
    model.decoder.layers[0].co_attn.register_forward_hook(lambda module, inputs, output: priors.append(output[1]))

    outputs = model([torch.randn(3, 40, 56)])

    for layer in layers(outputs):
        torch.testing.assert_close(layer["pred_boxes"][..., :2], priors[0].reference_logits.sigmoid())
        assert (layer["pred_boxes"][..., 2:] == 0.5).all()


def test_every_layer_s_box_is_relative_to_the_first_layer_s_reference_point():
    # Equation 12: sigmoid(box head + [reference logits, 0, 0]).
    model = tiny_detector()
    priors, heads = [], []
    model.decoder.layers[0].co_attn.register_forward_hook(lambda module, inputs, output: priors.append(output[1]))
    model.bbox_embed.register_forward_hook(lambda module, inputs, output: heads.append(output))

    outputs = model([torch.randn(3, 40, 56)])

    for layer, box in zip(layers(outputs), heads[0], strict=True):
        expected = torch.cat((box[..., :2] + priors[0].reference_logits, box[..., 2:]), -1).sigmoid()
        torch.testing.assert_close(layer["pred_boxes"], expected)


def test_the_reference_point_learns_from_every_layer_s_box():
    model = tiny_detector()
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.co_attn.out_proj.weight.zero_()  # so that no gradient comes through the attention
    first = model.decoder.layers[0].co_attn.prior.center_mlp[0].weight

    outputs = model([torch.randn(3, 40, 56)])
    gradients = [torch.autograd.grad(layer["pred_boxes"].sum(), first, retain_graph=True) for layer in layers(outputs)]

    assert all(gradient[0].abs().sum() > 0 for gradient in gradients)


def test_the_prior_of_a_new_model_is_two_cells_wide():
    # DETR's initialisation, which fills every matrix, must not undo the layers' own.
    model = build(SINGLE, 5).eval()
    precisions = []
    for layer in model.decoder.layers:
        layer.co_attn.register_forward_hook(lambda module, inputs, output: precisions.append(output[1].precision))

    model([torch.randn(3, 40, 56)])

    for precision in precisions:
        torch.testing.assert_close((2 * precision) ** -0.5, torch.full_like(precision, 2.0))


def uninitialised(preset):
    """On the CPU with NaN in every parameter and buffer, as `to_empty` may leave it."""
    with torch.device("meta"):
        model = build(preset, 5)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    return model


def assert_begins_as_documented(model):
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(model.class_embed.bias.sigmoid(), torch.full((5,), 0.01))
    assert not any(parameter.any() for parameter in model.bbox_embed[-1].parameters())
    for layer in model.decoder.layers:
        features = torch.randn(1, 4, model.config.hidden_dim)
        shapes = [(4, 4)] * len(model.config.strides)
        prior = layer.co_attn.prior(features, shapes, reference_logits=torch.zeros(1, 4, 2))
        scale = [1.0] if len(shapes) == 1 else [stride / 32 for stride in model.config.strides]
        sigma = (2 * prior.precision / torch.tensor(scale)[:, None]) ** -0.5
        torch.testing.assert_close(sigma, torch.full_like(sigma, 2.0))


@pytest.mark.parametrize("preset", [SINGLE, MULTI, "smca-dc5-r50"])
def test_reset_parameters_makes_a_model_new(preset):
    model, new = uninitialised(preset), build(preset, 5)

    model.reset_parameters()

    assert_begins_as_documented(model)
    for (name, actual), expected in zip(model.state_dict().items(), new.state_dict().values(), strict=True):
        spread = expected.std(correction=0).item()
        if spread == 0.0:
            assert torch.equal(actual, expected), name
        elif actual.numel() >= 100:  # random numbers, drawn anew
            assert actual.std(correction=0).item() == pytest.approx(spread, rel=0.3), name


@pytest.mark.parametrize("preset", [SINGLE, MULTI])
@pytest.mark.parametrize("order", [list, reversed])
def test_modules_reset_in_turn_begin_as_a_new_model(preset, order):
    model = uninitialised(preset)
    owners = [module for module in model.modules() if len(module._parameters)]

    for module in order(owners):
        module.reset_parameters()  # as FSDP does, from the meta device

    assert_begins_as_documented(model)


def test_a_class_s_bias_is_its_prior_probability():
    torch.testing.assert_close(build(SINGLE, 5).class_embed.bias.sigmoid(), torch.full((5,), 0.01))


def test_outputs_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tiny_detector(MULTI)([torch.randn(3, 40, 56)])

    assert all(outputs[name].dtype == torch.float32 for name in OUTPUTS)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images must hold at least one image"),
        (torch.zeros(2, 3, 8, 8), "images must be a list of tensors"),
        ([torch.zeros(1, 8, 8)], r"images\[0\] must be \[3, height, width\], got \[1, 8, 8\]"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 0, 8)], r"images\[1\] must be \[3, height, width\], got \[3, 0, 8\]"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], r"images\[0\] must be a floating tensor .*, got torch.uint8"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8).double()], r"images\[1\] must be torch.float32 .*float64"),
    ],
)
def test_wrong_images_are_refused_by_name(images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_detector()(images)


def test_strides_that_the_backbone_can_not_reach_are_refused():
    with pytest.raises(ValueError, match=r"strides must be .* deepest, 8, by a factor of 2 each, got \(8, 32\)"):
        tiny_detector(strides=(8, 32))


def test_strides_may_begin_beyond_the_backbone():
    model = tiny_detector(strides=(16,))
    shapes = []
    model.input_proj[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))

    model([torch.randn(3, 40, 56)])

    assert shapes == [(1, 32, 3, 4)]


def test_postprocess_ranks_pairs_of_query_and_class_and_gives_pixels():
    logits = torch.tensor([[[0.0, 2.0], [1.0, -1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.75, 0.5, 0.5]]])

    (detections,) = postprocess({"pred_logits": logits, "pred_boxes": boxes}, [(100, 200)], top=3)

    torch.testing.assert_close(detections["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    assert detections["labels"].tolist() == [1, 0, 0]
    assert detections["queries"].tolist() == [0, 1, 0]
    expected = [[50.0, 0.0, 150.0, 100.0], [0.0, 50.0, 100.0, 100.0], [50.0, 0.0, 150.0, 100.0]]
    torch.testing.assert_close(detections["boxes"], torch.tensor(expected))


def test_postprocess_gives_all_pairs_where_there_are_fewer_than_asked_for():
    outputs = {"pred_logits": torch.randn(2, 3, 4), "pred_boxes": torch.rand(2, 3, 4)}

    assert [len(one["scores"]) for one in postprocess(outputs, torch.tensor([[10, 10], [20, 20]]))] == [12, 12]


def test_postprocess_refuses_another_number_of_sizes():
    outputs = {"pred_logits": torch.randn(2, 3, 4), "pred_boxes": torch.rand(2, 3, 4)}

    with pytest.raises(ValueError, match=r"sizes must be \[B=2, 2\], got \[1, 2\]"):
        postprocess(outputs, [(10, 10)])


def test_padding_is_zero_outside_the_image_and_nothing_inside_is_changed() -> None:
    images = [torch.rand(3, 40, 70) + 1, torch.rand(3, 50, 20) + 1]
    batch = pad_images(images)
    assert batch.shape == (2, 3, 50, 70)
    for padded, image in zip(batch, images, strict=True):
        assert torch.equal(padded[:, : image.shape[1], : image.shape[2]], image)
        assert padded.sum() == pytest.approx(image.sum().item())


def test_valid_cells_count_every_cell_that_a_pixel_reaches() -> None:
    sizes = [(512, 768), (513, 16)]
    assert [valid_cells(sizes, stride) for stride in (16, 32, 64)] == [
        [(32, 48), (33, 1)],
        [(16, 24), (17, 1)],
        [(8, 12), (9, 1)],
    ]
