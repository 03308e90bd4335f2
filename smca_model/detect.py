"""`smca detect`: boxes in images as JSON and as pictures, and the attention that found them (Figure 3 of the paper)."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import write_text
from smca_kernels.tools.arguments import check_packages, make_folder

from .evaluate import add_model_arguments, check_model_arguments, chosen_image_size, load_model
from .pictures import best_queries, draw_attention, draw_boxes, write_picture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .detector import SMCA
    from .onnx_detector import OnnxDetector

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def detect(model: SMCA | OnnxDetector, images: Sequence[Tensor], *, threshold: float = 0.5) -> list[dict[str, Tensor]]:
    """Objects in images of any sizes, all in one batch.

    Args:
        model: in evaluation mode, or one that `smca export` wrote; images are moved to its device, and resized as its
            `image_size` says.
        images: uint8 [3, height, width] each, RGB, as `data.images.load_image` gives them.
        threshold: least score.

    Returns:
        For each image scores [k] in descending order, labels [k] and boxes [k, 4] on the CPU: (x1, y1, x2, y2) in
        pixels of the image as given.
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
    make_folder("--out", args.out)
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
