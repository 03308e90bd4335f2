"""SMCA in detectors with the attributes of facebookresearch/detr's, of which the small ones here have no more."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smca_kernels.nn import SpatiallyModulatedCoAttention
from smca_kernels.nn.hosts.detr import SmcaDetr, apply_smca_to_detr

DIM, HEADS, QUERIES = 32, 4, 5


class Nested(NamedTuple):
    tensors: Tensor
    mask: Tensor

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask


class Backbone(nn.Module):
    """Feature map of stride 32, and positions that are drawn once for every size."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 32, 32)

    def forward(self, samples: Any) -> tuple[list[Nested], list[Tensor]]:
        height, width = samples.tensors.shape[-2:]
        features = self.patches(F.pad(samples.tensors, (0, -width % 32, 0, -height % 32)))
        mask = F.interpolate(samples.mask[None].float(), size=features.shape[-2:]).bool()[0]
        generator = torch.Generator().manual_seed(0)
        positions = torch.randn(1, DIM, *features.shape[-2:], generator=generator).to(features)
        return [Nested(features, mask)], [positions.expand(len(features), -1, -1, -1)]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, source: Tensor, src_key_padding_mask: Tensor, pos: Tensor) -> Tensor:
        return self.linear(source + pos).masked_fill(src_key_padding_mask.T[..., None], 0.0)


class DecoderLayer(nn.Module):
    def __init__(self, normalize_before: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS)
        self.multihead_attn = nn.MultiheadAttention(DIM, HEADS, dropout=0.125)
        self.linear1, self.linear2 = nn.Linear(DIM, 48), nn.Linear(48, DIM)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(DIM) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(0.125) for _ in range(4))
        self.activation = F.relu
        self.normalize_before = normalize_before

    def forward(self, tgt: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query_pos: Tensor) -> Tensor:
        def attend_self(x: Tensor) -> Tensor:
            return self.dropout1(self.self_attn(x + query_pos, x + query_pos, x)[0])

        def attend(x: Tensor) -> Tensor:
            return self.dropout2(self.multihead_attn(x + query_pos, memory + pos, memory, key_padding_mask=padding)[0])

        def feed(x: Tensor) -> Tensor:
            return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        for norm, part in ((self.norm1, attend_self), (self.norm2, attend), (self.norm3, feed)):
            tgt = tgt + part(norm(tgt)) if self.normalize_before else norm(tgt + part(tgt))
        return tgt


class Decoder(nn.Module):
    def __init__(self, normalize_before: bool, return_intermediate: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(normalize_before) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.return_intermediate = return_intermediate

    def forward(self, tgt: Tensor, *others: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, *others)
            outputs.append(self.norm(tgt))
        return torch.stack(outputs if self.return_intermediate else outputs[-1:])


class Transformer(nn.Module):
    def __init__(self, normalize_before: bool, return_intermediate: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder(normalize_before, return_intermediate)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        src, pos = src.flatten(2).permute(2, 0, 1), pos_embed.flatten(2).permute(2, 0, 1)
        query_pos = query_embed[:, None].repeat(1, src.shape[1], 1)
        memory = self.encoder(src, src_key_padding_mask=mask.flatten(1), pos=pos)
        hs = self.decoder(torch.zeros_like(query_pos), memory, mask.flatten(1), pos, query_pos)
        return hs.transpose(1, 2), memory


class Detr(nn.Module):
    def __init__(self, normalize_before: bool = False, aux_loss: bool = True) -> None:
        super().__init__()
        self.backbone, self.input_proj = Backbone(), nn.Conv2d(8, DIM, 1)
        self.transformer = Transformer(normalize_before, aux_loss)
        self.query_embed, self.class_embed, self.bbox_embed = (
            nn.Embedding(QUERIES, DIM),
            nn.Linear(DIM, 4),
            nn.Linear(DIM, 4),
        )
        self.aux_loss = aux_loss

    def forward(self, samples: Any) -> dict[str, Any]:
        features, pos = self.backbone(samples)
        src, mask = features[-1].decompose()
        hs = self.transformer(self.input_proj(src), mask, self.query_embed.weight, pos[-1])[0]
        logits, boxes = self.class_embed(hs), self.bbox_embed(hs).sigmoid()
        outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            outputs["aux_outputs"] = [{"pred_logits": logits[i], "pred_boxes": boxes[i]} for i in range(2)]
        return outputs


@pytest.fixture
def samples(device: torch.device) -> Nested:
    """Two images, the second smaller and padded."""
    mask = torch.zeros(2, 100, 190, dtype=torch.bool)
    mask[1, 70:], mask[1, :, 150:] = True, True
    return Nested(torch.randn(2, 3, 100, 190, dtype=torch.float64).to(device), mask.to(device))


def host(device: torch.device, **options: Any) -> Detr:
    return Detr(**options).to(device, torch.float64).eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def total(outputs: dict[str, Any]) -> Tensor:
    every = [outputs, *outputs.get("aux_outputs", [])]
    return sum(((i + 1) * part[name]).sin().sum() for i, part in enumerate(every) for name in part if "pred" in name)


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("aux_loss", [False, True])
def test_without_modulation_outputs_and_gradients_are_the_hosts(
    normalize_before: bool, aux_loss: bool, samples: Nested, device: torch.device
) -> None:
    plain = host(device, normalize_before=normalize_before, aux_loss=aux_loss)
    changed = apply_smca_to_detr(copy.deepcopy(plain), modulation="none")
    expected, actual = plain(samples), changed(samples)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    total(expected).backward()
    total(actual).backward()
    torch.testing.assert_close(gradients(changed), gradients(plain), atol=1e-9, rtol=1e-9)


def test_parameters_are_shared_by_name_and_the_host_stays_as_it_is(samples: Nested, device: torch.device) -> None:
    plain = host(device)
    before = plain(samples)
    changed = apply_smca_to_detr(plain)
    parameters = dict(changed.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in plain.named_parameters())
    assert {name for name in parameters if ".prior." not in name} == set(dict(plain.named_parameters()))
    assert {p.dtype for p in parameters.values()} == {torch.float64}
    assert not changed.training
    assert all(part.training == plain.training for part in changed.modules())
    torch.testing.assert_close(plain(samples), before, atol=0.0, rtol=0.0)


def test_a_plain_checkpoint_loads_with_the_prior_alone_missing(device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    missing, unexpected = changed.load_state_dict(host(device).state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert [name for name in missing if ".multihead_attn.prior." not in name] == []


def test_every_parameter_of_the_prior_gets_a_gradient(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    total(changed(samples)).backward()
    priors = {name: p for name, p in changed.named_parameters() if ".prior." in name}
    assert priors
    assert [name for name, p in priors.items() if p.grad is None or not p.grad.any()] == []


def test_boxes_and_centers_lie_around_one_reference_point(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    seen: list[Any] = []
    queries: list[Tensor] = []
    for layer in changed.transformer.decoder.layers:
        nn.init.zeros_(layer.multihead_attn.prior.offset.weight)
        nn.init.zeros_(layer.multihead_attn.prior.offset.bias)
        layer.multihead_attn.prior.register_forward_hook(lambda module, args, output: seen.append(output))
    changed.bbox_embed.register_forward_hook(lambda module, args, output: queries.append(args[0]))
    outputs = changed(samples)
    reference = seen[0].reference_logits
    sizes = torch.tensor([[190.0, 100.0], [150.0, 70.0]], device=device, dtype=torch.float64).view(2, 1, 1, 1, 2)
    for prior in seen:
        expected = reference.sigmoid()[:, None, :, None] * sizes / 32
        torch.testing.assert_close(prior.center, expected.expand_as(prior.center))
    boxes = (
        F.linear(queries[0][-1], changed.bbox_embed.weight, changed.bbox_embed.bias) + F.pad(reference, (0, 2))
    ).sigmoid()
    torch.testing.assert_close(outputs["pred_boxes"], boxes)


def test_priors_are_predicted_from_before_the_self_attention(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    before: list[Tensor] = []
    features: list[Tensor] = []
    for layer in changed.transformer.decoder.layers:
        layer.register_forward_pre_hook(lambda module, args: before.append(args[0] + args[1]))
        layer.multihead_attn.prior.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    changed(samples)
    for expected, actual in zip(before, features, strict=True):
        torch.testing.assert_close(actual, expected.transpose(0, 1))


def test_dropout_is_the_hosts(device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    assert [layer.multihead_attn.dropout for layer in changed.transformer.decoder.layers] == [0.125] * 3


def test_images_of_several_sizes_are_padded(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    masked = Nested(samples.tensors * ~samples.mask[:, None], samples.mask)
    listed = changed([samples.tensors[0], samples.tensors[1, :, :70, :150]])
    torch.testing.assert_close(listed, changed(masked), atol=1e-12, rtol=0.0)
    whole = Nested(samples.tensors, torch.zeros_like(samples.mask))
    torch.testing.assert_close(changed(samples.tensors), changed(whole), atol=1e-12, rtol=0.0)


def test_a_detector_is_copied_after_a_backward_pass(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device))
    total(changed(samples)).backward()
    torch.testing.assert_close(copy.deepcopy(changed)(samples), changed(samples), atol=0.0, rtol=0.0)


def test_training_lowers_a_loss(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device)).train()
    assert isinstance(changed, SmcaDetr)
    optimizer = torch.optim.AdamW(changed.parameters(), lr=3e-3)
    target, losses = torch.rand(2, QUERIES, 4, dtype=torch.float64, device=device), []
    for _ in range(20):
        loss = (changed(samples)["pred_boxes"] - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_backbone_of_another_stride_is_refused(samples: Nested, device: torch.device) -> None:
    changed = apply_smca_to_detr(host(device), strides=(16,))
    with pytest.raises(ValueError, match=r"strides .* \(16,\) where images of 100 × 190 pixels have 4 × 6 cells"):
        changed(samples)


def test_samples_of_another_kind_are_refused(device: torch.device) -> None:
    with pytest.raises(TypeError, match="samples must be a NestedTensor, images or a list of them, got dict"):
        apply_smca_to_detr(host(device))({})


def test_other_models_are_refused_by_what_they_lack(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"model must have .* got a Linear without backbone, input_proj, transformer"):
        apply_smca_to_detr(nn.Linear(2, 2))
    model = host(device)
    del model.transformer.decoder.layers[1].norm3
    with pytest.raises(TypeError, match=r"model.transformer.decoder.layers\[1\] must have .* without norm3$"):
        apply_smca_to_detr(model)
    model = host(device)
    model.transformer.decoder.layers[2].multihead_attn = SpatiallyModulatedCoAttention(DIM, HEADS)
    with pytest.raises(TypeError, match=r"layers\[2\].multihead_attn must be an nn.MultiheadAttention"):
        apply_smca_to_detr(model)


def test_deformable_attention_is_refused_with_the_reason(device: torch.device) -> None:
    class MSDeformAttn(nn.Linear):
        pass

    model = host(device)
    layer = model.transformer.decoder.layers[0]
    del layer.multihead_attn
    layer.cross_attn = MSDeformAttn(2, 2)
    with pytest.raises(TypeError, match="without multihead_attn: deformable attention has no softmax over all cells"):
        apply_smca_to_detr(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strides": (16, 32)}, ValueError, r"one stride .* \(16, 32\)"),
        ({"scale_selection": False}, TypeError, "'scale_selection'"),
        ({"modulation": "some"}, ValueError, "modulation .* 'some'"),
    ],
)
def test_options_that_do_not_exist_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        apply_smca_to_detr(host(device), **options)
