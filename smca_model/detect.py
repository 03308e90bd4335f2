"""`smca detect`: boxes in images, videos and a webcam's pictures as JSON and drawn, and the attention behind them."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smca_kernels.files import replacing, write_text
from smca_kernels.tools.arguments import check_packages, make_folder, naming_option

from .config import IMAGE_SUFFIXES
from .evaluate import (
    LESS_MEMORY,
    add_model_arguments,
    check_model_arguments,
    check_threshold,
    chosen_image_size,
    load_model,
)
from .execution import autocast, float32_products, naming_batch
from .pictures import best_queries, draw_attention, draw_boxes, write_picture
from .training.signals import StopSignals

if TYPE_CHECKING:
    import supervision
    import torch
    from torch import Tensor

    from .detector import SMCA
    from .onnx_detector import OnnxDetector
    from .video import VideoFile, Webcam

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

ENDINGS = ("_boxes.png", "_attention.png", "_boxes.mp4", "_detections.jsonl")  # of what is written
URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path has one slash left; a drive's name is one letter


def detect(model: SMCA | OnnxDetector, images: Sequence[Tensor], *, threshold: float = 0.5) -> list[dict[str, Tensor]]:
    """Objects in images of any sizes.

    Images that the model takes at one size are a batch. So none is padded, and what is found in an image depends on no
    other image.

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

    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    inputs = _inputs(model, images)
    for i, image in enumerate(inputs):
        groups[tuple(image.shape)].append(i)
    found: dict[int, dict[str, Tensor]] = {}
    for members in groups.values():
        with torch.no_grad(), naming_batch([inputs[i] for i in members], "", LESS_MEMORY):
            outputs = model([inputs[i] for i in members])
        results = postprocess(outputs, [(images[i].shape[1], images[i].shape[2]) for i in members])
        for i, each in zip(members, results, strict=True):
            found[i] = {name: tensor[each["scores"] >= threshold].cpu() for name, tensor in each.items()}
    return [found[i] for i in range(len(images))]


def _inputs(model: SMCA | OnnxDetector, images: Sequence[Tensor]) -> list[Tensor]:
    from .data.images import normalize, resize

    return [normalize(resize(image, *model.image_size)).to(model.device) for image in images]


def to_supervision(found: dict[str, Tensor], classes: Sequence[str]) -> supervision.Detections:
    """Detections of one image for supervision's annotators, trackers, zones and exports.

    Args:
        found: of `detect`, k objects.
        classes: name of each label, as in `model.classes`.

    Returns:
        `xyxy` [k, 4] and `confidence` [k] in float32, `class_id` [k], and `data["class_name"]`, of k names.

    Raises:
        ValueError: naming the command that installs supervision, where it is missing.
    """
    check_packages(("supervision",), "video")
    import numpy as np
    import supervision

    labels = found["labels"].numpy()
    return supervision.Detections(
        xyxy=found["boxes"].numpy(),
        confidence=found["scores"].numpy(),
        class_id=labels,
        data={"class_name": np.array([classes[label] for label in labels], dtype=np.str_)},
    )


@dataclass
class VideoResult:
    """What was found in a video.

    Attributes:
        frames: how many were read.
        objects: how many were found in them.
        seconds: time that the model took for them, the first batch aside where there are more.
        timed_frames: how many frames those are.
        intervals: shortest and longest time from a frame to the next, in seconds; both 0 of a single frame.
        rate_varies: whether intervals differ by more than rounding to the video's clock.
    """

    frames: int = 0
    objects: int = 0
    seconds: float = 0.0
    timed_frames: int = 0
    intervals: tuple[float, float] = (0.0, 0.0)
    rate_varies: bool = False


def detect_video(
    model: SMCA | OnnxDetector,
    video: VideoFile | Webcam,
    *,
    boxes: Path,
    records: Path,
    threshold: float = 0.5,
    batch_size: int = 1,
    progress: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> VideoResult:
    """Objects in every frame of a video, drawn into a video of the same size and times, and as lines of JSON.

    A line has frame (from 0), seconds (from the first frame on) and detections as `as_records`. Both files are there,
    as a whole, when the video ends or is stopped; after an error neither is.

    Args:
        model: as of `detect`.
        video: opened.
        boxes: MP4 file to write or replace.
        records: file of JSON lines to write or replace.
        threshold: least score.
        batch_size: frames at once.
        progress: show a bar.
        stopped: asked before each batch; True ends the video there.

    Raises:
        OSError: with the file's name, when it can't be written.
    """
    from tqdm import tqdm

    from .video import writing_video

    for path in (boxes, records):
        with suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long is told now rather than at the end
    result = VideoResult()
    intervals: set[int] = set()
    last = 0
    with (
        replacing(records) as temporary,
        temporary.open("w", encoding="utf-8") as lines,
        writing_video(boxes, video) as write,
        tqdm(total=video.frames, desc=video.name, unit="frame", disable=not progress) as bar,
    ):
        for batch in _batches(video, batch_size):
            began = time.perf_counter()
            results = detect(model, [frame.image for frame in batch], threshold=threshold)
            seconds = time.perf_counter() - began
            if result.frames == result.timed_frames == batch_size:
                result.seconds, result.timed_frames = 0.0, 0  # the first batch warms up
            result.seconds, result.timed_frames = result.seconds + seconds, result.timed_frames + len(batch)
            for frame, found in zip(batch, results, strict=True):
                write(draw_boxes(frame.image, found, model.classes, enlarge=False), frame.ticks)
                when = {"frame": result.frames, "seconds": round(float(frame.ticks * video.time_base), 6)}
                lines.write(json.dumps({**when, "detections": as_records(found, model.classes)}) + "\n")
                if result.frames:
                    intervals.add(frame.ticks - last)
                last = frame.ticks
                result.frames += 1
                result.objects += len(found["scores"])
            bar.update(len(batch))
            if stopped():
                break
    if intervals:
        shortest, longest = min(intervals), max(intervals)
        result.intervals = float(shortest * video.time_base), float(longest * video.time_base)
        result.rate_varies = longest - shortest > 2  # each time is rounded to a tick
    return result


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca detect`."""
    parser.description = (
        "Find objects in images and videos: detections.json, for each image NAME_boxes.png and, with --attention, "
        "NAME_attention.png, for each video NAME_boxes.mp4 and, a line a frame, NAME_detections.jsonl."
    )
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="FILE", help="images, folders of images, videos")
    add("--webcam", type=int, metavar="N", help="a webcam's pictures, from 0, until Ctrl-C")
    add_model_arguments(parser)
    add("--runtime", choices=("torch", "onnx"), default="torch", help="onnx: --weights is what `smca export` wrote")
    add("--out", type=Path, default=Path("detections"), metavar="DIR", help="default: %(default)s")
    add("--threshold", type=float, default=0.5, metavar="SCORE", help="least score shown; default: %(default)s")
    add("--attention", action="store_true", help="draw prior and co-attention of queries, per head and scale")
    add("--queries", type=int, nargs="+", metavar="N", help="of --attention; default: the three that are surest")
    add("--layer", type=int, metavar="N", help="of --attention: decoder layer, from 0 or the end; default: the last")


def run(args: argparse.Namespace) -> int:
    """`smca detect`: exit status 0, or 1 with a list of what it left out: files that can't be read, too long names.

    What SIGINT, SIGTERM or an error ended is written as far as it was; a signal with the status 128 + its number.

    Raises:
        ValueError: when it can't start, and when nothing can be read.
        OSError: with the file's name, when nothing more can be written.
        torch.OutOfMemoryError: for a batch.
    """
    check_packages(("matplotlib", "safetensors", "torchvision", "tqdm"), "model,demo")
    if not args.images and args.webcam is None:
        raise ValueError("give images, folders, videos, or --webcam N")
    check_threshold(args.threshold)
    if not args.attention and (args.queries is not None or args.layer is not None):
        raise ValueError(f"{'--layer' if args.queries is None else '--queries'} must go with --attention")
    images, videos = _files(args.images)
    # Unlike Path.resolve, realpath takes links that lead in a circle.
    written = {os.path.realpath(args.out / f"{file.stem}{end}") for file in (*images, *videos) for end in ENDINGS}
    for file in (*images, *videos):
        if os.path.realpath(file) in written:
            raise ValueError(f"--out must be another folder, or {file} would be replaced by what is found")
    if videos or args.webcam is not None:
        check_packages(("av", *(("cv2",) if args.webcam is not None else ())), "video")
        if args.attention:
            raise ValueError(f"--attention must go with images alone, got {videos[0] if videos else '--webcam'}")
        if args.webcam is not None and args.webcam < 0:
            raise ValueError(f"--webcam must be at least 0, got {args.webcam}")
    model: SMCA | OnnxDetector
    shown: SMCA | None = None  # whose attention is drawn
    if args.runtime == "onnx":
        model, device = _load_onnx(args)
    else:
        model, device = load_model(args)
        queries, layers = model.config.num_queries, model.config.decoder_layers
        if args.layer is not None and not -layers <= args.layer < layers:
            raise ValueError(f"--layer must be in -{layers} … {layers - 1}, got {args.layer}")
        if not all(0 <= query < queries for query in args.queries or ()):
            raise ValueError(f"--queries must be in 0 … {queries - 1}, got {args.queries}")
        shown = model if args.attention else None
    make_folder("--out", args.out)
    work = _Work(args, model, shown)
    try:
        with work.stop, float32_products(args.precision), autocast(args.precision, device):
            work.do_images(images)
            work.do_videos(videos)
    finally:  # what was found before an error, too
        report = [work.entries[file] for file in (*images, *videos, Path("webcam")) if file in work.entries]
        if report:
            write_text(args.out / "detections.json", json.dumps(report, indent=1) + "\n")
    left_out = [told for file in (*images, *videos, Path("webcam")) for told in work.left_out.get(file, ())]
    if not report:
        if work.stop.number:
            return 128 + work.stop.number
        raise ValueError("\n".join(left_out))
    counts = [f"{number} {what}" for what, number in work.counts.items() if number]
    print(
        f"{work.objects} objects of score {args.threshold:g} or more in {' and '.join(counts)}, in {args.out}; "
        f"{work.speed():.1f} images per second on {device}, reading and drawing aside"
    )
    if left_out:
        print("\n".join([f"smca detect: {len(left_out)} left out:", *left_out]), file=sys.stderr)
    return 128 + work.stop.number if work.stop.number else bool(left_out)


class _Work:
    """What `smca detect` does, and what it has found so far."""

    def __init__(self, args: argparse.Namespace, model: SMCA | OnnxDetector, shown: SMCA | None) -> None:
        self.args, self.model, self.shown = args, model, shown
        self.entries: dict[Path, dict[str, Any]] = {}
        self.left_out: dict[Path, list[str]] = defaultdict(list)
        self.counts = {"images": 0, "frames": 0}
        self.objects = 0
        self.timings: list[tuple[int, float]] = []
        self.stop = StopSignals()
        self.min_side: int = getattr(model, "min_side", 1)

    def speed(self) -> float:
        counted = self.timings[1:] or self.timings  # the first batch warms up
        return sum(images for images, _ in counted) / sum(seconds for _, seconds in counted)

    def do_images(self, files: Sequence[Path]) -> None:
        """Write entries and pictures of images until stopped; those of like sizes are in a batch in whatever order."""
        from tqdm import tqdm

        from .data.images import load_image, resized_size

        groups: dict[tuple[int, int] | None, list[Path]] = defaultdict(list)
        for file in files:
            if self.stop.number:
                return
            size = _size_of(file)
            groups[size and resized_size(size, *self.model.image_size)].append(file)
        batches = [batch for group in groups.values() for batch in _batches(group, self.args.batch_size)]
        for batch in tqdm(batches, desc="detection", unit="batch", disable=not files):
            if self.stop.number:
                return
            images: dict[Path, Tensor] = {}
            for file in batch:
                with _noting(self.left_out[file]):
                    image = load_image(file)
                    self._check_sides(f"image {file}", image.shape[1], image.shape[2])
                    images[file] = image
            if not images:
                continue
            began = time.perf_counter()
            results = detect(self.model, list(images.values()), threshold=self.args.threshold)
            self.timings.append((len(images), time.perf_counter() - began))
            for (file, image), found in zip(images.items(), results, strict=True):
                self._write_image(file, image, found)

    def _check_sides(self, name: str, height: int, width: int) -> None:
        """Raise DataError for what has too small a side for an exported detector once it is resized."""
        from .data.images import DataError, format_size, resized_size

        resized = resized_size((height, width), *self.model.image_size)
        if min(resized) < self.min_side:
            raise DataError(
                f"{name} must have sides of at least {self.min_side} pixels for this exported detector, got "
                f"{format_size(height, width)}, resized to {format_size(*resized)}"
            )

    def _write_image(self, file: Path, image: Tensor, found: dict[str, Tensor]) -> None:
        args, (height, width) = self.args, image.shape[1:]
        records = as_records(found, self.model.classes)
        self.entries[file] = {"image": str(file), "width": width, "height": height, "detections": records}
        self.counts["images"] += 1
        self.objects += len(records)
        with _noting(self.left_out[file]):
            write_picture(draw_boxes(image, found, self.model.classes), args.out / f"{file.stem}_boxes.png")
        if self.shown is not None:
            (resized,) = _inputs(self.shown, [image])
            chosen = args.queries or best_queries(self.shown, resized, 3)
            layer = -1 if args.layer is None else args.layer
            with _noting(self.left_out[file]):
                path = args.out / f"{file.stem}_attention.png"
                draw_attention(self.shown, resized, path, queries=chosen, layer=layer)

    def do_videos(self, files: Sequence[Path]) -> None:
        """Write entries, videos with boxes and lines of JSON of videos, then of the webcam, unless stopped before."""
        if not files and self.args.webcam is None:
            return
        from .video import VideoFile, Webcam

        for file in files:
            if not self.stop.number:
                with _noting(self.left_out[file]), VideoFile(file) as video:
                    self._write_video(file, file.stem, video, self.args.batch_size)
        if self.args.webcam is not None and not self.stop.number:
            number = self.args.webcam
            with _noting(self.left_out[Path("webcam")]), Webcam(number) as webcam:
                # One by one, so that none waits for others to come.
                self._write_video(Path("webcam"), f"webcam_{number}", webcam, 1)

    def _write_video(self, file: Path, name: str, video: VideoFile | Webcam, batch_size: int) -> None:
        args = self.args
        self._check_sides(f"video {video.name}", video.height, video.width)
        records = args.out / f"{name}_detections.jsonl"
        result = detect_video(
            self.model,
            video,
            boxes=args.out / f"{name}_boxes.mp4",
            records=records,
            threshold=args.threshold,
            batch_size=batch_size,
            progress=True,
            stopped=lambda: bool(self.stop.number),
        )
        self.entries[file] = {
            "video": video.name,
            "width": video.width,
            "height": video.height,
            "frames": result.frames,
            "fps": None if video.rate is None else round(float(video.rate), 3),
            "rate_varies": result.rate_varies,
            "detections": records.name,
        }
        self.counts["frames"] += result.frames
        self.objects += result.objects
        self.timings.append((result.timed_frames, result.seconds))
        if result.rate_varies:
            shortest, longest = (f"{1000 * seconds:.0f}" for seconds in result.intervals)
            logger.warning("%s: frames are %s to %s ms apart, and so they are written", video.name, shortest, longest)
        if video.damaged:
            self.left_out[file].append(f"video {video.name} has {video.damaged} parts that can't be decoded")


def _load_onnx(args: argparse.Namespace) -> tuple[OnnxDetector, torch.device]:
    check_model_arguments(args)
    if args.attention:
        raise ValueError("--attention must go with --runtime torch: an exported detector gives boxes and scores alone")
    if args.device not in (None, "cpu"):
        raise ValueError(f"--device must be cpu with --runtime onnx, got {args.device}")
    if args.precision != "fp32":
        raise ValueError(f"--precision must be fp32 with --runtime onnx, got {args.precision}")
    check_packages(("onnxruntime",), "export")
    from .onnx_detector import OnnxDetector

    with naming_option("--weights"):
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


def _files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images and videos that paths name, folders replaced by the images in them."""
    images: list[Path] = []
    videos: list[Path] = []
    for path in paths:
        if path.is_dir():
            # Hidden files are no images: a Mac leaves ._NAME.jpg beside NAME.jpg.
            inside = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and not file.is_dir()
            )
            if not inside:
                raise ValueError(
                    f"a folder must have images in it ({', '.join(sorted(IMAGE_SUFFIXES))}), {path} has none"
                )
            images += inside
        elif path.is_file():
            (images if path.suffix.lower() in IMAGE_SUFFIXES or _size_of(path) else videos).append(path)
        elif URL.match(str(path)):
            raise ValueError(f"images and videos must be files, no addresses; download it first, got {path}")
        else:
            hint = f"; a webcam is --webcam {path}" if str(path).isdecimal() else ""
            raise ValueError(f"images must be files or folders, there is no {path}{hint}")
    names: dict[str, Path] = {}
    for file in (*images, *videos):
        if file.stem in names:
            raise ValueError(f"images must differ in name without suffix, got {names[file.stem]} and {file}")
        names[file.stem] = file
    return images, videos


def _size_of(path: Path) -> tuple[int, int] | None:
    """Height and width of an image file, upright; None of a file that isn't one."""
    from .data.images import DataError, read_header

    try:
        header = read_header(path)
    except DataError:
        return None
    return header.height, header.width


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
