"""Pictures of co-attention: where one object query looks, per head and scale, over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from smca_kernels.nn import SpatialPriorOutput

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel
POINT_COLOR, PRIOR_COLOR, HEAT = "#00e5ff", "#ffffff", "inferno"
EXPLANATION = (
    "Star: the query's reference point. Ellipses: its prior at one and two standard deviations, "
    "around the centre (+) that each head shifts for itself.\n"
    "Colour: attention P over the cells of one scale, where it sums to 1. Weight: of the scale, for this query."
)


@dataclass(frozen=True)
class QueryAttention:
    """Where one query of one image looks: S scales, H heads."""

    attention: list[Tensor]  # S × [H, rows, columns], without padded cells
    center: Tensor  # [H, S, 2], (x, y) in pixels
    sigma: Tensor  # [H, S, 2] in pixels; infinite where there is no prior
    scale_weights: Tensor | None  # [S]
    strides: tuple[int, ...]  # pixels per cell

    @classmethod
    def of(
        cls, attention: list[Tensor], prior: SpatialPriorOutput, image: int, query: int, strides: tuple[int, ...]
    ) -> QueryAttention:
        """From the attention over each scale S × [H, rows, columns], and the prior of all images and queries."""
        import torch

        pixels = torch.tensor([float(stride) for stride in strides])[:, None]
        heads = len(attention[0])
        center = prior.center[image, :, query].detach().float().cpu().expand(heads, -1, -1)
        precision = prior.precision[image, :, query].detach().float().cpu().expand(heads, -1, -1)
        weights = prior.scale_weights
        return cls(
            attention=[each.detach().float().cpu() for each in attention],
            center=center * pixels,
            sigma=pixels / (2 * precision).sqrt(),
            scale_weights=None if weights is None else weights[image, 0, query].detach().float().cpu(),
            strides=strides,
        )


def displayable(image: Tensor) -> Any:
    """A normalised image [3, h, w] as an array [h, w, 3] of 0…1."""
    import torch

    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (image.cpu() * std + mean).clamp(0, 1).movedim(0, -1).numpy()


def window(point: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """A square around a point, inside the image, as (left, right, top, bottom)."""
    side = 0.8 * min(width, height)
    left = min(max(point[0] - side / 2, 0), width - side)
    top = min(max(point[1] - side / 2, 0), height - side)
    return left, left + side, top, top + side


def draw_heads(
    block: Any,
    grid: Any,
    photograph: Any,
    query: QueryAttention,
    point: tuple[float, float],
    frame: tuple[float, float, float, float],
) -> None:
    """Attention (colour) and prior (ellipses) of one query in the panels of a grid: a row a scale, a column a head.

    Args:
        block: matplotlib's figure or subfigure.
        grid: its GridSpec, S rows and 1 + H columns; the first column is left alone.
        photograph: [h, w, 3] in 0…1.
        query: what to draw.
        point: the query's reference point in pixels.
        frame: (left, right, top, bottom) of what the panels show, in pixels.
    """
    for s, (stride, maps) in enumerate(zip(query.strides, query.attention, strict=True)):
        row = [block.add_subplot(grid[s, h + 1]) for h in range(len(maps))]
        for h, axes in enumerate(row):
            heat = _draw_attention(axes, photograph, maps[h], float(maps.max()), stride)
            _draw_prior(axes, query.center[h, s].tolist(), query.sigma[h, s].tolist())
            axes.plot(*point, "*", color=POINT_COLOR, markersize=9, markeredgecolor="black", markeredgewidth=0.6)
            axes.set(xlim=frame[:2], ylim=frame[:1:-1], xticks=[], yticks=[])
            axes.set_xlabel(_format_sigma(query.sigma[h, s].tolist()), fontsize=9)
            if s == 0:
                axes.set_title(f"head {h + 1}", fontsize=12)
        rows, columns = maps.shape[1:]
        weight = "" if query.scale_weights is None else f"\nweight {query.scale_weights[s]:.2f}"
        row[0].set_ylabel(f"stride {stride}\n{rows} × {columns} cells{weight}", fontsize=11)
        bar = block.colorbar(heat, ax=row, pad=0.01, aspect=12)
        bar.set_label("attention P", fontsize=10)


def draw_sums(
    block: Any,
    grid: Any,
    photograph: Any,
    query: QueryAttention,
    point: tuple[float, float],
    frame: tuple[float, float, float, float],
) -> None:
    """The attention of all heads together, times the weight of its scale, in the last column of a grid.

    Colours mean the same in every row, so that scales can be compared.

    Args:
        As `draw_heads`, for a grid of one more column.
    """
    weights = [1.0] * len(query.strides) if query.scale_weights is None else query.scale_weights.tolist()
    sums = [weight * maps.sum(0) for weight, maps in zip(weights, query.attention, strict=True)]
    largest = max(float(each.max()) for each in sums)
    for s, (stride, each) in enumerate(zip(query.strides, sums, strict=True)):
        axes = block.add_subplot(grid[s, -1])
        heat = _draw_attention(axes, photograph, each, largest, stride)
        axes.plot(*point, "*", color=POINT_COLOR, markersize=9, markeredgecolor="black", markeredgewidth=0.6)
        axes.set(xlim=frame[:2], ylim=frame[:1:-1], xticks=[], yticks=[])
        if s == 0:
            axes.set_title("all heads", fontsize=12)
        block.colorbar(heat, ax=axes, pad=0.03, aspect=12).set_label("weight · Σ P", fontsize=10)


def draw_priors(axes: Any, photograph: Any, query: QueryAttention, scale: int, point: tuple[float, float]) -> None:
    """The prior of one query at one scale over a photograph: an ellipse a head, lit where a head looks.

    Args:
        axes: matplotlib's.
        photograph: [h, w, 3] in 0…1.
        query: whose prior it is.
        scale: index of the scale.
        point: the query's reference point in pixels.
    """
    import matplotlib
    import torch
    from matplotlib.patches import Ellipse

    height, width = photograph.shape[:2]
    x, y = torch.arange(width), torch.arange(height)[:, None]
    center, sigma = query.center[:, scale, :, None, None], query.sigma[:, scale, :, None, None]  # [H, 2, 1, 1]
    distance = ((x - center[:, 0]) / sigma[:, 0]) ** 2 + ((y - center[:, 1]) / sigma[:, 1]) ** 2
    light = (-distance / 2).exp().amax(0)  # of the head that looks there most
    axes.imshow(photograph * (0.25 + 0.75 * light[..., None].numpy()))
    for h, (middle, deviation) in enumerate(zip(query.center[:, scale], query.sigma[:, scale], strict=True)):
        if not deviation.isfinite().all():
            continue
        color = matplotlib.colormaps["Set3"](h)
        axes.add_patch(Ellipse(middle.tolist(), *(2 * deviation).tolist(), fill=False, color=color, linewidth=1.8))
        axes.plot(*middle.tolist(), "+", color=color, markersize=8, markeredgewidth=1.8)
    axes.plot(*point, "*", color=POINT_COLOR, markersize=14, markeredgecolor="black")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])


def _format_sigma(sigma: Sequence[float]) -> str:
    """The standard deviations of a prior along x and y, in words."""
    if not all(map(math.isfinite, sigma)):
        return "no prior"
    return f"σ {sigma[0]:.0f} × {sigma[1]:.0f} px"


def _draw_attention(axes: Any, photograph: Any, attention: Tensor, largest: float, stride: int) -> Any:
    """Attention [rows, columns] in colour over a grey photograph; cell (x, y) is at pixel stride · (x, y)."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    rows, columns = attention.shape
    axes.imshow(photograph.mean(-1) * 0.75, cmap="gray", vmin=0, vmax=1)
    edges = (-0.5 * stride, (columns - 0.5) * stride, (rows - 0.5) * stride, -0.5 * stride)
    # On a linear scale a wide prior would be invisible beside a narrow one.
    shade = PowerNorm(0.5, vmin=0, vmax=largest)
    opacity = (attention / largest).sqrt().clamp(0, 0.9).numpy()
    axes.imshow(attention.numpy(), cmap=HEAT, norm=shade, alpha=opacity, extent=edges)
    # The overlay carries its opacity along; the colour bar must not.
    return ScalarMappable(shade, HEAT)


def _draw_prior(axes: Any, center: list[float], sigma: list[float]) -> None:
    """The prior's contours at one and two standard deviations, all in pixels; nothing where it is infinitely wide."""
    from matplotlib.patches import Ellipse

    if not all(map(math.isfinite, sigma)):
        return
    for deviations, style in ((1, "-"), (2, "--")):
        width, height = (2 * deviations * s for s in sigma)
        axes.add_patch(Ellipse((center[0], center[1]), width, height, fill=False, color=PRIOR_COLOR, linestyle=style))
    axes.plot(*center, "+", color=PRIOR_COLOR, markersize=6)
