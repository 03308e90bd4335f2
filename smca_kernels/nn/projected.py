"""Co-attention under a spatial prior of queries, keys and values that a host has projected by itself.

    prior  = SpatialPrior(prior_features)                      center, precision and scale weights of every query
    output = smca_attention(query, key, value, prior)                                                   (Eq. 5–9)

For decoders whose attention is more than the projections of nn.MultiheadAttention, such as Conditional DETR's.
Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from smca_kernels.attention import smca_attention
from smca_kernels.inputs import ValidShapes
from smca_kernels.nn.checks import check_floating, check_positive_int, check_probability, check_shape
from smca_kernels.nn.prior import SpatialPrior, SpatialPriorOutput


class ProjectedCoAttention(nn.Module):
    """Co-attention under a spatial prior, between a host's own projections: its parameters are those of the prior.

    Args:
        embed_dim: width E of the features that the prior is predicted from.
        num_heads: attention heads H.
        strides, geometry, modulation, scale_type, scale_selection, beta, predicts_center: as `SpatialPrior`.
        dropout: probability of dropping an attention weight while training, as nn.MultiheadAttention does.

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
    ) -> None:
        super().__init__()
        check_positive_int("num_heads", num_heads)
        check_probability("dropout", dropout)
        self.num_heads = num_heads
        self.dropout = float(dropout)
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

    def reset_parameters(self) -> None:
        """Call `SpatialPrior.reset_parameters`; after an initialisation that fills every matrix of a model."""
        self.prior.reset_parameters()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout:g}"

    def forward(
        self,
        query: Tensor,  # [B, N, H · D]
        key: Tensor,  # [B, T, H · D]
        value: Tensor,  # [B, T, H · D_v]
        spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
        *,
        prior_features: Tensor,  # [B, N, E]
        reference_logits: Tensor | None = None,  # [B, N, 2]
        image_sizes: Tensor | None = None,  # [B, 2]
        valid_shapes: ValidShapes | None = None,  # [B, S, 2]
        key_padding_mask: Tensor | None = None,  # [B, T]
        scale: float | None = None,
        mass_tolerance: float | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, SpatialPriorOutput]:
        """Attend, and return (output, prior); the output projection is the host's.

        Args:
            query: [B, N, H · D] projected object queries, the channels of a head side by side.
            key: [B, T, H · D] projected keys; the scales one after the other, row-major inside a scale,
                T = Σ height · width.
            value: [B, T, H · D_v] projected values; D_v may differ from D.
            spatial_shapes: (height, width) of each scale's grid, in cells.
            prior_features: [B, N, E], what the prior is predicted from. Geometry "official": tgt + query_pos from
                before the self-attention; "paper": the object queries with their position added, from after it.
            reference_logits, image_sizes, valid_shapes, key_padding_mask: as `SpatiallyModulatedCoAttention` takes
                them.
            scale, mass_tolerance, backend: as `smca_attention`.

        Returns:
            output [B, N, H · D_v], and the `SpatialPriorOutput` that it was computed with, whose reference_logits go to
            the next layers and to the box head.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape or range.
        """
        for name, tensor, length in (("query", query, "N"), ("key", key, "T"), ("value", value, "T")):
            check_shape(name, tensor, **{"B": None, length: None, "channels": None})
            check_floating(name, tensor)
            if tensor.shape[2] % self.num_heads:
                raise ValueError(
                    f"{name} must have a multiple of num_heads={self.num_heads} channels, got {list(tensor.shape)}"
                )
        batch, queries, _ = query.shape
        check_shape("prior_features", prior_features, B=batch, N=queries, E=self.prior.embed_dim)
        check_floating("prior_features", prior_features)
        prior: SpatialPriorOutput = self.prior(
            prior_features,
            spatial_shapes,
            reference_logits=reference_logits,
            image_sizes=image_sizes,
            valid_shapes=valid_shapes,
            key_padding_mask=key_padding_mask,
            backend=backend,
        )
        output = smca_attention(
            self._heads(query),
            self._heads(key),
            self._heads(value),
            prior.center,
            prior.precision,
            spatial_shapes,
            prior.scale_weights,
            valid_shapes=valid_shapes,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
            mass_tolerance=mass_tolerance,
            backend=backend,
        )
        return output.transpose(1, 2).flatten(2), prior

    def _heads(self, tensor: Tensor) -> Tensor:
        """[B, length, H · D] → [B, H, length, D], a view."""
        return tensor.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def boxes_around(box_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Boxes [..., N, 4] = sigmoid(box_logits + [reference_logits, 0, 0]), as (x, y, width, height) in 0…1 (Eq. 12).

    Args:
        box_logits: [..., B, N, 4], outputs of the box head, such as those of all layers [L, B, N, 4].
        reference_logits: [B, N, 2], as `SpatialPriorOutput` has them.

    Returns:
        [..., B, N, 4] in the wider of both dtypes.

    Raises:
        TypeError, ValueError: for an argument of wrong type or shape.
    """
    check_shape("reference_logits", reference_logits, B=None, N=None, xy=2)
    if not isinstance(box_logits, Tensor):
        raise TypeError(f"box_logits must be a tensor, got {type(box_logits).__name__}")
    batch, queries = reference_logits.shape[:2]
    if box_logits.shape[-3:] != (batch, queries, 4):
        raise ValueError(f"box_logits must be [..., B={batch}, N={queries}, 4], got {list(box_logits.shape)}")
    return (box_logits + F.pad(reference_logits, (0, 2))).sigmoid()
