"""`smca bench --base`: differences that count as regressions, and those that don't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from smca_benchmarks import compare
from smca_benchmarks.workloads import FORWARD

ENVIRONMENT = {"device": "cpu", "name": "a CPU", "threads": 2, "float32_matmul_precision": "highest"}
PEERS = {"naive": {"ours": False}, "sdpa": {"ours": True}}


def row(peer: str, value: float, spread: float | None, measure: str = "time") -> dict[str, Any]:
    """A row whose 20 and 80 % quantiles lie `spread` apart, as a share of the median."""
    half = None if spread is None else value * spread / 2
    return {
        "measure": measure,
        "workload": "w",
        "step": FORWARD,
        "dtype": "float32",
        "peer": peer,
        "unit": "ms",
        "value": value,
        "q20": None if half is None else value - half,
        "q80": None if half is None else value + half,
        "repeats": 9,
    }


def found(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"environment": ENVIRONMENT, "peers": PEERS, "rows": list(rows)}


def regressions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [change.peer for change in compare.compare(before, after) if change.regression]


def test_growth_beyond_both_spreads_is_a_regression() -> None:
    before = found(row("naive", 100.0, 0.02), row("sdpa", 10.0, 0.04))
    assert regressions(before, found(row("naive", 100.0, 0.02), row("sdpa", 11.0, 0.04))) == ["sdpa"]


def test_growth_within_both_spreads_is_none() -> None:
    before = found(row("naive", 100.0, 0.02), row("sdpa", 10.0, 0.06))
    assert regressions(before, found(row("naive", 100.0, 0.02), row("sdpa", 10.9, 0.04))) == []


def test_same_run_is_no_regression_of_itself() -> None:
    run = found(row("naive", 100.0, 0.0), row("sdpa", 10.0, 0.0), row("sdpa", 23.0, None, "saved"))
    assert regressions(run, run) == []


def test_slower_machine_is_no_regression_and_a_slower_machine_hides_no_larger_one() -> None:
    before = found(row("naive", 100.0, 0.02), row("sdpa", 10.0, 0.02))
    assert regressions(before, found(row("naive", 130.0, 0.02), row("sdpa", 13.0, 0.02))) == []
    assert regressions(before, found(row("naive", 130.0, 0.02), row("sdpa", 14.0, 0.02))) == ["sdpa"]


def test_one_peer_that_jumped_excuses_nothing() -> None:
    peers = ("naive", "sdpa-mask", "plain-sdpa")
    before = found(*(row(peer, 100.0, 0.02) for peer in peers), row("sdpa", 10.0, 0.02))
    jumped = [row(peer, value, 0.02) for peer, value in zip(peers, (240.0, 101.0, 100.0), strict=True)]
    assert regressions(before, found(*jumped, row("sdpa", 12.0, 0.02))) == ["sdpa"]


def test_limit_of_a_card_is_not_taken_for_a_steady_peer() -> None:
    before = found(row("naive", 100.0, 0.02), row("limit", 1.0, None), row("sdpa", 10.0, 0.02))
    after = found(row("naive", 130.0, 0.02), row("limit", 1.0, None), row("sdpa", 13.0, 0.02))
    assert regressions(before, after) == []


def test_faster_machine_makes_no_regression_of_what_stayed() -> None:
    before = found(row("naive", 100.0, 0.02), row("sdpa", 10.0, 0.02))
    assert regressions(before, found(row("naive", 50.0, 0.02), row("sdpa", 10.1, 0.02))) == []


def test_overhead_is_held_against_torchs_own() -> None:
    before = found(row("torch SDPA", 10.0, 0.02, "overhead"), row("sdpa", 50.0, 0.02, "overhead"))
    slower = found(row("torch SDPA", 13.0, 0.02, "overhead"), row("sdpa", 65.0, 0.02, "overhead"))
    assert regressions(before, slower) == []
    assert regressions(before, found(row("torch SDPA", 10.0, 0.02, "overhead"), slower["rows"][1])) == ["sdpa"]


@pytest.mark.parametrize(("after", "expected"), [(100.9, []), (101.1, ["sdpa"]), (50.0, [])])
def test_memory_may_grow_by_a_hundredth(after: float, expected: list[str]) -> None:
    before = found(row("sdpa", 100.0, None, "peak"))
    assert regressions(before, found(row("sdpa", after, None, "peak"))) == expected


def test_only_our_backends_are_compared() -> None:
    before = found(row("naive", 100.0, 0.0), row("sdpa", 10.0, 0.0))
    changes = compare.compare(before, found(row("naive", 300.0, 0.0), row("sdpa", 10.0, 0.0)))
    assert [change.peer for change in changes] == ["sdpa"]


def test_backend_that_is_gone_from_a_measured_workload_is_a_regression() -> None:
    before = found(row("naive", 100.0, 0.0), row("sdpa", 10.0, 0.0))
    assert regressions(before, found(row("naive", 100.0, 0.0))) == ["sdpa"]


def test_workload_that_was_not_measured_again_is_left_out() -> None:
    assert compare.compare(found(row("naive", 100.0, 0.0), row("sdpa", 10.0, 0.0)), found()) == []


def test_base_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="its name is another CPU, here a CPU"):
        compare.check_comparable(ENVIRONMENT | {"name": "another CPU"}, ENVIRONMENT)


def test_table_marks_regressions_and_counts_them() -> None:
    before = found(row("naive", 100.0, 0.0), row("sdpa", 10.0, 0.0), row("sdpa", 5.0, None, "saved"))
    after = found(row("naive", 100.0, 0.0), row("sdpa", 12.0, 0.0), row("sdpa", 5.0, None, "saved"))
    text = compare.markdown(compare.compare(before, after), Path("old.json"))
    marked = [line for line in text.split("\n") if "**regression**" in line]
    assert len(marked) == 1
    assert "+20.0 %" in marked[0]
    assert "1 of 2 rows" in text
