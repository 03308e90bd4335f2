"""Elements that a plan leaves to compute, for the priors that the bars are stated for."""

from __future__ import annotations

from devices import needs_triton
from smca_benchmarks.planned_elements import planned_rows
from smca_benchmarks.workloads import DTYPES, WORKLOADS


@needs_triton
def test_elements_are_counted_that_a_plan_leaves_to_compute() -> None:
    # Narrow priors at σ/W = 0.02 with 300 queries: at most 1/1.8 of all; without a prior, all.
    workloads = [WORKLOADS[f"pyramid-b2-{prior}"] for prior in ("narrow", "off")]
    counts = {(row.workload, row.dtype, row.peer): row.value for row in planned_rows(workloads)}
    for dtype in DTYPES["cuda"]:
        everything = workloads[0].elements / 1e6
        assert counts["pyramid-b2-narrow", dtype, "triton"] < everything / 1.8
        assert counts["pyramid-b2-off", dtype, "triton"] == everything
        assert {counts[workload.name, dtype, "triton-all"] for workload in workloads} == {everything}
