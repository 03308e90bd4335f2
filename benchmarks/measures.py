"""Measurements of `smca bench`: functions that give the rows of a case, one for each of workloads.MEASURES.

- time: forward (without gradients) and forward + backward, peers in turns, inputs rotated past the caches.
- slowdown: time beside a process that keeps one core busy, as a data loader does, over the time without; on CPUs.
- replay: the same as CUDA graphs, for workloads so small that launching takes a good part of the time.
- preparation: the part of a peer's forward that only builds masks or columns; it is in its time as well.
- saved: what autograd keeps between forward and backward, as distinct storages, the inputs' own among them.
- peak: maximum that torch's allocator held during forward + backward, beyond inputs, output and gradients.
- overhead: host time of one call on tiny inputs that require gradients, beside torch's own SDPA.

admission.py takes the time of a compiled peer's first call, planned_elements.py counts elements.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from smca_kernels import explain_backend, smca_attention
from smca_kernels.profiling import measure as profiling
from smca_kernels.testing.cases import CaseInputs
from smca_kernels.tools.parity.command import BACKENDS

from . import limits
from .cases import (
    SEED,
    BenchmarkCase,
    grad_mode,
    input_bytes,
    make_call,
    output_bytes,
    per_scale_bytes,
    seconds_of,
)
from .records import Row, Skipped, explain
from .workloads import BOTH, CROWDED, FORWARD

ROTATED_BYTES = 256e6  # of inputs used in turn, so that none is still in a cache
MAX_ROTATED = 16
OVERHEAD_CALLS = 100  # in one measurement, so that the clock's own cost does not count
REPLAYED_ELEMENTS = 6e7  # up to here, launching may take longer than computing
COMPARED_SLOWDOWNS = ("naive", "plain-sdpa")  # beside ours
# Ends with the process that started it, however that ends.
BUSY_PROCESS = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


@dataclass(frozen=True)
class Effort:
    """Limits on the repeats of a measurement.

    Attributes:
        seconds: time for one step of one workload, all peers together.
        min_repeats, max_repeats: of each peer, whatever that time allows.
        overhead_repeats: of a tiny call.
    """

    seconds: float
    min_repeats: int
    max_repeats: int
    overhead_repeats: int

    def repeats(self, round_seconds: float) -> int:
        """Number of repeats when one round of all peers takes so many seconds."""
        return max(self.min_repeats, min(self.max_repeats, int(self.seconds / round_seconds)))


def rotated_inputs(case: BenchmarkCase) -> list[CaseInputs]:
    """CaseInputs to use in turn, more than any cache holds."""
    first = case.inputs()
    count = min(MAX_ROTATED, 1 + int(ROTATED_BYTES // input_bytes(first)))
    return [first, *(case.inputs(SEED + i) for i in range(1, count))]


def in_turn(calls: Sequence[Callable[[], object]], repeat: int) -> None:
    """Make the call whose turn it is."""
    calls[repeat % len(calls)]()


def measure_time(
    case: BenchmarkCase, sets: Sequence[CaseInputs], admitted: dict[str, list[str]], effort: Effort
) -> Iterator[Row | Skipped]:
    """Rows of time, of its preparation, and of CUDA-graph replays of small workloads."""
    for step, names in admitted.items():
        peers = [case.peers[name] for name in names]
        calls: dict[str, Sequence[Callable[[], Any]]]
        calls = {peer.name: [make_call(peer, step, inputs) for inputs in sets] for peer in peers}
        if step == FORWARD:
            for peer in peers:
                if peer.prepare is not None:
                    plain = [partial(peer.prepare, inputs.detached()) for inputs in sets]
                    calls[f"preparation of {peer.name}"] = plain
        yield from _times("time", case, step, calls, effort)
        if case.device.type == "cuda" and case.workload.elements <= REPLAYED_ELEMENTS:
            replays = {}
            for peer in peers:
                replay = _captured_or_reason(step, calls[peer.name])
                if isinstance(replay, str):
                    yield case.skipped(peer.name, f"{step}, replay", replay)
                else:
                    replays[peer.name] = replay
            yield from _times("replay", case, step, replays, effort)


def measure_slowdown(
    case: BenchmarkCase, sets: Sequence[CaseInputs], admitted: dict[str, list[str]], effort: Effort
) -> Iterator[Row]:
    """Rows of the time beside a busy process over the time without, for workloads of `CROWDED` on a CPU."""
    if case.device.type != "cpu" or case.workload.name not in CROWDED:
        return
    for step, names in admitted.items():
        peers = [case.peers[name] for name in names if name in COMPARED_SLOWDOWNS or case.peers[name].ours]
        calls = {peer.name: [make_call(peer, step, inputs) for inputs in sets] for peer in peers}
        quiet = {row.peer: row.value for row in _times("time", case, step, calls, effort)}
        with busy_process(), grad_mode(step):
            turns = {name: partial(in_turn, each) for name, each in calls.items()}
            repeats = effort.repeats(sum(quiet.values()) / 1e3)
            crowded = profiling.interleaved_times(turns, repeats, case.device)
        for name, values in crowded.items():
            yield case.row("slowdown", step, name, [1e3 * value / quiet[name] for value in values])


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy from another process."""
    with subprocess.Popen([sys.executable, "-c", BUSY_PROCESS, str(os.getpid())]) as process:
        try:
            yield
        finally:
            process.kill()


def _times(
    measure: str,
    case: BenchmarkCase,
    step: str,
    calls: Mapping[str, Sequence[Callable[[], object]]],
    effort: Effort,
) -> Iterator[Row]:
    if not calls:
        return
    with grad_mode(step):
        one_round = sum(seconds_of(each[0], case.device) for each in calls.values())
        turns = {name: partial(in_turn, each) for name, each in calls.items()}
        seconds = profiling.interleaved_times(turns, effort.repeats(one_round), case.device)
    for name, values in seconds.items():
        peer = name.removeprefix("preparation of ")
        kind = measure if peer == name else "preparation"
        yield case.row(kind, step, peer, [1e3 * value for value in values])


def _captured_or_reason(step: str, calls: Sequence[Callable[[], object]]) -> list[Callable[[], None]] | str:
    try:
        with grad_mode(step):
            return captured(calls)
    except Exception as error:  # the end of a failed capture raises as well, and hides the cause
        return explain(error.__context__ or error)


def captured(calls: Sequence[Callable[[], object]]) -> list[Callable[[], None]]:
    """Capture calls as CUDA graphs, which share memory: replay one at a time."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = []
    with torch.cuda.stream(stream):  # a failed capture would leave its own stream the current one
        for call in calls:
            call()  # the first call allocates and compiles, which must not be captured
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
                call()
    return [graph.replay for graph in graphs]


def measure_memory(case: BenchmarkCase, inputs: CaseInputs, names: Sequence[str]) -> Iterator[Row | Skipped]:
    """Rows of memory saved for backward and at its peak, in MB, and of the sizes that they are compared with."""
    given, outputs = input_bytes(inputs), output_bytes(inputs)
    yield case.row("saved", FORWARD, "inputs", [given / 1e6])
    both = (given + per_scale_bytes(inputs)) / 1e6
    yield case.row("saved", FORWARD, "inputs + outputs of each scale", [both])
    for name in names:
        peer = case.peers[name]
        if peer.same:
            yield case.row("saved", FORWARD, name, [profiling.saved_bytes(partial(peer.attend, inputs)) / 1e6])
            peak = profiling.peak_bytes(make_call(peer, BOTH, inputs), case.device) - outputs
            yield case.row("peak", BOTH, name, [max(peak, 0) / 1e6])


def host_times(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of one host thread per call, without waiting for the device."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking the others would take most of the time, and is not the call's overhead
    try:
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(OVERHEAD_CALLS):
                    call()
                seconds = time.perf_counter() - start
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if repeat > 0:  # the first warms up
                    values[name].append(1e6 * seconds / OVERHEAD_CALLS)
    finally:
        torch.set_num_threads(threads)
    return values


def measure_overhead(case: BenchmarkCase, repeats: int) -> Iterator[Row]:
    """Rows of the host time of one call that records gradients, without and with its backward."""
    inputs = case.inputs()
    arguments = inputs.arguments()
    default = explain_backend(**arguments).backend
    leaves = list(inputs.differentiable().values())
    plain = (inputs.query, inputs.key, inputs.value)

    def our_call(backend: str, step: str) -> Callable[[], object]:
        forward = partial(smca_attention, **arguments, backend="auto" if backend == default else backend)
        return forward if step == FORWARD else lambda: torch.autograd.grad(forward(), leaves, inputs.grad_output)

    def plain_both() -> None:
        torch.autograd.grad(scaled_dot_product_attention(*plain), plain, inputs.grad_output)

    ours = [name for name in BACKENDS if name in case.peers and not case.peers[name].unsupported(inputs, True)]
    torch_calls: dict[str, Callable[[], object]]
    torch_calls = {FORWARD: partial(scaled_dot_product_attention, *plain), BOTH: plain_both}
    for step, torch_call in torch_calls.items():
        calls: dict[str, Callable[[], object]] = {"torch SDPA": torch_call}
        calls |= {name: our_call(name, step) for name in ours}
        for name, values in host_times(calls, repeats, case.device).items():
            yield case.row("overhead", step, name, values)


def limit_rows(case: BenchmarkCase) -> Iterator[Row]:
    """Rows of a peer "limit", the least time that the device could take; none where its limits aren't known."""
    if case.device.type != "cuda":
        return
    card = limits.card_of(torch.cuda.get_device_capability(case.device))
    if card is None:
        return
    multiprocessors = torch.cuda.get_device_properties(case.device).multi_processor_count
    card = dataclasses.replace(card, multiprocessors=multiprocessors)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    for step in (FORWARD, BOTH):
        rate = limits.elements_per_second(card, step, case.dtype, case.workload.head_dim, tf32)
        yield case.row("time", step, "limit", [1e3 * case.workload.elements / rate])
