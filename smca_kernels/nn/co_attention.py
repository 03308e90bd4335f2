"""SMCA as modules: where each query looks (`SpatialPrior`), and the co-attention that looks there.

Two geometries, `paper` and `official`, are laid side by side in docs/geometries.md.
Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smca_kernels.attention import attention_map, smca_attention
from smca_kernels.backends import BACKENDS
from smca_kernels.backends import reaches_tensor_cores as _has_triton_tensor_cores
from smca_kernels.inputs import MAX_HEAD_DIM, MAX_SCALES, SpatialShapes
from smca_kernels.inputs import check_spatial_shapes as _grids
from smca_kernels.inputs import check_valid_shapes as _valid_shapes

GEOMETRIES = ("official", "paper")
MODULATIONS = ("per_head", "shared", "none")
SCALE_TYPES = ("independent", "single", "fixed")

CENTER_MLP_DEPTH = {"paper": 2, "official": 3}
# The stride at which the official precision s²·c/β has c = 1 when there are several scales.
REFERENCE_STRIDE = 32
# Eq. 4 divides by s². This floor, σ = 0.06 cells at β = 8, is narrower than any cell and keeps 1/s² finite.
MIN_SQUARED_OBJECT_SCALE = 1e-3

# The authors' decoder layer → ours. Outputs are ordered (scale, head, xy) in both, so only names change.
OFFICIAL_NAMES = {
    "multihead_attn.": "",
    "norm4.": "prior.norm.",
    "point1.layers.0.": "prior.center_mlp.0.",
    "point1.layers.1.": "prior.center_mlp.2.",
    "point1.layers.2.": "prior.center_mlp.4.",
    "point2.": "prior.offset.",
    "point3.": "prior.object_scale.",
    "point4.": "prior.scale_selection.",
}

ValidShapes = Tensor | Sequence[Sequence[Sequence[int]]]  # a tensor [B, S, 2] or a nested list


class SpatialPriorOutput(NamedTuple):
    """Where each query looks, as `smca_attention` takes it, and the point its box is predicted from.

    H is the number of heads for modulation `per_head`, else 1.

    Attributes:
        center: [B, H, N, S, 2], (x, y) in cells of each scale's own grid.
        precision: [B, H, N, S, 2], (p_x, p_y) per cell²: σ = 1 / √(2 p) cells.
        scale_weights: [B, 1, N, S], sums to 1 over the scales; None without scale selection.
        reference_logits: [B, N, 2], (x, y) before the sigmoid, for the next layers and for the box head:
            box = sigmoid(box_mlp(h) + [reference_logits, 0, 0]) (Eq. 12).
    """

    center: Tensor
    precision: Tensor
    scale_weights: Tensor | None
    reference_logits: Tensor


class SpatialPrior(nn.Module):
    """Predicts centre, precision and scale weights of every query's spatial prior from its features.

    Args:
        embed_dim: width E of the query features.
        num_heads: attention heads H; they have maps of their own with modulation `per_head`.
        strides: for each of the 1 to 8 scales, pixels per cell.
        geometry: "official" (precision s²·c/β, layer norm on the features, 3-layer centre MLP) or
            "paper" (precision 1/(β s²), no norm, 2-layer centre MLP).
        modulation: "per_head" (Eq. 6), "shared" (one map for all heads, Eq. 5) or "none" (precision 0).
        scale_type: object scale s "independent" in x and y, "single" for both, or "fixed" at 1.
        scale_selection: weigh the scales per query (Eq. 7–9); with one scale there is nothing to select.
        beta: β of the precision.
        predicts_center: False for a layer that is always given `reference_logits`: it gets no centre MLP.

    The outputs are at least float32 whatever the dtype of features and parameters; autocast is off inside.

    Raises:
        TypeError, ValueError: for an argument of wrong type or range.

    Source: Eq. 3–9, and the authors' released code for the official geometry.
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
    ) -> None:
        super().__init__()
        _check_positive_int("embed_dim", embed_dim)
        _check_positive_int("num_heads", num_heads)
        _check_choice("geometry", geometry, GEOMETRIES)
        _check_choice("modulation", modulation, MODULATIONS)
        _check_choice("scale_type", scale_type, SCALE_TYPES)
        _check_positive_number("beta", beta)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.strides = _checked_strides(strides)
        self.geometry = geometry
        self.modulation = modulation
        self.scale_type = scale_type
        self.beta = float(beta)

        scales = len(self.strides)
        modulated = modulation != "none"
        self.map_heads = num_heads if modulation == "per_head" else 1
        self.axes = {"independent": 2, "single": 1, "fixed": 0}[scale_type] if modulated else 0
        centered = modulated and predicts_center
        self.center_mlp = _mlp(embed_dim, CENTER_MLP_DEPTH[geometry]) if centered else None
        self.offset = nn.Linear(embed_dim, scales * num_heads * 2) if modulation == "per_head" else None
        self.object_scale = nn.Linear(embed_dim, scales * self.map_heads * self.axes) if self.axes else None
        self.scale_selection = nn.Linear(embed_dim, scales) if scale_selection and scales > 1 else None
        self.norm = nn.LayerNorm(embed_dim) if geometry == "official" and self.uses_features else None
        self.reset_parameters()

    @property
    def uses_features(self) -> bool:
        """Whether anything is predicted from the features, so that their values matter."""
        predictors = (self.center_mlp, self.offset, self.object_scale, self.scale_selection)
        return any(predictor is not None for predictor in predictors)

    def reset_parameters(self) -> None:
        """Xavier weights; s = 1 for every query (σ = 2 cells at β = 8), so that early gradients reach far.

        Call it again after any initialisation that fills every matrix of a model, as DETR's does.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight)
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.object_scale is not None:
            nn.init.zeros_(self.object_scale.weight)
            nn.init.ones_(self.object_scale.bias)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, strides={self.strides}, "
            f"geometry={self.geometry!r}, modulation={self.modulation!r}, scale_type={self.scale_type!r}, "
            f"beta={self.beta:g}"
        )

    def forward(
        self,
        features: Tensor,  # [B, N, E]
        spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
        *,
        reference_logits: Tensor | None = None,  # [B, N, 2]
        image_sizes: Tensor | None = None,  # [B, 2]
        valid_shapes: ValidShapes | None = None,  # [B, S, 2]
        key_padding_mask: Tensor | None = None,  # [B, T]
        backend: str = "auto",
    ) -> SpatialPriorOutput:
        """The prior of every query; a centre of 0…1 is spread over the part of each grid that is image.

        The first of these that is given says how large that part is: `image_sizes` / stride, `valid_shapes`,
        the rows and columns that `key_padding_mask` leaves, the whole grid.

        Args:
            features: [B, N, E], what the prior is predicted from. Paper: the query. Official: tgt + query_pos
                before self-attention; the layer norm is applied here.
            spatial_shapes: (height, width) of each scale's grid, in cells.
            reference_logits: [B, N, 2] from an earlier layer, used instead of predicting the centre.
            image_sizes: [B, 2], (height, width) of each image in pixels, without padding.
            valid_shapes: [B, S, 2], (height, width) in cells of the part of each grid that is image.
            key_padding_mask: [B, T] bool, True = padding.
            backend: "triton" computes everything after the linear layers in one launch, "sdpa" and "reference" in
                PyTorch, and "auto" by Triton where `smca_attention` would. Modulation "none" has nothing to fuse.

        Returns:
            center, precision, scale_weights and reference_logits; see `SpatialPriorOutput`. With modulation
            "none" precision is 0, and reference_logits are 0 unless given.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape or device, for missing reference_logits,
                and for backend "triton" where it can't serve.
        """
        _check_shape("features", features, B=None, N=None, E=self.embed_dim)
        _check_floating("features", features)
        batch, queries = features.shape[0], features.shape[1]
        if reference_logits is not None:
            _check_shape("reference_logits", reference_logits, B=batch, N=queries, xy=2)
            _check_floating("reference_logits", reference_logits)
            _check_device("reference_logits", reference_logits, features.device)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
        shapes = _grids(spatial_shapes)
        if len(shapes) != len(self.strides):
            raise ValueError(
                f"spatial_shapes must have one (height, width) a stride, strides {self.strides}, got {shapes}"
            )
        with _autocast_off(features.device.type):
            if self.norm is not None:
                features = self.norm(features.to(self.norm.weight.dtype))
            offset, object_scale, selection = (
                None if predictor is None else _predict(predictor, features)
                for predictor in (self.offset, self.object_scale, self.scale_selection)
            )
            if self.modulation == "none":
                if reference_logits is None:
                    reference_logits = _at_least_float32(features).new_zeros(batch, queries, 2)
                center = reference_logits.new_zeros(batch, 1, queries, len(self.strides), 2)
                scale_weights = _selected(selection)
                return SpatialPriorOutput(center, torch.zeros_like(center), scale_weights, reference_logits)
            if reference_logits is None:
                if self.center_mlp is None:
                    raise ValueError(
                        "reference_logits must be given to a prior made with predicts_center=False, got None"
                    )
                reference_logits = _predict(self.center_mlp, features)
            part = self._image_part(features, shapes, image_sizes, valid_shapes, key_padding_mask)
            return self._locate(reference_logits, offset, object_scale, selection, *part, shapes, backend)

    def _locate(
        self,
        reference_logits: Tensor,  # [B, N, 2]
        offset: Tensor | None,  # [B, N, S · map_heads · 2]
        object_scale: Tensor | None,  # [B, N, S · map_heads · axes]
        selection: Tensor | None,  # [B, N, S]
        image_sizes: Tensor | None,  # [B, 2]
        cells: Tensor | None,  # [B, S, 2]
        shapes: SpatialShapes,
        backend: str,
    ) -> SpatialPriorOutput:
        """The prior from the outputs of the linear layers, by kernels/prior.py or by what defines it."""
        raw = (reference_logits, offset, object_scale, selection)
        fused = _fused_prior(backend, [tensor for tensor in raw if tensor is not None], image_sizes)
        if fused is not None:
            floor = MIN_SQUARED_OBJECT_SCALE if self.geometry == "paper" else None
            center, precision, scale_weights, reference_logits = fused.prior(
                *raw, image_sizes, cells, shapes, self.strides, self._factors(), floor, self.map_heads
            )
            return SpatialPriorOutput(center, precision, scale_weights, reference_logits)
        extent = self._extent(reference_logits, shapes, image_sizes, cells)
        reference_logits = _at_least_float32(reference_logits)
        center = (reference_logits.sigmoid().unsqueeze(2) * extent.unsqueeze(1)).unsqueeze(1)
        if offset is not None:
            center = center + self._per_map(_at_least_float32(offset), 2)
        precision = self._precision(object_scale, center)
        return SpatialPriorOutput(center, precision, _selected(selection), reference_logits)

    def _per_map(self, outputs: Tensor, axes: int) -> Tensor:
        """[B, N, S · map_heads · axes] → [B, map_heads, N, S, axes]."""
        batch, queries, _ = outputs.shape
        return outputs.view(batch, queries, len(self.strides), self.map_heads, axes).permute(0, 3, 1, 2, 4)

    def _precision(self, object_scale: Tensor | None, like: Tensor) -> Tensor:
        """[B, map_heads, N, S, 2] per cell², from the object scale s by Eq. 4 or the official form of it."""
        if object_scale is None:
            squared_scale = like.new_ones(()).expand(like.shape)
        else:
            squared_scale = self._per_map(_at_least_float32(object_scale), self.axes).square().expand_as(like)
        if self.geometry == "paper":
            return 1.0 / (self.beta * squared_scale.clamp(min=MIN_SQUARED_OBJECT_SCALE))
        if len(self.strides) == 1:
            return squared_scale / self.beta
        return squared_scale * _vector(self._factors(), like).unsqueeze(-1)

    def _factors(self) -> list[float]:
        """Precision of each scale at s = 1."""
        if self.geometry == "paper" or len(self.strides) == 1:
            return [1.0 / self.beta] * len(self.strides)
        return [stride / REFERENCE_STRIDE / self.beta for stride in self.strides]

    def _image_part(
        self,
        features: Tensor,
        shapes: SpatialShapes,
        image_sizes: Tensor | None,
        valid_shapes: ValidShapes | None,
        key_padding_mask: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(height, width) of the part that is image: image_sizes [B, 2] in pixels, or cells [B, S, 2], or neither."""
        batch = features.shape[0]
        if image_sizes is not None:
            _check_shape("image_sizes", image_sizes, B=batch, height_width=2)
            _check_device("image_sizes", image_sizes, features.device)
            return image_sizes, None
        if valid_shapes is not None:
            return None, _valid_shapes(valid_shapes, batch, shapes, features.device)
        if key_padding_mask is not None:
            return None, _cells_left_by(key_padding_mask, shapes, batch, features.device)
        return None, None

    def _extent(
        self, logits: Tensor, shapes: SpatialShapes, image_sizes: Tensor | None, cells: Tensor | None
    ) -> Tensor:
        """(width, height) in cells of the part of each grid that is image, [B or 1, S, 2], as logits but float32."""
        like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        if image_sizes is not None:
            return image_sizes.to(like.dtype).flip(-1).unsqueeze(1) / _vector(self.strides, like).unsqueeze(-1)
        if cells is not None:
            return cells.to(like.dtype).flip(-1)
        heights, widths = zip(*shapes, strict=True)
        return torch.stack((_vector(widths, like), _vector(heights, like)), -1).unsqueeze(0)


class SpatiallyModulatedCoAttention(nn.Module):
    """Co-attention of queries to image features under a spatial prior, in nn.MultiheadAttention's place.

    The projections carry nn.MultiheadAttention's parameter names (in_proj_weight, in_proj_bias,
    out_proj.weight, out_proj.bias), so its state dict loads: with `load_multihead_attention`, or with
    load_state_dict where modulation "none" and one scale leave no other parameters. Those of the
    `SpatialPrior` follow under ``prior.``.

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
        _check_positive_int("embed_dim", embed_dim)
        _check_positive_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads={num_heads}, got {embed_dim}")
        if embed_dim // num_heads > MAX_HEAD_DIM:
            raise ValueError(
                f"embed_dim must be at most {MAX_HEAD_DIM} per head, got {embed_dim} for {num_heads} heads"
            )
        _check_number("dropout", dropout)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = float(dropout)
        self.batch_first = batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
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
        """Xavier projections with zero biases, as DETR has them, and `SpatialPrior.reset_parameters`.

        Call it again after any initialisation that fills every matrix of a model, as DETR's does.
        """
        self._reset_projections()
        self.prior.reset_parameters()

    def _reset_projections(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

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
        """Attend; returns (output, prior), so that ``[0]`` reads as it does after nn.MultiheadAttention.

        Args:
            query: [N, B, E] object queries with their position added.
            key: [T, B, E] image features with their position added; the scales one after the other, row-major
                inside a scale, T = Σ height · width.
            value: [T, B, E] image features.
            spatial_shapes: (height, width) of each scale's grid, in cells.
            prior_features: what the prior is predicted from, shaped as query. Geometry "official": tgt +
                query_pos from before the self-attention, and it must be given. "paper": None is the query.
            reference_logits: [B, N, 2] from the first layer's prior, used instead of predicting the centre.
            image_sizes: [B, 2], (height, width) of each image in pixels, without padding. None: whole cells,
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
        """Attention of chosen queries over the grid of each scale, for pictures; without gradient or dropout.

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
            ValueError: when a projection is missing or the state holds anything else.
            RuntimeError: when a shape differs.
        """
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
        """A layer with the parameters of one decoder layer of the authors' released model.

        Scale type (their type1, type2, type3), scale selection and whether the layer predicts the centre are
        told from the parameters; heads, strides and β are not in them.

        Args:
            state: the authors' state dict (``checkpoint["model"]``).
            prefix: what stands before ``multihead_attn.`` in its keys, for the decoder layer wanted.
            num_heads, strides, beta: as the model was trained; the released multi-scale model has strides
                (16, 16, 32, 64).
            dropout, batch_first: as the constructor.

        Raises:
            ValueError: for parameters that fit no supported layer of that many heads and scales.
        """
        renamed = official_layer_state(state, prefix)
        scales = len(_checked_strides(strides))
        offsets = renamed["prior.offset.bias"].shape[0]
        if offsets != 2 * num_heads * scales:
            raise ValueError(
                f"{prefix}point2 must have 2 · num_heads={num_heads} · scales={scales} outputs, got {offsets}"
            )
        scale_type = "fixed"
        if "prior.object_scale.bias" in renamed:
            outputs = renamed["prior.object_scale.bias"].shape[0]
            scale_types = {num_heads * scales: "single", 2 * num_heads * scales: "independent"}
            if outputs not in scale_types:
                raise ValueError(
                    f"{prefix}point3 must have num_heads={num_heads} · scales={scales} outputs (type2) or "
                    f"twice as many (type3), got {outputs}"
                )
            scale_type = scale_types[outputs]
        layer = cls(
            renamed["in_proj_weight"].shape[1],
            num_heads,
            strides,
            geometry="official",
            modulation="per_head",
            scale_type=scale_type,
            scale_selection="prior.scale_selection.weight" in renamed,
            beta=beta,
            predicts_center="prior.center_mlp.0.weight" in renamed,
            dropout=dropout,
            batch_first=batch_first,
        )
        layer.load_state_dict(renamed)
        return layer

    def _prior(
        self,
        query: Tensor,
        features: Tensor | None,
        spatial_shapes: Sequence[Sequence[int]],
        **placement: Any,
    ) -> SpatialPriorOutput:
        self._check_sequence("query", query)
        if features is None:
            if self.prior.geometry == "official" and self.prior.uses_features:
                raise ValueError(
                    "prior_features must be given with geometry='official': tgt + query_pos from before the "
                    "self-attention, shaped as query; got None"
                )
            features = query
        elif features.shape != query.shape:
            expected, got = list(query.shape), list(features.shape)
            raise ValueError(f"prior_features must be shaped as query {expected}, got {got}")
        features = features if self.batch_first else features.transpose(0, 1)
        prior: SpatialPriorOutput = self.prior(features, spatial_shapes, **placement)
        return prior

    def _project(self, tensor: Tensor, part: int) -> Tensor:
        """The queries (part 0), keys (1) or values (2) as [B, H, length, D], a view of the product."""
        weight, bias = self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part]
        head_dim = self.embed_dim // self.num_heads
        heads = F.linear(tensor, weight, bias).view(*tensor.shape[:2], self.num_heads, head_dim)
        return heads.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))

    def _check_sequence(self, name: str, tensor: Tensor, batch: int | None = None) -> None:
        """batch None: any."""
        length = "N" if name == "query" else "T"
        axes = {"B": batch, length: None} if self.batch_first else {length: None, "B": batch}
        _check_shape(name, tensor, **axes, E=self.embed_dim)
        _check_floating(name, tensor)


def official_layer_state(
    state: Mapping[str, Tensor], prefix: str = "transformer.decoder.layers.0."
) -> dict[str, Tensor]:
    """The co-attention and prior parameters of one decoder layer of the authors' model, under our names.

    Args:
        state: the authors' state dict (``checkpoint["model"]``).
        prefix: what stands before ``multihead_attn.`` in its keys, for the decoder layer wanted.

    Returns:
        A state dict for a `SpatiallyModulatedCoAttention` of the same configuration; tensors are not copied.

    Raises:
        ValueError: when the co-attention, norm4 or point2 is not there.
    """
    renamed = {
        ours + name.removeprefix(prefix + theirs): tensor
        for name, tensor in state.items()
        for theirs, ours in OFFICIAL_NAMES.items()
        if name.startswith(prefix + theirs)
    }
    modules = ("in_proj_", "out_proj.", "prior.norm.", "prior.offset.")
    required = [module + parameter for module in modules for parameter in ("weight", "bias")]
    missing = [name for name in required if name not in renamed]
    if missing:
        raise ValueError(
            f"state must hold multihead_attn, norm4 and point2 under the prefix {prefix!r}, "
            f"missing: {', '.join(missing)}"
        )
    return renamed


def _mlp(width: int, depth: int) -> nn.Sequential:
    """depth linear layers of equal width with ReLU between them, the last with two outputs."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def _predict(module: nn.Module, features: Tensor) -> Tensor:
    """In the dtype of the parameters, whatever that of the features."""
    outputs: Tensor = module(features.to(next(module.parameters()).dtype))
    return outputs


def _selected(logits: Tensor | None) -> Tensor | None:
    """Scale weights [B, 1, N, S]."""
    return None if logits is None else _at_least_float32(logits).softmax(-1).unsqueeze(1)


def _fused_prior(backend: str, raw: Sequence[Tensor], image_sizes: Tensor | None) -> ModuleType | None:
    """kernels/prior.py if it is to compute the prior from these projections, None if PyTorch is."""
    device = raw[0].device
    if backend in ("sdpa", "reference"):
        return None
    if backend == "auto" and not (device.type == "cuda" and _has_triton_tensor_cores(device)):
        return None
    try:
        from smca_kernels.backends.triton import prior  # Triton is imported only where it is wanted
    except ImportError as error:
        reason: str | None = f"it can't be imported here ({error})"
    else:
        reason = prior.unsupported(raw, image_sizes)
    if reason is None:
        return prior
    if backend == "triton":
        raise ValueError(f"backend='triton' can't serve this call: {reason}")
    return None


def _at_least_float32(tensor: Tensor) -> Tensor:
    """In half precision a centre of 100 cells would be 0.1 cells off."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _vector(values: Sequence[float], like: Tensor) -> Tensor:
    """Filled on like's device: torch.tensor would copy from the host, which CUDA-graph capture forbids."""
    return torch.stack([like.new_full((), value) for value in values])


def _cells_left_by(key_padding_mask: Tensor, shapes: SpatialShapes, batch: int, device: torch.device) -> Tensor:
    """(height, width) [B, S, 2]: how many rows and columns of each grid have a key that counts."""
    sizes = [height * width for height, width in shapes]
    _check_shape("key_padding_mask", key_padding_mask, B=batch, T=sum(sizes))
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be a torch.bool tensor, got {key_padding_mask.dtype}")
    _check_device("key_padding_mask", key_padding_mask, device)
    cells = []
    for ignored, (height, width) in zip(torch.split(key_padding_mask, sizes, dim=1), shapes, strict=True):
        counts = ~ignored.reshape(batch, height, width)
        cells.append(torch.stack((counts.any(2).sum(-1), counts.any(1).sum(-1)), -1))
    return torch.stack(cells, 1)


def _autocast_off(device_type: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check_shape(name: str, tensor: Any, **axes: int | None) -> None:
    """axes: length of each axis in order, None where any will do."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(axes) and all(
        size is None or actual == size for actual, size in zip(tensor.shape, axes.values(), strict=True)
    )
    if not fits:
        # Only here: formatting a size while tracing would fix it.
        expected = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{name} must be [{expected}], got {list(tensor.shape)}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as features, got {tensor.device}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_positive_number(name: str, value: float) -> None:
    _check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def _checked_strides(strides: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(strides, Sequence):
        raise TypeError(f"strides must be a sequence of pixels per cell, got {type(strides).__name__}")
    if not 1 <= len(strides) <= MAX_SCALES:
        raise ValueError(f"strides must have 1 to {MAX_SCALES} scales, got {len(strides)}")
    for s, stride in enumerate(strides):
        _check_positive_number(f"strides[{s}]", stride)
    return tuple(strides)
