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


# --- other classes in their places ---


class Int8Linear(nn.Module):
    """Weight-only quantisation: computes in the dtype of its features."""

    def __init__(self, linear: nn.Linear, buffers: bool) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        weight = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        if buffers:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.to(features.dtype)) * self.scale + self.bias

    def widened(self) -> Tensor:
        return self.weight * self.scale[:, None]


class PackedLinear(nn.Linear):
    """4 bits a weight, two to a byte, stored in float16 as FSDP wants it: as bitsandbytes' Linear4bit."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max().item() / 7
        quantized = (linear.weight.detach() / self.scale).round().to(torch.int16).flatten() + 8
        packed = (quantized[::2] << 4 | quantized[1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed.view(torch.float16).unsqueeze(1), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach())

    def widened(self) -> Tensor:
        packed = self.weight.view(torch.uint8).flatten().to(torch.int16)
        quantized = torch.stack((packed >> 4, packed & 15), 1).view(self.out_features, self.in_features)
        return (quantized - 8) * self.scale

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.widened().to(features.dtype), self.bias.to(features.dtype))


QUANTIZED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8 parameters": lambda linear: Int8Linear(linear, buffers=False),
    "int8 buffers": lambda linear: Int8Linear(linear, buffers=True),
    "4 bits, packed": PackedLinear,
}


@pytest.mark.parametrize("quantize", QUANTIZED)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weight_only_quantisation_predicts_what_its_weights_say(geometry: str, quantize: str) -> None:
    layer = randomised(SpatialPrior(EMBED_DIM, HEADS, STRIDES, geometry=geometry))
    quantized, widened = copy.deepcopy(layer), copy.deepcopy(layer)
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            replacement = QUANTIZED[quantize](linear)
            quantized.set_submodule(name, replacement)
            widened.get_submodule(name).weight.data = replacement.widened()
    features = torch.randn(2, QUERIES, EMBED_DIM)
    for actual, expected in zip(quantized(features, SHAPES), widened(features, SHAPES), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dynamic_quantisation_of_every_linear_layer_runs(geometry: str) -> None:
    layer = randomised(SpatialPrior(EMBED_DIM, HEADS, STRIDES, geometry=geometry)).eval()
    plain = copy.deepcopy(layer)
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            of_torch = nn.Linear(linear.in_features, linear.out_features)
            of_torch.load_state_dict(linear.state_dict())
            plain.set_submodule(name, of_torch)
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    features = torch.randn(2, QUERIES, EMBED_DIM)
    # 8 bits of weights and features: some hundredths of a cell.
    center, expected = quantized(features, SHAPES).center, layer(features, SHAPES).center
    torch.testing.assert_close(center, expected, rtol=0.1, atol=0.1)


def test_replicas_without_parameters_compute_in_the_dtype_of_their_weights() -> None:
    # nn.DataParallel's replicas keep weights as plain attributes; making some on purpose needs two GPUs.
    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter.detach().clone())
        for name, child in module.named_children():
            replica._modules[name] = replicate(child)
        return replica

    layer = randomised(SpatialPrior(EMBED_DIM, HEADS, STRIDES)).to(torch.bfloat16)
    replica = replicate(layer)
    assert not list(replica.parameters())
    features = torch.randn(2, QUERIES, EMBED_DIM)
    for actual, expected in zip(replica(features, SHAPES), layer(features, SHAPES), strict=True):
        assert torch.equal(actual, expected)


def test_wrapped_layers_compute_in_the_dtype_of_the_layer_inside() -> None:
    class Adapted(nn.Module):
        """A frozen layer with a correction of low rank beside it."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, 1, bias=False, dtype=base.weight.dtype)
            self.up = nn.Linear(1, base.out_features, bias=False, dtype=base.weight.dtype)

        def forward(self, features: Tensor) -> Tensor:
            return self.base(features) + self.up(self.down(features))

    layer = SpatialPrior(EMBED_DIM, HEADS, STRIDES, geometry="paper").to(torch.bfloat16)
    layer.offset = Adapted(layer.offset)
    assert layer(torch.randn(2, QUERIES, EMBED_DIM), SHAPES).center.dtype == torch.float32
