"""Linear layers that begin as the co-attention needs them, in whatever order a model's modules are reset.

FSDP and recipes for models on the meta device call `reset_parameters` of every module in turn: what a parent set before
its child's turn is lost. So each layer knows how itself begins.
"""

from __future__ import annotations

from torch import nn


class XavierLinear(nn.Linear):
    """Linear layer whose weight begins as Xavier's, and its bias as that of every nn.Linear."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class OutputProjection(nn.Linear):
    """Linear layer behind attention heads: Xavier's weight and no bias at the start, as in nn.MultiheadAttention."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class UnitLinear(nn.Linear):
    """Linear layer that is 1 for all features at the start."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)
