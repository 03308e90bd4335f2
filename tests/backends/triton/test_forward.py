"""The forward kernel against the float64 reference, on a GPU or through Triton's interpreter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import ON_GPU
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.testing.budget import assert_within_budget, poisoned_memory
from smca_kernels.testing.cases import CASES, DTYPES, Case, CaseInputs, make_inputs
from smca_kernels.testing.check import absolute_sums, attend

pytest.importorskip("triton")

# test_backward.py looks at the output of all cases too; here every failure is the forward kernel's.
# The kernels refuse scales that are not positive: test_operator.py.
SERVED = [case for case in CASES if (case.scale is None or case.scale > 0) and (ON_GPU or case.quick)]


def forward(inputs: CaseInputs, **changes: Any) -> Tensor:
    """The kernel's output into memory that held NaN."""
    inputs = dataclasses.replace(inputs, **changes)
    with torch.no_grad(), poisoned_memory():
        return attend(inputs, "triton")


@torch.no_grad()
def assert_output_within_budget(actual: Tensor, inputs: CaseInputs) -> None:
    wide = inputs.double()
    oracle, eager = (reference.attention(i) for i in (wide, inputs))
    assert_within_budget(actual, oracle, eager, "output", absolute_sum=absolute_sums(wide)["output"][0])


def cells(spatial_shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(height * width for height, width in spatial_shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_output_is_within_the_error_budget(
    case: Case, dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype), generator, device)
    assert_output_within_budget(forward(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_give_the_same_bits(dtype: str, device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((9, 17), (5, 9)), dtype=dtype, batch=2, mask="valid_shapes"), generator, device)
    assert torch.equal(forward(inputs), forward(inputs))


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_alone_gives_the_same_bits_as_in_its_batch(
    dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    case = Case("", ((9, 17), (5, 9)), dtype=dtype, batch=3, queries=9, mask="valid_shapes")
    inputs = make_inputs(case, generator, device)
    together = forward(inputs)
    for b in range(case.batch):
        names = ("query", "key", "value", "center", "precision", "scale_weights", "valid_shapes")
        alone = {name: getattr(inputs, name)[b : b + 1].clone() for name in names}
        assert torch.equal(forward(inputs, **alone), together[b : b + 1])


def padded_grid(maps: Tensor, shape: tuple[int, int], padded: tuple[int, int], filler: float) -> Tensor:
    """[B, H, height · width, D] as the top-left part of a larger grid."""
    grid = maps.new_full((*maps.shape[:2], *padded, maps.shape[-1]), filler)
    grid[:, :, : shape[0], : shape[1]] = maps.unflatten(2, shape)
    return grid.flatten(2, 3)


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_to_a_larger_grid_changes_no_bit(dtype: str, device: torch.device, generator: torch.Generator) -> None:
    shape, padded = (9, 13), (13, 37)
    case = Case("", (shape,), dtype=dtype, queries=9)
    inputs = make_inputs(case, generator, device)
    valid_shapes = torch.tensor([[shape]], device=device)
    alone = forward(inputs, valid_shapes=valid_shapes)
    with torch.no_grad():
        key, value = (padded_grid(t, shape, padded, filler=1e4) for t in (inputs.key, inputs.value))
    assert torch.equal(
        forward(inputs, key=key, value=value, spatial_shapes=(padded,), valid_shapes=valid_shapes), alone
    )


def test_valid_shapes_and_the_same_part_as_padding_mask_agree(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((9, 17), (5, 9)), batch=2, mask="valid_shapes"), generator, device)
    masks = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, None)
    masked = forward(inputs, valid_shapes=None, key_padding_mask=torch.cat(masks, dim=1))
    assert_output_within_budget(masked, inputs)


def test_a_padding_mask_of_any_strides_is_read_right(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((9, 17),), queries=9, mask="random"), generator, device)
    expected = forward(inputs)
    transposed = inputs.key_padding_mask.t().contiguous().t()
    assert torch.equal(forward(inputs, key_padding_mask=transposed), expected)


def test_valid_shapes_beyond_the_grid_act_as_clamped(device: torch.device, generator: torch.Generator) -> None:
    from smca_kernels.backends.triton import operator

    inputs = make_inputs(Case("", ((5, 9),), batch=2, queries=9), generator, device)

    def output(valid_shapes: list[list[list[int]]]) -> Tensor:
        arguments = dataclasses.replace(inputs, valid_shapes=torch.tensor(valid_shapes, device=device))
        with torch.no_grad(), poisoned_memory():
            return operator.attention(arguments)

    assert torch.equal(output([[[6, 70]], [[-1, 4]]]), output([[[5, 9]], [[0, 4]]]))


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("as_mask", [False, True], ids=["valid_shapes", "key_padding_mask"])
def test_a_scale_without_valid_keys_contributes_nothing(
    as_mask: bool, device: torch.device, generator: torch.Generator
) -> None:
    shapes = ((5, 9), (3, 5))
    inputs = make_inputs(Case("", shapes, queries=9), generator, device)
    first = cells(shapes[:1])
    fine_only = forward(
        inputs,
        key=inputs.key[:, :, :first],
        value=inputs.value[:, :, :first],
        center=inputs.center[..., :1, :],
        precision=inputs.precision[..., :1, :],
        scale_weights=inputs.scale_weights[..., :1],
        spatial_shapes=shapes[:1],
    )
    if as_mask:
        masks = {"key_padding_mask": torch.arange(cells(shapes), device=device)[None] >= first}
    else:
        masks = {"valid_shapes": torch.tensor([[[5, 9], [0, 0]]], device=device)}
    assert torch.equal(forward(inputs, **masks), fine_only)


@pytest.mark.parametrize("mask", ["valid_shapes", "key_padding_mask"])
def test_an_image_without_valid_keys_gives_zeros(mask: str, device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((5, 9), (3, 5)), queries=9), generator, device)
    nothing = {
        "valid_shapes": torch.zeros(1, 2, 2, dtype=torch.long, device=device),
        "key_padding_mask": torch.ones(1, cells(inputs.spatial_shapes), dtype=torch.bool, device=device),
    }
    assert not forward(inputs, **{mask: nothing[mask]}).any()


# A float16 number of 2 bytes, a file or an allocation of a little over 8 GiB.
HUGE = 2**32 + 2**14


@pytest.fixture
def huge_storage(device: torch.device, tmp_path: Path) -> Tensor:
    """More than 2³² float16 zeros: on the CPU a sparse file, whose untouched pages do not exist."""
    if device.type == "cuda":
        if torch.cuda.mem_get_info(device)[0] < 3 * HUGE:
            pytest.skip("needs 12 GB of free GPU memory")
        return torch.zeros(HUGE, dtype=torch.float16, device=device)
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(2 * HUGE)
    return torch.from_file(str(path), shared=True, size=HUGE, dtype=torch.float16)


@pytest.mark.parametrize("axis", ["batch", "head", "row"])
def test_offsets_beyond_2_to_the_31_elements(
    axis: str, huge_storage: Tensor, device: torch.device, generator: torch.Generator
) -> None:
    case = Case("", ((3, 3),), dtype="float16", batch=2, heads=2, queries=9)
    inputs = make_inputs(case, generator, device)
    far = {"batch": (2**31 + 8, 1024, 32), "head": (1024, 2**31 + 8, 32), "row": (64, 32, 2**29)}[axis]

    def spread(tensor: Tensor, offset: int) -> Tensor:
        view = huge_storage.as_strided(tensor.shape, (*far, 1), offset)
        return view.copy_(tensor)

    expected = forward(inputs)
    with torch.no_grad():
        moved = {name: spread(getattr(inputs, name), 2**12 * i) for i, name in enumerate(("query", "key", "value"))}
    assert torch.equal(forward(inputs, **moved), expected)


@pytest.mark.skipif(not ON_GPU, reason="2³¹ output elements take 20 GB, and the interpreter would take hours")
def test_outputs_beyond_2_to_the_31_elements(device: torch.device, generator: torch.Generator) -> None:
    # scale_outputs is [1, 1, N, 8, 128] in float32.
    queries = 2**21 + 64
    if torch.cuda.mem_get_info(device)[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    case = Case("", ((2, 2),) * 8, dtype="float16", queries=64, head_dim=128)
    inputs = make_inputs(case, generator, device)
    repeat = {
        name: getattr(inputs, name).detach().repeat(1, 1, queries // 64, *[1] * (getattr(inputs, name).dim() - 3))
        for name in ("query", "center", "precision", "scale_weights")
    }
    assert torch.equal(forward(inputs, **repeat)[:, :, -64:], forward(inputs))
