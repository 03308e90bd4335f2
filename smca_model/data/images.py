"""Images as the detector takes them: read from a file, resized, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from smca_kernels.pictures import MEAN, STD

from ..config import MAX_SIZE

# Tags of TIFF and EXIF, and a value.
WIDTH, HEIGHT, BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 262, 274
WHITE_IS_ZERO = 0
# For each orientation but 1, how an image as stored becomes upright, and back.
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FROM_UPRIGHT = TO_UPRIGHT | {6: TO_UPRIGHT[8], 8: TO_UPRIGHT[6]}
SWAPPED = {5, 6, 7, 8}  # orientations of which the upright image is as wide as the stored one is high
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# How chunks of a PNG begin that can hold an orientation: their kind, and for texts their keyword.
PNG_ORIENTATION = (b"eXIf", *(kind + b"Raw profile type exif" for kind in (b"tEXt", b"zTXt")), b"iTXtXML:com.adobe.xmp")


class DataError(ValueError):
    """Data that can't be used; the message names the file.

    A DataLoader's worker passes an error on as one of the same class, with the text of its traceback as message: the
    last line of that says all.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("DataError: ")[-1])


def load_image(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W], RGB, upright: turned as its EXIF orientation says.

    Whole numbers of 16 bits are scaled to 8, floats of 0…1 to 0…255.

    Raises:
        DataError: when it can't be read, or has values of an unknown range, naming the file.
    """
    stored, orientation = _read(path)
    return _to_tensor(_turn(stored, orientation))


def load_annotated_image(path: Path, size: tuple[int, int], *, annotations: object, upright: bool = False) -> Tensor:
    """An image file as `load_image` reads it, in the form that its boxes are in, as stored or upright.

    Args:
        path: the file.
        size: height and width that it is annotated with, which say what form that is.
        annotations: where, for messages.
        upright: take the upright form where both have that size: squares, half turns and mirror images. COCO's tools
            know no EXIF, so the default is the form as stored.

    Raises:
        DataError: as `load_image`, and for an image that has the size in neither form.
    """
    stored, orientation = _read(path)
    turned = _turn(stored, orientation)
    forms = [form for form in (stored, turned) if (form.height, form.width) == size]
    if not forms:
        got = format_size(stored.height, stored.width)
        if orientation in TO_UPRIGHT:
            got += f", or {format_size(turned.height, turned.width)} turned as its EXIF orientation {orientation} says"
        raise DataError(f"image {path} must be of the size in {annotations}, {format_size(*size)}, got {got}")
    return _to_tensor(forms[-1 if upright else 0])


@dataclass(frozen=True)
class Header:
    """What the start of an image file says: height and width of the upright image, and the EXIF orientation."""

    height: int
    width: int
    orientation: int  # 1 to 8; 1 is upright as stored


def read_header(path: Path) -> Header:
    """The size and orientation of an image file, without decoding it.

    Raises:
        DataError: when it can't be read, naming the file.
    """
    try:
        with Image.open(path) as image, open(path, "rb") as file:
            tags = getattr(image, "tag_v2", {})
            if tags:  # of a TIFF, whose size Pillow gives as stored or upright, depending on its version
                width, height, orientation = tags[WIDTH], tags[HEIGHT], tags.get(ORIENTATION, 1)
            else:
                # To ask a PNG for an orientation that is not at its start is to decode it.
                asked = image.format != "PNG" or "exif" in image.info or _may_be_turned(file)
                width, height, orientation = *image.size, _orientation(image) if asked else 1
    except Exception as error:
        raise _unreadable(path, error) from None
    if orientation in SWAPPED:
        width, height = height, width
    return Header(height, width, orientation if orientation in TO_UPRIGHT else 1)


def _may_be_turned(file: IO[bytes]) -> bool:
    """Whether a PNG file has an orientation anywhere, perhaps behind its pixels; they are skipped."""
    longest = max(map(len, PNG_ORIENTATION))
    position = len(PNG_SIGNATURE)
    file.seek(position)
    while len(start := file.read(4 + longest)) > 8:
        if start[4:].startswith(PNG_ORIENTATION):
            return True
        position += 12 + int.from_bytes(start[:4], "big")
        file.seek(position)
    return False


def _read(path: Path) -> tuple[Image.Image, int]:
    """An image file in RGB as it is stored, and its EXIF orientation."""
    try:
        with Image.open(path) as image:
            # Pillow turns TIFFs, and those alone, by itself; the tag is gone then.
            of_tiff = getattr(image, "tag_v2", {}).get(ORIENTATION)
            rgb, orientation = _to_rgb(image), _orientation(image)
            if of_tiff in TO_UPRIGHT and orientation != of_tiff:
                return rgb.transpose(FROM_UPRIGHT[of_tiff]), of_tiff
            return rgb, orientation
    # Whatever a decoder raises: SyntaxError for broken PNGs, RuntimeError for AVIFs, others for other formats.
    except Exception as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    told = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"image {path} can't be read: {told}")


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF around a sound image
        return 1
    return orientation if isinstance(orientation, int) and orientation in TO_UPRIGHT else 1


def _turn(stored: Image.Image, orientation: int) -> Image.Image:
    return stored.transpose(TO_UPRIGHT[orientation]) if orientation in TO_UPRIGHT else stored


def _to_tensor(image: Image.Image) -> Tensor:
    return tv_tensors.Image(transforms.pil_to_tensor(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB; modes of more than 8 bits, which Pillow would cut off at 255, scaled by their range."""
    image.load()
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))  # 12 in some TIFFs
        values, white = np.asarray(image).astype(np.float32), np.float32(2 ** bits[0] - 1)
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow heeds for 8 bits only
            values = white - values
        return _gray(values / white)
    if image.mode == "I":
        # PNG's and PPM's have 16 bits; elsewhere whole numbers of 32 bits are measurements rather than shades.
        if image.format not in ("PNG", "PPM"):
            low, high = image.getextrema()
            raise ValueError(
                "whole numbers of 32 bits, or signed ones, have no range that is known to be black to white; these are "
                f"{low} to {high}"
            )
        return _gray(np.asarray(image).astype(np.float32) / 65535)
    if image.mode == "F":
        values = np.asarray(image)
        if not ((values >= 0) & (values <= 1)).all():  # not true for NaN either
            raise ValueError(f"floats must be 0 (black) to 1 (white), got {values.min():g} to {values.max():g}")
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            values = 1 - values
        return _gray(values)
    if image.mode in ("RGBa", "La"):  # colours multiplied by the opacity
        image = image.convert(image.mode[:-1] + "A")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is not done in place
        return converted
    return image.convert("RGB")


def _gray(values: NDArray[np.floating[Any]]) -> Image.Image:
    """An RGB image of shades from 0 to 1."""
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def resized_size(size: Sequence[int], short: int, max_size: int) -> tuple[int, int]:
    """The height and width of an image of a size after `resize`: DETR's rounding down, but no side below 1."""
    height, width = size
    least, most = min(height, width), max(height, width)
    new_least, new_most = short, int(short * most / least)
    if new_most > max_size:
        new_least, new_most = max(1, int(max_size * short / new_most)), max_size
    return (new_least, new_most) if height <= width else (new_most, new_least)


def resize(image: Tensor, short: int, max_size: int = MAX_SIZE) -> Tensor:
    """An image [3, H, W] with the shorter side of that many pixels, or fewer where the longer would exceed max_size."""
    return resize_to(image, resized_size(image.shape[1:], short, max_size))


def resize_to(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image [3, H, W] with that height and width."""
    return transforms.resize(image, list(size), antialias=True)


def normalize(image: Tensor) -> Tensor:
    """uint8 [3, H, W] → float32, as the model takes it: ImageNet's mean and deviation taken off each channel."""
    image = transforms.to_dtype(image, torch.float32, scale=True)
    return transforms.normalize(image, MEAN, STD).as_subclass(Tensor)


def format_size(height: int, width: int) -> str:
    """The size of an image, in words."""
    return f"{width} × {height} pixels"
