"""Pictures of what a detector found, and of the attention that found it (Figure 3 of the paper)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from smca_kernels.nn import SpatialPriorOutput

    from .detector import SMCA

SHORT_SIDE_OF_PICTURES = 640  # smaller images are enlarged, for the names to be legible
LONG_SIDE_OF_PICTURES = 4096  # and no further than to this


def draw_boxes(image: Tensor, found: dict[str, Tensor], classes: Sequence[str], *, enlarge: bool = True) -> Tensor:
    """An image with its detections as boxes with names and scores, uint8 [3, H, W].

    Args:
        image: uint8 [3, height, width].
        found: of `detect`; without scores, names are drawn alone.
        classes: name of each label.
        enlarge: make a small image larger, for the names to be legible.
    """
    import matplotlib
    from torchvision.transforms.v2 import functional as transforms
    from torchvision.utils import draw_bounding_boxes

    factor = round(SHORT_SIDE_OF_PICTURES / min(image.shape[1:])) if enlarge else 1
    factor = max(1, min(factor, LONG_SIDE_OF_PICTURES // max(image.shape[1:])))
    height, width = (factor * side for side in image.shape[1:])
    image = transforms.resize(image, [height, width])
    if not len(found["boxes"]):
        return image
    labels = found["labels"].tolist()
    # The darker half of tab20, so that white letters can be read on it.
    shades = [matplotlib.colormaps["tab20"](2 * i / 20)[:3] for i in range(10)]
    palette = [tuple(round(255 * part) for part in shade) for shade in shades]
    font, names = legible([classes[label] for label in labels], labels)
    if "scores" in found:
        names = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"].tolist(), strict=True)]
    drawn: Tensor = draw_bounding_boxes(
        image,
        found["boxes"] * factor,
        names,
        colors=[palette[label % len(palette)] for label in labels],
        width=max(2, min(height, width) // 200),
        font=font,
        font_size=max(12, min(height, width) // 30),
        label_colors="white",
        fill_labels=True,
    )
    return drawn


def legible(names: Sequence[str], labels: Sequence[int]) -> tuple[str, list[str]]:
    """A font file that has every character of some names, and the names; "class 7" for those that no font shows.

    A character that a font lacks would be drawn as an empty box.
    """
    font = _find_font(frozenset("".join(names)))
    shown = _characters(font)
    return font, [
        name if shown.issuperset(name) else f"class {label}" for name, label in zip(names, labels, strict=True)
    ]


@functools.cache
def _find_font(characters: frozenset[str]) -> str:
    """DejaVu Sans, or an installed font that has all of the characters where that has not."""
    from matplotlib.font_manager import findfont, fontManager

    usual = findfont("DejaVu Sans")
    # The font of last resort shows everything, as boxes.
    others = (entry.fname for entry in fontManager.ttflist if "last resort" not in entry.name.lower())
    return next((font for font in (usual, *others) if _characters(font).issuperset(characters)), usual)


@functools.cache
def _characters(font: str) -> frozenset[str]:
    """The characters that a font file can draw at any size; none of a file that can't be read."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(font)
        return frozenset(map(chr, face.get_charmap())) if face.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def write_picture(image: Tensor, path: Path) -> None:
    """Write or replace a PNG file by an image, uint8 [3, H, W]."""
    from torchvision.transforms.v2 import functional as transforms

    with replacing(path) as temporary:
        transforms.to_pil_image(image).save(temporary, format="PNG")


def attention_of(
    model: SMCA, image: Tensor, *, queries: Sequence[int], layer: int = -1
) -> tuple[list[Tensor], SpatialPriorOutput]:
    """The attention of chosen queries in one image, and the prior that they attend under.

    Args:
        model: in evaluation mode.
        image: normalised, [3, height, width], on the model's device.
        queries: indices of the n queries wanted.
        layer: of the decoder, counted from 0, or from the end where negative.

    Returns:
        For each scale [H, n, rows, columns], which sums to 1 over the grid; and the prior of all queries.

    Raises:
        ValueError: for a layer that the model doesn't have.
    """
    import torch

    with torch.no_grad(), keeping_attention(model, layer) as attention:
        model([image])
    return attention(queries)


@contextmanager
def keeping_attention(
    model: SMCA, layer: int = -1
) -> Iterator[Callable[[Sequence[int]], tuple[list[Tensor], SpatialPriorOutput]]]:
    """A function of queries that gives what `attention_of` gives, once the model has run on one image inside.

    It may be called as often and as late as wanted, and keeps what the layer took in. One model, one such context at
    a time.

    Raises:
        ValueError: for a layer that the model doesn't have.
    """
    layers: Any = model.decoder.layers
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer must be in -{len(layers)} … {len(layers) - 1}, got {layer}")
    seen: dict[str, Any] = {}

    def keep(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        seen["query"], seen["key"], _, seen["spatial_shapes"] = arguments
        seen["placement"] = {name: value for name, value in keywords.items() if name != "backend"}
        seen["prior"] = output[1]

    def attention(queries: Sequence[int]) -> tuple[list[Tensor], SpatialPriorOutput]:
        maps = layers[layer].co_attn.attention_map(
            seen["query"], seen["key"], seen["spatial_shapes"], queries=list(queries), **seen["placement"]
        )
        return [each[0] for each in maps], seen["prior"]

    hook = layers[layer].co_attn.register_forward_hook(keep, with_kwargs=True)
    try:
        yield attention
    finally:
        hook.remove()


def best_queries(model: SMCA, image: Tensor, count: int) -> list[int]:
    """The queries of an image (normalised, on the model's device) with the highest score of any class."""
    import torch

    with torch.no_grad():
        scores = model([image])["pred_logits"][0].amax(-1)
    best: list[int] = scores.topk(min(count, len(scores))).indices.tolist()
    return best


def draw_attention(
    model: SMCA,
    image: Tensor,
    path: Path,
    *,
    queries: Sequence[int],
    layer: int = -1,
) -> None:
    """A picture file of prior and co-attention of chosen queries in one image, per head and scale.

    Args:
        model, queries, layer: as `attention_of`.
        image: normalised, [3, height, width], on the model's device.
        path: PNG file to write or replace.
    """
    import matplotlib
    import torch
    from torchvision.ops import box_convert

    from smca_kernels.pictures import EXPLANATION, POINT_COLOR, QueryAttention, displayable, draw_heads

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    maps, prior = attention_of(model, image, queries=queries, layer=layer)
    with torch.no_grad():
        outputs = model([image])
    boxes = box_convert(outputs["pred_boxes"][0], "cxcywh", "xyxy").cpu() * torch.tensor([width, height] * 2)
    scores, labels = outputs["pred_logits"][0].sigmoid().cpu().max(-1)
    photograph, strides, heads = displayable(image), model.config.strides, len(maps[0])
    frame = (-0.5, width - 0.5, -0.5, height - 0.5)
    row = max(2.6, 1.9 * len(strides))
    figure = pyplot.figure(figsize=(3.4 + 2.1 * heads, row * len(queries) + 1.0), dpi=100, layout="constrained")
    figure.suptitle(f"SMCA co-attention of decoder layer {range(len(model.decoder.layers))[layer] + 1}", weight="bold")
    figure.supxlabel("\n" + EXPLANATION.replace(". ", ".\n"), fontsize=9, color="#333333")
    blocks = figure.subfigures(len(queries), 1, squeeze=False)[:, 0]
    for n, (block, query) in enumerate(zip(blocks, queries, strict=True)):
        grid = block.add_gridspec(len(strides), heads + 1, width_ratios=[1.5] + [1.0] * heads)
        left = block.add_subplot(grid[:, 0])
        left.imshow(photograph)
        x1, y1, x2, y2 = boxes[query].tolist()
        left.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=POINT_COLOR, linewidth=2))
        point = (prior.reference_logits[0, query].sigmoid().cpu() * torch.tensor([width, height])).tolist()
        left.plot(*point, "*", color=POINT_COLOR, markersize=14, markeredgecolor="black")
        left.set(xlim=frame[:2], ylim=frame[:1:-1], xticks=[], yticks=[])
        font, (name,) = legible([model.classes[labels[query]]], [int(labels[query])])
        title = f"query {query}: {name} {scores[query]:.2f}"
        left.set_title(title, font=FontProperties(fname=font, size=11), parse_math=False)
        attention = QueryAttention.of([scale[:, n] for scale in maps], prior, 0, query, strides)
        draw_heads(block, grid, photograph, attention, (point[0], point[1]), frame)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
