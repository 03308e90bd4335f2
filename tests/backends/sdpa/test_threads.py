"""Heads shared out among threads: what each takes, errors, contexts, who sees the work, and forked processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smca_kernels.backends.sdpa import backward, forward, threads
from smca_kernels.testing.cases import Case, make_inputs
from smca_kernels.testing.check import check, run_backend

CPU_TENSOR = torch.empty(0)
SEVERAL_HEADS = Case("several heads", ((5, 7), (3, 4)), batch=2, heads=5, queries=9, mask="valid_shapes")


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads of torch's, and no work too small to be shared out."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "MIN_SHARED_SCORES", 0)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def parts_of(count: int, scores: int = 1, tensor: Tensor = CPU_TENSOR) -> list[tuple[int, int, str, int]]:
    """First, last, name of the thread and its threads of torch's, in order."""
    parts: list[tuple[int, int, str, int]] = []

    def work(first: int, last: int) -> None:
        parts.append((first, last, threading.current_thread().name, torch.get_num_threads()))

    threads.share_out(work, count, scores, tensor)
    return sorted(parts)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_cover_the_range_once_and_leave_the_callers_threads_alone(count: int) -> None:
    parts = parts_of(count)
    assert [i for first, last, *_ in parts for i in range(first, last)] == list(range(count))
    assert [(name.startswith("smca_sdpa"), each) for *_, name, each in parts] == [(True, 1)] * min(count, 3)
    assert torch.get_num_threads() == 3
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [3]


@pytest.mark.usefixtures("three_threads")
def test_threads_that_are_left_over_help_inside_of_a_part() -> None:
    torch.set_num_threads(7)
    assert [each for *_, each in parts_of(3)] == [2, 2, 2]


@pytest.mark.usefixtures("three_threads")
def test_one_head_few_scores_and_other_devices_stay_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.current_thread().name
    monkeypatch.setattr(threads, "MIN_SHARED_SCORES", 100)
    assert parts_of(1, 100) == [(0, 1, here, 3)]
    assert parts_of(4, 99) == [(0, 4, here, 3)]
    assert parts_of(4, 100, CPU_TENSOR.to("meta")) == [(0, 4, here, 3)]
    assert len(parts_of(4, 100)) == 3


@pytest.mark.usefixtures("three_threads")
def test_modes_and_profilers_see_all_of_the_work() -> None:
    here = threading.current_thread().name
    with TorchDispatchMode():
        assert parts_of(4) == [(0, 4, here, 3)]
    with torch.profiler.profile():
        assert parts_of(4) == [(0, 4, here, 3)]
    assert len(parts_of(4)) == 3


@pytest.mark.usefixtures("three_threads")
def test_error_in_a_part_is_the_callers() -> None:
    def work(first: int, last: int) -> None:
        if first > 0:
            raise RuntimeError(f"no room from {first} on")

    with pytest.raises(RuntimeError, match="no room from 1 on"):
        threads.share_out(work, 3, 1, CPU_TENSOR)


@pytest.mark.usefixtures("three_threads")
def test_threads_that_the_system_refuses_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse_the_second(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    torch.set_num_threads(5)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_the_second)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            parts_of(5)
    assert torch.get_num_threads() == 5
    started[0].join(20)
    assert not started[0].is_alive()
    assert len(parts_of(5)) == 5


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_part_records_gradients(context: Callable[[], torch.no_grad]) -> None:
    weight, out = torch.ones(3, requires_grad=True), []

    def work(first: int, last: int) -> None:
        out.append(weight[first:last] * 2)

    with context():
        threads.share_out(work, 3, 1, CPU_TENSOR)
    assert [(tensor.requires_grad, tensor.is_inference()) for tensor in out] == [
        (False, context is torch.inference_mode)
    ] * 3


@pytest.mark.usefixtures("three_threads")
def test_shared_out_heads_stay_within_the_budget_and_repeat_their_bits(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "MAX_DENSE_SCORES", 0)
    inputs = make_inputs(SEVERAL_HEADS, generator)
    over = [str(each) for each in check(inputs, "sdpa") if not each.ratio <= 1.0]
    assert not over, "\n".join(over)
    first, second = (run_backend(inputs, "sdpa") for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.usefixtures("three_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_process_starts_threads_of_its_own() -> None:
    assert len(parts_of(3)) == 3
    child = os.fork()
    if child == 0:
        torch.set_num_threads(3)
        os._exit(0 if len(parts_of(3)) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
