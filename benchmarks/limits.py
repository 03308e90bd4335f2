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
    """Cycles per element of an SM's slowest unit: tensor cores (or FP32 lanes where they are faster), EX2, FP32.

    Args:
        card: the GPU.
        pass_: "forward" or "backward".
        dtype: "float16", "bfloat16" or "float32".
        head_dim: channels.
        tf32: whether float32 products may use TF32; else each is three of these.
    """
    work = PASSES[pass_]
    flops = work.products * 2 * head_dim
    products = (work.fp32 + flops / 2) / card.fp32_lanes  # a fused multiply-add is two FLOP
    if card.tensor_flops:
        factor = 1 if dtype != "float32" else 2 if tf32 else 6  # TF32 has half the rate
        products = min(products, max(factor * flops / card.tensor_flops, work.fp32 / card.fp32_lanes))
    return max(products, work.exponentials / EX2_LANES)


def elements_per_second(card: Architecture, step: str, dtype: str, head_dim: int, tf32: bool = False) -> float:
    """Attention elements per second of a step, FORWARD or BOTH; its passes run one after the other."""
    cycles = sum(cycles_per_element(card, pass_, dtype, head_dim, tf32) for pass_ in STEPS[step])
    return card.multiprocessors * card.clock_hz / cycles


def card_of(capability: tuple[int, int]) -> Architecture | None:
    """The product that stands for a compute capability in `smca cost`, if there is one."""
    return ARCHITECTURES.get(10 * capability[0] + capability[1])
