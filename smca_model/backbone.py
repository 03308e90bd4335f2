"""Feature maps of images: torchvision's ResNets as DETR uses them, and a small network to train from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

BACKBONES = ("resnet50", "resnet101", "tiny")


class _FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    def reset_parameters(self) -> None:
        for name, buffer in self.named_buffers():
            buffer.fill_(1.0 if name in ("weight", "running_var") else 0.0)


class ResNet(nn.Module):
    """A torchvision ResNet with frozen batch norm; stem and first stage are not trained, as in DETR.

    Args:
        name: "resnet50" or "resnet101".
        strides: strides wanted, pixels per cell; those above the deepest stage's make that stage one of the outputs.
        dilation: dilate the last stage instead of striding it (DC5), so that it has stride 16.
        pretrained: fetch torchvision's ImageNet weights (IMAGENET1K_V1).

    Attributes:
        channels: {stride: channels} of the maps that `forward` returns.

    Raises:
        ValueError: for weights that can't be fetched.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, name: str, strides: Sequence[int], dilation: bool = False, pretrained: bool = False) -> None:
        super().__init__()
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1 if pretrained else None
        try:
            body = torchvision.models.get_model(
                name,
                weights=weights,
                norm_layer=_FrozenBatchNorm,
                replace_stride_with_dilation=(False, False, dilation),
            )
        except (OSError, RuntimeError) as error:
            if weights is None:
                raise
            raise ValueError(
                f"pretrained_backbone=True needs torchvision's ImageNet weights, and {weights.url} can't be had "
                f"({error}); put the file into {torch.hub.get_dir()}/checkpoints, or pass pretrained_backbone=False"
            ) from error
        del body.avgpool, body.fc
        stages = {4: "layer1", 8: "layer2", 16: "layer4" if dilation else "layer3"}
        if not dilation:
            stages[32] = "layer4"
        self.stages = {stride: stages[stride] for stride in _outputs(strides, list(stages))}
        # A stage that nothing is computed from would have no gradient.
        for stage in ("layer4", "layer3", "layer2"):
            if stage in self.stages.values():
                break
            delattr(body, stage)
        self.channels = {stride: 256 * 2 ** (int(stage[-1]) - 1) for stride, stage in self.stages.items()}
        self.body = body
        for part in (body.conv1, body.layer1):
            part.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Begin as torchvision's networks do, without pretrained weights."""
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _FrozenBatchNorm):
                module.reset_parameters()

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """{stride: map [B, channels, ⌈H / stride⌉, ⌈W / stride⌉]} of images [B, 3, H, W]."""
        body = self.body
        features = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        maps = {}
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            if hasattr(body, stage):
                maps[stage] = features = getattr(body, stage)(features)
        return {stride: maps[stage] for stride, stage in self.stages.items()}


class TinyNet(nn.Module):
    """Five 3×3 convolutions and two residual blocks to a map at stride 8, for small images.

    Norms are those of each cell, over its channels: what is computed for an image depends on no other image of the
    batch and not on the amount of padding.

    Attributes:
        channels: {8: 128}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels = {8: 128}
        self.body = nn.Sequential(
            *_convolution(3, 32, 2),
            *_convolution(32, 64, 2),
            _ResidualBlock(64),
            *_convolution(64, 128, 2),
            _ResidualBlock(128),
        )

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """{8: map [B, 128, ⌈H / 8⌉, ⌈W / 8⌉]} of images [B, 3, H, W]."""
        return {8: self.body(images)}


def build_backbone(
    name: str, strides: Sequence[int], dilation: bool = False, pretrained: bool = False
) -> ResNet | TinyNet:
    """The backbone of that name; see `ResNet` and `TinyNet`, which has neither dilation nor pretrained weights.

    Raises:
        ValueError: for another name, an option that "tiny" does not have, or weights that can't be fetched.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(map(repr, BACKBONES))}, got {name!r}")
    if name != "tiny":
        return ResNet(name, strides, dilation, pretrained)
    if dilation or pretrained:
        option = "dilation" if dilation else "pretrained_backbone"
        raise ValueError(f"{option} must be False with backbone='tiny', got True")
    return TinyNet()


@torch.no_grad()
def set_norm_statistics(backbone: nn.Module, images: Tensor) -> None:
    """Give a backbone's frozen batch norms, if it has any, the statistics of images [B, 3, height, width].

    Without them features of random weights would die out or explode.
    """

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], (0, 2, 3))

    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    backbone(images)
    for hook in hooks:
        hook.remove()


def _outputs(wanted: Sequence[int], available: Sequence[int]) -> list[int]:
    """The strides of the maps to return: those wanted, and the deepest where a deeper one is wanted."""
    deepest = max(available)
    return sorted({min(stride, deepest) for stride in wanted if stride in available or stride > deepest})


def _convolution(channels: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
    return [convolution, _CellNorm(outputs), nn.ReLU(inplace=True)]


class _CellNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of a map [B, C, H, W]."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, channels, 1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _CellNorm(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features + self.body(features))
