"""Rivals of the operator: those that compute the same function, to the budget, and those known not to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from smca_benchmarks import peers
from smca_benchmarks.peers import PEERS
from torch import Tensor
from torch.nn.attention import flex_attention

from smca_kernels.backends import reference
from smca_kernels.testing.cases import Case, CaseInputs, make_inputs
from smca_kernels.testing.check import Expectation

SMALL = Case("small", ((5, 9), (3, 5)), batch=2, heads=2, queries=9, head_dim=16)
CASES = [
    SMALL,
    dataclasses.replace(SMALL, name="padded", mask="valid_shapes"),
    dataclasses.replace(SMALL, name="shared prior", prior_heads=1, scale_weights=False),
]


def assert_computes_the_same(attend: Callable[[CaseInputs], Tensor], inputs: CaseInputs) -> None:
    """In float64, so that no rounding of columns or masks hides a wrong formula; budgets are float32's."""
    wide = inputs.double()
    output = attend(wide)
    tensors = wide.differentiable()
    gradients = torch.autograd.grad(output, list(tensors.values()), wide.grad_output)
    results = {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}
    comparisons = Expectation.of(inputs).compare({name: tensor.float() for name, tensor in results.items()})
    assert {comparison.name.split(" ")[0] for comparison in comparisons} == set(results)
    assert [str(comparison) for comparison in comparisons if not comparison.ratio <= 1.0] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["naive", "sdpa", "sdpa-mask", "sdpa-wide"])
def test_peer_gives_the_operators_output_and_gradients(name: str, case: Case, generator: torch.Generator) -> None:
    assert_computes_the_same(PEERS[name].attend, make_inputs(case, generator))


@pytest.mark.parametrize(
    "attend",
    [peers.flex, lambda inputs: peers.flex_wide(inputs, peers.wide(inputs))],
    ids=["captured", "wide"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_operators_output_and_gradients(
    attend: Callable[[CaseInputs], Tensor], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its compiled form has no backward on a CPU and refuses; the arithmetic that eager mode would do has one.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    case = dataclasses.replace(SMALL, mask="valid_shapes", prior_heads=1)
    assert_computes_the_same(attend, make_inputs(case, generator))


def test_every_peer_that_computes_the_same_is_checked_here() -> None:
    checked = {"naive", "sdpa", "sdpa-mask", "sdpa-wide", "flex", "flex-wide"}
    elsewhere = {"triton", "triton-all", "naive-compiled"}  # tests of the kernels; the same code as naive
    assert {name for name, peer in PEERS.items() if peer.same} == checked | elsewhere


def test_wide_columns_are_off_by_whole_units_in_half_precision_only(generator: torch.Generator) -> None:
    case = Case("wide grid", ((5, 134),), queries=20)
    steep = make_inputs(case, generator)
    steep = dataclasses.replace(steep, precision=torch.full_like(steep.precision, 0.125))  # σ = 2 cells
    half = {name: getattr(steep, name).bfloat16() for name in ("query", "key", "value")}
    assert peers.wide_logit_error(dataclasses.replace(steep, **half)) > 1.0
    assert peers.wide_logit_error(steep) < 1e-2
    assert peers.wide_logit_error(steep.double()) == 0.0


def test_padding_does_not_count_as_logit_error(generator: torch.Generator) -> None:
    case = dataclasses.replace(SMALL, mask="valid_shapes", dtype="bfloat16")
    padded = make_inputs(case, generator)
    flat = dataclasses.replace(padded, precision=torch.zeros_like(padded.precision))
    # The column for padding is rounded by 48, and the prior's are zero.
    assert peers.wide_logit_error(flat) == 0.0


@pytest.mark.parametrize("mask", ["none", "valid_shapes"])
def test_plain_sdpa_is_the_operator_at_one_scale_without_a_prior(mask: str, generator: torch.Generator) -> None:
    case = Case("plain", ((5, 9),), batch=2, heads=2, mask=mask, scale_weights=False)
    inputs = make_inputs(case, generator)
    flat = dataclasses.replace(inputs, precision=torch.zeros_like(inputs.precision))
    expected = reference.attention(flat)
    torch.testing.assert_close(peers.plain_sdpa(inputs.detached()), expected.detach())


def test_deformable_attention_samples_around_the_center(generator: torch.Generator) -> None:
    case = Case("one scale", ((8, 12),), batch=2, heads=2, queries=6, head_dim=2, scale_weights=False)
    inputs = make_inputs(case, generator)
    x, y = reference.cell_coordinates(8, 12, like=inputs.value)
    inside = torch.rand(inputs.center.shape, generator=generator) * torch.tensor([7.0, 3.0]) + 2
    image = torch.stack([x, y], -1).expand(2, 2, -1, -1).contiguous()
    sampled = peers.deformable(dataclasses.replace(inputs, value=image, center=inside))
    # Bilinear samples of a linear image, at points placed evenly around the center.
    torch.testing.assert_close(sampled, inside[:, :, :, 0])


def test_triton_is_not_timed_by_its_interpreter(generator: torch.Generator) -> None:
    reason = PEERS["triton"].unsupported(make_inputs(SMALL, generator), True)
    assert reason is not None
    assert "interpreter" in reason


@pytest.mark.parametrize("leaves_keys_out", [True, False])
def test_triton_with_all_keys_is_measured_where_triton_may_leave_some_out(
    leaves_keys_out: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = pytest.importorskip("smca_kernels.backends.triton.launch")
    monkeypatch.setattr(peers, "explain_backend", lambda **arguments: None)
    monkeypatch.setattr(launch, "is_planned", lambda inputs: leaves_keys_out)
    inputs = make_inputs(SMALL, generator, "meta")
    assert PEERS["triton"].unsupported(inputs, True) is None
    assert (PEERS["triton-all"].unsupported(inputs, True) is None) == leaves_keys_out


def test_flex_attention_is_measured_forward_only_on_a_cpu(generator: torch.Generator) -> None:
    inputs = make_inputs(SMALL, generator)
    assert PEERS["flex"].unsupported(inputs, False) is None
    assert PEERS["flex"].unsupported(inputs, True) == "FlexAttention has no backward on a CPU"


def test_rows_of_a_mask_are_aligned_for_the_memory_efficient_kernel(generator: torch.Generator) -> None:
    for mask in peers.masks(make_inputs(SMALL, generator)):
        assert mask.stride(-2) % 8 == 0


def test_wide_queries_keys_and_values_have_one_width_that_is_a_multiple_of_eight(generator: torch.Generator) -> None:
    for triple in peers._padded_wide(make_inputs(SMALL, generator)):
        assert len({tensor.shape[-1] for tensor in triple}) == 1
        assert triple[0].shape[-1] % 8 == 0
