"""Limits of a GPU."""

from __future__ import annotations

import pytest
from smca_benchmarks import limits
from smca_benchmarks.workloads import BOTH, FORWARD

from smca_kernels.tools.cost.architectures import ARCHITECTURES


@pytest.mark.parametrize(
    ("arch", "forward", "backward"), [(70, 0.116, 0.034), (80, 2.4, 0.70), (90, 3.9, 1.9)], ids=["V100", "A100", "H100"]
)
def test_limits_are_those_of_the_busiest_unit(arch: int, forward: float, backward: float) -> None:
    rate = {step: limits.elements_per_second(ARCHITECTURES[arch], step, "float16", 32) for step in (FORWARD, BOTH)}
    assert rate[FORWARD] / 1e12 == pytest.approx(forward, rel=0.03)
    alone = 1 / (1 / rate[BOTH] - 1 / rate[FORWARD])
    assert alone / 1e12 == pytest.approx(backward, rel=0.03)


def test_float32_products_are_three_of_tf32_unless_one_is_allowed() -> None:
    card = ARCHITECTURES[90]
    one = limits.cycles_per_element(card, "forward", "float32", 64, tf32=True)
    assert one == pytest.approx(2 * 2 * 64 * 2 / 4096)
    assert limits.cycles_per_element(card, "forward", "float32", 64) == pytest.approx(3 * one)


def test_without_tensor_cores_fp32_lanes_make_the_products() -> None:
    card = ARCHITECTURES[70]
    assert limits.cycles_per_element(card, "forward", "float32", 64) == pytest.approx((2 * 64 + 3) / 64)


def test_wider_heads_move_the_limit_from_exp2_to_the_tensor_cores() -> None:
    card = ARCHITECTURES[90]
    assert limits.cycles_per_element(card, "forward", "float16", 32) == 1 / 16
    assert limits.cycles_per_element(card, "forward", "float16", 128) == 4 * 128 / 4096


def test_unknown_card_has_no_limit() -> None:
    assert limits.card_of((9, 0)) is ARCHITECTURES[90]
    assert limits.card_of((3, 5)) is None
