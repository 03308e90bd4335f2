"""A photograph to explore: its detections, which of them is under a click, and the attention that found it.

The page of serve.py shows this. The model runs once on a photograph, and never again for clicks on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from smca_kernels.nn import SpatialPriorOutput

    from ..detector import SMCA

LONG_SIDE_OF_PICTURES = 1600  # larger photographs are shown smaller


@dataclass(frozen=True, eq=False)  # compared as a whole: it holds tensors
class Explored:
    """What one pass of the model over a photograph leaves."""

    size: tuple[int, int]  # (height, width) of the file
    picture: Tensor  # uint8 [3, H, W], as large as it is shown
    seen: Tensor  # uint8 [3, h, w], as the model takes it
    found: dict[str, Tensor]  # of `detect`, without a threshold
    attention: Callable[[Sequence[int]], tuple[list[Tensor], SpatialPriorOutput]]  # of chosen queries
    classes: Sequence[str]
    strides: tuple[int, ...]

    def count(self, threshold: float) -> int:
        """The number of detections of a score or more: they are the first ones."""
        return int((self.found["scores"] >= threshold).sum())

    def describe(self, i: int) -> str:
        """Class and score of a detection."""
        return f"{self.classes[int(self.found['labels'][i])]} {self.found['scores'][i]:.2f}"

    def position(self, index: Sequence[float]) -> tuple[float, float]:
        """The point (x, y) of the photograph, in its pixels, in the middle of a pixel (x, y) of `picture`."""
        (height, width), (rows, columns) = self.size, self.picture.shape[1:]
        return (index[0] + 0.5) * width / columns, (index[1] + 0.5) * height / rows


def explore(model: SMCA, file: Path) -> Explored:
    """Run a model over a photograph.

    Args:
        model: in evaluation mode; nothing else may run it meanwhile.
        file: of an image.

    Raises:
        DataError: for a file that can't be read, with its name, not its folder.
    """
    from ..data.images import DataError, load_image, resize
    from ..detect import detect
    from ..pictures import draw_boxes, keeping_attention

    try:
        image = load_image(file)
    except DataError as error:
        raise DataError(str(error).replace(str(file), file.name)) from None
    with keeping_attention(model) as attention:
        (found,) = detect(model, [image], threshold=0.0)
    shown = resize(image, LONG_SIDE_OF_PICTURES - 1, LONG_SIDE_OF_PICTURES) if _is_large(image) else image
    return Explored(
        size=(image.shape[1], image.shape[2]),
        # Enlarged where it is small, once: it then stays as large with boxes in it.
        picture=draw_boxes(shown, {"boxes": found["boxes"][:0]}, model.classes),
        seen=resize(image, *model.image_size),
        found=found,
        attention=attention,
        classes=model.classes,
        strides=tuple(model.config.strides),
    )


def _is_large(image: Tensor) -> bool:
    return max(image.shape[1:]) > LONG_SIDE_OF_PICTURES


def picture_of_boxes(explored: Explored, threshold: float) -> NDArray[np.uint8]:
    """The photograph with its detections of a score or more, uint8 [H, W, 3], as large as `picture`."""
    import torch

    from ..pictures import draw_boxes

    (height, width), (rows, columns) = explored.size, explored.picture.shape[1:]
    # The best one last, so that its name lies on top.
    found = {name: tensor[: explored.count(threshold)].flip(0) for name, tensor in explored.found.items()}
    found["boxes"] = found["boxes"] * torch.tensor([columns / width, rows / height] * 2)
    drawn: NDArray[np.uint8] = draw_boxes(explored.picture, found, explored.classes).movedim(0, -1).numpy()
    return drawn


def box_at(explored: Explored, point: tuple[float, float], threshold: float) -> int | None:
    """The detection of a score or more with the smallest box around a point; the best one of equals, None of none.

    Args:
        explored: the photograph.
        point: (x, y) in pixels of the photograph.
        threshold: least score.
    """
    boxes = explored.found["boxes"][: explored.count(threshold)]
    x, y = point
    inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
    around = inside.nonzero()[:, 0].tolist()
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    return min(around, key=lambda i: areas[i], default=None)


def picture_of_attention(explored: Explored, i: int) -> NDArray[np.uint8]:
    """Prior and attention of the query that found detection i, uint8 [H, W, 3].

    A row a scale; the columns are the prior, the attention of each head, and that of all heads times the scale's
    weight.
    """
    import numpy as np
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # pyplot has one state for all threads
    from matplotlib.patches import Rectangle

    from smca_kernels.pictures import EXPLANATION, POINT_COLOR, QueryAttention, draw_heads, draw_priors, draw_sums

    query = int(explored.found["queries"][i])
    maps, prior = explored.attention([query])
    attention = QueryAttention.of([each[:, 0] for each in maps], prior, 0, query, explored.strides)
    photograph = explored.seen.movedim(0, -1).numpy() / 255
    height, width = photograph.shape[:2]
    frame = (-0.5, width - 0.5, -0.5, height - 0.5)
    x, y = (prior.reference_logits[0, query].sigmoid().cpu() * torch.tensor([width, height])).tolist()
    x1, y1, x2, y2 = (explored.found["boxes"][i] * torch.tensor(explored.size).flip(0).reciprocal().repeat(2)).tolist()

    scales, heads = len(maps), len(maps[0])
    # Panels of the photograph's shape, though not of a strip's.
    row = 2.0 * min(max(height / width, 0.5), 2.0) + 0.45
    figure = Figure(figsize=(2.2 * (heads + 2) + 1.2, row * scales + 1.1), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.supxlabel(f"{EXPLANATION}\nPixels (px) are those the detector sees, {width} × {height}.", fontsize=9)
    grid = figure.add_gridspec(scales, heads + 2)
    for s, stride in enumerate(explored.strides):
        axes: Any = figure.add_subplot(grid[s, 0])
        draw_priors(axes, photograph, attention, s, (x, y))
        corner, sides = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
        axes.add_patch(Rectangle(corner, *sides, fill=False, color=POINT_COLOR, linewidth=1.5))
        axes.set_xlabel(f"stride {stride}", fontsize=9)
        if s == 0:
            axes.set_title("prior of each head", fontsize=12)
    draw_heads(figure, grid, photograph, attention, (x, y), frame)
    draw_sums(figure, grid, photograph, attention, (x, y), frame)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
