"""Measuring calls: time in turns, memory at its peak, bytes kept for backward, and which backends can be measured."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from smca_kernels.attention import explain_backend
from smca_kernels.backends import BACKENDS
from smca_kernels.inputs import AttentionInputs

HEAD_START_CYCLES = 2_000_000  # of a GPU: 1 ms, in which the host launches a hundred kernels


def available_backends(inputs: AttentionInputs) -> tuple[list[str], dict[str, str]]:
    """Find the fused backends that can be run and timed here, and the reason against each other one."""
    usable, reasons = [], {}
    for name in BACKENDS:
        if name == "reference":
            continue
        if name == "triton" and inputs.query.device.type == "cpu":
            reasons[name] = (
                "its kernels are compiled for GPUs. Triton's interpreter can run them here to check them "
                "(`smca parity`), but one operation at a time in Python: its time would say nothing"
            )
            continue
        try:
            explain_backend(**inputs.arguments(), backend=name)
            usable.append(name)
        except ValueError as error:
            reasons[name] = str(error)
    return usable, reasons


def interleaved_times(
    calls: Mapping[str, Callable[[int], object]], repeats: int, device: torch.device, *, ahead: bool = False
) -> dict[str, list[float]]:
    """Measure the seconds of each call in turns, so that a slow moment of the machine hits all of them.

    Args:
        calls: by name, functions of the number of the repeat (to take other inputs each time).
        repeats: measurements of each call, after one that does not count.
        device: where the work happens; on a GPU its own clock (CUDA events) is read, else the wall clock.
        ahead: give the host a head start on the GPU, which then never waits for it: the time of its work alone.
    """
    for call in calls.values():
        call(0)
    if device.type != "cuda":
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call(repeat)
                seconds[name].append(time.perf_counter() - start)
        return seconds
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    torch.cuda.synchronize(device)
    for repeat in range(repeats):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if ahead:
                torch.cuda._sleep(HEAD_START_CYCLES)
            begin.record()
            call(repeat)
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in events.items()}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Measure the most bytes that torch's allocator held during a call beyond what it held before it.

    On a GPU the allocator counts them itself; on a CPU they are summed up from torch.profiler's record of
    every allocation, so that buffers inside of operations count as well.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start on stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text("utf-8"))["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held = itertools.accumulate(event["args"]["Bytes"] for event in events)
    return max(held, default=0)


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Count the bytes of the distinct storages that autograd holds after a call, for its backward."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # kept, or a later storage could have the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in storages.values())
