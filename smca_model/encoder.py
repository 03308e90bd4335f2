"""The encoder: self-attention inside each scale ("intra") or across all of them ("multi"), post-norm.

    q, k = tokens + positions, v = tokens
    tokens = norm(tokens + attention(q, k, v));  tokens = norm(tokens + FFN(tokens))

The scales share the weights of the attention and of the FFN, or have their own, each as chosen. The tokens of all
scales are kept one after the other, [B, T, C], so that shared weights are one product.

Source: Gao et al., ICCV 2021: intra-scale and multi-scale self-attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Sized
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smca_kernels.nn.linear import OutputProjection

Kind = Literal["intra", "multi"]


class SelfAttention(nn.Module):
    """Multi-head self-attention through torch's scaled_dot_product_attention, with nn.MultiheadAttention's parameters.

    Args:
        dim: number of channels, a multiple of num_heads.
        num_heads: attention heads.
        dropout: probability of dropping an attention weight while training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = OutputProjection(dim, dim)
        self._reset_projections()

    def reset_parameters(self) -> None:
        """Set Xavier projections with zero biases."""
        self._reset_projections()
        self.out_proj.reset_parameters()

    def _reset_projections(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, N, C] attended; tokens [B, N, C], positions [B, N, C]."""
        return self.out_proj(self.attend(*self.project(tokens, positions)))

    def project(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, N, D]."""
        dim = tokens.shape[-1]
        weights, biases = self.in_proj_weight.split((2 * dim, dim)), self.in_proj_bias.split((2 * dim, dim))
        query, key = F.linear(tokens + positions, weights[0], biases[0]).chunk(2, -1)
        value = F.linear(tokens, weights[1], biases[1])
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None = None) -> Tensor:
        """[B, N, C] before the output projection; ignored [B, N] bool, True = padding, or None."""
        counts = None if ignored is None else ~ignored[:, None, None]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=counts, dropout_p=dropout)
        return attended.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """linear, ReLU, dropout, linear; on [..., C]."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.linear1(tokens).relu()))


class EncoderBlock(nn.Module):
    """Self-attention of one kind, then an FFN.

    Args:
        kind: "intra": the tokens of each scale attend to that scale; "multi": all to all.
        scales: number of scales.
        share_self_attention, share_ffn: one set of weights for all scales, or one each. Unshared attention of kind
            "multi" projects each scale's tokens by that scale's weights; then all attend to all.
    """

    def __init__(
        self,
        kind: Kind,
        scales: int,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        share_self_attention: bool,
        share_ffn: bool,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.self_attn = nn.ModuleList(
            SelfAttention(dim, num_heads, dropout) for _ in range(1 if share_self_attention else scales)
        )
        self.ffn = nn.ModuleList(FeedForward(dim, ffn_dim, dropout) for _ in range(1 if share_ffn else scales))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, ignored: Sequence[Tensor | None], sizes: list[int]) -> Tensor:
        """[B, T, C] from tokens and positions [B, T, C].

        Args:
            ignored: for each scale [B, tokens of it] bool, True = padding, or None if there is none.
            sizes: number of tokens of each scale, T in sum.
        """
        tokens = self.norm1(tokens + self.dropout(self._attend(tokens, positions, ignored, sizes)))
        parts = _groups(tokens, self.ffn, sizes)
        update = _joined([ffn(part) for ffn, part in zip(self.ffn, parts, strict=True)], 1)
        return self.norm2(tokens + self.dropout(update))

    def _attend(self, tokens: Tensor, positions: Tensor, ignored: Sequence[Tensor | None], sizes: list[int]) -> Tensor:
        attentions = cast(Sequence[SelfAttention], self.self_attn)
        inputs = _groups(tokens, attentions, sizes), _groups(positions, attentions, sizes)
        projected = [attention.project(*parts) for attention, *parts in zip(attentions, *inputs, strict=True)]
        query, key, value = (_joined(parts, 2) for parts in zip(*projected, strict=True))
        attend = attentions[0].attend
        if self.kind == "multi" or len(sizes) == 1:
            attended = attend(query, key, value, _all_ignored(ignored, tokens, sizes))
        else:
            scales = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), ignored, strict=True)
            attended = torch.cat([attend(*scale) for scale in scales], 1)
        parts = _groups(attended, attentions, sizes)
        return _joined([attention.out_proj(part) for attention, part in zip(attentions, parts, strict=True)], 1)


class Encoder(nn.Module):
    """Encoder blocks one after the other; arguments as `EncoderBlock`."""

    def __init__(
        self,
        kinds: Sequence[Kind],
        scales: int,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        share_self_attention: bool,
        share_ffn: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(kind, scales, dim, num_heads, ffn_dim, dropout, share_self_attention, share_ffn)
            for kind in kinds
        )

    def forward(self, tokens: Tensor, positions: Tensor, ignored: Sequence[Tensor | None], sizes: list[int]) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, positions, ignored, sizes)
        return tokens


def encoder_kinds(encoder: str) -> list[Kind]:
    """The kinds of the blocks that a shorthand such as "6intra" or "2intra+1multi+2intra" stands for.

    Raises:
        ValueError: for anything else.
    """
    kinds: list[Kind] = []
    for part in encoder.split("+"):
        match = re.fullmatch(r"([1-9]\d*)(intra|multi)", part)
        if match is None:
            raise ValueError(f"encoder must be such as '2intra+1multi+2intra', got {encoder!r}")
        kinds += ["intra" if match[2] == "intra" else "multi"] * int(match[1])
    return kinds


def _groups(tokens: Tensor, modules: Sized, sizes: list[int]) -> Sequence[Tensor]:
    """Tokens [B, T, C] as one part for each module: all of them, or those of each scale."""
    return (tokens,) if len(modules) == 1 else tokens.split(sizes, 1)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _all_ignored(ignored: Sequence[Tensor | None], tokens: Tensor, sizes: list[int]) -> Tensor | None:
    if all(mask is None for mask in ignored):
        return None
    batch = tokens.shape[0]
    nothing = [tokens.new_zeros(batch, size, dtype=torch.bool) for size in sizes]
    return torch.cat([zeros if mask is None else mask for mask, zeros in zip(ignored, nothing, strict=True)], 1)
