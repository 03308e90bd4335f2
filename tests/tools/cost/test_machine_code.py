"""Parsing of SASS and the loop finder."""

from __future__ import annotations

import pytest
from sass_text import encoded, sass

from smca_kernels.tools.cost.machine_code import Control, attention_loops, classify, parse_sass


def attention_loop_texts(*lines: str) -> list[list[str]]:
    instructions = parse_sass(sass(*lines))
    return [[instructions[i].text.removesuffix(" ;") for i in body] for body in attention_loops(instructions)]


def test_loop_body_ends_at_its_backward_branch():
    loops = attention_loop_texts(
        "MOV R1, R2",
        ".L_x_0:",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "MUFU.EX2 R3, R3",
        "@!P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert loops == [["HMMA.16816.F32 R4, R8, R12, R4", "MUFU.EX2 R3, R3", "@!P0 BRA `(.L_x_0)"]]


def test_loop_exit_written_as_a_call_is_a_jump():
    loops = attention_loop_texts(
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)",
        ".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [3, 2]


def test_branch_on_a_uniform_predicate_is_conditional():
    loops = attention_loop_texts(
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "BRA.U !UP0, `(.L_x_0)",
        ".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [2, 2]


def test_only_the_innermost_tensor_loop_counts():
    loops = attention_loop_texts(
        ".L_x_0:", "MOV R1, R2", ".L_x_1:", "HMMA.1688.F32.TF32 R4, R8, R12, R4", "@P1 BRA `(.L_x_1)",
        "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert loops == [["HMMA.1688.F32.TF32 R4, R8, R12, R4", "@P1 BRA `(.L_x_1)"]]


def test_interior_and_edge_loops_are_both_found():
    loops = attention_loop_texts(
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_0)",
        ".L_x_1:", "FSEL R1, R2, R3, P0", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [2, 3]


def test_a_loop_of_waiting_inside_the_body_is_part_of_it():
    loops = attention_loop_texts(
        ".L_x_0:", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR13], tmem[UR16], idesc[UR17], !UPT",
        ".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR9], R0", "@!P4 BRA `(.L_x_1)",
        "BRA.U !UP0, `(.L_x_0)", "EXIT",
    )  # fmt: skip
    assert [len(body) for body in loops] == [4]


def test_conditional_blocks_and_blocks_behind_the_exit_belong_to_the_loop():
    loops = attention_loop_texts(
        ".L_x_0:", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", "@P1 BRA `(.L_x_1)", "FMUL R1, R1, R2",
        ".L_x_1:", "@!P2 BRA `(.L_x_2)",
        ".L_x_3:", "@P0 BRA `(.L_x_0)", "EXIT",
        ".L_x_2:", "FADD R3, R3, R4", "BRA `(.L_x_3)",
    )  # fmt: skip
    assert [len(body) for body in loops] == [7]


def test_a_loop_without_tensor_instructions_is_the_one_with_exp2():
    loops = attention_loop_texts(
        ".L_x_0:",
        "LDG.E R1, [R2]",
        "@P0 BRA `(.L_x_0)",
        ".L_x_1:",
        "MUFU.EX2 R1, R1",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    )
    assert loops == [["MUFU.EX2 R1, R1", "@P0 BRA `(.L_x_1)"]]


def test_straight_code_has_no_loop():
    assert attention_loop_texts("MUFU.EX2 R1, R1", "EXIT", ".L_x_0:", "BRA `(.L_x_0)") == []


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "tensor"), ("HGMMA.64x128x16.F32", "tensor"), ("UTCHMMA", "tensor"),
        ("MUFU.EX2", "ex2"), ("MUFU.RCP", "other"), ("FMNMX3", "fp32"), ("FFMA2", "fp32"), ("FSEL", "fp32"),
        ("F2FP.BF16.F32.PACK_AB", "conversion"), ("HADD2.F32", "conversion"), ("HADD2", "other"),
        ("LDSM.16.M88.4", "memory"), ("LDTM.16dp32bit_t0_t15.x32", "memory"), ("STL.64", "memory"),
        ("UIADD3", "other"), ("WARPGROUP.ARRIVE", "other"), ("LDGDEPBAR", "other"),
    ],
)  # fmt: skip
def test_opcode_class(opcode: str, kind: str):
    assert classify(opcode) == kind


def test_control_codes_are_read_from_the_encoding():
    instructions = parse_sass(encoded(("LDS R1, [R2]", 4, 2, 5, 0b100001), "FADD R1, R1, R2"))
    assert [i.control for i in instructions] == [Control(4, 2, 5, (0, 5)), Control(1, None, None, ())]


def test_control_code_of_a_real_instruction():
    # H100: S2R writes counter 1; BRA-free code, as nvdisasm -c -g -hex prints it.
    text = """\t//## File "/home/x/forward.py", line 134
        /*0020*/                   S2R UR33, SR_CTAID.X ;            /* 0x00000000002179c3 */
                                                                     /* 0x000e620000002500 */"""
    (instruction,) = parse_sass(text)
    assert instruction.control == Control(1, 1, None, ())
    assert (instruction.text, instruction.source) == ("S2R UR33, SR_CTAID.X ;", "forward.py:134")
