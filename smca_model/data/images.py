"""Images as the detector takes them: read from a file, resized, normalised."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from smca_kernels.pictures import MEAN, STD

from ..config import MAX_SIZE


class DataError(ValueError):
    """Data that can't be used; the message names the file.

    A DataLoader's worker passes an error on as one of the same class, with the text of its traceback as message: the
    last line of that says all.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("DataError: ")[-1])


def load_image(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W], RGB.

    Raises:
        DataError: when it can't be read, naming the file.
    """
    try:
        with Image.open(path) as image:
            return tv_tensors.Image(transforms.pil_to_tensor(image.convert("RGB")))
    # Broken PNGs raise SyntaxError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} can't be read: {error}") from None


def resize(image: Tensor, short: int, max_size: int | None = MAX_SIZE) -> Tensor:
    """An image [3, H, W] with the shorter side of that many pixels, or fewer where the longer would exceed max_size."""
    return transforms.resize(image, [short], max_size=max_size, antialias=True)


def normalize(image: Tensor) -> Tensor:
    """uint8 [3, H, W] → float32, as the model takes it: ImageNet's mean and deviation taken off each channel."""
    image = transforms.to_dtype(image, torch.float32, scale=True)
    return transforms.normalize(image, MEAN, STD).as_subclass(Tensor)


def format_size(height: int, width: int) -> str:
    """The size of an image, in words."""
    return f"{width} × {height} pixels"
