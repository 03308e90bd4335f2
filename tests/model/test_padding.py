"""The reach of padding into the backbones' maps."""

from __future__ import annotations

import pytest
import torch

from smca_model import padding
from smca_model.backbone import TinyNet


def test_no_more_columns_change_than_the_receptive_field_reaches_and_the_outermost_does() -> None:
    change = padding.change_beside_padding(TinyNet(), 8, torch.randn(1, 3, 96, 96), 48)
    # 31 pixels to each side, of columns of 8.
    assert change[0] > 0.01
    assert max(change[4:]) < 1e-6


def test_twice_the_padding_changes_no_more() -> None:
    backbone, image = TinyNet(), torch.randn(1, 3, 96, 96)
    once, twice = (padding.change_beside_padding(backbone, 8, image, pixels) for pixels in (48, 96))
    assert twice == pytest.approx(once, abs=1e-6)


def test_the_command_prints_a_row_for_each_backbone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(padding, "BACKBONES", padding.BACKBONES[-1:])
    padding.main()
    title, row = capsys.readouterr().out.splitlines()
    assert title.startswith("Change of features beside 240 pixels of padding")
    assert row.startswith("small network, stride 8")
    assert row.count("%") == 3
