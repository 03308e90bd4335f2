"""Cycle model of a multiprocessor (SM): how long its resident warps take for a path through machine code.

    ops = decode(instructions, path, TIMINGS[90])
    run = simulate(ops, TIMINGS[90], blocks=4, warps=4, trips=12)

Four schedulers issue one warp instruction per cycle each, greedy then oldest. Modelled are the stall counts, dependence
counters and wait masks that ptxas encoded; pipes with issue intervals; one shared-memory pipe and one L2 port per SM;
barriers, cp.async groups, and wgmma groups, whose products take turns on the tensor cores. Not modelled: bank
conflicts, instruction-cache misses, DRAM, clocks under load, TMA, tcgen05. docs/cost.md says how well that fits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from smca_kernels.tools.cost.machine_code import Instruction

SCHEDULERS = 4
MAX_CYCLES = 5_000_000  # of a simulation; more is a deadlock
NEVER = 1 << 60
# The units that a simulation accounts for, besides the issue slots.
UNITS = ("fp32", "alu", "ex2", "tensor", "shared memory", "L2")
FP32, ALU, EX2, TENSOR, SHARED, L2 = range(len(UNITS))

# Cycles, from public microbenchmarks of A100 and H100.
BARRIER, FENCE, CONSTANT, TENSOR_DRAIN = 16, 20, 30, 18
OPERAND_READ, MEMORY_OPERAND_READ = 6, 14  # until the operands of an instruction may be overwritten
ADDRESS = 4  # from issue to the shared-memory pipe
MIN_TENSOR = 13  # of a wgmma, however narrow
SHARED_BYTES, L2_BYTES = 128, 64  # per cycle and SM
SHARED_QUEUE, L2_QUEUE = 64, 512  # cycles of work that the pipe and the port take on before they stop issue


@dataclass(frozen=True)
class Timing:
    """Cycles of one scheduler's pipes between two warp instructions, and latencies."""

    fp32: int
    alu: int
    ex2: int
    tensor: int  # m16n8k16 of 16-bit operands
    shared_latency: int
    matrix_latency: int  # LDSM
    shuffle_latency: int
    global_latency: int  # L2 hit


# sm_80 and sm_90 are those that the model was compared with measurements for; the others follow from their pipes.
TIMINGS = {
    75: Timing(2, 2, 8, 16, 22, 33, 22, 200),
    80: Timing(2, 2, 8, 8, 23, 33, 23, 280),
    86: Timing(1, 2, 8, 16, 23, 33, 23, 250),
    89: Timing(1, 2, 8, 16, 23, 33, 23, 280),
    90: Timing(1, 2, 8, 8, 29, 33, 24, 290),
}

_FP32_OPCODES = frozenset(("FFMA", "FMUL", "FADD", "IMAD", "FFMA2", "HFMA2", "HMUL2", "HADD2"))
_EX2_OPCODES = frozenset(("MUFU", "I2F", "F2I", "FRND", "F2F", "POPC", "FLO"))
_SHARED_OPCODES = frozenset(("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "LDL", "STL"))
_GLOBAL_OPCODES = frozenset(("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED"))
_CONSTANT_OPCODES = frozenset(("LDC", "ULDC", "LDCU", "S2R", "S2UR", "R2UR"))
_CONTROL_OPCODES = frozenset(("BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC", "CALL", "VOTE", "ELECT", "EXIT", "RET"))
# What an operation does besides occupying a pipe.
PLAIN, COPY, COMMIT, COPY_WAIT, WAIT_FOR_ALL, WGMMA, TENSOR_WAIT = range(7)


@dataclass(frozen=True)
class Op:
    """One instruction of a path, as the model sees it."""

    index: int  # of the instruction in its function
    action: int
    unit: int | None
    interval: int  # cycles that the scheduler's pipe is taken
    latency: int  # from issue, or, of a memory operation, from its turn in the shared-memory pipe
    wavefronts: int  # passes through shared memory, 128 bytes each
    kept: int  # groups that a wait leaves outstanding
    stall: int
    wait: tuple[int, ...]
    write: int | None
    read: int | None


def is_modelled(arch: int) -> bool:
    """Tell whether the model knows an architecture."""
    return arch in TIMINGS


def decode(instructions: Sequence[Instruction], path: Sequence[int], timing: Timing) -> list[Op]:
    """Translate the instructions of a path.

    Raises:
        ValueError: for instructions without control codes, those that `nvdisasm` printed without `-hex`.
    """
    known = {index: _decode(index, instructions[index], timing) for index in set(path)}
    return [known[index] for index in path]


def _decode(index: int, instruction: Instruction, timing: Timing) -> Op:
    if instruction.control is None:
        raise ValueError(f"no control code in {instruction.text!r}")
    opcode, operands = instruction.opcode, instruction.operands
    base = opcode.split(".")[0]
    action, unit, interval, latency, wavefronts, kept = PLAIN, None, 0, 12, 0, 0
    if base == "WARPGROUP":
        if "DEPBAR" in opcode:
            action, kept = TENSOR_WAIT, _last_number(operands)
    elif base in _FP32_OPCODES:
        unit, interval = FP32, timing.fp32
    elif base in _EX2_OPCODES:
        unit, interval, latency = EX2, timing.ex2, timing.ex2 + 18
    elif base == "HMMA":
        # m16n8k8 of 16-bit operands is half of m16n8k16; TF32 runs at half the rate.
        half = "1688" in opcode and "TF32" not in opcode
        unit, interval = TENSOR, timing.tensor // 2 if half else timing.tensor
    elif base == "HGMMA":
        match = re.search(r"(\d+)x(\d+)x(\d+)", opcode)
        width = int(match[2]) if match else 64
        # The right operand comes from shared memory, the left one where it is a descriptor too.
        rows = width + (0 if _left_in_registers(operands) else 64)
        action, unit, interval = WGMMA, TENSOR, max(width // 2, MIN_TENSOR)
        wavefronts, kept = rows * 32 // SHARED_BYTES, int("gsb0" in operands)
    elif base in _SHARED_OPCODES:
        by_base = {"SHFL": timing.shuffle_latency, "LDSM": timing.matrix_latency}
        unit, interval, wavefronts = SHARED, 2, _wavefronts(opcode)
        latency = by_base.get(base, timing.shared_latency)
    elif base in _GLOBAL_OPCODES or base == "LDGSTS":
        action = COPY if base == "LDGSTS" else PLAIN
        unit, interval, latency, wavefronts = L2, 2, timing.global_latency, _wavefronts(opcode)
    elif base == "LDGDEPBAR":
        action, latency = COMMIT, 0
    elif base == "DEPBAR":
        action, kept = COPY_WAIT, _last_number(operands)
    elif base == "BAR" and "ARV" not in opcode:
        action = WAIT_FOR_ALL
    elif base in ("MEMBAR", "FENCE", "ERRBAR"):
        latency = FENCE
    elif base in _CONSTANT_OPCODES:
        latency = CONSTANT
    elif not base.startswith("U") and base not in _CONTROL_OPCODES:
        unit, interval = ALU, timing.alu
    control = instruction.control
    return Op(
        index, action, unit, interval, latency, wavefronts, kept,
        max(1, control.stall), control.wait, control.write, control.read,
    )  # fmt: skip


def _left_in_registers(operands: str) -> bool:
    return not operands.split(",")[1].strip().startswith("gdesc")


def _last_number(operands: str) -> int:
    numbers = re.findall(r"0x([0-9a-f]+)", operands)
    return int(numbers[-1], 16) if numbers else 0


def _wavefronts(opcode: str) -> int:
    """Passes of a warp's access through shared memory, 128 bytes each."""
    base = opcode.split(".")[0]
    if base in ("LDSM", "STSM"):
        return int(opcode.rsplit(".", 1)[1]) if opcode[-1].isdigit() and not opcode.endswith("88") else 1
    if base == "SHFL":
        return 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


@dataclass
class Wait:
    """Cycles that warps could not issue an instruction, per trip of a warp, and what they mostly waited for."""

    index: int  # of the instruction in its function
    cycles: float
    reason: str
    producer: int | None = None  # of the result that is waited for


@dataclass(frozen=True)
class Run:
    """Outcome of a simulation, over the cycles in which all warps ran."""

    cycles: int
    trips: float  # of single warps, in these cycles
    issued: int
    busy: dict[str, float]  # share of the cycles, by unit; "issue" of all slots
    waits: list[Wait]  # the longest first

    def cycles_per_trip(self, warps: int) -> float:
        """Cycles in which that many resident warps make one trip each."""
        return self.cycles * warps / self.trips


@dataclass
class _Warp:
    number: int
    block: int
    group: int  # of four warps that issue a wgmma together
    scheduler: int
    ready: int
    until: int = 0  # earliest issue as far as the warp itself is concerned
    at: int = 0
    trip: int = 0
    counters: list[int] = field(default_factory=lambda: [0] * 6)
    producers: list[int] = field(default_factory=lambda: [0] * 6)
    copied: int = 0  # when the copies since the last commit have arrived
    groups: list[int] = field(default_factory=list)
    products: list[int] = field(default_factory=list)  # ends of wgmma groups; NEVER: not all warps have issued it
    issued_products: int = 0
    at_barrier: bool = False


class _Multiprocessor:
    """State of one SM."""

    def __init__(self, ops: Sequence[Op], timing: Timing, blocks: int, warps: int, trips: int) -> None:
        self.ops, self.timing, self.warps_per_block, self.trips = ops, timing, warps, trips
        groups = -(-warps // 4)
        self.warps = [
            _Warp(b * warps + w, b, b * groups + w // 4, (b * warps + w) % SCHEDULERS, b * 37 + w)
            for b in range(blocks)
            for w in range(warps)
        ]
        self.of_block = [[w for w in self.warps if w.block == b] for b in range(blocks)]
        self.of_group = [[w for w in self.warps if w.group == g] for g in range(blocks * groups)]
        self.of_scheduler = [[w for w in self.warps if w.scheduler == s] for s in range(SCHEDULERS)]
        self.pipes = [[0] * len(UNITS) for _ in range(SCHEDULERS)]
        self.wake = [0] * SCHEDULERS
        self.arrived = [0] * blocks
        self.products: dict[tuple[int, int], int] = {}  # (group, how many before) → warps that have issued it
        self.shared_free, self.l2_free = 0, 0.0
        self.warm = 0  # warps past their first trips
        self.start = 0
        self.clear(0)
        for warp in self.warps:
            self.refresh(warp, 0)

    def clear(self, now: int) -> None:
        """Begin the account: of cycles, instructions, units and waits."""
        self.start, self.issued = now, 0
        self.busy = [0.0] * len(UNITS)
        self.waits: dict[tuple[int, str, int], int] = {}

    def refresh(self, warp: _Warp, now: int) -> None:
        """Recompute when a warp's next instruction may issue."""
        op = self.ops[warp.at]
        until = warp.ready
        for counter in op.wait:
            until = max(until, warp.counters[counter])
        if op.action == COPY_WAIT:
            pending = [group for group in warp.groups if group > until]
            if len(pending) > op.kept:
                until = pending[len(pending) - op.kept - 1]
        elif op.action == TENSOR_WAIT:
            warp.products = [end for end in warp.products if end > now]
            if len(warp.products) > op.kept:
                until = max(until, warp.products[len(warp.products) - op.kept - 1])
        warp.until = until
        self.wake[warp.scheduler] = min(self.wake[warp.scheduler], max(until, now))

    def run(self, warmup: int) -> Run:
        """Run until the first warp has made all trips, or, without warm-up, until all have."""
        now, latest, last = 0, 0, [-1] * SCHEDULERS
        remaining = len(self.warps)
        while remaining and not (warmup and any(w.trip >= self.trips for w in self.warps)):
            finished = False
            for s in range(SCHEDULERS):
                if self.wake[s] > now:
                    continue
                chosen, soonest = None, NEVER
                for warp in self.of_scheduler[s]:
                    if warp.at_barrier or warp.trip >= self.trips:
                        continue
                    until, op = warp.until, self.ops[warp.at]
                    if op.unit is not None and op.action != WGMMA:
                        until = max(until, self.free(s, op.unit))
                    if until > now:
                        soonest = min(soonest, until)
                    elif chosen is None or warp.number == last[s]:
                        chosen = warp
                        if warp.number == last[s]:
                            break
                if chosen is None:
                    self.wake[s] = soonest
                    continue
                last[s], latest = chosen.number, now
                self.wake[s] = now + 1
                trip = chosen.trip
                self.issue(chosen, now)
                if chosen.trip > trip:
                    finished = True
                    remaining -= chosen.trip == self.trips
                    self.warm += chosen.trip == warmup
            if finished and warmup and self.warm == len(self.warps):
                self.warm = 0
                self.clear(now)
                if any(w.trip >= self.trips - 1 for w in self.warps):
                    raise RuntimeError("warps of one SM drift apart: a block makes no progress beside the others")
            now = max(now + 1, min(self.wake)) if min(self.wake) < NEVER else NEVER
            if now > MAX_CYCLES and remaining:
                raise RuntimeError("the simulated warps wait for each other")
        return self.account(latest if warmup else latest + 1)

    def free(self, scheduler: int, unit: int) -> int:
        """When a unit takes the next instruction of a scheduler."""
        if unit == L2:
            behind = max(self.shared_free - SHARED_QUEUE, int(self.l2_free) - L2_QUEUE)
            return max(self.pipes[scheduler][SHARED], behind)
        if unit == SHARED:
            return max(self.pipes[scheduler][SHARED], self.shared_free - SHARED_QUEUE)
        return self.pipes[scheduler][unit]

    def issue(self, warp: _Warp, now: int) -> None:
        op, s = self.ops[warp.at], warp.scheduler
        self.issued += 1
        if now > warp.ready:
            self.note_wait(warp, op, now)
        latency = op.latency
        memory = op.unit in (SHARED, L2)
        if memory:
            self.pipes[s][SHARED] = now + op.interval
            begins = max(now + ADDRESS, self.shared_free)
            self.shared_free = begins + op.wavefronts
            self.busy[SHARED] += op.wavefronts
            if op.unit == SHARED:
                latency += begins - now + op.wavefronts - 1
            else:
                taken = op.wavefronts * SHARED_BYTES / L2_BYTES
                self.l2_free = max(self.l2_free, begins) + taken
                self.busy[L2] += taken
                latency = int(self.l2_free - now) + op.latency
                if op.action == COPY:
                    warp.copied = max(warp.copied, now + latency)
        elif op.action == WGMMA:
            self.issue_wgmma(warp, op, now)
        elif op.unit is not None:
            self.pipes[s][op.unit] = now + op.interval
            self.busy[op.unit] += op.interval / SCHEDULERS
        elif op.action == COMMIT:
            warp.groups = [group for group in warp.groups if group > now]
            warp.groups.append(max([warp.copied, now, *warp.groups]))
        if op.write is not None:
            warp.counters[op.write] = max(warp.counters[op.write], now + latency)
            warp.producers[op.write] = op.index
        if op.read is not None:
            after = MEMORY_OPERAND_READ if memory else OPERAND_READ
            warp.counters[op.read] = max(warp.counters[op.read], now + after)
            warp.producers[op.read] = op.index
        warp.ready = now + op.stall
        warp.at += 1
        if warp.at == len(self.ops):
            warp.at, warp.trip = 0, warp.trip + 1
        if op.action == WAIT_FOR_ALL:
            self.wait_for_all(warp, op, now)
        elif warp.trip < self.trips:
            self.refresh(warp, now + 1)

    def wait_for_all(self, warp: _Warp, op: Op, now: int) -> None:
        warp.at_barrier = True
        self.arrived[warp.block] += 1
        if self.arrived[warp.block] < self.warps_per_block:
            return
        self.arrived[warp.block] = 0
        for peer in self.of_block[warp.block]:
            key = (op.index, "barrier", -1)
            self.waits[key] = self.waits.get(key, 0) + max(0, now + BARRIER - peer.ready)
            peer.at_barrier, peer.ready = False, max(peer.ready, now + BARRIER)
            self.refresh(peer, now + 1)

    def issue_wgmma(self, warp: _Warp, op: Op, now: int) -> None:
        """Start a product once all warps of the group have issued it; it takes its turn on their tensor cores."""
        if op.kept:
            warp.products.append(NEVER)
        key = (warp.group, warp.issued_products)
        warp.issued_products += 1
        peers = self.of_group[warp.group]
        self.products[key] = self.products.get(key, 0) + 1
        if self.products[key] < len(peers):
            return
        del self.products[key]
        # The operands are read while the product runs: it takes as long as the slower of the two.
        self.shared_free = max(self.shared_free, now) + op.wavefronts
        self.busy[SHARED] += op.wavefronts
        end = self.shared_free
        for peer in peers:
            end = max(end, max(now, self.pipes[peer.scheduler][TENSOR]) + op.interval)
        for peer in peers:
            self.pipes[peer.scheduler][TENSOR] = end
            self.busy[TENSOR] += op.interval / SCHEDULERS
        if op.kept:
            for peer in peers:
                peer.products[peer.products.index(NEVER)] = end + TENSOR_DRAIN
                if peer is not warp:
                    self.refresh(peer, now + 1)

    def note_wait(self, warp: _Warp, op: Op, now: int) -> None:
        """Attribute the cycles that an instruction waited beyond its predecessor's stall count."""
        own = warp.until - warp.ready  # the rest of the wait is for a pipe or an issue slot
        reason, producer = "issue slots", -1
        if own > 0 and 2 * own >= now - warp.ready:
            reason = {COPY_WAIT: "copies", TENSOR_WAIT: "tensor products"}.get(op.action, "result")
            for counter in op.wait:
                if warp.counters[counter] == warp.until:
                    reason, producer = "result", warp.producers[counter]
        elif op.unit is not None and self.free(warp.scheduler, op.unit) >= now:
            reason = UNITS[op.unit]
        key = (op.index, reason, producer)
        self.waits[key] = self.waits.get(key, 0) + now - warp.ready

    def account(self, now: int) -> Run:
        cycles, trips = now - self.start, self.issued / len(self.ops)
        busy = {unit: taken / max(1, cycles) for unit, taken in zip(UNITS, self.busy, strict=True)}
        busy["issue"] = self.issued / SCHEDULERS / max(1, cycles)
        waits: dict[int, Wait] = {}
        for (index, reason, producer), total in sorted(self.waits.items(), key=lambda item: -item[1]):
            cause = None if producer < 0 else producer
            waits.setdefault(index, Wait(index, 0.0, reason, cause)).cycles += total / trips
        return Run(cycles, trips, self.issued, busy, sorted(waits.values(), key=lambda wait: -wait.cycles))


def simulate(ops: Sequence[Op], timing: Timing, blocks: int, warps: int, trips: int = 12, warmup: int = 2) -> Run:
    """Run the warps of all resident blocks over a path of instructions, again and again.

    Args:
        ops: the path, from `decode`.
        timing: of the architecture.
        blocks: resident on the SM.
        warps: of a block.
        trips: how often each warp runs the path, at most: the simulation ends with the first that has.
        warmup: trips that every warp makes before the account begins; 0 counts from the start until all warps
            have made all trips, as for a whole program.
    """
    return _Multiprocessor(ops, timing, blocks, warps, trips).run(warmup)
