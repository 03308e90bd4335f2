"""Spatial prior: where each query looks, predicted from its features by a few linear layers.

    center    = sigmoid(center_mlp(h)) · (width, height) of the image in cells + offset(h)      of each head and scale
    precision = 1 / (β s²)  "paper" (Eq. 4), or  s² · c / β  "official",   s = object_scale(h)
    weights   = softmax over the scales of scale_selection(h)                                   (Eq. 7–9)

The two geometries are laid side by side in docs/geometries.md. Everything after the linear layers is computed by one
launch of backends/triton/prior.py where that can serve, else by the PyTorch below, which defines it.
Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smca_kernels.autocast import autocast_off
from smca_kernels.backends import BACKENDS, check_triton
from smca_kernels.backends.devices import reaches_tensor_cores
from smca_kernels.inputs import SpatialShapes, ValidShapes, check_spatial_shapes, check_valid_shapes
from smca_kernels.nn.checks import (
    check_bool,
    check_choice,
    check_device_of_features,
    check_floating,
    check_padding_mask,
    check_positive_int,
    check_positive_number,
    check_shape,
    check_strides,
)
from smca_kernels.nn.linear import UnitLinear, XavierLinear, in_computing_dtype

GEOMETRIES = ("official", "paper")
MODULATIONS = ("per_head", "shared", "none")
SCALE_TYPES = ("independent", "single", "fixed")

CENTER_MLP_DEPTH = {"paper": 2, "official": 3}
# The stride at which the official precision s²·c/β has c = 1 when there are several scales.
REFERENCE_STRIDE = 32
# Eq. 4 divides by s². This floor, σ = 0.06 cells at β = 8, is narrower than any cell and keeps 1/s² finite.
MIN_SQUARED_OBJECT_SCALE = 1e-3


class SpatialPriorOutput(NamedTuple):
    """The prior of every query as `smca_attention` takes it, and the point that its box is predicted from.

    H is the number of heads for modulation `per_head`, else 1.

    Attributes:
        center: [B, H, N, S, 2], (x, y) in cells of each scale's own grid.
        precision: [B, H, N, S, 2], (p_x, p_y) per cell²: σ = 1 / √(2 p) cells.
        scale_weights: [B, 1, N, S], summing to 1 over the scales; None without scale selection.
        reference_logits: [B, N, 2], (x, y) before the sigmoid, for the next layers and for the box head:
            box = sigmoid(box_mlp(h) + [reference_logits, 0, 0]) (Eq. 12).
    """

    center: Tensor
    precision: Tensor
    scale_weights: Tensor | None
    reference_logits: Tensor


class SpatialPrior(nn.Module):
    """Predictor of the centre, precision and scale weights of every query's spatial prior, from its features.

    Args:
        embed_dim: width E of the query features.
        num_heads: attention heads H, each with a map of its own if modulation is "per_head".
        strides: pixels per cell of each of the 1 to 8 scales.
        geometry: "official" (precision s²·c/β, layer norm on the features, 3-layer centre MLP) or
            "paper" (precision 1/(β s²), no norm, 2-layer centre MLP).
        modulation: "per_head" (Eq. 6), "shared" (one map for all heads, Eq. 5) or "none" (precision 0).
        scale_type: object scale s "independent" in x and y, "single" for both, or "fixed" at 1.
        scale_selection: True weighs the scales per query (Eq. 7–9); with one scale there is nothing to select.
        beta: β of the precision.
        predicts_center: False for a layer that is always given `reference_logits`: it has no centre MLP.

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
        check_positive_int("embed_dim", embed_dim)
        check_positive_int("num_heads", num_heads)
        check_choice("geometry", geometry, GEOMETRIES)
        check_choice("modulation", modulation, MODULATIONS)
        check_choice("scale_type", scale_type, SCALE_TYPES)
        check_bool("scale_selection", scale_selection)
        check_positive_number("beta", beta)
        check_bool("predicts_center", predicts_center)
        check_strides(strides)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.strides = tuple(strides)
        self.geometry = geometry
        self.modulation = modulation
        self.scale_type = scale_type
        self.beta = float(beta)

        scales = len(self.strides)
        modulated = modulation != "none"
        self.map_heads = num_heads if modulation == "per_head" else 1
        self.axes = {"independent": 2, "single": 1, "fixed": 0}[scale_type] if modulated else 0
        has_center_mlp = modulated and predicts_center
        self.center_mlp = _mlp(embed_dim, CENTER_MLP_DEPTH[geometry]) if has_center_mlp else None
        self.offset = XavierLinear(embed_dim, scales * num_heads * 2) if modulation == "per_head" else None
        # s = 1 for every query at the start (σ = 2 cells at β = 8), so that early gradients reach far.
        self.object_scale = UnitLinear(embed_dim, scales * self.map_heads * self.axes) if self.axes else None
        self.scale_selection = XavierLinear(embed_dim, scales) if scale_selection and scales > 1 else None
        self.norm = nn.LayerNorm(embed_dim) if geometry == "official" and self.uses_features else None

    @property
    def uses_features(self) -> bool:
        """Whether anything is predicted from the features, so that their values matter."""
        predictors = (self.center_mlp, self.offset, self.object_scale, self.scale_selection)
        return any(predictor is not None for predictor in predictors)

    def reset_parameters(self) -> None:
        """Set Xavier weights, and s = 1 for every query (σ = 2 cells at β = 8) so that early gradients reach far.

        Call it again after any initialisation that fills every matrix of a model, as DETR's does.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()

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
        """Predict the prior of every query.

        A centre of 0…1 is spread over the part of each grid that is image. The first of these that is given says how
        large that part is: `image_sizes` / stride, `valid_shapes`, the rows and columns that `key_padding_mask` leaves,
        the whole grid.

        Args:
            features: [B, N, E], what the prior is predicted from. Geometry "paper": the query. "official":
                tgt + query_pos from before the self-attention; the layer norm is applied here.
            spatial_shapes: (height, width) of each scale's grid, in cells.
            reference_logits: [B, N, 2] from an earlier layer, used instead of predicting the centre.
            image_sizes: [B, 2], (height, width) of each image in pixels, without padding.
            valid_shapes: [B, S, 2], (height, width) in cells of the part of each grid that is image.
            key_padding_mask: [B, T] bool, True = padding.
            backend: "triton" computes everything after the linear layers in one launch, "sdpa" and "reference" in
                PyTorch, "auto" by Triton where `smca_attention` would. With modulation "none" it makes no difference.

        Returns:
            A `SpatialPriorOutput`. With modulation "none" its precision is 0, and so are its reference_logits unless
            they were given.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape or device, for missing reference_logits,
                and for backend "triton" where that can't serve.
        """
        check_shape("features", features, B=None, N=None, E=self.embed_dim)
        check_floating("features", features)
        batch, queries = features.shape[0], features.shape[1]
        if reference_logits is not None:
            check_shape("reference_logits", reference_logits, B=batch, N=queries, xy=2)
            check_floating("reference_logits", reference_logits)
            check_device_of_features("reference_logits", reference_logits, features)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
        shapes = check_spatial_shapes(spatial_shapes)
        if len(shapes) != len(self.strides):
            raise ValueError(
                f"spatial_shapes must have one (height, width) a stride, strides {self.strides}, got {shapes}"
            )
        with autocast_off(features.device.type):
            if self.norm is not None:
                features = _predict(self.norm, features)
            offset, object_scale, selection = (
                None if predictor is None else _predict(predictor, features)
                for predictor in (self.offset, self.object_scale, self.scale_selection)
            )
            if self.modulation == "none":
                if reference_logits is None:
                    reference_logits = _at_least_float32(features).new_zeros(batch, queries, 2)
                center = reference_logits.new_zeros(batch, 1, queries, len(self.strides), 2)
                scale_weights = _scale_weights(selection)
                return SpatialPriorOutput(center, torch.zeros_like(center), scale_weights, reference_logits)
            if reference_logits is None:
                if self.center_mlp is None:
                    raise ValueError(
                        "reference_logits must be given to a prior made with predicts_center=False, got None"
                    )
                reference_logits = _predict(self.center_mlp, features)
            image_part = self._image_part(features, shapes, image_sizes, valid_shapes, key_padding_mask)
            return self._locate(reference_logits, offset, object_scale, selection, *image_part, shapes, backend)

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
        """Compute the prior from the outputs of the linear layers, in one launch or by the PyTorch that defines it."""
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
        return SpatialPriorOutput(center, precision, _scale_weights(selection), reference_logits)

    def _per_map(self, outputs: Tensor, axes: int) -> Tensor:
        """Reorder a linear layer's outputs: [B, N, S · map_heads · axes] → [B, map_heads, N, S, axes]."""
        batch, queries, _ = outputs.shape
        return outputs.view(batch, queries, len(self.strides), self.map_heads, axes).permute(0, 3, 1, 2, 4)

    def _precision(self, object_scale: Tensor | None, like: Tensor) -> Tensor:
        """Precision [B, map_heads, N, S, 2] per cell², from the object scale s by Eq. 4 or the official form of it."""
        if object_scale is None:
            squared_scale = like.new_ones(()).expand(like.shape)
        else:
            squared_scale = self._per_map(_at_least_float32(object_scale), self.axes).square().expand_as(like)
        if self.geometry == "paper":
            return 1.0 / (self.beta * squared_scale.clamp(min=MIN_SQUARED_OBJECT_SCALE))
        if len(self.strides) == 1:
            return squared_scale / self.beta
        return squared_scale * _filled(self._factors(), like).unsqueeze(-1)

    def _factors(self) -> list[float]:
        """Precision of each scale (feature level) at an object scale s of 1."""
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
        """Choose and check what says how large the images are: image_sizes [B, 2], cells [B, S, 2] or neither."""
        batch = features.shape[0]
        if image_sizes is not None:
            check_shape("image_sizes", image_sizes, B=batch, height_width=2)
            check_device_of_features("image_sizes", image_sizes, features)
            return image_sizes, None
        if valid_shapes is not None:
            return None, check_valid_shapes(valid_shapes, batch, shapes, features.device)
        if key_padding_mask is not None:
            check_padding_mask(key_padding_mask, batch, sum([height * width for height, width in shapes]), features)
            return None, _unpadded_cells(key_padding_mask, shapes)
        return None, None

    def _extent(
        self, logits: Tensor, shapes: SpatialShapes, image_sizes: Tensor | None, cells: Tensor | None
    ) -> Tensor:
        """Size (width, height) in cells of the image in each grid, [B or 1, S, 2], in at least float32."""
        like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        if image_sizes is not None:
            return image_sizes.to(like.dtype).flip(-1).unsqueeze(1) / _filled(self.strides, like).unsqueeze(-1)
        heights, widths = zip(*shapes, strict=True)
        grids = torch.stack((_filled(widths, like), _filled(heights, like)), -1).unsqueeze(0)
        return grids if cells is None else torch.minimum(cells.to(like.dtype).flip(-1).clamp(min=0), grids)


def _mlp(width: int, depth: int) -> nn.Sequential:
    """Stack `depth` linear layers with ReLU between them, the last with two outputs."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [XavierLinear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, XavierLinear(width, 2))


def _predict(predictor: nn.Module, features: Tensor) -> Tensor:
    """Apply a predictor in the dtype that it computes in, whatever that of the features."""
    outputs: Tensor = predictor(in_computing_dtype(features, predictor))
    return outputs


def _scale_weights(logits: Tensor | None) -> Tensor | None:
    """Softmax over the scales (Eq. 7): [B, N, S] → [B, 1, N, S]."""
    return None if logits is None else _at_least_float32(logits).softmax(-1).unsqueeze(1)


def _fused_prior(backend: str, raw: Sequence[Tensor], image_sizes: Tensor | None) -> ModuleType | None:
    """Choose: the module backends/triton/prior.py if it is to compute the prior from `raw`, None if PyTorch is."""
    device = raw[0].device
    if backend in ("sdpa", "reference"):
        return None
    if backend == "auto" and not reaches_tensor_cores(device):
        return None
    try:
        check_triton()
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
    """Widen half precision: in bfloat16 a centre at column 100 would be up to 0.25 cells off."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _filled(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a vector on like's device without a copy from the host, which the capture of a CUDA graph forbids."""
    return torch.stack([like.new_full((), value) for value in values])


def _unpadded_cells(key_padding_mask: Tensor, shapes: SpatialShapes) -> Tensor:
    """Count the rows and columns of each grid in which some key is not ignored: (height, width) [B, S, 2]."""
    sizes = [height * width for height, width in shapes]
    cells = []
    for ignored, (height, width) in zip(torch.split(key_padding_mask, sizes, dim=1), shapes, strict=True):
        kept = ~ignored.reshape(len(ignored), height, width)
        cells.append(torch.stack((kept.any(2).sum(-1), kept.any(1).sum(-1)), -1))
    return torch.stack(cells, 1)
