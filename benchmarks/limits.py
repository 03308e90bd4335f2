"""Limits of a GPU: attention elements per second if its busiest unit never idled."""

from __future__ import annotations

from dataclasses import dataclass

from smca_kernels.tools.cost.architectures import ARCHITECTURES, EX2_LANES, Architecture

from .workloads import BOTH, FORWARD


@dataclass(frozen=True)
class Work:
    """Work per attention element that no algorithm can save: products of head_dim channels, exp2, additions."""

    products: int
    exponentials: int
    fp32: int


# Forward: q·k and P v; exponent, row maximum and row sum. Backward in two passes, one by keys and one by queries:
# each computes q·k and dO·v, and then dk and dv, or dq; exponent and dS = P (dP - δ).
PASSES = {"forward": Work(2, 1, 3), "backward": Work(7, 2, 6)}
STEPS = {FORWARD: ("forward",), BOTH: ("forward", "backward")}


def cycles_per_element(card: Architecture, pass_: str, dtype: str, head_dim: int, tf32: bool = False) -> float:
    """Cycles per element of an SM's slowest unit: tensor cores (or FP32 lanes in their place), EX2, FP32.

    Args:
        card: the GPU.
        pass_: "forward" or "backward".
        dtype: "float16", "bfloat16" or "float32".
        head_dim: channels.
        tf32: whether float32 products may use TF32; else they are IEEE, which FP32 lanes compute.
    """
    work = PASSES[pass_]
    flops = work.products * 2 * head_dim
    half = dtype != "float32"
    if card.tensor_flops and (half or tf32):
        tensor, fp32 = flops * (1 if half else 2) / card.tensor_flops, float(work.fp32)
    else:
        tensor, fp32 = 0.0, work.fp32 + flops / 2  # a fused multiply-add is two FLOP
    return max(tensor, work.exponentials / EX2_LANES, fp32 / card.fp32_lanes)


def elements_per_second(card: Architecture, step: str, dtype: str, head_dim: int, tf32: bool = False) -> float:
    """Attention elements per second of a step, FORWARD or BOTH; its passes run one after the other."""
    cycles = sum(cycles_per_element(card, pass_, dtype, head_dim, tf32) for pass_ in STEPS[step])
    return card.multiprocessors * card.clock_hz / cycles


def card_of(capability: tuple[int, int]) -> Architecture | None:
    """The product that stands for a compute capability in `smca cost`, if there is one."""
    return ARCHITECTURES.get(10 * capability[0] + capability[1])
