"""`smca predict`: times on cards that aren't here, from rows of the cost report made up so that the sum is simple."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from smca_benchmarks import predict
from smca_benchmarks.workloads import BOTH, FORWARD, WORKLOADS, Workload

from smca_kernels.tools.cost.architectures import ARCHITECTURES

H100 = ARCHITECTURES[90]
TWO_TILES = Workload("two tiles", 2, ((8, 20),), queries=65, heads=3)  # 128 and 32 keys; 64 queries and one


def cost(kernel: str, pass_: str, cycles: float, **tile: int) -> dict[str, Any]:
    """A row of a kernel that takes so many cycles of an SM per element."""
    rate = H100.multiprocessors * H100.clock_hz / cycles
    row = {"kernel": kernel, "pass": pass_, "arch": "sm_90", "dtype": "bf16", "head_dim": 32, "triton": "9.9"}
    return row | {"constexprs": {"BLOCK_N": 64} | tile, "predicted_elements_per_second": rate}


FORWARD_COST = cost("forward", "forward", 0.1, KEYS=128)
KEY_MAJOR = cost("key_major", "backward", 0.2, KEYS=128)
PREPARE = cost("prepare", "backward", 0.01)
TOTAL = cost("backward total", "backward", 0.3)
COSTS = [FORWARD_COST, KEY_MAJOR, PREPARE, TOTAL]


def test_edges_cost_as_much_as_their_tiles_and_programs_run_side_by_side() -> None:
    # 12 programs of a block of queries and two tiles, too few to be split, on an SM of its own.
    assert predict.kernel_seconds(FORWARD_COST, TWO_TILES) == pytest.approx(64 * 2 * 128 * 0.1 / H100.clock_hz)
    # On 5 SMs, three after the other.
    assert predict.kernel_seconds(FORWARD_COST, TWO_TILES, 5) == pytest.approx(3 * 64 * 2 * 128 * 0.1 / H100.clock_hz)


def test_key_major_programs_own_a_tile_and_walk_all_queries() -> None:
    # 2 images × 3 heads × 2 tiles = 12 programs.
    assert predict.kernel_seconds(KEY_MAJOR, TWO_TILES, 12) == pytest.approx(128 * 128 * 0.2 / H100.clock_hz)
    assert predict.kernel_seconds(KEY_MAJOR, TWO_TILES, 11) == pytest.approx(2 * 128 * 128 * 0.2 / H100.clock_hz)


def test_padding_costs_no_tiles() -> None:
    padded = Workload("padded", 1, ((20, 8),), queries=64, heads=1, image_share=0.4)  # 8 rows of 20: a tile
    assert predict.kernel_seconds(FORWARD_COST, padded) == pytest.approx(64 * 128 * 0.1 / H100.clock_hz)


def test_a_block_of_many_tiles_is_shared_out() -> None:
    long = Workload("long", 1, ((128, 128),), queries=64, heads=1)  # 128 tiles of one block, by 32 programs
    assert predict.kernel_seconds(FORWARD_COST, long) == pytest.approx(64 * 4 * 128 * 0.1 / H100.clock_hz)


def test_step_is_the_sum_of_its_kernels_without_the_totals() -> None:
    forward, both = predict.predict(COSTS, TWO_TILES, "bfloat16", 90)
    kernels = [predict.kernel_seconds(row, TWO_TILES) for row in (FORWARD_COST, KEY_MAJOR, PREPARE)]
    assert (forward.step, both.step) == (FORWARD, BOTH)
    assert forward.kernels == pytest.approx(kernels[0])
    assert both.kernels == pytest.approx(sum(kernels))


def test_card_without_counts_has_only_its_limit() -> None:
    uncounted = [row | {"arch": "sm_70", "predicted_elements_per_second": None} for row in COSTS]
    for costs in ([], uncounted):
        for prediction in predict.predict(costs, TWO_TILES, "bfloat16", 70):
            assert prediction.kernels is None
            assert prediction.limit > 0


def measured_run(share: float, device: str = "cuda") -> dict[str, Any]:
    """A run on an H100 that reached `share` of its prediction on two workloads."""
    rows = []
    for name in ("full-b2", "basic-b1"):
        for prediction in predict.predict(COSTS, WORKLOADS[name], "bfloat16", 90):
            value = 1e3 * (prediction.kernels or 0.0) / share
            about = {"measure": "time", "workload": name, "step": prediction.step, "dtype": "bfloat16"}
            rows.append(about | {"peer": "triton", "value": value})
    environment = {"device": device, "name": "NVIDIA H100", "capability": "9.0", "multiprocessors": "132"}
    empty: dict[str, Any] = {"workloads": {}, "peers": {}, "parity": [], "bars": [], "not_measured": [], "defaults": {}}
    return {"environment": environment, "rows": rows, **empty}


def test_efficiency_of_a_measured_card_scales_the_predictions_and_the_fit_is_reported() -> None:
    fitted = predict.fit(measured_run(0.5), COSTS, "bfloat16")
    assert fitted.efficiency == pytest.approx({FORWARD: 0.5, BOTH: 0.5})
    predictions = predict.predict(COSTS, WORKLOADS["full-b2"], "bfloat16", 90)
    text = predict.markdown(predictions, "bfloat16", fitted, "9.9")
    line = next(line for line in text.split("\n") if line.startswith("| full-b2 | forward |"))
    assert f"| {2e3 * (predictions[0].kernels or 0):.3g} | {1e3 * predictions[0].limit:.3g} |" in line
    assert "measured on NVIDIA H100: 50 % in forward" in text
    assert "Half of the predictions are within 0 %" in text


def test_run_on_a_cpu_gives_no_efficiency() -> None:
    with pytest.raises(ValueError, match="--measured must be a run on a GPU"):
        predict.fit(measured_run(0.5, device="cpu"), COSTS, "bfloat16")


def test_run_without_our_kernels_gives_no_efficiency() -> None:
    with pytest.raises(ValueError, match="no forward times of triton in float16"):
        predict.fit(measured_run(0.5), COSTS, "float16")


def test_command_writes_a_table_that_says_predicted_in_its_title(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(COSTS))
    out = tmp_path / "predicted.md"
    args = argparse.Namespace(
        dtype="bfloat16", cost=tmp_path / "cost.json", measured=None, out=out, schedule=False, json=None
    )
    assert predict.run(args) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("# Predicted")
    assert "No GPU has been measured" in text
    assert all(name in text for name in ("V100", "A100", "H100"))
    rows = [line for line in text.split("\n") if line.startswith(tuple(f"| {name} " for name in WORKLOADS))]
    assert len(rows) == 2 * len(WORKLOADS)


def test_without_triton_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs triton: pip install 'smca_kernels\[triton\]'"):
        predict.run(argparse.Namespace())


def test_file_that_is_no_cost_report_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(
        dtype="bfloat16", cost=tmp_path / "none.json", measured=None, out=None, schedule=False, json=None
    )
    with pytest.raises(ValueError, match="can't be read as a cost report"):
        predict.run(args)
