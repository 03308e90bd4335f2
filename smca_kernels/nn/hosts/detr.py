"""SMCA in a model of facebookresearch/detr, which is not imported: its modules are known by the names of attributes.

    model, criterion, postprocessors = build_model(args)
    model = apply_smca_to_detr(model)

Parameters keep their names, so that DETR's checkpoints load with the prior alone missing (strict=False), and outputs
are DETR's, so that its criterion, matcher and engine work as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smca_kernels.inputs import FLOATING_DTYPES
from smca_kernels.nn.co_attention import SpatiallyModulatedCoAttention
from smca_kernels.nn.hosts.grids import check_options, checked_shape, image_sizes
from smca_kernels.nn.projected import boxes_around

# The attributes that are taken from the host.
DETECTOR = ("backbone", "input_proj", "transformer", "query_embed", "class_embed", "bbox_embed", "aux_loss")
TRANSFORMER = ("encoder", "decoder")
DECODER = ("layers", "norm", "return_intermediate")
LAYER = (
    "self_attn", "multihead_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "norm3", "dropout1", "dropout2",
    "dropout3", "activation", "normalize_before",
)  # fmt: skip


class ImageBatch(NamedTuple):
    """Images of several sizes in one tensor, with the attributes of DETR's NestedTensor."""

    tensors: Tensor  # [B, 3, height, width]
    mask: Tensor  # [B, height, width] bool, True = padding


class SmcaDecoderLayer(nn.Module):
    """A decoder layer of the host's modules, with `SpatiallyModulatedCoAttention` as multihead_attn."""

    self_attn: Any
    multihead_attn: Any
    linear1: Any
    dropout: Any
    linear2: Any
    norm1: Any
    norm2: Any
    norm3: Any
    dropout1: Any
    dropout2: Any
    dropout3: Any
    activation: Any
    normalize_before: bool

    def __init__(self, host: Any, multihead_attn: SpatiallyModulatedCoAttention) -> None:
        super().__init__()
        for name in LAYER:
            setattr(self, name, multihead_attn if name == "multihead_attn" else getattr(host, name))

    def forward(
        self,
        queries: Tensor,  # [N, B, E]
        query_pos: Tensor,  # [N, B, E]
        memory: Tensor,  # [T, B, E]
        positions: Tensor,  # [T, B, E]
        reference_logits: Tensor | None,  # [B, N, 2]; None: predict them
        spatial_shape: tuple[int, int],  # (height, width) in cells
        sizes: Tensor,  # [B, 2], (height, width) in pixels
        padding: Tensor,  # [B, T]
    ) -> tuple[Tensor, Tensor]:
        """Queries [N, B, E] and reference logits [B, N, 2]."""
        features = queries + query_pos
        inputs = self.norm1(queries) if self.normalize_before else queries
        with_pos = inputs + query_pos
        queries = queries + self.dropout1(self.self_attn(with_pos, with_pos, value=inputs)[0])
        queries = queries if self.normalize_before else self.norm1(queries)
        inputs = self.norm2(queries) if self.normalize_before else queries
        attended, prior = self.multihead_attn(
            inputs + query_pos,
            memory + positions,
            memory,
            (spatial_shape,),
            prior_features=features if self.multihead_attn.prior.geometry == "official" else None,
            reference_logits=reference_logits,
            image_sizes=sizes,
            key_padding_mask=padding,
        )
        queries = queries + self.dropout2(attended)
        queries = queries if self.normalize_before else self.norm2(queries)
        inputs = self.norm3(queries) if self.normalize_before else queries
        queries = queries + self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(inputs)))))
        return queries if self.normalize_before else self.norm3(queries), prior.reference_logits


class SmcaDecoder(nn.Module):
    """Decoder layers one after the other; the first one's reference logits go to the later ones."""

    def __init__(self, host: Any, layers: list[SmcaDecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = host.norm
        self.return_intermediate = host.return_intermediate

    def forward(
        self,
        query_pos: Tensor,  # [N, B, E]
        memory: Tensor,  # [T, B, E]
        positions: Tensor,  # [T, B, E]
        spatial_shape: tuple[int, int],
        sizes: Tensor,  # [B, 2]
        padding: Tensor,  # [B, T]
    ) -> tuple[Tensor, Tensor]:
        """Normalised queries of every layer, or the last, [L or 1, N, B, E], and the reference logits [B, N, 2]."""
        queries, outputs = torch.zeros_like(query_pos), []
        reference_logits: Any = None
        for layer in self.layers:
            queries, reference_logits = layer(
                queries, query_pos, memory, positions, reference_logits, spatial_shape, sizes, padding
            )
            outputs.append(queries)
        outputs = outputs if self.return_intermediate else outputs[-1:]
        return torch.stack([self.norm(output) for output in outputs]), reference_logits


class SmcaTransformer(nn.Module):
    """The host's encoder before a `SmcaDecoder`."""

    def __init__(self, host: Any, decoder: SmcaDecoder) -> None:
        super().__init__()
        self.encoder = host.encoder
        self.decoder = decoder

    def forward(
        self,
        features: Tensor,  # [B, E, height, width]
        padding: Tensor,  # [B, height, width]
        query_embed: Tensor,  # [N, E]
        positions: Tensor,  # [B, E, height, width]
        sizes: Tensor,  # [B, 2]
    ) -> tuple[Tensor, Tensor]:
        """Normalised queries of every layer, or the last, [L or 1, B, N, E], and the reference logits [B, N, 2]."""
        batch, _, height, width = features.shape
        source, positions = (tensor.flatten(2).permute(2, 0, 1) for tensor in (features, positions))
        query_pos = query_embed.unsqueeze(1).repeat(1, batch, 1)
        padding = padding.flatten(1)
        memory = self.encoder(source, src_key_padding_mask=padding, pos=positions)
        queries, reference_logits = self.decoder(query_pos, memory, positions, (height, width), sizes, padding)
        return queries.transpose(1, 2), reference_logits


class SmcaDetr(nn.Module):
    """A detector of the host's modules, made by `apply_smca_to_detr`."""

    backbone: Any
    input_proj: Any
    transformer: Any
    query_embed: Any
    class_embed: Any
    bbox_embed: Any
    aux_loss: bool

    def __init__(self, host: Any, transformer: SmcaTransformer) -> None:
        super().__init__()
        for name in DETECTOR:
            setattr(self, name, transformer if name == "transformer" else getattr(host, name))

    def forward(self, samples: Any) -> dict[str, Any]:
        """Detect objects.

        Args:
            samples: DETR's NestedTensor, or any object with its `tensors` [B, 3, height, width] and `mask`
                [B, height, width], True = padding; images [B, 3, height, width], or a list of [3, height, width].

        Returns:
            DETR's outputs: pred_logits [B, N, classes + 1], pred_boxes [B, N, 4] as (x, y, width, height) in 0…1, and
            with aux_loss the same of all layers but the last as aux_outputs.

        Raises:
            TypeError: for samples of another kind.
            ValueError: where the backbone's stride is not the prior's.
        """
        samples = _batch_of(samples)
        features, positions = self.backbone(samples)
        feature_map, padding = features[-1].decompose()
        stride = self.transformer.decoder.layers[0].multihead_attn.prior.strides[0]
        height, width = samples.tensors.shape[-2:]
        checked_shape(feature_map, height, width, stride)
        queries, reference_logits = self.transformer(
            self.input_proj(feature_map), padding, self.query_embed.weight, positions[-1], image_sizes(~samples.mask)
        )
        logits, boxes = self.class_embed(queries), boxes_around(self.bbox_embed(queries), reference_logits)
        outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            earlier = zip(logits[:-1], boxes[:-1], strict=True)
            outputs["aux_outputs"] = [{"pred_logits": a, "pred_boxes": b} for a, b in earlier]
        return outputs


def apply_smca_to_detr(model: Any, *, strides: tuple[float, ...] = (32,), **prior: Any) -> SmcaDetr:
    """Make a detector of the modules of facebookresearch/detr's DETR, with a spatial prior on its co-attention.

    Every parameter of the model is shared with it, and the model stays as it is: make the optimiser of the detector
    that is returned.

    Args:
        model: a DETR, with or without aux_loss and pre_norm; DETRsegm is none.
        strides: the backbone's stride in pixels per cell, alone: 32, or 16 with dilation (DC5).
        prior: geometry, modulation, scale_type and beta, as `SpatialPrior` takes them.

    Returns:
        The detector. After an initialisation that fills every matrix, as DETR's does, call the `reset_parameters` of
        its layers' multihead_attn.

    Raises:
        TypeError, ValueError: for a model that lacks an attribute of DETR's, and for options that don't exist.
    """
    options = {"strides": strides, **prior}
    check_options(options)
    _check_attributes("model", model, DETECTOR)
    _check_attributes("model.transformer", model.transformer, TRANSFORMER)
    decoder = model.transformer.decoder
    _check_attributes("model.transformer.decoder", decoder, DECODER)
    layers = []
    for i, layer in enumerate(decoder.layers):
        name = f"model.transformer.decoder.layers[{i}]"
        _check_attributes(name, layer, LAYER)
        attention = _modulated(f"{name}.multihead_attn", layer.multihead_attn, i == 0, options)
        layers.append(SmcaDecoderLayer(layer, attention).train(layer.training))
    made = SmcaDecoder(decoder, layers)
    transformer = SmcaTransformer(model.transformer, made)
    detector = SmcaDetr(model, transformer)
    # Not `train`, which would change the parts of the host.
    for frame, host in (
        (detector, model), (transformer, model.transformer), (made, decoder), (made.layers, decoder.layers)
    ):  # fmt: skip
        frame.training = host.training
    return detector


def _check_attributes(name: str, module: Any, expected: tuple[str, ...]) -> None:
    missing = [attribute for attribute in expected if not hasattr(module, attribute)]
    if missing:
        reason = ""
        if isinstance(module, nn.Module) and any("Deform" in type(part).__name__ for part in module.modules()):
            reason = ": deformable attention has no softmax over all cells that a prior could change"
        raise TypeError(
            f"{name} must have the attributes of facebookresearch/detr's, got a {type(module).__name__} without "
            f"{', '.join(missing)}{reason}"
        )


def _modulated(
    name: str, host: Any, predicts_center: bool, options: Mapping[str, Any]
) -> SpatiallyModulatedCoAttention:
    """Co-attention that shares the parameters of the host's, with a prior of its own."""
    if not isinstance(host, nn.MultiheadAttention) or host.in_proj_weight is None or host.in_proj_bias is None:
        raise TypeError(f"{name} must be an nn.MultiheadAttention of one width and with biases, got {host!r}")
    attention = SpatiallyModulatedCoAttention(
        host.embed_dim, host.num_heads, **options, predicts_center=predicts_center, dropout=host.dropout
    )
    weight = host.in_proj_weight
    attention.prior.to(weight.device, weight.dtype if weight.dtype in FLOATING_DTYPES else None)
    attention.in_proj_weight, attention.in_proj_bias = host.in_proj_weight, host.in_proj_bias
    attention.out_proj.weight, attention.out_proj.bias = host.out_proj.weight, host.out_proj.bias
    return attention.train(host.training)


def _batch_of(samples: Any) -> Any:
    """An object with tensors and mask: samples, if they are one, else images padded at the bottom and on the right."""
    if isinstance(samples, Tensor):
        samples = list(samples)
    if not isinstance(samples, (list, tuple)) or hasattr(samples, "tensors"):
        if not (hasattr(samples, "tensors") and hasattr(samples, "mask")):
            raise TypeError(f"samples must be a NestedTensor, images or a list of them, got {type(samples).__name__}")
        return samples
    height, width = (max(image.shape[axis] for image in samples) for axis in (1, 2))
    tensors = samples[0].new_zeros(len(samples), samples[0].shape[0], height, width)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool, device=tensors.device)
    for image, place, padded in zip(samples, tensors, mask, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
        padded[: image.shape[1], : image.shape[2]] = False
    return ImageBatch(tensors, mask)
