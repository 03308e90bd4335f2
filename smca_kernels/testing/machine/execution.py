"""Execution of a launch: threads, their scheduling, barriers, and the state that instructions share.

A lane is a thread of one of the CTAs that run at once; a row holds one register of all lanes. Lanes that are at the
same block of instructions run it together, the first in `codegen.schedule`'s order first: so they meet where their
paths join. While all lanes agree, blocks run unmasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from smca_kernels.testing.machine import tensor_cores
from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.codegen import PARAMETERS, Program
from smca_kernels.testing.machine.memory import Fault, Faults, GlobalMemory, Region
from smca_kernels.testing.machine.shared_memory import SEVERAL_WARPS, SharedMemory
from smca_kernels.testing.machine.tensor_cores import Pending

EXITED = 1 << 30
MAX_STEPS = 5_000_000
UNWRITTEN_ACCUMULATOR = 0x7FBADBAD  # a NaN: nobody may read one before the wait


def run_launch(
    program: Program, regions: Sequence[Region], parameters: dict[str, int], grid: tuple[int, int, int], threads: int,
    shared_bytes: int, faults: Faults, order: Array, at_once: int = 4,
) -> None:  # fmt: skip
    """Run all CTAs of a launch in an order of their numbers, `at_once` together, and write the regions back."""
    for instruction in program.contracted:
        where = program.kernel.name, instruction.text, instruction.source
        faults.add(Fault("lanes disagree", *where, 0, 0, "in all of its sums over lanes"))
    memory = GlobalMemory(regions)
    machine: Machine | None = None
    with np.errstate(all="ignore"):
        for start in range(0, order.size, at_once):
            ctas = order[start : start + at_once]
            if machine is None or machine.ctas != ctas.size:
                machine = Machine(program, memory, parameters, grid, threads, shared_bytes, ctas.size, faults)
            machine.run(ctas)
    for region in regions:
        region.write_back()


class Machine:
    """Some CTAs of a launch that run at once."""

    def __init__(
        self, program: Program, memory: GlobalMemory, parameters: dict[str, int], grid: tuple[int, int, int],
        threads: int, shared_bytes: int, ctas: int, faults: Faults,
    ):  # fmt: skip
        self.program, self.kernel = program, program.kernel
        self.parameters, self.grid, self.threads, self.ctas, self.faults = parameters, grid, threads, ctas, faults
        self.grid_size = grid[0] * grid[1] * grid[2]
        self.arch = int("".join(c for c in self.kernel.target if c.isdigit()))
        self.lanes = ctas * threads
        self.warps = self.lanes // 32
        self.all_lanes = np.arange(self.lanes)
        self.cta_of_lane = self.all_lanes // threads
        self.thread_of_lane = self.all_lanes % threads
        self.warp_of_lane = self.thread_of_lane // 32
        self.global_cta = np.zeros(self.lanes, np.int64)
        self.epoch_of_lane = np.zeros(self.lanes, np.int64)
        self.warp_syncs = np.zeros(self.lanes, np.int64)
        # Stamps of shared memory: of a lane now, and the least of its epoch.
        self.own, self.base = np.zeros(self.lanes, np.int64), np.zeros(self.lanes, np.int64)
        self.memory = memory
        self.shared = SharedMemory(self, shared_bytes, program.granule)
        self.time = 0
        self.code = program.code_for(self.lanes)

    def run(self, ctas: Array) -> None:
        """Run CTAs of these numbers, as many as this machine holds."""
        self.memory.machine = self
        self.global_cta[:] = np.repeat(ctas, self.threads)
        self.epoch_of_lane[:] = 0
        self.warp_syncs[:] = 0
        # By CTA: copies and wgmmas that are under way, those not committed apart.
        self.copies: list[list[Any]] = [[] for _ in range(self.ctas)]
        self.copy_groups: list[list[list[Any]]] = [[] for _ in range(self.ctas)]
        self.wgmmas: list[list[Pending]] = [[] for _ in range(self.ctas)]
        self.wgmma_groups: list[list[list[Pending]]] = [[] for _ in range(self.ctas)]
        self.fence_time = np.full((self.ctas, self.threads // 32), -1, np.int64)
        self.fence_epoch = np.full((self.ctas, self.threads // 32), -1, np.int64)
        self._stamp()
        self.shared.reset()
        self.code.reset(self)
        self._schedule()
        under_way = (("cp.async", self.copies, self.copy_groups), ("wgmma", self.wgmmas, self.wgmma_groups))
        for what, uncommitted, groups in under_way:
            left = [cta for cta in range(self.ctas) if any(uncommitted[cta]) or any(map(any, groups[cta]))]
            if left:
                first = left[0] * self.threads
                self.fault(f"{what} not waited for", -1, first, "under way at the end of the kernel", len(left))

    def _schedule(self) -> None:
        blocks, rank = self.code.blocks, self.code.rank
        pc: int | None = 0  # of all lanes, while they agree
        pcs = np.zeros(self.lanes, np.int64)
        waiting = np.zeros(self.lanes, bool)  # at a barrier
        for _ in range(MAX_STEPS):
            if pc is not None:
                block = blocks[pc]
                block.full()
                if block.kind == "exit":
                    return
                if block.kind == "barrier":
                    self._barrier(None)
                if block.kind == "branch":
                    taken = block.condition()
                    pcs = np.where(taken, block.target, pc + 1)
                    pc = int(pcs[0]) if (pcs == pcs[0]).all() else None
                else:
                    pc = block.target if block.kind == "jump" else pc + 1
                continue
            ready = np.where(waiting | (pcs == EXITED), EXITED, rank[np.minimum(pcs, rank.size - 1)])
            first_lane = int(ready.argmin())
            if ready[first_lane] == EXITED:
                if not waiting.any():
                    return
                stuck = np.flatnonzero(waiting)
                barrier = blocks[int(pcs[stuck[0]]) - 1].last
                self.fault("synccheck", barrier, stuck[0], "barrier that not all threads reach", stuck.size)
                waiting[:] = False
                continue
            at = int(pcs[first_lane])
            mask = ready == ready[first_lane]
            block = blocks[at]
            block.masked(mask)
            if block.kind == "branch":
                pcs = np.where(mask, np.where(block.condition(), block.target, at + 1), pcs)
            else:
                pcs[mask] = {"exit": EXITED, "jump": block.target}.get(block.kind, at + 1)
            if block.kind == "barrier":
                self.need_whole_warps(block.last, mask)
                waiting |= mask
                done: Any = waiting.reshape(self.ctas, -1).all(1)
                if done.any():
                    self._barrier(done)
                    waiting[np.repeat(done, self.threads)] = False
            if not waiting.any() and pcs[0] != EXITED and (pcs == pcs[0]).all():
                pc = int(pcs[0])
        raise RuntimeError(f"{self.kernel.name}: more than {MAX_STEPS} blocks: an endless loop?")

    # --- what instructions ask for ---

    def lanes_of(self, mask: Array | None) -> Array:
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    def whole_ctas(self, i: int, mask: Array | None) -> Iterable[int]:
        """CTAs that take part, with all of their threads."""
        if mask is None:
            return range(self.ctas)
        by_cta = mask.reshape(self.ctas, -1)
        if (by_cta.any(1) & ~by_cta.all(1)).any():
            raise NotImplementedError(f"a part of a CTA at {self.program.instructions[i].text[:80]}")
        return np.flatnonzero(by_cta.any(1)).tolist()

    def need_whole_warps(self, i: int, mask: Array | None) -> None:
        if mask is None:
            return
        per_warp = mask.reshape(-1, 32)
        torn = np.flatnonzero(per_warp.any(1) & ~per_warp.all(1))
        if torn.size:
            self.fault("synccheck", i, torn[0] * 32, "reached by a part of a warp", torn.size)

    def fault(self, kind: str, i: int, lane: Any, detail: str, number: Any = 1) -> None:
        """Report a fault of a lane at instruction i (-1: at the end)."""
        text, source = "", ""
        if i >= 0:
            text, source = self.program.instructions[i].text[:160], self.program.instructions[i].source
        where = int(self.global_cta[lane]), int(self.thread_of_lane[lane])
        self.faults.add(Fault(kind, self.kernel.name, text, source, *where, detail), int(number))

    def report(self, kind: str, i: int, lanes: Array, bad: Any, describe: Callable[..., str]) -> None:
        """Report the first of the accesses that are bad, if any: `bad` [accesses] or [accesses, granules].

        Args:
            lanes: the lane of each access.
            describe: position in `bad` → the fault's text.
        """
        if bad.any():
            first = np.argwhere(bad)[0].tolist()
            self.fault(kind, i, lanes[first[0]], describe(*first), bad.sum())

    def parameter_at(self, i: int, address: Array, mask: Array | None) -> Array:
        """64-bit parameters at addresses that a kernel has chosen."""
        table = np.array([self.parameters[name] for name, _ in self.kernel.params], np.uint64)
        at = address.astype(np.int64) - PARAMETERS
        bad = (at < 0) | (at >= 8 * table.size) | (at % 8 != 0)
        if mask is not None:
            bad &= mask
        self.report("memcheck", i, self.all_lanes, bad, lambda _: "ld.param outside of the parameters")
        return table[np.clip(at // 8, 0, table.size - 1)]

    # --- barriers ---

    def _stamp(self) -> None:
        self.base[:] = self.epoch_of_lane << 32
        self.own[:] = self.base | self.warp_syncs << 12 | self.warp_of_lane << 6 | self.all_lanes & 31

    def _barrier(self, done: Array | None) -> None:
        """All threads of some CTAs (None: of all) have arrived."""
        self.time += 1
        chosen = slice(None) if done is None else np.repeat(done, self.threads)
        self.epoch_of_lane[chosen] += 1
        self.warp_syncs[chosen] = 0
        self._stamp()
        if self.memory.pending:
            for cta in range(self.ctas) if done is None else np.flatnonzero(done):
                self.memory.barrier(int(self.global_cta[cta * self.threads]))

    def warp_sync(self, i: int, mask: Array | None) -> None:
        self.need_whole_warps(i, mask)
        self.time += 1
        self.warp_syncs[self.lanes_of(mask)] += 1
        self._stamp()

    # --- cp.async ---

    def cp_async(
        self, i: int, to: Array, to_offset: int, source: Array, source_offset: int, size: int,
        source_size: Array | None, mask: Array | None,
    ) -> None:  # fmt: skip
        lanes = self.lanes_of(mask)
        if not lanes.size:
            return
        self.time += 1
        position, good = self.shared.locate(i, to, to_offset, lanes, size, "cp.async")
        values = np.zeros((good.size, size), np.uint8)
        count = np.full(good.size, size) if source_size is None else source_size[good].astype(np.int64)
        if ((count != 0) & (count != size)).any():
            raise NotImplementedError("cp.async of a part of its bytes")
        reading = count == size
        if reading.any():
            addresses = source[good[reading]].astype(np.int64) + source_offset
            values[reading] = self.memory.read_bytes(i, addresses, good[reading], size)
        index = position // size
        self.shared.check_write(i, index, good, size, np.ones((good.size, 1), bool))
        self.shared.rows(self.shared.in_flight, size)[index] = True
        self.shared.any_in_flight = True
        for cta in np.unique(self.cta_of_lane[good]):
            chosen = self.cta_of_lane[good] == cta
            self.copies[cta].append((i, index[chosen], good[chosen], size, values[chosen]))

    def cp_commit(self, i: int, mask: Array | None) -> None:
        for cta in self.whole_ctas(i, mask):
            self.copy_groups[cta].append(self.copies[cta])
            self.copies[cta] = []

    def cp_wait(self, i: int, left: int, mask: Array | None) -> None:
        self.time += 1
        for cta in self.whole_ctas(i, mask):
            while len(self.copy_groups[cta]) > left:
                for issued, index, lanes, size, values in self.copy_groups[cta].pop(0):
                    self.shared.rows(self.shared.in_flight, size)[index] = False
                    self.shared.write(issued, index, lanes, size, values)
        self.shared.any_in_flight = any(self.copy_groups) or any(self.copies)

    # --- wgmma ---

    def proxy_fence(self, i: int, mask: Array | None) -> None:
        self.time += 1
        lanes = self.lanes_of(mask)
        self.fence_time[self.cta_of_lane[lanes], self.warp_of_lane[lanes]] = self.time
        self.fence_epoch[self.cta_of_lane[lanes], self.warp_of_lane[lanes]] = self.epoch_of_lane[lanes]

    def check_async_read(self, i: int, cta: int, granules: Array) -> None:
        """Check what a wgmma reads of shared memory: written, waited for, ordered by a barrier, and fenced."""
        shared, lane = self.shared, cta * self.threads
        last = shared.last_write[granules]
        written = last >= 0

        def check(kind: str, bad: Array, problem: str) -> None:
            lanes = np.full(bad.shape, lane)
            place = lambda at: shared.place(int(granules[at]) * shared.granule, lane)  # noqa: E731
            self.report(kind, i, lanes, bad, lambda at: f"wgmma reads byte {place(at)}, {problem}")

        check("initcheck shared", ~shared.valid[granules], "never written")
        check("cp.async not waited for", shared.in_flight[granules], "which a copy is about to write")
        same_epoch = (last >> 32) >= int(self.epoch_of_lane[lane])
        check("racecheck shared", written & same_epoch, "written in the same epoch")
        writer = np.where(written, last >> 6 & 63, 0)
        by_writer = self.fence_time[cta][writer] > shared.write_time[granules]
        by_reader = self.fence_epoch[cta].min() > (last >> 32)
        unfenced = written & ~(by_writer | by_reader)
        check("proxy fence", unfenced, "written through the generic proxy with no fence.proxy.async since")
        shared.last_read[granules] = self.base[lane] | SEVERAL_WARPS

    def accumulators(self, cta: int, d: Sequence[Array], threads: slice) -> Array:
        """What a following wgmma adds to: results under way, or registers."""
        for group in (self.wgmmas[cta], *reversed(self.wgmma_groups[cta])):
            for pending in reversed(group):
                if pending.destinations[0] is d[0]:
                    if len(pending.destinations) != len(d):
                        raise NotImplementedError("accumulators shared by wgmma of different shapes")
                    return pending.values
        return np.stack([row[threads] for row in d])

    def issue_wgmma(self, cta: int, pending: Pending, threads: slice) -> None:
        self.time += 1
        self.wgmmas[cta].append(pending)
        for row in pending.destinations:
            row.view(np.uint32)[threads] = UNWRITTEN_ACCUMULATOR
        self.shared.async_reads[pending.granules] += 1
        self.shared.any_async_read = True

    def wgmma_commit(self, i: int, mask: Array | None) -> None:
        for cta in self.whole_ctas(i, mask):
            self.wgmma_groups[cta].append(self.wgmmas[cta])
            self.wgmmas[cta] = []

    def wgmma_wait(self, i: int, left: int, mask: Array | None) -> None:
        self.time += 1
        for cta in self.whole_ctas(i, mask):
            groups, threads = self.wgmma_groups[cta], slice(cta * self.threads, (cta + 1) * self.threads)
            while len(groups) > left:
                waited = groups.pop(0)
                for n, pending in enumerate(waited):
                    self.shared.async_reads[pending.granules] -= 1
                    self.shared.last_read[pending.granules] = self.base[threads.start] | SEVERAL_WARPS
                    # Accumulators of a chain belong to its last wgmma.
                    later = [*waited[n + 1 :], *(p for group in (*groups, self.wgmmas[cta]) for p in group)]
                    if not any(p.destinations[0] is pending.destinations[0] for p in later):
                        for row, value in zip(pending.destinations, pending.values, strict=True):
                            row[threads] = value
        self.shared.any_async_read = any(self.wgmma_groups) or any(self.wgmmas)

    def check_registers(self, i: int, touched: Sequence[tuple[str, bool]], mask: Array | None) -> None:
        """Report registers (name, written) of a wgmma under way that another instruction uses."""
        for cta in range(self.ctas) if mask is None else np.flatnonzero(mask.reshape(self.ctas, -1).any(1)):
            for pending in (p for group in (self.wgmmas[cta], *self.wgmma_groups[cta]) for p in group):
                for name, written in touched:
                    if name in pending.accumulators or (written and name in pending.operands):
                        role = "an accumulator" if name in pending.accumulators else "an operand"
                        detail = f"{name} is {role} of a wgmma not waited for"
                        self.fault("wgmma register", i, cta * self.threads, detail)

    # --- collectives of a warp ---

    def _check_members(self, i: int, member: Array, mask: Array | None) -> None:
        self.need_whole_warps(i, mask)
        if ((member if mask is None else member[mask]) != np.uint32(0xFFFFFFFF)).any():
            raise NotImplementedError(f"members that are a part of a warp: {self.program.instructions[i].text}")

    def shuffle(
        self, i: int, mode: str, source: Array, b: Array, c: Array, member: Array, destination: Array,
        valid: Array | None, mask: Array | None,
    ) -> None:  # fmt: skip
        self._check_members(i, member, mask)
        lane = self.all_lanes & 31
        step, clamp, segment = ((word & np.uint32(31)).astype(np.int64) for word in (b, c, c >> np.uint32(8)))
        top = (lane & segment) | (clamp & ~segment)
        other: Array = {
            "up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": (lane & segment) | (step & ~segment),
        }[mode]  # fmt: skip
        inside = other >= top if mode == "up" else other <= top
        value = source[(self.all_lanes & ~31) + np.where(inside, other, lane)]
        where = True if mask is None else mask
        np.copyto(destination, value, where=where)
        if valid is not None:
            np.copyto(valid, inside, where=where)

    def vote(self, i: int, mode: str, p: Array, destination: Array, mask: Array | None) -> None:
        self.need_whole_warps(i, mask)
        per_warp = p.reshape(-1, 32)
        if mode == "ballot":
            value = (per_warp.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            value = {"any": np.any, "all": np.all}[mode](per_warp, axis=1)
        np.copyto(destination, np.repeat(value, 32), where=True if mask is None else mask)

    def redux(
        self, i: int, operation: str, source: Array, member: Array, destination: Array, mask: Array | None
    ) -> None:
        self._check_members(i, member, mask)
        function: Any = {
            "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[operation]  # fmt: skip
        value = np.repeat(function.reduce(source.reshape(-1, 32), axis=1, dtype=source.dtype), 32)
        np.copyto(destination, value, where=True if mask is None else mask)

    mma_sync = tensor_cores.mma_sync
    ldmatrix = tensor_cores.ldmatrix
    stmatrix = tensor_cores.stmatrix
    wgmma = tensor_cores.wgmma
