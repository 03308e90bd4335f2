"""The photographs of `smca demo`: as the detector takes them, through its backbone, to the inputs of the layer."""

from __future__ import annotations

import threading

import pytest
import torch

torchvision = pytest.importorskip("torchvision")

from smca_kernels import pictures  # noqa: E402
from smca_model.backbone import build_backbone, set_norm_statistics  # noqa: E402
from smca_model.config import MAX_SIZE  # noqa: E402
from smca_model.demo import photographs  # noqa: E402


@pytest.mark.parametrize("short_side", [64, 800])
def test_photographs_keep_their_aspect_within_the_detector_limits(short_side: int) -> None:
    pytest.importorskip("skimage")
    for image, (h, w) in zip(
        photographs.load_photographs(["astronaut", "coffee"], short_side), [(512, 512), (400, 600)], strict=True
    ):
        height, width = image.shape[1:]
        assert min(height, width) == short_side
        assert max(height, width) <= MAX_SIZE
        assert width / height == pytest.approx(w / h, rel=1.0 / short_side)


def test_long_side_is_limited_where_the_short_side_would_make_it_too_long() -> None:
    pytest.importorskip("skimage")
    (image,) = photographs.load_photographs(["coffee"], 1200)
    assert max(image.shape[1:]) == MAX_SIZE


def test_photographs_are_normalised_and_shown_as_they_were() -> None:
    data = pytest.importorskip("skimage.data")
    (image,) = photographs.load_photographs(["astronaut"], 512)
    assert image.mean().abs() < 1.0
    torch.testing.assert_close(
        torch.from_numpy(pictures.displayable(image)), torch.from_numpy(data.astronaut() / 255.0).float()
    )


def test_missing_weights_give_random_ones_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object, *args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", unreachable)
    _, line = photographs.build_resnet50(torch.randn(2, 3, 64, 96))
    assert "RANDOM" in line
    assert "no route to host" in line


def test_download_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", lambda *a, **k: ended.wait(60))
    monkeypatch.setattr(photographs, "DOWNLOAD_SECONDS", 0.1)
    _, line = photographs.build_resnet50(torch.randn(2, 3, 64, 96))
    assert "nothing after 0.1 s" in line
    ended.set()


def test_a_scene_has_the_grids_of_the_padded_batch_and_the_cells_of_each_image() -> None:
    images = [torch.randn(3, 70, 131), torch.randn(3, 97, 50)]
    backbone = build_backbone("resnet50", photographs.STRIDES).eval()
    set_norm_statistics(backbone, torch.randn(1, 3, 97, 131))
    scene = photographs.scene_of(backbone, images, torch.device("cpu"))
    assert scene.spatial_shapes == ((7, 9), (4, 5), (2, 3))
    assert scene.valid_shapes.tolist() == [[[5, 9], [3, 5], [2, 3]], [[7, 4], [4, 2], [2, 1]]]
    assert scene.image_sizes.tolist() == [[70, 131], [97, 50]]
    padded = torch.ones(7, 9, dtype=torch.bool)
    padded[:5] = False
    assert (scene.tokens[0, :63][padded.flatten()] == 0).all()
    torch.testing.assert_close(scene.tokens[0, :45].std(-1, correction=0), torch.ones(45), rtol=0, atol=1e-3)


def test_weights_that_can_be_had_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet50().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", lambda *arguments, **keywords: state)
    backbone, line = photographs.build_resnet50(torch.randn(2, 3, 64, 96))
    assert line == "ResNet-50 with ImageNet weights"
    assert torch.equal(backbone.body.conv1.weight, state["conv1.weight"])
