"""Co-attention under a spatial prior, as a layer that takes nn.MultiheadAttention's place in a DETR decoder.

    prior  = SpatialPrior(prior_features)                      center, precision and scale weights of every query
    output = out_proj( smca_attention(W_q query, W_k key, W_v value, prior) )                           (Eq. 5–9)

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smca_kernels.attention import attention_map, smca_attention
from smca_kernels.inputs import MAX_HEAD_DIM, ValidShapes
from smca_kernels.nn.checks import (
    check_bool,
    check_floating,
    check_positive_int,
    check_probability,
    check_shape,
    check_state_dict,
)
from smca_kernels.nn.linear import OutputProjection
from smca_kernels.nn.official import official_layer_options, official_layer_state
from smca_kernels.nn.prior import SpatialPrior, SpatialPriorOutput


class SpatiallyModulatedCoAttention(nn.Module):
    """Co-attention of queries to image features under a spatial prior, in nn.MultiheadAttention's place.

    The projections carry nn.MultiheadAttention's parameter names (in_proj_weight, in_proj_bias,
    out_proj.weight, out_proj.bias), so its state dict loads: with `load_multihead_attention`, or with
    load_state_dict where modulation "none" and one scale leave no other parameters. The parameters of the
    `SpatialPrior` have names that begin with ``prior.``.

    Args:
        embed_dim: width E of queries, keys and values; a multiple of num_heads, at most 128 per head.
        num_heads: attention heads H.
        strides, geometry, modulation, scale_type, scale_selection, beta, predicts_center: as `SpatialPrior`.
        dropout: probability of dropping an attention weight while training, as nn.MultiheadAttention does.
        batch_first: inputs and output are [B, N, E] instead of [N, B, E], as in nn.MultiheadAttention.

    Raises:
        TypeError, ValueError: for an argument of wrong type or range.

    Source: Eq. 5–9.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        strides: Sequence[float] = (32,),
        *,
        geometry: str = "official",
        modulation: str = "per_head",
        scale_type: str = "independent",
        scale_selection: bool = True,
        beta: float = 8.0,
        predicts_center: bool = True,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        check_positive_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads={num_heads}, got {embed_dim}")
        if embed_dim // num_heads > MAX_HEAD_DIM:
            raise ValueError(
                f"embed_dim must be at most {MAX_HEAD_DIM} per head, got {embed_dim} for {num_heads} heads"
            )
        check_probability("dropout", dropout)
        check_bool("batch_first", batch_first)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = float(dropout)
        self.batch_first = batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = OutputProjection(embed_dim, embed_dim)
        self.prior = SpatialPrior(
            embed_dim,
            num_heads,
            strides,
            geometry=geometry,
            modulation=modulation,
            scale_type=scale_type,
            scale_selection=scale_selection,
            beta=beta,
            predicts_center=predicts_center,
        )
        self._reset_projections()

    def reset_parameters(self) -> None:
        """Set Xavier projections with zero biases, as DETR has them, and call `SpatialPrior.reset_parameters`.

        Call it again after any initialisation that fills every matrix of a model, as DETR's does.
        """
        self._reset_projections()
        self.out_proj.reset_parameters()
        self.prior.reset_parameters()

    def _reset_projections(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout:g}, "
            f"batch_first={self.batch_first}"
        )

    def forward(
        self,
        query: Tensor,  # [N, B, E], or [B, N, E] if batch_first
        key: Tensor,  # [T, B, E], or [B, T, E] if batch_first
        value: Tensor,  # [T, B, E], or [B, T, E] if batch_first
        spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
        *,
        prior_features: Tensor | None = None,  # [N, B, E], or [B, N, E] if batch_first
        reference_logits: Tensor | None = None,  # [B, N, 2]
        image_sizes: Tensor | None = None,  # [B, 2]
        valid_shapes: ValidShapes | None = None,  # [B, S, 2]
        key_padding_mask: Tensor | None = None,  # [B, T]
        mass_tolerance: float | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, SpatialPriorOutput]:
        """Attend, and return (output, prior): ``[0]`` reads as it does after nn.MultiheadAttention.

        Args:
            query: [N, B, E] object queries with their position added.
            key: [T, B, E] image features with their position added; the scales one after the other, row-major
                inside a scale, T = Σ height · width.
            value: [T, B, E] image features.
            spatial_shapes: (height, width) of each scale's grid, in cells.
            prior_features: what the prior is predicted from, shaped as query. Geometry "official": tgt +
                query_pos from before the self-attention, and it must be given. "paper": None is the query.
            reference_logits: [B, N, 2] from the first layer's prior, used instead of predicting the centre.
            image_sizes: [B, 2], (height, width) of each image in pixels, without padding. None: in whole cells,
                from valid_shapes, else key_padding_mask, else spatial_shapes.
            valid_shapes: [B, S, 2], (height, width) in cells of the top-left part of each grid that is image.
            key_padding_mask: [B, T] bool, True = ignore. Not together with valid_shapes, which is faster.
            mass_tolerance: as `smca_attention`.
            backend: as `smca_attention`; also that of the prior.

        Returns:
            output [N, B, E] (or [B, N, E]), and the `SpatialPriorOutput` that it was computed with, whose
            reference_logits go to the next layers and to the box head.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape or range.
        """
        prior = self._prior(
            query,
            prior_features,
            spatial_shapes,
            reference_logits=reference_logits,
            image_sizes=image_sizes,
            valid_shapes=valid_shapes,
            key_padding_mask=key_padding_mask,
            backend=backend,
        )
        batch = prior.center.shape[0]
        self._check_sequence("key", key, batch)
        self._check_sequence("value", value, batch)
        output = smca_attention(
            self._project(query, 0),
            self._project(key, 1),
            self._project(value, 2),
            prior.center,
            prior.precision,
            spatial_shapes,
            prior.scale_weights,
            valid_shapes=valid_shapes,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            mass_tolerance=mass_tolerance,
            backend=backend,
        )
        output = output.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(2)
        return self.out_proj(output), prior

    def attention_map(
        self,
        query: Tensor,  # [N, B, E], or [B, N, E] if batch_first
        key: Tensor,  # [T, B, E], or [B, T, E] if batch_first
        spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
        *,
        queries: Tensor | Sequence[int] | None = None,  # [n]
        prior_features: Tensor | None = None,  # [N, B, E], or [B, N, E] if batch_first
        reference_logits: Tensor | None = None,  # [B, N, 2]
        image_sizes: Tensor | None = None,  # [B, 2]
        valid_shapes: ValidShapes | None = None,  # [B, S, 2]
        key_padding_mask: Tensor | None = None,  # [B, T]
    ) -> list[Tensor]:
        """Compute the attention of chosen queries over the grid of each scale, for pictures: no gradient, no dropout.

        Args:
            queries: indices of the n queries wanted; None: all N.
            Others as `forward`.

        Returns:
            For each scale [B, H, n, height, width], which sums to 1 over the grid: no scale weights.

        Raises:
            As `forward`; IndexError for a query index outside [-N, N).
        """
        with torch.no_grad():
            prior = self._prior(
                query,
                prior_features,
                spatial_shapes,
                reference_logits=reference_logits,
                image_sizes=image_sizes,
                valid_shapes=valid_shapes,
                key_padding_mask=key_padding_mask,
            )
            self._check_sequence("key", key, prior.center.shape[0])
            return attention_map(
                self._project(query, 0),
                self._project(key, 1),
                prior.center,
                prior.precision,
                spatial_shapes,
                queries=queries,
                valid_shapes=valid_shapes,
                key_padding_mask=key_padding_mask,
            )

    def load_multihead_attention(self, state: Mapping[str, Tensor]) -> None:
        """Copy the projections from a state dict of nn.MultiheadAttention; the prior stays as it is.

        Args:
            state: ``multihead_attention.state_dict()``, of equal embed_dim; bias=False, kdim, vdim and
                add_bias_kv are not supported.

        Raises:
            TypeError: for anything but a state dict.
            ValueError: when a projection is missing or the state holds anything else.
            RuntimeError: when a shape differs.
        """
        check_state_dict("state", state)
        expected = {name for name in self.state_dict() if not name.startswith("prior.")}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        self.load_state_dict(state, strict=False)

    @classmethod
    def from_official_layer(
        cls,
        state: Mapping[str, Tensor],
        prefix: str = "transformer.decoder.layers.0.",
        *,
        num_heads: int = 8,
        strides: Sequence[float] = (32,),
        beta: float = 8.0,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> SpatiallyModulatedCoAttention:
        """Make a layer with the parameters of one decoder layer of the authors' released model.

        The parameters show the scale type (the authors' type1, type2 or type3), whether there is a scale selection
        and whether the layer predicts the centre. Heads, strides and β are not in them.

        Args:
            state: the authors' state dict (``checkpoint["model"]``).
            prefix: what stands before ``multihead_attn.`` in its keys, for the decoder layer wanted.
            num_heads, strides, beta: as the model was trained; the released multi-scale model has strides
                (16, 16, 32, 64).
            dropout, batch_first: as the constructor.

        Raises:
            TypeError: for anything but a state dict.
            ValueError: for parameters that fit no supported layer of that many heads and scales.
        """
        renamed = official_layer_state(state, prefix)
        options = official_layer_options(renamed, prefix, num_heads, strides)
        layer = cls(**options, beta=beta, dropout=dropout, batch_first=batch_first)
        try:
            layer.load_state_dict(renamed)
        except RuntimeError as error:
            raise ValueError(
                f"state must hold a supported decoder layer under the prefix {prefix!r}: {error}"
            ) from None
        return layer

    def _prior(
        self,
        query: Tensor,
        features: Tensor | None,
        spatial_shapes: Sequence[Sequence[int]],
        **others: Any,
    ) -> SpatialPriorOutput:
        """Predict the prior; `others` are the remaining arguments of `SpatialPrior`."""
        self._check_sequence("query", query)
        if features is None:
            if self.prior.geometry == "official" and self.prior.uses_features:
                raise ValueError(
                    "prior_features must be given with geometry='official': tgt + query_pos from before the "
                    "self-attention, shaped as query; got None"
                )
            features = query
        elif not isinstance(features, Tensor):
            raise TypeError(f"prior_features must be a tensor shaped as query, got {type(features).__name__}")
        elif features.shape != query.shape:
            expected, got = list(query.shape), list(features.shape)
            raise ValueError(f"prior_features must be shaped as query {expected}, got {got}")
        check_floating("prior_features", features)
        features = features if self.batch_first else features.transpose(0, 1)
        prior: SpatialPriorOutput = self.prior(features, spatial_shapes, **others)
        return prior

    def _project(self, tensor: Tensor, part: int) -> Tensor:
        """Project to queries (part 0), keys (1) or values (2), as a view [B, H, length, D] of the product."""
        weight, bias = self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part]
        head_dim = self.embed_dim // self.num_heads
        heads = F.linear(tensor, weight, bias).view(*tensor.shape[:2], self.num_heads, head_dim)
        return heads.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))

    def _check_sequence(self, name: str, tensor: Tensor, batch: int | None = None) -> None:
        """Check a [B, length, E] or [length, B, E] of a floating dtype; without `batch`, of any batch size."""
        length = "N" if name == "query" else "T"
        axes = {"B": batch, length: None} if self.batch_first else {length: None, "B": batch}
        check_shape(name, tensor, **axes, E=self.embed_dim)
        check_floating(name, tensor)
