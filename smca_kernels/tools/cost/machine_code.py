"""Machine code as text: instructions of SASS and PTX, their classes, and the loops over tiles.

`parse_sass` and `parse_ptx` make one list of instructions of a function, `find_loops` finds the natural loops of such
a list, and `attention_loops` those that work on tiles of attention elements.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CLASSES = ("tensor", "ex2", "fp32", "conversion", "memory", "other")


@dataclass(frozen=True)
class Control:
    """Scheduling that ptxas encoded in a SASS instruction: bits 105 to 121 of its 128."""

    stall: int  # cycles before the same warp's next instruction, at least
    write: int | None  # dependence counter that is released when the result is there
    read: int | None  # … when the operands have been read
    wait: tuple[int, ...]  # counters that must be free before it issues


@dataclass(frozen=True)
class Instruction:
    """One line of SASS or PTX."""

    opcode: str
    text: str
    labels: tuple[str, ...] = ()  # in front of it
    target: str | None = None  # where a jump goes
    falls_through: bool = True
    source: str = ""  # file:line
    operands: str = ""
    guard: str = ""  # predicate, "@!P0"
    control: Control | None = None  # SASS printed with its encoding

    @property
    def kind(self) -> str:
        """The class of CLASSES it counts in."""
        return classify(self.opcode)


_MEMORY = frozenset((
    "LD", "ST", "LDG", "STG", "LDL", "STL", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDC", "ULDC", "LDCU",
    "LDTM", "STTM", "ATOM", "ATOMS", "ATOMG", "RED", "REDG", "UBLKCP", "UBLKPF", "UBLKRED", "UTMALDG",
    "UTMASTG", "UTMAPF", "UTMAREDG", "UTCCP",
))  # fmt: skip
_FP32 = frozenset((
    "FFMA", "FFMA2", "FMUL", "FMUL2", "FADD", "FADD2", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP",
    "FCHK", "FSWZADD",
))  # fmt: skip
_CONVERSION = frozenset(("F2F", "F2FP", "F2I", "F2IP", "FRND", "I2F", "I2FP", "I2IP"))
_TENSOR = re.compile(r"(?:[HIDBQO]G?|UTC[A-Z]*)MMA$")


def classify(opcode: str) -> str:
    """The class of a SASS opcode: one of CLASSES."""
    base, _, modifiers = opcode.partition(".")
    if _TENSOR.match(base):
        return "tensor"
    if opcode.startswith("MUFU.EX2"):
        return "ex2"
    if base in _FP32:
        return "fp32"
    # HADD2.F32 widens a half; plain HADD2 is arithmetic.
    if base in _CONVERSION or (base == "HADD2" and modifiers.startswith("F32")):
        return "conversion"
    return "memory" if base in _MEMORY else "other"


_SASS_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<text>(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][^\s;]*)\s*(?P<operands>.*?)\s*;)"
)
_UPPER_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")  # of the encoding, on a line of its own
_LABEL = re.compile(r"^([.$][\w$.]+):")
_JUMP_TARGET = re.compile(r"^(?P<condition>[^`]*)`\((?P<label>[^)]+)\)")
_SOURCE = re.compile(r'//## File "(.*?)", line (\d+)')


def parse_sass(text: str) -> list[Instruction]:
    """List the instructions of one function as `nvdisasm -c` prints it, with their control codes after `-hex`."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    source = ""
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _SOURCE.search(line):
            source = f"{Path(match[1]).name}:{match[2]}"
        elif (match := _UPPER_HALF.match(line)) and instructions:
            instructions[-1] = replace(instructions[-1], control=decode_control(int(match[1], 16)))
        elif match := _SASS_LINE.match(line):
            guard, opcode, operands = match["guard"], match["opcode"], match["operands"]
            target, falls_through = None, True
            base = opcode.split(".")[0]
            jump = _JUMP_TARGET.match(operands)
            if jump and (base in ("BRA", "JMP") or (base == "CALL" and jump["label"].startswith(".L"))):
                # ptxas writes some loop exits as calls that never return. A condition may precede the target.
                target = jump["label"]
                falls_through = guard is not None or jump["condition"].strip() != ""
            elif base in ("EXIT", "RET", "BRX", "KILL"):
                falls_through = guard is not None
            text, place = match["text"], tuple(labels)
            guard = (guard or "").strip()
            instructions.append(Instruction(opcode, text, place, target, falls_through, source, operands, guard))
            labels = []
    return instructions


def decode_control(upper_half: int) -> Control:
    """Decode the control code in the upper 64 bits of an instruction; a counter of 7 is none."""
    code = upper_half >> 41
    write, read, wait = code >> 5 & 7, code >> 8 & 7, code >> 11 & 63
    return Control(
        code & 15,
        None if write == 7 else write,
        None if read == 7 else read,
        tuple(counter for counter in range(6) if wait >> counter & 1),
    )


_PTX_LINE = re.compile(r"^\s*(?P<guard>@!?%?\w+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*?);")
_PTX_LABEL = re.compile(r"^\s*(\$[\w$]+):")


def parse_ptx(text: str) -> list[Instruction]:
    """List the instructions of a PTX module of one function."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if match := _PTX_LABEL.match(line):
            labels.append(match[1])
        elif match := _PTX_LINE.match(line):
            jump = match["opcode"] in ("bra", "bra.uni")
            falls_through = match["guard"] is not None or not (jump or match["opcode"] in ("ret", "exit"))
            target = match["operands"].strip() if jump else None
            instructions.append(Instruction(match["opcode"], line.strip(), tuple(labels), target, falls_through))
            labels = []
    return instructions


@dataclass(frozen=True)
class ControlFlow:
    """Basic blocks of a function: block b holds the instructions from starts[b] up to ends[b]."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    successors: tuple[frozenset[int], ...]
    predecessors: tuple[frozenset[int], ...]
    jumps: dict[int, int]  # instruction → the one that it jumps to

    def block_of(self, instruction: int) -> int:
        """Find the block that an instruction is in."""
        return bisect.bisect_right(self.starts, instruction) - 1


def control_flow(instructions: Sequence[Instruction]) -> ControlFlow:
    """Cut a function into basic blocks and connect them."""
    position = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    jumps = {i: position[each.target] for i, each in enumerate(instructions) if each.target in position}
    starts = {0, *jumps.values()}
    starts |= {i + 1 for i, each in enumerate(instructions) if each.target is not None or not each.falls_through}
    ordered = sorted(s for s in starts if s < len(instructions))
    block_at = {start: b for b, start in enumerate(ordered)}
    ends = [*ordered[1:], len(instructions)]

    successors: list[set[int]] = [set() for _ in ordered]
    predecessors: list[set[int]] = [set() for _ in ordered]
    for block, end in enumerate(ends):
        if instructions[end - 1].falls_through and end in block_at:
            successors[block].add(block_at[end])
        if end - 1 in jumps:
            successors[block].add(block_at[jumps[end - 1]])
        for successor in successors[block]:
            predecessors[successor].add(block)
    frozen = [tuple(frozenset(each) for each in edges) for edges in (successors, predecessors)]
    return ControlFlow(tuple(ordered), tuple(ends), frozen[0], frozen[1], jumps)


def find_loops(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Natural loops: for each loop header the sorted indices of the instructions of its body.

    A loop is a jump to a block that dominates it, together with every block from which the jump is reached
    without passing that header. Blocks that run on a condition only are part of the body.
    """
    if not instructions:
        return []
    flow = control_flow(instructions)
    dominators = _dominators(flow.successors, flow.predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(flow.successors):
        for header in following & dominators.get(block, set()):
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                member = pending.pop()
                if member not in body:
                    body.add(member)
                    pending.extend(flow.predecessors[member] & dominators.keys())
    return [
        [i for block in sorted(body) for i in range(flow.starts[block], flow.ends[block])]
        for _, body in sorted(bodies.items())
    ]


def _dominators(successors: Sequence[frozenset[int]], predecessors: Sequence[frozenset[int]]) -> dict[int, set[int]]:
    """The blocks on every path from block 0, for each block that can be reached from it."""
    reachable, pending = {0}, [0]
    while pending:
        found = successors[pending.pop()] - reachable
        reachable |= found
        pending.extend(found)
    dominators = {block: set(reachable) for block in reachable}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            common = set.intersection(*(dominators[p] for p in predecessors[block] & reachable)) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


_PTX_TENSOR = re.compile(r"(mma|wgmma\.mma_async|tcgen05\.mma)\b")


def attention_loops(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The innermost loops with tensor instructions, or with exp2 where the dots are FMA: those over tiles."""
    tensor = {i for i, line in enumerate(instructions) if line.kind == "tensor" or _PTX_TENSOR.match(line.opcode)}
    ex2 = {i for i, line in enumerate(instructions) if line.kind == "ex2" or line.opcode.startswith("ex2.")}
    loops = find_loops(instructions)
    for marked in (tensor, ex2):
        if found := [set(body) for body in loops if marked.intersection(body)]:
            return [sorted(body) for body in found if not any(other < body for other in found)]
    return []


_MMA_FLOPS = {"16816": 4096, "1688": 2048, "1684": 1024}  # m16n8k16, m16n8k8, m16n8k4


def tensor_flops(opcode: str) -> int | None:
    """FP16-equivalent FLOP of a warp's share of a tensor instruction; None: only a descriptor tells."""
    half_rate = 2 if "TF32" in opcode else 1
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, match.groups())
        return half_rate * 2 * m * n * k // 4  # a warp group of four warps issues it together
    if match := re.match(r"HMMA\.(\d+)", opcode):
        return half_rate * _MMA_FLOPS[match[1]] if match[1] in _MMA_FLOPS else None
    return None
