"""`smca predict --schedule`: lists of programs, their makespan, padding and fill, from rows made up to be simple."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from smca_benchmarks import predict, schedule
from smca_benchmarks.workloads import Workload

TWO_TILES = Workload("two tiles", 2, ((8, 20),), queries=65, heads=3)  # 128 and 32 keys; 64 queries and one


def cost(kernel: str, pass_: str, blocks: int = 2) -> dict[str, Any]:
    """A row of a kernel: 10 cycles to start, 5 a scale, 100 a trip, 60 where a block is alone."""
    constants = {"BLOCK_N": 64, "TILE_N": 64, "KEYS": 128}
    return {
        "kernel": kernel, "pass": pass_, "arch": "sm_90", "dtype": "bf16", "head_dim": 32, "triton": "9.9",
        "constexprs": constants, "blocks_per_sm": blocks, "cycles_per_trip": 100.0, "cycles_alone": 60.0,
        "start_cycles": 10.0, "scale_cycles": 5.0, "elements_per_trip": 64 * 128.0, "elements_per_iteration": 64 * 128,
        "elements_per_second": 1e12,
    }  # fmt: skip


FORWARD, QUERY_MAJOR, KEY_MAJOR = (
    cost("forward", "forward"),
    cost("query_major", "backward"),
    cost("key_major", "backward"),
)


def test_query_major_has_a_program_for_every_block_of_queries() -> None:
    assert schedule.programs_of(QUERY_MAJOR, TWO_TILES, 1) == [(2.0,)] * (2 * 3 * 2)


def test_key_major_has_a_program_for_every_tile_and_walks_padded_queries() -> None:
    assert schedule.programs_of(KEY_MAJOR, TWO_TILES, 1) == [(2.0,)] * (2 * 3 * 2)


def test_key_major_programs_of_tiles_outside_the_image_make_no_trip() -> None:
    padded = Workload("padded", 1, ((20, 16),), queries=64, heads=1, image_share=0.4)  # 8 of 20 rows
    assert schedule.programs_of(KEY_MAJOR, padded, 1) == [(1.0,), (0.0,), (0.0,)]


def test_splits_share_the_tiles_of_all_scales_one_after_the_other() -> None:
    # 16 tiles and one, and what it costs to start each scale: three tiles.
    assert schedule.runs_of([16, 1], 1) == [(16.0, 1.0)]
    assert schedule.runs_of([16, 1], 2) == [(8.0,), (8.0, 1.0)]
    assert schedule.runs_of([0, 5, 0], 2) == [(1.0,), (4.0,)]
    workload = Workload("wide", 1, ((32, 64), (8, 16)), queries=64, heads=1)
    for kernel in (FORWARD, QUERY_MAJOR):
        programs = schedule.programs_of(kernel, workload, 132)
        assert len(programs) > 4
        assert sum(map(sum, programs)) == 17


def test_splits_of_a_tile_of_keys_share_the_blocks_of_queries() -> None:
    workload = Workload("few keys", 1, ((8, 16),), queries=300, heads=1)
    programs = schedule.programs_of(KEY_MAJOR, workload, 132)
    assert len(programs) > 1
    assert sum(map(sum, programs)) == 5


@pytest.mark.parametrize(
    ("programs", "multiprocessors", "cycles", "fill"),
    [
        (1, 1, 15 + 2 * 60, 0.5),  # alone
        (2, 1, 15 + 2 * 100, 1.0),  # side by side
        (2, 2, 15 + 2 * 60, 0.5),  # an SM each
        (4, 1, 2 * (15 + 2 * 100), 1.0),  # two after two
        (3, 1, 15 + 2 * 100 + 15 + 2 * 60, (2 * 215 + 135) / (2 * 350)),  # the last one alone
    ],
)
def test_programs_share_an_sm_and_the_last_runs_alone(
    programs: int, multiprocessors: int, cycles: float, fill: float
) -> None:
    found = schedule.makespan([(2.0,)] * programs, QUERY_MAJOR, multiprocessors)
    assert found == pytest.approx((cycles, fill))


def test_a_program_goes_to_the_sm_that_is_free_first() -> None:
    single = cost("query_major", "backward", blocks=1) | {"start_cycles": 0.0, "scale_cycles": 0.0}
    assert schedule.makespan([(5.0,), (1.0,), (3.0,)], single, 2)[0] == pytest.approx(5 * 60)


def test_a_program_without_cycles_ends_at_once() -> None:
    single = cost("key_major", "backward", blocks=1) | {"start_cycles": 0.0, "scale_cycles": 0.0}
    assert schedule.makespan([(0.0,), (2.0,), (0.0,)], single, 1)[0] == pytest.approx(2 * 60)


def test_prepare_has_a_program_for_every_block_and_scale() -> None:
    prepare = cost("prepare", "backward") | {"elements_per_iteration": 0}
    two_scales = Workload("two scales", 2, ((8, 20), (4, 10)), queries=65, heads=3)
    programs = schedule.programs_of(prepare, two_scales, 1)
    assert programs == [(1.0,)] * (2 * 3 * 2 * 2)
    assert schedule.padding_of(prepare, programs, two_scales) == pytest.approx(128 / 65)


def test_padding_counts_edges_of_tiles_and_the_last_block_of_queries() -> None:
    programs = schedule.programs_of(QUERY_MAJOR, TWO_TILES, 1)
    assert schedule.padding_of(QUERY_MAJOR, programs, TWO_TILES) == pytest.approx(2 * 128 / 160 * 128 / 65)


def test_rows_cover_every_workload_and_batch_size() -> None:
    fillings = schedule.fill_cards([FORWARD, QUERY_MAJOR, KEY_MAJOR, cost("key_major", "planned backward")], "bf16")
    names = {name for name, base in schedule.base_workloads().items() if base.head_dim == 32}
    assert len(fillings) == 3 * len(names) * len(schedule.BATCHES)
    for each in fillings:
        assert each.padding >= 1
        assert 0 < each.fill <= 1 + 1e-9
        assert each.slots == 132 * 2
    assert fillings == schedule.fill_cards([FORWARD, QUERY_MAJOR, KEY_MAJOR], "bf16")


def test_report_without_cycles_is_refused() -> None:
    with pytest.raises(ValueError, match="no simulated cycles of kernels in fp16"):
        schedule.fill_cards([FORWARD], "fp16")


def test_command_writes_rows_and_sums_beside_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = cost("plain forward", "plain forward") | {"cycles_per_trip": 50.0, "cycles_alone": 50.0}
    (tmp_path / "cost.json").write_text(json.dumps([FORWARD, plain]))
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    arguments = ["--schedule", "--cost", str(tmp_path / "cost.json"), "--json", str(tmp_path / "rows.json")]
    assert predict.run(parser.parse_args(arguments)) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0].keys() >= {"workload", "batch", "kernel", "arch", "programs", "slots", "padding", "fill", "seconds"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| basic | 1 | sm_90 | forward")]
    assert len(lines) == 2  # the kernel's, and the sum beside plain
    assert lines[1].count("–") == 0
