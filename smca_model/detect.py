"""`smca detect`: boxes in images as JSON and as pictures, and the attention that found them (Figure 3 of the paper)."""

from __future__ import annotations

import argparse
import errno
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing, write_text
from smca_kernels.tools.arguments import check_packages

from .evaluate import add_model_arguments, check_model_arguments, chosen_image_size, load_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smca_kernels.nn import SpatialPriorOutput

    from .detector import SMCA
    from .onnx_detector import OnnxDetector

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SHORT_SIDE_OF_PICTURES = 640  # smaller images are enlarged, for the names to be legible
LONG_SIDE_OF_PICTURES = 4096  # and no further than to this


def detect(model: SMCA | OnnxDetector, images: Sequence[Tensor], *, threshold: float = 0.5) -> list[dict[str, Tensor]]:
    """Objects in images of any sizes, all in one batch.

    Args:
        model: in evaluation mode, or one that `smca export` wrote; images are moved to its device, and resized as its
            `image_size` says.
        images: uint8 [3, height, width] each, RGB, as `data.images.load_image` gives them.
        threshold: least score.

    Returns:
        For each image scores [k] in descending order, labels [k], boxes [k, 4], (x1, y1, x2, y2) in pixels of the
        image as given, and queries [k], all on the CPU.
    """
    import torch

    from .detector import postprocess

    with torch.no_grad():
        outputs = model(_inputs(model, images))
    found = postprocess(outputs, [(image.shape[1], image.shape[2]) for image in images])
    return [{n: t[each["scores"] >= threshold].cpu() for n, t in each.items()} for each in found]


def _inputs(model: SMCA | OnnxDetector, images: Sequence[Tensor]) -> list[Tensor]:
    from .data.images import normalize, resize

    return [normalize(resize(image, *model.image_size)).to(model.device) for image in images]


# ------------------------------------------------------------------------------------------------------------- pictures


def draw_boxes(image: Tensor, found: dict[str, Tensor], classes: Sequence[str]) -> Tensor:
    """An image with its detections as boxes with names and scores, uint8 [3, H, W]; a small image is enlarged.

    Args:
        image: uint8 [3, height, width].
        found: of `detect`.
        classes: name of each label.
    """
    import matplotlib
    from torchvision.transforms.v2 import functional as transforms
    from torchvision.utils import draw_bounding_boxes

    factor = round(SHORT_SIDE_OF_PICTURES / min(image.shape[1:]))
    factor = max(1, min(factor, LONG_SIDE_OF_PICTURES // max(image.shape[1:])))
    height, width = (factor * side for side in image.shape[1:])
    image = transforms.resize(image, [height, width])
    if not len(found["boxes"]):
        return image
    labels = found["labels"].tolist()
    # The darker half of tab20, so that white letters can be read on it.
    shades = [matplotlib.colormaps["tab20"](2 * i / 20)[:3] for i in range(10)]
    palette = [tuple(round(255 * part) for part in shade) for shade in shades]
    font, names = _legible([classes[label] for label in labels], labels)
    drawn: Tensor = draw_bounding_boxes(
        image,
        found["boxes"] * factor,
        [f"{name} {score:.2f}" for name, score in zip(names, found["scores"].tolist(), strict=True)],
        colors=[palette[label % len(palette)] for label in labels],
        width=max(2, min(height, width) // 200),
        font=font,
        font_size=max(12, min(height, width) // 30),
        label_colors="white",
        fill_labels=True,
    )
    return drawn


def _legible(names: Sequence[str], labels: Sequence[int]) -> tuple[str, list[str]]:
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
        font, (name,) = _legible([model.classes[labels[query]]], [int(labels[query])])
        title = f"query {query}: {name} {scores[query]:.2f}"
        left.set_title(title, font=FontProperties(fname=font, size=11), parse_math=False)
        attention = QueryAttention.of([scale[:, n] for scale in maps], prior, 0, query, strides)
        draw_heads(block, grid, photograph, attention, (point[0], point[1]), frame)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca detect`."""
    parser.description = (
        "Find objects in images: detections.json, and for each image NAME_boxes.png and, with --attention, "
        "NAME_attention.png."
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    add_model_arguments(parser)
    add("--runtime", choices=("torch", "onnx"), default="torch", help="onnx: --weights is what `smca export` wrote")
    add("--out", type=Path, default=Path("detections"), metavar="DIR", help="default: %(default)s")
    add("--threshold", type=float, default=0.5, metavar="SCORE", help="least score shown; default: %(default)s")
    add("--attention", action="store_true", help="draw prior and co-attention of queries, per head and scale")
    add("--queries", type=int, nargs="+", metavar="N", help="which; default: the three that are surest")
    add("--layer", type=int, default=-1, metavar="N", help="decoder layer, from 0 or from the end; default: the last")


def run(args: argparse.Namespace) -> int:
    """`smca detect`: exit status 0, or 1 with a list of what it left out: images that can't be read, too long names.

    Raises:
        ValueError: when it can't start, and when no image can be read.
        OSError: with the file's name, when nothing more can be written.
    """
    check_packages(("matplotlib", "safetensors", "torchvision", "tqdm"), "model,demo")
    files = _files(args.images)
    from tqdm import tqdm

    from .data.images import load_image

    model: SMCA | OnnxDetector
    shown: SMCA | None = None  # whose attention is drawn
    if args.runtime == "onnx":
        model, device = _load_onnx(args)
    else:
        model, device = load_model(args)
        queries, layers = model.config.num_queries, model.config.decoder_layers
        if not -layers <= args.layer < layers:
            raise ValueError(f"--layer must be in -{layers} … {layers - 1}, got {args.layer}")
        if not all(0 <= query < queries for query in args.queries or ()):
            raise ValueError(f"--queries must be in 0 … {queries - 1}, got {args.queries}")
        shown = model if args.attention else None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written, got {args.out} ({error})") from None
    report: list[dict[str, Any]] = []
    counted: list[tuple[int, float]] = []
    left_out: list[str] = []
    for batch in tqdm(list(_batches(files, args.batch_size)), desc="detection", unit="batch"):
        images: dict[Path, Tensor] = {}
        for file in batch:
            with _noting(left_out):
                images[file] = load_image(file)
        if not images:
            continue
        began = time.perf_counter()
        results = detect(model, list(images.values()), threshold=args.threshold)
        counted.append((len(images), time.perf_counter() - began))
        for (file, image), found in zip(images.items(), results, strict=True):
            height, width = image.shape[1:]
            records = as_records(found, model.classes)
            report.append({"image": str(file), "width": width, "height": height, "detections": records})
            with _noting(left_out):
                write_picture(draw_boxes(image, found, model.classes), args.out / f"{file.stem}_boxes.png")
            if shown is not None:
                (resized,) = _inputs(shown, [image])
                chosen = args.queries or best_queries(shown, resized, 3)
                path = args.out / f"{file.stem}_attention.png"
                with _noting(left_out):
                    draw_attention(shown, resized, path, queries=chosen, layer=args.layer)
    if not report:
        raise ValueError("\n".join(left_out))
    write_text(args.out / "detections.json", json.dumps(report, indent=1) + "\n")
    counted = counted[1:] or counted  # the first batch warms up
    speed = sum(images for images, _ in counted) / sum(seconds for _, seconds in counted)
    objects = sum(len(each["detections"]) for each in report)
    print(
        f"{objects} objects of score {args.threshold:g} or more in {len(report)} images, in {args.out}; "
        f"{speed:.1f} images per second on {device}, reading and drawing aside"
    )
    if left_out:
        print("\n".join([f"smca detect: {len(left_out)} left out:", *left_out]), file=sys.stderr)
        return 1
    return 0


def _load_onnx(args: argparse.Namespace) -> tuple[OnnxDetector, torch.device]:
    check_model_arguments(args)
    if args.attention:
        raise ValueError("--attention must go with --runtime torch: an exported detector gives boxes and scores alone")
    if args.device not in (None, "cpu"):
        raise ValueError(f"--device must be cpu with --runtime onnx, got {args.device}")
    check_packages(("onnxruntime",), "export")
    from .onnx_detector import OnnxDetector

    model = OnnxDetector(args.weights)
    model.image_size = chosen_image_size(args, model.image_size)
    return model, model.device


@contextmanager
def _noting(left_out: list[str]) -> Iterator[None]:
    """Note an image that can't be read, and a picture of it whose name its folder doesn't take, and go on."""
    from .data.images import DataError

    try:
        yield
    except DataError as error:
        left_out.append(str(error))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        left_out.append(f"picture {error.filename} can't be written: {error.strerror}")


def as_records(found: dict[str, Tensor], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Detections of one image as JSON holds them: class, score, and box [x1, y1, x2, y2] in pixels."""
    columns = (found[name].tolist() for name in ("labels", "scores", "boxes"))
    return [
        {"class": classes[label], "score": round(score, 4), "box": [round(side, 1) for side in box]}
        for label, score, box in zip(*columns, strict=True)
    ]


def _files(paths: Sequence[Path]) -> list[Path]:
    """The image files that paths name, folders replaced by the images in them."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            # Hidden files are no images: a Mac leaves ._NAME.jpg beside NAME.jpg.
            inside = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not file.is_dir()
            )
            if not inside:
                raise ValueError(f"a folder must have images in it ({', '.join(sorted(SUFFIXES))}), {path} has none")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"images must be files or folders, there is no {path}")
    names: dict[str, Path] = {}
    for file in files:
        if file.stem in names:
            raise ValueError(f"images must differ in name without suffix, got {names[file.stem]} and {file}")
        names[file.stem] = file
    return files


def _batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]
