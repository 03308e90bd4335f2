"""`smca_kernels.profile`: which calls it sees, what it says of each scale, and that nothing else notices."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import smca_kernels
from smca_kernels import attention, smca_attention
from smca_kernels.backends import reference
from smca_kernels.inputs import AttentionInputs
from smca_kernels.profiling import measure, recorder, report
from smca_kernels.profiling.call import RecordedCall, prior_width
from smca_kernels.profiling.rows import CallRow, Row
from smca_kernels.profiling.traffic import bytes_moved
from smca_kernels.testing.cases import Case, make_inputs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/profiling.md").read_text("utf-8")
CASE = Case("two scales", ((5, 6), (3, 3)), batch=2, heads=2, queries=3, head_dim=16)


def arguments(generator: torch.Generator, case: Case = CASE, **changes: Any) -> dict[str, Any]:
    return make_inputs(case, generator).arguments() | changes


def profiled(given: dict[str, Any], backend: str = "reference") -> recorder.Profile:
    with smca_kernels.profile(repeats=1) as profile:
        smca_attention(**given, backend=backend)
    return profile


# ----------------------------------------------------------------------------------------------------- which calls


def test_every_call_has_a_row_for_each_of_its_scales(generator: torch.Generator) -> None:
    given = arguments(generator)
    with smca_kernels.profile(repeats=1) as profile:
        smca_attention(**given, backend="sdpa")
        with torch.no_grad():
            smca_attention(**given, backend="reference")
    rows = profile.rows()
    assert [(row.call, row.scale, row.height, row.width) for row in rows] == [
        (1, 1, 5, 6), (1, 2, 3, 3), (2, 1, 5, 6), (2, 2, 3, 3),
    ]  # fmt: skip
    assert [row.keys for row in rows] == [30, 9, 30, 9]
    assert [(call.backend, call.step) for call in profile.calls()] == [
        ("sdpa", "forward + backward"),
        ("reference", "forward"),
    ]


def test_calls_of_a_module_are_seen_wherever_it_makes_them() -> None:
    layer = smca_kernels.SpatiallyModulatedCoAttention(32, 2, strides=(16, 32), batch_first=True)
    queries, features = torch.randn(1, 3, 32), torch.randn(1, 20, 32)
    with smca_kernels.profile(repeats=1) as profile:
        layer(queries, features, features, [(4, 4), (2, 2)], prior_features=queries)
    assert [(row.call, row.scale) for row in profile.rows()] == [(1, 1), (1, 2)]


def test_compiled_code_is_seen_and_not_compiled_again(generator: torch.Generator) -> None:
    given = arguments(generator)
    compiler = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda: smca_attention(**given), backend=compiler, fullgraph=True)
    expected = compiled()
    with smca_kernels.profile(repeats=1) as profile:
        actual = compiled()
    torch.testing.assert_close(actual, expected)
    compiled()
    assert len(profile.calls()) == 1
    assert compiler.frame_count == 1


def test_results_gradients_and_random_numbers_are_those_without_a_profile(generator: torch.Generator) -> None:
    given = arguments(generator, dropout_p=0.5)
    leaves = [given["query"], given["center"]]

    def run() -> list[torch.Tensor]:
        output = smca_attention(**given, backend="reference")
        return [output, *torch.autograd.grad(output.sum(), leaves)]

    torch.manual_seed(0)
    expected = [*run(), torch.rand(3)]
    torch.manual_seed(0)
    with smca_kernels.profile(repeats=2):
        actual = run()
    actual.append(torch.rand(3))
    assert all(map(torch.equal, actual, expected))


def test_outside_of_a_block_nobody_watches(generator: torch.Generator) -> None:
    given = arguments(generator)
    profiled(given)
    assert attention.call_hook is None
    with pytest.raises(ZeroDivisionError), smca_kernels.profile():
        _ = 1 / 0
    assert attention.call_hook is None


def test_an_error_in_the_block_leaves_no_results() -> None:
    with pytest.raises(ZeroDivisionError), smca_kernels.profile() as profile:
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="must have ended without an error"):
        profile.rows()


def test_a_block_without_calls_says_so_when_asked() -> None:
    with smca_kernels.profile() as profile:
        pass
    with pytest.raises(RuntimeError, match="no call of smca_attention that can be measured was made"):
        profile.table()


def test_a_profile_inside_a_profile_is_refused() -> None:
    with smca_kernels.profile(), pytest.raises(RuntimeError, match="inside another"), smca_kernels.profile():
        pass
    assert attention.call_hook is None


@pytest.mark.parametrize(
    ("repeats", "error", "message"),
    [
        (0, ValueError, "repeats must be at least 1, got 0"),
        (1.5, TypeError, "repeats must be an int, got float"),
        (True, TypeError, "repeats must be an int, got bool"),
    ],
)
def test_repeats_that_are_no_number_of_them_are_refused(repeats: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), smca_kernels.profile(repeats=repeats):
        pass


def test_calls_that_cannot_be_run_again_are_counted(generator: torch.Generator) -> None:
    given = arguments(generator)
    query = given.pop("query").detach()
    on_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}
    no_query = {
        name: x[:, :, :0] if name in ("center", "precision", "scale_weights") else x for name, x in given.items()
    }

    def attend(query: Tensor) -> Tensor:
        return smca_attention(query, **given)

    with smca_kernels.profile(repeats=1) as profile:
        torch.vmap(attend)(query[None])
        torch.vmap(torch.func.grad(lambda query: attend(query).sum()))(query[None])
        smca_attention(query.to("meta"), **on_meta)
        smca_attention(query[:, :, :0], **no_query)
        torch.func.grad(lambda query: attend(query).sum())(query)
    assert len(profile.calls()) == 1
    assert profile.as_dict()["calls_skipped"] == 4


def test_what_is_not_a_number_is_null_in_json(generator: torch.Generator) -> None:
    given = arguments(generator)
    nothing = {name: torch.full_like(given[name], math.nan) for name in ("precision", "scale_weights")}
    profile = profiled(given | nothing)
    assert "nan" in profile.table()
    report = json.loads(json.dumps(profile.as_dict(), allow_nan=False))
    assert report["rows"][0]["scale_weight"] is report["rows"][0]["sigma_median"] is None


def test_calls_beyond_the_limit_run_and_are_counted(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MAX_CALLS", 1)
    given = arguments(generator)
    with smca_kernels.profile(repeats=1) as profile:
        outputs = [smca_attention(**given) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])
    assert len(profile.calls()) == 1
    assert "2 more calls were not measured" in profile.table()
    assert profile.as_dict()["calls_skipped"] == 2


# ------------------------------------------------------------------------------------------------------- what of each


@pytest.mark.parametrize("mask", ["none", "valid_shapes", "padding"])
def test_a_scale_alone_is_what_it_contributes_to_the_call(generator: torch.Generator, mask: str) -> None:
    given = arguments(generator, dataclasses.replace(CASE, mask=mask))
    seen: list[AttentionInputs] = []

    def noted(inputs: AttentionInputs) -> torch.Tensor:
        seen.append(inputs)
        return reference.attention(inputs)

    with smca_kernels.profile(repeats=1) as profile, torch.no_grad():
        attention.call_hook, hook = lambda name, _: hook(name, noted), attention.call_hook
        whole = smca_attention(**given, backend="reference")
    scales = [inputs for inputs in seen if len(inputs.spatial_shapes) == 1]
    parts = {inputs.spatial_shapes[0]: reference.attention(inputs) for inputs in scales}
    torch.testing.assert_close(sum(parts.values()), whole)
    assert len(profile.rows()) == len(parts) == 2


def test_time_is_that_of_the_scale_and_share_that_of_all_scales(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(generator)
    clock = 0.0

    def slow(inputs: AttentionInputs) -> torch.Tensor:
        nonlocal clock
        clock += {((5, 6),): 0.01, ((3, 3),): 0.03, CASE.spatial_shapes: 0.07}[inputs.spatial_shapes]
        return reference.attention(inputs)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    with smca_kernels.profile(repeats=1) as profile, torch.no_grad():
        attention.call_hook, hook = lambda name, _: hook(name, slow), attention.call_hook
        smca_attention(**given, backend="reference")
    first, second = profile.rows()
    assert (first.milliseconds, second.milliseconds) == pytest.approx((10, 30))
    assert profile.calls()[0].milliseconds == pytest.approx(70)
    assert (first.share, second.share) == pytest.approx((0.25, 0.75))


def test_keys_that_count_are_those_neither_padded_nor_masked(generator: torch.Generator) -> None:
    case = dataclasses.replace(CASE, mask="valid_shapes")
    given = arguments(generator, case, valid_shapes=torch.tensor([[(2, 3), (0, 1)], [(5, 6), (3, 3)]]))
    assert [row.valid_keys for row in profiled(given).rows()] == [(6 + 30) / 2, (0 + 9) / 2]
    mask = torch.zeros(2, 39, dtype=torch.bool)
    mask[0, :7] = mask[1, 30:32] = True
    given = arguments(generator, key_padding_mask=mask)
    assert [row.valid_keys for row in profiled(given).rows()] == [(23 + 30) / 2, (9 + 7) / 2]


def test_scale_weight_is_the_mean_and_1_without(generator: torch.Generator) -> None:
    given = arguments(generator)
    weights = given["scale_weights"].detach().double()
    rounding = weights[..., 0].numel() * 2.0**-24 * weights.abs().mean().item()  # of float32, in any order of summation
    expected = pytest.approx(weights.mean((0, 1, 2)).tolist(), rel=0, abs=2 * rounding)
    assert [row.scale_weight for row in profiled(given).rows()] == expected
    assert [row.scale_weight for row in profiled(given | {"scale_weights": None}).rows()] == [1.0, 1.0]


def test_width_of_the_prior_is_its_sigma_in_cells(generator: torch.Generator) -> None:
    sigma = torch.arange(1.0, 25.0).view(2, 2, 3, 1, 2)
    precision = torch.cat([1 / (2 * sigma**2), torch.zeros_like(sigma)], 3)
    narrow, off = profiled(arguments(generator, precision=precision)).rows()
    assert (narrow.sigma_median, narrow.sigma_90) == pytest.approx((12.0, 22.0))
    assert (off.sigma_median, off.sigma_90) == (None, None)


def test_width_is_finite_as_long_as_the_quantile_is() -> None:
    precision = torch.tensor([0.5] * 6 + [0.0] * 4)
    assert prior_width(precision) == (1.0, None)
    assert prior_width(precision[:0]) == (None, None)


def keys_of_a_tile(device: torch.device) -> int:
    """Of the forward kernel, for float32 inputs of head_dim 16."""
    configurations = pytest.importorskip("smca_kernels.backends.triton.configurations")
    return int(configurations.configuration("forward", configurations.architecture(device), torch.float32, 16).keys)


def test_tiles_are_those_with_a_valid_cell(generator: torch.Generator) -> None:
    keys = keys_of_a_tile(torch.device("cpu"))
    valid = torch.tensor([[(9, 5)], [(1, 4)], [(0, 3)]])
    case = Case("tiles", ((9, 10),), batch=3, heads=1, queries=70, head_dim=16, mask="valid_shapes")
    inputs = make_inputs(case, generator)
    inputs = dataclasses.replace(inputs, valid_shapes=valid, mass_tolerance=0.0)
    call = RecordedCall.of("triton", reference.attention, inputs)
    # Two blocks of queries look at all valid cells.
    walked = [math.ceil(height * width / keys) for ((height, width),) in valid.tolist()]
    assert call.tiles() == [(2 * sum(walked), 2 * (3 * math.ceil(90 / keys) - sum(walked)))]


def test_tiles_are_those_of_the_plan(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    launch = pytest.importorskip("smca_kernels.backends.triton.launch")
    monkeypatch.setattr(launch, "MIN_PLANNED_ELEMENTS", 0)
    tiles = math.ceil(20 * 20 / keys_of_a_tile(device))
    # One cell of a corner has it all: each query of the block looks at the first tile, and no farther.
    inputs = make_inputs(Case("tiles", ((20, 20), (2, 2)), queries=9, head_dim=16), generator, device)
    corner = torch.zeros_like(inputs.center)
    inputs = dataclasses.replace(inputs, center=corner, precision=torch.full_like(corner, 100.0))
    with smca_kernels.profile(repeats=1) as profile, torch.no_grad():
        smca_attention(**inputs.arguments(), backend="triton")
        smca_attention(**inputs.arguments() | {"mass_tolerance": 0.0}, backend="triton")
    assert [(row.tiles, row.tiles_skipped) for row in profile.rows()] == [(1, tiles - 1), (1, 0), (tiles, 0), (1, 0)]


def test_a_backend_without_tiles_has_none(generator: torch.Generator) -> None:
    row = profiled(arguments(generator)).rows()[0]
    assert (row.tiles, row.tiles_skipped) == (None, None)
    assert "–" in report._cells(row)


def test_bytes_moved_are_what_operations_take_and_give() -> None:
    x, row = torch.zeros(10, 10), torch.zeros(10)
    assert bytes_moved(lambda: x + x) == 3 * 400
    assert bytes_moved(lambda: x.t().reshape(-1)[:10]) == 400 + 400
    assert bytes_moved(lambda: x * row.expand(10, 10)) == 400 + 40 + 400
    assert bytes_moved(lambda: torch.empty_like(x)) == 0
    assert bytes_moved(lambda: torch.zeros_like(x)) == 400


def test_naive_moves_more_bytes_than_the_fused_kernels_operator(
    generator: torch.Generator, device: torch.device
) -> None:
    pytest.importorskip("triton")
    from smca_kernels.backends.triton import operator

    inputs = make_inputs(dataclasses.replace(CASE, spatial_shapes=((5, 6),)), generator, device)
    with torch.no_grad():
        naive = bytes_moved(lambda: reference.attention(inputs))
        fused = bytes_moved(lambda: operator.attention(inputs))
    # Inputs and outputs once: query, output, float32 output of the scale, log-sum-exp; key, value; the prior.
    rows, keys = 2 * 2 * 3, 2 * 2 * 30
    assert fused == 4 * (3 * 16 * rows + rows + 2 * 16 * keys + (2 + 2 + 1) * rows)
    assert naive > 4 * 8 * rows * 30


# ---------------------------------------------------------------------------------------------- autocast, GPUs, output


def test_a_call_under_autocast_is_measured_in_its_dtype(generator: torch.Generator) -> None:
    given = arguments(generator)
    dtypes = []

    def noted(inputs: AttentionInputs) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        dtypes.append(inputs.query.dtype)
        return reference.attention(inputs)

    with torch.autocast("cpu", torch.bfloat16), smca_kernels.profile(repeats=1) as profile:
        attention.call_hook, hook = lambda name, _: hook(name, noted), attention.call_hook
        smca_attention(**given, backend="reference")
    assert set(dtypes) == {torch.bfloat16}
    assert profile.calls()[0].dtype == "bfloat16"


def test_on_a_gpu_the_host_runs_ahead_of_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from smca_kernels.profiling import measure as profiling

    log: list[str] = []

    class Event:
        numbers = itertools.count()

        def __init__(self, enable_timing: bool) -> None:
            self.number = next(self.numbers)

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    device = torch.device("cuda")
    seconds = profiling.interleaved_times({"a": lambda repeat: log.append("a")}, 1, device, ahead=True)
    assert log == ["a", "synchronize", "sleep", "record", "a", "record", "synchronize"]
    assert seconds == {"a": [1.0]}
    log.clear()
    profiling.interleaved_times({"a": lambda repeat: None}, 1, device)
    assert "sleep" not in log


def test_table_has_a_line_for_every_scale_and_one_for_the_whole_call(generator: torch.Generator) -> None:
    lines = profiled(arguments(generator)).table().splitlines()
    assert lines[0].split() == [word for name in report.HEADER for word in name.split()]
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "1", "5×6"], ["1", "2", "3×3"]]
    assert lines[3].split()[:2] == ["1", "all"]
    assert "call 1: forward + backward, backend reference, float32 on cpu, batch 2" in "\n".join(lines)


def test_picture_is_a_png_whose_height_grows_with_the_bars(generator: torch.Generator, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    given = arguments(generator)
    heights = []
    for calls in (1, 3):
        with smca_kernels.profile(repeats=1) as profile:
            for _ in range(calls):
                smca_attention(**given, backend="reference")
        profile.picture(tmp_path / "bars.png")
        heights.append(imread(tmp_path / "bars.png").shape[0])
    assert heights[0] < heights[1]


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(example, {})
    assert "12×12" in capsys.readouterr().out


def test_the_table_of_the_page_is_that_of_the_recorded_run() -> None:
    found = json.loads((ROOT / "benchmarks/results/profile_cpu.json").read_text("utf-8"))
    calls = [CallRow(**call) for call in found["calls"]]
    rows = [Row(**row) for row in found["rows"]]
    shown = "\n".join(f"    {line}".rstrip() for line in report.table(calls, rows, found["repeats"], 0))
    assert shown in PAGE
