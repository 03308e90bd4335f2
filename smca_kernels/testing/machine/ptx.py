"""Parser of the PTX that Triton writes: text → blocks of instructions with their source lines.

Unknown syntax raises `PtxError`: nothing is passed over but debug information.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import TypeAlias


class PtxError(Exception):
    """Text, or an instruction, that the machine does not know."""


@dataclass(frozen=True)
class Register:
    name: str  # unique in the kernel
    cls: str  # "p", "h", "r", "d": predicate, 16, 32, 64 bits


@dataclass(frozen=True)
class Immediate:
    bits: int  # as written; negative integers stay negative
    is_float: str = ""  # "f" or "d" for 0f… and 0d… bit patterns


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Not:
    register: Register


@dataclass(frozen=True)
class Blank:
    """The operand `_`, a result that nobody wants."""


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """The destination d|p of shfl."""

    first: Operand
    second: Operand


Operand: TypeAlias = "Register | Immediate | Special | Symbol | Not | Blank | Address | Vector | Pair"
BLANK = Blank()


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    guard: Register | Not | None
    text: str
    source: str  # file:line, with the place it was inlined at
    index: int = -1

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def ends_block(self) -> bool:
        return self.parts[0] in ("bra", "ret", "exit", "bar", "barrier", "trap") and self.opcode != "bar.warp.sync"


@dataclass
class Block:
    label: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, str]]  # name, type
    registers: dict[str, Register]
    blocks: list[Block]
    target: str  # sm_90a
    threads: int

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block.instructions]


REGISTER_CLASSES = {
    "pred": "p", "b8": "h", "b16": "h", "u16": "h", "s16": "h", "f16": "h", "b32": "r", "u32": "r", "s32": "r",
    "f32": "r", "b64": "d", "u64": "d", "s64": "d", "f64": "d",
}  # fmt: skip


def parse(text: str) -> Kernel:
    """Parse a PTX module of one kernel.

    Raises:
        PtxError: naming what the machine doesn't know.
    """
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
    target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", text, re.DOTALL)
    if target is None or entry is None:
        raise PtxError("no .target or no .entry")
    if re.search(r"^\s*(\.visible\s+)?\.func\b", text, re.MULTILINE):
        raise PtxError("device functions are not supported")
    params = []
    for line in entry[2].split(","):
        if stripped := _without_comment(line).strip():
            m = re.fullmatch(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)", stripped)
            if m is None:
                raise PtxError(f"parameter {stripped!r}")
            params.append((m[2], m[1]))
    threads = re.search(r"\.reqntid\s+(\d+)|\.maxntid\s+(\d+)", entry[3])
    parser = _Parser(files)
    parser.run(_body(text[entry.end() :]))
    count = int(threads[1] or threads[2]) if threads else 0
    kernel = Kernel(entry[1], params, parser.registers, parser.blocks, target[1], count)
    for index, instruction in enumerate(kernel.instructions):
        instruction.index = index
    return kernel


def _without_comment(line: str) -> str:
    return line.partition("//")[0]


def _body(text: str) -> str:
    """The text up to the brace that closes the function; comments removed, .loc lines made statements."""
    lines, depth = [], 1
    for each in text.splitlines():
        line = _without_comment(each)
        stripped = line.strip()
        if not stripped or stripped.startswith(".pragma"):
            continue
        if stripped.startswith(".loc"):
            m = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:,.*inlined_at\s+(\d+)\s+(\d+))?", stripped)
            if m is None:
                raise PtxError(f"directive {stripped!r}")
            lines.append(f".loc {m[1]} {m[2]} {m[3] or 0} {m[4] or 0};")
            continue
        for at, character in enumerate(line):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                lines.append(line[:at])
                return "\n".join(lines)
        lines.append(line)
    raise PtxError("unbalanced braces")


class _Parser:
    def __init__(self, files: dict[str, str]):
        self.files = files
        self.registers: dict[str, Register] = {}
        self.scopes: list[dict[str, Register]] = []  # registers of the braces that are open
        self.blocks = [Block("entry")]
        self.source = ""
        self.scope_count = 0

    def run(self, body: str) -> None:
        label = re.compile(r"([\w$]+)\s*:")
        at, end = 0, len(body)
        while True:
            while at < end and body[at].isspace():
                at += 1
            if at >= end:
                return
            if body[at] == "{":
                self.scopes.append({})
                self.scope_count += 1
                at += 1
            elif body[at] == "}":
                self.scopes.pop()
                at += 1
            elif m := label.match(body, at):
                if not m[1].startswith(("$L__tmp", "$L__func")):  # of debug information
                    self.blocks.append(Block(m[1]))
                at = m.end()
            else:
                semicolon = body.index(";", at)
                self.statement(" ".join(body[at:semicolon].split()))
                at = semicolon + 1

    def statement(self, text: str) -> None:
        if text.startswith(".loc"):
            _, file, line, outer_file, outer_line = text.split()
            self.source = f"{self.files.get(file, file)}:{line}"
            if outer_file != "0":
                self.source += f" in {self.files.get(outer_file, outer_file)}:{outer_line}"
            return
        if text.startswith("."):
            m = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
            if m is None or m[1] not in REGISTER_CLASSES:
                raise PtxError(f"directive {text!r}")
            for name in m[2].split(","):
                self.declare(name.strip(), REGISTER_CLASSES[m[1]])
            return
        m = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if m is None:
            raise PtxError(f"statement {text!r}")
        guard: Register | Not | None = self.register(m[2]) if m[2] else None
        if m[1] and isinstance(guard, Register):
            guard = Not(guard)
        operands = [self.operand(operand) for operand in _split(m[4])]
        instruction = Instruction(m[3], operands, guard, text, self.source)
        self.blocks[-1].instructions.append(instruction)
        if instruction.ends_block:
            self.blocks.append(Block(f"after {len(self.blocks)}"))

    def declare(self, name: str, cls: str) -> None:
        m = re.fullmatch(r"(%\w+?)<(\d+)>", name)
        if m:
            for i in range(int(m[2])):
                self.registers[f"{m[1]}{i}"] = Register(f"{m[1][1:]}_{i}", cls)
        elif self.scopes:
            register = Register(f"scope{self.scope_count}_{name.strip('%')}", cls)
            self.scopes[-1][name] = register
            self.registers[register.name] = register
        else:
            self.registers[name] = Register(name.strip("%"), cls)

    def find(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return self.registers.get(name)

    def register(self, name: str) -> Register:
        register = self.find(name)
        if register is None:
            raise PtxError(f"register {name!r}")
        return register

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self.operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            m = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?", text[1:-1].strip())
            if m is None:
                raise PtxError(f"address {text!r}")
            return Address(self.operand(m[1]), int(m[2], 0) if m[2] else 0)
        if text == "_":
            return BLANK
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        if text.startswith("!"):
            return Not(self.register(text[1:]))
        if m := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
            return Immediate(int(m[2], 16), m[1])
        if m := re.fullmatch(r"(-?(?:0[xX][0-9A-Fa-f]+|\d+))U?", text):
            return Immediate(int(m[1], 0) if "x" in m[1].lower() else int(m[1]))
        if re.fullmatch(r"-?\d+\.\d+(?:[eE][-+]?\d+)?", text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "d")
        if register := self.find(text):
            return register
        if text.startswith("%"):
            return Special(text)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise PtxError(f"operand {text!r}")


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
