"""Published measurements of flash attention, and what the cycle model says of the same work: `smca cost --check`.

The tutorial that was measured is autotuned and changes with Triton; plain.forward_kernel stands for it, in the fastest
of a few shapes. A measurement was made at whatever clock the power limit left, the model runs at the boost clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smca_kernels.tools.cost.plain import Shape, specialization
from smca_kernels.tools.cost.report import Row, compile_report
from smca_kernels.tools.cost.specializations import Specialization

SHAPES = (Shape(64, 64, 4, 3), Shape(128, 64, 4, 3), Shape(64, 128, 4, 3), Shape(128, 64, 8, 3), Shape(128, 128, 8, 3))


@dataclass(frozen=True)
class Card:
    """A GPU that was measured."""

    product: str
    arch: int
    multiprocessors: int
    clock_hz: float  # boost; the clock under load is in none of the sources


A100 = Card("A100 SXM", 80, 108, 1.41e9)
A5000 = Card("RTX A5000", 86, 64, 1.695e9)
H100 = Card("H100 SXM", 90, 132, 1.83e9)
H100_PCIE = Card("H100 PCIe, 350 W", 90, 114, 1.755e9)


@dataclass(frozen=True)
class Measurement:
    """Forward pass without mask, fp16 or bf16, 8k to 16k keys: TFLOP/s at 4 · head_dim FLOP per element."""

    card: Card
    head_dim: int
    tflops: float
    source: str
    triton: bool = True  # False: another kernel, CUDA, which only says where the card's limit is


MEASUREMENTS = (
    Measurement(A100, 64, 146.8, "triton-lang/triton pull 1917, July 2023, 16k"),
    Measurement(A100, 128, 228.0, "FlashAttention-2, arXiv 2307.08691, abstract: 73 % of 312 TFLOP/s", triton=False),
    Measurement(A5000, 64, 81.9, "gpu-mode/ring-attention issue 10, February 2024, 8k, FlashAttention-2", triton=False),
    Measurement(H100, 64, 403.0, "FlashAttention-3, arXiv 2407.08608, figure 5, 16k"),
    Measurement(H100, 128, 395.0, "FlashAttention-3, arXiv 2407.08608, figure 5, 16k"),
    Measurement(H100, 128, 420.1, "pytorch/benchmark pull 2296, June 2024, 16k"),
    Measurement(H100, 128, 476.8, "pytorch/benchmark pull 2391, July 2024, 16k"),
    Measurement(H100, 128, 469.1, "meta-pytorch/tritonbench issue 141, January 2025, 8k"),
    Measurement(H100, 128, 487.0, "facebookexperimental/triton pull 206, July 2025, 16k"),
    Measurement(H100_PCIE, 64, 248.0, "Dao-AILab/flash-attention issue 1777, July 2025, 8k"),
)


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """List the shapes of the plain forward kernel that the comparison tries."""
    found = [(shape, specialization("forward", dtype, head_dim, shape)) for shape in SHAPES]
    return [
        replace(each, kernel=f"plain forward {shape.block_n}x{shape.keys}x{shape.num_warps}") for shape, each in found
    ]


def compare(rows: Sequence[Row]) -> list[tuple[Measurement, float]]:
    """Pair each measurement with the model's TFLOP/s of the fastest shape.

    Raises:
        ValueError: if no shape could be scheduled for one of them.
    """
    found = []
    for each in MEASUREMENTS:
        wanted = (f"sm_{each.card.arch}", each.head_dim)
        rates = [
            row["elements_per_cycle"]
            for row in rows
            if (row["arch"], row["head_dim"]) == wanted and row["elements_per_cycle"] and not row["spill_bytes"]
        ]
        if not rates:
            errors = {row["error"] or row["schedule_note"] for row in rows if (row["arch"], row["head_dim"]) == wanted}
            raise ValueError(f"no kernel was scheduled for {wanted[0]}, head_dim {each.head_dim}: {errors}")
        card = each.card
        found.append((each, max(rates) * card.multiprocessors * card.clock_hz * 4 * each.head_dim / 1e12))
    return found


def format_comparison() -> str:
    """Compile and schedule the plain forward kernel, and compare it with every measurement."""
    combinations = dict.fromkeys((each.card.arch, "fp16", each.head_dim) for each in MEASUREMENTS)
    rows = compile_report(list(combinations), module=__name__)
    lines = [
        "Forward pass, no mask. Published over modelled TFLOP/s; at the boost clock, which no card holds under load."
    ]
    for each, modelled in compare(rows):
        kind = "Triton" if each.triton else "CUDA, another kernel"
        card = f"{each.card.product} ({each.card.multiprocessors} SMs, {each.card.clock_hz / 1e9:.3f} GHz)"
        lines.append(
            f"{card:<40} {each.head_dim:>4} {each.tflops:6.1f} / {modelled:6.1f} = {each.tflops / modelled:4.2f}"
            f"  {kind}: {each.source}"
        )
    return "\n".join(lines)
