"""The sine encoding of cells."""

from __future__ import annotations

import math

import pytest
import torch

from smca_model.position_encoding import sine_position_encoding


def test_a_cell_s_channels_are_sines_and_cosines_of_its_row_then_of_its_column():
    height, width, dim = 5, 7, 16
    encoding = sine_position_encoding((height, width), torch.tensor([[5, 7]]), dim)[0].view(height, width, dim)

    row, column = 3, 1
    for axis, (position, extent) in enumerate([(row, height), (column, width)]):
        for i in range(dim // 4):
            angle = 2 * math.pi * (position + 1) / extent / 10000 ** (2 * i / (dim // 2))
            sine, cosine = encoding[row, column, axis * dim // 2 + 2 * i :][:2].tolist()
            assert sine == pytest.approx(math.sin(angle), abs=1e-5)
            assert cosine == pytest.approx(math.cos(angle), abs=1e-5)


def test_padding_does_not_change_the_encoding_of_an_image_s_cells():
    alone = sine_position_encoding((4, 6), torch.tensor([[4, 6]]), 8).view(1, 4, 6, 8)

    padded = sine_position_encoding((9, 7), torch.tensor([[4, 6], [9, 7]]), 8).view(2, 9, 7, 8)

    assert torch.equal(padded[:1, :4, :6], alone)


def test_channels_that_do_not_come_in_fours_are_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of 4, got 6"):
        sine_position_encoding((4, 6), torch.tensor([[4, 6]]), 6)
