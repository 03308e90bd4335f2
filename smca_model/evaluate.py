"""COCO's average precision of a detector, class by class as well, its curves and confusions: `smca eval`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from smca_kernels.files import write_text
from smca_kernels.tools.arguments import check_output_files, check_packages, choose_device, make_folder, naming_option

from .coco_results import Detection, confusion_matrix, measure
from .execution import PRECISION_HELP, PRECISIONS, autocast, float32_products, naming_batch
from .result_pictures import FILES, format_classes, write_results

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .data.coco import CocoDetection
    from .detector import SMCA

MAX_CLASSES_SHOWN = 20  # on the screen; --out writes them all
CONFUSION_IOU = 0.5
LESS_MEMORY = "fewer images at once, smaller ones and bf16 take less"


def evaluate(
    model: nn.Module,
    dataset: CocoDetection,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """COCO's twelve numbers of a detector on a dataset, and its speed, in one process.

    Args:
        model: on the device; it is put in evaluation mode meanwhile.
        dataset: its labels must be the model's.
        batch_size, workers: images at once, and processes that load them.
        device: where the model is.
        progress: show a bar.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0…1, -1 where the dataset has no such box;
        and images_per_second, as `detect_all` counts it.

    Raises:
        ValueError: for a model with another number of classes, and images that can't be read.
    """
    detections, speed = detect_all(
        model, dataset, batch_size=batch_size, device=device, workers=workers, progress=progress
    )
    return measure(dataset.coco, detections).numbers | {"images_per_second": speed}


def detect_all(
    model: nn.Module,
    dataset: CocoDetection,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    progress: bool = True,
) -> tuple[list[Detection], float]:
    """The 100 best detections in every image, in COCO's results format, and images per second.

    A detection has image_id, category_id (the dataset's own), bbox [x, y, width, height] in pixels of the image file,
    and score. The speed is that of the model with its post-processing and copies to and from the device, without
    loading images; the first batch, which warms up, doesn't count unless it is the only one. 0 without images, which a
    process may have as its part of a small dataset.

    Arguments and errors as `evaluate`.
    """
    import torch
    from torchvision.ops import box_convert
    from tqdm import tqdm

    from .data.coco import load_batches
    from .detector import postprocess

    detections: list[Detection] = []
    timings: list[tuple[int, float]] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(dataset), desc="evaluation", unit="image", disable=not progress) as bar:
            for images, targets in load_batches(dataset, device, workers, batch_size=batch_size):
                began = time.perf_counter()
                with naming_batch(images, "", LESS_MEMORY):
                    outputs = model([image.to(device, non_blocking=True) for image in images])
                classes = outputs["pred_logits"].shape[-1]
                if classes != len(dataset.classes):
                    raise ValueError(
                        f"model must have the {len(dataset.classes)} classes of the dataset, got one with {classes}"
                    )
                found = postprocess(outputs, [target["orig_size"] for target in targets])
                found = [{name: tensor.cpu() for name, tensor in each.items()} for each in found]
                timings.append((len(images), time.perf_counter() - began))
                for target, each in zip(targets, found, strict=True):
                    boxes = box_convert(each["boxes"], "xyxy", "xywh").tolist()
                    for score, label, box in zip(each["scores"].tolist(), each["labels"].tolist(), boxes, strict=True):
                        # A label that means nothing has no category.
                        if (category := dataset.category_ids[label]) is not None:
                            detections.append(
                                {"image_id": target["image_id"], "category_id": category, "bbox": box, "score": score}
                            )
                bar.update(len(images))
    finally:
        model.train(was_training)
    counted = timings[1:] or timings or [(0, 1.0)]
    return detections, sum(images for images, _ in counted) / sum(seconds for _, seconds in counted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca eval`."""
    parser.description = (
        "COCO's twelve numbers and the speed of a detector on validation data; with --out, AP class by class, "
        "precision-recall curves and a confusion matrix, as JSON and as pictures. By faster-coco-eval where it is "
        "installed, else by pycocotools, with the same numbers."
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="data folder, as of smca train; its split val is taken")
    add_model_arguments(parser)
    add("--workers", type=int, default=2, metavar="N", help="processes that load images; default: %(default)s")
    add(
        "--upright",
        action="store_true",
        help="boxes are of upright images where size and EXIF don't say; as in training",
    )
    add("--out", type=Path, metavar="DIR", help="write AP class by class, curves and a confusion matrix there")
    add(
        "--threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="least score of detections in the confusion matrix; default: %(default)s",
    )
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    add("--detections", type=Path, metavar="FILE", help="write the detections there, in COCO's results format")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose the detector and what it runs on, for `load_model`."""
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="the detector, as `smca train` writes it")
    add("--size", type=int, metavar="PX", help="short side of the images; default: that of the training's evaluations")
    add("--max-size", type=int, metavar="PX", help="most of the longest side; default: likewise")
    add("--batch-size", type=int, default=4, metavar="N", help="images at once; default: %(default)s")
    add("--precision", choices=PRECISIONS, default="fp32", help=f"{PRECISION_HELP}; default: %(default)s")
    add("--device", metavar="NAME", help="such as cuda or cpu; default: a GPU if there is one")


def load_model(args: argparse.Namespace) -> tuple[SMCA, torch.device]:
    """The detector on its device; its `image_size` is what `add_model_arguments` gave, where it was given.

    Raises:
        ValueError: for an option out of range, and a file that holds no weights.
    """
    from . import weights

    check_model_arguments(args)
    device = choose_device(args.device)
    with naming_option("--weights"):
        model = weights.load(args.weights)
    model.image_size = chosen_image_size(args, model.image_size)
    return model.to(device), device


def check_model_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for an option of `add_model_arguments` that is out of range."""
    for option in ("size", "max_size", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}")


def check_threshold(threshold: float) -> None:
    """Raise ValueError for a --threshold that is no score."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must be a score in 0 … 1, got {threshold:g}")


def chosen_image_size(args: argparse.Namespace, saved: tuple[int, int]) -> tuple[int, int]:
    """What `add_model_arguments` gave of the `image_size`, and for the rest that of the detector's file.

    Raises:
        ValueError: for a short side beyond the longest.
    """
    size, max_size = (
        of_file if given is None else given for given, of_file in zip((args.size, args.max_size), saved, strict=True)
    )
    if size > max_size:
        raise ValueError(f"--size must be at most --max-size, got {size} and {max_size}")
    return size, max_size


def run(args: argparse.Namespace) -> int:
    """`smca eval`: exit status 0.

    Raises:
        ValueError: when it can't start.
    """
    check_packages(("pycocotools", "safetensors", "torchvision", "tqdm"), "model")
    if args.out is not None:
        check_packages(("matplotlib",), "model")
    check_threshold(args.threshold)
    check_output_files({"--json": args.json, "--detections": args.detections})
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    from .data.coco import CocoDetection
    from .data.layouts import find_split

    model, device = load_model(args)
    size, max_size = model.image_size
    dataset = CocoDetection(
        *find_split(args.data, "val"),
        train=False,
        classes=model.classes,
        sizes=(size,),
        max_size=max_size,
        upright=args.upright,
        progress=True,
    )
    if args.out is not None:
        make_folder("--out", args.out)
    with float32_products(args.precision), autocast(args.precision, device):
        detections, speed = detect_all(model, dataset, batch_size=args.batch_size, device=device, workers=args.workers)
    results = measure(dataset.coco, detections)
    print(results.table)
    if len(results.classes) <= MAX_CLASSES_SHOWN:
        print(format_classes(results))
    print(
        f"{len(dataset)} images of short side {size} pixels: {speed:.1f} images per second on {device}, loading aside; "
        f"AP by {results.library}"
    )
    if args.out is not None:
        matrix = confusion_matrix(dataset.coco, detections, score=args.threshold, iou=CONFUSION_IOU)
        write_results(args.out, results, matrix, score=args.threshold, iou=CONFUSION_IOU)
        print(f"{', '.join(FILES)} in {args.out}")
    if args.detections is not None:
        write_text(args.detections, json.dumps(detections))
    if args.json is not None:
        facts = {"weights": str(args.weights), "data": str(args.data), "images": len(dataset), "device": str(device)}
        facts |= {"size": size, "max_size": max_size, "batch_size": args.batch_size, "precision": args.precision}
        facts |= {"ap_by": results.library}
        write_text(args.json, json.dumps({**facts, **results.numbers, "images_per_second": speed}, indent=2) + "\n")
    return 0
