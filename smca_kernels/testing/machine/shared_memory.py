"""Shared memory with shadow state: memcheck, initcheck, racecheck, asynchronous copies and proxies.

Each granule (the narrowest access of the kernel) has one stamp for its last write and one for its last read:

    epoch << 32 | warp syncs << 12 | warp << 6 | lane            63: several warps, several lanes

The epoch counts a CTA's barriers, the warp syncs those of one warp since. Two accesses of one epoch by different warps,
one of them a write, are a race; so are two of one warp by different lanes with no bar.warp.sync between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.interfaces import Lanes
from smca_kernels.testing.machine.memory import UNSIGNED, scatter, unequal_bits

SEVERAL_LANES = 63
SEVERAL_WARPS = 63 << 6 | 63
WARP_BITS = 63 << 6


class SharedMemory:
    """The shared memory of the CTAs that run at once, `stride` bytes apart."""

    BASE = 1024  # where dynamic shared memory begins on sm_80 and later

    def __init__(self, machine: Lanes, size: int, granule: int):
        self.machine, self.size, self.granule = machine, size, granule
        self.stride = -(-size // 1024) * 1024 + 1024
        total = self.stride * machine.ctas
        self.bytes = np.zeros(total, np.uint8)
        cells = total // granule
        self.valid = np.zeros(cells, bool)
        self.last_write, self.last_read = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self.in_flight = np.zeros(cells, bool)  # a cp.async is about to write it
        self.async_reads = np.zeros(cells, np.int16)  # wgmmas under way that read it
        self.write_time = np.zeros(cells, np.int64)  # of the last write through the generic proxy
        self.offset_of_lane = machine.cta_of_lane * self.stride - self.BASE
        self.reset()

    def reset(self) -> None:
        self.bytes.fill(0xCD)
        self.valid.fill(False)
        self.last_write.fill(-1)
        self.last_read.fill(-1)
        self.in_flight.fill(False)
        self.async_reads.fill(0)
        self.write_time.fill(0)
        self.any_in_flight = self.any_async_read = False

    def rows(self, flags: Array, width: int) -> Array:
        """Flags of granules as [accesses, granules of an access]."""
        return flags.reshape(-1, width // self.granule)

    def view(self, dtype: Any, count: int) -> Array:
        return self.bytes.view(dtype).reshape(-1, count)

    def place(self, position: int, lane: int) -> int:
        """The byte that a CTA knows a position as."""
        return int(position - self.machine.cta_of_lane[lane] * self.stride)

    def locate(self, i: int, address: Array, offset: int, lanes: Array, width: int, what: str) -> tuple[Array, Array]:
        """Positions in `bytes`, and the lanes, of the accesses that are inside and aligned."""
        m = self.machine
        place = address[lanes].astype(np.int64) + offset - self.BASE
        bad = (place < 0) | (place + width > self.size)
        m.report("memcheck shared", i, lanes, bad, lambda at: f"{what} of {width} bytes at {place[at]} of {self.size}")
        inside, lanes = place[~bad], lanes[~bad]
        bad = (inside & (width - 1)) != 0
        m.report("misaligned shared", i, lanes, bad, lambda at: f"{what} of {width} bytes at {inside[at]}")
        inside, lanes = inside[~bad], lanes[~bad]
        return inside + self.BASE + self.offset_of_lane[lanes], lanes

    def _report(
        self, kind: str, i: int, bad: Any, index: Array, lanes: Array, width: int, what: str, more: str = ""
    ) -> None:
        def describe(at: int, *_: int) -> str:
            return f"{what} of {width} bytes at {self.place(index[at] * width, lanes[at])}{more}"

        self.machine.report(kind, i, lanes, bad, describe)

    def check_read(self, i: int, index: Array, lanes: Array, width: int) -> None:
        """Check and note reads of `width` bytes; `index`: which of the rows of that width, for each lane."""
        m = self.machine
        valid = self.rows(self.valid, width)[index].all(1)
        self._report("initcheck shared", i, ~valid, index, lanes, width, "read", ", never written")
        if self.any_in_flight:
            bad = self.rows(self.in_flight, width)[index].any(1)
            self._report("cp.async not waited for", i, bad, index, lanes, width, "read")
        own, base = m.own[lanes][:, None], m.base[lanes][:, None]
        last = self.rows(self.last_write, width)[index]
        self._check_races(i, last, index, lanes, width, "read after write")
        reads = self.rows(self.last_read, width)
        known = reads[index]
        if ((known == own) | (known == (base | SEVERAL_WARPS)) | (known == (own | SEVERAL_LANES))).all():
            return
        of_other_warp = ((known ^ own) & WARP_BITS) != 0
        of_this_sync = (known >> 12) == (own >> 12)
        new = np.where((known < base) | (known == own), own, np.where(
            of_other_warp, base | SEVERAL_WARPS, np.where(of_this_sync, own | SEVERAL_LANES, own)))  # fmt: skip
        reads[index] = new
        kept = reads[index]
        lost = kept != new
        if lost.any():
            # Lanes whose stamp another lane's has replaced say so; those of several warps have the last word.
            several = np.where(((kept ^ own) & WARP_BITS) != 0, base | SEVERAL_WARPS, own | SEVERAL_LANES)
            for marker in (own | SEVERAL_LANES, base | SEVERAL_WARPS):
                row, granule = np.nonzero(lost & (several == marker))
                reads[index[row], granule] = several[row, granule]

    def _check_races(
        self, i: int, last: Array, index: Array, lanes: Array, width: int, what: str, only: Array | None = None
    ) -> None:
        """Report accesses for which `last`, stamps of earlier ones, is of the same epoch."""
        m = self.machine
        own, base = m.own[lanes][:, None], m.base[lanes][:, None]
        suspect = (last >= base) & (last != own)
        if only is not None:
            suspect &= only
        if not suspect.any():
            return

        def where(at: int) -> str:
            return f"{what} of {width} bytes at {self.place(index[at] * width, lanes[at])}"

        between = suspect & (((last ^ own) & WARP_BITS) != 0)
        m.report(
            "racecheck shared", i, lanes, between,
            lambda at, g: f"{where(at)}: warp {last[at, g] >> 6 & 63} in the same epoch",
        )  # fmt: skip
        within = suspect & ((last >> 6) == (own >> 6))
        m.report(
            "racecheck shared, one warp", i, lanes, within,
            lambda at, g: f"{where(at)}: lane {last[at, g] & 63}, no bar.warp.sync between",
        )  # fmt: skip

    def check_write(self, i: int, index: Array, lanes: Array, width: int, changed: Array) -> None:
        """Check writes. `changed`: where one changes what is there; another value makes two writes a race."""
        if self.any_in_flight:
            bad = self.rows(self.in_flight, width)[index].any(1)
            self._report("cp.async not waited for", i, bad, index, lanes, width, "write")
        if self.any_async_read:
            bad = self.rows(self.async_reads, width)[index].any(1)
            self._report("wgmma not waited for", i, bad, index, lanes, width, "write", " that a wgmma reads")
        last_write, last_read = (self.rows(last, width)[index] for last in (self.last_write, self.last_read))
        self._check_races(i, last_write, index, lanes, width, "write after write", changed)
        self._check_races(i, last_read, index, lanes, width, "write after read")

    def load(
        self, i: int, address: Array, offset: int, width: int, count: int, destinations: Sequence[Array | None],
        mask: Array | None,
    ) -> None:  # fmt: skip
        """ld.shared of `count` elements of `width` bytes."""
        total = width * count
        position, lanes = self.locate(i, address, offset, self.machine.lanes_of(mask), total, "read")
        index = position // total
        self.check_read(i, index, lanes, total)
        values = self.view(UNSIGNED[width], count)[index]
        for j, row in enumerate(destinations):
            if row is not None:
                scatter(row, lanes, values[:, j])

    def store(
        self, i: int, address: Array, offset: int, width: int, count: int, sources: Sequence[Array], mask: Array | None
    ) -> None:
        """st.shared of `count` elements of `width` bytes."""
        total = width * count
        position, lanes = self.locate(i, address, offset, self.machine.lanes_of(mask), total, "write")
        values = np.stack([row[lanes] for row in sources], 1).astype(UNSIGNED[width], copy=False)
        self.write(i, position // total, lanes, total, values)

    def write(self, i: int, index: Array, lanes: Array, width: int, values: Array) -> None:
        """Check and make writes of `values` [lanes, n], of any dtype, `width` bytes a row."""
        rows = self.view(values.dtype, values.shape[1])
        changed = rows[index] != values
        if width // self.granule != values.shape[1]:
            changed = changed.any(1, keepdims=True)
        self.check_write(i, index, lanes, width, changed)
        rows[index] = values
        differs = unequal_bits(rows[index], values).any(1)
        kind = "threads write different values"
        self._report(kind, i, differs, index, lanes, width, "in one instruction")
        self.rows(self.valid, width)[index] = True
        self.rows(self.last_write, width)[index] = self.machine.own[lanes][:, None]
        self.rows(self.write_time, width)[index] = self.machine.time
