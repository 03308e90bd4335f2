"""The kernels as launches compile them: the table of their arguments' types, and the bars of their cost."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from filelock import FileLock

pytest.importorskip("triton")

from smca_kernels.backends.triton import hopper
from smca_kernels.backends.triton.configurations import TILED, configuration
from smca_kernels.tools.cost import specializations
from smca_kernels.tools.cost.report import Row, compile_report
from smca_kernels.tools.cost.specializations import ARGUMENT_TYPES, PASSES


def run_time_arguments() -> set[str]:
    """Names of all arguments of the kernels that are not compile-time constants (those are in capitals)."""
    kernels = [kernel for of_pass in PASSES.values() for kernel in of_pass.values()]
    return {name for kernel in kernels for name in kernel.arg_names if not name.isupper()}


def test_table_of_types_names_every_argument_of_the_kernels_and_no_other() -> None:
    assert ARGUMENT_TYPES.keys() == run_time_arguments()


def test_table_of_types_names_each_argument_once() -> None:
    source = inspect.getsource(specializations)
    table = re.search(r"^ARGUMENT_TYPES: .*?^}$", source, re.MULTILINE | re.DOTALL)
    assert table is not None
    names = [name for name in re.findall(r'"([^"]+)"', table[0]) if name in ARGUMENT_TYPES]
    assert sorted(names) == sorted(ARGUMENT_TYPES)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_pointers_to_inputs_take_their_dtype(dtype: str) -> None:
    (forward,) = (each for each in specializations.specializations(80, dtype, 32) if each.pass_ == "forward")
    kinds = [forward.signature[name] for name in ("query", "out", "lse", "valid_shapes", "g0", "heads", "log2_scale")]
    assert kinds == [f"*{dtype}", f"*{dtype}", "*fp32", "*i64", "i64", "i32", "fp32"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_configurations_are_what_triton_takes_at_every_head_dim(dtype: torch.dtype):
    for arch in (75, 80, 86, 90, 100, 120):
        for head_dim in range(1, 129):
            chosen = [configuration(name, arch, dtype, head_dim) for name in (*TILED, "prepare", "survey", "window")]
            assert all(each.num_warps in (1, 2, 4, 8) for each in chosen)
            # They share what is stored of a block of queries.
            assert len({each.block_n for each in chosen}) == 1


def test_cards_without_products_of_warp_groups_are_configured_as_those_before_hopper():
    for name in TILED:
        for dtype in (torch.float16, torch.float32):
            assert configuration(name, 120, dtype, 64) == configuration(name, 86, dtype, 64)
            assert configuration(name, 100, dtype, 64) == configuration(name, 90, dtype, 64)


# fp16 and bf16 take the same configuration and the same registers; both are compiled where a bar names them.
# sm_86 and sm_89 compile as sm_80 does, for another number of resident warps.
SPILL_CASES = [
    *((arch, dtype, head_dim) for arch in (80, 90) for dtype in ("bf16", "fp32") for head_dim in (32, 64)),
    *((arch, "bf16", 32) for arch in (86, 89)),
    *((80, "fp16", 32), (90, "fp16", 32)),
]


RowsOf = Callable[[int, str, int], list[Row]]


@pytest.fixture(scope="session")
def real_rows(tmp_path_factory: pytest.TempPathFactory) -> RowsOf:
    """Rows of an architecture, dtype and head dimension; whichever process of the test run asks first compiles all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "real_rows.json"
    with FileLock(folder / "real_rows.lock"):
        if not file.exists():
            file.write_text(json.dumps(compile_report(SPILL_CASES)), "utf-8")
    all_rows = json.loads(file.read_text("utf-8"))

    def of(arch: int, dtype: str, head_dim: int) -> list[Row]:
        if arch == 90 and hopper.usable_tool() is None:
            pytest.skip("the kernels are not compiled for Hopper by this Triton")
        wanted = f"sm_{arch}", dtype, head_dim
        rows = [row for row in all_rows if (row["arch"], row["dtype"], row["head_dim"]) == wanted]
        assert rows
        return rows

    return of


# (arch, head_dim, kernel) → bytes that it may spill where an H100 or H200 ran it faster so (docs/kernels.md), because
# one more block fits on an SM.
MEASURED_FASTER = {(90, 32, "forward"): 96, (90, 64, "query_major"): 112}
# The same where it is only simulated to be faster: of half precision three times, as tiles of fewer keys fill no wgmma;
# of fp32 by a seventh at head_dim 32, as one more block fits, and by half beyond, as larger tiles take less work.
SIMULATED_FASTER = {(90, 128, "key_major"): 240}
SIMULATED_FASTER_IN_FP32 = {
    (90, 32, "key_major"): 24, (90, 64, "query_major"): 224, (90, 64, "key_major"): 72,
    (80, 64, "query_major"): 56, (80, 64, "key_major"): 64,
}  # fmt: skip
# Where registers just suffice whether ptxas spills is luck. That of Triton before 3.8 does; no tile tried is faster.
if hopper.triton_version() < (3, 8):
    SIMULATED_FASTER |= {(80, 32, "key_major"): 16, (86, 32, "forward"): 8, (89, 32, "forward"): 8}
# That of 3.8 spills more in fp32, and is simulated to be as fast as 3.9's within a fifteenth.
if hopper.triton_version() == (3, 8):
    SIMULATED_FASTER_IN_FP32 |= {(80, 32, "key_major"): 16, (80, 64, "key_major"): 528, (90, 32, "key_major"): 92}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "head_dim"), SPILL_CASES)
def test_no_spills_but_where_it_is_faster(arch: int, dtype: str, head_dim: int, real_rows: RowsOf):
    for row in real_rows(arch, dtype, head_dim):
        assert row["error"] is None
        if row["kernel"].endswith(" total"):
            continue  # the largest of its kernels'
        name = row["kernel"].removeprefix("planned ")
        faster = MEASURED_FASTER | SIMULATED_FASTER
        if dtype == "fp32":
            faster = SIMULATED_FASTER_IN_FP32
        allowed = faster.get((arch, head_dim, name), 0)
        assert row["spill_bytes"] <= allowed, row["kernel"]
        assert row["local_bytes"] <= allowed, row["kernel"]


# 10¹² attention elements per second, as simulated: plain flash attention has 1.3 / 2.8, 1.1 / 3.1 and 0.74 / 1.9.
SPEED_BARS = {
    (80, "forward"): 1.0, (90, "forward"): 2.2,
    (80, "query_major"): 0.7 if hopper.triton_version() >= (3, 8) else 0.63, (90, "query_major"): 1.5,
    (80, "key_major"): 0.72 if hopper.triton_version() >= (3, 8) else 0.66, (90, "key_major"): 1.9,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("arch", "kernel"), SPEED_BARS)
def test_kernels_are_as_fast_as_their_bars(arch: int, kernel: str, dtype: str, real_rows: RowsOf):
    (row,) = (row for row in real_rows(arch, dtype, 32) if row["kernel"] == kernel)
    assert row["elements_per_second"] >= SPEED_BARS[arch, kernel] * 1e12


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_a_plan_costs_a_kernel_at_most_a_fifth_of_its_speed(arch: int, real_rows: RowsOf):
    model = 0.9  # a ratio of two of the model's speeds is off by a tenth
    speeds = {row["kernel"]: row["elements_per_second"] for row in real_rows(arch, "bf16", 32)}
    for kernel in ("forward", "query_major", "key_major"):
        assert speeds[f"planned {kernel}"] >= 0.8 * model * speeds[kernel]


WARNING_CASES = [
    (arch, head_dim, kernel)
    for arch in (80, 90)
    for head_dim in (32, 64)
    for kernel in ("forward", "query_major", "key_major", "prepare")
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "head_dim", "kernel"), WARNING_CASES)
def test_ptxas_tells_of_no_lost_performance(arch: int, head_dim: int, kernel: str, real_rows: RowsOf):
    rows = [row for row in real_rows(arch, "bf16", head_dim) if row["kernel"].removeprefix("planned ") == kernel]
    assert rows
    for row in rows:
        assert row["ptxas_note"] == ""  # they were read
        assert row["ptxas_warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_simulated_loops_stay_below_their_ceiling(arch: int, real_rows: RowsOf):
    rows = [row for row in real_rows(arch, "bf16", 32) if row.get("elements_per_iteration")]
    assert len(rows) == 6
    for row in rows:
        assert row["schedule_note"] == ""
        assert 0.2 < row["elements_per_second"] / row["predicted_elements_per_second"] < 1
        assert 0.1 < row["issue_share"] < 1


# An argument that is None is a constant to the compiler, which then compiles other code than `smca cost` sees.
# Strides of 64 bits are of another type than it supposes.
SPLIT = ("partial_outputs", "partial_lse", "partial_queries", "partial_sums", "partial_keys", "partial_values")
OTHERS = [
    ("i32", "valid_shapes", *SPLIT),
    ("i32", "valid_shapes", "plan", "scale_weights", "grad_weights"),
    ("i64", "key_padding_mask", "seed"),
]


COMPILE = """
import re, sys
from smca_kernels.tools.cost import specializations
from smca_kernels.tools.cost.kernel import compile_kernel
stride, *absent = sys.argv[1:]
specializations.ABSENT = tuple(absent)
for chosen in specializations.specializations(90, "bf16", 32):
    if not chosen.pass_.startswith("planned") or ("plan" in absent and chosen.kernel in ("survey", "window")):
        continue
    strides = [name for name in chosen.signature if re.fullmatch("d?[qkvo]_[bhnt]", name)]
    signature = chosen.signature | dict.fromkeys(strides, stride)
    options = (chosen.num_warps, chosen.num_stages, chosen.attrs)
    ptx = compile_kernel(chosen.function, signature, chosen.constexprs, 90, *options).asm["ptx"]
    if chosen.kernel in ("planned forward", "planned query_major"):  # channels.wide_product takes half of an int64
        assert ("mul.wide.s32 %rd" in ptx) == (stride == "i32")
"""


@pytest.mark.slow
@pytest.mark.parametrize("others", OTHERS, ids="-".join)
def test_kernels_compile_with_other_arguments(others: tuple[str, ...]):
    # In a process of its own: here Triton may have been imported to interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *others]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
