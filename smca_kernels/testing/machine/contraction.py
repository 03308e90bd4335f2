"""Sums over the lanes of a warp in which the lanes end with different bits, found in a kernel's text.

With contraction on, LLVM turns  p = a·b;  q = shfl(p);  s = p + q  into  s = fma(a, b, q): a lane adds its own product,
not rounded, to its neighbour's, which is, and its neighbour the other way round. Lanes that Triton takes to hold one
sum then differ, and which of them is stored is left to chance.
"""

from __future__ import annotations

from collections.abc import Iterable

from smca_kernels.testing.machine.ptx import Instruction, Register, Vector


def contracted_sums(instructions: Iterable[Instruction]) -> list[Instruction]:
    """The multiply-adds that should have been additions."""
    defined: dict[str, Instruction] = {}
    found = []
    for instruction in instructions:
        if instruction.opcode == "fma.rn.f32":
            _, a, b, c = instruction.operands
            shuffle = defined.get(c.name) if isinstance(c, Register) else None
            if shuffle is not None and shuffle.opcode.startswith("shfl.sync.bfly"):
                shuffled = shuffle.operands[1]
                product = defined.get(shuffled.name) if isinstance(shuffled, Register) else None
                if product is not None and product.opcode == "mul.f32" and {a, b} == set(product.operands[1:]):
                    found.append(instruction)
        for operand in instruction.operands[:1]:
            for item in operand.items if isinstance(operand, Vector) else (operand,):
                if isinstance(item, Register):
                    defined[item.name] = instruction
    return found
