"""The decoder: object queries attend to each other, then to the image under their spatial priors, post-norm.

Queries start at 0; a learned embedding of each, `query_pos`, is added wherever they attend. The first layer predicts
the reference point; all layers and the box head share it (Eq. 12).

Source: Gao et al., ICCV 2021, Eq. 3–9 and 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smca_kernels import SpatiallyModulatedCoAttention

from .encoder import FeedForward, SelfAttention


class DecoderLayer(nn.Module):
    """Self-attention, spatially modulated co-attention, FFN; each added to the queries and normalised.

    Args:
        dim, num_heads, ffn_dim, dropout: as the encoder's.
        predicts_center: True for the first layer of a decoder.
        strides and prior: as `SpatiallyModulatedCoAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        strides: Sequence[int],
        *,
        predicts_center: bool,
        **prior: Any,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.co_attn = SpatiallyModulatedCoAttention(
            dim, num_heads, strides, predicts_center=predicts_center, dropout=dropout, batch_first=True, **prior
        )
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,  # [B, N, C]
        query_pos: Tensor,  # [B, N, C]
        key: Tensor,  # [B, T, C]
        value: Tensor,  # [B, T, C]
        spatial_shapes: Sequence[tuple[int, int]],
        *,
        valid_shapes: Tensor | None,  # [B, S, 2]
        image_sizes: Tensor,  # [B, 2]
        reference_logits: Tensor | None,  # [B, N, 2]
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, N, C] and reference logits [B, N, 2]; arguments as `SpatiallyModulatedCoAttention`."""
        features = queries + query_pos  # the official prior is predicted from the queries before self-attention
        queries = self.norm1(queries + self.dropout(self.self_attn(queries, query_pos)))
        attended, prior = self.co_attn(
            queries + query_pos,
            key,
            value,
            spatial_shapes,
            prior_features=features if self.co_attn.prior.geometry == "official" else None,
            reference_logits=reference_logits,
            image_sizes=image_sizes,
            valid_shapes=valid_shapes,
            backend=backend,
        )
        queries = self.norm2(queries + self.dropout(attended))
        queries = self.norm3(queries + self.dropout(self.ffn(queries)))
        return queries, prior.reference_logits


class Decoder(nn.Module):
    """Decoder layers one after the other, and a last norm on the output of each; arguments as `DecoderLayer`."""

    def __init__(
        self,
        layers: int,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        strides: Sequence[int],
        **prior: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, ffn_dim, dropout, strides, predicts_center=i == 0, **prior)
            for i in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        query_pos: Tensor,  # [B, N, C]
        memory: Tensor,  # [B, T, C]
        positions: Tensor,  # [B, T, C]
        spatial_shapes: Sequence[tuple[int, int]],
        *,
        valid_shapes: Tensor | None,  # [B, S, 2]
        image_sizes: Tensor,  # [B, 2]
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Normalised queries after each layer [L, B, N, C], and the reference logits [B, N, 2] they share."""
        queries = torch.zeros_like(query_pos)
        key = memory + positions  # once: autograd keeps one copy for all layers
        reference_logits: Any = None
        outputs = []
        for layer in self.layers:
            queries, reference_logits = layer(
                queries,
                query_pos,
                key,
                memory,
                spatial_shapes,
                valid_shapes=valid_shapes,
                image_sizes=image_sizes,
                reference_logits=reference_logits,
                backend=backend,
            )
            outputs.append(self.norm(queries))
        return torch.stack(outputs), reference_logits
