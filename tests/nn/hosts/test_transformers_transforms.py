"""SMCA in Hugging Face's detectors: checkpointing, copies, autocast, compilation, export and training go on working."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from tiny_hosts import (
    Host,
    assert_equal_outputs,
    config_of,
    gradients,
    images,
    labels,
    padded,
    run_backward,
    smca_model,
)


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


def test_autocast_to_bfloat16_changes_little(host: Host, device: torch.device) -> None:
    model, pixels = smca_model(host, device), images(device)
    expected = model(pixels)
    with torch.autocast(device.type, torch.bfloat16):
        actual = model(pixels, labels=labels(device))
    torch.testing.assert_close(actual.pred_boxes.float(), expected.pred_boxes, atol=0.05, rtol=0.0)
    actual.loss.backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if ".smca." in name)


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
