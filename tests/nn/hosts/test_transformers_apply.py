"""SMCA given to Hugging Face's detectors: models that are built, options, checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from tiny_hosts import (
    BACKBONE,
    SIZES,
    Host,
    assert_equal_outputs,
    attentions,
    config_of,
    images,
    livened,
    plain_model,
    smca_model,
)
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from smca_kernels.nn.linear import UnitLinear


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


def test_a_model_of_bfloat16_gets_a_prior_of_bfloat16(host: Host, device: torch.device) -> None:
    model = host.apply(plain_model(host, device).to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert model(images(device).bfloat16()).logits.isfinite().all()


def test_attention_weights_are_dropped_as_often_as_the_hosts(host: Host) -> None:
    model = host.smca(config_of(host, attention_dropout=0.25))
    assert [attention.dropout for attention in attentions(model)] == [0.25] * 3


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
