"""`smca predict --schedule`: how the programs of each kernel fill a card, from sizes and simulated cycles alone.

Each kernel's real list of programs, in the order of their launch, is dealt to the SMs as the hardware does it: one
to every SM in turn while there is room, then to whichever is free first. A program of trips t_s over the tiles of its
scales takes start + Σ_s (scale + t_s · cycles) cycles of `smca cost`, where a trip's cycles depend on how many blocks
share its SM. All keys are computed, as with mass_tolerance=0.

    padding  attention elements computed / needed: edges of grids and images, the last block of queries
    fill     share of the resident slots that are taken, over the kernel's time
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smca_kernels.tools.cost.architectures import ARCHITECTURES

from .workloads import WORKLOADS, Workload

BATCHES = (1, 2, 4, 8, 16)
PLAIN = "plain "
PASSES = {"forward": ("forward",), "backward": ("prepare", "query_major", "key_major")}

Cost = dict[str, Any]  # a row of `smca cost --json`
Trips = tuple[float, ...]  # of a program's loop over tiles, scale by scale


def base_workloads() -> dict[str, Workload]:
    """Workloads by their names without a batch size; priors make no difference where all keys are computed."""
    found: dict[str, Workload] = {}
    for name, workload in WORKLOADS.items():
        if workload.prior == "random":
            found.setdefault(re.sub(r"-b\d+", "", name), workload)
    return found


@dataclass(frozen=True)
class Filling:
    """One kernel of one workload on a card."""

    workload: str
    batch: int
    kernel: str
    arch: str
    programs: int
    slots: int
    padding: float
    fill: float
    seconds: float
    full_seconds: float  # the same work without padding, were all slots taken all the time


def runs_of(tiles: Sequence[int], splits: int) -> list[Trips]:
    """Trips of the splits of a block of queries: each an equal run of the tiles of all scales, one after the other."""
    from smca_kernels.backends.triton.channels import SCALE_TILES

    shared = [count + SCALE_TILES.value if count else 0 for count in tiles]
    edges = [sum(shared) * i // splits for i in range(splits + 1)]
    starts = [sum(shared[:s]) + SCALE_TILES.value for s in range(len(tiles))]
    runs = [
        [min(end, start + count) - max(begin, start) for start, count in zip(starts, tiles, strict=True)]
        for begin, end in itertools.pairwise(edges)
    ]
    return [tuple(float(count) for count in run if count > 0) for run in runs]


def programs_of(cost: Cost, workload: Workload, multiprocessors: int) -> list[Trips]:
    """List the trips of every program of a kernel in the order of their launch.

    Args:
        cost: the kernel's row of the cost report.
        workload: its sizes.
        multiprocessors: of the card; programs are split where they are too few for them.
    """
    from smca_kernels.backends.triton import launch

    constants, kernel = cost["constexprs"], cost["kernel"].removeprefix("planned ")
    heads, block_n = workload.heads, constants["BLOCK_N"]
    blocks = -(-workload.queries // block_n)
    unrolled = cost["elements_per_trip"] / (cost["elements_per_iteration"] or cost["elements_per_trip"])

    if kernel == "prepare":
        return [(1.0,)] * (workload.batch * heads * blocks * len(workload.spatial_shapes))
    size = int(constants["KEYS"])
    if kernel.startswith(PLAIN):
        keys = [sum(h * w for h, w in image) for image in workload.valid_shapes]
        runs = [-(-count // size) for count in keys]
        if "key_major" in kernel:
            return [(blocks / unrolled,) for count in runs for _ in range(heads * count)]
        return [(count / unrolled,) for count in runs for _ in range(heads * blocks)]
    whole = [-(-h * w // size) for h, w in workload.spatial_shapes]
    images = [[-(-h * w // size) for h, w in image] for image in workload.valid_shapes]
    if kernel == "key_major":
        count, parts = workload.batch * heads * sum(whole), block_n // constants["TILE_N"]
        splits = launch.splits_of(count, blocks, int(cost["blocks_per_sm"]), multiprocessors)
        # A tile without a cell of the image only writes zeros.
        return [
            (float(end - begin) * parts / unrolled if tile < inside else 0.0,)
            for begin, end in itertools.pairwise(blocks * i // splits for i in range(splits + 1))
            for image in images
            for _ in range(heads)
            for all_tiles, inside in zip(whole, image, strict=True)
            for tile in range(all_tiles)
        ]
    count = workload.batch * heads * blocks
    splits = launch.splits_of(count, sum(whole), int(cost["blocks_per_sm"]), multiprocessors)
    of_images = [runs_of(tiles, splits) for tiles in images]
    return [
        tuple(trips / unrolled for trips in runs[split])
        for split in range(splits)
        for runs in of_images
        for _ in range(heads * blocks)
    ]


def makespan(programs: Sequence[Trips], cost: Cost, multiprocessors: int) -> tuple[float, float]:
    """Cycles until the last program ends, and the share of all resident slots that were taken meanwhile."""
    resident = int(cost["blocks_per_sm"])
    # Cycles of a trip with so many blocks on the SM, between those of one alone and of all that fit.
    shared, alone = cost["cycles_per_trip"], cost["cycles_alone"] or cost["cycles_per_trip"]
    step = (shared - alone) / max(1, resident - 1)
    start, per_scale = cost["start_cycles"] or 0.0, cost["scale_cycles"] or 0.0

    def duration(trips: Trips, sharing: int) -> float:
        return start + len(trips) * per_scale + sum(trips) * (alone + step * (sharing - 1))

    waiting = iter(programs)
    running: list[list[list[Any]]] = [[] for _ in range(multiprocessors)]  # of each SM: [trips, share left]
    since, version = [0.0] * multiprocessors, [0] * multiprocessors
    events: list[tuple[float, int, int]] = []
    taken = 0.0

    def advance(sm: int, now: float) -> None:
        nonlocal taken
        sharing, passed = len(running[sm]), now - since[sm]
        for each in running[sm]:
            whole = duration(each[0], sharing)
            each[1] -= passed / whole if whole > 0.0 else 1.0  # a program without cycles ends at once
        taken += sharing * passed
        since[sm] = now

    def plan(sm: int, now: float) -> None:
        version[sm] += 1
        if running[sm]:
            soonest = min(left * duration(trips, len(running[sm])) for trips, left in running[sm])
            heapq.heappush(events, (now + max(0.0, soonest), sm, version[sm]))

    for _ in range(resident):
        for sm in range(multiprocessors):
            if (trips := next(waiting, None)) is not None:
                running[sm].append([trips, 1.0])
    for sm in range(multiprocessors):
        plan(sm, 0.0)
    now = 0.0
    while events:
        now, sm, expected = heapq.heappop(events)
        if expected != version[sm]:
            continue
        advance(sm, now)
        running[sm] = [each for each in running[sm] if each[1] > 1e-9]
        while len(running[sm]) < resident and (trips := next(waiting, None)) is not None:
            running[sm].append([trips, 1.0])
        plan(sm, now)
    return now, taken / (now * resident * multiprocessors) if now else 0.0


def padding_of(cost: Cost, programs: Sequence[Trips], workload: Workload) -> float:
    """Elements that a kernel computes over those that are needed."""
    if not cost.get("elements_per_iteration"):
        rows = len(programs) * cost["constexprs"]["BLOCK_N"]
        scales = len(workload.spatial_shapes)
        return float(rows / (workload.batch * workload.heads * workload.queries * scales))
    computed = sum(sum(trips) for trips in programs) * cost["elements_per_trip"]
    return float(computed / workload.elements)


def fill_cards(costs: Sequence[Cost], dtype: str, batches: Sequence[int] = BATCHES) -> list[Filling]:
    """Schedule every workload at every batch size, for each card and kernel that the cost report has cycles of.

    Args:
        costs: rows of `smca cost --json`, with `--plain` for the comparison.
        dtype: "fp16", "bf16" or "fp32".
        batches: batch sizes.

    Raises:
        ValueError: if no row has simulated cycles.
    """
    passes = {*PASSES, "plain forward", "plain backward"}
    scheduled = [
        row
        for row in costs
        if row["dtype"] == dtype and row.get("cycles_per_trip") and row["pass"] in passes and row.get("constexprs")
    ]
    if not scheduled:
        raise ValueError(f"the cost report has no simulated cycles of kernels in {dtype}")
    found = []
    for name, base in base_workloads().items():
        for batch in batches:
            workload = dataclasses.replace(base, batch=batch)
            for cost in scheduled:
                if cost["head_dim"] != workload.head_dim:
                    continue
                card = ARCHITECTURES[int(cost["arch"][3:])]
                programs = programs_of(cost, workload, card.multiprocessors)
                cycles, fill = makespan(programs, cost, card.multiprocessors)
                slots = card.multiprocessors * int(cost["blocks_per_sm"])
                padding = padding_of(cost, programs, workload)
                kernel, arch = cost["kernel"], cost["arch"]
                full = workload.elements / cost["elements_per_second"]
                seconds = cycles / card.clock_hz
                found.append(Filling(name, batch, kernel, arch, len(programs), slots, padding, fill, seconds, full))
    return found


def markdown(fillings: Sequence[Filling], dtype: str, triton: str) -> str:
    """Format a line per kernel, and per workload the sums of both passes beside plain flash attention's."""
    lines = [f"# How the programs fill a card, {dtype}", ""]
    lines += [
        f"**Simulated, not measured.** Cycles: `smca cost`, Triton {triton}, at boost clock, all loads from L2.",
        "",
    ]
    lines += [
        "| workload | batch | card | kernel | programs | slots | padding | fill | µs |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for each in fillings:
        lines.append(
            f"| {each.workload} | {each.batch} | {each.arch} | {each.kernel} | {each.programs} | {each.slots} "
            f"| {each.padding:.2f} | {each.fill:.2f} | {1e6 * each.seconds:.0f} |"
        )
    lines += ["", "| workload | batch | card | pass | µs | full | plain | plain, full | ratio |"]
    lines += ["|---|---:|---|---|---:|---:|---:|---:|---:|"]
    by_kernel = {(each.workload, each.batch, each.arch, each.kernel): each for each in fillings}
    for case in dict.fromkeys((each.workload, each.batch, each.arch) for each in fillings):
        for pass_, kernels in PASSES.items():
            own = [by_kernel[(*case, kernel)] for kernel in kernels if (*case, kernel) in by_kernel]
            names = [PLAIN + kernel for kernel in kernels if kernel != "prepare"]
            plain = [by_kernel[(*case, name)] for name in names if (*case, name) in by_kernel]
            if len(own) == len(kernels):
                cells = [*_microseconds(own), *(_microseconds(plain) if len(plain) == len(names) else ("–", "–"))]
                ratio = sum(each.seconds for each in own) / sum(each.seconds for each in plain) if plain else None
                cells.append("–" if ratio is None else f"{ratio:.2f}")
                lines.append(f"| {' | '.join(map(str, (*case, pass_, *cells)))} |")
    lines += [
        "",
        "full: with all slots taken all the time and no padding. plain: flash attention without a prior on as many",
    ]
    lines += ["keys, in one scale. ratio: to plain as scheduled. Merging splits is not counted."]
    return "\n".join(lines) + "\n"


def _microseconds(fillings: Sequence[Filling]) -> tuple[str, str]:
    """Sums over kernels, as scheduled and with full slots."""
    sums = (sum(each.seconds for each in fillings), sum(each.full_seconds for each in fillings))
    return f"{1e6 * sums[0]:.0f}", f"{1e6 * sums[1]:.0f}"
