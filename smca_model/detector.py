"""SMCA: backbone, encoder, decoder, and a class and a box for every object query."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from smca_kernels import SpatiallyModulatedCoAttention

from .backbone import CUSTOM, adapt_backbone, build_backbone
from .config import MAX_SIZE, SIZES, Config
from .decoder import Decoder
from .encoder import Encoder, encoder_kinds
from .position_encoding import sine_position_encoding

COCO_IMAGE_SIZE = (max(SIZES), MAX_SIZE)  # short side and most of the longest, as DETR is evaluated
PRIOR_PROBABILITY = 0.01  # of every class at the start (Lin et al., "Focal Loss for Dense Object Detection", 2017)


class _Tokens(NamedTuple):
    """The cells of all scales, one scale after the other."""

    tokens: Tensor  # [B, T, C]
    positions: Tensor  # [B, T, C]
    ignored: list[Tensor | None]  # for each scale [B, height · width], True = padding; None: no padding
    spatial_shapes: list[tuple[int, int]]
    valid_shapes: Tensor  # [B, S, 2]


class _ClassHead(nn.Linear):
    """Linear layer whose scores begin at `PRIOR_PROBABILITY`."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, -math.log(1 / PRIOR_PROBABILITY - 1))


class _LastOfBoxHead(nn.Linear):
    """Linear layer that is 0 at the start: every box begins as half the image around its query's reference point."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SMCA(nn.Module):
    """The detector of a configuration: images to boxes with class scores.

    Args:
        config: what to build; see `Config`.
        backend: of the co-attention, as `smca_attention`; an attribute that may be changed at any time.
        pretrained_backbone: fetch torchvision's or timm's weights for the backbone. False builds without any download.
        backbone: a module in place of the configuration's: one with `channels`, {stride: channels}, that turns images
            [B, 3, H, W] into {stride: map [B, channels, ⌈H / stride⌉, ⌈W / stride⌉]}, or a model of timm, as
            `timm.create_model(…, features_only=True)` gives it, whose batch norms are then frozen.

    Attributes:
        config, backend: as given; with a module as backbone, its name in the configuration is "custom".
        classes: name of each label, "N/A" where one means nothing; empty until weights are loaded.
        image_size: pixels of the short side that images should be resized to, and the most of the longest. Weights
            carry it; COCO's until then.

    Raises:
        TypeError: for a backbone that is neither.
        ValueError: for a configuration that can't be built, or weights that can't be fetched.
    """

    def __init__(
        self,
        config: Config,
        *,
        backend: str = "auto",
        pretrained_backbone: bool = False,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config if backbone is None else replace(config, backbone=CUSTOM)
        self.backend = backend
        self.classes: tuple[str, ...] = ()
        self.image_size = COCO_IMAGE_SIZE
        dim, strides = config.hidden_dim, config.strides
        if backbone is None:
            self.backbone = build_backbone(config.backbone, strides, config.dilation, pretrained_backbone)
        else:
            if config.dilation or pretrained_backbone:
                option = "dilation" if config.dilation else "pretrained_backbone"
                raise ValueError(f"{option} must be False with a module as backbone, got True")
            self.backbone = adapt_backbone(backbone, strides)
        self.input_proj = nn.ModuleList(build_projections(self.backbone.channels, strides, dim))
        self.scale_embed = nn.Embedding(len(strides), dim) if len(strides) > 1 else None
        self.encoder = Encoder(
            encoder_kinds(config.encoder),
            len(strides),
            dim,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            config.share_self_attention,
            config.share_ffn,
        )
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.decoder = Decoder(
            config.decoder_layers,
            dim,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            strides,
            geometry=config.geometry,
            modulation=config.modulation,
            scale_type=config.scale_type,
            scale_selection=config.scale_selection,
            beta=config.beta,
        )
        self.class_embed = _ClassHead(dim, config.num_classes)
        self.bbox_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), _LastOfBoxHead(dim, 4)
        )
        self._fill_matrices()

    @property
    def device(self) -> torch.device:
        """Where the model is: the device of its first parameter or, quantised layers having none, of its first buffer.

        The CPU where there is neither: packed weights of torch's own quantisation are no tensors.
        """
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def reset_parameters(self) -> None:
        """Begin anew: every parameter, those of a pretrained backbone too, as in a new model without one.

        Xavier matrices as DETR, priors wide, boxes at their centres, classes improbable. After `to_empty`, or a turn of
        every module's own `reset_parameters`, nothing is left as it was in memory.
        """
        # Children first: a network has the last word on its convolutions.
        for module in reversed(list(self.modules())):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None and module is not self:
                reset()
        self._fill_matrices()

    def _fill_matrices(self) -> None:
        """Set Xavier matrices as DETR does, all but the backbone's, and what that undoes in the priors."""
        for part in (self.input_proj, self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for projection in self.input_proj:
            nn.init.zeros_(projection.get_parameter("bias"))
        for module in self.decoder.modules():
            if isinstance(module, SpatiallyModulatedCoAttention):
                module.reset_parameters()

    def forward(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Detections in images of any sizes.

        Args:
            images: [3, height, width] each, RGB, normalised with ImageNet's mean and standard deviation; all of one
                floating dtype and device.

        Returns:
            pred_logits: [B, N, num_classes], before the sigmoid; there is no no-object class.
            pred_boxes: [B, N, 4], (cx, cy, w, h) in 0…1 of each image's own size, without padding.
            aux_outputs: the same two of every earlier decoder layer, first layer first.

        Raises:
            TypeError, ValueError: for anything but such images.
        """
        _check_images(images)
        image_sizes = [(image.shape[1], image.shape[2]) for image in images]
        return self.detect(self.backbone(pad_images(images)), image_sizes)

    def detect(self, maps: Mapping[int, Tensor], image_sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Turn the backbone's maps into detections, whatever stands in their padded cells.

        Args:
            maps: {stride: [B, channels, height, width]} as the backbone returns.
            image_sizes: (height, width) of each image in pixels, without padding; one alone is that of all images.

        Returns:
            As `forward`.
        """
        batch = next(iter(maps.values())).shape[0]
        tokens, positions, ignored, spatial_shapes, valid_shapes = self._tokens(maps, image_sizes)
        memory = self.encoder(tokens, positions, ignored, [height * width for height, width in spatial_shapes])
        padded = any(mask is not None for mask in ignored)
        queries, reference_logits = self.decoder(
            self.query_embed.weight.expand(batch, -1, -1),
            memory,
            positions,
            spatial_shapes,
            valid_shapes=valid_shapes if padded else None,
            image_sizes=torch.tensor(image_sizes, device=memory.device).expand(batch, -1),
            backend=self.backend,
        )
        logits = self.class_embed(queries).to(reference_logits.dtype)
        boxes = (self.bbox_embed(queries) + F.pad(reference_logits, (0, 2))).sigmoid()  # Eq. 12
        layers = [{"pred_logits": scores, "pred_boxes": box} for scores, box in zip(logits, boxes, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]}

    def _tokens(self, maps: Mapping[int, Tensor], image_sizes: Sequence[tuple[int, int]]) -> _Tokens:
        tokens, positions, ignored, spatial_shapes, valid_shapes = [], [], [], [], []
        strides = self.config.strides
        projected = project_maps(self.input_proj, strides, maps, image_sizes)
        for s, (stride, (features, padding)) in enumerate(zip(strides, projected, strict=True)):
            spatial_shape = (features.shape[2], features.shape[3])
            valid_shape = torch.tensor(valid_cells(image_sizes, stride), device=features.device)
            valid_shape = valid_shape.expand(features.shape[0], -1)
            encoding = sine_position_encoding(spatial_shape, valid_shape, self.config.hidden_dim).to(features.dtype)
            if self.scale_embed is not None:
                encoding = encoding + self.scale_embed.weight[s]
            tokens.append(features.flatten(2).transpose(1, 2))
            positions.append(encoding)
            ignored.append(None if padding is None else padding.flatten(1))
            spatial_shapes.append(spatial_shape)
            valid_shapes.append(valid_shape)
        return _Tokens(
            torch.cat(tokens, 1), torch.cat(positions, 1), ignored, spatial_shapes, torch.stack(valid_shapes, 1)
        )


@torch.no_grad()
def postprocess(
    outputs: Mapping[str, Any], sizes: Tensor | Sequence[tuple[int, int]], top: int = 100
) -> list[dict[str, Tensor]]:
    """The best-scored (query, class) pairs of every image, with boxes in pixels.

    Args:
        outputs: of the model: pred_logits [B, N, C] and pred_boxes [B, N, 4].
        sizes: [B, 2], (height, width) of each image in the pixels wanted, without padding.
        top: how many pairs, at most; all N · C if that is less.

    Returns:
        For each image scores [k] in descending order, labels [k], boxes [k, 4], (x1, y1, x2, y2), and queries [k], the
        index of the one that found each.

    Raises:
        ValueError: for another number of sizes than images.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    classes = logits.shape[2]
    sizes = torch.as_tensor(sizes, dtype=boxes.dtype, device=boxes.device)
    if sizes.shape != (logits.shape[0], 2):
        raise ValueError(f"sizes must be [B={logits.shape[0]}, 2], got {list(sizes.shape)}")
    boxes = box_convert(boxes, "cxcywh", "xyxy") * sizes.flip(-1).repeat(1, 2).unsqueeze(1)
    scores, pairs = logits.sigmoid().flatten(1).topk(min(top, logits.shape[1] * classes))
    return [
        {"scores": score, "labels": pair % classes, "boxes": box[pair // classes], "queries": pair // classes}
        for score, pair, box in zip(scores, pairs, boxes, strict=True)
    ]


def pad_images(images: Sequence[Tensor]) -> Tensor:
    """[B, 3, H, W], zeros below and to the right of each image."""
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


def valid_cells(image_sizes: Sequence[tuple[int, int]], stride: int) -> list[tuple[int, int]]:
    """(height, width) in cells of each image: a convolution with stride 2 and padding halves a size and rounds up."""
    # So written, a tracer proves that the backbone's maps have the same sizes.
    return [((height - 1) // stride + 1, (width - 1) // stride + 1) for height, width in image_sizes]


def build_projections(channels: Mapping[int, int], strides: Sequence[int], dim: int) -> list[nn.Module]:
    """The convolutions that bring a backbone's maps to `dim` channels, one a scale.

    1×1 for a stride of the backbone; beyond its deepest 3×3 with stride 2, from the map before.

    Args:
        channels: {stride: channels} of the backbone's maps.
        strides: those wanted, ascending.
        dim: channels wanted.

    Raises:
        ValueError: for strides that don't go on from the backbone's.
    """
    previous, inputs = max(channels), channels[max(channels)]
    projections: list[nn.Module] = []
    for stride in strides:
        if stride in channels:
            projections.append(nn.Conv2d(channels[stride], dim, 1))
        elif stride == 2 * previous:
            projections.append(nn.Conv2d(inputs, dim, 3, stride=2, padding=1))
            previous, inputs = stride, dim
        else:
            raise ValueError(
                f"strides must be those of the backbone, or go on from its deepest, {max(channels)}, by a factor of 2 "
                f"each, got {tuple(strides)}"
            )
    return projections


def project_maps(
    projections: Iterable[nn.Module],
    strides: Sequence[int],
    maps: Mapping[int, Tensor],
    image_sizes: Sequence[tuple[int, int]],
) -> list[tuple[Tensor, Tensor | None]]:
    """Project a backbone's maps to the scales, 0 in padded cells whatever stands there.

    Args:
        projections: of `build_projections`.
        strides: of the scales.
        maps: {stride: [B, channels, height, width]} as the backbone returns.
        image_sizes: (height, width) of each image in pixels, without padding.

    Returns:
        For each scale its map [B, dim, height, width], and which of its cells are padding [B, height, width]; None if
        none is.
    """
    # Zeroed before every convolution, so that what a backbone leaves in the padding goes no further.
    maps = {stride: _zeroed(features, stride, image_sizes)[0] for stride, features in maps.items()}
    coarsest = maps[max(maps)]
    projected = []
    for stride, projection in zip(strides, projections, strict=True):
        features, padding = _zeroed(projection(maps.get(stride, coarsest)), stride, image_sizes)
        if stride not in maps:
            coarsest = features
        projected.append((features, padding))
    return projected


def _check_images(images: Sequence[Tensor]) -> None:
    if not isinstance(images, Sequence):
        raise TypeError(f"images must be a list of tensors [3, height, width], got {type(images).__name__}")
    if not images:
        raise ValueError("images must hold at least one image, got none")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images[{i}] must be a floating tensor [3, height, width], got {kind}")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}] must be [3, height, width], got {list(image.shape)}")
        if (image.dtype, image.device) != (images[0].dtype, images[0].device):
            raise ValueError(
                f"images[{i}] must be {images[0].dtype} on {images[0].device} as images[0], "
                f"got {image.dtype} on {image.device}"
            )


def _zeroed(features: Tensor, stride: int, image_sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """Features [B, C, h, w] with 0 in padded cells, and those cells [B, h, w]; None if there are none."""
    height, width = features.shape[2:]
    valid = valid_cells(image_sizes, stride)
    if all(shape == (height, width) for shape in valid):
        return features, None
    heights, widths = torch.tensor(valid, device=features.device).expand(features.shape[0], -1).unbind(1)
    below = torch.arange(height, device=features.device) >= heights[:, None]
    beside = torch.arange(width, device=features.device) >= widths[:, None]
    padding = below[:, :, None] | beside[:, None, :]
    return features.masked_fill(padding.unsqueeze(1), 0), padding
