"""One case on the compiled kernels: within its error budget, without a fault, with the same bits in every order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from smca_kernels import backends
from smca_kernels.testing.budget import Comparison
from smca_kernels.testing.cases import Case, CaseInputs, case_generator, make_inputs
from smca_kernels.testing.check import Expectation, run_backend

# How a launch's CTAs are run in turn: order, and how many at once.
SCHEDULES = (("forward", 4), ("reversed", 1), ("shuffled", 3))


@dataclass(frozen=True)
class CompiledCase:
    """A case, and how the machine runs it."""

    arch: int  # 80 for sm_80
    case: Case
    dropout_p: float = 0.0
    schedules: int = 1  # how many of SCHEDULES must give the same bits
    multiprocessors: int | None = None  # None: those of the architecture's GPU; 0: work is never split
    perturbed: bool = False  # approximate instructions err by as much as they may
    truncating: bool = False  # tensor cores round as the hardware does
    precision: str = "highest"  # torch.set_float32_matmul_precision

    @property
    def name(self) -> str:
        notes = {
            f"dropout {self.dropout_p}": self.dropout_p, f"{self.schedules} orders": self.schedules > 1,
            f"{self.multiprocessors} SMs": self.multiprocessors is not None, "perturbed": self.perturbed,
            "truncating": self.truncating, self.precision: self.precision != "highest",
        }  # fmt: skip
        return ", ".join([self.case.name, *(note for note, applies in notes.items() if applies)])


@dataclass
class Outcome:
    """What came of a case. `problems` is empty if it is right; a case that the backend refuses has only a reason."""

    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: str = ""
    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    seconds: float = 0.0  # executing


def check_compiled(compiled: CompiledCase, seed: int) -> Outcome:
    """Run a case on the machine, output and gradients, and compare them with the reference in float64.

    Args:
        compiled: what to run.
        seed: of the inputs, the order and dropout's mask.
    """
    from smca_kernels.testing.machine import arithmetic, tensor_cores
    from smca_kernels.testing.machine.launcher import smca_on_machine

    outcome = Outcome()
    inputs = make_inputs(compiled.case, case_generator(compiled.case, seed))
    inputs = replace(inputs, dropout_p=compiled.dropout_p)
    with smca_on_machine(compiled.arch):
        outcome.refused = backends.unsupported("triton", inputs) or ""
    if outcome.refused:
        return outcome
    first: dict[str, Tensor] = {}
    for order, at_once in SCHEDULES[: compiled.schedules]:
        torch.manual_seed(seed)
        with ExitStack() as stack:
            stack.enter_context(_matmul_precision(compiled.precision))
            if compiled.perturbed:
                stack.enter_context(arithmetic.perturbed(seed))
            if compiled.truncating:
                stack.enter_context(tensor_cores.truncating())
            machine = smca_on_machine(compiled.arch, compiled.multiprocessors, order=order, at_once=at_once, seed=seed)
            session = stack.enter_context(machine)
            actual = run_backend(inputs, "triton")
        outcome.seconds += session.seconds
        outcome.launches = session.launches
        outcome.problems += map(str, session.faults.found.values())
        for name, tensor in actual.items():
            if unwritten := session.unwritten(tensor):
                outcome.problems.append(f"{name}: {unwritten} bytes that no kernel wrote")
            if not torch.equal(tensor.view(torch.uint8), first.setdefault(name, tensor).view(torch.uint8)):
                outcome.problems.append(f"{name}: other bits in order {order}, {at_once} at once")
    with _dropping(inputs, seed):
        expectation = Expectation.of(inputs)
        if compiled.precision != "highest":
            expectation = _with_budget_of_tf32(expectation)
    outcome.comparisons = expectation.compare(first)
    outcome.problems += [str(c) for c in outcome.comparisons if not c.ratio <= 1.0]
    return outcome


def _with_budget_of_tf32(expectation: Expectation) -> Expectation:
    """Twice what eager errs by in float16, which has TF32's mantissa: tensor cores cut operands, and do not round."""
    inputs = expectation.inputs
    halves: dict[str, Any] = {
        name: getattr(inputs, name).detach().half().requires_grad_() for name in ("query", "key", "value")
    }
    halves["grad_output"] = inputs.grad_output.half()
    of_half = Expectation.of(replace(inputs, **halves))
    errors = {name: [2.0 * error for error in each] for name, each in of_half.eager_errors.items()}
    return replace(expectation, inputs=of_half.inputs, eager_errors=errors)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _dropping(inputs: CaseInputs, seed: int) -> Iterator[None]:
    """Let the reference drop what the kernels drop whose call began with torch.manual_seed(seed)."""
    if not inputs.dropout_p:
        yield
        return
    from smca_kernels.backends.triton.operator import dropout_mask

    torch.manual_seed(seed)
    drop_seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    batch, heads, queries, _ = inputs.query.shape
    kept = dropout_mask(drop_seed, batch, heads, queries, inputs.key.shape[2], inputs.dropout_p)
    masks = kept.split(inputs.keys_per_scale(), dim=3)
    calls = 0

    def dropout(probabilities: Tensor, p: float, train: bool) -> Tensor:
        nonlocal calls
        mask, calls = masks[calls % len(masks)], calls + 1
        return torch.where(mask, probabilities / (1.0 - p), 0.0) if p < 1.0 else probabilities * 0.0

    with mock.patch.object(torch, "dropout", dropout):
        yield
