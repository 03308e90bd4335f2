"""A workload of a few cells, with a quick effort and quick peers, to run `smca bench` on in tests."""

from __future__ import annotations

import dataclasses

from smca_benchmarks import bench_attention, peers
from smca_benchmarks.cases import BenchmarkCase
from smca_benchmarks.measures import Effort
from smca_benchmarks.peers import PEERS, Peer
from smca_benchmarks.records import Report
from smca_benchmarks.workloads import Workload
from torch import Tensor

from smca_kernels.testing.cases import CaseInputs

FEW_CELLS = Workload("few cells", 2, ((4, 5), (2, 3)), queries=5, heads=2, head_dim=16)
QUICK = Effort(0.0, 2, 2, 2)
NAIVE_AND_OURS = {name: PEERS[name] for name in ("naive", "sdpa")}


def report_of(case: BenchmarkCase) -> Report:
    described = {name: bench_attention.describe_peer(peer) for name, peer in case.peers.items()}
    return Report({"device": case.device.type}, defaults={case.dtype: "sdpa"}, peers=described)


def wrong_in(name: str) -> Peer:
    """Naive with a gradient, or its output, a thousandth too large."""

    def attend(inputs: CaseInputs) -> Tensor:
        if name == "output":
            return peers.naive(inputs) * 1.001
        tensor = getattr(inputs, name)
        return peers.naive(dataclasses.replace(inputs, **{name: tensor + 1e-3 * (tensor - tensor.detach())}))

    return Peer("wrong", "", attend)
