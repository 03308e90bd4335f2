"""SMCA in Hugging Face's detectors: what they compute, on tiny models of random weights.

With modulation "none" nothing may change; with a prior, boxes and centres are where the images are.
"""

from __future__ import annotations

import copy
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tiny_hosts import (
    Host,
    assert_equal_outputs,
    attentions,
    gradients,
    images,
    labels,
    padded,
    plain_model,
    run_backward,
    smca_model,
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_without_modulation_outputs_and_losses_are_the_hosts(host: Host, masked: bool, auxiliary_loss: bool) -> None:
    device = torch.device("cpu")  # where both call the same kernel of torch's, to the bit
    plain = plain_model(host, device, auxiliary_loss=auxiliary_loss)
    changed = host.apply(copy.deepcopy(plain), modulation="none")
    arguments = {"pixel_mask": padded(device) if masked else None, "labels": labels(device)}
    pixels = images(device)
    with torch.no_grad():
        expected, actual = plain(pixels, **arguments), changed(pixels, **arguments)
    assert_equal_outputs(actual, expected, host.tolerance)
    torch.testing.assert_close(actual.loss_dict, expected.loss_dict, atol=1e-5, rtol=1e-5)
    assert len(actual.auxiliary_outputs or []) == (2 if auxiliary_loss else 0)


@pytest.mark.parametrize("masked", [False, True])
def test_without_modulation_the_gradients_are_the_hosts(host: Host, masked: bool, device: torch.device) -> None:
    plain = plain_model(host, device).double()
    changed = host.apply(copy.deepcopy(plain), modulation="none")
    pixels, mask = images(device).double(), padded(device) if masked else None
    run_backward([plain, changed], pixels, mask)
    torch.testing.assert_close(gradients(changed), gradients(plain), atol=1e-9, rtol=1e-7)


def test_a_prior_changes_the_outputs(host: Host, device: torch.device) -> None:
    model = smca_model(host, device)
    plain = host.plain(model.config).to(device).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    pixels = images(device)
    assert (model(pixels).logits - plain(pixels).logits).abs().max() > 1e-2


@pytest.mark.parametrize("geometry", ["official", "paper"])
def test_every_parameter_of_the_prior_gets_a_gradient(host: Host, geometry: str, device: torch.device) -> None:
    model = smca_model(host, device, smca={"geometry": geometry})
    model(images(device), padded(device), labels=labels(device)).loss.backward()
    priors = {name: p for name, p in model.named_parameters() if ".smca." in name}
    assert priors
    assert [name for name, p in priors.items() if p.grad is None or not p.grad.any()] == []


def test_a_mask_of_ones_is_no_mask(host: Host, device: torch.device) -> None:
    model, pixels = smca_model(host, device), images(device)
    ones = torch.ones(2, 160, 224, device=device)
    assert_equal_outputs(model(pixels, ones), model(pixels), 1e-5)


def test_centers_are_spread_over_the_image_in_pixels(host: Host, device: torch.device) -> None:
    model = smca_model(host, device)
    seen = []
    for attention in attentions(model):
        nn.init.zeros_(attention.prior.offset.weight)
        nn.init.zeros_(attention.prior.offset.bias)
        attention.prior.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images(device), padded(device))
    sizes = torch.tensor([[224.0, 160.0], [150.0, 100.0]], device=device).view(2, 1, 1, 1, 2)
    assert len(seen) == 3
    for prior in seen:
        expected = prior.reference_logits.sigmoid()[:, None, :, None] * sizes / 32
        torch.testing.assert_close(prior.center, expected.expand_as(prior.center))
        assert torch.equal(prior.reference_logits, seen[0].reference_logits)


def test_boxes_lie_around_the_reference_points_of_the_priors(host: Host, device: torch.device) -> None:
    model = smca_model(host, device)
    seen = []
    next(attentions(model)).prior.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(images(device))
    logits = model.bbox_predictor(outputs.last_hidden_state) + nn.functional.pad(seen[0].reference_logits, (0, 2))
    torch.testing.assert_close(outputs.pred_boxes, logits.sigmoid(), atol=1e-4, rtol=0.0)
    assert seen[0].reference_logits.std() > 0.01


@pytest.mark.parametrize("geometry", ["official", "paper"])
def test_priors_are_predicted_from_what_their_geometry_says(host: Host, geometry: str, device: torch.device) -> None:
    model = smca_model(host, device, smca={"geometry": geometry})
    before, after, features = [], [], []
    for layer in model.model.decoder.layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: before.append(args[0]), with_kwargs=True)
        layer.self_attn_layer_norm.register_forward_hook(lambda module, args, output: after.append(output))
        layer.encoder_attn.smca.prior.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    model(images(device))
    query_pos = model.model.query_position_embeddings.weight
    assert len(features) == 3
    for expected, actual in zip(before if geometry == "official" else after, features, strict=True):
        torch.testing.assert_close(actual, expected + query_pos)


def test_hidden_states_are_recorded(host: Host, device: torch.device) -> None:
    model = host.apply(plain_model(host, device))
    outputs = model(images(device), output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.decoder_hidden_states] == [(2, 6, 32)] * 4
    assert torch.equal(outputs.decoder_hidden_states[-1], outputs.last_hidden_state)


def test_a_tuple_is_returned_on_demand(host: Host, device: torch.device) -> None:
    model, pixels = smca_model(host, device), images(device)
    expected = model(pixels)
    logits, boxes, *_ = model(pixels, return_dict=False)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(boxes, expected.pred_boxes)


def test_a_backbone_of_another_stride_is_refused(host: Host, device: torch.device) -> None:
    model = smca_model(host, device, smca={"strides": [16]})
    with pytest.raises(ValueError, match=r"strides .* \(16,\) where .* 160 × 224 pixels have 5 × 7 cells"):
        model(images(device))


def test_labels_of_a_padded_batch_are_made_relative_to_their_images() -> None:
    page = (Path(__file__).parents[3] / "docs/hosts.md").read_text("utf-8")
    (loop,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "pixel_mask" in block)
    mask = torch.ones(2, 100, 200, dtype=torch.long)
    mask[1, 50:], mask[1, :, 160:] = 0, 0
    boxes = torch.tensor([[0.4, 0.25, 0.2, 0.1]])
    batch = {
        "pixel_values": torch.zeros(2, 3, 100, 200),
        "pixel_mask": mask,
        "labels": [{"boxes": boxes.clone()}, {"boxes": boxes.clone()}],
    }
    exec(textwrap.dedent(loop), {"torch": torch, "batch": batch})
    torch.testing.assert_close(batch["labels"][0]["boxes"], boxes)
    torch.testing.assert_close(batch["labels"][1]["boxes"], torch.tensor([[0.5, 0.5, 0.25, 0.2]]))


def test_features_without_their_size_are_refused(host: Host, device: torch.device) -> None:
    model = smca_model(host, device)
    with pytest.raises(ValueError, match="inputs_embeds must be None"):
        model(images(device), inputs_embeds=torch.zeros(2, 35, 32, device=device))
