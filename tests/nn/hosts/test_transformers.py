"""SMCA in Hugging Face's detectors, on tiny models of random weights.

With modulation "none" nothing may change; with a prior, everything that the host can do has to go on working.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
)

from smca_kernels.nn.hosts import transformers as hosts
from smca_kernels.nn.linear import UnitLinear
from smca_kernels.nn.projected import ProjectedCoAttention

BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 6,
    "num_labels": 3,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Host:
    config: Any
    plain: Any
    smca: Any
    apply: Callable[..., Any]
    tolerance: float  # of the outputs without modulation, against the host's
    renamed: tuple[tuple[str, str], ...]  # names now, and in old checkpoints


HOSTS = {
    "detr": Host(
        DetrConfig,
        DetrForObjectDetection,
        hosts.SmcaDetrForObjectDetection,
        hosts.apply_smca_to_detr,
        0.0,
        (("o_proj", "out_proj"), ("mlp.fc", "fc"), ("backbone.model", "backbone.conv_encoder.model")),
    ),
    "conditional_detr": Host(
        ConditionalDetrConfig,
        ConditionalDetrForObjectDetection,
        hosts.SmcaConditionalDetrForObjectDetection,
        hosts.apply_smca_to_conditional_detr,
        1e-5,
        (("encoder_attn.o_proj", "encoder_attn.out_proj"), ("mlp.fc", "fc"), ("encoder_attn.v_proj", "ca_v_proj")),
    ),
}


@pytest.fixture(params=list(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


def config_of(host: Host, **options: Any) -> Any:
    return host.config(backbone_config=BACKBONE, use_timm_backbone=False, **(SIZES | options))


def plain_model(host: Host, device: torch.device, **options: Any) -> Any:
    return livened(host.plain(config_of(host, **options))).to(device).eval()


def smca_model(host: Host, device: torch.device, **options: Any) -> Any:
    return livened(host.smca(config_of(host, **options))).to(device).eval()


def livened(model: nn.Module) -> nn.Module:
    """Larger weights: with the host's initial 0.02 every query and cell is alike, and no mistake would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def images(device: torch.device) -> Tensor:
    return torch.randn(2, 3, 160, 224, device=device)


def padded(device: torch.device) -> Tensor:
    """A mask whose second image is smaller, and no multiple of the stride."""
    mask = torch.ones(2, 160, 224, dtype=torch.long, device=device)
    mask[1, 100:], mask[1, :, 150:] = 0, 0
    return mask


def labels(device: torch.device) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]], device=device)
    classes = torch.tensor([0, 2], device=device)
    return [{"class_labels": classes, "boxes": boxes}, {"class_labels": classes[:1], "boxes": boxes[:1]}]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_backward(models: list[Any], pixels: Tensor, mask: Tensor | None) -> None:
    """A backward pass of each from the same upstream gradients; the host's loss does not compute in float64."""
    logits, boxes = torch.randn(2, 6, 3).to(pixels), torch.randn(2, 6, 4).to(pixels)
    for model in models:
        outputs = model(pixels, mask)
        ((outputs.logits[..., :3] * logits).sum() + (outputs.pred_boxes * boxes).sum()).backward()


def attentions(model: nn.Module) -> Iterator[ProjectedCoAttention]:
    return (part for part in model.modules() if isinstance(part, ProjectedCoAttention))


def assert_equal_outputs(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=0.0)


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(host: Host, reentrant: bool, device: torch.device) -> None:
    model = smca_model(host, device, auxiliary_loss=True).double().train()
    kept = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    run_backward([model, kept], images(device).double(), padded(device))
    # Reentrant checkpoints are graphs of their own, which add up what a shared parameter gets in another order.
    tolerance = 1e-9 if reentrant else 0.0
    torch.testing.assert_close(gradients(model), gradients(kept), atol=tolerance, rtol=tolerance)
    assert sum(".smca." in name for name in gradients(model)) > 3


def test_a_model_is_copied_after_a_backward_pass(host: Host, device: torch.device) -> None:
    model, pixels = smca_model(host, device), images(device)
    model(pixels, labels=labels(device)).loss.backward()
    assert_equal_outputs(copy.deepcopy(model)(pixels), model(pixels))


def test_a_model_is_saved_and_loaded_with_its_options(host: Host, tmp_path: Path, device: torch.device) -> None:
    model = host.apply(plain_model(host, device), geometry="paper", modulation="shared", beta=4.0)
    livened(model).save_pretrained(tmp_path)
    loaded, told = host.smca.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    first = next(attentions(loaded)).prior
    assert (first.geometry, first.modulation, first.beta, first.strides) == ("paper", "shared", 4.0, (32,))
    pixels = images(device)
    assert_equal_outputs(loaded.to(device).eval()(pixels), model(pixels))


@pytest.mark.parametrize("names", ["of today", "old"])
def test_a_plain_checkpoint_loads_with_the_prior_alone_missing(
    host: Host, names: str, tmp_path: Path, device: torch.device
) -> None:
    plain = plain_model(host, device)
    plain.save_pretrained(tmp_path)
    if names == "old":
        state = load_file(tmp_path / "model.safetensors")
        for now, before in host.renamed:
            state = {name.replace(now, before): tensor for name, tensor in state.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, told = host.smca.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert told["missing_keys"]
    assert [name for name in told["missing_keys"] if ".smca." not in name] == []
    state = model.state_dict()
    torch.testing.assert_close({name: state[name].to(device) for name in plain.state_dict()}, plain.state_dict())


def test_missing_priors_begin_as_wide_as_they_should(host: Host, tmp_path: Path, device: torch.device) -> None:
    plain_model(host, device).save_pretrained(tmp_path)
    model = host.smca.from_pretrained(tmp_path).eval()
    for attention in attentions(model):
        prior = attention.prior(torch.randn(1, 6, 32), [(5, 7)], reference_logits=torch.zeros(1, 6, 2))
        torch.testing.assert_close(prior.precision, torch.full_like(prior.precision, 0.125))  # σ = 2 cells
        assert (prior.center - torch.tensor([3.5, 2.5])).abs().max() > 0.1  # Xavier's offsets, not 0.02's
    assert sum(isinstance(part, UnitLinear) for part in model.modules()) == 3


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


def test_attention_weights_are_dropped_as_often_as_the_hosts(host: Host) -> None:
    model = host.smca(config_of(host, attention_dropout=0.25))
    assert [attention.dropout for attention in attentions(model)] == [0.25] * 3


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


def test_autocast_to_bfloat16_changes_little(host: Host, device: torch.device) -> None:
    model, pixels = smca_model(host, device), images(device)
    expected = model(pixels)
    with torch.autocast(device.type, torch.bfloat16):
        actual = model(pixels, labels=labels(device))
    torch.testing.assert_close(actual.pred_boxes.float(), expected.pred_boxes, atol=0.05, rtol=0.0)
    actual.loss.backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if ".smca." in name)


def test_a_model_of_bfloat16_gets_a_prior_of_bfloat16(host: Host, device: torch.device) -> None:
    model = host.apply(plain_model(host, device).to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert model(images(device).bfloat16()).logits.isfinite().all()


def test_compiled_without_graph_breaks_it_computes_the_same(
    host: Host, device: torch.device, fresh_dynamo: None
) -> None:
    model = smca_model(host, device, decoder_layers=2, encoder_layers=0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pixels = images(device)
    with torch.no_grad():
        assert_equal_outputs(compiled(pixels), model(pixels), 1e-5)


def test_an_exported_program_takes_images_of_other_sizes(host: Host, device: torch.device) -> None:
    model = smca_model(host, device, decoder_layers=2, encoder_layers=0)
    sizes = {2: 32 * torch.export.Dim("height", min=2, max=40), 3: 32 * torch.export.Dim("width", min=2, max=40)}
    program = torch.export.export(model, (images(device),), dynamic_shapes={"pixel_values": sizes}, strict=False)
    pixels = torch.randn(2, 3, 192, 96, device=device)
    with torch.no_grad():
        assert_equal_outputs(program.module()(pixels), model(pixels), 1e-5)


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


def test_training_lowers_the_loss(host: Host, device: torch.device) -> None:
    model = host.apply(host.plain(config_of(host)).to(device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels, losses = images(device), []
    for _ in range(15):
        loss = model(pixels, labels=labels(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_applying_keeps_the_parameters_and_is_as_building(host: Host, device: torch.device) -> None:
    plain = plain_model(host, device)
    before = dict(plain.named_parameters())
    model = host.apply(plain)
    after = dict(model.named_parameters())
    assert model is plain
    assert type(model) is host.smca
    assert all(after[name] is parameter for name, parameter in before.items())
    built = host.smca(model.config).to(device).eval()
    built.load_state_dict(model.state_dict())
    pixels = images(device)
    assert_equal_outputs(built(pixels), model(pixels))


def test_a_backbone_of_another_stride_is_refused(host: Host, device: torch.device) -> None:
    model = smca_model(host, device, smca={"strides": [16]})
    with pytest.raises(ValueError, match=r"strides .* \(16,\) where .* 160 × 224 pixels have 5 × 7 cells"):
        model(images(device))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strides": (16, 32)}, ValueError, r"one stride .* \(16, 32\)"),
        ({"strides": 32}, TypeError, "strides must be a sequence"),
        ({"predicts_center": False}, TypeError, "'predicts_center'"),
        ({"geometry": "round"}, ValueError, "geometry .* 'round'"),
    ],
)
def test_options_that_do_not_exist_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str, host: Host, device: torch.device
) -> None:
    model = plain_model(host, device)
    names = list(model.state_dict())
    with pytest.raises(error, match=message):
        host.apply(model, **options)
    assert type(model) is host.plain
    assert list(model.state_dict()) == names
    assert not hasattr(model.config, "smca")


def test_other_options_in_a_config_are_refused(host: Host) -> None:
    with pytest.raises(TypeError, match=r"config.smca must be a dict .* list"):
        host.smca(config_of(host, smca=["paper"]))


def test_a_second_prior_is_refused(host: Host, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"plain {host.plain.__name__}, got a {host.smca.__name__}"):
        host.apply(smca_model(host, device))


def test_a_host_with_deformable_attention_is_refused_with_the_reason(host: Host) -> None:
    sizes = SIZES | {"encoder_n_points": 1, "decoder_n_points": 1}
    backbone = BACKBONE | {"out_features": ["stage2", "stage3", "stage4"]}
    model = DeformableDetrForObjectDetection(
        DeformableDetrConfig(backbone_config=backbone, use_timm_backbone=False, num_feature_levels=3, **sizes)
    )
    with pytest.raises(TypeError, match="DeformableDetrForObjectDetection: deformable attention samples a few points"):
        host.apply(model)


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
