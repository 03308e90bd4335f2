"""Kernels as Python functions over rows of registers: two for each block, of all lanes and of those of a mask.

`instructions` has a handler for each opcode. An instruction or a modifier that none knows raises `PtxError` when its
kernel is translated, so that nothing is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smca_kernels.testing.machine import arithmetic
from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.contraction import contracted_sums
from smca_kernels.testing.machine.emitter import BITS, PARAMETERS, TEMPORARIES, VIEWS, Emitter
from smca_kernels.testing.machine.instructions import BYTES, HANDLERS
from smca_kernels.testing.machine.interfaces import Lanes
from smca_kernels.testing.machine.ptx import (
    Block,
    Immediate,
    Instruction,
    Not,
    Operand,
    PtxError,
    Register,
    Symbol,
    Vector,
    parse,
)

__all__ = ["PARAMETERS", "Code", "Program", "schedule"]

BITS_OF_CLASS: dict[str, Any] = {"p": np.bool_, "h": np.uint16, "r": np.uint32, "d": np.uint64}
GARBAGE = {"p": False, "h": 0x7EAD, "r": 0x7FC0DEAD, "d": 0x7FC0DEAD7FC0DEAD}  # what registers hold at first
ROW = re.compile(r"\b([phrd])(\d+)([usfblh])\b")
NUMPY = (
    "absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "copyto", "equal", "greater", "greater_equal",
    "int32", "int64", "invert", "isnan", "left_shift", "less", "less_equal", "logical_and", "logical_not",
    "logical_or", "logical_xor", "maximum", "minimum", "multiply", "negative", "not_equal", "right_shift", "subtract",
    "uint32", "uint64", "where",
)  # fmt: skip


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


class Program:
    """A translated kernel; `code_for` binds it to rows of some number of lanes."""

    def __init__(self, text: str):
        self.kernel = parse(text)
        self.instructions = self.kernel.instructions
        self.parameter_number = {name: n for n, (name, _) in enumerate(self.kernel.params)}
        self.counts = dict.fromkeys("phrd", 0)  # registers of each class
        self.numbers: dict[str, str] = {}  # register → class and number
        for register in self.kernel.registers.values():
            self.numbers[register.name] = f"{register.cls}{self.counts[register.cls]}"
            self.counts[register.cls] += 1
        self.constants: dict[tuple[int, str, str], str] = {}  # bits, class, view → name
        self.specials: dict[str, str] = {}  # %tid.x → name
        self.labels = {block.label: n for n, block in enumerate(self.kernel.blocks)}
        self.contracted = contracted_sums(self.instructions)
        self.granule = min([4, *map(self._shared_width, self.instructions)])
        self.wgmma_registers = {
            item.name
            for instruction in self.instructions if instruction.opcode.startswith("wgmma.mma")
            for operand in instruction.operands[:2] if isinstance(operand, Vector)
            for item in operand.items if isinstance(item, Register)
        }  # fmt: skip
        self.sources = [self._source(n, block) for n, block in enumerate(self.kernel.blocks)]
        self.bound: dict[int, Code] = {}

    @staticmethod
    def _shared_width(instruction: Instruction) -> int:
        """Bytes of an element of an access to shared memory, else 4."""
        is_access = ".shared" in instruction.opcode and instruction.parts[0] in ("ld", "st", "atom", "red")
        return BYTES[instruction.parts[-1]] if is_access else 4

    def constant(self, immediate: Immediate, cls: str, view: str) -> str:
        """The name of a row of a constant."""
        value = immediate.bits
        if (immediate.is_float == "f" and cls != "r") or (view == "f" and not immediate.is_float):
            raise PtxError("immediate of another type")
        if immediate.is_float == "d" and cls == "r":
            value = int(np.float32(np.uint64(value).view(np.float64)).view(np.uint32))
        value = int(value != 0) if cls == "p" else value & ((1 << BITS[cls]) - 1)
        return self.constants.setdefault((value, cls, view), f"c{len(self.constants)}{cls}{view}_")

    def _lines(self, instruction: Instruction, masked: bool) -> list[str]:
        emitter = Emitter(self, instruction, masked)
        if self.wgmma_registers and not instruction.opcode.startswith("wgmma"):
            touched = [
                (item.name, n == 0 and not instruction.opcode.startswith("st"))
                for n, operand in enumerate(instruction.operands)
                for item in _items(operand)
                if isinstance(item, Register) and item.name in self.wgmma_registers
            ]
            if touched:
                check = f"M.check_registers({instruction.index}, {touched}, {emitter.mask})"
                emitter.add(f"if M.shared.any_async_read: {check}")
        try:
            HANDLERS[instruction.parts[0]](emitter)
        except (KeyError, IndexError, ValueError) as error:
            raise PtxError(f"unknown instruction: {instruction.text}") from error
        return emitter.finish()

    def _source(self, number: int, block: Block) -> str:
        text = []
        for head, masked in ((f"def full{number}():", False), (f"def masked{number}(m):", True)):
            straight = [instruction for instruction in block.instructions if not instruction.ends_block]
            lines = [line for instruction in straight for line in self._lines(instruction, masked)]
            text.append("\n    ".join([head, *lines, "return"]))
        return "\n".join(text)

    def code_for(self, lanes: int) -> Code:
        if lanes not in self.bound:
            self.bound[lanes] = Code(self, lanes)
        return self.bound[lanes]


@dataclass
class BoundBlock:
    """A block as functions, and how it ends: "fall", "jump", "branch", "barrier" or "exit"."""

    full: Callable[[], None]
    masked: Callable[[Array], None]
    kind: str = "fall"
    target: int = -1
    condition: Callable[[], Array] = lambda: np.empty(0, bool)
    last: int = -1  # number of the last instruction


class Code:
    """Functions over rows for one number of lanes."""

    def __init__(self, program: Program, lanes: int):
        self.program = program
        self.rows = {
            cls: np.zeros((count + TEMPORARIES, lanes), BITS_OF_CLASS[cls]) for cls, count in program.counts.items()
        }
        self.names: dict[str, Any] = {name: getattr(np, name) for name in NUMPY} | {"A": arithmetic}
        self.parameters = {}
        for n, (name, type_) in enumerate(program.kernel.params):
            self.parameters[name] = np.zeros(lanes, np.uint64 if "64" in type_ else np.uint32)
            self.names[f"P{n}_"] = self.parameters[name]
        for (value, cls, view), name in program.constants.items():
            self.names[name] = np.full(lanes, value, BITS_OF_CLASS[cls]).view(VIEWS[cls][view])
        self.specials = {special: np.zeros(lanes, np.uint32) for special in program.specials}
        for special, name in program.specials.items():
            self.names[name] = self.specials[special]
        source = "\n".join(program.sources)
        for cls, number, view in set(ROW.findall(source)):
            row = self.rows[cls][int(number)]
            if view in "lh":  # the half of a register, of every second
                row = row.view(BITS_OF_CLASS["h" if cls == "r" else "r"])[view == "h" :: 2]
            else:
                row = row.view(VIEWS[cls][view])
            self.names[f"{cls}{number}{view}"] = row
        exec(compile(source, f"<{program.kernel.name}>", "exec"), self.names)
        self.blocks = [self._bind(n) for n in range(len(program.kernel.blocks))]
        self.rank = schedule([self._successors(n) for n in range(len(self.blocks))])

    def _bind(self, number: int) -> BoundBlock:
        block = self.program.kernel.blocks[number]
        bound = BoundBlock(self.names[f"full{number}"], self.names[f"masked{number}"])
        last = block.instructions[-1] if block.instructions else None
        if last is not None and last.ends_block:
            bound.last = last.index
            is_barrier = last.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and len(last.operands) == 1
            if last.parts[0] == "bra" and isinstance(last.operands[0], Symbol):
                bound.target = self.program.labels[last.operands[0].name]
                bound.kind = "jump" if last.guard is None else "branch"
                bound.condition = self._condition(last)
            elif last.guard is None and last.parts[0] in ("ret", "exit"):
                bound.kind = "exit"
            elif last.guard is None and is_barrier:
                bound.kind = "barrier"
            else:
                raise PtxError(f"unknown form: {last.text}")
        if number == len(self.program.kernel.blocks) - 1 and bound.kind == "fall":
            bound.kind = "exit"
        return bound

    def _condition(self, branch: Instruction) -> Callable[[], Array]:
        if branch.guard is None:
            return lambda: np.ones(0, bool)
        register = branch.guard.register if isinstance(branch.guard, Not) else branch.guard
        row = self.rows["p"][int(self.program.numbers[register.name][1:])]
        return (lambda: ~row) if isinstance(branch.guard, Not) else (lambda: row)

    def _successors(self, number: int) -> list[int]:
        block = self.blocks[number]
        following = {"jump": [block.target], "branch": [number + 1, block.target], "exit": []}
        return following.get(block.kind, [number + 1])

    def reset(self, machine: Lanes) -> None:
        """Set registers to garbage, parameters and special registers to the values of a batch of CTAs."""
        self.names["M"] = machine
        for cls, rows in self.rows.items():
            rows.fill(GARBAGE[cls])
        for name, value in machine.parameters.items():
            self.parameters[name][:] = value
        columns, lines, planes = machine.grid
        cta = machine.global_cta
        values: dict[str, Any] = {
            "%tid.x": machine.thread_of_lane, "%tid.y": 0, "%tid.z": 0, "%laneid": machine.all_lanes & 31,
            "%ntid.x": machine.threads, "%ntid.y": 1, "%ntid.z": 1,
            "%nctaid.x": columns, "%nctaid.y": lines, "%nctaid.z": planes,
            "%ctaid.x": cta % columns, "%ctaid.y": cta // columns % lines, "%ctaid.z": cta // columns // lines,
        }  # fmt: skip
        for special, row in self.specials.items():
            row[:] = values[special]


def schedule(following: list[list[int]]) -> Array:
    """Rank each block in the order in which lanes that have parted run.

    Topological, with every loop's blocks before what follows the loop: so lanes meet where their paths join, wherever
    the compiler has put that in the text.

    Args:
        following: the successors of each block; the first block is the entry.
    """
    count = len(following)
    reachable, pending = {0}, [0]
    while pending:
        found = set(following[pending.pop()]) - reachable
        reachable |= found
        pending += found
    successors = [sorted(set(following[i])) if i in reachable else [] for i in range(count)]
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for i in range(count):
        for j in successors[i]:
            predecessors[j].append(i)
    dominators = [{0}, *(set(range(count)) for _ in range(count - 1))]
    changed = True
    while changed:
        changed = False
        for i in range(1, count):
            sets = [dominators[p] for p in predecessors[i]]
            common = (set.intersection(*sets) if sets else set()) | {i}
            if common != dominators[i]:
                dominators[i], changed = common, True
    loops: dict[int, set[int]] = {}  # header → blocks
    for i in range(count):
        for header in set(successors[i]) & dominators[i]:
            body, pending = loops.setdefault(header, {header}), [i]
            while pending:
                if (member := pending.pop()) not in body:
                    body.add(member)
                    pending += predecessors[member]
    headers = [{header for header, body in loops.items() if i in body} for i in range(count)]
    missing = [sum(i not in dominators[p] for p in predecessors[i]) for i in range(count)]
    rank, ready, last = np.zeros(count, np.int64), [i for i in range(count) if missing[i] == 0], 0
    for place in range(count):
        if not ready:
            raise PtxError("control flow that is not reducible")
        # Stay in the innermost loop that the last block is in.
        best = max(ready, key=lambda i, last=last: (len(headers[i] & headers[last]), -i))  # type: ignore[misc]
        ready.remove(best)
        rank[best], last = place, best
        for j in successors[best]:
            if j not in dominators[best]:
                missing[j] -= 1
                if missing[j] == 0:
                    ready.append(j)
    return rank
