"""The layer's part of `smca demo`: a scene as the layer's inputs, what is measured, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smca_kernels import SpatiallyModulatedCoAttention
from smca_kernels.testing.budget import Comparison
from smca_kernels.tools import demo

CPU = torch.device("cpu")
STRIDES = (16, 32, 64)


def make_scene(sizes: list[tuple[int, int]]) -> demo.Scene:
    """A scene of images of given (height, width), with random maps in place of a backbone's."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    maps = [torch.randn(len(sizes), demo.EMBED_DIM, -(-height // s), -(-width // s)) for s in STRIDES]
    valid_shapes = torch.tensor([[[-(-h // s), -(-w // s)] for s in STRIDES] for h, w in sizes])
    return demo.make_scene(maps, STRIDES, torch.tensor(sizes), valid_shapes)


def build_layer() -> SpatiallyModulatedCoAttention:
    return demo.build_layer(STRIDES, CPU)


def photographs(sizes: list[tuple[int, int]]) -> list[demo.Photograph]:
    return [demo.Photograph(f"image {i}", torch.rand(3, *size), (0.4, 0.5)) for i, size in enumerate(sizes)]


def test_queries_look_inside_their_own_image_and_carry_the_map_under_their_point() -> None:
    image_sizes = torch.tensor([[96, 128], [80, 48]])
    columns = torch.arange(8.0).expand(2, demo.EMBED_DIM, 6, 8)
    rows = torch.arange(6.0)[:, None].expand(2, demo.EMBED_DIM, 6, 8)
    coarse = [torch.zeros(2, demo.EMBED_DIM, 3, 4), torch.zeros(2, demo.EMBED_DIM, 2, 2)]
    valid_shapes = torch.tensor([[[6, 8], [3, 4], [2, 2]], [[5, 3], [3, 2], [2, 1]]])
    of_columns, of_rows = (
        demo.make_scene([finest, *coarse], STRIDES, image_sizes, valid_shapes) for finest in (columns, rows)
    )
    assert of_columns.queries.shape == (2, demo.QUERIES, demo.EMBED_DIM)
    points = demo.reference_points()
    torch.testing.assert_close(of_columns.reference_logits.sigmoid(), points.expand(2, -1, -1))
    pixels = points * image_sizes[:, None].flip(-1)
    assert torch.equal(of_columns.queries[..., 0], (pixels[..., 0] / 16).floor())
    assert torch.equal(of_rows.queries[..., 0], (pixels[..., 1] / 16).floor())


def test_operator_inputs_are_what_the_layer_computes_with() -> None:
    torch.manual_seed(0)
    scene, layer = make_scene([(64, 96), (80, 64)]), build_layer()
    inputs = demo.operator_inputs(layer, scene)
    from smca_kernels import smca_attention

    heads = smca_attention(**inputs.arguments(), backend="reference")
    torch.testing.assert_close(
        layer.out_proj(heads.transpose(1, 2).flatten(2)), demo.call_layer(layer, scene, "reference")
    )


def test_parity_passes_for_the_reference_and_tells_the_worst_tensor() -> None:
    torch.manual_seed(0)
    scene, layer = make_scene([(64, 96), (80, 64)]), build_layer()
    line, passed = demo.check_parity(layer, scene, demo.operator_inputs(layer, scene), "reference")
    assert passed
    assert "within the error budget; worst error / budget 0." in line


def test_parity_fails_when_one_tensor_is_over_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scene, layer = make_scene([(64, 64)]), build_layer()
    wrong = [Comparison("key", error=2.0, budget=1.0, index=(0,), actual=2.0, oracle=0.0)]
    monkeypatch.setattr("smca_kernels.testing.check.compare_results", lambda actual, inputs: wrong)
    line, passed = demo.check_parity(layer, scene, demo.operator_inputs(layer, scene), "reference")
    assert not passed
    assert "NOT WITHIN" in line
    assert "2.00 (key)" in line


def test_table_compares_every_backend_with_naive_of_its_dtype() -> None:
    def row(backend: str, dtype: str, seconds: float) -> dict[str, object]:
        times = {"forward_seconds": seconds, "both_seconds": 3 * seconds}
        return {
            "backend": backend,
            "dtype": dtype,
            **times,
            "forward_peak_bytes": 5e6,
            "both_peak_bytes": 7e6,
        }

    rows = [row("reference", "float32", 1.0), row("sdpa", "float32", 0.25)]
    rows += [row("reference", "bfloat16", 0.5), row("triton", "bfloat16", 0.05)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in demo.format_table(rows).split("\n")]
    assert lines[3] == ["float32", "sdpa", "250.0 ms", "4.0 ×", "750.0 ms", "4.0 ×", "5 MB", "7 MB"]
    assert [line[1] for line in lines[2:]] == ["naive", "sdpa", "naive", "triton"]
    assert lines[5][3] == "10.0 ×"


def test_picture_is_drawn_for_every_photograph(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    torch.manual_seed(0)
    sizes = [(64, 96), (80, 64)]
    path = tmp_path / "picture.png"
    demo.draw(build_layer(), make_scene(sizes), photographs(sizes), "footnote", path)
    with Image.open(path) as picture:
        assert min(picture.size) > 1000


def test_the_prior_is_drawn_over_the_first_photograph_for_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    sizes = [(64, 96), (80, 64)]
    path = tmp_path / "prior.png"
    demo.draw_prior(build_layer(), make_scene(sizes), photographs(sizes), "footnote", path)
    with Image.open(path) as picture:
        assert picture.width == demo.PRIOR_PIXELS
    assert path.stat().st_size < 300_000


def test_the_query_shown_is_the_one_nearest_to_its_point() -> None:
    sizes = [(64, 96), (80, 64)]
    shown = demo.attention_of_one(build_layer(), make_scene(sizes), photographs(sizes))
    for (height, width), ((x, y), query) in zip(sizes, shown, strict=True):
        assert abs(x / width - 0.4) <= 0.5 / demo.QUERY_COLUMNS + 1e-6
        assert abs(y / height - 0.5) <= 0.5 / demo.QUERY_ROWS + 1e-6
        assert [tuple(scale.shape[1:]) for scale in query.attention] == [
            (-(-height // stride), -(-width // stride)) for stride in STRIDES
        ]


def test_showing_a_scene_leaves_pictures_and_results_and_fails_with_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    sizes = [(64, 96), (80, 64)]
    scene = make_scene(sizes)
    facts = demo.describe_device(CPU, 0)
    monkeypatch.setattr(demo, "REPEATS", {"cpu": 1})
    status = demo.show(scene, photographs(sizes), "a backbone: random", facts, demo.Steps(total=3), tmp_path)
    assert status == 0
    told = capsys.readouterr().out
    assert told.startswith("smca demo on cpu: name ")
    assert "Parity holds; " in told
    assert {path.name for path in tmp_path.iterdir()} == {"prior.png", "results.json", "smca_attention.png"}
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"backbone", "spatial_shapes", "parity", "rows", "not_run", "torch", "seed"} <= set(report)
    monkeypatch.setattr(demo, "check_parity", lambda *arguments: ("a line", False))
    assert demo.show(scene, photographs(sizes), "a backbone", facts, demo.Steps(total=3), tmp_path) == 1
    assert "PARITY FAILED" in capsys.readouterr().out
