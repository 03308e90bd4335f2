"""Static cost of the Triton kernels, by offline compilation: `smca cost`.

Every kernel is compiled for a GPU that need not be there, and its machine code (SASS) is read with the
disassembler that comes inside Triton. The innermost loop over tiles gives the instructions issued per
attention element, the resource usage gives spills and resident warps, and the limits of the hardware (tensor
cores, EX2 unit, FP32 lanes, issue slots) the unit that binds and the elements per second: docs/cost.md.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import write_text

if TYPE_CHECKING:
    from smca_kernels.backends.triton.launch import Specialization

CLASSES = ("tensor", "ex2", "fp32", "conversion", "memory", "other")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What one SM of a GPU can hold and do per clock, and the product that the predicted rates stand for."""

    product: str
    multiprocessors: int
    clock_hz: float  # boost
    tensor_flops: int  # FP16 FLOP per clock per SM, dense, FP32 sums; 0: Triton emits no tensor instructions
    fp32_lanes: int
    warps: int  # resident, per SM
    blocks: int  # resident, per SM
    shared_bytes: int  # per SM
    block_shared_bytes: int  # most that one block may ask for
    reserved_shared_bytes: int  # kept by the driver, per block
    shared_granularity: int


# Limits: NVIDIA's CUDA C++ programming guide, compute capabilities. multiprocessors × clock × tensor_flops is
# the datasheet's dense FP16 rate: 312, 125, 121, 990 and 2250 TFLOP/s from A100 on.
ARCHITECTURES: dict[int, Architecture] = {
    70: Architecture("V100 SXM2", 80, 1.53e9, 0, 64, 64, 32, 96 << 10, 96 << 10, 0, 256),
    75: Architecture("T4", 40, 1.59e9, 0, 64, 32, 16, 64 << 10, 64 << 10, 0, 256),
    80: Architecture("A100 SXM", 108, 1.41e9, 2048, 64, 64, 32, 164 << 10, 163 << 10, 1024, 128),
    86: Architecture("A10", 72, 1.695e9, 1024, 128, 48, 16, 100 << 10, 99 << 10, 1024, 128),
    89: Architecture("L4", 58, 2.04e9, 1024, 128, 48, 24, 100 << 10, 99 << 10, 1024, 128),
    90: Architecture("H100 SXM", 132, 1.83e9, 4096, 128, 64, 32, 228 << 10, 227 << 10, 1024, 128),
    100: Architecture("B200", 148, 1.85e9, 8192, 128, 64, 32, 228 << 10, 227 << 10, 1024, 128),
}
REGISTERS_PER_SM = 65536
EX2_LANES = 16  # multi-function unit, per SM and clock, sm_70 to sm_100
ISSUE_LANES = 128  # four schedulers of 32 lanes


# ----------------------------------------------------------------------------------------------------
# Machine code


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of SASS or PTX."""

    opcode: str
    text: str
    labels: tuple[str, ...] = ()  # in front of it
    target: str | None = None  # where a jump goes
    falls_through: bool = True
    source: str = ""  # file:line

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
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][^\s;]*)\s*(?P<operands>.*?)\s*;"
)
_LABEL = re.compile(r"^([.$][\w$.]+):")
_JUMP_TARGET = re.compile(r"^(?P<condition>[^`]*)`\((?P<label>[^)]+)\)")
_SOURCE = re.compile(r'//## File "(.*?)", line (\d+)')


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of one function, as `nvdisasm -c` prints it."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    source = ""
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _SOURCE.search(line):
            source = f"{Path(match[1]).name}:{match[2]}"
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
            instructions.append(
                Instruction(opcode, line.split("*/", 1)[1].strip(), tuple(labels), target, falls_through, source)
            )
            labels = []
    return instructions


_PTX_LINE = re.compile(r"^\s*(?P<guard>@!?%?\w+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*?);")
_PTX_LABEL = re.compile(r"^\s*(\$[\w$]+):")


def parse_ptx(text: str) -> list[Instruction]:
    """The instructions of a PTX module of one function."""
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


def find_loops(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Natural loops: for each loop header the sorted indices of the instructions of its body.

    A loop is a jump to a block that dominates it, together with every block from which the jump is reached
    without passing that header. Blocks that run on a condition only are part of the body.
    """
    if not instructions:
        return []
    position = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    starts = {0}
    for i, instruction in enumerate(instructions):
        if instruction.target in position:
            starts.add(position[instruction.target])
        if instruction.target is not None or not instruction.falls_through:
            starts.add(i + 1)
    ordered = sorted(s for s in starts if s < len(instructions))
    block_at = {start: b for b, start in enumerate(ordered)}
    ends = [*ordered[1:], len(instructions)]

    successors: list[set[int]] = [set() for _ in ordered]
    predecessors: list[set[int]] = [set() for _ in ordered]
    for block, end in enumerate(ends):
        last = instructions[end - 1]
        if last.falls_through and end in block_at:
            successors[block].add(block_at[end])
        if last.target in position:
            successors[block].add(block_at[position[last.target]])
        for successor in successors[block]:
            predecessors[successor].add(block)

    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for header in following & dominators.get(block, set()):
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                member = pending.pop()
                if member not in body:
                    body.add(member)
                    pending.extend(predecessors[member] & dominators.keys())
    return [
        [i for block in sorted(body) for i in range(ordered[block], ends[block])] for _, body in sorted(bodies.items())
    ]


def _dominators(successors: Sequence[set[int]], predecessors: Sequence[set[int]]) -> dict[int, set[int]]:
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


def _tensor_flops(opcode: str) -> int | None:
    """FP16-equivalent FLOP of a warp's share of a tensor instruction; None: only a descriptor tells."""
    half_rate = 2 if "TF32" in opcode else 1
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, match.groups())
        return half_rate * 2 * m * n * k // 4  # a warp group of four warps issues it together
    if match := re.match(r"HMMA\.(\d+)", opcode):
        return half_rate * _MMA_FLOPS[match[1]] if match[1] in _MMA_FLOPS else None
    return None


# ----------------------------------------------------------------------------------------------------
# Cost of one compiled kernel


@dataclasses.dataclass(frozen=True)
class LoopCost:
    """One innermost loop over tiles. All counts are of instructions issued per attention element."""

    source: str  # first source line of its body
    instructions: int  # in the body, per thread
    tiles: float  # tiles that one trip of the machine loop covers: > 1 where ptxas unrolled, < 1 over smaller tiles
    per_element: dict[str, float]  # by class
    tensor_flops: float | None  # FP16-equivalent, per element; None where only a descriptor tells
    fp32_operations: float  # per element; packed pairs count two
    ex2_unit: float  # operations of the multi-function unit per element

    @property
    def total(self) -> float:
        return sum(self.per_element.values())


@dataclasses.dataclass(frozen=True)
class StaticCost:
    """What can be said of a compiled kernel without running it."""

    arch: int
    threads: int
    registers: int
    spill_bytes: int  # stored to local memory by spill instructions, per thread
    local_bytes: int  # local memory, per thread
    shared_bytes: int  # per block
    resident_warps: int  # per SM; 0: a block does not fit
    instructions: int | None  # in the whole kernel; None: the disassembler does not read this architecture
    loops: tuple[LoopCost, ...]  # the most expensive first, then those of rare inputs
    note: str

    @property
    def loop(self) -> LoopCost | None:
        """The innermost loop that the report's headline counts."""
        return self.loops[0] if self.loops else None


def compile_kernel(
    function: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    target_cc: int,
    num_warps: int,
    num_stages: int,
    attrs: dict[Any, Any] | None = None,
) -> Any:
    """Compile a Triton kernel for an architecture without a GPU, through Triton's own cache.

    Args:
        function: a `triton.jit` function.
        signature: argument name -> Triton type ("*fp16", "i32", "fp32").
        constexprs: argument name -> value.
        target_cc: compute capability as an integer, e.g. 90.
        num_warps, num_stages: launch options.
        attrs: argument properties as `ASTSource` takes them, e.g. {(0,): [["tt.divisibility", 16]]}.

    Returns:
        triton.compiler.CompiledKernel

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(function, triton.JITFunction):
        raise RuntimeError(f"{function!r} can't be compiled: unset TRITON_INTERPRET before triton is imported")
    complete = {name: signature.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(function, complete, constexprs, attrs or {})
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target_cc, 32), options=options)


def disassemble(compiled: Any) -> str:
    """The SASS of a compiled kernel with source lines.

    Raises:
        subprocess.CalledProcessError: nvdisasm no longer reads this architecture.
    """
    text = _tool("nvdisasm", ["-c", "-g"], compiled.asm["cubin"])
    name = re.escape(compiled.metadata.name)
    # Only the kernel's own section: the debug sections follow it.
    section = re.search(rf"^\.text\.{name}:$(.*?)(?=^\s*\.section|\Z)", text, re.M | re.S)
    if section is None:
        raise RuntimeError(f"no section .text.{compiled.metadata.name} in nvdisasm's output")
    return section[1]


def analyze(
    compiled: Any,
    elements_per_iteration: int,
    tensor_flops_per_element: float = 0,
    elements_per_program: int = 0,
    rare_loops: int = 0,
) -> StaticCost:
    """Registers, memory, occupancy, and instructions per attention element of a compiled kernel.

    Args:
        compiled: what `compile_kernel` returned.
        elements_per_iteration: attention elements (query, key pairs) of one trip of the kernel's innermost
            loop; 0 for a kernel without such a loop.
        tensor_flops_per_element: FP16-equivalent FLOP per element, used where the machine code doesn't tell.
        elements_per_program: for a kernel without such a loop, the elements that one program stands for.
        rare_loops: how many of the innermost loops, the most expensive ones, only unusual inputs take.
            They are counted and told in the note, but are not the headline.
    """
    arch = compiled.metadata.target.arch
    threads = 32 * compiled.metadata.num_warps
    registers, local_bytes = _resource_usage(compiled.asm["cubin"])
    shared_bytes = compiled.metadata.shared
    measured = StaticCost(
        arch=arch, threads=threads, registers=registers, spill_bytes=local_bytes, local_bytes=local_bytes,
        shared_bytes=shared_bytes, resident_warps=resident_warps(arch, threads, registers, shared_bytes),
        instructions=None, loops=(), note="",
    )  # fmt: skip
    try:
        instructions = parse_sass(disassemble(compiled))
    except subprocess.CalledProcessError as error:
        note = f"instructions not counted, spilled bytes are all local memory: {error.stderr.strip()}"
        return dataclasses.replace(measured, note=note)

    note = ""
    loops: list[LoopCost] = []
    if elements_per_iteration:
        ptx = parse_ptx(compiled.asm["ptx"])
        expected_ex2 = max((_ptx_ex2(ptx[i] for i in body) for body in attention_loops(ptx)), default=0)
        for body in attention_loops(instructions):
            cost = _loop_cost([instructions[i] for i in body], threads, elements_per_iteration, expected_ex2)
            if cost.tensor_flops is None:
                cost = dataclasses.replace(cost, tensor_flops=tensor_flops_per_element)
            loops.append(cost)
        loops.sort(key=lambda cost: -cost.total)
        if len(loops) <= rare_loops:
            note = f"{len(loops)} loops with tensor or exp2 instructions, expected more than {rare_loops}"
            loops = []
        elif rare_loops:
            totals = ", ".join(f"{cost.total:.2f}" for cost in loops[:rare_loops])
            note = f"in the loop that only unusual inputs take: {totals} instructions per element"
            loops = loops[rare_loops:] + loops[:rare_loops]
        if loops and loops[0].per_element["ex2"] >= 1.5:
            exp2 = loops[0].per_element["ex2"]
            replicated = f"{exp2:.1f} exp2 per element: the tile is replicated across warps"
            note = f"{note}; {replicated}" if note else replicated
    elif elements_per_program:
        loops = [_loop_cost(instructions, threads, elements_per_program, expected_ex2=0)]
        note = "no loop over keys: the whole kernel, shared by the workload's elements; memory is not modelled"
    spilled = sum(_width(i.opcode) for i in instructions if i.opcode.split(".")[0] == "STL")
    return dataclasses.replace(
        measured, spill_bytes=spilled, instructions=len(instructions), loops=tuple(loops), note=note
    )


def _ptx_ex2(body: Iterable[Instruction]) -> int:
    """EX2 operations asked for; packed pairs count two."""
    return sum(2 if "x2" in i.opcode[4:] else 1 for i in body if i.opcode.startswith("ex2."))


def _loop_cost(body: Sequence[Instruction], threads: int, elements_per_iteration: int, expected_ex2: int) -> LoopCost:
    counts = dict.fromkeys(CLASSES, 0)
    for instruction in body:
        counts[instruction.kind] += 1
    # Where ptxas unrolled the loop, its body holds a multiple of the exp2 in PTX's; a loop over smaller tiles holds
    # a part. EX2 × threads alone would mistake a tile that is replicated across warps for an unrolled one.
    ratio = counts["ex2"] / expected_ex2 if expected_ex2 and counts["ex2"] else 1.0
    tiles = ratio if ratio < 0.75 else max(1.0, ratio // 1)
    share = threads / (elements_per_iteration * tiles)
    tensor = [_tensor_flops(i.opcode) for i in body if i.kind == "tensor"]
    flops = None if None in tensor else sum(f for f in tensor if f is not None) / 32 * share
    packed = sum(i.opcode.split(".")[0] in ("FFMA2", "FMUL2", "FADD2") for i in body)
    mufu = sum(i.opcode.startswith("MUFU") for i in body)
    source = next((i.source for i in body if i.source), "")
    per_element = {name: count * share for name, count in counts.items()}
    return LoopCost(source, len(body), tiles, per_element, flops, (counts["fp32"] + packed) * share, mufu * share)


def resident_warps(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Warps that one SM holds at once (occupancy) for blocks of this size; 0: not even one block fits."""
    limits = ARCHITECTURES[arch]
    if shared_bytes > limits.block_shared_bytes:
        return 0
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
    # Each of the four schedulers has a quarter of the registers, and a block's warps are spread over them.
    by_registers = (REGISTERS_PER_SM // 4 // registers_per_warp) * 4 // warps
    unit = limits.shared_granularity
    shared = -(-(shared_bytes + limits.reserved_shared_bytes) // unit) * unit
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    return warps * min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def listing(compiled: Any) -> str:
    """The SASS of every attention loop, lines with class and source line, below a histogram of opcodes."""
    instructions = parse_sass(disassemble(compiled))
    lines: list[str] = []
    for number, indices in enumerate(attention_loops(instructions)):
        body = [instructions[i] for i in indices]
        kinds = collections.Counter(i.kind for i in body)
        opcodes = collections.Counter(i.opcode.split(".")[0] for i in body)
        counts = ", ".join(f"{kinds[k]} {k}" for k in CLASSES)
        lines.append(f"loop {number}: {len(body)} instructions per thread: {counts}")
        lines.append("  " + ", ".join(f"{count} {opcode}" for opcode, count in opcodes.most_common()))
        lines += [f"{i.kind:<10} {i.source:<24} {' '.join(i.labels):<8} {i.text}" for i in body]
    return "\n".join(lines) + "\n"


def _width(opcode: str) -> int:
    match = re.search(r"\.(8|U8|S8|16|U16|S16|64|128)\b", opcode)
    return int(match[1].strip("US")) // 8 if match else 4


def _tool(name: str, options: Sequence[str], cubin: bytes) -> str:
    """Output of one of the binary tools inside Triton for a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    usage = _tool("cuobjdump", ["-res-usage"], cubin)
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return fields["REG"], fields["STACK"] + fields["LOCAL"]


# ----------------------------------------------------------------------------------------------------
# The report

DTYPES = ("fp16", "bf16", "fp32")
HEAD_DIMS = (32, 64, 128)
DEFAULT_ARCHITECTURES = (75, 80, 86, 89, 90, 100)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile: the `index`-th of a module's `specializations(arch, dtype, head_dim)`."""

    module: str
    arch: int
    dtype: str
    head_dim: int
    index: int
    kernel: str
    pass_: str


def unit_cycles(cost: LoopCost, arch: int) -> dict[str, float]:
    """Cycles per element that one SM needs in each unit, were it the only limit."""
    limits = ARCHITECTURES[arch]
    cycles = {
        "ex2": cost.ex2_unit / EX2_LANES,
        "fp32": cost.fp32_operations / limits.fp32_lanes,
        "issue": cost.total / ISSUE_LANES,
    }
    if limits.tensor_flops:
        cycles["tensor"] = (cost.tensor_flops or 0.0) / limits.tensor_flops
    return cycles


def _cost_cells(cost: StaticCost, specialization: Specialization) -> Row:
    """What the analysis adds to a row of the report."""
    limits = ARCHITECTURES[cost.arch]
    row: Row = {
        "registers": cost.registers,
        "spill_bytes": cost.spill_bytes,
        "local_bytes": cost.local_bytes,
        "shared_bytes": cost.shared_bytes,
        "resident_warps": cost.resident_warps,
        "num_warps": specialization.num_warps,
        "num_stages": specialization.num_stages,
        "counts_elements": bool(specialization.elements_per_iteration or specialization.elements_per_program),
        "elements_per_iteration": specialization.elements_per_iteration,
        "constexprs": {name: _plain(value) for name, value in specialization.constexprs.items()},
        "loops": [dataclasses.asdict(loop) | {"instructions_per_element": loop.total} for loop in cost.loops],
        "note": cost.note,
    }
    if cost.resident_warps == 0:
        row["error"] = (
            f"does not fit: {cost.shared_bytes} B of shared memory a block "
            f"(limit {limits.block_shared_bytes}), {cost.threads} threads of {cost.registers} registers"
        )
    if cost.loop is not None:
        cycles = unit_cycles(cost.loop, cost.arch)
        binding = max(cycles, key=lambda unit: cycles[unit])
        row |= cost.loop.per_element
        row["instructions_per_element"] = cost.loop.total
        row["bound_by"] = binding
        row["predicted_elements_per_second"] = limits.multiprocessors * limits.clock_hz / cycles[binding]
    return row


def total_row(rows: Sequence[Row]) -> Row:
    """All kernels of one pass together, for one (arch, dtype, head_dim): they run one after the other.

    Instructions and time per element add up, resources are the largest of any kernel. What is done once a call, not
    for every element, is not in the sums.
    """
    job = Job("", int(rows[0]["arch"][3:]), rows[0]["dtype"], rows[0]["head_dim"], 0, "", rows[0]["pass"])
    total = _empty_row(job) | {"kernel": f"{job.pass_} total", "triton": rows[0]["triton"]}
    for name in ("registers", "spill_bytes", "local_bytes", "shared_bytes"):
        total[name] = max((row[name] for row in rows if row[name] is not None), default=None)
    rows = [row for row in rows if row.get("counts_elements", True)]
    missing = [row["kernel"] for row in rows if row["instructions_per_element"] is None]
    if missing:
        total["note"] = "incomplete: nothing counted for " + ", ".join(missing)
        return total
    for name in (*CLASSES, "instructions_per_element"):
        total[name] = sum(row[name] for row in rows)
    total["predicted_elements_per_second"] = 1 / sum(1 / row["predicted_elements_per_second"] for row in rows)
    total["bound_by"] = min(rows, key=lambda row: row["predicted_elements_per_second"])["bound_by"]
    total["note"] = " + ".join(f"{row['kernel']} {row['instructions_per_element']:.2f}" for row in rows)
    return total


def _empty_row(job: Job) -> Row:
    unknown = ["registers", "spill_bytes", "local_bytes", "shared_bytes", "resident_warps"]
    unknown += ["instructions_per_element", *CLASSES, "bound_by", "predicted_elements_per_second"]
    unknown += ["triton", "error"]
    return {
        "kernel": job.kernel,
        "pass": job.pass_,
        "arch": f"sm_{job.arch}",
        "product": ARCHITECTURES[job.arch].product,
        "dtype": job.dtype,
        "head_dim": job.head_dim,
        "note": "",
    } | dict.fromkeys(unknown)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _leave_interpreter() -> None:
    """In a worker, before it imports Triton: interpreted kernels can't be compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def _list_jobs(module: str, arch: int, dtype: str, head_dim: int) -> list[Job]:
    specializations = importlib.import_module(module).specializations(arch, dtype, head_dim)
    return [Job(module, arch, dtype, head_dim, i, s.kernel, s.pass_) for i, s in enumerate(specializations)]


def _run_job(job: Job, sass_directory: Path | None) -> Row:
    """Compile and analyze one kernel; what goes wrong becomes the row's error."""
    import triton

    row = _empty_row(job) | {"triton": triton.__version__}
    try:
        # Triton prints the whole PTX when ptxas fails; its exception carries the message as well.
        with contextlib.redirect_stdout(io.StringIO()):
            specializations = importlib.import_module(job.module).specializations
            chosen = specializations(job.arch, job.dtype, job.head_dim)[job.index]
            compiled = compile_kernel(
                chosen.function, chosen.signature, chosen.constexprs, job.arch, chosen.num_warps,
                chosen.num_stages, chosen.attrs,
            )  # fmt: skip
            # FLOP are counted at FP16's rate, TF32 runs at half of it.
            flops = chosen.tensor_flops_per_element * (2 if job.dtype == "fp32" else 1)
            cost = analyze(
                compiled, chosen.elements_per_iteration, flops, chosen.elements_per_program, chosen.rare_loops
            )
            if sass_directory is not None and cost.instructions is not None:
                name = f"{job.kernel}-sm_{job.arch}-{job.dtype}-{job.head_dim}.sass".replace(" ", "_")
                (sass_directory / name).write_text(listing(compiled))
        return row | _cost_cells(cost, chosen)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}


def compile_report(
    combinations: Sequence[tuple[int, str, int]],
    *,
    module: str = "smca_kernels.backends.triton.launch",
    sass_directory: Path | None = None,
) -> list[Row]:
    """Cost of every kernel for each (arch, dtype, head_dim), on all CPU cores; progress goes to stderr.

    Args:
        combinations: (compute capability, "fp16" | "bf16" | "fp32", head_dim) triples.
        module: where `specializations(arch, dtype, head_dim)` is found.
        sass_directory: write the annotated loops of every kernel there.

    Returns:
        One row per kernel, and one "<pass> total" row where a pass has several kernels. A kernel that does
        not compile, or whose block does not fit the GPU, has the reason in its row's "error".
    """
    rows: list[Row] = []
    jobs: list[Job] = []
    results: dict[Job, Row] = {}
    with _worker_pool(os.cpu_count() or 1) as pool:
        listed = [pool.submit(_list_jobs, module, *combination) for combination in combinations]
        for listing_job in listed:
            jobs += listing_job.result()
        futures: dict[Future[Row], Job] = {}
        with contextlib.suppress(BrokenProcessPool):
            for job in jobs:
                futures[pool.submit(_run_job, job, sass_directory)] = job
        for future in concurrent.futures.as_completed(futures):
            job = futures[future]
            with contextlib.suppress(BrokenProcessPool):
                results[job] = future.result()
                _progress(len(results), len(jobs), job)
    # LLVM ends its process on an internal error, and the jobs that shared the pool with it.
    for job in jobs:
        if job not in results:
            with _worker_pool(1) as pool:
                try:
                    results[job] = pool.submit(_run_job, job, sass_directory).result()
                except BrokenProcessPool:
                    results[job] = _empty_row(job) | {"error": "the compiler ended its process"}
            _progress(len(results), len(jobs), job)
    for _, group in itertools.groupby(jobs, key=lambda job: (job.arch, job.dtype, job.head_dim)):
        group_rows = [results[job] for job in group]
        rows += group_rows
        for pass_ in dict.fromkeys(row["pass"] for row in group_rows):
            of_pass = [row for row in group_rows if row["pass"] == pass_]
            if len(of_pass) > 1:
                rows.append(total_row(of_pass))
    return rows


def _worker_pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, so that no worker inherits a Triton that was imported for the interpreter.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _leave_interpreter)


def _progress(done: int, total: int, job: Job) -> None:
    text = f"[{done}/{total}] {job.kernel} sm_{job.arch} {job.dtype} {job.head_dim}"
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done % 10 == 0 or done == total:
        print(text, file=sys.stderr, flush=True)


_COLUMNS: tuple[tuple[str, str, str], ...] = (  # heading, key, format
    ("kernel", "kernel", "<22"),
    ("arch", "arch", "<6"),
    ("dtype", "dtype", "<5"),
    ("D", "head_dim", ">3"),
    ("regs", "registers", ">4"),
    ("spill", "spill_bytes", ">5"),
    ("local", "local_bytes", ">5"),
    ("shared", "shared_bytes", ">6"),
    ("warps", "resident_warps", ">5"),
    *((name[:6], name, ">6.2f") for name in CLASSES),
    ("total", "instructions_per_element", ">6.2f"),
    ("bound by", "bound_by", "<8"),
    ("G/s", "predicted_elements_per_second", ">6.0f"),
)


def format_table(rows: Sequence[Row]) -> str:
    """The report as text: a line per kernel, notes and errors, then a line per pass and architecture."""
    lines = [" ".join(f"{heading:{spec.split('.')[0]}}" for heading, _, spec in _COLUMNS)]
    for row in rows:
        cells = []
        for _, key, spec in _COLUMNS:
            value = row[key] if key != "predicted_elements_per_second" or row[key] is None else row[key] / 1e9
            cells.append(f"{'-':{spec.split('.')[0]}}" if value is None else f"{value:{spec}}")
        lines.append(" ".join(cells).rstrip())
    notes: dict[str, list[str]] = {}
    for row in rows:
        if not row["kernel"].endswith(" total"):
            name = f"{row['kernel']} {row['arch']} {row['dtype']} {row['head_dim']}"
            if row["note"]:
                notes.setdefault(row["note"], []).append(name)
            if row["error"]:
                notes.setdefault("ERROR " + row["error"], []).append(name)
    lines += [f"\n{note}\n    {', '.join(names)}" for note, names in notes.items()]
    lines.append("\nInstructions per attention element, all kernels of a pass together:")
    for (pass_, arch), totals in _totals(rows).items():
        lines.append(f"{pass_:<16} {arch:<6} " + ", ".join(f"{name} {value}" for name, value in totals))
    return "\n".join(lines)


def _totals(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    totals: dict[tuple[str, str, str, int], Row] = {}
    for row in rows:  # a pass's total row follows its kernels
        totals[row["pass"], row["arch"], row["dtype"], row["head_dim"]] = row
    lines: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (pass_, arch, dtype, head_dim), row in sorted(totals.items(), key=lambda item: _footer_order(*item[0])):
        value = row["instructions_per_element"]
        cell = (f"{dtype}/{head_dim}", "-" if value is None else f"{value:.2f}")
        lines.setdefault((pass_, arch), []).append(cell)
    return lines


def _footer_order(pass_: str, arch: str, dtype: str, head_dim: int) -> tuple[Any, ...]:
    return (
        not pass_.endswith("forward"),
        pass_.startswith("planned"),
        int(arch.removeprefix("sm_")),
        DTYPES.index(dtype),
        head_dim,
    )


def parse_architecture(text: str) -> int:
    """80 from "sm_80", "sm80", "80" or "8.0".

    Raises:
        argparse.ArgumentTypeError: not one of ARCHITECTURES.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)a?", text.strip().lower())
    arch = int(match[1] + match[2]) if match else None
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return arch


def _parse_head_dim(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 128:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 128, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca cost`."""
    parser.add_argument(
        "--arch", nargs="+", type=parse_architecture, default=list(DEFAULT_ARCHITECTURES), metavar="SM",
        help="architectures, e.g. sm_80 sm_90 (default: 75 80 86 89 90 100)",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument(
        "--head-dim", nargs="+", type=_parse_head_dim, default=list(HEAD_DIMS), metavar="D",
        help="channels per head, 1 to 128 (default: 32 64 128)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="write each kernel's loops there, annotated")


def run(args: argparse.Namespace) -> int:
    """`smca cost`: print the report; 1 if a kernel failed to compile or to fit, else 0.

    Raises:
        ValueError: Triton is not installed, or the directory of --json does not exist.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("compiles with Triton, which is not installed here")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json must lie in an existing directory, got {args.json}")
    if args.sass is not None:
        args.sass.mkdir(parents=True, exist_ok=True)
    unique = (dict.fromkeys(values) for values in (args.arch, args.dtype, args.head_dim))
    rows = compile_report(list(itertools.product(*unique)), sass_directory=args.sass)
    print(format_table(rows))
    if args.json is not None:
        write_text(args.json, json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["error"] for row in rows) else 0
