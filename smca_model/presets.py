"""Every DETR and SMCA model of the paper's tables by name, and `smca presets`, which counts them out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detector import SMCA


@dataclass(frozen=True)
class Config:
    """What a detector is built from; every field is plain, so that it can be saved as JSON.

    Attributes:
        backbone: "resnet50", "resnet101" or "tiny".
        dilation: dilated last stage (DC5), which then has stride 16; for ResNets.
        strides: pixels per cell of every scale, ascending. A ResNet has 4, 8, 16 and 32, "tiny" has 8; from the
            deepest it goes on by factors of 2.
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
        object.__setattr__(self, "strides", tuple(self.strides))  # JSON has lists only
        counts = ("hidden_dim", "num_heads", "ffn_dim", "decoder_layers", "num_queries", "num_classes")
        for name in counts:
            _check_count(name, getattr(self, name))
        for stride in self.strides:
            _check_count("strides", stride)
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim must be a multiple of 4, got {self.hidden_dim}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be whole and at least 1, got {value!r}")


_SINGLE = Config()
_MULTI = Config(strides=(16, 32, 64), encoder="2intra+1multi+2intra", ffn_dim=1024)
_TINY = Config(
    backbone="tiny",
    strides=(8,),
    encoder="1intra",
    hidden_dim=128,
    num_heads=4,
    ffn_dim=256,
    decoder_layers=3,
    num_queries=25,
    dropout=0.0,
)

PRESETS: dict[str, Config] = {
    "detr-r50": replace(_SINGLE, modulation="none"),
    "detr-dc5-r50": replace(_SINGLE, modulation="none", dilation=True, strides=(16,)),
    "smca-shared-r50": replace(_SINGLE, modulation="shared"),
    "smca-fixed-r50": replace(_SINGLE, scale_type="fixed"),
    "smca-single-r50": replace(_SINGLE, scale_type="single"),
    "smca-r50": _SINGLE,
    "smca-dc5-r50": replace(_SINGLE, dilation=True, strides=(16,)),
    "smca-ms-r50": _MULTI,
    "smca-ms-nossa-r50": replace(_MULTI, scale_selection=False),
    "smca-3intra-r50": replace(_MULTI, encoder="3intra"),
    "smca-3multi-r50": replace(_MULTI, encoder="3multi"),
    "smca-5intra-r50": replace(_MULTI, encoder="5intra"),
    "smca-ms-sharedffn-r50": replace(_MULTI, share_self_attention=False),
    "smca-ms-sharedsa-r50": replace(_MULTI, share_ffn=False),
    "smca-ms-noshare-r50": replace(_MULTI, share_self_attention=False, share_ffn=False),
    "detr-r101": replace(_SINGLE, backbone="resnet101", modulation="none"),
    "detr-dc5-r101": replace(_SINGLE, backbone="resnet101", modulation="none", dilation=True, strides=(16,)),
    "smca-r101": replace(_SINGLE, backbone="resnet101"),
    "smca-dc5-r101": replace(_SINGLE, backbone="resnet101", dilation=True, strides=(16,)),
    "smca-ms-r101": replace(_MULTI, backbone="resnet101"),
    "smca-tiny": _TINY,
    "detr-tiny": replace(_TINY, modulation="none"),
    "smca-ms-tiny": replace(_TINY, strides=(8, 16, 32), encoder="1intra+1multi"),
}


def build(
    preset: str,
    num_classes: int = 91,
    *,
    backend: str = "auto",
    pretrained_backbone: bool = False,
    **overrides: Any,
) -> SMCA:
    """The detector of a preset, randomly initialised.

    Args:
        preset: a name in `PRESETS`.
        num_classes: labels 0…num_classes-1.
        backend: of the co-attention, as `smca_attention`; not part of the saved configuration.
        pretrained_backbone: fetch torchvision's ImageNet weights for the backbone; nothing is downloaded otherwise.
        overrides: other fields of `Config`.

    Raises:
        ValueError: for an unknown preset or override, a configuration that can't be built, or weights that can't be
            fetched.
    """
    from .detector import SMCA

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {field.name for field in fields(Config)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"overrides must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    config = replace(PRESETS[preset], num_classes=num_classes, **overrides)
    return SMCA(config, backend=backend, pretrained_backbone=pretrained_backbone)
