"""The configuration of a detector, and the sizes of images that DETR's models are trained and evaluated with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # short sides to choose from, in pixels
MAX_SIZE = 1333  # pixels of the longest side
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # of the files in a folder that are images
NO_CLASS = "N/A"  # the name of a label that means nothing, as some of COCO's 91


@dataclass(frozen=True)
class Config:
    """All that a detector is built from; every field is plain, so that it can be saved as JSON.

    Attributes:
        backbone: "resnet50", "resnet101", "tiny", or a model of timm, such as "timm/resnet18"; "custom" where a module
            was passed.
        dilation: dilated last stage (DC5), which then has stride 16; for ResNets.
        strides: pixels per cell of every scale, ascending. A ResNet has 4, 8, 16 and 32, "tiny" has 8, a model of
            timm its own; from the deepest it goes on by factors of 2.
        encoder: kinds of self-attention blocks, such as "6intra" or "2intra+1multi+2intra".
        share_self_attention, share_ffn: whether the scales have the encoder's weights in common.
        hidden_dim: channels, a multiple of 4 and of num_heads.
        num_heads: heads of every attention.
        ffn_dim: hidden channels of every FFN.
        decoder_layers: number of them.
        num_queries: most objects that can be found in an image.
        num_classes: labels 0…num_classes-1; 91 for COCO, whose ids have gaps.
        modulation: "per_head", "shared", or "none" for plain DETR.
        scale_type: "independent", "single" or "fixed".
        scale_selection: weigh the scales per query.
        geometry: "official" or "paper".
        beta: β of the prior.
        dropout: everywhere in the transformer.
    """

    backbone: str = "resnet50"
    dilation: bool = False
    strides: tuple[int, ...] = (32,)
    encoder: str = "6intra"
    share_self_attention: bool = True
    share_ffn: bool = True
    hidden_dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 2048
    decoder_layers: int = 6
    num_queries: int = 300
    num_classes: int = 91
    modulation: str = "per_head"
    scale_type: str = "independent"
    scale_selection: bool = True
    geometry: str = "official"
    beta: float = 8.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_kinds(self)
        counts = ("hidden_dim", "num_heads", "ffn_dim", "decoder_layers", "num_queries", "num_classes")
        for name in counts:
            _check_count(name, getattr(self, name))
        for stride in self.strides:
            _check_count("strides", stride)
        if not self.strides or any(low >= high for low, high in pairwise(self.strides)):
            raise ValueError(f"strides must be one or more, ascending, got {self.strides}")
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim must be a multiple of 4, got {self.hidden_dim}")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads={self.num_heads}, got {self.hidden_dim}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be in 0 … 1, got {self.dropout:g}")


def check_kinds(values: Any) -> None:
    """Check that every field of a frozen dataclass has a value of its type, and make its lists tuples.

    JSON has lists only. Whole numbers are floats as well, booleans no numbers.

    Args:
        values: its fields are plain, tuples of what is plain, or None where their types say so.

    Raises:
        ValueError: naming the field, its type and the value.
    """
    kinds = get_type_hints(type(values))
    for field in fields(values):
        value = getattr(values, field.name)
        if not _is_of(value, kinds[field.name]):
            raise ValueError(f"{field.name} must be a {field.type}, got {value!r}")
        if isinstance(value, list):
            object.__setattr__(values, field.name, tuple(value))


def _is_of(value: Any, kind: Any) -> bool:
    kinds = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(_is_of(each, kinds[0]) for each in value)
    if kinds:
        return any(_is_of(value, each) for each in kinds)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (float, int) if kind is float else kind)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
