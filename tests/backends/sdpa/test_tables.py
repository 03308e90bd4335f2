"""Tables that are kept on the device: which calls may have them, and for how long."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from smca_kernels.backends.sdpa import backward, forward, operator, tables
from smca_kernels.inputs import SpatialShapes
from smca_kernels.testing.cases import Case, make_inputs
from smca_kernels.testing.check import attend, run_backend

LIKE = torch.empty(0)


def test_tables_made_in_inference_mode_serve_training(
    generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "MAX_DENSE_SCORES", 0)
    inputs = make_inputs(Case("grids that no other test has", ((23, 19), (2, 31))), generator, device)
    with torch.inference_mode():
        attend(inputs, "sdpa")
        attend(inputs, "sdpa", dropout_p=0.1)
    run_backend(inputs, "sdpa")
    torch.autograd.grad(attend(inputs, "sdpa", dropout_p=0.1).sum(), inputs.center)


@pytest.mark.parametrize("is_dense", [False, True])
def test_a_call_in_one_fake_mode_leaves_nothing_to_other_calls(
    is_dense: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "fused_rounds_to_tf32", lambda *_: is_dense)
    inputs = make_inputs(Case("more such grids", ((29, 3), (2, 37))), generator)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            attend(inputs, "sdpa", dropout_p=0.1)
    output = attend(inputs, "sdpa", dropout_p=0.1)
    assert type(output) is Tensor
    assert output.isfinite().all()


def test_tables_are_made_on_the_device_of_the_call_whatever_the_default(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "MAX_DENSE_SCORES", 0)
    inputs = make_inputs(Case("yet more such grids", ((31, 3), (2, 41))), generator)
    with torch.device("meta"):
        found = run_backend(inputs, "sdpa")
    for name, expected in run_backend(inputs, "sdpa").items():
        assert torch.equal(found[name], expected)


def grid(side: int) -> SpatialShapes:
    return ((side, side),)


@pytest.fixture
def made() -> list[SpatialShapes]:
    return []


@pytest.fixture
def table(made: list[SpatialShapes]) -> tables.Getter[Tensor]:
    """A table that notes in `made` when it is made."""

    @tables.kept_on_device
    def make(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(shapes)
        return torch.zeros(1, dtype=dtype, device=device)

    return make


@pytest.mark.parametrize("is_captured", [False, True])
def test_a_table_that_a_graph_was_captured_with_is_kept_for_good(
    is_captured: bool, table: tables.Getter[Tensor], made: list[SpatialShapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = table(grid(1), torch.float32, LIKE)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "is_captured", lambda device: is_captured)
        assert table(grid(1), torch.float32, LIKE) is first
    for side in range(2, tables.MAX_KEPT + 2):
        table(grid(side), torch.float32, LIKE)
    assert (table(grid(1), torch.float32, LIKE) is first) == is_captured
    assert len(made) == tables.MAX_KEPT + 1 + (not is_captured)


def test_a_table_made_in_a_capture_is_the_graphs_own(
    table: tables.Getter[Tensor], made: list[SpatialShapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tables, "is_captured", lambda device: True)
        of_graph = table(grid(1), torch.float32, LIKE)
    assert table(grid(1), torch.float32, LIKE) is not of_graph
    assert len(made) == 2
