"""The backward kernels against native autograd in float64, on a GPU or through the interpreter."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from devices import ON_GPU
from torch import Tensor

from smca_kernels.profiling.measure import saved_bytes
from smca_kernels.testing.budget import poisoned_memory
from smca_kernels.testing.cases import CASES, DTYPES, Case, CaseInputs, make_inputs
from smca_kernels.testing.check import attend, compare_results, run_backend, run_reference

pytest.importorskip("triton")

SERVED = [case for case in CASES if (case.scale is None or case.scale > 0) and (ON_GPU or not case.large)]
# Through the interpreter, the cases that are not quick take turns with the dtypes.
SWEEP = [
    (case, dtype)
    for i, case in enumerate(SERVED)
    for j, dtype in enumerate(DTYPES)
    if ON_GPU or case.quick or i % len(DTYPES) == j
]


def output_and_gradients(inputs: CaseInputs) -> dict[str, Tensor]:
    """The kernels' results in memory that held NaN."""
    with poisoned_memory():
        return run_backend(inputs, "triton")


def assert_all_within_budget(actual: dict[str, Tensor], inputs: CaseInputs) -> None:
    over = [str(comparison) for comparison in compare_results(actual, inputs) if not comparison.ratio <= 1.0]
    assert not over, "\n".join(over)


def part_of_batch(inputs: CaseInputs, b: int) -> CaseInputs:
    fields = (f.name for f in dataclasses.fields(inputs))
    tensors = {name: t for name in fields if isinstance(t := getattr(inputs, name), Tensor)}
    alone = {name: t[b : b + 1].detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    return dataclasses.replace(inputs, **alone)


@pytest.mark.parametrize(("case", "dtype"), SWEEP, ids=[f"{case.name}-{dtype}" for case, dtype in SWEEP])
def test_output_and_gradients_are_within_the_error_budget(
    case: Case, dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype), generator, device)
    assert_all_within_budget(output_and_gradients(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case("two scales", ((9, 17), (5, 9)), batch=2, heads=2, queries=33),
        Case("an image without keys at a scale", ((5, 9), (3, 5)), batch=2, mask="empty_scale"),
        Case("keys masked at random", ((9, 10), (3, 5)), batch=2, mask="random", scale_weights=False),
        Case("planned", ((20, 19), (5, 9)), prior="narrow", mask="valid_shapes", planned=True),
    ],
    ids=lambda case: case.name,
)
def test_programs_that_share_a_block_of_queries_stay_within_the_error_budget(
    case: Case, dtype: str, device: torch.device, generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from smca_kernels.backends.triton import launch

    # Some of the smaller scales leave splits without a tile.
    monkeypatch.setattr(launch, "splits_of", lambda *_: 3)
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype), generator, device)
    assert_all_within_budget(output_and_gradients(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_whose_priors_are_switched_off_stay_within_the_error_budget(
    dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(Case("", ((9, 10),), queries=33, dtype=dtype), generator, device)
    inputs = dataclasses.replace(inputs, precision=torch.zeros_like(inputs.precision).requires_grad_())
    assert_all_within_budget(output_and_gradients(inputs), inputs)


@pytest.mark.skipif(ON_GPU, reason="tensor cores add tf32x3's small products in the order of the operands")
@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_only_key_has_the_same_logit_in_forward_and_backward(
    head_dim: int, device: torch.device, generator: torch.Generator
) -> None:
    case = Case("", ((5, 9),), heads=8, queries=1, head_dim=head_dim, scale_weights=False, scale=1.0)
    inputs = make_inputs(case, generator, device)
    # At a cell that isn't the nearest to a centre, so that its logit is a sum of three.
    alone = torch.arange(5 * 9, device=device)[None] != 33
    inputs = dataclasses.replace(
        inputs, key_padding_mask=alone, center=torch.zeros_like(inputs.center).add_(2.3).requires_grad_()
    )
    # P = exp2(logit - LSE) is 1 only if the two logits are the same to the bit.
    assert torch.equal(output_and_gradients(inputs)["value"][:, :, 33:34], inputs.grad_output)


def test_gradients_have_shape_and_dtype_of_their_inputs(device: torch.device, generator: torch.Generator) -> None:
    case = Case("", ((3, 5),), dtype="float16", heads=2, queries=5, prior_heads=1, layout="last_axis_strided")
    inputs = make_inputs(case, generator, device)
    gradients = output_and_gradients(inputs)
    for name, tensor in inputs.differentiable().items():
        assert (gradients[name].shape, gradients[name].dtype) == (tensor.shape, tensor.dtype), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_give_the_same_bits(dtype: str, device: torch.device, generator: torch.Generator) -> None:
    case = Case("", ((5, 9), (3, 5)), dtype=dtype, heads=2, mask="valid_shapes", prior_heads=1)
    inputs = make_inputs(case, generator, device)
    first, second = output_and_gradients(inputs), output_and_gradients(inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_alone_gives_the_same_bits_as_in_its_batch(
    dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    case = Case("", ((5, 9), (3, 5)), dtype=dtype, batch=2, queries=9, mask="valid_shapes")
    inputs = make_inputs(case, generator, device)
    together = output_and_gradients(inputs)
    for b in range(case.batch):
        for name, gradient in output_and_gradients(part_of_batch(inputs, b)).items():
            assert torch.equal(gradient, together[name][b : b + 1]), name


def test_keys_that_are_ignored_get_no_gradient(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((9, 10),), queries=9, mask="random"), generator, device)
    gradients = output_and_gradients(inputs)
    ignored = inputs.key_padding_mask[:, None]
    assert not gradients["key"][ignored].any()
    assert not gradients["value"][ignored].any()


def test_keys_outside_the_image_get_no_gradient(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((9, 17),), queries=9), generator, device)
    inputs = dataclasses.replace(inputs, valid_shapes=torch.tensor([[[4, 9]]], device=device))
    gradients = output_and_gradients(inputs)
    outside = torch.ones(9, 17, dtype=torch.bool)
    outside[:4, :9] = False
    for name in ("key", "value"):
        grid = gradients[name].unflatten(2, (9, 17))[0, 0]
        assert not grid[outside.to(device)].any()
        assert grid[~outside.to(device)].any()


@pytest.mark.parametrize("mask", ["empty_scale", "empty_scale_padding"])
def test_a_scale_without_valid_keys_gets_no_gradient(
    mask: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(Case("", ((5, 9), (3, 5)), batch=2, queries=9, mask=mask), generator, device)
    gradients = output_and_gradients(inputs)
    # The first image has none at the second scale.
    for name in ("key", "value"):
        assert not gradients[name][0, :, 5 * 9 :].any(), name
    for name in ("center", "precision", "scale_weights"):
        assert not gradients[name][0, :, :, 1].any(), name
        assert gradients[name][1, :, :, 1].any(), name


@pytest.mark.parametrize("wanted", ["query", "key", "value", "center", "precision", "scale_weights"])
def test_one_gradient_alone_has_the_same_bits_as_with_the_others(
    wanted: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(Case("", ((5, 9),), queries=9), generator, device)
    expected = output_and_gradients(inputs)[wanted]
    frozen = {name: t.detach() for name, t in inputs.differentiable().items() if name != wanted}
    alone = dataclasses.replace(inputs, **frozen)
    with poisoned_memory():
        output = attend(alone, "triton")
        (gradient,) = torch.autograd.grad(output, getattr(alone, wanted), alone.grad_output)
    assert torch.equal(gradient, expected)


def test_double_backward_is_refused_with_a_clear_error(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((3, 5),), queries=5), generator, device)
    output = attend(inputs, "triton")
    (gradient,) = torch.autograd.grad(output.sum(), inputs.query, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        torch.autograd.grad(gradient.sum(), inputs.key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_kept_for_backward_is_inputs_and_outputs_per_scale_however_many_keys(
    dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    for side in (2, 8, 24):
        shapes = ((side, side), (side // 2, side // 2))
        case = Case("", shapes, dtype=dtype, queries=40)
        inputs = make_inputs(case, generator, device)
        of_inputs = sum(tensor.nbytes for tensor in inputs.differentiable().values())
        rows = case.batch * case.heads * case.queries * len(shapes)
        scale_outputs_and_lse = 4 * rows * (case.head_dim + 1)
        assert saved_bytes(partial(attend, inputs, "triton")) <= 1.1 * (of_inputs + scale_outputs_and_lse)


def test_gradients_of_inputs_beyond_2_to_the_31_elements(
    device: torch.device, tmp_path: Path, generator: torch.Generator
) -> None:
    elements = 2**31 + 2**14
    if device.type == "cuda":
        storage = torch.zeros(elements, dtype=torch.float16, device=device)
    else:
        # A sparse file, of which only the pages that are touched exist.
        with (tmp_path / "zeros").open("wb") as file:
            file.truncate(2 * elements)
        storage = torch.from_file(str(tmp_path / "zeros"), shared=True, size=elements, dtype=torch.float16)
    inputs = make_inputs(Case("", ((3, 3),), dtype="float16", batch=2, queries=9), generator, device)
    expected = output_and_gradients(inputs)
    far = {}
    for i, name in enumerate(("query", "key", "value", "grad_output")):
        tensor = getattr(inputs, name).detach()
        view = storage.as_strided(tensor.shape, (2**31 + 8, 32, 32, 1), 2**11 * i)
        far[name] = view.copy_(tensor).detach().requires_grad_(name != "grad_output")
    for name, gradient in output_and_gradients(dataclasses.replace(inputs, **far)).items():
        assert torch.equal(gradient, expected[name]), name


def test_the_reference_itself_is_within_its_own_budget(generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((5, 9),), queries=9), generator)
    assert_all_within_budget(run_reference(inputs), inputs)
