"""Workloads of `smca bench`: their shapes, padding and inputs, and those that a device measures."""

from __future__ import annotations

import pytest
from devices import CPU
from smca_benchmarks.cases import BenchmarkCase
from smca_benchmarks.workloads import DEFAULT_WORKLOADS, WORKLOADS, Workload

from smca_kernels.backends import reference


def test_detector_workload_is_the_one_that_the_bars_are_stated_for() -> None:
    detector = WORKLOADS["full-b2"]
    assert (detector.batch, detector.queries, detector.heads, detector.head_dim) == (2, 300, 8, 32)
    assert detector.spatial_shapes == ((50, 84), (25, 42), (13, 21))


def test_every_grid_is_measured_at_every_batch_size() -> None:
    found = {(workload.name.split("-")[0], workload.batch) for workload in WORKLOADS.values()}
    assert {(grid, batch) for grid in ("basic", "dc5", "full", "pyramid") for batch in (1, 2, 16)} <= found
    assert WORKLOADS["full-b2-900"].queries == 900
    assert WORKLOADS["full-b2-d64"].head_dim == 64


def test_defaults_of_a_device_exist_and_start_with_what_the_bars_name() -> None:
    for names in DEFAULT_WORKLOADS.values():
        assert set(names) <= set(WORKLOADS)
        assert names[0] == "full-b2"


def test_workload_has_the_inputs_that_it_says(case: BenchmarkCase) -> None:
    inputs = case.inputs()
    assert inputs.query.shape == (2, 2, 5, 16)
    assert inputs.key.shape == (2, 2, 26, 16)
    assert inputs.center.shape == (2, 2, 5, 2, 2)
    assert inputs.valid_shapes is None
    assert all(tensor.requires_grad for tensor in inputs.differentiable().values())


def test_padded_workload_is_three_tenths_padding_and_counts_no_padded_element() -> None:
    padded = Workload("padded", 2, ((10, 20),), queries=3, heads=2, image_share=0.7)
    inputs = padded.inputs("float32", 0, CPU)
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, None)[0]
    assert ignored is not None
    assert ignored.float().mean().item() == pytest.approx(0.3)
    assert padded.elements == 2 * 3 * int((~ignored).sum())
