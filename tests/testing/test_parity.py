"""Error budgets, the cases they are held against, and `smca parity`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.backends.sdpa import operator as sdpa
from smca_kernels.testing import parity
from smca_kernels.testing.parity import (
    CASES,
    Case,
    absolute_sums,
    assert_within_budget,
    case_generator,
    compare_results,
    error_budget,
    make_inputs,
    poisoned_memory,
    rounding_step,
    run_reference,
)

# --- budgets ---


def test_a_rounding_step_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for magnitude in (1.0, 1.5, 2.0, 1000.0, 0.003):
            number = torch.tensor(magnitude, dtype=dtype)
            step = (torch.nextafter(number, torch.tensor(math.inf, dtype=dtype)) - number).item()
            assert rounding_step(dtype, number.item()) == step


def test_a_rounding_step_below_the_normal_numbers_is_the_smallest_number() -> None:
    assert rounding_step(torch.float16, 0.0) == 2.0**-24


def test_the_budget_is_twice_eager_error_and_step() -> None:
    oracle = torch.tensor([1.0, 5.0], dtype=torch.float64)
    eager = torch.tensor([1.25, 5.0], dtype=torch.float16)
    assert error_budget(eager, oracle) == 2 * (0.25 + 4 * 2.0**-10)
    assert error_budget(eager, oracle, dtype=torch.bfloat16) == 2 * (0.25 + 4 * 2.0**-7)


def test_the_step_is_at_least_that_of_float32_at_the_absolute_sum() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert error_budget(zero.float(), zero, absolute_sum=8.0) == 2 * 8 * 2.0**-23
    one = torch.ones(3, dtype=torch.float64)
    assert error_budget(one.half(), one, absolute_sum=8.0) == 2 * 2.0**-10


def test_eager_overflow_gives_no_infinite_budget() -> None:
    oracle = torch.tensor([1.0, 70000.0], dtype=torch.float64)
    assert math.isfinite(error_budget(oracle.half(), oracle))


def test_an_error_within_the_budget_passes_and_a_larger_one_tells_where_it_is() -> None:
    oracle = torch.zeros(2, 3, dtype=torch.float64)
    oracle[0, 0] = 1.0
    eager = oracle.float()
    budget = error_budget(eager, oracle)
    actual = eager.clone()
    actual[1, 2] = 0.9 * budget
    assert_within_budget(actual, oracle, eager)
    actual[1, 2] = 1.1 * budget
    with pytest.raises(AssertionError, match=r"key: error .* is 1\.1 × the budget .* worst at \[1, 2\]"):
        assert_within_budget(actual, oracle, eager, "key")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_passes(bad: float) -> None:
    oracle = torch.ones(3, dtype=torch.float64)
    actual = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_within_budget(actual, oracle, oracle.float())
    # Not even where eager fails the same way.
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_within_budget(actual, oracle, actual)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_the_oracle_says_passes_even_if_it_is_not_finite(bad: float) -> None:
    oracle = torch.tensor([1.0, bad], dtype=torch.float64)
    assert_within_budget(oracle.float(), oracle, oracle.float())
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, 2.0]), oracle, oracle.float())


def test_another_shape_or_dtype_never_passes() -> None:
    oracle = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"eager has shape \[2, 3\], got \[3\]"):
        assert_within_budget(torch.ones(3), oracle, oracle.float())
    with pytest.raises(AssertionError, match=r"eager has dtype torch.float32, got torch.float16"):
        assert_within_budget(oracle.half(), oracle, oracle.float())


# --- poison ---


def test_uninitialised_memory_is_poisoned_inside_and_settings_return(device: torch.device) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        like = torch.ones(5, device=device)
        for tensor in (
            torch.empty(5, device=device, dtype=torch.float16),
            torch.empty_like(like),
            like.new_empty(5, dtype=torch.bfloat16),
            torch.empty_strided((5, 1), (1, 1), device=device),
        ):
            assert tensor.isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


# --- cases ---


def test_the_cases_cover_what_the_design_asks_for() -> None:
    def every(field: str) -> set[Any]:
        return {getattr(case, field) for case in CASES}

    assert {16, 24, 32, 64, 128} <= every("head_dim")
    assert {1, 300} <= every("queries")
    assert {1, 2, 3, 4, 5, 8} <= {len(case.spatial_shapes) for case in CASES}
    assert set(parity.PRIORS) == every("prior")
    assert set(parity.LAYOUTS) == every("layout")
    assert set(parity.MASKS) == every("mask")
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs_have_the_shapes_of_their_case(case: Case, generator: torch.Generator) -> None:
    inputs = make_inputs(case, generator)
    keys, scales = sum(height * width for height, width in case.spatial_shapes), len(case.spatial_shapes)
    prior = (case.batch, case.prior_heads or case.heads, case.queries, scales)
    assert inputs.query.shape == (case.batch, case.heads, case.queries, case.head_dim)
    assert inputs.key.shape == inputs.value.shape == (case.batch, case.heads, keys, case.head_dim)
    assert inputs.center.shape == inputs.precision.shape == (*prior, 2)
    assert inputs.scale_weights is None or inputs.scale_weights.shape == prior
    assert (inputs.precision >= 0).all()
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in inputs.differentiable().values())


def test_layouts_have_the_strides_that_they_promise(generator: torch.Generator) -> None:
    query = {
        name: make_inputs(Case("", ((3, 5),), batch=2, heads=3, queries=33, layout=name), generator).query
        for name in parity.LAYOUTS
    }
    assert query["contiguous"].is_contiguous()
    assert query["projection"].stride() == (33 * 2 * 3 * 32, 32, 2 * 3 * 32, 1)
    assert query["sequence_first"].stride() == (3 * 32, 32, 2 * 3 * 32, 1)
    assert query["last_axis_strided"].stride()[2:] == (1, 33)
    assert query["expanded"].stride()[:2] == (0, 0)


def test_scale_weights_come_with_either_sign(generator: torch.Generator) -> None:
    weights = make_inputs(Case("", ((3, 5),)), generator).scale_weights
    assert (weights < 0).any()
    assert (weights > 0).any()


def test_masks_that_empty_a_scale_do_so_for_the_first_image_alone(generator: torch.Generator) -> None:
    for mask in ("empty_scale", "empty_scale_padding"):
        inputs = make_inputs(Case("", ((5, 9), (3, 5)), batch=2, mask=mask), generator)
        last = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)[-1]
        assert last.all(1).tolist() == [True, False]


def test_the_same_seed_and_name_give_the_same_inputs() -> None:
    case = Case("this", ((3, 5),))
    query = [make_inputs(case, case_generator(case, seed)).query for seed in (1, 1, 2)]
    assert torch.equal(query[0], query[1])
    assert not torch.equal(query[0], query[2])
    other = dataclasses.replace(case, name="that")
    assert not torch.equal(query[0], make_inputs(other, case_generator(other, 1)).query)


def test_the_absolute_sum_bounds_every_result(generator: torch.Generator) -> None:
    for prior in parity.PRIORS:
        for prior_heads in (1, None):
            case = Case("", ((5, 9), (1, 3)), heads=2, prior=prior, prior_heads=prior_heads, mask="random")
            inputs = make_inputs(case, generator).double()
            sums = absolute_sums(inputs)
            for name, result in run_reference(inputs).items():
                # |dP - δ| is at most twice the largest |dP|.
                assert result.abs().max() <= 2 * sum(sums[name]), (prior, name)


# --- comparison of results ---


def test_the_reference_is_within_its_own_budget(generator: torch.Generator) -> None:
    for dtype in parity.DTYPES:
        inputs = make_inputs(Case("", ((5, 9), (1, 3)), dtype=dtype, batch=2, heads=2, mask="valid_shapes"), generator)
        assert all(c.ratio <= 0.5 for c in compare_results(run_reference(inputs), inputs))


@pytest.mark.parametrize("name", ["output", "query", "key", "value", "center", "precision", "scale_weights"])
def test_a_wrong_tensor_is_found_and_named(name: str, generator: torch.Generator) -> None:
    inputs = make_inputs(Case("", ((5, 9), (3, 5)), dtype="bfloat16", heads=2), generator)
    results = run_reference(inputs)
    results[name] = results[name] * 1.1
    over = {c.name.split(" ")[0] for c in compare_results(results, inputs) if c.ratio > 1}
    assert over == {name}


def test_an_error_in_the_smaller_gradients_of_one_scale_is_found(generator: torch.Generator) -> None:
    # Gradients of precision grow with the square of the grid: those of the small grid are lost in a maximum.
    inputs = make_inputs(Case("", ((40, 40), (2, 2)), queries=5, prior="wide"), generator)
    results = run_reference(inputs)
    results["precision"][:, :, :, 1] *= 1.001
    assert [c.name for c in compare_results(results, inputs) if c.ratio > 1] == ["precision at scale 1"]


# --- command line ---


def run_parity(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    return parity.run(parser.parse_args(["--device", "cpu", *arguments]))


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (
        Case("one grid", ((3, 5),), queries=5, quick=True),
        Case("two grids", ((2, 3), (1, 1)), queries=5),
    )
    monkeypatch.setattr(parity, "CASES", cases)


@pytest.fixture
def right_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "attention", reference.attention)


def wrong_attention(query: Tensor, *others: Any) -> Tensor:
    return 1.2 * reference.attention(query, *others)


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_all_within_budget_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parity("--backend", "sdpa", "--seed", "7") == 0
    out = capsys.readouterr().out
    assert "seed 7 " in out
    assert "6 passed, 0 failed, 0 error, 0 skipped" in out


@pytest.mark.usefixtures("two_cases")
def test_a_backend_that_is_wrong_is_status_1_and_named_in_every_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sdpa, "attention", wrong_attention)
    files = ["--json", str(tmp_path / "a.json"), "--junit", str(tmp_path / "a.xml")]
    assert run_parity("--backend", "sdpa", "--dtype", "float32", *files) == 1
    assert "FAILED output: error" in capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["failed", "failed"]
    assert report["rows"][0]["tensors"]["output"]["ratio"] > 1
    suite = ElementTree.parse(tmp_path / "a.xml").getroot()[0]
    assert suite.get("failures") == "2"
    assert len(suite.findall("testcase/failure")) == 2


@pytest.mark.usefixtures("two_cases")
def test_a_crash_is_status_1_and_hides_no_other_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash_on_one_scale(*inputs: Any) -> Tensor:
        if len(inputs[6]) == 1:
            raise RuntimeError("out of luck")
        return reference.attention(*inputs)

    monkeypatch.setattr(sdpa, "attention", crash_on_one_scale)
    assert run_parity("--backend", "sdpa", "--dtype", "float32") == 1
    out = capsys.readouterr().out
    assert "error: RuntimeError: out of luck" in out
    assert "1 passed, 0 failed, 1 error" in out


@pytest.mark.usefixtures("two_cases")
def test_nan_left_in_an_output_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_an_element(query: Tensor, *others: Any) -> Tensor:
        output = torch.empty_like(query)
        output[:, :, 1:] = reference.attention(query, *others)[:, :, 1:]
        return output

    monkeypatch.setattr(sdpa, "attention", forget_an_element)
    assert run_parity("--backend", "sdpa", "--dtype", "float32") == 1


@pytest.mark.usefixtures("two_cases")
@pytest.mark.parametrize("named", [True, False])
def test_a_backend_that_never_serves_is_status_1_if_it_was_named(
    named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "BACKENDS", ("sdpa",))
    monkeypatch.setattr(sdpa, "unsupported", lambda *inputs: "not on Sundays")
    # If none is named, no case runs at all.
    assert run_parity(*(["--backend", "sdpa"] if named else []), "--dtype", "float16") == 1
    assert "skipped: not on Sundays" in capsys.readouterr().out


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_quick_runs_the_quick_cases_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parity("--backend", "sdpa", "--dtype", "float32", "--quick") == 0
    out = capsys.readouterr().out
    assert "one grid" in out
    assert "two grids" not in out


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_reports_carry_the_seed_and_the_environment(tmp_path: Path) -> None:
    run_parity("--backend", "sdpa", "--seed", "11", "--json", str(tmp_path / "a"), "--junit", str(tmp_path / "b"))
    report = json.loads((tmp_path / "a").read_text())
    assert (report["seed"], report["torch"]) == (11, torch.__version__)
    assert len(report["rows"]) == 6
    properties = ElementTree.parse(tmp_path / "b").getroot().findall("testsuite/properties/property")
    assert {"name": "seed", "value": "11"} in [each.attrib for each in properties]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.usefixtures("two_cases", "right_backend")
def test_the_same_seed_gives_the_same_report_and_another_does_not(tmp_path: Path) -> None:
    def tensors(seed: str) -> list[Any]:
        path = tmp_path / "report"
        run_parity("--backend", "sdpa", "--dtype", "float16", "--seed", seed, "--json", str(path))
        return [row["tensors"] for row in json.loads(path.read_text())["rows"]]

    assert tensors("3") == tensors("3")
    assert tensors("3") != tensors("4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "missing/file"], "--json must name a file in an existing folder, got missing/file"),
        (["--junit", "."], "--junit must name a file in an existing folder, got ."),
        (["--device", "toaster"], "--device toaster can't be used"),
        (["--device", "cuda:99"], "--device cuda:99 can't be used"),
    ],
)  # fmt: skip
def test_arguments_that_can_not_work_raise_before_any_case(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_parity(*arguments)


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "x"], ["--dtype", "int8"], ["--backend", "auto"]])
def test_arguments_out_of_range_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        run_parity(*arguments)
    assert exit_status.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_on_a_cpu_the_kernels_run_through_the_interpreter_without_being_told() -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = (
        "import sys; from smca_kernels.testing import parity; from smca_kernels.tools.cli import main;"
        "parity.CASES = parity.CASES[:1];"
        "sys.exit(main('parity --device cpu --backend triton --dtype float16 --quick'.split()))"
    )
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "1 passed, 0 failed, 0 error, 0 skipped" in finished.stdout, finished.stdout + finished.stderr
    assert finished.returncode == 0
