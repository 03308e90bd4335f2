"""Exported detectors: one program for every height, width and number of images."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from smca_model import PRESETS, build

SMALL = {"hidden_dim": 32, "num_heads": 2, "ffn_dim": 48, "decoder_layers": 2, "num_queries": 7}
ALL = [p if p.endswith("-tiny") else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS]


class OfOneSize(torch.nn.Module):
    """The detector on images [B, 3, H, W] without padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        outputs = self.model.detect(self.model.backbone(images), [tuple(images.shape[2:])])
        return outputs["pred_logits"], outputs["pred_boxes"]


@pytest.mark.parametrize("preset", ALL)
def test_an_exported_detector_serves_other_sizes_and_batches(preset):
    model = build(preset, 5, **SMALL).eval()
    smallest = max(model.config.strides) + 1  # two cells: exporters take a size of 1 for a constant
    dynamic = {
        0: Dim("batch", min=1, max=64),
        2: Dim("height", min=smallest, max=2000),
        3: Dim("width", min=smallest, max=2000),
    }
    if torch.__version__ < (2, 11):  # these can't prove that no size in a range is an exception
        dynamic = dict.fromkeys(dynamic, Dim.AUTO)

    program = torch.export.export(OfOneSize(model), (torch.randn(2, 3, 90, 110),), dynamic_shapes=(dynamic,)).module()

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
