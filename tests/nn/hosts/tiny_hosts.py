"""Hugging Face's detectors, so small that tests run all of them, and images and labels for them; weights are random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, DetrConfig, DetrForObjectDetection

from smca_kernels.nn.hosts import transformers as hosts
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
