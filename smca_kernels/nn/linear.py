"""Linear layers with the initial values that the co-attention needs, and the dtype that a module computes in.

FSDP and recipes for models on the meta device call `reset_parameters` of every module in turn, so that what a parent
had set in its child is lost. Hence each layer sets its own initial values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smca_kernels.inputs import FLOATING_DTYPES


class XavierLinear(nn.Linear):
    """Linear layer with Xavier's initial weight, and nn.Linear's initial bias."""

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
