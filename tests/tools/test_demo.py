"""`smca demo`: from photographs to the layer's inputs, what it measures with, and what it leaves behind."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import torch

from smca_kernels import pictures
from smca_kernels.testing.budget import Comparison
from smca_kernels.tools import demo

CPU = torch.device("cpu")


def make_scene(sizes: list[tuple[int, int]]) -> demo.Scene:
    """A scene of images of given (height, width), with random maps in place of a ResNet's."""
    batch, image_sizes = demo.pad_batch([torch.rand(3, *size) for size in sizes])
    height, width = batch.shape[-2:]
    maps = [torch.randn(len(sizes), demo.EMBED_DIM, -(-height // s), -(-width // s)) for s in demo.STRIDES]
    return demo.make_scene(maps, image_sizes)


@pytest.mark.parametrize("short_side", [64, 800])
def test_photographs_keep_their_aspect_within_the_detector_limits(short_side: int) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("torchvision")
    for image, (h, w) in zip(
        demo.load_photographs(["astronaut", "coffee"], short_side), [(512, 512), (400, 600)], strict=True
    ):
        height, width = image.shape[1:]
        assert min(height, width) == short_side
        assert max(height, width) <= demo.MAX_SIDE
        assert width / height == pytest.approx(w / h, rel=1.0 / short_side)


def test_long_side_is_limited_where_the_short_side_would_make_it_too_long() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("torchvision")
    (image,) = demo.load_photographs(["coffee"], 1200)
    assert max(image.shape[1:]) == demo.MAX_SIDE


def test_photographs_are_normalised_and_shown_as_they_were() -> None:
    pytest.importorskip("torchvision")
    data = pytest.importorskip("skimage.data")
    (image,) = demo.load_photographs(["astronaut"], 512)
    assert image.mean().abs() < 1.0
    torch.testing.assert_close(
        torch.from_numpy(pictures.displayable(image)), torch.from_numpy(data.astronaut() / 255.0).float()
    )


def test_padding_is_zero_outside_the_image_and_nothing_inside_is_changed() -> None:
    images = [torch.rand(3, 40, 70) + 1, torch.rand(3, 50, 20) + 1]
    batch, sizes = demo.pad_batch(images)
    assert batch.shape == (2, 3, 50, 70)
    assert sizes.tolist() == [[40, 70], [50, 20]]
    for padded, image in zip(batch, images, strict=True):
        assert torch.equal(padded[:, : image.shape[1], : image.shape[2]], image)
        assert padded.sum() == pytest.approx(image.sum().item())


def test_valid_cells_count_every_cell_that_a_pixel_reaches() -> None:
    assert demo.valid_cells(torch.tensor([[512, 768], [513, 16]])).tolist() == [
        [[32, 48], [16, 24], [8, 12]],
        [[33, 1], [17, 1], [9, 1]],
    ]


def test_valid_cells_of_the_largest_image_fill_the_maps_of_the_backbone() -> None:
    models = pytest.importorskip("torchvision.models")
    batch, sizes = demo.pad_batch([torch.rand(3, 70, 131), torch.rand(3, 97, 50)])
    maps = demo.feature_maps(models.resnet50().train(), batch)
    assert [list(m.shape) for m in maps] == [[2, 256, 7, 9], [2, 256, 4, 5], [2, 256, 2, 3]]
    shapes = demo.make_scene(maps, sizes).valid_shapes
    assert shapes.amax(0).tolist() == [[7, 9], [4, 5], [2, 3]]


def test_queries_look_inside_their_own_image_and_carry_the_map_under_their_point() -> None:
    image_sizes = torch.tensor([[96, 128], [80, 48]])
    columns = torch.arange(8.0).expand(2, demo.EMBED_DIM, 6, 8)
    rows = torch.arange(6.0)[:, None].expand(2, demo.EMBED_DIM, 6, 8)
    coarse = [torch.zeros(2, demo.EMBED_DIM, 3, 4), torch.zeros(2, demo.EMBED_DIM, 2, 2)]
    of_columns = demo.make_scene([columns, *coarse], image_sizes)
    of_rows = demo.make_scene([rows, *coarse], image_sizes)
    assert of_columns.queries.shape == (2, demo.QUERIES, demo.EMBED_DIM)
    points = demo.reference_points()
    torch.testing.assert_close(of_columns.reference_logits.sigmoid(), points.expand(2, -1, -1))
    pixels = points * image_sizes[:, None].flip(-1)
    assert torch.equal(of_columns.queries[..., 0], (pixels[..., 0] / 16).floor())
    assert torch.equal(of_rows.queries[..., 0], (pixels[..., 1] / 16).floor())


def test_operator_inputs_are_what_the_layer_computes_with() -> None:
    torch.manual_seed(0)
    scene, layer = make_scene([(64, 96), (80, 64)]), demo.build_layer(CPU)
    inputs = demo.operator_inputs(layer, scene)
    from smca_kernels import smca_attention

    heads = smca_attention(**inputs.arguments(), backend="reference")
    torch.testing.assert_close(
        layer.out_proj(heads.transpose(1, 2).flatten(2)), demo.call_layer(layer, scene, "reference")
    )


def test_parity_passes_for_the_reference_and_tells_the_worst_tensor() -> None:
    torch.manual_seed(0)
    scene, layer = make_scene([(64, 96), (80, 64)]), demo.build_layer(CPU)
    line, passed = demo.check_parity(layer, scene, demo.operator_inputs(layer, scene), "reference")
    assert passed
    assert "within the error budget; worst error / budget 0." in line


def test_parity_fails_when_one_tensor_is_over_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scene, layer = make_scene([(64, 64)]), demo.build_layer(CPU)
    wrong = [Comparison("key", error=2.0, budget=1.0, index=(0,), actual=2.0, oracle=0.0)]
    monkeypatch.setattr("smca_kernels.testing.parity.compare_results", lambda actual, inputs: wrong)
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


def test_missing_weights_give_random_ones_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")

    def unreachable(self: object, *args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", unreachable)
    _, line = demo.build_resnet50()
    assert "RANDOM" in line
    assert "no route to host" in line


def test_download_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", lambda *a, **k: time.sleep(5))
    monkeypatch.setattr(demo, "DOWNLOAD_SECONDS", 0.1)
    start = time.perf_counter()
    _, line = demo.build_resnet50()
    assert time.perf_counter() - start < 4
    assert "nothing after 0.1 s" in line


def test_picture_is_drawn_for_every_photograph(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    torch.manual_seed(0)
    sizes = [(64, 96), (80, 64)]
    path = tmp_path / "picture.png"
    images = [torch.rand(3, *size) for size in sizes]
    demo.draw(demo.build_layer(CPU), make_scene(sizes), images, "footnote", path)
    with Image.open(path) as picture:
        assert min(picture.size) > 1000


def test_out_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("torchvision", "skimage", "matplotlib"):
        pytest.importorskip(name)
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match="--out must be a folder"):
        demo.run(argparse.Namespace(out=path))


def test_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    assert demo.run(argparse.Namespace(out=tmp_path / "out")) == 2
    assert "needs skimage: pip install 'smca_kernels[demo]'" in capsys.readouterr().err
