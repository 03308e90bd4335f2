"""Schedule of one compiled kernel on one SM: cycles of its loop over tiles and of whole programs, simulated.

    cycles of a program = start + Σ over scales (fill and drain + trips · cycles per trip)

The blocks that really fit an SM run together (cycles.py) over the paths that warps take through the code (traces.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smca_kernels.tools.cost.cycles import TIMINGS, Run, decode, is_modelled, simulate
from smca_kernels.tools.cost.kernel import StaticCost
from smca_kernels.tools.cost.machine_code import Instruction
from smca_kernels.tools.cost.traces import loop_header, trace_loop, trace_program

BINDING_SHARE = 0.8  # of the cycles that a unit is busy, from which on it binds; below, latency does
MAX_WAITS = 12  # that are reported
PROGRAM_TRIPS = 4  # of the short programs that start, fill and drain are measured with


@dataclass(frozen=True)
class WaitCost:
    """Cycles per trip and warp that an instruction could not issue, beyond its predecessor's stall count."""

    cycles: float
    reason: str  # "result", "copies", "tensor products", "barrier", "issue slots" or a busy unit
    instruction: str
    source: str  # file:line
    producer: str  # of a result that is waited for


@dataclass(frozen=True)
class Schedule:
    """Simulated cycles of a kernel, with all SMs alike and loads that hit the L2 cache."""

    blocks: int  # resident on an SM
    cycles_per_trip: float  # in which every resident block makes one trip of the loop over tiles
    cycles_alone: float  # of a trip where one block has the SM to itself
    elements_per_trip: float  # of one block
    start_cycles: float  # of a whole program: all that is outside the loops over scales and tiles
    scale_cycles: float  # of a scale: fill and drain of its pipeline, and what else happens once a scale
    busy: dict[str, float]  # share of the cycles by unit, and of the issue slots
    bound_by: str
    waits: tuple[WaitCost, ...]  # the longest first

    @property
    def elements_per_cycle(self) -> float:
        """Attention elements per cycle and SM while the loop runs."""
        return self.elements_per_trip * self.blocks / self.cycles_per_trip

    def row(self) -> dict[str, Any]:
        """Cells of the report."""
        return {
            "blocks_per_sm": self.blocks,
            "cycles_per_trip": self.cycles_per_trip,
            "cycles_alone": self.cycles_alone,
            "elements_per_trip": self.elements_per_trip,
            "elements_per_cycle": self.elements_per_cycle,
            "start_cycles": self.start_cycles,
            "scale_cycles": self.scale_cycles,
            "issue_share": self.busy["issue"],
            "busy": self.busy,
            "scheduled_bound_by": self.bound_by,
            "waits": [asdict(wait) for wait in self.waits],
        }


def schedule(cost: StaticCost, elements: int) -> Schedule:
    """Simulate the headline loop of a kernel, and whole programs with few trips.

    Args:
        cost: what `analyze` found; its first loop is the one over tiles. A kernel without one makes one trip.
        elements: attention elements of one tile; of one program, where there is no loop over tiles.

    Raises:
        ValueError: saying why there is nothing to simulate.
    """
    if not is_modelled(cost.arch):
        raise ValueError(f"cycles of sm_{cost.arch} are not modelled")
    if cost.loop is None:
        raise ValueError("no loop over tiles was found to schedule")
    if not cost.resident_warps:
        raise ValueError("a block does not fit an SM")
    warps = cost.threads // 32
    blocks = cost.resident_warps // warps
    timing = TIMINGS[cost.arch]
    if not cost.bodies:
        path = trace_program(cost.code, (), (), (1,))
        ops = decode(cost.code, path, timing)
        run, single = (simulate(ops, timing, count, warps, trips=1, warmup=0) for count in (blocks, 1))
        waits = tuple(_wait_costs(run, cost.code))
        return Schedule(blocks, run.cycles, single.cycles, elements, 0.0, 0.0, run.busy, binding_unit(run.busy), waits)
    body, rare = cost.bodies[0], [loop_header(cost.code, each) for each in cost.bodies[1:]]
    ops = decode(cost.code, trace_loop(cost.code, body), timing)
    loop = simulate(ops, timing, blocks, warps)
    per_trip = loop.cycles_per_trip(blocks * warps)
    alone = per_trip if blocks == 1 else simulate(ops, timing, 1, warps).cycles_per_trip(warps)

    def whole(*trips: int) -> float:
        path = trace_program(cost.code, body, rare, trips)
        return float(simulate(decode(cost.code, path, timing), timing, blocks, warps, trips=1, warmup=0).cycles)

    once = whole(PROGRAM_TRIPS)
    try:
        per_scale = max(0.0, whole(PROGRAM_TRIPS, PROGRAM_TRIPS) - once - PROGRAM_TRIPS * per_trip)
    except ValueError:  # no loop over scales
        per_scale = 0.0
    return Schedule(
        blocks=blocks,
        cycles_per_trip=per_trip,
        cycles_alone=alone,
        elements_per_trip=elements * cost.loop.tiles,
        start_cycles=max(0.0, once - per_scale - PROGRAM_TRIPS * per_trip),
        scale_cycles=per_scale,
        busy=loop.busy,
        bound_by=binding_unit(loop.busy),
        waits=tuple(_wait_costs(loop, cost.code)),
    )


def binding_unit(busy: dict[str, float]) -> str:
    """Name the unit that is busy nearly all the time, or "latency" if none is."""
    unit = max(busy, key=lambda name: busy[name])
    return unit if busy[unit] >= BINDING_SHARE else "latency"


def _wait_costs(run: Run, code: Sequence[Instruction]) -> list[WaitCost]:
    return [
        WaitCost(
            cycles=wait.cycles,
            reason=wait.reason,
            instruction=code[wait.index].text.removesuffix(";").strip(),
            source=code[wait.index].source,
            producer="" if wait.producer is None else f"{code[wait.producer].opcode} {code[wait.producer].source}",
        )
        for wait in run.waits[:MAX_WAITS]
    ]
