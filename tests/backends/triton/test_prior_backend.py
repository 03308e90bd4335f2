"""Which calls of the prior are one launch, and what the others get: a reason, or the PyTorch form."""

from __future__ import annotations

import pytest
import torch
from devices import needs_gpu
from prior_problems import GRIDS, STRIDES, make_prior, make_problem, operators
from torch import Tensor

pytest.importorskip("triton")

from smca_kernels.nn import GEOMETRIES, SpatiallyModulatedCoAttention


def test_float64_is_refused_with_the_reason_and_auto_takes_pytorch(device: torch.device) -> None:
    prior, features = make_prior(device)
    with pytest.raises(ValueError, match=r"backend='triton' can't serve this call: serves .*float64"):
        prior.double()(features, GRIDS[:3], backend="triton")
    assert prior(features, GRIDS[:3]).center.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_batches_are_refused_with_the_reason_and_auto_takes_pytorch(
    shape: tuple[int, ...], device: torch.device
) -> None:
    prior, _ = make_prior(device)
    features = torch.randn(shape, device=device)
    with pytest.raises(ValueError, match="can't serve this call: needs at least one image and one query"):
        prior(features, GRIDS[:3], backend="triton")
    assert prior(features, GRIDS[:3]).center.shape == (shape[0], 2, shape[1], 3, 2)


def test_image_sizes_with_a_gradient_are_left_to_pytorch(device: torch.device) -> None:
    prior, features = make_prior(device)
    sizes = torch.full((2, 2), 90.0, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="can't serve this call: has no gradient to image_sizes"):
        prior(features, GRIDS[:3], image_sizes=sizes, backend="triton")
    prior(features, GRIDS[:3], image_sizes=sizes).center.sum().backward()
    assert sizes.grad.all()


def test_double_backward_is_refused(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device)
    offset = problem.raw["object_scale"]
    (gradient,) = torch.autograd.grad(problem.locate("triton").precision.sum(), offset, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        torch.autograd.grad(gradient.sum(), offset)


@needs_gpu
def test_auto_takes_one_launch_on_a_gpu(device: torch.device) -> None:
    prior, features = make_prior(device)
    assert ("prior" in operators(lambda: prior(features, GRIDS[:3]))) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_other_backends_take_the_pytorch_form(backend: str, device: torch.device) -> None:
    prior, features = make_prior(device)
    assert "prior" not in operators(lambda: prior(features, GRIDS[:3], backend=backend))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_layer_hands_its_backend_to_the_prior(geometry: str, batch_first: bool, device: torch.device) -> None:
    layer = SpatiallyModulatedCoAttention(32, 2, STRIDES[:2], geometry=geometry, batch_first=batch_first).to(device)
    query, key = torch.randn(4, 3, 32, device=device), torch.randn(24 + 6, 3, 32, device=device)
    features = torch.randn_like(query)
    if batch_first:
        query, key, features = (t.transpose(0, 1) for t in (query, key, features))
    results: dict[str, tuple[Tensor, ...]] = {}

    def attend(backend: str) -> None:
        output, prior = layer(query, key, key, ((4, 6), (2, 3)), prior_features=features, backend=backend)
        gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        results[backend] = (output, *prior, *gradients)

    for backend, called in (("triton", True), ("reference", False)):
        names = operators(lambda backend=backend: attend(backend))
        assert ("prior" in names, "prior_backward" in names) == (called, called)
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-3, atol=1e-3)
