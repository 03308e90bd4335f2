"""A detector in onnxruntime finds what the detector finds that it was exported from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

from PIL import Image
from torchvision.ops import box_convert

from smca_kernels.tools import cli
from smca_model import postprocess, weights
from smca_model.onnx_detector import OnnxDetector


def test_images_of_several_sizes_get_what_each_gets_alone_in_torch(exported):
    model, detector = weights.load(exported / "model.safetensors"), OnnxDetector(exported / "model.onnx")
    images = [torch.randn(3, *size) for size in ((40, 56), (9, 131), (40, 56), (100, 37))]

    outputs = detector(images)

    for i, image in enumerate(images):
        expected = model([image])
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(outputs[name][i], expected[name][0], rtol=1e-4, atol=1e-4)


def test_smca_detect_finds_the_same_boxes_in_either_runtime(exported, tmp_path):
    for i, size in enumerate(((64, 48), (50, 90), (64, 48))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    found = {}
    for runtime, file in (("torch", "model.safetensors"), ("onnx", "model.onnx")):
        options = ["--weights", str(exported / file), "--runtime", runtime, "--threshold", "0", "--batch-size", "1"]
        command = ["detect", str(tmp_path / "images"), *options, "--out", str(tmp_path / runtime)]
        assert cli.main(command) == 0
        found[runtime] = json.loads((tmp_path / runtime / "detections.json").read_text("utf-8"))
        assert (tmp_path / runtime / "0_boxes.png").exists()
    for ours, theirs in zip(found["torch"], found["onnx"], strict=True):
        assert ours["image"] == theirs["image"]
        assert len(ours["detections"]) == 35
        for one, other in zip(ours["detections"], theirs["detections"], strict=True):
            assert one["class"] == other["class"]
            assert one["score"] == pytest.approx(other["score"], abs=2e-4)
            assert one["box"] == pytest.approx(other["box"], abs=0.11)  # both are rounded to 0.1


def test_an_image_too_thin_for_the_runtime_keeps_no_other_from_being_written(exported, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name, size in (("a", (64, 48)), ("b", (900, 3)), ("c", (64, 48))):
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.png")
    options = ["--weights", str(exported / "model.onnx"), "--runtime", "onnx", "--out", str(tmp_path / "out")]
    assert cli.main(["detect", str(tmp_path / "images"), *options]) == 1
    report = json.loads((tmp_path / "out" / "detections.json").read_text("utf-8"))
    assert [Path(each["image"]).name for each in report] == ["a.png", "c.png"]
    told = (
        f"smca detect: 1 left out:\nimage {tmp_path / 'images' / 'b.png'} must have sides of at least 9 pixels for "
        "this exported detector, got 900 × 3 pixels, resized to 96 × 1 pixels"
    )
    assert told in capsys.readouterr().err


def test_a_video_too_thin_for_the_runtime_is_named(exported, tmp_path, capsys):
    pytest.importorskip("av")
    from small_videos import shades, write_frames

    film = write_frames(tmp_path / "film.mkv", shades(2, height=4), codec="ffv1")
    options = ["--weights", str(exported / "model.onnx"), "--runtime", "onnx", "--out", str(tmp_path / "out")]
    assert cli.main(["detect", str(film), *options]) == 2
    assert f"error: video {film} must have sides of at least 9 pixels" in capsys.readouterr().err


def test_the_documented_way_to_read_an_onnx_file_gives_what_postprocess_gives(exported, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(exported)
    images = torch.randn(2, 3, 40, 56)
    namespace: dict[str, Any] = {"images": images.numpy()}
    exec(block, namespace)

    model = weights.load("model.safetensors")
    expected, _ = postprocess(model(list(images)), [(40, 56)] * 2)

    names, scores = zip(*namespace["found"], strict=True)
    assert names == tuple(model.classes[label] for label in expected["labels"])
    torch.testing.assert_close(torch.tensor(scores), expected["scores"], rtol=0, atol=1e-4)
    sides = [torch.tensor(namespace[side]) for side in ("center_x", "center_y", "width", "height")]
    torch.testing.assert_close(
        box_convert(torch.stack(sides, 1).float(), "cxcywh", "xyxy"), expected["boxes"], rtol=0, atol=1e-2
    )


def test_an_image_below_two_cells_is_refused_by_its_size(exported):
    with pytest.raises(ValueError, match=r"images\[1\] must have sides of at least 9 pixels .*, got \[3, 8, 40\]"):
        OnnxDetector(exported / "model.onnx")([torch.randn(3, 9, 9), torch.randn(3, 8, 40)])


def test_files_of_another_kind_are_refused_by_their_path(exported, tmp_path):
    import onnx

    model = onnx.load(exported / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    (tmp_path / "notes.txt").write_text("not a model", "utf-8")

    with pytest.raises(ValueError, match=r"of format 'smca_model detector 1', got .*other\.onnx of None"):
        OnnxDetector(tmp_path / "other.onnx")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.onnx", exported / "model.safetensors"):
        with pytest.raises(ValueError, match=f"path must be an ONNX file that onnxruntime can run, got {path}"):
            OnnxDetector(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--attention"], "--attention must go with --runtime torch"),
        (["--device", "cuda"], "--device must be cpu with --runtime onnx, got cuda"),
        (["--precision", "bf16"], "--precision must be fp32 with --runtime onnx, got bf16"),
        (["--queries", "1"], "--queries must go with --attention"),
        (["--layer", "0"], "--layer must go with --attention"),
        (["--weights", "none.onnx"], "--weights must be an ONNX file that onnxruntime can run, got none.onnx"),
        (["--size", "0"], "--size must be at least 1, got 0"),
        (["--size", "97"], "--size must be at most --max-size, got 97 and 96"),
    ],
)
def test_options_that_the_runtime_lacks_are_refused(exported, tmp_path, capsys, option, message):
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    command = ["detect", str(tmp_path / "image.png"), "--weights", str(exported / "model.onnx"), "--runtime", "onnx"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
