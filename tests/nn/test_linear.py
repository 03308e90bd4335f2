"""The prior's linear layers: they begin alike in any order of resets, and other classes may stand in their places."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from small_layers import EMBED_DIM, HEADS, QUERIES, SHAPES, STRIDES, randomised
from torch import Tensor, nn

from smca_kernels.nn import GEOMETRIES, SpatiallyModulatedCoAttention, SpatialPrior

Modules = Callable[[nn.Module], Iterable[nn.Module]]
ORDERS: dict[str, Modules] = {
    "parents first": lambda model: list(model.modules()),
    "children first": lambda model: list(model.modules())[::-1],
    "leaves and owners of parameters": lambda model: [m for m in model.modules() if len(m._parameters)],
}


# --- resets ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modules_reset_in_turn_begin_as_a_new_layer(geometry: str, order: str) -> None:
    with torch.device("meta"):
        layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, STRIDES, geometry=geometry)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    for module in ORDERS[order](layer):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert not layer.out_proj.bias.any()
    # Uniform in ±√(6 / (inputs + outputs)), Xavier's.
    for linear in (layer.out_proj, layer.prior.offset, layer.prior.center_mlp[0]):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.7 * bound < linear.weight.abs().max() <= bound
    precision = layer.prior(torch.randn(1, QUERIES, EMBED_DIM), SHAPES).precision[..., 1, :]  # at stride 32
    torch.testing.assert_close((2 * precision) ** -0.5, torch.full_like(precision, 2.0))
