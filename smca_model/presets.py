"""Every DETR and SMCA model of the paper's tables by name, and `smca presets`, which counts them out."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from smca_kernels.tools.arguments import check_packages

from .config import Config

if TYPE_CHECKING:
    from .detector import SMCA


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

# What Tables 1, 3 and 4 of the paper print: parameters in millions, multiply-adds in 10⁹.
PAPER: dict[str, tuple[float, float | None]] = {
    "detr-r50": (41, 86),
    "detr-dc5-r50": (41, 187),
    "smca-r50": (41.0, 86),
    "smca-ms-r50": (39.5, 152),
    "smca-ms-nossa-r50": (39.5, None),
    "smca-3intra-r50": (37.9, None),
    "smca-3multi-r50": (37.9, None),
    "smca-5intra-r50": (39.5, None),
    "smca-ms-sharedffn-r50": (42.2, None),
    "smca-ms-sharedsa-r50": (44.7, None),
    "smca-ms-noshare-r50": (47.3, None),
    "detr-r101": (60, 152),
    "detr-dc5-r101": (60, 253),
    "smca-ms-r101": (58, 218),
}
IMAGE_SIZE = (800, 1120)  # (height, width); at this size DETR's models come out as DETR's paper has them
TINY_IMAGE_SIZE = (96, 96)


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
        pretrained_backbone: fetch torchvision's ImageNet weights for the backbone, or timm's; nothing is downloaded
            otherwise.
        overrides: other fields of `Config`.

    Raises:
        ValueError: for an unknown preset or override, a configuration that can't be built, or weights that can't be
            fetched.
    """
    from .detector import SMCA

    config = configure(preset, num_classes, **overrides)
    return SMCA(config, backend=backend, pretrained_backbone=pretrained_backbone)


def configure(preset: str, num_classes: int = 91, **overrides: Any) -> Config:
    """The configuration of a preset with overrides; arguments and errors as `build`, which builds it."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {field.name for field in fields(Config)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"overrides must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return replace(PRESETS[preset], num_classes=num_classes, **overrides)


def nearest_preset(config: Config) -> tuple[str, dict[str, Any]]:
    """The preset that a configuration differs least from, and the fields in which it does, but for `num_classes`."""

    def changes(name: str) -> dict[str, Any]:
        preset = asdict(PRESETS[name])
        return {
            field: value for field, value in asdict(config).items() if field != "num_classes" and value != preset[field]
        }

    name = min(PRESETS, key=lambda name: len(changes(name)))
    return name, changes(name)


def count(config: Config, image_size: tuple[int, int]) -> tuple[int, int]:
    """Trainable parameters, and multiply-adds for one image of (height, width).

    Multiply-adds are those of convolutions, linear layers and attention products, the co-attention's two among them;
    the spatial prior and other elementwise work are not counted. Nothing is computed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .detector import SMCA

    with torch.device("meta"):
        # The reference multiplies exactly the matrices of the equations.
        model = SMCA(config, backend="reference").eval()
        image = torch.empty(3, *image_size)
    with FlopCounterMode(display=False) as counter:
        model([image])
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return parameters, counter.get_total_flops() // 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets to count; default: all")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help=f"image size; default: {'×'.join(map(str, IMAGE_SIZE))}, {'×'.join(map(str, TINY_IMAGE_SIZE))} for tiny",
    )


def run(args: argparse.Namespace) -> int:
    """`smca presets`: exit status 0.

    Raises:
        ValueError: when it can't start.
    """
    check_packages(("torchvision",), "model")
    unknown = [name for name in args.names if name not in PRESETS]
    if unknown:
        raise ValueError(f"NAME must be among {', '.join(PRESETS)}, got {', '.join(unknown)}")
    if args.size and min(args.size) < 1:
        raise ValueError(f"--size must be two numbers of pixels, got {args.size}")
    print("                       millions of parameters     GFLOPs (multiply-adds)")
    print("preset                    here   paper                here    paper    image")
    for name in args.names or PRESETS:
        config = PRESETS[name]
        height, width = args.size or (TINY_IMAGE_SIZE if config.backbone == "tiny" else IMAGE_SIZE)
        parameters, operations = count(config, (height, width))
        millions = parameters / 1e6
        paper, paper_gflops = PAPER.get(name, (None, None))
        off = "" if paper is None else f"{millions / paper - 1:+.1%}"
        line = (
            f"{name:22} {millions:7.2f} {_shown(paper):>7} {off:>7} {operations / 1e9:12.2f} {_shown(paper_gflops):>8}"
        )
        print(f"{line}    {height}×{width}", flush=True)
    return 0


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
