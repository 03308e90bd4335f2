"""Ignored keys weigh exactly 0 whatever they and their values hold, forward and backward, on every backend."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from smca_kernels import attention_map, smca_attention
from smca_kernels.backends import BACKENDS, reference
from smca_kernels.backends.sdpa import backward, forward
from smca_kernels.testing.cases import Case, CaseInputs, make_inputs
from smca_kernels.testing.check import run_backend

SHAPES = ((9, 20), (3, 5))
GARBAGE = (1e30, math.nan, -1e30, math.inf, -math.inf)
MASKS = ("valid_shapes", "random", "empty_scale", "empty_scale_padding")


def results(inputs: CaseInputs, backend: str) -> dict[str, Tensor]:
    if backend == "triton":
        pytest.importorskip("triton")
    return run_backend(inputs, backend)


def with_garbage(inputs: CaseInputs) -> CaseInputs:
    """The same inputs, with garbage of every kind in ignored keys and their values."""
    masks = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
    ignored = torch.cat([mask for mask in masks if mask is not None], 1)[:, None, :, None]
    assert ignored.sum() >= len(GARBAGE)
    highest = torch.finfo(inputs.key.dtype).max
    kinds = torch.tensor([max(-highest, min(highest, x)) if math.isfinite(x) else x for x in GARBAGE])
    garbage = kinds.to(inputs.key)[torch.arange(inputs.key.shape[2]) % len(kinds)][:, None]
    tensors = {
        name: torch.where(ignored, garbage, getattr(inputs, name).detach()).requires_grad_()
        for name in ("key", "value")
    }
    return dataclasses.replace(inputs, **tensors)


def draw(case: Case, generator: torch.Generator, device: torch.device) -> CaseInputs:
    """Inputs of a case; with valid_shapes, the first image leaves out two rows and three columns at the first scale."""
    inputs = make_inputs(case, generator, device)
    if case.mask != "valid_shapes":
        return inputs
    valid_shapes = torch.tensor(case.spatial_shapes, device=device).repeat(case.batch, 1, 1)
    valid_shapes[0, 0] -= torch.tensor([2, 3], device=device)
    return dataclasses.replace(inputs, valid_shapes=valid_shapes)


def assert_same(clean: dict[str, Tensor], dirty: dict[str, Tensor]) -> None:
    for name, expected in clean.items():
        assert torch.equal(dirty[name], expected), name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_ignored_keys_changes_no_bit(
    backend: str, mask: str, generator: torch.Generator, device: torch.device
) -> None:
    inputs = draw(Case("garbage", SHAPES, batch=2, queries=9, mask=mask), generator, device)
    assert_same(results(inputs, backend), results(with_garbage(inputs), backend))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nor_does_it_in_half_precision(
    backend: str, dtype: str, generator: torch.Generator, device: torch.device
) -> None:
    case = Case("garbage", SHAPES, batch=2, queries=9, head_dim=20, dtype=dtype, mask="random")
    inputs = make_inputs(case, generator, device)
    assert_same(results(inputs, backend), results(with_garbage(inputs), backend))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nor_does_it_by_widened_columns(
    dtype: str, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "MAX_DENSE_SCORES", 0)
    monkeypatch.setattr(forward, "sdpa_dtype", lambda query, shapes: query.dtype)
    case = Case("garbage", SHAPES, batch=2, queries=9, dtype=dtype, mask="empty_scale_padding")
    inputs = make_inputs(case, generator, device)
    assert_same(results(inputs, "sdpa"), results(with_garbage(inputs), "sdpa"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nor_does_it_under_dropout(backend: str, generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("garbage", SHAPES, batch=2, queries=9, mask="random"), generator, device)
    outcomes = []
    for each in (inputs, with_garbage(inputs)):
        torch.manual_seed(0)
        outcomes.append(results(dataclasses.replace(each, dropout_p=0.5), backend))
    assert_same(*outcomes)


@pytest.mark.parametrize("mask", ["valid_shapes", "random"])
def test_nor_does_it_where_keys_are_left_out(mask: str, generator: torch.Generator, device: torch.device) -> None:
    case = Case("garbage", ((12, 33),), batch=2, queries=33, mask=mask, prior="narrow", planned=True)
    inputs = draw(case, generator, device)
    assert_same(results(inputs, "triton"), results(with_garbage(inputs), "triton"))


def test_maps_do_not_show_it(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("garbage", SHAPES, batch=2, mask="random"), generator, device)
    maps = [
        attention_map(each.query, each.key, each.center, each.precision, SHAPES, key_padding_mask=each.key_padding_mask)
        for each in (inputs, with_garbage(inputs))
    ]
    for clean, dirty in zip(*maps, strict=True):
        assert torch.equal(clean, dirty)


def test_a_valid_key_with_the_lowest_score_of_a_dtype_has_all_the_weight(device: torch.device) -> None:
    def filled(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float16, device=device)[:, None].expand(1, 1, -1, 8)

    prior = torch.zeros(1, 1, 1, 1, 2, dtype=torch.float16, device=device)
    ignored = torch.tensor([[False, True]], device=device)
    for backend in ("sdpa", "reference"):
        out = smca_attention(
            filled(1.0), filled(-8188.0, 0.0), filled(1.0, 1000.0), prior, prior, [(1, 2)],
            key_padding_mask=ignored, scale=1.0, backend=backend,
        )  # fmt: skip
        assert torch.equal(out, filled(1.0)), backend
