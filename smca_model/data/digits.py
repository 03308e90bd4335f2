"""`smca data digits`: a small detection set of real pixels, made in seconds from what two libraries ship.

Real digits, synthetic placement: scikit-learn's scans of handwritten digits (8×8 pixels, 1797 of them), enlarged to
random sizes and drawn on crops of scikit-image's photographs of brick, grass and gravel. No digit and no part of a
photograph is in both splits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.tools.arguments import check_packages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTURES = ("brick", "grass", "gravel")  # 512×512, grey
MAX_DIGITS = 5
SIDE = (1 / 6, 5 / 12)  # of a digit's square, in parts of the scene's side: 16 to 40 of 96 pixels
HELD_OUT = 0.2  # of the digits
VISIBLE = 0.3  # opacity from which a pixel belongs to the stroke, and so to the box
MAX_OVERLAP = 0.1  # part of the smaller box that another may cover
ATTEMPTS = 20  # to place a digit where it doesn't overlap
MIN_SCENE_SIZE, MAX_SCENE_SIZE = 48, 256  # scenes: a digit of 8 pixels still reads, and half a photograph is 256 wide
TEXTURE_CONTRAST = 0.5  # of the photograph; at full contrast its own light and dark hide the digits

PURPOSE = (
    "real digits, synthetic placement: scikit-learn's scans of handwritten digits at random sizes on "
    "scikit-image's photographs of brick, grass and gravel, as a folder in COCO's format"
)

README = """# Handwritten digits on photographs of textures

**Real digits, synthetic placement.** {train} scenes to train on and {val} held out, {size} × {size} pixels,
1 to {most} digits each, in COCO's format. Made by `smca data digits` with seed {seed}.

- Digits: scans of handwriting from the UCI "Optical Recognition of Handwritten Digits" set, 8 × 8 pixels, as
  scikit-learn ships them (`sklearn.datasets.load_digits`), enlarged to random sizes. Each scan is in one split only.
- Backgrounds: photographs of brick, grass and gravel, as scikit-image ships them (`skimage.data`), at half contrast;
  train takes its crops from their left halves, val from their right halves.
- Boxes are tight around the visible strokes.
"""


def make_digits(
    out: Path, *, train: int = 4000, val: int = 500, size: int = 96, seed: int = 0, progress: bool = True
) -> None:
    """Write a data folder of scenes with digits; it appears under its name once it is whole.

    Args:
        out: folder to make; it must not exist, or be empty.
        train, val: scenes of each split.
        size: side of a scene in pixels, 48 to 256.
        seed: of everything random. Scene i of a split doesn't depend on how many there are.
        progress: show a bar for each split.

    Raises:
        ValueError: for a number out of range and a folder that can't be made or has something in it.
    """
    for name, count in (("train", train), ("val", val)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1 scene, got {count}")
    if not MIN_SCENE_SIZE <= size <= MAX_SCENE_SIZE:
        raise ValueError(f"size must be {MIN_SCENE_SIZE} to {MAX_SCENE_SIZE} pixels, got {size}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix="."))
    except OSError as error:
        raise ValueError(f"out must be in a folder that can be written, got {out} ({error})") from None
    try:
        folder = temporary / "data"  # as the umask says, which the folder around it is not
        (folder / "annotations").mkdir(parents=True)
        for split, count in (("train", train), ("val", val)):
            _write_split(folder, split, count, size, seed, progress)
        text = README.format(train=train, val=val, size=size, seed=seed, most=MAX_DIGITS)
        (folder / "README.md").write_text(text, encoding="utf-8")
        folder.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_split(folder: Path, split: str, count: int, size: int, seed: int, progress: bool) -> None:
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    digits, numerals, textures = load_sources(split, seed)
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in tqdm(range(count), desc=f"{split} scenes", unit="scene", disable=not progress):
        rng = np.random.default_rng((seed, split == "val", i))
        scene, boxes, chosen = make_scene(rng, digits, textures, size)
        name = f"{i:06d}.png"
        Image.fromarray(scene).save(folder / split / name, compress_level=1)
        images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
        for box, instance in zip(boxes, chosen, strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": int(numerals[instance]) + 1}
            annotations.append(annotation | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    data = {
        "info": {
            "description": "Real digits, synthetic placement: handwritten digits (scikit-learn) on photographs of "
            "textures (scikit-image)",
            "seed": seed,
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(data), encoding="utf-8")


def load_sources(split: str, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64], list[NDArray[np.float32]]]:
    """The digits [n, 8, 8] in 0…1 (1 is ink) and what they say [n], and the textures' halves [512, 256], of a split."""
    import numpy as np
    import skimage.data
    from sklearn.datasets import load_digits

    source = load_digits()
    order = np.random.default_rng(seed).permutation(len(source.target))
    held_out = round(HELD_OUT * len(order))
    mine = order[:held_out] if split == "val" else order[held_out:]
    half = slice(MAX_SCENE_SIZE, None) if split == "val" else slice(None, MAX_SCENE_SIZE)
    textures = [getattr(skimage.data, name)()[:, half].astype(np.float32) / 255 for name in TEXTURES]
    return source.images[mine].astype(np.float32) / 16, source.target[mine], textures


def make_scene(
    rng: np.random.Generator, digits: NDArray[np.float32], textures: list[NDArray[np.float32]], size: int
) -> tuple[NDArray[np.uint8], list[list[int]], list[int]]:
    """A grey scene [size, size], the digits' boxes (x, y, width, height in pixels), and which digits they are."""
    import numpy as np
    from PIL import Image

    texture = textures[rng.integers(len(textures))]
    top, left = (int(rng.integers(side - size + 1)) for side in texture.shape)
    scene = texture[top : top + size, left : left + size]
    level = float(scene.mean())
    scene = level + TEXTURE_CONTRAST * (scene - level)
    boxes: list[list[int]] = []
    chosen: list[int] = []
    for _ in range(int(rng.integers(1, MAX_DIGITS + 1))):
        instance = int(rng.integers(len(digits)))
        side = int(rng.integers(round(SIDE[0] * size), round(SIDE[1] * size) + 1))
        enlarged = Image.fromarray(digits[instance]).resize((side, side), Image.Resampling.BICUBIC)
        opacity = np.clip(np.asarray(enlarged), 0, 1)
        rows, columns = (np.flatnonzero((opacity >= VISIBLE).any(axis)) for axis in (1, 0))
        width, height = int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)
        for _ in range(ATTEMPTS):
            x, y = (int(rng.integers(size - side + 1)) for _ in range(2))
            box = [x + int(columns[0]), y + int(rows[0]), width, height]
            if all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
                # Light ink on a dark ground and dark ink on a light one.
                ink = rng.uniform(0.85, 1.0) if level < 0.5 else rng.uniform(0.0, 0.15)
                part = scene[y : y + side, x : x + side]
                scene[y : y + side, x : x + side] = part + opacity * (ink - part)
                boxes.append(box)
                chosen.append(instance)
                break
    return np.round(255 * np.clip(scene, 0, 1)).astype(np.uint8), boxes, chosen


def _overlap(one: list[int], other: list[int]) -> float:
    """The area that two boxes share, as part of the smaller one's."""
    shared = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    return max(shared[0], 0) * max(shared[1], 0) / min(one[2] * one[3], other[2] * other[3])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca data digits`."""
    parser.description = f"{PURPOSE[0].upper()}{PURPOSE[1:]}."
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; must be new or empty")
    add("--train", type=int, default=4000, metavar="N", help="scenes to train on (default: %(default)s)")
    add("--val", type=int, default=500, metavar="N", help="scenes held out (default: %(default)s)")
    add("--size", type=int, default=96, metavar="PX", help="side of a scene (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """`smca data digits`: exit status 0.

    Raises:
        ValueError: when it can't start.
    """
    check_packages(("sklearn", "skimage", "PIL", "tqdm"), "model,demo")
    make_digits(args.out, train=args.train, val=args.val, size=args.size, seed=args.seed)
    print(f"{args.out}: {args.train} scenes to train on, {args.val} held out. Real digits, synthetic placement.")
    return 0
