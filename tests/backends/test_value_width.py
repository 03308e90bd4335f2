"""Values of another width than queries and keys, as Conditional DETR has them: on every backend, within its budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from smca_kernels import attention_map, explain_backend, smca_attention
from smca_kernels.backends.sdpa import backward, forward
from smca_kernels.testing.cases import Case, CaseInputs, make_inputs
from smca_kernels.testing.check import check, run_reference

CASES = [
    Case("half as wide", ((4, 5), (2, 3)), batch=2, heads=2, queries=5, head_dim=32, value_dim=16),
    Case("wider, beside masks", ((5, 9), (3, 5)), batch=2, head_dim=16, value_dim=48, mask="valid_shapes"),
    Case("odd widths, one prior", ((5, 9),), heads=2, head_dim=20, value_dim=7, prior_heads=1, mask="padding"),
    Case("the widest", ((3, 5),), head_dim=1, value_dim=128),
    Case("half precision", ((5, 9),), batch=2, head_dim=64, value_dim=32, dtype="float16"),
    Case("bfloat16, wider", ((5, 9), (2, 2)), head_dim=8, value_dim=24, dtype="bfloat16"),
]


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def inputs(request: pytest.FixtureRequest, generator: torch.Generator, device: torch.device) -> CaseInputs:
    return make_inputs(request.param, generator, device)


def call(inputs: CaseInputs, **changed: Any) -> Tensor:
    return smca_attention(**inputs.arguments() | changed)


def test_the_reference_is_that_of_each_channel_alone(generator: torch.Generator) -> None:
    inputs = make_inputs(CASES[0], generator).double()
    together = run_reference(inputs)["output"]
    one_by_one = [call(inputs, value=channel, backend="reference") for channel in inputs.value.split(1, -1)]
    torch.testing.assert_close(together, torch.cat(one_by_one, -1))


@pytest.mark.parametrize("widened", [False, True])
def test_sdpa_is_within_its_budget(inputs: CaseInputs, widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if widened:
        for module in (forward, backward):
            monkeypatch.setattr(module, "MAX_DENSE_SCORES", 0)
    assert [str(each) for each in check(inputs, "sdpa") if each.ratio > 1] == []


def test_the_kernels_are_within_their_budget(inputs: CaseInputs) -> None:
    pytest.importorskip("triton")
    assert [str(each) for each in check(inputs, "triton") if each.ratio > 1] == []


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_the_softmax_scale_is_that_of_the_keys(backend: str, generator: torch.Generator, device: torch.device) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(CASES[1], generator, device)
    default = call(inputs, scale=None, backend=backend)
    torch.testing.assert_close(default, call(inputs, scale=16**-0.5, backend=backend))
    assert default.shape == (2, 1, 17, 48)


def test_dropout_drops_whole_elements_of_p(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(dataclasses.replace(CASES[0], scale_weights=False), generator, device)
    ones = torch.ones_like(inputs.value)
    output = call(inputs, value=ones, dropout_p=0.5, backend="sdpa")
    torch.testing.assert_close(output, output[..., :1].expand_as(output))
    assert output.std() > 0.05


def test_operators_and_their_fakes_agree(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(CASES[0], generator, device)
    torch.library.opcheck(torch.ops.smca_kernels.sdpa_forward.default, inputs.flat())
    arguments = (inputs.grad_output, *inputs.detached().flat())
    torch.library.opcheck(torch.ops.smca_kernels.sdpa_backward.default, arguments)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_a_compiled_call_computes_the_same(
    backend: str, generator: torch.Generator, device: torch.device, fresh_dynamo: None
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(CASES[0], generator, device)
    tensors = inputs.differentiable()

    def attended(tensors: dict[str, Tensor]) -> Tensor:
        return call(inputs, **tensors, backend=backend)

    compiled = torch.compile(attended, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), attended(tensors))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_gradients_of_each_image_alone(backend: str, generator: torch.Generator, device: torch.device) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(CASES[0], generator, device).detached()

    def loss(value: Tensor, key: Tensor, query: Tensor, center: Tensor, precision: Tensor) -> Tensor:
        tensors = [tensor[None] for tensor in (query, key, value, center, precision)]
        return smca_attention(*tensors, inputs.spatial_shapes, backend=backend).square().sum()

    tensors = [inputs.value, inputs.key, inputs.query, inputs.center, inputs.precision]
    mapped = vmap(grad(loss, (0, 1)))(*tensors)
    for b in range(2):
        for actual, expected in zip(mapped, grad(loss, (0, 1))(*(t[b] for t in tensors)), strict=True):
            torch.testing.assert_close(actual[b], expected, atol=1e-5, rtol=1e-4)


def test_explanations_and_maps_do_not_mind(generator: torch.Generator) -> None:
    inputs = make_inputs(CASES[0], generator)
    choice = explain_backend(**inputs.arguments())
    assert choice.backend == "sdpa"
    with torch.no_grad():
        first, *_ = attention_map(inputs.query, inputs.key, inputs.center, inputs.precision, inputs.spatial_shapes)
    assert first.shape == (2, 2, 5, 4, 5)


@pytest.mark.parametrize("width", [0, 129])
def test_a_width_that_no_backend_has_is_refused(width: int, generator: torch.Generator) -> None:
    inputs = make_inputs(CASES[0], generator)
    with pytest.raises(
        ValueError, match=rf"value must be \[B=2, H=2, T=26, D_v from 1 to 128\] .* got \[2, 2, 26, {width}\]"
    ):
        call(inputs, value=inputs.value.new_zeros(2, 2, 26, width))
