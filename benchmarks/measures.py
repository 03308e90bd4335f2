"""How each number of `smca bench` is measured, as rows of a subject (the measures of workloads.MEASURES).

- time: forward (without gradients) and forward + backward, peers in turns, inputs rotated past the caches.
- replay: the same as CUDA graphs, for workloads so small that launching takes a good part of the time.
- preparation: the part of a peer's forward that only builds masks or columns; it is in its time as well.
- saved: what autograd keeps between forward and backward, as distinct storages, the inputs' own among them.
- peak: most that torch's allocator held during forward + backward beyond inputs, output and gradients.
- overhead: one call on tiny inputs that require gradients, as the host sees it, beside torch's own SDPA.

The seconds of a compiled peer's first call are taken where it is let in, in gate.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from smca_kernels import explain_backend, smca_attention
from smca_kernels.profiling import measure as profiling
from smca_kernels.testing.parity import BACKENDS, Inputs

from . import limits
from .records import Left, Row, explain
from .subject import (
    SEED,
    Subject,
    grad_mode,
    input_bytes,
    make_call,
    output_bytes,
    per_scale_bytes,
    seconds_of,
    without_gradients,
)
from .workloads import BOTH, FORWARD

ROTATED_BYTES = 256e6  # of inputs taken in turns, so that none is still in a cache
MOST_ROTATED = 16
OVERHEAD_CALLS = 100  # in one measurement, so that the clock's own cost does not count
REPLAYED_ELEMENTS = 6e7  # up to here, launching may take longer than computing


@dataclass(frozen=True)
class Effort:
    """How long one step of one workload is measured, all peers together, and how often at least and at most."""

    seconds: float
    least: int
    most: int
    overhead: int

    def repeats(self, round_seconds: float) -> int:
        """How often each peer is measured, when one turn of all takes so long."""
        return max(self.least, min(self.most, int(self.seconds / round_seconds)))


def rotated_inputs(subject: Subject) -> list[Inputs]:
    """Inputs to take in turns, more than any cache holds."""
    first = subject.inputs()
    count = min(MOST_ROTATED, 1 + int(ROTATED_BYTES // input_bytes(first)))
    return [first, *(subject.inputs(SEED + i) for i in range(1, count))]


def in_turn(calls: Sequence[Callable[[], object]], repeat: int) -> None:
    calls[repeat % len(calls)]()


def measure_time(
    subject: Subject, sets: Sequence[Inputs], admitted: dict[str, list[str]], effort: Effort
) -> Iterator[Row | Left]:
    """Rows of time, of its preparation, and of CUDA-graph replays of small workloads."""
    for step, names in admitted.items():
        peers = [subject.peers[name] for name in names]
        calls: dict[str, Sequence[Callable[[], Any]]]
        calls = {peer.name: [make_call(peer, step, inputs) for inputs in sets] for peer in peers}
        if step == FORWARD:
            for peer in peers:
                if peer.prepare is not None:
                    plain = [partial(peer.prepare, without_gradients(inputs)) for inputs in sets]
                    calls[f"preparation of {peer.name}"] = plain
        yield from _times("time", subject, step, calls, effort)
        if subject.device.type == "cuda" and subject.workload.elements <= REPLAYED_ELEMENTS:
            replays = {}
            for peer in peers:
                replay = _captured_or_why_not(step, calls[peer.name])
                if isinstance(replay, str):
                    yield subject.left(peer.name, f"{step}, replay", replay)
                else:
                    replays[peer.name] = replay
            yield from _times("replay", subject, step, replays, effort)


def _times(
    measure: str,
    subject: Subject,
    step: str,
    calls: Mapping[str, Sequence[Callable[[], object]]],
    effort: Effort,
) -> Iterator[Row]:
    if not calls:
        return
    with grad_mode(step):
        one_round = sum(seconds_of(each[0], subject.device) for each in calls.values())
        turns = {name: partial(in_turn, each) for name, each in calls.items()}
        seconds = profiling.interleaved_times(turns, effort.repeats(one_round), subject.device)
    for name, values in seconds.items():
        peer = name.removeprefix("preparation of ")
        kind = measure if peer == name else "preparation"
        yield subject.row(kind, step, peer, [1e3 * value for value in values])


def _captured_or_why_not(step: str, calls: Sequence[Callable[[], object]]) -> list[Callable[[], None]] | str:
    try:
        with grad_mode(step):
            return captured(calls)
    except Exception as error:  # the end of a failed capture raises as well, and hides what went wrong
        return explain(error.__context__ or error)


def captured(calls: Sequence[Callable[[], object]]) -> list[Callable[[], None]]:
    """Calls as CUDA graphs, to be replayed one at a time, as they share the memory of what they compute."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = []
    with torch.cuda.stream(stream):  # a failed capture would leave its own stream the current one
        for call in calls:
            call()  # what a first call allocates or compiles must not be captured
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream):
                call()
    return [graph.replay for graph in graphs]


def measure_memory(subject: Subject, inputs: Inputs, names: Sequence[str]) -> Iterator[Row | Left]:
    """Rows of bytes saved for backward and of peak memory, in MB, and of the sizes that they are compared with."""
    given, outputs = input_bytes(inputs), output_bytes(inputs)
    yield subject.row("saved", FORWARD, "inputs", [given / 1e6])
    both = (given + per_scale_bytes(inputs)) / 1e6
    yield subject.row("saved", FORWARD, "inputs + outputs of each scale", [both])
    for name in names:
        peer = subject.peers[name]
        if peer.same:
            yield subject.row("saved", FORWARD, name, [profiling.saved_bytes(partial(peer.attend, inputs)) / 1e6])
            peak = profiling.peak_bytes(make_call(peer, BOTH, inputs), subject.device) - outputs
            yield subject.row("peak", BOTH, name, [max(peak, 0) / 1e6])


def host_times(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds that one host thread spends on each call, not waiting for the device."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking the others would be most of the time, and is not the call's overhead
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


def measure_overhead(subject: Subject, repeats: int) -> Iterator[Row]:
    """Rows of what one call costs on the host, recording for its backward, and what it costs with that."""
    inputs = subject.inputs()
    arguments = inputs.arguments()
    default = explain_backend(**arguments).backend
    leaves = list(inputs.differentiable().values())
    plain = (inputs.query, inputs.key, inputs.value)

    def our_call(backend: str, step: str) -> Callable[[], object]:
        forward = partial(smca_attention, **arguments, backend="auto" if backend == default else backend)
        return forward if step == FORWARD else lambda: torch.autograd.grad(forward(), leaves, inputs.grad_output)

    def plain_both() -> None:
        torch.autograd.grad(scaled_dot_product_attention(*plain), plain, inputs.grad_output)

    ours = [name for name in BACKENDS if name in subject.peers and not subject.peers[name].unsupported(inputs, True)]
    torch_calls: dict[str, Callable[[], object]]
    torch_calls = {FORWARD: partial(scaled_dot_product_attention, *plain), BOTH: plain_both}
    for step, torch_call in torch_calls.items():
        calls: dict[str, Callable[[], object]] = {"torch SDPA": torch_call}
        calls |= {name: our_call(name, step) for name in ours}
        for name, values in host_times(calls, repeats, subject.device).items():
            yield subject.row("overhead", step, name, values)


def limit_rows(subject: Subject) -> Iterator[Row]:
    """What the device could do at best, as rows of a peer "limit"; nothing where its limits aren't known."""
    if subject.device.type != "cuda":
        return
    card = limits.card_of(torch.cuda.get_device_capability(subject.device))
    if card is None:
        return
    multiprocessors = torch.cuda.get_device_properties(subject.device).multi_processor_count
    card = dataclasses.replace(card, multiprocessors=multiprocessors)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    for step in (FORWARD, BOTH):
        rate = limits.elements_per_second(card, step, subject.dtype, subject.workload.head_dim, tf32)
        yield subject.row("time", step, "limit", [1e3 * subject.workload.elements / rate])
