"""Detection data in COCO's format, or another that `layouts` reads as that, and DETR's augmentation of it."""

from __future__ import annotations

import functools
import itertools
import math
import signal
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as transforms

from ..config import MAX_SIZE, NO_CLASS, SIZES
from .annotations import make_coco, some_of
from .images import load_annotated_image, normalize, resize_to, resized_size
from .layouts import Annotations, missing_files, read_split
from .yolo import YoloSplit

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# DETR crops from images of short side 400, 500 or 600, sides of 384 to 600 pixels: parts of its largest size, 800.
CROP_FROM = (0.5, 0.625, 0.75)
CROP_SIDE = (0.48, 0.75)

Target = dict[str, Any]


def check_classes(model_classes: Sequence[str], dataset_classes: Sequence[str]) -> None:
    """Refuse a model whose classes are not those of the dataset, whatever their order; "N/A" doesn't count.

    Raises:
        ValueError: naming both lists.
    """
    of_model, of_dataset = ([name for name in names if name != NO_CLASS] for names in (model_classes, dataset_classes))
    if set(of_model) != set(of_dataset):
        raise ValueError(
            "the model's classes must be those of the dataset; the model has "
            f"{len(of_model)} ({', '.join(of_model)}), the dataset has {len(of_dataset)} ({', '.join(of_dataset)})"
        )


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images and their boxes, in order of image id.

    An item is a float32 image [3, H, W], RGB, normalised with ImageNet's mean and deviation, and its target:

        boxes [n, 4] float32     cxcywh in 0…1 of the image as given
        labels [n] int64         index into `classes`
        image_id int
        size (int, int)          height and width of the image as given
        orig_size (int, int)     height and width in the annotation file
        dropped_boxes int        boxes left out because augmentation left less than a pixel of them

    Crowds are no targets. For training, DETR's augmentation: a flip; then, each half of the time, a resize to a
    random short side, or the same after a random crop. For evaluation, a resize to the largest of the sizes. What is
    drawn depends on the seed, the epoch (`set_epoch`) and the index alone, whoever loads the item and when.

    Args:
        images: the folder that the annotations' file names are relative to.
        annotations: a file in COCO's format, whose ids may have gaps, and ``area`` and ``iscrowd`` be missing; or a
            `YoloSplit`.
        train: whether to augment.
        classes: names of the labels; they must be those of the dataset (`check_classes`). None: the names of the
            dataset's categories, in order of id.
        sizes: short sides to choose from, in pixels.
        max_size: most pixels of the longest side.
        flip, crop: False leaves that out of the augmentation: digits, for one, have no mirror images.
        seed: of the augmentation.
        upright: whether boxes are those of the upright image where the annotated size doesn't tell that from the image
            as stored; elsewhere it does (`load_annotated_image`). Those of a `YoloSplit` always are.
        progress: show a bar where many files are to be read.

    Attributes:
        classes: tuple of names, one a label.
        category_ids: for each label, the dataset's own id; None where a label means nothing.
        image_ids: of each item.
        degenerate_boxes: boxes in the file that have no width or height, and were left out.

    Raises:
        ValueError: for data that can't be used: a missing file, an empty split, a box outside its image, boxes all
            smaller than a pixel, a category or image that isn't listed, …
        DataError: when an item is loaded, for an image that is broken or of another size; it is a ValueError.
    """

    def __init__(
        self,
        images: Path,
        annotations: Annotations,
        *,
        train: bool,
        classes: Sequence[str] | None = None,
        sizes: Sequence[int] = SIZES,
        max_size: int = MAX_SIZE,
        flip: bool = True,
        crop: bool = True,
        seed: int = 0,
        upright: bool = False,
        progress: bool = False,
    ) -> None:
        if not sizes or min(sizes) < 1 or max_size < max(sizes):
            raise ValueError(f"sizes must be at least one, from 1 to max_size={max_size}, got {list(sizes)}")
        self.images, self.annotations = Path(images), annotations
        self.train, self.sizes, self.max_size = train, tuple(sizes), max_size
        self.flip, self.crop, self.seed = flip, crop, seed
        self.upright = upright or isinstance(annotations, YoloSplit)
        # In shared memory, so that the workers of a DataLoader see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

        data = read_split(annotations, classes=classes, progress=progress)
        entries = sorted(data["images"], key=lambda entry: entry["id"])
        categories = sorted(data["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in categories]
        if classes is not None:
            check_classes(classes, names)
        self.classes = tuple(names if classes is None else classes)
        id_of = {category["name"]: category["id"] for category in categories}
        self.category_ids = tuple(id_of.get(name) for name in self.classes)
        self.image_ids = tuple(entry["id"] for entry in entries)
        self.files = tuple(entry["file_name"] for entry in entries)
        self.orig_sizes = tuple((entry["height"], entry["width"]) for entry in entries)
        self._check_files()

        # Tensors rather than one object a box: workers share their memory, which counting references would copy.
        rank = {image: i for i, image in enumerate(self.image_ids)}
        label = {category: i for i, category in enumerate(self.category_ids)}
        objects = [annotation for annotation in data["annotations"] if not annotation["iscrowd"]]
        objects.sort(key=lambda annotation: rank[annotation["image_id"]])
        # In float64, in which the far corner of a box that begins far outside is still right.
        boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float64).reshape(-1, 4)
        keep = (boxes[:, 2:] > 0).all(1)
        self.degenerate_boxes = int((~keep).sum())
        self._boxes = box_convert(boxes, "xywh", "xyxy")[keep].float()
        self._labels = torch.tensor([label[a["category_id"]] for a in objects], dtype=torch.int64)[keep]
        ranks = torch.tensor([rank[a["image_id"]] for a in objects], dtype=torch.int64)[keep]
        self._starts = torch.searchsorted(ranks, torch.arange(len(entries) + 1))
        if not len(self._boxes):
            raise ValueError(f"annotations must have at least one box that is no crowd, {self.annotations} has none")
        self._check_units(int((boxes[keep, 2:] < 1).any(1).sum()))
        self._warn_of_clipped()

    def _check_files(self) -> None:
        if not self.images.is_dir():
            raise ValueError(f"images must be a folder, got {self.images}")
        missing = missing_files(self.images, self.files)
        if missing:
            raise ValueError(
                f"images must hold every file of {self.annotations}, but {len(missing)} of {len(self.files)} are not "
                f"in {self.images}: {some_of(missing)}"
            )

    def _check_units(self, small: int) -> None:
        """Refuse boxes that all have a side of less than a pixel, and warn if that many have."""
        if not small:
            return
        told = f"{self.annotations}: {small} of {len(self._boxes)} boxes have a side of less than a pixel"
        if isinstance(self.annotations, YoloSplit):
            wanted, advice = "x, y, width, height must be in parts of the image, not of anything else", ""
        else:
            wanted = "bbox must be [x, y, width, height] in pixels, not in parts of the image"
            advice = "; if they are in parts of the image, they must be in pixels"
        if small == len(self._boxes):
            raise ValueError(f"{told}; {wanted}")
        warnings.warn(told + advice, stacklevel=3)

    def _warn_of_clipped(self) -> None:
        counts = self._starts.diff()
        limits = torch.tensor([[w, h] for h, w in self.orig_sizes]).repeat_interleave(counts, 0)
        # Less than a pixel is rounding in the file.
        beyond = ((self._boxes[:, :2] < -1) | (self._boxes[:, 2:] > limits + 1)).any(1)
        if beyond.any():
            ids = torch.tensor(self.image_ids).repeat_interleave(counts)[beyond].unique().tolist()
            warnings.warn(
                f"{self.annotations}: {int(beyond.sum())} of {len(beyond)} boxes reach beyond their image and are "
                f"clipped, in the images with ids {some_of(ids)}",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Let the augmentation draw anew; call it before iterating over a DataLoader."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        path, orig_size = self.images / self.files[index], self.orig_sizes[index]
        image = load_annotated_image(path, orig_size, annotations=self.annotations, upright=self.upright)
        here = slice(int(self._starts[index]), int(self._starts[index + 1]))
        boxes = tv_tensors.BoundingBoxes(self._boxes[here].clone(), format="XYXY", canvas_size=orig_size)
        if self.train:
            entropy = np.random.SeedSequence((self.seed, int(self._epoch), index)).generate_state(1, np.uint64)
            image, boxes = self._augment(image, boxes, torch.Generator().manual_seed(int(entropy[0])))
        else:
            image, boxes = self._resize(image, boxes, max(self.sizes))
        # Rounding may leave a box a hair beyond the image, which would count as degenerate.
        boxes, keep = transforms.sanitize_bounding_boxes(transforms.clamp_bounding_boxes(boxes))
        height, width = image.shape[1:]
        boxes = box_convert(boxes.as_subclass(Tensor), "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        target = {
            "boxes": boxes,
            "labels": self._labels[here][keep],
            "image_id": self.image_ids[index],
            "size": (height, width),
            "orig_size": orig_size,
            "dropped_boxes": int((~keep).sum()),
        }
        return normalize(image), target

    def _augment(self, image: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def draw(low: int, high: int) -> int:
            """One of low … high, both included."""
            return int(torch.randint(low, high + 1, (), generator=generator))

        if self.flip and draw(0, 1):
            image, boxes = transforms.horizontal_flip(image), transforms.horizontal_flip(boxes)
        if self.crop and draw(0, 1):
            size = self._size_to_crop(image.shape[1:], CROP_FROM[draw(0, len(CROP_FROM) - 1)])
            image, boxes = resize_to(image, size), transforms.resize(boxes, list(size))
            height, width = (draw(*sides) for sides in self._crop_sides(size))
            top, left = draw(0, image.shape[1] - height), draw(0, image.shape[2] - width)
            image, boxes = (transforms.crop(each, top, left, height, width) for each in (image, boxes))
        return self._resize(image, boxes, self.sizes[draw(0, len(self.sizes) - 1)])

    def _resize(self, image: Tensor, boxes: Tensor, short: int) -> tuple[Tensor, Tensor]:
        size = resized_size(image.shape[1:], short, self.max_size)
        return resize_to(image, size), transforms.resize(boxes, list(size))

    def _size_to_crop(self, size: Sequence[int], part: float) -> tuple[int, int]:
        """The size to crop from, without a limit, so that crops of panoramas are as high as others; enlarged only up to
        max_size.

        DETR has no limit at all here: an image of 3 × 2600 pixels would become one of 600 × 520 000.
        """
        short = max(1, round(part * max(self.sizes)))
        least, most = sorted(size)
        enlarged = short > least and int(short * most / least) > self.max_size
        if enlarged and most >= self.max_size:
            return size[0], size[1]
        return resized_size(size, short, self.max_size if enlarged else max(most, self.max_size))

    def _crop_sides(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """The least and the most of the height and of the width of a crop."""
        low, high = (max(1, round(part * max(self.sizes))) for part in CROP_SIDE)
        return [(min(low, side), min(high, side)) for side in size]

    def largest_size(self, batch_size: int) -> tuple[int, int]:
        """The height and width that no batch exceeds; of two images or more, one may be high and another wide."""
        short, sizes = max(self.sizes), set(self.orig_sizes)
        if self.train and self.crop:
            cropped = {self._size_to_crop(*each) for each in itertools.product(sizes, CROP_FROM)}
            for rows, columns in map(self._crop_sides, cropped):
                sizes |= {(rows[0], columns[1]), (rows[1], columns[0])}
        height, width = map(max, zip(*(resized_size(size, short, self.max_size) for size in sizes), strict=True))
        if batch_size == 1:
            return max((height, min(short, width)), (min(short, height), width), key=math.prod)
        return height, width

    @functools.cached_property
    def coco(self) -> COCO:
        """The annotations as pycocotools' evaluation takes them; read anew, so that training doesn't hold them.

        Annotations are numbered from 1, because to that evaluation a box matched to number 0 is not matched.
        """
        data = read_split(self.annotations, classes=self.classes)
        for number, annotation in enumerate(data["annotations"], 1):
            annotation["id"] = number
        return make_coco(data)


def collate(items: Iterable[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch: its images and its targets, as lists; the model pads."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def _pack(items: Iterable[tuple[Tensor, Target]]) -> tuple[dict[str, Tensor], list[torch.Size], list[Target]]:
    """A batch as three tensors: each that a worker hands on takes shared memory and a file descriptor of its own."""
    images, targets = collate(items)
    packed = {name: torch.cat([target[name] for target in targets]) for name in ("boxes", "labels")}
    packed["pixels"] = torch.cat([image.flatten() for image in images])
    rest = [{**target, "boxes": len(target["boxes"]), "labels": len(target["labels"])} for target in targets]
    return packed, [image.shape for image in images], rest


def _unpack(batch: tuple[dict[str, Tensor], list[torch.Size], list[Target]]) -> tuple[list[Tensor], list[Target]]:
    packed, shapes, targets = batch
    pixels = packed["pixels"].split([math.prod(shape) for shape in shapes])
    for name in ("boxes", "labels"):
        parts = packed[name].split([target[name] for target in targets])
        targets = [{**target, name: part} for target, part in zip(targets, parts, strict=True)]
    return [part.view(shape) for part, shape in zip(pixels, shapes, strict=True)], targets


def load_batches(
    dataset: Dataset[tuple[Tensor, Target]], device: torch.device, workers: int, **order: Any
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Batches of a dataset, as `collate` makes them, loaded by that many processes (0: by this one).

    Args:
        dataset: a `CocoDetection`, or a part of one.
        device: where the batches will go; they stay on the CPU, in pinned memory for a GPU.
        workers: how many processes.
        order: batch_size or batch_sampler, as `torch.utils.data.DataLoader`.
    """
    loader = DataLoader(
        dataset,
        collate_fn=_pack,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # or it would draw from torch's own, which training depends on
        **order,
    )
    try:
        yield from map(_unpack, loader)
    except BaseException as error:
        # The error's frames would hold the loader's iterator, and so the workers, until the interpreter ends; then it
        # waits for them without telling them to end.
        traceback.clear_frames(error.__traceback__)
        raise


def _ignore_signals(worker: int) -> None:
    # Ctrl-C, torchrun and schedulers signal whole process groups; the process that loads for decides what that means.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
