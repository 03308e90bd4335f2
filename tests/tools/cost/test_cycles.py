"""The cycle model of an SM on short loops whose time can be counted by hand."""

from __future__ import annotations

import pytest
from sass_text import NO_COUNTER, encoded

from smca_kernels.tools.cost.cycles import (
    BARRIER,
    MIN_TENSOR,
    SHARED_BYTES,
    TENSOR_DRAIN,
    TIMINGS,
    Run,
    decode,
    is_modelled,
    simulate,
)
from smca_kernels.tools.cost.machine_code import parse_sass

NONE = NO_COUNTER


def run(*lines: str | tuple[str, int, int, int, int], arch: int = 80, blocks: int = 1, warps: int = 4) -> Run:
    instructions = parse_sass(encoded(*lines))
    timing = TIMINGS[arch]
    return simulate(decode(instructions, range(len(instructions)), timing), timing, blocks, warps, trips=40)


def cycles(*lines: str | tuple[str, int, int, int, int], arch: int = 80, blocks: int = 1, warps: int = 4) -> float:
    """Cycles of a trip of all warps."""
    return run(*lines, arch=arch, blocks=blocks, warps=warps).cycles_per_trip(blocks * warps)


def test_a_lone_warp_pays_its_stall_counts():
    assert cycles(("IADD3 R1, R2, R3, R4", 4, NONE, NONE, 0), ("MOV R1, R2", 6, NONE, NONE, 0), warps=1) == 10


def test_warps_of_one_scheduler_hide_each_others_stalls():
    loop = [("MOV R1, R2", 8, NONE, NONE, 0), ("UMOV UR1, UR2", 8, NONE, NONE, 0)]
    alone, four = cycles(*loop, warps=4), cycles(*loop, warps=16)
    assert alone == pytest.approx(16, rel=0.02)
    assert four == pytest.approx(16, rel=0.02)


def test_issue_slots_bind_where_nothing_else_does():
    outcome = run(*["UMOV UR1, UR2"] * 16, warps=16)
    assert outcome.busy["issue"] == pytest.approx(1, abs=0.02)
    assert outcome.cycles_per_trip(16) == pytest.approx(4 * 16, rel=0.02)


@pytest.mark.parametrize(("arch", "interval"), [(80, 2), (90, 1)])
def test_fp32_pipe_takes_a_warp_instruction_every_one_or_two_cycles(arch: int, interval: int):
    outcome = run(*["FFMA R1, R2, R3, R4"] * 16, arch=arch, warps=16)
    assert outcome.busy["fp32"] == pytest.approx(1, abs=0.02)
    assert outcome.cycles_per_trip(16) == pytest.approx(4 * 16 * interval, rel=0.02)


def test_ex2_runs_on_a_quarter_of_the_fp32_lanes():
    outcome = run(*["MUFU.EX2 R1, R1"] * 8, warps=16)
    assert outcome.busy["ex2"] == pytest.approx(1, abs=0.02)
    assert outcome.cycles_per_trip(16) == pytest.approx(4 * 8 * 8, rel=0.02)


@pytest.mark.parametrize(
    ("opcode", "interval"), [("HMMA.16816.F32", 8), ("HMMA.1688.F32", 4), ("HMMA.1688.F32.TF32", 8)]
)
def test_tensor_instructions_take_their_share_of_the_tensor_core(opcode: str, interval: int):
    assert cycles(*[f"{opcode} R4, R8, R12, R4"] * 8, warps=8) == pytest.approx(2 * 8 * interval, rel=0.02)


def test_a_result_is_waited_for_with_its_counter():
    timing = TIMINGS[80]
    loop = [("LDS R1, [R2]", 1, 0, NONE, 0), ("FADD R3, R1, R1", 1, NONE, NONE, 1)]
    outcome = run(*loop, warps=1)
    # To the shared-memory pipe, through it, and back; the addition follows, and the next load that.
    assert outcome.cycles_per_trip(1) == 4 + timing.shared_latency + 1
    (wait,) = outcome.waits
    assert (wait.index, wait.reason, wait.producer) == (1, "result", 0)
    assert wait.cycles == pytest.approx(timing.shared_latency + 3)


def test_all_warps_share_one_shared_memory_pipe():
    outcome = run(*["LDSM.16.M88.4 R4, [R2]"] * 8, "BAR.SYNC.DEFER_BLOCKING 0x0", warps=16)
    assert outcome.busy["shared memory"] == pytest.approx(1, abs=0.05)
    assert outcome.cycles_per_trip(16) == pytest.approx(16 * 8 * 4, rel=0.05)


def test_loads_share_the_port_to_the_l2_cache():
    outcome = run(*["LDG.E.128 R4, [R2]"] * 8, "BAR.SYNC.DEFER_BLOCKING 0x0", warps=16)
    assert outcome.busy["L2"] == pytest.approx(1, abs=0.05)
    assert outcome.cycles_per_trip(16) == pytest.approx(16 * 8 * 512 / 64, rel=0.05)


def test_a_barrier_costs_its_latency_and_holds_all_warps_of_the_block():
    assert cycles("BAR.SYNC.DEFER_BLOCKING 0x0", warps=4) == pytest.approx(BARRIER, rel=0.1)
    # The slow pipe delays one warp after the other; all go on together, and nobody waits for the other block.
    loop = ["MUFU.EX2 R1, R1"] * 4 + ["BAR.SYNC.DEFER_BLOCKING 0x0"]
    assert cycles(*loop, warps=8) == pytest.approx(2 * 4 * 8 + BARRIER, abs=8)
    assert cycles(*loop, blocks=2, warps=4) < cycles(*loop, warps=8)


def test_copies_are_waited_for_by_group():
    copy = ["LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR"]
    work = [("MOV R1, R2", 15, NONE, NONE, 0)] * 16
    at_once = cycles(*copy, ("DEPBAR.LE SB0, 0x0", 1, NONE, NONE, 0), *work, warps=1)
    one_ahead = cycles(*copy, ("DEPBAR.LE SB0, 0x1", 1, NONE, NONE, 0), *work, warps=1)
    assert at_once > 16 * 15 + TIMINGS[80].global_latency
    # The copy of the trip before has had all of the work to arrive in, and waits for what is left of its latency.
    assert 16 * 15 < one_ahead < at_once - 200


def wgmma(width: int, left: str = "gdesc[UR4]") -> str:
    return f"HGMMA.64x{width}x16.F32.BF16 R24, {left}, gdesc[UR8], R24, gsb0"


def test_a_product_that_is_waited_for_at_once_costs_its_drain():
    outcome = cycles("WARPGROUP.ARRIVE", wgmma(128, "R4"), "WARPGROUP.DEPBAR.LE gsb0, 0x0", arch=90)
    assert outcome == pytest.approx(64 + TENSOR_DRAIN, abs=4)


def test_products_of_two_blocks_take_turns_on_the_tensor_cores():
    loop = [wgmma(128, "R4"), "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    one, two = (run(*loop, arch=90, blocks=blocks) for blocks in (1, 2))
    assert one.busy["tensor"] == pytest.approx(1, abs=0.03)
    assert two.cycles_per_trip(8) == pytest.approx(2 * one.cycles_per_trip(4), rel=0.03)


def test_each_warp_group_of_a_block_has_products_of_its_own():
    assert cycles(wgmma(128, "R4"), "WARPGROUP.DEPBAR.LE gsb0, 0x1", arch=90, warps=8) == pytest.approx(128, rel=0.05)


@pytest.mark.parametrize(("left", "rows"), [("R4", 16), ("gdesc[UR4]", 80)])
def test_a_narrow_product_is_bound_by_its_operands_in_shared_memory(left: str, rows: int):
    expected = max(MIN_TENSOR, rows * 32 / SHARED_BYTES)
    assert cycles(wgmma(16, left), "WARPGROUP.DEPBAR.LE gsb0, 0x3", arch=90) == pytest.approx(expected, abs=1)


def test_no_unit_is_busier_than_all_the_time():
    loop = [wgmma(64), wgmma(64), "WARPGROUP.DEPBAR.LE gsb0, 0x1", "LDS R1, [R2]", *["MUFU.EX2 R1, R1"] * 4]
    assert all(share <= 1.03 for share in run(*loop, arch=90, blocks=3).busy.values())


def test_two_simulations_agree():
    loop = ["LDS R1, [R2]", wgmma(64), "WARPGROUP.DEPBAR.LE gsb0, 0x0", "BAR.SYNC.DEFER_BLOCKING 0x0"]
    assert run(*loop, arch=90, blocks=3) == run(*loop, arch=90, blocks=3)


def test_instructions_without_control_codes_are_refused():
    from sass_text import sass

    with pytest.raises(ValueError, match="no control code"):
        decode(parse_sass(sass("MOV R1, R2")), [0], TIMINGS[80])


def test_a_whole_program_counts_from_the_first_cycle_to_the_last():
    instructions = parse_sass(encoded(("MOV R1, R2", 10, NONE, NONE, 0), ("MOV R1, R2", 10, NONE, NONE, 0), "EXIT"))
    ops = decode(instructions, range(3), TIMINGS[80])
    assert simulate(ops, TIMINGS[80], 1, 4, trips=1, warmup=0).cycles == pytest.approx(21 + 3, abs=2)


def test_architectures_of_the_model():
    assert [arch for arch in (70, 75, 80, 86, 89, 90, 100) if is_modelled(arch)] == [75, 80, 86, 89, 90]
