"""One kernel: compile it without a GPU, disassemble it, and count what its loops over tiles cost.

    compiled = compile_kernel(function, signature, constexprs, 90, num_warps, num_stages)
    cost = analyze(compiled, elements_per_iteration)

Instructions are counted per attention element; the limits of the hardware (tensor cores, EX2 unit, FP32 lanes, issue
slots) give the cycles that each unit needs for one: docs/cost.md.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from smca_kernels.tools.cost.architectures import ARCHITECTURES, EX2_LANES, ISSUE_LANES, resident_warps
from smca_kernels.tools.cost.machine_code import (
    CLASSES,
    Instruction,
    attention_loops,
    parse_ptx,
    parse_sass,
    tensor_flops,
)


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
    """Resources of a compiled kernel and the cost of its loops, known without running it."""

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
    code: tuple[Instruction, ...] = dataclasses.field(default=(), repr=False)
    bodies: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), repr=False)  # of the loops, in their order

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
    max_registers: int | None = None,
    fuses: bool = True,
) -> Any:
    """Compile a Triton kernel for an architecture without a GPU, through Triton's own cache.

    Args:
        function: a `triton.jit` function.
        signature: argument name -> Triton type ("*fp16", "i32", "fp32").
        constexprs: argument name -> value.
        target_cc: compute capability as an integer, e.g. 90.
        num_warps, num_stages: launch options.
        attrs: argument properties as `ASTSource` takes them, e.g. {(0,): [["tt.divisibility", 16]]}.
        max_registers: launch option: of a thread.
        fuses: launch option: whether products and sums may be contracted to multiply-adds.

    Returns:
        triton.compiler.CompiledKernel

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from smca_kernels.backends.triton import hopper

    if not isinstance(function, triton.JITFunction):
        raise RuntimeError(f"{function!r} can't be compiled: unset TRITON_INTERPRET before triton is imported")
    complete = {name: signature.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(function, complete, constexprs, attrs or {})
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuses}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    with hopper.compiler_for(target_cc):
        return triton.compile(source, target=GPUTarget("cuda", target_cc, 32), options=options)


def disassemble(compiled: Any) -> str:
    """Disassemble a compiled kernel: SASS with source lines and control codes.

    Raises:
        subprocess.CalledProcessError: nvdisasm no longer reads this architecture.
    """
    text = _tool("nvdisasm", ["-c", "-g", "-hex"], compiled.asm["cubin"])
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
    bodies: list[list[int]] = []
    if elements_per_iteration:
        ptx = parse_ptx(compiled.asm["ptx"])
        expected_ex2 = max((_ptx_ex2(ptx[i] for i in body) for body in attention_loops(ptx)), default=0)
        found: list[tuple[LoopCost, list[int]]] = []
        for body in attention_loops(instructions):
            cost = _loop_cost([instructions[i] for i in body], threads, elements_per_iteration, expected_ex2)
            if cost.tensor_flops is None:
                cost = dataclasses.replace(cost, tensor_flops=tensor_flops_per_element)
            found.append((cost, body))
        found.sort(key=lambda each: -each[0].total)
        if len(found) <= rare_loops:
            note = f"{len(found)} loops with tensor or exp2 instructions, expected more than {rare_loops}"
            found = []
        elif rare_loops:
            totals = ", ".join(f"{cost.total:.2f}" for cost, _ in found[:rare_loops])
            note = f"in the loop that only unusual inputs take: {totals} instructions per element"
            found = found[rare_loops:] + found[:rare_loops]
        loops, bodies = [cost for cost, _ in found], [body for _, body in found]
        if loops and loops[0].per_element["ex2"] >= 1.5:
            exp2 = loops[0].per_element["ex2"]
            replicated = f"{exp2:.1f} exp2 per element: the tile is replicated across warps"
            note = f"{note}; {replicated}" if note else replicated
    elif elements_per_program:
        loops = [_loop_cost(instructions, threads, elements_per_program, expected_ex2=0)]
        note = "no loop over keys: the whole kernel, shared by the workload's elements; memory is not modelled"
    spilled = sum(_width(i.opcode) for i in instructions if i.opcode.split(".")[0] == "STL")
    return dataclasses.replace(
        measured, spill_bytes=spilled, instructions=len(instructions), loops=tuple(loops), note=note,
        code=tuple(instructions), bodies=tuple(tuple(body) for body in bodies),
    )  # fmt: skip


def _ptx_ex2(body: Iterable[Instruction]) -> int:
    """Count the EX2 operations that PTX asks for; packed pairs count two."""
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
    tensor = [tensor_flops(i.opcode) for i in body if i.kind == "tensor"]
    flops = None if None in tensor else sum(f for f in tensor if f is not None) / 32 * share
    packed = sum(i.opcode.split(".")[0] in ("FFMA2", "FMUL2", "FADD2") for i in body)
    mufu = sum(i.opcode.startswith("MUFU") for i in body)
    source = next((i.source for i in body if i.source), "")
    per_element = {name: count * share for name, count in counts.items()}
    return LoopCost(source, len(body), tiles, per_element, flops, (counts["fp32"] + packed) * share, mufu * share)


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


class MissingTool(RuntimeError):
    """A binary tool of Triton's can't be run, so that nothing is known of what it would have told."""


def _tool(name: str, options: Sequence[str], cubin: bytes) -> str:
    """Run one of the binary tools inside Triton on a cubin and return its output.

    Raises:
        MissingTool: naming it.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            command = [getattr(knobs.nvidia, name).path, *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (AttributeError, OSError, RuntimeError) as error:
            raise MissingTool(f"{name}, which comes with Triton, can't be run, nothing was counted: {error}") from None


def ptxas_warnings(ptx: str, arch: int) -> list[str]:
    """List what ptxas has to say of lost performance and other warnings: "C7515: Potential Performance Loss: …".

    The ptxas that Triton compiles with is run on the PTX once more; answers are kept in Triton's cache.

    Raises:
        MissingTool: it can't be run, or refuses what it compiled before.
    """
    from triton.runtime.cache import get_cache_manager

    ptxas = _ptxas(arch)
    digest = hashlib.sha256(f"{ptxas.version} {ptx}".encode()).hexdigest()
    cache = get_cache_manager(digest)
    if (known := cache.get_file("ptxas_warnings.json")) is not None:
        return json.loads(Path(known).read_text("utf-8"))
    target = re.search(r"^\s*\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [ptxas.path, "-v", f"--gpu-name={target[1] if target else f'sm_{arch}'}", source, "-o", f"{source}.o"]
        try:
            run = subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MissingTool(f"ptxas can't be run, its warnings were not read: {error}") from None
    found = [_warning(line) for line in run.stderr.splitlines() if "Performance Loss" in line or "warning" in line]
    cache.put(json.dumps(found), "ptxas_warnings.json", binary=False)
    return found


def _ptxas(arch: int) -> Any:
    """Find the ptxas that Triton compiles with for an architecture: an object with a path and a version."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    try:
        return compiler.get_ptxas(arch) if hasattr(compiler, "get_ptxas") else knobs.nvidia.ptxas
    except RuntimeError as error:
        raise MissingTool(f"ptxas can't be found, its warnings were not read: {error}") from None


def _warning(line: str) -> str:
    match = re.search(r"\((C\d+)\)\s*(.*)", line)
    return f"{match[1]}: {match[2].strip()}" if match else line.strip()


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    usage = _tool("cuobjdump", ["-res-usage"], cubin)
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return fields["REG"], fields["STACK"] + fields["LOCAL"]
