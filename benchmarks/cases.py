"""Cases of `smca bench`: a workload in one dtype on one device with its peers, and the calls that are measured.

`make_call` gives a peer's forward, or its forward and backward, ready to be called; call it inside `grad_mode` of the
same step. Measured memory is compared with the sizes of inputs and outputs, which the last three functions give.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smca_kernels.testing.cases import CaseInputs

from .records import Row, Skipped
from .workloads import FORWARD, MEASURES, Workload

if TYPE_CHECKING:
    from .peers import Peer

SEED = 0


@dataclass(frozen=True)
class BenchmarkCase:
    """A workload in one dtype on one device, and its peers."""

    workload: Workload
    dtype: str
    device: torch.device
    peers: Mapping[str, Peer]

    def inputs(self, seed: int = SEED) -> CaseInputs:
        """Random inputs that require gradients."""
        return self.workload.inputs(self.dtype, seed, self.device)

    def row(self, measure: str, step: str, peer: str, values: Sequence[float]) -> Row:
        """Median and quantiles of values, in the measure's unit."""
        cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else None
        return Row(
            measure=measure,
            workload=self.workload.name,
            step=step,
            dtype=self.dtype,
            peer=peer,
            unit=MEASURES[measure],
            value=statistics.median(values),
            q20=cuts[0] if cuts else None,
            q80=cuts[-1] if cuts else None,
            repeats=len(values),
        )

    def skipped(self, peer: str, step: str, reason: str) -> Skipped:
        """Record that a peer, or with "" the whole workload, was not measured."""
        return Skipped(self.workload.name, self.dtype, peer, step, reason)


def make_call(peer: Peer, step: str, inputs: CaseInputs) -> Callable[[], Any]:
    """Prepare a call of a peer's forward, or of its forward and backward, on these inputs."""
    if step == FORWARD:
        return partial(peer.attend, inputs.detached())
    leaves = list(inputs.differentiable().values())

    def both() -> tuple[Tensor, ...]:
        # A peer that computes another function need not use all of the inputs.
        return torch.autograd.grad(peer.attend(inputs), leaves, inputs.grad_output, allow_unused=not peer.same)

    return both


def grad_mode(step: str) -> torch.set_grad_enabled:
    """Context that records gradients if the step has a backward."""
    return torch.set_grad_enabled(step != FORWARD)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until the device has finished it."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def input_bytes(inputs: CaseInputs) -> int:
    """Bytes of the operator's six tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.differentiable().values())


def output_bytes(inputs: CaseInputs) -> int:
    """Bytes of the output and the six gradients."""
    return input_bytes(inputs) + inputs.query.numel() * inputs.query.element_size()


def per_scale_bytes(inputs: CaseInputs) -> int:
    """Bytes of an output and a log-sum-exp of every row for every scale, in float32 as the kernels keep them."""
    return 4 * len(inputs.spatial_shapes) * (inputs.query.numel() + inputs.query.shape[:3].numel())
