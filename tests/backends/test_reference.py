"""The reference as a definition: exported, it stays one for all sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from smca_kernels import smca_attention
from smca_kernels.backends import reference


class Attend(torch.nn.Module):
    """Attention to a feature map [B, C, height, width] of any size."""

    def forward(self, query: Tensor, features: Tensor, center: Tensor, precision: Tensor) -> Tensor:
        keys = features.flatten(2).transpose(1, 2).unsqueeze(1)
        shapes = [(features.shape[2], features.shape[3])]
        return smca_attention(query, keys, keys, center, precision, shapes, backend="reference")


def arguments(height: int, width: int) -> tuple[Tensor, ...]:
    prior = torch.rand(2, 1, 4, 1, 2)
    return torch.randn(2, 1, 4, 8), torch.randn(2, 8, height, width), prior * min(height, width), prior


def test_cells_are_row_major_in_the_dtype_of_like() -> None:
    x, y = reference.cell_coordinates(2, 3, like=torch.empty(0, dtype=torch.int64))
    assert x.tolist() == [0, 1, 2, 0, 1, 2]
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert x.dtype == y.dtype == torch.int64


def test_an_exported_program_serves_other_grids_and_repeats_nothing() -> None:
    height, width = torch.export.Dim("height", min=2, max=99), torch.export.Dim("width", min=2, max=99)
    dynamic = ({}, {2: height, 3: width}, {}, {})
    program = torch.export.export(Attend(), arguments(7, 5), dynamic_shapes=dynamic)
    # Converters to ONNX get repeat_interleave wrong where a size is dynamic.
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in targets if "repeat" in target]
    other = arguments(11, 17)
    torch.testing.assert_close(program.module()(*other), Attend()(*other))
