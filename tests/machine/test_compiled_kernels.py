"""The kernels as Triton compiles them for sm_80 and sm_90, executed: right, without a fault, the same in every order.

Output and six gradients are held against the reference in float64, within the error budget, with memory full of NaN
and all checks of the machine on. The cases are awkward ones; `make machine` runs hundreds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import machine_prior
import torch
from machine_kernels import IS_UNFENCED, value_and_output_of_one_key
from machine_prior import GEOMETRIES

from smca_kernels.testing.cases import Case
from smca_kernels.testing.machine import check
from smca_kernels.testing.machine.check import CompiledCase

Compiled = Callable[..., Any]

SPLIT = CompiledCase(80, Case("padded batch, odd grids, split", ((17, 37), (1, 1), (5, 3)), batch=2, queries=33,
                              mask="valid_shapes"), schedules=3)  # fmt: skip
PLANNED = CompiledCase(80, Case("planned, direct path, shared prior, dropout", ((9, 29), (5, 7)), heads=2, queries=70,
                                prior_heads=1, prior="narrow", planned=True), dropout_p=0.3, schedules=2)  # fmt: skip
UNALIGNED = CompiledCase(80, Case("head_dim 20, random mask, far centers, no scale weights, planned", ((11, 19),),
                                  heads=2, head_dim=20, prior="far", mask="random", layout="projection",
                                  scale_weights=False, planned=True))  # fmt: skip
WIDE = CompiledCase(80, Case("head_dim 128", ((9, 10),), head_dim=128))
# Of fp32, whose tiles are smaller and whose products are single instructions.
SMALL_SPLIT = replace(SPLIT, case=replace(SPLIT.case, spatial_shapes=((9, 21), (1, 1), (5, 3))))
# Compiling takes most of the time, so not every case has every architecture and dtype.
COMPILED = [
    (80, "float16", SPLIT), (80, "float16", PLANNED), (80, "bfloat16", SPLIT), (80, "bfloat16", UNALIGNED),
    (80, "float32", SMALL_SPLIT), (80, "float32", PLANNED), (90, "float16", SPLIT), (90, "float16", UNALIGNED),
    (90, "bfloat16", SPLIT), (90, "bfloat16", PLANNED), (90, "float32", SMALL_SPLIT), (90, "float32", UNALIGNED),
    (90, "bfloat16", WIDE),
]  # fmt: skip
PRIORS = [(80, "float32", 0), (80, "float16", 1), (90, "bfloat16", 2), (90, "float32", 3), (90, "float16", 4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "compiled_case"),
    [pytest.param(*each, id=f"sm_{each[0]} {each[1]}, {each[2].case.name}") for each in COMPILED],
)
def test_compiled_kernels_are_within_budget_and_without_a_fault(
    arch: int, dtype: str, compiled_case: CompiledCase, compiled: Compiled
) -> None:
    case = replace(compiled_case, arch=arch, case=replace(compiled_case.case, dtype=dtype))
    outcome = compiled(check.check_compiled, case, int(os.environ["SMCA_SEED"]))
    assert outcome.refused == ""
    problems = [problem for problem in outcome.problems if not (IS_UNFENCED and problem.startswith("proxy fence"))]
    assert problems == []
    names = {comparison.name.split(" ")[0] for comparison in outcome.comparisons}
    assert {"output", "query", "key", "value", "center", "precision"} <= names
    kernels = {name for name, _ in outcome.launches}
    assert {"forward_kernel", "prepare_kernel", "key_major_kernel", "query_major_kernel"} <= kernels
    if compiled_case.case.planned:
        assert {"survey_kernel", "window_kernel"} <= kernels
    if compiled_case in (SPLIT, SMALL_SPLIT):
        assert dict(outcome.launches)["forward_kernel"][1] > 1


@pytest.mark.parametrize("arch", [80, 90])
def test_a_single_key_gives_its_value_to_the_bit_in_float32(arch: int, compiled: Compiled) -> None:
    value, output = compiled(value_and_output_of_one_key, arch, int(os.environ["SMCA_SEED"]))
    assert torch.equal(output, value)


@pytest.mark.parametrize(("arch", "dtype", "geometry"), PRIORS)
def test_the_prior_kernels_are_right_and_without_a_fault(
    arch: int, dtype: str, geometry: int, compiled: Compiled
) -> None:
    seed = int(os.environ["SMCA_SEED"])
    ratio, report = compiled(machine_prior.check_prior, arch, dtype, GEOMETRIES[geometry], seed)
    assert report == ""
    assert ratio <= 1.0


def test_a_case_that_the_backend_refuses_says_why(compiled: Compiled) -> None:
    outcome = compiled(check.check_compiled, CompiledCase(80, Case("scale 0", ((5, 9),), scale=0.0)), 0)
    assert "softmax scale" in outcome.refused
    assert outcome.launches == []
