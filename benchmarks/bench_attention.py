"""`smca bench`: the operator against everything that could take its place. Parity first; then time, memory, overhead.

- time: forward (without gradients) and forward + backward, peers in turns, inputs rotated past the caches.
- replay: the same as CUDA graphs, for workloads so small that launching takes a good part of the time.
- preparation: the part of a peer's forward that only builds masks or columns; it is in its time as well.
- compile: seconds of a compiled peer's first call.
- saved: what autograd keeps between forward and backward, as distinct storages, the inputs' own among them.
- peak: most that torch's allocator held during forward + backward beyond inputs, output and gradients.
- overhead: one call on tiny inputs that require gradients, as the host sees it, beside torch's own SDPA.

docs/benchmarks.md tells how to read the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import write_text

from .workloads import BARS, BOTH, DEFAULT_WORKLOADS, DTYPES, FORWARD, MEASURES, TINY, WORKLOADS, Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smca_kernels.parity import Comparison, Inputs

    from .peers import Peer

SEED = 0
ROTATED_BYTES = 256e6  # of inputs taken in turns, so that none is still in a cache
MOST_ROTATED = 16
OVERHEAD_CALLS = 100  # in one measurement, so that the clock's own cost does not count
GATE_ELEMENTS = {"cpu": 2e6, "cuda": 4e7}  # compared with float64, at least one head of one image
REPLAYED_ELEMENTS = 6e6  # up to here, launching may take longer than computing


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


EFFORTS = {"cpu": Effort(5.0, 3, 30, 31), "cuda": Effort(0.6, 10, 100, 31)}
QUICK_EFFORTS = {"cpu": Effort(0.5, 2, 5, 5), "cuda": Effort(0.2, 5, 20, 5)}
# No workload is begun later, and nothing compiled after half of it.
SECONDS = {"cpu": 100.0, "cuda": 900.0}


@dataclass(frozen=True)
class Row:
    """One number of one peer: `value`, a median where there are quantiles."""

    measure: str
    workload: str
    step: str
    dtype: str
    peer: str
    unit: str
    value: float
    q20: float | None
    q80: float | None
    repeats: int


@dataclass(frozen=True)
class Parity:
    """How a peer compares with float64: error / budget of the worst tensor, and the worst logit where it rounds.

    `where` is what was compared: one image and some of its heads, drawn anew in every run.
    """

    workload: str
    dtype: str
    peer: str
    ratio: float
    worst: str
    where: str
    logit_error: float | None

    @property
    def within(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return f"{self.worst} is off by {self.ratio:.3g} × its budget ({self.where})"


@dataclass(frozen=True)
class Left:
    """What was not measured, and why; step "" stands for all of a peer, peer "" for all of a workload."""

    workload: str
    dtype: str
    peer: str
    step: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """A bar held against two rows."""

    bar: str
    measure: str
    workload: str
    step: str
    dtype: str
    peer: str
    against: str
    value: float
    base: float
    met: bool


@dataclass
class Report:
    """All that a run found; `write` keeps it in a file while it grows."""

    environment: dict[str, Any]
    path: Path | None = None
    defaults: dict[str, str] = field(default_factory=dict)  # dtype: what backend="auto" chooses
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    parity: list[Parity] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    not_measured: list[Left] = field(default_factory=list)
    finished: bool = False

    @property
    def broken(self) -> list[Parity]:
        """Backends of ours that are beyond their error budget."""
        return [parity for parity in self.parity if self.peers[parity.peer]["ours"] and not parity.within]

    def as_json(self) -> dict[str, Any]:
        bars = verdicts(self)
        return {
            "environment": self.environment,
            "finished": self.finished,
            "passed": not self.broken and all(verdict.met for verdict in bars),
            "defaults": self.defaults,
            "workloads": self.workloads,
            "peers": self.peers,
            "parity": [dataclasses.asdict(parity) | {"within": parity.within} for parity in self.parity],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "bars": [dataclasses.asdict(verdict) for verdict in bars],
            "not_measured": [dataclasses.asdict(left) for left in self.not_measured],
        }

    def write(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.as_json(), indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------- a subject


@dataclass(frozen=True)
class Subject:
    """A workload in one dtype on one device, and its peers."""

    workload: Workload
    dtype: str
    device: torch.device
    peers: Mapping[str, Peer]

    def inputs(self, seed: int = SEED) -> Inputs:
        """Random inputs that require gradients."""
        return self.workload.inputs(self.dtype, seed, self.device)

    def row(self, measure: str, step: str, peer: str, values: Sequence[float]) -> Row:
        """A row of values in the measure's unit."""
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

    def left(self, peer: str, step: str, reason: str) -> Left:
        return Left(self.workload.name, self.dtype, peer, step, reason)


def without_gradients(inputs: Inputs) -> Inputs:
    """The same values, of which none requires a gradient."""
    tensors: dict[str, Any] = {name: tensor.detach() for name, tensor in inputs.differentiable().items()}
    return dataclasses.replace(inputs, **tensors)


def make_call(peer: Peer, step: str, inputs: Inputs) -> Callable[[], Any]:
    """A peer's forward, or its forward and backward, on inputs, ready to be called."""
    import torch

    if step == FORWARD:
        return partial(peer.attend, without_gradients(inputs))
    leaves = list(inputs.differentiable().values())

    def both() -> tuple[Tensor, ...]:
        # Those that compute something else don't use all of the inputs.
        return torch.autograd.grad(peer.attend(inputs), leaves, inputs.grad_output, allow_unused=not peer.same)

    return both


def grad_mode(step: str) -> Any:
    """Gradients are recorded in steps that have a backward."""
    import torch

    return torch.set_grad_enabled(step != FORWARD)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call until the device has done it."""
    import torch

    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def input_bytes(inputs: Inputs) -> int:
    """Bytes of the operator's six tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.differentiable().values())


def output_bytes(inputs: Inputs) -> int:
    """Bytes of the output and the six gradients."""
    return input_bytes(inputs) + inputs.query.numel() * inputs.query.element_size()


def per_scale_bytes(inputs: Inputs) -> int:
    """Bytes of an output for every scale, in query's dtype, with a float32 log-sum-exp for every row."""
    rows = inputs.query.shape[:3].numel()
    return len(inputs.spatial_shapes) * (inputs.query.numel() * inputs.query.element_size() + rows * 4)


def explain(error: Exception) -> str:
    """A reason in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' * (len(text) > 160)}"


# ------------------------------------------------------------------------------------------------------------ parity


def part_of(inputs: Inputs, image: int, heads: slice) -> Inputs:
    """Some heads of one image, as inputs of their own: no image and no head depends on another."""
    tensors: dict[str, Any] = {
        name: tensor[image : image + 1, heads].detach().requires_grad_()
        for name, tensor in inputs.differentiable().items()
    }
    valid = None if inputs.valid_shapes is None else inputs.valid_shapes[image : image + 1]
    grad_output = inputs.grad_output[image : image + 1, heads]
    return dataclasses.replace(inputs, **tensors, valid_shapes=valid, grad_output=grad_output)


@dataclass(frozen=True)
class Gate:
    """Part of a workload's results in float64 and in eager PyTorch, which peers are held against."""

    subject: Subject
    inputs: Inputs  # of the whole workload
    image: int
    heads: slice
    part: Inputs
    compare: Callable[[dict[str, Tensor]], list[Comparison]]

    @classmethod
    def of(cls, subject: Subject, inputs: Inputs) -> Gate:
        import torch

        from smca_kernels.parity import Expectation

        workload = subject.workload
        elements = workload.queries * workload.keys
        count = int(min(workload.heads, max(1, GATE_ELEMENTS[subject.device.type] // elements)))
        image = int(torch.randint(workload.batch, ()))
        first = int(torch.randint(workload.heads - count + 1, ()))
        heads = slice(first, first + count)
        part = part_of(inputs, image, heads)
        return cls(subject, inputs, image, heads, part, Expectation.of(part).compare)

    def check(self, peer: Peer, step: str) -> Parity:
        """Run a peer on all of the inputs, memory poisoned, and compare that part of its output and gradients."""
        import torch

        from smca_kernels.parity import poisoned_memory

        # Compiled code would be compiled again for the poison's deterministic mode.
        with nullcontext() if peer.compiled else poisoned_memory(), grad_mode(step):
            if step == FORWARD:
                results = {"output": peer.attend(without_gradients(self.inputs))}
            else:
                output = peer.attend(self.inputs)
                tensors = self.inputs.differentiable()
                gradients = torch.autograd.grad(output, list(tensors.values()), self.inputs.grad_output)
                results = {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}
        parts = {name: tensor[self.image : self.image + 1, self.heads] for name, tensor in results.items()}
        worst = max(self.compare(parts), key=lambda comparison: comparison.ratio)
        return Parity(
            workload=self.subject.workload.name,
            dtype=self.subject.dtype,
            peer=peer.name,
            ratio=worst.ratio,
            worst=worst.name,
            where=f"image {self.image}, heads {self.heads.start} to {self.heads.stop - 1}",
            logit_error=peer.logit_error(self.part) if peer.logit_error is not None else None,
        )


# --------------------------------------------------------------------------------------------------------- measures


@dataclass
class Clock:
    """How much of the run's time is left."""

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


def admit(subject: Subject, inputs: Inputs, clock: Clock, report: Report) -> dict[str, list[str]]:
    """The peers to measure in each step: those that can run, compile in time, and are at parity if they are ours."""
    gate = Gate.of(subject, inputs)
    admitted: dict[str, list[str]] = {FORWARD: [], BOTH: []}
    for name, peer in subject.peers.items():
        reasons = {step: peer.unsupported(gate.inputs, step == BOTH) for step in admitted}
        if peer.compiled and not clock.may_compile:
            reasons = dict.fromkeys(admitted, "it compiles, and the time for that was up")
        parity = None
        for step in (BOTH, FORWARD):
            if reasons[step] is not None:
                continue
            try:
                if not peer.same:
                    seconds = seconds_of(make_call(peer, step, gate.inputs), subject.device)
                elif parity is None:
                    start = time.perf_counter()
                    parity = gate.check(peer, step)
                    seconds = time.perf_counter() - start
                elif peer.compiled:
                    with grad_mode(step):
                        seconds = seconds_of(make_call(peer, step, gate.inputs), subject.device)
            except Exception as error:  # a peer that fails says so in the table, and must not end the run
                reasons[step] = explain(error)
                continue
            if peer.compiled:
                report.rows.append(subject.row("compile", step, name, [seconds]))
        if parity is not None:
            report.parity.append(parity)
            if peer.ours and not parity.within:
                reasons = dict.fromkeys(admitted, f"PARITY FAILED: {parity}")
        for step, names in admitted.items():
            if reasons[step] is None:
                names.append(name)
        if len(set(reasons.values())) == 1:
            reasons = {"": reasons[FORWARD]}
        report.not_measured += [subject.left(name, step, reason) for step, reason in reasons.items() if reason]
    return admitted


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
                replay = _captured_all(calls[peer.name])
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
    from smca_kernels.profiling import interleaved_times

    with grad_mode(step):
        one_round = sum(seconds_of(each[0], subject.device) for each in calls.values())
        turns = {name: partial(in_turn, each) for name, each in calls.items()}
        seconds = interleaved_times(turns, effort.repeats(one_round), subject.device)
    for name, values in seconds.items():
        peer = name.removeprefix("preparation of ")
        kind = measure if peer == name else "preparation"
        yield subject.row(kind, step, peer, [1e3 * value for value in values])


def _captured_all(calls: Sequence[Callable[[], object]]) -> list[Callable[[], None]] | str:
    """Calls as CUDA graphs, or why not everything can be captured."""
    try:
        return [captured(call) for call in calls]
    except Exception as error:
        return explain(error)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A call as a CUDA graph, to be replayed."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call allocates or compiles must not be captured
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_memory(subject: Subject, inputs: Inputs, names: Sequence[str]) -> Iterator[Row | Left]:
    """Rows of bytes saved for backward and of peak memory, in MB, and of the sizes that they are compared with."""
    from smca_kernels.profiling import peak_bytes, saved_bytes

    given, outputs = input_bytes(inputs), output_bytes(inputs)
    yield subject.row("saved", FORWARD, "inputs", [given / 1e6])
    both = (given + per_scale_bytes(inputs)) / 1e6
    yield subject.row("saved", FORWARD, "inputs + outputs of each scale", [both])
    for name in names:
        peer = subject.peers[name]
        if peer.same:
            yield subject.row("saved", FORWARD, name, [saved_bytes(partial(peer.attend, inputs)) / 1e6])
            peak = peak_bytes(make_call(peer, BOTH, inputs), subject.device) - outputs
            yield subject.row("peak", BOTH, name, [max(peak, 0) / 1e6])


def host_times(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds that one host thread spends on each call, not waiting for the device."""
    import torch

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
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from smca_kernels import explain_backend, smca_attention

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

    ours = [peer for peer in subject.peers.values() if peer.ours and peer.unsupported(inputs, True) is None]
    torch_calls: dict[str, Callable[[], object]]
    torch_calls = {FORWARD: partial(scaled_dot_product_attention, *plain), BOTH: plain_both}
    for step, torch_call in torch_calls.items():
        calls: dict[str, Callable[[], object]] = {"torch SDPA": torch_call}
        calls |= {peer.name: our_call(peer.name, step) for peer in ours}
        for name, values in host_times(calls, repeats, subject.device).items():
            yield subject.row("overhead", step, name, values)


def limit_rows(subject: Subject) -> Iterator[Row]:
    """What the device could do at best, as rows of a peer "limit"; nothing where its limits aren't known."""
    import torch

    from . import limits

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


# ------------------------------------------------------------------------------------------------------------- a run


def describe_workload(workload: Workload) -> dict[str, Any]:
    facts = dataclasses.asdict(workload)
    return facts | {"keys": workload.keys, "elements": workload.elements}


def describe_peer(peer: Peer) -> dict[str, Any]:
    return {name: getattr(peer, name) for name in ("what", "ours", "same", "compiled")}


def measure(subject: Subject, clock: Clock, effort: Effort, report: Report) -> None:
    """One workload in one dtype: parity, time, memory."""
    import torch

    sets = rotated_inputs(subject)
    admitted = admit(subject, sets[0], clock, report)
    report.rows += limit_rows(subject)
    times, sizes = measure_time(subject, sets, admitted, effort), measure_memory(subject, sets[0], admitted[BOTH])
    for found in itertools.chain(times, sizes):
        if isinstance(found, Row):
            report.rows.append(found)
        else:
            report.not_measured.append(found)
    torch.compiler.reset()  # what one workload compiled is of no use to the next
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_all(
    workloads: Sequence[Workload],
    dtypes: Sequence[str],
    peers: Mapping[str, Peer],
    device: torch.device,
    effort: Effort,
    report: Report,
    seconds: float,
) -> None:
    """Measure everything into the report, while the time lasts, and write it after each workload."""
    from smca_kernels import explain_backend

    clock = Clock(seconds)
    report.peers = {name: describe_peer(peer) for name, peer in peers.items()}
    for dtype in dtypes:
        tiny = Subject(TINY, dtype, device, peers)
        report.defaults[dtype] = explain_backend(**tiny.inputs().arguments()).backend
        report.workloads[TINY.name] = describe_workload(TINY)
        report.rows += measure_overhead(tiny, effort.overhead)
        for workload in workloads:
            subject = Subject(workload, dtype, device, peers)
            report.workloads[workload.name] = describe_workload(workload)
            if not clock.may_begin:
                report.not_measured.append(subject.left("", "", f"not begun after {seconds:g} s"))
                continue
            print(f"{clock.spent:6.1f} s  {workload.name}, {dtype} …", flush=True)
            try:
                measure(subject, clock, effort, report)
            except Exception as error:  # out of memory on a smaller card, say
                report.not_measured.append(subject.left("", "", explain(error)))
            report.write()
    report.finished = True
    report.write()
    print(f"{clock.spent:6.1f} s  done\n", flush=True)


def verdicts(report: Report) -> list[Verdict]:
    """Every bar that the rows let us judge."""
    values = {(row.measure, row.workload, row.step, row.dtype, row.peer): row.value for row in report.rows}
    off = {(parity.workload, parity.dtype, parity.peer) for parity in report.parity if not parity.within}
    found = []
    for bar in BARS:
        if bar.device not in (None, report.environment["device"]):
            continue
        for measure, workload, step, dtype, peer in values:
            wanted = report.defaults.get(dtype) if bar.peer == "default" else bar.peer
            if (measure, step, peer) != (bar.measure, bar.step, wanted):
                continue
            if (bar.workloads and workload not in bar.workloads) or (bar.dtypes and dtype not in bar.dtypes):
                continue
            against: str | None = bar.against
            if against == "fastest":
                rivals = {
                    name: values[measure, workload, step, dtype, name]
                    for name, facts in report.peers.items()
                    if facts["same"] and not facts["ours"] and (workload, dtype, name) not in off
                    if (measure, workload, step, dtype, name) in values
                }
                against = min(rivals, key=lambda name: rivals[name], default=None)
            if against is None or (measure, workload, step, dtype, against) not in values:
                continue
            value, base = (values[measure, workload, step, dtype, name] for name in (peer, against))
            met = base >= bar.at_least * value if bar.at_least else value <= (bar.at_most or 0.0) * base + bar.plus
            found.append(Verdict(str(bar), measure, workload, step, dtype, peer, against, value, base, met))
    return found


# ------------------------------------------------------------------------------------------------------ command line


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: device, versions, threads and commit."""
    import torch

    from smca_kernels.environment import describe, versions

    return {
        "device": device.type,
        **describe(device),
        **versions(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": _git("status", "--porcelain") != "",
        "seed": SEED,
    }


def _git(*arguments: str) -> str:
    """What git says about the source tree; "" where there is no git or no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca bench`."""
    parser.description = (
        "Time and memory of every backend that can run here against everything that could take its place, after a "
        "parity check. Exit status 1 if parity fails, a bar is missed, or --base finds a regression."
    )
    dtypes = sorted({dtype for names in DTYPES.values() for dtype in names})
    parser.add_argument("--workload", nargs="+", choices=tuple(WORKLOADS), help="default: those for this device")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="default: those for this device")
    parser.add_argument("--peer", nargs="+", metavar="PEER", help="default: all; naive and ours always take part")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a rough look")
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help="begin no workload after S seconds and compile X",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there, a table (.md) and two plots (.png) beside"
    )
    parser.add_argument("--base", type=Path, metavar="FILE", help="compare with an earlier run's JSON")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: table and plots of FILE")


def chosen_peers(names: Sequence[str] | None) -> dict[str, Peer]:
    """PEERS, or those named with naive and ours.

    Raises:
        ValueError: for a name that isn't there.
    """
    from .peers import PEERS

    unknown = [name for name in names or () if name not in PEERS]
    if unknown:
        raise ValueError(f"--peer must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    return {n: peer for n, peer in PEERS.items() if names is None or n in names or peer.ours or n == "naive"}


def run(args: argparse.Namespace) -> int:
    """`smca bench`: exit status 0, or 1 if parity fails, a bar is missed, or a regression is found.

    Raises:
        ValueError: for a file that can't be read, a folder that isn't there, an unknown peer, and a base from
            another device.
    """
    import torch

    from . import compare
    from . import report as reporting

    if args.render is not None:
        reporting.render(args.render)
        return 0
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json must name a file in an existing folder, got {args.json}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(environment(device), args.json)
    base = None
    if args.base is not None:
        base = reporting.load(args.base)
        compare.check_comparable(base["environment"], report.environment)
    print("\n".join(f"{name}: {fact}" for name, fact in report.environment.items()) + "\n", flush=True)
    measure_all(
        [WORKLOADS[name] for name in args.workload or DEFAULT_WORKLOADS[device.type]],
        args.dtype or DTYPES[device.type],
        chosen_peers(args.peer),
        device,
        (QUICK_EFFORTS if args.quick else EFFORTS)[device.type],
        report,
        SECONDS[device.type] if args.seconds is None else args.seconds,
    )
    found = report.as_json()
    print(reporting.markdown(found))
    if args.json is not None:
        reporting.render(args.json)
    regressions = []
    if base is not None:
        changes = compare.compare(base, found)
        print(compare.markdown(changes, args.base))
        regressions = [change for change in changes if change.regression]
    return 0 if found["passed"] and not regressions else 1
