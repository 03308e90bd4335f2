"""Backbones of timm and modules of one's own: maps, strides, norms, normalisation, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

import timm
from tiny_detector import tiny_detector
from torch import nn

from smca_kernels.pictures import MEAN, STD
from smca_kernels.tools import cli
from smca_model import SMCA, build, weights
from smca_model.backbone import TimmBackbone, build_backbone, set_norm_statistics
from smca_model.presets import configure, count

SMALL = "mobilenetv3_small_050"
CLASSES = ("a", "b", "c", "d", "e")


def shapes_of(backbone: nn.Module, height: int, width: int) -> dict[int, tuple[int, ...]]:
    with torch.no_grad():
        maps = backbone.eval()(torch.randn(2, 3, height, width))
    return {stride: tuple(each.shape) for stride, each in maps.items()}


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", {8: 128, 32: 512}),
        (SMALL, {8: 16, 32: 288}),
        ("convnext_atto", {8: 80, 32: 320}),  # rounds down
        ("swin_tiny_patch4_window7_224", {8: 192, 32: 768}),  # channels last, multiples of its stride
        ("hrnet_w18_small", {8: 256, 32: 1024}),  # odd sizes are an error inside it
    ],
)
def test_maps_have_a_cell_for_every_stride_begun(name: str, channels: dict[int, int]) -> None:
    backbone = build_backbone(f"timm/{name}", (8, 32, 64))
    assert backbone.channels == channels
    for height, width in ((71, 107), (65, 128)):
        cells = {stride: ((height - 1) // stride + 1, (width - 1) // stride + 1) for stride in channels}
        assert shapes_of(backbone, height, width) == {s: (2, channels[s], *cells[s]) for s in channels}


def test_a_transformer_of_one_size_takes_any() -> None:
    assert shapes_of(build_backbone("timm/vit_tiny_patch16_224", (16,)), 50, 70) == {16: (2, 192, 4, 5)}


def test_maps_are_those_of_timm() -> None:
    backbone = TimmBackbone("resnet18", (16, 32)).eval()
    alone = timm.create_model("resnet18", features_only=True, out_indices=(3, 4)).eval()
    with torch.no_grad():
        for norm in [each for each in alone.modules() if isinstance(each, nn.BatchNorm2d)]:
            norm.weight.uniform_(0.5, 1.0)
            norm.running_mean.uniform_(-0.1, 0.1)
    backbone.body.load_state_dict({n: t for n, t in alone.state_dict().items() if "num_batches" not in n})
    images = torch.randn(1, 3, 65, 97)
    for actual, expected in zip(backbone(images).values(), alone(images), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["resnet18", SMALL])  # torch's norms, and those that timm joins with activations
def test_norms_are_frozen_and_let_every_branch_through(name: str) -> None:
    backbone = TimmBackbone(name, (32,))
    assert not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in backbone.modules())
    norms = {n: t for n, t in backbone.named_buffers() if "running" in n or n.endswith((".weight", ".bias"))}
    assert len(norms) >= 4 * 16
    assert all((tensor == 1).all() for n, tensor in norms.items() if n.endswith((".weight", "running_var")))
    before = {n: tensor.clone() for n, tensor in norms.items()}
    backbone.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(tensor, norms[n]) for n, tensor in before.items())
    set_norm_statistics(backbone.eval(), torch.randn(1, 3, 64, 64))
    assert not all(torch.equal(tensor, dict(backbone.named_buffers())[n]) for n, tensor in before.items())


def test_every_parameter_that_is_trained_gets_a_gradient() -> None:
    backbone = TimmBackbone("hrnet_w18_small", (16, 32))  # its last stage fuses maps of strides 4 and 8 too
    torch.stack([each.sum() for each in backbone(torch.randn(1, 3, 40, 40)).values()]).sum().backward()
    lacking = [name for name, each in backbone.named_parameters() if each.requires_grad and each.grad is None]
    assert lacking == []


def test_images_are_normalised_as_the_model_was_trained() -> None:
    backbone = TimmBackbone("tf_mobilenetv3_small_minimal_100", (32,)).eval()  # mean and deviation 0.5
    image = torch.rand(1, 3, 64, 64)
    ours = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(backbone(ours)[32], backbone.body((image - 0.5) / 0.5)[0], rtol=1e-4, atol=1e-5)
    assert TimmBackbone(SMALL, (32,)).scale is None  # ImageNet's own


def test_a_reset_backbone_is_as_a_new_one_after_memory_of_any_kind() -> None:
    backbone = TimmBackbone("tf_mobilenetv3_small_minimal_100", (32,))
    new = {name: tensor.clone() for name, tensor in backbone.named_buffers()}
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        tensor.data.fill_(float("nan"))
    backbone.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in backbone.parameters())
    assert all(torch.equal(tensor, new[name]) for name, tensor in backbone.named_buffers())


# ----------------------------------------------------------------------------------------------------- modules, errors


def test_a_module_of_timm_can_be_passed_and_its_file_wants_it_again(tmp_path: Path) -> None:
    def module() -> Any:
        return timm.create_model(SMALL, features_only=True)

    model = SMCA(tiny_detector(strides=(16, 32)).config, backbone=module()).eval()
    assert model.config.backbone == "custom"
    assert model.backbone.channels == {16: 24, 32: 288}
    weights.save(model, tmp_path / "model.safetensors", CLASSES)
    with pytest.raises(ValueError, match="a module that was passed to SMCA, and must be passed again"):
        weights.load(tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path / "model.safetensors", backbone=module())
    images = [torch.randn(3, 50, 70)]
    assert torch.equal(loaded(images)["pred_boxes"], model(images)["pred_boxes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "timm/resnet19"}, r"backbone must be a model of timm .*, got timm/resnet19 \(Unknown model"),
        (
            {"backbone": "timm/convnext_atto", "strides": (2, 8)},
            r"strides must be among those of timm/convnext_atto, 4, 8, 16, 32, or go on from 32 by .*, got \(2, 8\)",
        ),
        ({"backbone": "timm/resnet18", "strides": (32, 96)}, "strides must be those of the backbone, or go on from"),
        ({"backbone": "timm/resnet18", "dilation": True}, "dilation must be False with backbone='timm/resnet18'"),
        (
            {"backbone": "timm/levit_128s", "strides": (16,)},
            "must give maps of images of any size, .*got timm/levit_12",
        ),
        ({"backbone": "custom"}, "must be passed again"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("smca-tiny", **changes)


def test_modules_that_are_no_backbones_are_refused() -> None:
    config = configure("smca-tiny")
    with pytest.raises(TypeError, match=r"backbone must be a module with channels, .*, got Identity"):
        SMCA(config, backbone=nn.Identity())
    with pytest.raises(ValueError, match="pretrained_backbone must be False with a module"):
        SMCA(config, backbone=nn.Identity(), pretrained_backbone=True)


def test_weights_that_can_not_be_fetched_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise ConnectionError("no network")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match=r"needs timm's weights of resnet18, and they can't be had \(no network\)"):
        build("smca-tiny", backbone="timm/resnet18", strides=(32,), pretrained_backbone=True)


# -------------------------------------------------------------------------------------------------------- files, counts


def test_a_detector_goes_through_its_file(tmp_path: Path) -> None:
    model = tiny_detector("smca-ms-tiny", backbone=f"timm/{SMALL}", strides=(16, 32, 64))
    weights.save(model, tmp_path / "model.safetensors", CLASSES)
    images = [torch.randn(3, 70, 90)]
    loaded = weights.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images)["pred_logits"], model(images)["pred_logits"])


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_detector_is_exported(format: str, tmp_path: Path) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    model = tiny_detector(backbone="timm/resnet18", strides=(32,), decoder_layers=1)
    set_norm_statistics(model.backbone, torch.randn(1, 3, 96, 96))
    weights.save(model, tmp_path / "model.safetensors", CLASSES)
    assert cli.main(["export", str(tmp_path / "model.safetensors"), "--format", format]) == 0


def test_multiply_adds_are_counted() -> None:
    config = configure("smca-tiny", backbone="timm/resnet18", strides=(32,))
    tiny = configure("smca-tiny", strides=(8, 16, 32))
    parameters, operations = count(config, (224, 224))
    assert 10e6 < parameters < 13e6  # 11.2 M of ResNet-18 without its last layer and norms
    assert operations == pytest.approx(1.82e9, rel=0.05)  # 1.82·10⁹ of He et al.'s Table 1, and the transformer's
    assert parameters > count(tiny, (224, 224))[0]
