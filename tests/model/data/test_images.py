"""Images as files hold them: every mode that Pillow reads, every orientation, any proportions; and what is refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

pytest.importorskip("torchvision")

from smca_model.data.images import (
    DataError,
    Header,
    load_annotated_image,
    load_image,
    read_header,
    resize,
    resized_size,
)

SHADES = np.array([[0, 51, 102], [153, 204, 255]])


def tiff(values: NDArray[np.generic], bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian TIFF file of one strip, of what Pillow doesn't write."""
    height, width = values.shape
    if bits == 12:
        numbers = values.reshape(height, -1).tolist()
        rows = ("".join(f"{v:012b}" for v in row).ljust(8 * ((12 * width + 7) // 8), "0") for row in numbers)
        data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    else:
        data = values.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


# ---------------------------------------------------------------------------------------------------------------- modes

EIGHT_BITS = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"]


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_images_of_8_bits_are_read_as_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 can't read the YCbCr that it writes itself")
    path = tmp_path / "image.tif"
    white = Image.new("RGB", (5, 4), (255, 255, 255))
    image = Image.new("LAB", (5, 4), (255, 128, 128)) if mode == "LAB" else white.convert(mode.replace("PA", "P"))
    image.convert(mode).save(path)
    with Image.open(path) as again:
        assert again.mode == mode.replace("RGBX", "RGB")
    read = load_image(path)
    assert (read.shape, read.dtype) == ((3, 4, 5), torch.uint8)
    assert read.min() >= (254 if mode == "LAB" else 255)  # a colour space of its own, whose numbers are rounded


def sixteen(order: str) -> NDArray[np.uint16]:
    return (SHADES * 257).astype(f"{order}u2")


def saved(values: NDArray[np.generic], form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, form)
    return file.getvalue()


MANY_BITS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png": ("I;16", lambda: saved(sixteen("<"), "PNG")),
    "tif": ("I;16", lambda: saved(sixteen("<"), "TIFF")),
    "big-endian tif": ("I;16B", lambda: saved(sixteen(">"), "TIFF")),
    "jp2": ("I;16", lambda: saved(sixteen("<"), "JPEG2000")),
    "pgm": ("I", lambda: b"P5 3 2 65535\n" + sixteen(">").tobytes()),
    "pgm of 12 bits": ("I", lambda: b"P5 3 2 4080\n" + (SHADES * 16).astype(">u2").tobytes()),
    "tif of 12 bits": ("I;16", lambda: tiff(np.rint(SHADES * 4095 / 255).astype(int), 12)),
    "tif, white is 0": ("I;16", lambda: tiff(sixteen("<")[::-1, ::-1].copy(), 16, photometric=0)),
    "float tif": ("F", lambda: saved((SHADES / 255).astype(np.float32), "TIFF")),
    "float tif, white is 0": ("F", lambda: tiff((1 - SHADES / 255).astype("<f4"), 32, 0, 3)),
    "pfm": ("F", lambda: b"Pf\n3 2\n-1.0\n" + (SHADES[::-1] / 255).astype("<f4").tobytes()),
}


@pytest.mark.parametrize("case", MANY_BITS)
def test_images_of_more_than_8_bits_keep_their_shades(tmp_path: Path, case: str) -> None:
    mode, content = MANY_BITS[case]
    path = tmp_path / "image"
    path.write_bytes(content())
    with Image.open(path) as image:
        assert image.mode == mode
    assert load_image(path).tolist() == [SHADES.tolist()] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff((SHADES * 2**23).astype("<u4"), 32), "have no range .* these are 0 to 2139095040"),
        (tiff((SHADES - 7).astype("<i4"), 32, 1, 2), "have no range .* these are -7 to 248"),
        (tiff((SHADES - 7).astype("<i2"), 16, 1, 2), "have no range .* these are -7 to 248"),
        (tiff(SHADES.astype("<f4"), 32, 1, 3), r"floats must be 0 \(black\) to 1 \(white\), got 0 to 255"),
        (tiff((SHADES / 255 - 1).astype("<f4"), 32, 1, 3), "floats must be .* got -1 to 0"),
        (tiff(np.where(SHADES, SHADES / 255, np.nan).astype("<f4"), 32, 1, 3), "floats must be .* got nan to nan"),
    ],
)
def test_values_of_an_unknown_range_are_refused_with_the_files_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^image .*image\.tif can't be read: .*{message}"):
        load_image(path)


# ---------------------------------------------------------------------------------------------------------- orientation

STORED = np.arange(1, 7, dtype=np.uint8).reshape(2, 3) * 40
# What EXIF says of an image as stored: where its first row and its first column are in the upright one.
UPRIGHT = {
    1: STORED,  # top, left
    2: STORED[:, ::-1],  # top, right
    3: STORED[::-1, ::-1],  # bottom, right
    4: STORED[::-1],  # bottom, left
    5: STORED.T,  # left, top
    6: STORED.T[:, ::-1],  # right, top
    7: STORED.T[::-1, ::-1],  # right, bottom
    8: STORED.T[::-1],  # left, bottom
}


def write_oriented(path: Path, orientation: object, pixels: NDArray[np.uint8] = STORED) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).convert("RGB").save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_read_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = load_image(write_oriented(tmp_path / f"image.{suffix}", orientation))
    assert image[0].tolist() == UPRIGHT[orientation].tolist()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_photographs_of_lossy_formats_are_read_upright(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((16, 48), np.uint8)
    pixels[:, :16] = 255
    image = load_image(write_oriented(tmp_path / f"image.{suffix}", 6, pixels))
    assert image.shape == (3, 48, 16)
    assert image[:, :12].min() > 200
    assert image[:, 20:].max() < 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_header_has_the_upright_size_and_the_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = write_oriented(tmp_path / f"image.{suffix}", orientation)
    height, width = UPRIGHT[orientation].shape
    assert read_header(path) == Header(height, width, orientation)


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_orientation_of_a_png_is_read_wherever_it_is(tmp_path: Path, place: str) -> None:
    path = write_oriented(tmp_path / "image.png", 6)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    if place == "after":
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])  # IEND has 12 bytes
    assert read_header(path) == Header(*UPRIGHT[6].shape, 6)
    assert load_image(path)[0].tolist() == UPRIGHT[6].tolist()


@pytest.mark.parametrize("content", [b"", b"GIF89a, or is it?", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_header_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^image .*image\.png can't be read: .+"):
        read_header(path)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"\0", 0, 9, 300])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_and_orientations_that_are_none_turn_nothing(tmp_path: Path, exif: bytes | int) -> None:
    path = tmp_path / "image.png"
    if isinstance(exif, int):
        write_oriented(path, exif)
    else:
        Image.fromarray(STORED).save(path, exif=exif)
    assert load_image(path)[0].tolist() == STORED.tolist()
    assert read_header(path) == Header(*STORED.shape, 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_annotated_size_says_which_form_boxes_are_in(tmp_path: Path, orientation: int, suffix: str) -> None:
    path, where = write_oriented(tmp_path / f"image.{suffix}", orientation), tmp_path / "val.json"
    upright = UPRIGHT[orientation]
    for either in (False, True):
        image = load_annotated_image(path, (2, 3), annotations=where, upright=either)
        # Where both forms have the size, that as stored unless told otherwise.
        expected = upright if either and upright.shape == (2, 3) else STORED
        assert image[0].tolist() == expected.tolist()
        if orientation > 4:
            image = load_annotated_image(path, (3, 2), annotations=where, upright=either)
            assert image[0].tolist() == upright.tolist()


def test_squares_are_taken_as_stored_unless_told_otherwise(tmp_path: Path) -> None:
    path, where = write_oriented(tmp_path / "image.png", 6, STORED[:, :2]), tmp_path / "val.json"
    assert load_annotated_image(path, (2, 2), annotations=where)[0].tolist() == STORED[:, :2].tolist()
    upright = load_annotated_image(path, (2, 2), annotations=where, upright=True)
    assert upright[0].tolist() == STORED[:, :2].T[:, ::-1].tolist()


def test_a_size_of_neither_form_is_refused_with_a_word_about_exif(tmp_path: Path) -> None:
    path = write_oriented(tmp_path / "image.png", 6)
    with pytest.raises(
        DataError,
        match=r"^image .*image\.png must be of the size in val\.json, 2 × 5 pixels, got 3 × 2 pixels, "
        "or 2 × 3 pixels turned as its EXIF orientation 6 says$",
    ):
        load_annotated_image(path, (5, 2), annotations=Path("val.json"))


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (640, 361), (333, 500), (500, 500), (7, 900), (81, 1337)])
@pytest.mark.parametrize("short", [480, 800, 3])
def test_sizes_are_those_of_torchvision_where_it_has_one(size: tuple[int, int], short: int) -> None:
    from torchvision.transforms.v2 import functional as transforms

    image = torch.zeros(3, *size, dtype=torch.uint8)
    expected = transforms.resize(image, [short], max_size=1333).shape[1:]
    assert resize(image, short, 1333).shape[1:] == resized_size(size, short, 1333) == expected


# -------------------------------------------------------------------------------------------------------- broken images


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode\n  frame 0"), KeyError(), struct.error("2 bytes")])
def test_whatever_a_decoder_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(image: ImageFile.ImageFile) -> None:
        raise error

    path = tmp_path / "image.png"
    Image.new("RGB", (5, 4)).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DataError, match=r"^image .*image\.png can't be read: (Failed to decode frame 0|KeyError|2 b)"):
        load_image(path)


def test_a_broken_avif_is_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    try:
        Image.effect_noise((64, 48), 80).convert("RGB").save(file, "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow has no AVIF")
    content, path = file.getvalue(), tmp_path / "image.avif"
    start = content.index(b"mdat") + 8
    path.write_bytes(content[:start] + bytes(len(content) - start))
    with pytest.raises(DataError, match=r"^image .*image\.avif can't be read: .+"):
        load_image(path)
