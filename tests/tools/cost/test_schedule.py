"""Schedules of whole kernels: cycles per trip, start, fill and drain, and what binds."""

from __future__ import annotations

import dataclasses

import pytest
from sass_text import NO_COUNTER, encoded

from smca_kernels.tools.cost.cycles import TIMINGS, decode, simulate
from smca_kernels.tools.cost.kernel import LoopCost, StaticCost
from smca_kernels.tools.cost.machine_code import CLASSES, attention_loops, parse_sass
from smca_kernels.tools.cost.schedule import binding_unit, schedule
from smca_kernels.tools.cost.traces import trace_program

NONE = NO_COUNTER
LOAD = ("LDG.E.128 R4, [R2]", 1, 0, NONE, 0)
# A loop over scales that fills with a load, a loop over tiles, and a store.
CODE = encoded(
    *[("MOV R1, R2", 5, NONE, NONE, 0)] * 20,
    ".L_x_0:", LOAD, ("MOV R8, R4", 4, NONE, NONE, 1),
    ".L_x_1:", *["HMMA.16816.F32 R4, R8, R12, R4"] * 8, *["MUFU.EX2 R1, R1"] * 4, "@P0 BRA `(.L_x_1)",
    ("STG.E.128 [R2], R4", 1, NONE, 1, 0),
    "@P1 BRA `(.L_x_0)",
    "EXIT",
)  # fmt: skip


def kernel(arch: int = 80, warps: int = 4, resident_warps: int = 8) -> StaticCost:
    code = tuple(parse_sass(CODE))
    loop = LoopCost("", 13, 2.0, dict.fromkeys(CLASSES, 0.1), 64.0, 1.0, 1.0)
    return StaticCost(
        arch=arch, threads=32 * warps, registers=64, spill_bytes=0, local_bytes=0, shared_bytes=0,
        resident_warps=resident_warps, instructions=len(code), loops=(loop,), note="", code=code,
        bodies=tuple(tuple(body) for body in attention_loops(code)),
    )  # fmt: skip


def test_resident_blocks_share_the_tensor_cores():
    two = schedule(kernel(resident_warps=8), 4096)
    four = schedule(kernel(resident_warps=16), 4096)
    assert (two.blocks, four.blocks) == (2, 4)
    assert four.cycles_per_trip == pytest.approx(4 * 8 * 8, rel=0.03)
    assert four.bound_by == "tensor"
    assert two.cycles_per_trip < four.cycles_per_trip


def test_elements_of_a_trip_count_all_tiles_that_it_covers():
    scheduled = schedule(kernel(), 4096)
    assert scheduled.elements_per_trip == 2 * 4096
    assert scheduled.elements_per_cycle == 2 * 8192 / scheduled.cycles_per_trip


def test_latency_of_a_scale_is_in_its_fill_and_drain():
    scheduled = schedule(kernel(resident_warps=4), 4096)
    assert TIMINGS[80].global_latency < scheduled.scale_cycles < 2 * TIMINGS[80].global_latency
    assert 0 < scheduled.start_cycles < 1000


@pytest.mark.parametrize("trips", [[12], [10, 5, 2], [30, 1]])
def test_cycles_of_a_program_are_those_of_its_own_simulation(trips: list[int]):
    cost = kernel()
    path = trace_program(cost.code, cost.bodies[0], [], trips)
    simulated = simulate(decode(cost.code, path, TIMINGS[80]), TIMINGS[80], 2, 4, trips=1, warmup=0).cycles
    found = schedule(cost, 4096)
    cycles = found.start_cycles + sum(found.scale_cycles + count * found.cycles_per_trip for count in trips)
    assert cycles == pytest.approx(simulated, rel=0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": 100}, "cycles of sm_100 are not modelled"),
        ({"arch": 70}, "cycles of sm_70 are not modelled"),
        ({"loops": ()}, "no loop over tiles was found"),
        ({"resident_warps": 0}, "a block does not fit an SM"),
    ],
)
def test_reason_why_nothing_is_scheduled(change: dict[str, object], reason: str):
    with pytest.raises(ValueError, match=reason):
        schedule(dataclasses.replace(kernel(), **change), 4096)


def test_a_unit_binds_only_where_it_hardly_idles():
    assert binding_unit({"fp32": 0.4, "tensor": 0.95, "issue": 0.6}) == "tensor"
    assert binding_unit({"fp32": 0.4, "tensor": 0.6, "issue": 0.7}) == "latency"


def test_row_names_the_instruction_that_waits_and_for_what():
    row = schedule(kernel(resident_warps=16), 4096).row()
    assert row["waits"][0]["reason"] in ("tensor", "ex2", "issue slots")
    assert row["waits"][0]["instruction"].startswith(("HMMA", "MUFU"))
    assert row["issue_share"] == row["busy"]["issue"]
