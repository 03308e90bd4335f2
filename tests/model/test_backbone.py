"""The backbones: sizes of their maps, what is trained, and how far padding reaches."""

from __future__ import annotations

import urllib.error

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from smca_model.backbone import ResNet, TinyNet, build_backbone, set_norm_statistics


@pytest.fixture(scope="module")
def resnet():
    return ResNet("resnet50", (4, 8, 16, 32)).eval()


@pytest.fixture(scope="module")
def dilated():
    return ResNet("resnet50", (16,), dilation=True).eval()


def test_resnet_maps_have_a_cell_for_every_stride_begun(resnet):
    maps = resnet(torch.randn(1, 3, 70, 97))

    sizes = {stride: tuple(features.shape[1:]) for stride, features in maps.items()}
    assert sizes == {4: (256, 18, 25), 8: (512, 9, 13), 16: (1024, 5, 7), 32: (2048, 3, 4)}
    assert {stride: shape[0] for stride, shape in sizes.items()} == resnet.channels


def test_a_dilated_resnet_s_last_stage_has_stride_16(dilated):
    maps = dilated(torch.randn(1, 3, 70, 97))

    assert {stride: tuple(features.shape[1:]) for stride, features in maps.items()} == {16: (2048, 5, 7)}


def test_stem_and_first_stage_are_not_trained_and_norms_hold_no_parameters(resnet):
    trained = {name.split(".")[1] for name, parameter in resnet.named_parameters() if parameter.requires_grad}

    assert trained == {"layer2", "layer3", "layer4"}
    norms = [module for name, module in resnet.named_modules() if "bn" in name or name.endswith("downsample.1")]
    assert norms
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)


def test_stages_that_nothing_is_computed_from_are_left_out():
    with torch.device("meta"):
        backbone = ResNet("resnet50", (8, 16))

    assert backbone.channels == {8: 512, 16: 1024}
    assert not any(name.startswith("body.layer4") for name, _ in backbone.named_parameters())


def test_larger_strides_take_the_deepest_map():
    with torch.device("meta"):
        assert build_backbone("resnet101", (16, 64)).channels == {16: 1024, 32: 2048}


def test_padding_reaches_only_the_cells_whose_receptive_field_it_enters():
    backbone = TinyNet()
    image = torch.randn(1, 3, 96, 96)

    alone = backbone(image)[8]
    padded = backbone(torch.nn.functional.pad(image, (0, 64, 0, 32)))[8][:, :, :12, :12]

    change = (padded - alone).abs().amax((0, 1))
    # 31 pixels to each side: 1 + 2 + 2·4 + 4 + 2·8 of its convolutions.
    assert (change[:8, :8] < 1e-5).all()
    assert (change[:, 11] > 1e-3).all()
    assert (change[11, :] > 1e-3).all()


def test_norms_set_to_an_image_keep_the_size_of_its_features() -> None:
    backbone, image = ResNet("resnet50", (32,)).eval(), 1000 * torch.randn(1, 3, 96, 96)
    before = backbone(image)[32].std().item()
    set_norm_statistics(backbone, image)
    assert not 0.1 < before < 10
    assert 0.1 < backbone(image)[32].std().item() < 10


def test_pretrained_weights_that_can_not_be_fetched_are_told_plainly(monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)

    with pytest.raises(
        ValueError, match=r"pretrained_backbone=True needs .*resnet50-.*\.pth can't be had .*no network"
    ):
        build_backbone("resnet50", (32,), pretrained=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "resnet18"},
            "backbone must be one of 'resnet50', 'resnet101', 'tiny', or timm/NAME .*, got 'resnet18'",
        ),
        ({"name": "tiny", "dilation": True}, "dilation must be False with backbone='tiny'"),
        ({"name": "tiny", "pretrained": True}, "pretrained_backbone must be False with backbone='tiny'"),
    ],
)
def test_what_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(strides=(8,), **arguments)
