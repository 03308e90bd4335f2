"""The case that most tests of `smca bench` measure."""

from __future__ import annotations

import pytest
from devices import CPU
from few_cells import FEW_CELLS, NAIVE_AND_OURS
from smca_benchmarks.cases import BenchmarkCase


@pytest.fixture
def case() -> BenchmarkCase:
    return BenchmarkCase(FEW_CELLS, "float32", CPU, NAIVE_AND_OURS)
