"""Global memory with shadow state: memcheck, initcheck, and racecheck between threads and between CTAs.

Every tensor argument is a region with addresses of its own, far from any other. For each granule (the width of an
element, at most 4 bytes) of a region it is known whether it belongs to the tensor, whether it was ever written, and
who wrote it last in this launch. What a CTA may read of another's is what it has acquired: each CTA keeps a clock, the
barriers of every other CTA up to which it has seen that one's writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.interfaces import Lanes

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON: dict[int, int] = {1: 0xAD, 2: 0xAD, 4: 0x7FC0DEAD, 8: 0x7FC0DEAD}  # what reads outside of anything return
REGION_SHIFT = 40


# Kinds of faults: what the check looks for.
KINDS = {
    "memcheck": "a global access outside of every tensor's storage",
    "memcheck: outside of the view": "one inside a storage, but to no element of the argument",
    "misaligned": "a global address that is no multiple of the access's width",
    "initcheck": "a read of global memory that torch.empty left and nobody wrote",
    "racecheck global": "an access after a write that no barrier, and no release and acquire, orders before it",
    "threads write different values": "one instruction's threads write one place: which value stays is undefined",
    "lanes disagree": "a sum over lanes of which each adds its own product unrounded: they end with different bits",
    "memcheck shared": "a shared access beyond the size that the kernel asks for",
    "misaligned shared": "a shared address that is no multiple of the access's width",
    "initcheck shared": "a read of shared memory that nobody wrote",
    "racecheck shared": "accesses of two warps with no barrier between, one of them a write",
    "racecheck shared, one warp": "accesses of two lanes with no bar.warp.sync between, one of them a write",
    "cp.async not waited for": "bytes of a copy under way read, written, or left at the end",
    "wgmma not waited for": "shared memory that a wgmma under way reads written, or one left at the end",
    "wgmma register": "registers of a wgmma under way read or written",
    "wgmma operand": "a descriptor or a predicate that differs between the threads of a warpgroup",
    "proxy fence": "a wgmma reads what the generic proxy wrote with no fence.proxy.async since",
    "synccheck": "a barrier that a part of a warp or of a CTA reaches, or a collective by a part of a warp",
}


@dataclass(frozen=True)
class Fault:
    """What a check found."""

    kind: str  # of KINDS
    kernel: str
    instruction: str
    source: str
    cta: int
    thread: int
    detail: str

    def __str__(self) -> str:
        where = f"CTA {self.cta} thread {self.thread}"
        return f"{self.kind}: {self.kernel}: {where}: {self.detail}\n    {self.instruction}    // {self.source}"


class Faults:
    """What the checks found: the first of each kind at each instruction, and how many there were."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, ...], Fault] = {}
        self.counts: dict[tuple[str, ...], int] = {}

    def add(self, fault: Fault, number: int = 1) -> None:
        assert fault.kind in KINDS, fault.kind
        key = fault.kind, fault.kernel, fault.instruction, fault.source
        self.found.setdefault(key, fault)
        self.counts[key] = self.counts.get(key, 0) + number

    def __len__(self) -> int:
        return len(self.found)

    @property
    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.found.values()}

    def report(self) -> str:
        return "\n".join(f"{fault}    × {self.counts[key]}" for key, fault in self.found.items())


def unequal_bits(a: Array, b: Array) -> Array:
    """Where two arrays of words differ; two NaNs don't, whose bits x86 keeps and a GPU makes canonical."""
    unequal = a != b
    if a.dtype == np.uint32 and unequal.any():
        unequal &= ~((a & 0x7FFFFFFF > 0x7F800000) & (b & 0x7FFFFFFF > 0x7F800000))
    return unequal


def scatter(row: Array, lanes: Array, values: Array) -> None:
    """Set a register of some lanes, which are in order and may be all."""
    if lanes.size == row.size:
        row[...] = values
    else:
        row[lanes] = values


class Region:
    """One tensor argument: its storage, at an address of its own.

    Args:
        number: of the region, from 1.
        storage: bytes, which `write_back` changes.
        start: where in the storage the tensor begins.
        granule: bytes for which the flags hold.
        allowed: granules that are elements of the tensor; None: all.
        initialised: granules that were written before the launch; None: all. Stores of the launch set it.
    """

    def __init__(
        self, number: int, name: str, storage: Array, start: int, granule: int, allowed: Array | None,
        initialised: Array | None,
    ):  # fmt: skip
        self.name, self.storage, self.granule, self.size = name, storage, granule, storage.size
        self.base = (number << REGION_SHIFT) + (1 << (REGION_SHIFT - 1))
        self.address = self.base + start
        self.bytes = np.zeros(-(-self.size // 16) * 16 + 16, np.uint8)
        self.bytes[: self.size] = storage
        self.allowed, self.initialised = self._padded(allowed), self._padded(initialised)
        self.writer: Array | None = None  # of this launch: CTA << 40 | epoch << 16 | thread, + 1
        self.written = False

    def _padded(self, flags: Array | None) -> Array | None:
        if flags is None:
            return None
        result = np.ones(self.bytes.size // self.granule, bool)
        result[: flags.size] = flags
        return result

    def rows(self, flags: Array, width: int) -> Array:
        """Flags of granules as [accesses, granules of an access]."""
        count = max(width // self.granule, 1)
        return flags[: flags.size // count * count].reshape(-1, count)

    def values(self, dtype: Any, count: int) -> Array:
        """The bytes as [accesses, count] of a dtype."""
        row = np.dtype(dtype).itemsize * count
        return self.bytes[: self.bytes.size // row * row].view(dtype).reshape(-1, count)

    def write_back(self) -> None:
        if self.written:
            self.storage[:] = self.bytes[: self.size]


class GlobalMemory:
    """The regions of one launch."""

    machine: Lanes  # that runs now

    def __init__(self, regions: Sequence[Region]):
        self.regions = {region.base >> REGION_SHIFT: region for region in regions}
        self.clocks: dict[int, Array] = {}  # what each CTA has acquired: epochs of the other CTAs
        self.pending: dict[int, list[tuple[int, Array]]] = {}  # acquired by a thread, not yet shared by a barrier
        self.released: dict[int, Array] = {}  # by address

    def _resolve(
        self, i: int, addresses: Array, lanes: Array, width: int, what: str
    ) -> Iterator[tuple[Region, Array, Array]]:
        """Yield (region, offsets, selection) of the accesses that are inside of a region and aligned."""
        m = self.machine
        numbers = addresses >> REGION_SHIFT
        for number in numbers[:1] if (numbers == numbers[0]).all() else np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            region = self.regions.get(int(number))
            if region is None:
                detail = f"{what} of {width} bytes at {addresses[chosen[0]]:#x}: no tensor is near"
                m.fault("memcheck", i, lanes[chosen[0]], detail, chosen.size)
                continue
            offsets = addresses[chosen] - region.base

            def describe(more: str, offsets: Array = offsets, region: Region = region) -> Callable[[int], str]:
                return lambda at: f"{what} of {width} bytes at byte {offsets[at]} of {region.name}{more}"

            bad = (offsets < 0) | (offsets + width > region.size)
            storage = f", whose storage has {region.size}"
            m.report("memcheck", i, lanes[chosen], bad, describe(storage))
            chosen, offsets = chosen[~bad], offsets[~bad]
            bad = (offsets & (width - 1)) != 0
            m.report("misaligned", i, lanes[chosen], bad, describe("", offsets))
            chosen, offsets = chosen[~bad], offsets[~bad]
            if not offsets.size:
                continue
            if region.allowed is not None:
                bad = ~region.rows(region.allowed, width)[offsets // width].all(1)
                outside = describe(": in its storage, but no element of it", offsets)
                m.report("memcheck: outside of the view", i, lanes[chosen], bad, outside)
            yield region, offsets, chosen

    def _check_read(self, i: int, region: Region, offsets: Array, lanes: Array, width: int, what: str) -> None:
        if region.initialised is not None:
            bad = ~region.rows(region.initialised, width)[offsets // width].all(1)
            describe = lambda at: f"{what} of byte {offsets[at]} of {region.name}, never written"  # noqa: E731
            self.machine.report("initcheck", i, lanes, bad, describe)
        self._check_order(i, region, offsets, lanes, width, what)

    def _check_order(self, i: int, region: Region, offsets: Array, lanes: Array, width: int, what: str) -> None:
        """Report accesses after a write of this launch that nothing orders before them."""
        m = self.machine
        if region.writer is None:
            return
        last = region.rows(region.writer, width)[offsets // width]
        written = last != 0
        if not written.any():
            return
        last = last - 1
        cta, epoch, thread = last >> 40, (last >> 16) & 0xFFFFFF, last & 0xFFFF
        mine = m.global_cta[lanes][:, None]
        same = cta == mine
        race = same & (thread != m.thread_of_lane[lanes][:, None]) & (epoch >= m.epoch_of_lane[lanes][:, None])
        m.report(
            "racecheck global", i, lanes, written & race,
            lambda at, g: f"{what} of byte {offsets[at]} of {region.name}, written by thread {thread[at, g]} with no "
            "barrier between",
        )  # fmt: skip
        for at, g in np.argwhere(written & ~same):
            clock, writer = self._clock(int(mine[at, 0]), int(lanes[at])), int(cta[at, g])
            if clock is None or clock[writer] <= epoch[at, g]:
                detail = f"{what} of byte {offsets[at]} of {region.name}, written by CTA {writer} and not acquired"
                m.fault("racecheck global", i, lanes[at], detail)
                return

    def _clock(self, cta: int, lane: int) -> Array | None:
        """What a CTA, and one of its threads since the last barrier, has acquired."""
        clock = self.clocks.get(cta)
        for thread, acquired in self.pending.get(cta, ()):
            if thread == lane:
                clock = acquired if clock is None else np.maximum(clock, acquired)
        return clock

    def load(
        self, i: int, address: Array, offset: int, width: int, count: int, destinations: Sequence[Array | None],
        mask: Array | None,
    ) -> None:  # fmt: skip
        """ld.global of `count` elements of `width` bytes."""
        m, total = self.machine, width * count
        lanes = m.lanes_of(mask)
        if not lanes.size:
            return
        values = np.full((lanes.size, count), POISON[width], UNSIGNED[width])
        addresses = address[lanes].astype(np.int64) + offset
        for region, offsets, chosen in self._resolve(i, addresses, lanes, total, "read"):
            self._check_read(i, region, offsets, lanes[chosen], total, "read")
            values[chosen] = region.values(values.dtype, count)[offsets // total]
        for j, row in enumerate(destinations):
            if row is not None:
                scatter(row, lanes, values[:, j])

    def read_bytes(self, i: int, addresses: Array, lanes: Array, width: int) -> Array:
        """What cp.async copies: [lanes, width] bytes."""
        values = np.full((lanes.size, width), POISON[1], np.uint8)
        for region, offsets, chosen in self._resolve(i, addresses, lanes, width, "cp.async read"):
            self._check_read(i, region, offsets, lanes[chosen], width, "cp.async read")
            values[chosen] = region.values(np.uint8, width)[offsets // width]
        return values

    def store(
        self, i: int, address: Array, offset: int, width: int, count: int, sources: Sequence[Array], mask: Array | None
    ) -> None:
        """st.global of `count` elements of `width` bytes."""
        m, total = self.machine, width * count
        lanes = m.lanes_of(mask)
        if not lanes.size:
            return
        values = np.stack([row[lanes] for row in sources], 1)
        addresses = address[lanes].astype(np.int64) + offset
        for region, offsets, chosen in self._resolve(i, addresses, lanes, total, "write"):
            index, of, new = offsets // total, lanes[chosen], values[chosen]
            rows = region.values(values.dtype, count)
            if region.writer is None:
                region.writer = np.zeros(region.bytes.size // region.granule, np.int64)
            writers = region.rows(region.writer, total)
            # The same value again is no conflict inside a CTA: Triton lets replicated threads store alike.
            own = ((writers[index] - 1) >> 40) == m.global_cta[of][:, None]
            changed = ~((rows[index] == new).all(1) & own.all(1))
            if changed.any():
                self._check_order(i, region, offsets[changed], of[changed], total, "write")
            rows[index] = new
            self._check_agreement(i, region, offsets, of, unequal_bits(rows[index], new))
            stamp = m.global_cta[of] << 40 | m.epoch_of_lane[of] << 16 | m.thread_of_lane[of]
            writers[index] = stamp[:, None] + 1
            if region.initialised is not None:
                region.rows(region.initialised, total)[index] = True
            region.written = True

    def _check_agreement(self, i: int, region: Region, offsets: Array, lanes: Array, differs: Any) -> None:
        describe = lambda at: f"of one instruction, to byte {offsets[at]} of {region.name}"  # noqa: E731
        self.machine.report("threads write different values", i, lanes, differs.any(1), describe)

    def atomic(
        self, i: int, address: Array, offset: int, width: int, operate: Callable[[Any, Any], Any], semantics: str,
        destination: Array | None, source: Array, mask: Array | None,
    ) -> None:  # fmt: skip
        """atom.global and red.global, one lane after the other. `semantics`: relaxed, acquire, release or acq_rel."""
        m = self.machine
        lanes = m.lanes_of(mask)
        if not lanes.size:
            return
        addresses = address[lanes].astype(np.int64) + offset
        for region, offsets, chosen in self._resolve(i, addresses, lanes, width, "atomic"):
            elements = region.values(source.dtype, 1)[:, 0]
            for at, lane in zip(offsets // width, lanes[chosen].tolist(), strict=True):
                cta, key = int(m.global_cta[lane]), int(region.base + at * width)
                if region.initialised is not None and not region.rows(region.initialised, width)[at].all():
                    m.fault("initcheck", i, lane, f"atomic on byte {at * width} of {region.name}, never written")
                if semantics in ("release", "acq_rel"):
                    known = self._clock(cta, lane)
                    clock = np.zeros(m.grid_size, np.int64) if known is None else known.copy()
                    # What the CTA wrote before its last barrier, and what this thread wrote since.
                    clock[cta] = int(m.epoch_of_lane[lane])
                    before = self.released.get(key)
                    self.released[key] = clock if before is None else np.maximum(before, clock)
                if semantics in ("acquire", "acq_rel") and key in self.released:
                    self.pending.setdefault(cta, []).append((lane, self.released[key].copy()))
                old = elements[at]
                elements[at] = operate(old, source[lane])
                if destination is not None:
                    destination[lane] = old
            region.written = True

    def barrier(self, cta: int) -> None:
        """Let all threads of a CTA see what one of them acquired."""
        for _, clock in self.pending.pop(cta, ()):
            self.clocks[cta] = np.maximum(self.clocks[cta], clock) if cta in self.clocks else clock
