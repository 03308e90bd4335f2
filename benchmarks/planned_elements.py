"""Elements that a plan leaves to compute, counted by the kernels' twin in PyTorch: no GPU is needed.

Rows of the measure "computed" are millions of pairs of a query and a key, for the blocks of the kernels'
configurations on sm_90: with the default mass_tolerance under "triton", with 0 under "triton-all".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

import torch

from .cases import SEED
from .records import Row
from .workloads import DTYPES, FORWARD, MEASURES, Workload

ARCHITECTURE = 90


def planned_rows(workloads: Sequence[Workload]) -> Iterator[Row]:
    """Rows of workloads without padding, in every dtype; none where Triton isn't installed."""
    if importlib.util.find_spec("triton") is None:
        return
    from smca_kernels.backends.triton import configurations, locality

    for workload in workloads:
        for dtype_name in DTYPES["cuda"]:
            inputs = workload.inputs(dtype_name, SEED, torch.device("cpu"))
            dtype, head_dim = inputs.query.dtype, workload.head_dim
            block = configurations.configuration("forward", ARCHITECTURE, dtype, head_dim).block_n
            plan = locality.plan(inputs, block)
            counts = {"triton": plan.computed().sum().item(), "triton-all": float(workload.elements)}
            for peer, count in counts.items():
                about = "computed", workload.name, FORWARD, dtype_name, peer, MEASURES["computed"]
                yield Row(*about, value=count / 1e6, q20=None, q80=None, repeats=1)
