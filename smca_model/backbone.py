"""Feature maps of images: torchvision's ResNets as DETR uses them, a small network to train from scratch, timm's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from smca_kernels.pictures import MEAN, STD
from smca_kernels.tools.arguments import check_packages, first_line

BACKBONES = ("resnet50", "resnet101", "tiny")
TIMM = "timm/"  # begins the name of a model of timm
CUSTOM = "custom"  # the name of a module that was passed
# What lets timm's transformers take images of any size: nothing, or an option that some of them have.
_TIMM_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


class Backbone(nn.Module):
    """A module that turns images [B, 3, H, W] into {stride: map [B, channels, ⌈H / stride⌉, ⌈W / stride⌉]}.

    Attributes:
        channels: {stride: channels} of these maps.
    """

    channels: dict[int, int]


class _FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    def reset_parameters(self) -> None:
        _reset_norms(self)


class ResNet(Backbone):
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


class TinyNet(Backbone):
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


class TimmBackbone(Backbone):
    """A model of timm, by its name or as `timm.create_model(…, features_only=True)` gives it, with frozen batch norm.

    Maps with channels last are transposed. A model that rounds sizes down, or wants multiples of its stride, gets its
    images padded with zeros, and its maps are cut to whole cells of the image; one that was trained with another mean
    and deviation than ImageNet's gets images normalised by its own. All but the norms is trained. Without pretrained
    weights the norms' factors are 1: a frozen one at 0, as some models begin, would shut its branch for good.

    Args:
        model: name in timm, with or without a tag, or the module, which is changed.
        strides: strides wanted, pixels per cell; those above the deepest one's make that one of the outputs.
        pretrained: fetch the weights that timm has for a name.

    Attributes:
        channels: {stride: channels} of the maps that `forward` returns.

    Raises:
        ValueError: for a name that timm doesn't know, a model without such maps or with other batch norms than those
            over images, strides that it doesn't have, weights that can't be fetched, and where timm is missing.

    Source: https://huggingface.co/docs/timm/feature_extraction.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, model: str | nn.Module, strides: Sequence[int], pretrained: bool = False) -> None:
        super().__init__()
        check_packages(("timm",), "timm")
        self.name = model if isinstance(model, str) else ""
        self.wanted = tuple(strides)
        shown = f"{TIMM}{model}" if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            body = _create_timm(model, pretrained, **_timm_options(model, strides))
        else:
            body = cast("Any", model)
        self.channels = dict(zip(body.feature_info.reduction(), body.feature_info.channels(), strict=True))
        self.outputs = {stride: i for i, stride in enumerate(body.feature_info.reduction())}  # the last one of each
        kept = _timm_outputs(strides, self.channels, shown)
        self.channels = {stride: self.channels[stride] for stride in kept}
        self.outputs = {stride: self.outputs[stride] for stride in kept}
        self.body = _with_frozen_norms(body, shown, ones=isinstance(model, str) and not pretrained)
        self.channels_last, self.padded = _layout(self.body, self.channels, self.outputs, shown)
        about = getattr(body, "default_cfg", None) or getattr(body, "pretrained_cfg", {})
        mean, std = (tuple(about.get(name) or ours) for name, ours in (("mean", MEAN), ("std", STD)))
        same = torch.allclose(torch.tensor((mean, std), device="cpu"), torch.tensor((MEAN, STD), device="cpu"))
        theirs = zip(mean, std, MEAN, STD, strict=True)
        factors = [(our_std / std, (our_mean - mean) / std) for mean, std, our_mean, our_std in theirs]
        for name, values in zip(("scale", "shift"), zip(*factors, strict=True), strict=True):
            self.register_buffer(name, None if same else torch.tensor(values).view(3, 1, 1))

    def reset_parameters(self) -> None:
        """Begin as timm's models do, without pretrained weights; of a module that was passed, its norms do."""
        if not self.name:
            _reset_norms(self.body)
            return
        fresh = TimmBackbone(self.name, self.wanted)
        tensors = itertools.chain(self.parameters(), self.buffers())
        with torch.no_grad():
            for mine, new in zip(tensors, itertools.chain(fresh.parameters(), fresh.buffers()), strict=True):
                mine.copy_(new)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """{stride: map [B, channels, ⌈H / stride⌉, ⌈W / stride⌉]} of images [B, 3, H, W]."""
        height, width = images.shape[2:]
        if self.padded:
            deepest = max(self.channels)
            # So written, a tracer can follow the sizes.
            rows, columns = ((side - 1) // deepest + 1 for side in (height, width))
            images = F.pad(images, (0, columns * deepest - width, 0, rows * deepest - height))
        if self.scale is not None and self.shift is not None:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        features = self.body(images)
        maps = {stride: features[i] for stride, i in self.outputs.items()}
        if self.channels_last:
            maps = {stride: each.permute(0, 3, 1, 2) for stride, each in maps.items()}
        if self.padded:
            maps = {s: each[:, :, : (height - 1) // s + 1, : (width - 1) // s + 1] for s, each in maps.items()}
        return maps


def build_backbone(name: str, strides: Sequence[int], dilation: bool = False, pretrained: bool = False) -> Backbone:
    """The backbone of that name; see `ResNet`, `TinyNet`, and, for names such as "timm/resnet18", `TimmBackbone`.

    Raises:
        ValueError: for another name, an option that the backbone does not have, or weights that can't be fetched.
    """
    if name == CUSTOM:
        raise ValueError(
            f"backbone {CUSTOM!r} is a module that was passed to SMCA, and must be passed again: backbone=…"
        )
    if name not in BACKBONES and not name.startswith(TIMM):
        known = ", ".join(map(repr, BACKBONES))
        raise ValueError(f"backbone must be one of {known}, or {TIMM}NAME with a model of timm, got {name!r}")
    if name.startswith("resnet"):
        return ResNet(name, strides, dilation, pretrained)
    if dilation or (pretrained and name == "tiny"):
        option = "dilation" if dilation else "pretrained_backbone"
        raise ValueError(f"{option} must be False with backbone={name!r}, got True")
    return TinyNet() if name == "tiny" else TimmBackbone(name.removeprefix(TIMM), strides, pretrained)


def adapt_backbone(module: nn.Module, strides: Sequence[int]) -> Backbone:
    """A module as a backbone: itself where it has `channels` as ours do, a `TimmBackbone` where it has timm's maps.

    Raises:
        TypeError: for any other module.
        ValueError: as `TimmBackbone`.
    """
    channels = getattr(module, "channels", None)
    if isinstance(channels, Mapping) and channels and all(isinstance(stride, int) for stride in channels):
        return cast("Backbone", module)
    if isinstance(module, nn.Module) and hasattr(module, "feature_info"):
        return TimmBackbone(module, strides)
    raise TypeError(
        "backbone must be a module with channels, {stride: channels}, that returns {stride: map}, or a model of timm "
        f"with features_only=True, got {type(module).__name__}"
    )


@torch.no_grad()
def set_norm_statistics(backbone: nn.Module, images: Tensor) -> None:
    """Give a backbone's frozen batch norms, if it has any, the statistics of images [B, 3, height, width].

    Without them features of random weights would die out or explode.
    """

    def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], (0, 2, 3))

    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in _frozen_norms(backbone)]
    backbone(images)
    for hook in hooks:
        hook.remove()


def _outputs(wanted: Sequence[int], available: Sequence[int]) -> list[int]:
    """The strides of the maps to return: those wanted, and the deepest where a deeper one is wanted."""
    deepest = max(available)
    return sorted({min(stride, deepest) for stride in wanted if stride in available or stride > deepest})


def _create_timm(name: str, pretrained: bool, **options: Any) -> Any:
    import timm

    try:
        model = timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except TypeError:
        raise  # an option that the model doesn't have
    except Exception as error:  # of whatever kind timm, the hub and the network have
        reason = first_line(error)
        if pretrained:
            raise ValueError(
                f"pretrained_backbone=True needs timm's weights of {name}, and they can't be had ({reason}); pass "
                "pretrained_backbone=False"
            ) from error
        raise ValueError(
            f"backbone must be a model of timm with feature maps, `timm.list_models()`, got {TIMM}{name} ({reason})"
        ) from error
    return model


def _timm_options(name: str, strides: Sequence[int]) -> dict[str, Any]:
    """The options with which a model of timm computes the maps wanted, no others, of images of any size."""
    shown, reason = f"{TIMM}{name}", None
    with torch.device("meta"):
        reductions = _create_timm(name, False).feature_info.reduction()
        last = {stride: i for i, stride in enumerate(reductions)}
        chosen = {"out_indices": tuple(last[stride] for stride in _timm_outputs(strides, last, shown))}
        for option in _TIMM_OPTIONS:
            try:
                body = _create_timm(name, False, **chosen, **option)
            except TypeError:
                continue
            channels = dict(zip(body.feature_info.reduction(), body.feature_info.channels(), strict=True))
            try:
                _layout(body, channels, {stride: i for i, stride in enumerate(channels)}, shown)
            except ValueError as error:
                reason = reason or error
            else:
                return {**chosen, **option}
    raise reason or ValueError(f"backbone must be a model of timm with feature maps, got {shown}")


def _timm_outputs(wanted: Sequence[int], available: Mapping[int, int], shown: str) -> list[int]:
    deepest = max(available)
    if any(stride not in available and (stride < deepest or stride % deepest) for stride in wanted):
        raise ValueError(
            f"strides must be among those of {shown}, {', '.join(map(str, available))}, or go on from {deepest} by a "
            f"factor of 2 each, got {tuple(wanted)}"
        )
    return _outputs(wanted, list(available))


def _layout(body: nn.Module, channels: Mapping[int, int], outputs: Mapping[int, int], shown: str) -> tuple[bool, bool]:
    """Whether a model's maps have their channels last, and whether its images must be multiples of its stride.

    Nothing is computed. Parameters that no map depends on are not trained, since they would have no gradient.
    """
    deepest, reason = max(channels), ""
    # With these sizes every halving meets an odd number: what rounds down anywhere is seen.
    for padded, size in ((False, (2 * deepest + 1, 4 * deepest + 1)), (True, (3 * deepest, 5 * deepest))):
        try:
            maps, unused = _run_without_storage(body, outputs, size)
        except Exception as error:  # of whatever kind the model has for a size that it doesn't take
            reason = first_line(error)
            continue
        cells = {stride: tuple((side - 1) // stride + 1 for side in size) for stride in channels}
        found = {stride: tuple(each.shape[1:]) for stride, each in maps.items()}
        first = found == {stride: (channels[stride], *cells[stride]) for stride in channels}
        if first or found == {stride: (*cells[stride], channels[stride]) for stride in channels}:
            for name in unused:
                body.get_parameter(name).requires_grad_(False)
            return not first, padded
        reason = f"images of {size[0]}×{size[1]} pixels give maps of {found}"
    raise ValueError(
        f"backbone must give maps of images of any size, of one cell a stride begun, got {shown} ({reason})"
    )


def _run_without_storage(
    body: nn.Module, outputs: Mapping[int, int], size: tuple[int, int]
) -> tuple[dict[int, Tensor], list[str]]:
    """A model's maps by stride, without storage, and the names of its trained parameters that they don't depend on."""
    named = itertools.chain(body.named_parameters(), body.named_buffers())
    training = body.training
    with torch.inference_mode(False), torch.enable_grad():
        tensors = {
            name: torch.empty_like(each, device="meta", requires_grad=each.requires_grad) for name, each in named
        }
        body.eval()  # batch norms in training would refuse single cells
        try:
            features = torch.func.functional_call(body, tensors, torch.empty(1, 3, *size, device="meta"))
        finally:
            body.train(training)
        maps = {stride: features[i] for stride, i in outputs.items()}
        trained = {name: each for name, each in tensors.items() if each.requires_grad}
        total = torch.stack([each.float().sum() for each in maps.values()]).sum()
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True) if trained else ()
    return maps, [name for name, each in zip(trained, found, strict=True) if each is None]


def _with_frozen_norms(body: nn.Module, shown: str, ones: bool) -> nn.Module:
    """The model with its batch norms frozen, in place; `ones` sets their factors to 1."""
    from timm.layers.norm_act import freeze_batch_norm_2d

    body = freeze_batch_norm_2d(body)
    others = [name for name, each in body.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    if others:
        raise ValueError(
            f"backbone must have batch norms that can be frozen, over images, got {shown} with {others[0]}"
        )
    if ones:
        for norm in _frozen_norms(body):
            nn.init.ones_(norm.get_buffer("weight"))
    return body


def _frozen_norms(body: nn.Module) -> list[nn.Module]:
    """Frozen batch norms, torchvision's and timm's, which have buffers of the same names."""
    names = {"weight", "bias", "running_mean", "running_var"}
    return [each for each in body.modules() if names == {name for name, _ in each.named_buffers(recurse=False)}]


def _reset_norms(body: nn.Module) -> None:
    for norm in _frozen_norms(body):
        for name, buffer in norm.named_buffers(recurse=False):
            nn.init.constant_(buffer, 1.0 if name in ("weight", "running_var") else 0.0)


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
