"""Names of rows in the Python source that instructions become, and the lines of one instruction.

A row holds one register of all lanes. Its name is class, number and view: r12f is %r12 as float32, d3u a 64-bit
register as uint64, p4b a predicate; r5l and r5h are the low and the high half of %r5.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from smca_kernels.testing.machine.interfaces import Registers
from smca_kernels.testing.machine.ptx import (
    Address,
    Blank,
    Immediate,
    Instruction,
    Not,
    Operand,
    PtxError,
    Register,
    Symbol,
    Vector,
)
from smca_kernels.testing.machine.shared_memory import SharedMemory

VIEWS: dict[str, dict[str, Any]] = {
    "r": {"u": np.uint32, "s": np.int32, "f": np.float32},
    "d": {"u": np.uint64, "s": np.int64, "f": np.float64},
    "h": {"u": np.uint16, "s": np.int16, "f": np.float16},
    "p": {"b": np.bool_},
}
TYPES = {
    "s32": ("r", "s"), "u32": ("r", "u"), "b32": ("r", "u"), "f32": ("r", "f"), "s64": ("d", "s"), "u64": ("d", "u"),
    "b64": ("d", "u"), "f64": ("d", "f"), "s16": ("h", "s"), "u16": ("h", "u"), "b16": ("h", "u"), "f16": ("h", "f"),
    "bf16": ("h", "u"), "pred": ("p", "b"),
}  # fmt: skip
BITS = {"p": 1, "h": 16, "r": 32, "d": 64}
TEMPORARIES = 40  # rows of each class that the lines of one instruction may use
PARAMETERS = 0x100  # where the parameters' space begins, 8 bytes for each: kernels may choose among their addresses


def plain(register: Register) -> str:
    """The view of a register as bits."""
    return "b" if register.cls == "p" else "u"


class Emitter:
    """The Python lines of one instruction, for all lanes or (`masked`) for those of a mask m."""

    def __init__(self, program: Registers, instruction: Instruction, masked: bool):
        self.program, self.instruction = program, instruction
        self.opcode, self.parts, self.operands = instruction.opcode, instruction.parts, instruction.operands
        self.type, self.i = instruction.parts[-1], instruction.index
        self.lines: list[str] = []
        self.copies: list[tuple[str, str]] = []  # results under a mask: the row, and the temporary that holds it
        self.temporaries = dict.fromkeys("phrd", 0)
        self.mask = "m" if masked else "None"
        guard = instruction.guard
        if guard is not None:
            condition = f"~{self.name(guard.register)}b" if isinstance(guard, Not) else f"{self.name(guard)}b"
            self.add(f"g = m & {condition}" if masked else f"g = {condition} & True")
            self.mask = "g"

    def add(self, line: str) -> None:
        self.lines.append(line)

    def finish(self) -> list[str]:
        return self.lines + [f"copyto({row}, {held}, where={self.mask})" for row, held in self.copies]

    def fail(self) -> NoReturn:
        raise PtxError(f"unknown form: {self.instruction.text}")

    def allow(self, *modifiers: str) -> None:
        """Fail if the opcode has other modifiers, its type apart."""
        if any(part not in modifiers for part in self.parts[1:-1]):
            self.fail()

    # --- operands that are known when the kernel is translated ---

    def integer(self, operand: Operand) -> int:
        return operand.bits if isinstance(operand, Immediate) and not operand.is_float else self.fail()

    def items(self, operand: Operand, count: int | None = None) -> tuple[Operand, ...]:
        """The elements of a vector, or the operand alone."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return items if count in (None, len(items)) else self.fail()

    def register(self, operand: Operand) -> Register:
        return operand if isinstance(operand, Register) else self.fail()

    # --- rows ---

    def name(self, operand: Operand) -> str:
        return self.program.numbers[self.register(operand).name]

    def temporary(self, cls: str) -> str:
        number = self.temporaries[cls]
        self.temporaries[cls] += 1
        return f"{cls}{self.program.counts[cls] + number}" if number < TEMPORARIES else self.fail()

    def source(self, operand: Operand, type_: str) -> str:
        """The row of an operand that is read as a type."""
        cls, view = TYPES[type_]
        if isinstance(operand, Register):
            return self.name(operand) + view if operand.cls == cls else self.fail()
        if isinstance(operand, Immediate):
            return self.program.constant(operand, cls, view)
        if isinstance(operand, Not):
            row = self.temporary("p") + "b"
            self.add(f"logical_not({self.name(operand.register)}b, {row})")
            return row
        if isinstance(operand, Symbol) and cls in "rd":
            if operand.name == "global_smem":
                return self.program.constant(Immediate(SharedMemory.BASE), cls, view)
            if operand.name in self.program.parameter_number:
                address = PARAMETERS + 8 * self.program.parameter_number[operand.name]
                return self.program.constant(Immediate(address), cls, view)
        self.fail()

    def destination(self, operand: Operand, type_: str) -> str:
        """The row that a result is written to; under a mask, one that `finish` copies from."""
        cls, view = TYPES[type_]
        if isinstance(operand, Blank):
            return self.temporary(cls) + view
        register = self.register(operand)
        if register.cls != cls:
            self.fail()
        if self.mask == "None":
            return self.name(register) + view
        held = self.temporary(cls)
        self.copies.append((self.name(register) + plain(register), held + plain(register)))
        return held + view

    def row(self, operand: Operand) -> str:
        """The bits of a register that a function of the machine reads, or writes under the mask itself."""
        return "None" if isinstance(operand, Blank) else self.name(operand) + plain(self.register(operand))

    def rows(self, operand: Operand, view: str) -> str:
        """A tuple of the registers of a vector."""
        return f"({', '.join(self.name(item) + view for item in self.items(operand))},)"

    def address(self, operand: Operand, cls: str) -> tuple[str, int]:
        """The row of an address and the offset to it."""
        if not isinstance(operand, Address):
            self.fail()
        if isinstance(operand.base, Symbol):
            if operand.base.name != "global_smem":
                self.fail()
            return self.program.constant(Immediate(SharedMemory.BASE), cls, "u"), operand.offset
        if self.register(operand.base).cls != cls:
            self.fail()
        return self.name(operand.base) + "u", operand.offset
