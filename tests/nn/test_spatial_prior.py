"""The spatial prior against equations 3, 4 and 7 by hand: shapes, width at the start, offsets, unnormalised centres."""

from __future__ import annotations

import itertools

import pytest
import torch
from by_hand import prior_by_hand
from small_layers import EMBED_DIM, HEADS, QUERIES, SHAPES, STRIDES, assert_same, padding_mask, randomised
from torch import nn

from smca_kernels.nn import GEOMETRIES, MODULATIONS, SCALE_TYPES, SpatialPrior

OPTIONS = list(itertools.product(GEOMETRIES, MODULATIONS, SCALE_TYPES))


@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_prior_equals_the_equations_written_out(geometry: str, modulation: str, scale_type: str) -> None:
    strides = (8, 32, 48)
    options = {"geometry": geometry, "modulation": modulation, "scale_type": scale_type, "beta": 5.0}
    prior = randomised(SpatialPrior(EMBED_DIM, HEADS, strides, **options)).double()
    features, sizes = torch.randn(2, QUERIES, EMBED_DIM).double(), torch.tensor([[75, 130], [200, 91]])
    actual = prior(features, ((25, 17), (7, 5), (5, 3)), image_sizes=sizes)
    for b, n in itertools.product(range(2), range(QUERIES)):
        height, width = sizes[b].tolist()
        cells = torch.tensor([[width, height]]).double() / torch.tensor(strides).double()[:, None]
        expected = prior_by_hand(prior, features[b, n], cells)
        assert_same(actual.center[b, :, n], expected["center"])
        assert_same(actual.precision[b, :, n], expected["precision"])
        assert_same(actual.scale_weights[b, 0, n], expected["scale_weights"])
        assert_same(actual.reference_logits[b, n], expected["reference_logits"])


@pytest.mark.parametrize("scales", [1, 2, 8])
@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_outputs_have_the_documented_shapes(geometry: str, modulation: str, scale_type: str, scales: int) -> None:
    strides = [4 * 2**s for s in range(scales)]
    prior = SpatialPrior(EMBED_DIM, HEADS, strides, geometry=geometry, modulation=modulation, scale_type=scale_type)
    output = prior(torch.randn(2, QUERIES, EMBED_DIM), [(3, 4)] * scales)
    maps = HEADS if modulation == "per_head" else 1
    assert output.center.shape == output.precision.shape == (2, maps, QUERIES, scales, 2)
    assert output.reference_logits.shape == (2, QUERIES, 2)
    if scales == 1:
        assert output.scale_weights is None
    else:
        assert output.scale_weights.shape == (2, 1, QUERIES, scales)


def test_without_scale_selection_there_are_no_scale_weights() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, scale_selection=False)
    assert prior(torch.randn(1, QUERIES, EMBED_DIM), SHAPES).scale_weights is None


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("modulation", ["shared", "per_head"])
@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_sigma_is_two_cells_at_the_start(geometry: str, modulation: str, scale_type: str) -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, (16,), geometry=geometry, modulation=modulation, scale_type=scale_type)
    precision = prior(torch.randn(2, QUERIES, EMBED_DIM), SHAPES[:1]).precision
    sigma = (2 * precision) ** -0.5
    torch.testing.assert_close(sigma, torch.full_like(sigma, 2.0))


def test_official_precision_grows_with_the_stride_of_several_scales() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, (16, 32, 64), geometry="official")
    precision = prior(torch.randn(1, 1, EMBED_DIM), [(4, 4)] * 3).precision
    torch.testing.assert_close(precision[0, 0, 0, :, 0], torch.tensor([0.5, 1.0, 2.0]) / 8)


def test_paper_precision_stays_finite_where_the_object_scale_is_zero() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, geometry="paper")
    nn.init.zeros_(prior.object_scale.bias)
    precision = prior(torch.randn(1, QUERIES, EMBED_DIM), SHAPES[:1]).precision
    precision.sum().backward()
    assert precision.isfinite().all()
    assert prior.object_scale.bias.grad.isfinite().all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_head_offsets_are_added_in_cells_of_each_scale(geometry: str) -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, geometry=geometry)
    features, sizes = torch.randn(1, 1, EMBED_DIM), torch.tensor([[64, 96]])
    nn.init.zeros_(prior.offset.weight)
    nn.init.zeros_(prior.offset.bias)
    before = prior(features, SHAPES, image_sizes=sizes).center
    offsets = torch.tensor([[[1.0, -2.0], [0.5, 90.0]], [[-3.0, 4.0], [7.0, -8.0]]])  # scale, head, xy
    with torch.no_grad():
        prior.offset.bias.copy_(offsets.flatten())
    moved = prior(features, SHAPES, image_sizes=sizes).center - before
    torch.testing.assert_close(moved[0, :, 0], offsets.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_centre_is_unnormalised_by_the_image_and_the_stride() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, modulation="shared")
    center = prior(
        torch.randn(1, 1, EMBED_DIM),
        SHAPES,
        reference_logits=torch.zeros(1, 1, 2),
        image_sizes=torch.tensor([[50, 90]]),
    ).center
    torch.testing.assert_close(center[0, 0, 0], torch.tensor([[45 / 16, 25 / 16], [45 / 32, 25 / 32]]))


def test_centre_falls_back_to_valid_cells_then_the_mask_then_the_grid() -> None:
    prior = SpatialPrior(EMBED_DIM, HEADS, STRIDES, modulation="shared")
    features, logits = torch.randn(1, 1, EMBED_DIM), torch.zeros(1, 1, 2)
    valid = [[(3, 5), (1, 2)]]
    from_valid = prior(features, SHAPES, reference_logits=logits, valid_shapes=valid).center
    from_mask = prior(features, SHAPES, reference_logits=logits, key_padding_mask=padding_mask(valid)).center
    from_grid = prior(features, SHAPES, reference_logits=logits).center
    torch.testing.assert_close(from_valid[0, 0, 0], torch.tensor([[2.5, 1.5], [1.0, 0.5]]))
    torch.testing.assert_close(from_mask, from_valid)
    torch.testing.assert_close(from_grid[0, 0, 0], torch.tensor([[3.0, 2.0], [1.5, 1.0]]))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_valid_shapes_that_are_not_looked_at_act_as_clamped_to_the_grid(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    prior = randomised(SpatialPrior(EMBED_DIM, HEADS, STRIDES))
    features = torch.randn(1, QUERIES, EMBED_DIM)
    (height, width), small = SHAPES[0], SHAPES[1]

    def center(size: tuple[int, int]) -> torch.Tensor:
        # What is mapped over is not looked at.
        locate = torch.vmap(lambda x: prior(x, SHAPES, valid_shapes=[[size, small]], backend=backend).center)
        return locate(features[None])

    assert torch.equal(center((height + 3, -2)), center((height, 0)))
    assert not torch.equal(center((height, width)), center((height, 0)))


def test_given_reference_logits_replace_the_predicted_centre() -> None:
    first = SpatialPrior(EMBED_DIM, HEADS, modulation="shared")
    later = SpatialPrior(EMBED_DIM, HEADS, modulation="shared", predicts_center=False)
    features = torch.randn(1, QUERIES, EMBED_DIM)
    one = first(features, SHAPES[:1])
    two = later(torch.randn_like(features), SHAPES[:1], reference_logits=one.reference_logits)
    torch.testing.assert_close(two.center, one.center)
    assert two.reference_logits is one.reference_logits
    assert later.center_mlp is None
