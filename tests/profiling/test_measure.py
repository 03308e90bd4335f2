"""What is measured: turns, peaks, bytes kept for backward, and which backends can be timed here."""

from __future__ import annotations

import time

import torch
from devices import CPU

from smca_kernels.profiling import measure as profiling
from smca_kernels.testing.cases import Case, make_inputs


def test_triton_is_not_timed_on_a_cpu_and_the_reason_is_given(generator: torch.Generator) -> None:
    usable, reasons = profiling.available_backends(make_inputs(Case("", ((2, 3),)), generator))
    assert "triton" not in usable
    assert "interpreter" in reasons["triton"]


def test_peak_counts_what_lives_at_once_and_not_what_was_freed_before() -> None:
    def call() -> None:
        for _ in range(3):
            a = torch.zeros(1_000_000)
            b = a + 1
            del a, b

    profiling.peak_bytes(lambda: None, CPU)
    assert 8_000_000 <= profiling.peak_bytes(call, CPU) < 8_100_000


def test_calls_are_timed_in_turns_after_a_warm_up() -> None:
    order: list[tuple[str, int]] = []
    seconds = profiling.interleaved_times(
        {"a": lambda repeat: order.append(("a", repeat)), "b": lambda repeat: time.sleep(0.01)}, 2, CPU
    )
    assert order == [("a", 0), ("a", 0), ("a", 1)]
    assert len(seconds["a"]) == 2
    assert min(seconds["b"]) >= 0.01


def test_saved_bytes_count_each_storage_once_and_whole() -> None:
    x = torch.rand(1000, requires_grad=True)
    assert profiling.saved_bytes(lambda: x * x) == 4000
    assert profiling.saved_bytes(lambda: (x[:10] * x[10:20]).exp()) == 4000 + 40
    assert profiling.saved_bytes(lambda: x + 1) == 0
