"""Occupancy."""

from __future__ import annotations

import pytest

from smca_kernels.tools.cost.architectures import resident_warps


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps"),
    [
        (80, 256, 64, 0, 32),  # registers: 4 blocks
        (86, 128, 40, 0, 48),  # all warps
        (90, 128, 168, 0, 12),  # registers: 3 blocks
        (80, 128, 32, 65536, 8),  # shared memory: 2 blocks beside 1 KiB each of the driver's
        (75, 64, 32, 0, 32),  # 16 blocks
        (80, 128, 32, 164 << 10, 0),  # does not fit
        (90, 1024, 128, 0, 0),  # nor does this
    ],
)
def test_resident_warps(arch: int, threads: int, registers: int, shared: int, warps: int):
    assert resident_warps(arch, threads, registers, shared) == warps
