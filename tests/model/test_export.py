"""`smca export`: files that compute what the detector does for images of any size, or no file."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_disk import files_of_at_most
from tiny_detector import tiny_detector
from torch import nn

pytest.importorskip("torchvision")

from smca_kernels.tools import cli
from smca_model import PRESETS, build, export, weights

SMALL = {"hidden_dim": 32, "num_heads": 2, "ffn_dim": 48, "decoder_layers": 2, "num_queries": 7}
ALL = [p if p.endswith("-tiny") else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS]


# --- the form that is exported ---


@pytest.mark.parametrize("preset", ALL)
def test_an_exported_detector_serves_other_sizes_and_batches(preset):
    model = build(preset, 5, **SMALL).eval()
    least = export.min_side(model)

    program = torch.export.export(
        export.OneSize(model), (torch.randn(2, 3, 90, 110),), dynamic_shapes=(export.dynamic_axes(least),)
    ).module()

    for batch, height, width in ((1, 128, 65), (3, 71, 131)):
        images = torch.randn(batch, 3, height, width)
        expected = model(list(images))
        for actual, name in zip(program(images), ("pred_logits", "pred_boxes"), strict=True):
            torch.testing.assert_close(actual, expected[name], rtol=1e-5, atol=1e-5)


def test_one_size_is_that_of_all_images():
    model = build("smca-ms-tiny", 5, **SMALL).eval()
    images, size = torch.randn(3, 3, 40, 60), (33, 50)

    maps = model.backbone(images)

    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(model.detect(maps, [size])[name], model.detect(maps, [size] * 3)[name])


# --- files ---


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_torch_file_becomes_a_package_of_aotinductor_for_any_size(tmp_path):
    model = tiny_detector(decoder_layers=1)
    export.export(model, tmp_path / "model.pt2", "torch")

    program = torch.export.load(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    detector = torch._inductor.aoti_load_package(package)

    for batch, height, width in ((1, 70, 97), (3, 128, 65)):
        images = torch.randn(batch, 3, height, width)
        expected = model(list(images))
        for actual, name in zip(detector(images), ("pred_logits", "pred_boxes"), strict=True):
            torch.testing.assert_close(actual, expected[name], rtol=0, atol=1e-4)


def test_a_torch_file_runs_without_this_library_and_says_how(tmp_path):
    model = tiny_detector(decoder_layers=1)
    model.classes = tuple("abcde")
    images = torch.randn(1, 3, 70, 97)
    torch.save((images, model(list(images))["pred_boxes"]), tmp_path / "expected.pt")

    export.export(model, tmp_path / "model.pt2", "torch")

    program = """
import json, sys, torch
path, expected = sys.argv[1:]
images, boxes = torch.load(expected)
files = {"smca.json": ""}
detector = torch.export.load(path, extra_files=files).module()
torch.testing.assert_close(detector(images)[1], boxes, rtol=0, atol=1e-4)
about = json.loads(files["smca.json"])
assert json.loads(about["classes"]) == list("abcde") and "sigmoid" in about["postprocessing"]
print([name for name in sys.modules if name.startswith("smca")])
"""
    command = [sys.executable, "-I", "-c", program, str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_an_onnx_file_says_its_sizes_its_opset_and_what_its_outputs_mean(exported):
    import onnx

    model = onnx.load(exported / "model.onnx")

    onnx.checker.check_model(model)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["images"][1] == 3
    assert all(isinstance(shapes["images"][axis], str) for axis in (0, 2, 3))
    assert [shapes[name][1:] for name in ("logits", "boxes")] == [[7, 5], [7, 4]]
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["classes"])[-1] == "fünf"
    assert json.loads(about["image_size"]) == [48, 96]
    assert about["min_side"] == "9"
    assert "sigmoid" in about["postprocessing"]
    assert "mean" in about["preprocessing"]


def test_exporting_leaves_the_model_as_it_is(tmp_path, monkeypatch):
    def note(detector, *_):
        exported.append(detector.model)
        return detector

    exported = []
    monkeypatch.setattr(export, "_export_torch", note)
    model = tiny_detector().half().train()
    model.backend = "sdpa"

    export.export(model, tmp_path / "model.pt2", "torch")

    (other,) = exported
    assert (other.backend, other.training, next(other.parameters()).dtype) == ("reference", False, torch.float32)
    assert model.training
    assert model.backend == "sdpa"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


# --- what is refused ---


class Around(nn.Module):
    """A backbone with something before it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.channels = backbone, backbone.channels

    def forward(self, images):
        return self.backbone(self.change(images))


class Branching(Around):
    def change(self, images):
        return images if images.sum() > 0 else -images


def refused(model, path, format, message):
    path.write_text("before")
    with pytest.raises(ValueError, match=message):
        export.export(model, path, format)
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason_and_no_file(tmp_path):
    model = tiny_detector()
    model.backbone = Branching(model.backbone)
    refused(model, tmp_path / "model", "torch", "the model can't be exported as torch: .*data-dependent")


def test_a_file_that_lacks_a_size_is_not_given_out(tmp_path, monkeypatch):
    def of_two(images):
        if len(images) != 2:
            raise RuntimeError("Got: 1 Expected: 2")
        return detector(images)

    detector = export.OneSize(tiny_detector())
    monkeypatch.setattr(export, "_export_onnx", lambda *_: of_two)
    message = r"must run on images of \[1, 3, 9, 23\], got Got: 1 Expected: 2; nothing was written"
    refused(detector.model, tmp_path / "model", "onnx", message)


@pytest.mark.parametrize("off", [2e-4, float("nan")])
def test_a_file_that_computes_something_else_is_not_given_out(tmp_path, monkeypatch, off):
    def export_wrongly(detector, *_):
        return lambda images: (detector(images)[0], detector(images)[1] + off)

    monkeypatch.setattr(export, "_export_torch", export_wrongly)
    refused(tiny_detector(), tmp_path / "model", "torch", "its boxes are off by (2.0e-04|nan) for images of")


def test_another_format_is_refused(tmp_path):
    refused(tiny_detector(), tmp_path / "model", "tflite", "format must be one of 'onnx', 'torch', got 'tflite'")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("before")
    with files_of_at_most(10_000), pytest.raises(OSError, match=re.escape(str(path))) as raised:
        export.export(tiny_detector(decoder_layers=1), path, "torch")
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.safetensors", "--out", "model.safetensors"], "--out must be another file than WEIGHTS"),
        (["model.safetensors", "--out", "nowhere/model.onnx"], "--out must name a file in an existing folder"),
        (["missing.safetensors"], "error: WEIGHTS must be a file of weights, got missing.safetensors"),
    ],
)
def test_what_cannot_be_exported_is_told_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(export, "check_packages", lambda *_: None)
    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("it was exported"))
    monkeypatch.chdir(tmp_path)
    weights.save(tiny_detector(), Path("model.safetensors"), tuple("abcde"))
    assert cli.main(["export", *options]) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named_with_the_extra_that_has_them(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else True)
    assert cli.main(["export", "model.safetensors"]) == 2
    assert "needs onnxruntime: pip install 'smca_kernels[export]'" in capsys.readouterr().err
