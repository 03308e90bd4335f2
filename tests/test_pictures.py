"""Pictures of co-attention: each panel shows the numbers that it says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from smca_kernels.pictures import QueryAttention, draw_heads, draw_priors, draw_sums

HEADS, STRIDES, GRIDS = 3, (8, 16), ((4, 6), (2, 3))
POINT, FRAME = (20.0, 12.0), (-0.5, 47.5, -0.5, 31.5)


def query(**changes: torch.Tensor | None) -> QueryAttention:
    arguments = {
        "attention": [torch.rand(HEADS, *grid) for grid in GRIDS],
        "center": 32 * torch.rand(HEADS, len(STRIDES), 2),
        "sigma": 4 + 8 * torch.rand(HEADS, len(STRIDES), 2),
        "scale_weights": torch.rand(len(STRIDES)),
    }
    return QueryAttention(**(arguments | changes), strides=STRIDES)


def panels(draw, each: QueryAttention) -> list:
    figure = Figure()
    draw(figure, figure.add_gridspec(len(STRIDES), HEADS + 2), torch.rand(32, 48, 3).numpy(), each, POINT, FRAME)
    return [axes for axes in figure.axes if axes.get_images()]  # colour bars have none


@pytest.mark.parametrize("weighted", [True, False])
def test_sums_are_over_heads_times_the_weight_of_the_scale_in_common_colours(weighted: bool) -> None:
    each = query() if weighted else query(scale_weights=None)
    shown = [axes.get_images()[-1] for axes in panels(draw_sums, each)]
    weights = each.scale_weights if weighted else torch.ones(len(STRIDES))
    expected = [weight * maps.sum(0) for weight, maps in zip(weights, each.attention, strict=True)]
    for image, sums in zip(shown, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(image.get_array().data), sums)
        assert image.norm.vmax == pytest.approx(float(max(one.max() for one in expected)))


def test_each_head_is_captioned_with_its_deviations() -> None:
    each = query()
    each.sigma[1, 0, 1] = torch.inf
    shown = panels(draw_heads, each)
    captions = [axes.get_xlabel() for axes in shown]
    x, y = each.sigma[2, 1].tolist()
    assert captions[HEADS + 2] == f"σ {x:.0f} × {y:.0f} px"
    assert captions[1] == "no prior"
    assert [axes.get_title() for axes in shown[:HEADS]] == ["head 1", "head 2", "head 3"]


def test_the_prior_is_lit_at_the_centre_and_has_an_ellipse_for_each_head_that_has_one() -> None:
    each = query(center=torch.tensor([10.0, 20.0]).expand(HEADS, len(STRIDES), 2), sigma=torch.full((HEADS, 2, 2), 3.0))
    axes = Figure().add_subplot()
    draw_priors(axes, torch.ones(32, 48, 3).numpy(), each, 0, POINT)
    lit = axes.get_images()[0].get_array()
    assert lit[20, 10].max() == pytest.approx(1.0)
    assert lit[20, 13].max() == pytest.approx(0.25 + 0.75 * torch.tensor(-0.5).exp().item())
    ellipses = [patch for patch in axes.patches if isinstance(patch, Ellipse)]
    assert [(*one.get_center(), one.width, one.height) for one in ellipses] == [(10.0, 20.0, 6.0, 6.0)] * HEADS

    flat = Figure().add_subplot()
    draw_priors(flat, torch.ones(32, 48, 3).numpy(), query(sigma=torch.full((HEADS, 2, 2), torch.inf)), 0, POINT)
    assert (flat.get_images()[0].get_array() == 1).all()
    assert not flat.patches
