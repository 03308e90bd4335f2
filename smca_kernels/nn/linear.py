"""Linear layers that begin as the co-attention needs them, in whatever order a model's modules are reset.

FSDP and recipes for models on the meta device call `reset_parameters` of every module in turn: what a parent set before
its child's turn is lost. So each layer knows how itself begins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smca_kernels.inputs import FLOATING_DTYPES


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


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a module's first linear layer or layer norm computes; None where its weight does not tell.

    Weights in 8 or 4 bits are widened to the dtype of the features, packed ones are not even shaped as the layer, and
    other classes of layers may do as they like.
    """
    for part in module.modules():
        # Attributes, not parameters: the replicas of nn.DataParallel have none.
        if isinstance(part, nn.Linear):
            shape: tuple[int, ...] = (part.out_features, part.in_features)
        elif isinstance(part, nn.LayerNorm):
            shape = part.normalized_shape
        else:
            continue
        weight = part.weight
        if isinstance(weight, Tensor) and weight.dtype in FLOATING_DTYPES and weight.shape == shape:
            return weight.dtype
        return None
    return None


def in_computing_dtype(features: Tensor, module: nn.Module) -> Tensor:
    """Cast features to the dtype in which a module computes, if its weight tells."""
    dtype = computing_dtype(module)
    return features if dtype is None else features.to(dtype)
