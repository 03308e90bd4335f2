"""Paths through machine code: trips of loops, conditional blocks, rare loops passed by."""

from __future__ import annotations

import pytest
from sass_text import sass

from smca_kernels.tools.cost.machine_code import find_loops, parse_sass
from smca_kernels.tools.cost.traces import loop_header, trace_loop, trace_program

# Two scales' worth of a kernel: a loop over tiles behind a guard, one for rare inputs, a loop of clean-up.
KERNEL = sass(
    "S2R R0, SR_TID.X",  # 0
    ".L_x_0:", "IADD3 R1, R1, R2, R3",  # 1: the loop over scales
    "@!P3 BRA `(.L_x_2)",  # 2: no tiles
    ".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4",  # 3: the loop over tiles
    "@P1 BRA `(.L_x_6)",  # 4
    "FMUL R1, R1, R2",  # 5: runs on a condition
    ".L_x_6:", "@P0 BRA `(.L_x_1)",  # 6
    ".L_x_2:", "@!P4 BRA `(.L_x_4)",  # 7: no rare tiles
    ".L_x_3:", "HMMA.16816.F32 R4, R8, R12, R4",  # 8: the rare loop
    "@P0 BRA `(.L_x_3)",  # 9
    ".L_x_4:", "@P2 BRA `(.L_x_0)",  # 10
    ".L_x_5:", "STG.E [R2.64], R4",  # 11: clean-up
    "@P0 BRA `(.L_x_5)",  # 12
    "EXIT",  # 13
)  # fmt: skip
TILES, RARE = [3, 4, 5, 6], 8


def test_trip_of_a_loop_runs_its_conditional_blocks():
    assert trace_loop(parse_sass(KERNEL), TILES) == TILES


def test_trip_of_a_loop_follows_the_jump_that_is_always_taken():
    instructions = parse_sass(
        sass(".L_x_0:", "MOV R1, R2", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1:", "EXIT")
    )
    (body,) = find_loops(instructions)
    assert trace_loop(instructions, body) == [0, 1, 2]


@pytest.mark.parametrize("trips", [[1], [3], [2, 1], [1, 4, 2]])
def test_program_makes_its_trips_scale_by_scale(trips: list[int]):
    path = trace_program(parse_sass(KERNEL), TILES, [RARE], trips)
    expected = [0]
    for count in trips:
        expected += [1, 2, *TILES * count, 7, 10]
    assert path == [*expected, 11, 12, 13]


def test_scale_without_a_tile_is_passed_by():
    path = trace_program(parse_sass(KERNEL), TILES, [RARE], [2, 0])
    assert path.count(3) == 2
    assert path.count(1) == 2


def test_loop_that_comes_first_in_the_code_can_be_the_rare_one():
    path = trace_program(parse_sass(KERNEL), [8, 9], [3], [2])
    assert path == [0, 1, 2, 7, 8, 9, 8, 9, 10, 11, 12, 13]


def test_kernel_without_a_loop_over_scales_takes_one_number_of_trips():
    instructions = parse_sass(
        sass("MOV R1, R2", ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_0)", "EXIT")
    )
    assert trace_program(instructions, [1, 2], [], [3]) == [0, 1, 2, 1, 2, 1, 2, 3]
    with pytest.raises(ValueError, match="no loop over scales, got trips for 2"):
        trace_program(instructions, [1, 2], [], [3, 3])


def test_kernel_without_a_loop_over_tiles_makes_one_trip_of_each_loop():
    instructions = parse_sass(sass("MOV R1, R2", ".L_x_0:", "FMUL R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT"))
    assert trace_program(instructions, [], [], [1]) == [0, 1, 2, 3]


def test_header_is_where_a_loop_is_entered():
    assert loop_header(parse_sass(KERNEL), TILES) == 3
