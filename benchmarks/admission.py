"""Admission to a measurement: peers that can run, compile in time and, if they are ours, are at parity with float64.

Each peer computes output and gradients on the very inputs to be timed. Some heads of one image are compared with the
operator in float64, within the error budget of `smca parity`. A backend of this library that exceeds the budget is not
measured and fails the run; another peer that exceeds it is measured, and its error is published.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smca_kernels.testing.budget import Comparison, poisoned_memory
from smca_kernels.testing.cases import CaseInputs
from smca_kernels.testing.check import Expectation

from .cases import BenchmarkCase, grad_mode, make_call, seconds_of
from .records import Parity, Report, explain
from .workloads import BOTH, FORWARD

if TYPE_CHECKING:
    from .peers import Peer

MAX_ELEMENTS = {"cpu": 2e6, "cuda": 4e7}  # compared with float64, but at least one head of one image


def part_of(inputs: CaseInputs, image: int, heads: slice) -> CaseInputs:
    """CaseInputs of some heads of one image alone, on which no other image or head has an influence."""
    tensors: dict[str, Any] = {
        name: tensor[image : image + 1, heads].detach().requires_grad_()
        for name, tensor in inputs.differentiable().items()
    }
    valid = None if inputs.valid_shapes is None else inputs.valid_shapes[image : image + 1]
    grad_output = inputs.grad_output[image : image + 1, heads]
    return dataclasses.replace(inputs, **tensors, valid_shapes=valid, grad_output=grad_output)


@dataclass(frozen=True)
class ParityCheck:
    """Comparison of peers with float64 and eager PyTorch, on some heads of one image of a workload."""

    case: BenchmarkCase
    inputs: CaseInputs  # all images and heads
    image: int
    heads: slice
    part: CaseInputs
    compare: Callable[[dict[str, Tensor]], list[Comparison]]

    @classmethod
    def of(cls, case: BenchmarkCase, inputs: CaseInputs) -> ParityCheck:
        """Choose image and heads at random, and compute what is expected of them."""
        workload = case.workload
        elements = workload.queries * workload.keys
        count = int(min(workload.heads, max(1, MAX_ELEMENTS[case.device.type] // elements)))
        image = int(torch.randint(workload.batch, ()))
        first = int(torch.randint(workload.heads - count + 1, ()))
        heads = slice(first, first + count)
        part = part_of(inputs, image, heads)
        return cls(case, inputs, image, heads, part, Expectation.of(part).compare)

    def check(self, peer: Peer, step: str) -> Parity:
        """Run a peer on all inputs, in poisoned memory, and compare this part of its output and gradients."""
        # The poison's deterministic mode would have compiled code compiled again.
        with nullcontext() if peer.compiled else poisoned_memory(), grad_mode(step):
            if step == FORWARD:
                results = {"output": peer.attend(self.inputs.detached())}
            else:
                output = peer.attend(self.inputs)
                tensors = self.inputs.differentiable()
                gradients = torch.autograd.grad(output, list(tensors.values()), self.inputs.grad_output)
                results = {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}
        parts = {name: tensor[self.image : self.image + 1, self.heads] for name, tensor in results.items()}
        worst = max(self.compare(parts), key=lambda comparison: comparison.ratio)
        return Parity(
            workload=self.case.workload.name,
            dtype=self.case.dtype,
            peer=peer.name,
            ratio=worst.ratio,
            worst=worst.name,
            where=f"image {self.image}, heads {self.heads.start} to {self.heads.stop - 1}",
            logit_error=peer.logit_error(self.part) if peer.logit_error is not None else None,
        )


@dataclass
class Clock:
    """Time budget of a run."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def may_begin(self) -> bool:
        return self.spent < self.seconds

    @property
    def may_compile(self) -> bool:
        return self.spent < self.seconds / 2


def admit(case: BenchmarkCase, inputs: CaseInputs, clock: Clock, report: Report) -> dict[str, list[str]]:
    """Choose the peers to measure.

    Args:
        case: workload, dtype, device and peers.
        inputs: the inputs to be timed.
        clock: time budget; half of it may be spent on compiling.
        report: receives parity, compile times, and the reasons against peers that are not admitted.

    Returns:
        names of the admitted peers, for each step.
    """
    parity_check = ParityCheck.of(case, inputs)
    admitted: dict[str, list[str]] = {FORWARD: [], BOTH: []}
    for name, peer in case.peers.items():
        reasons = {step: peer.unsupported(inputs, step == BOTH) for step in admitted}
        if peer.compiled and not clock.may_compile:
            reasons = dict.fromkeys(admitted, "it compiles, and the time for that was up")
        parity = None
        for step in (BOTH, FORWARD):
            if reasons[step] is not None:
                continue
            try:
                if not peer.same:
                    seconds = seconds_of(make_call(peer, step, inputs), case.device)
                elif parity is None:
                    start = time.perf_counter()
                    parity = parity_check.check(peer, step)
                    seconds = time.perf_counter() - start
                elif peer.compiled:
                    with grad_mode(step):
                        seconds = seconds_of(make_call(peer, step, inputs), case.device)
            except Exception as error:  # a failing peer is a line of the table, and must not end the run
                reasons[step] = explain(error)
                continue
            if peer.compiled:
                report.rows.append(case.row("compile", step, name, [seconds]))
        if parity is not None:
            report.parity.append(parity)
            if peer.ours and not parity.within:
                reasons = dict.fromkeys(admitted, f"PARITY FAILED: {parity}")
        for step, names in admitted.items():
            if reasons[step] is None:
                names.append(name)
        if len(set(reasons.values())) == 1:
            reasons = {"": reasons[FORWARD]}
        report.not_measured += [case.skipped(name, step, reason) for step, reason in reasons.items() if reason]
    return admitted
