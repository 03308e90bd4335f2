"""Limits of the GPUs that `smca cost` knows: rates and capacity of one SM, clock and number of SMs, occupancy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Capacity and rates per clock of one SM of a GPU, and the product that the predicted rates stand for."""

    product: str
    multiprocessors: int
    clock_hz: float  # boost
    tensor_flops: int  # FP16 FLOP per clock per SM, dense, FP32 sums; 0: Triton emits no tensor instructions
    fp32_lanes: int
    warps: int  # resident, per SM
    blocks: int  # resident, per SM
    shared_bytes: int  # per SM
    block_shared_bytes: int  # limit of one block
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
