"""SMCA in the DETR and Conditional DETR of Hugging Face's transformers: `pip install "smca_kernels[transformers]"`.

    model = SmcaDetrForObjectDetection.from_pretrained("facebook/detr-resnet-50")      or, for a model that is there,
    model = apply_smca_to_detr(model)

Only the decoder's co-attention changes, and in DETR the box head. Every parameter keeps its name: a plain checkpoint
loads with the prior alone missing. What a layer needs of an earlier one is an argument, not a hook's note, because
gradient checkpointing runs the `forward` of a layer again, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrModel,
    DetrConfig,
    DetrForObjectDetection,
    DetrModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrDecoder,
    ConditionalDetrDecoderCrossAttention,
    ConditionalDetrDecoderLayer,
    ConditionalDetrDecoderOutput,
    ConditionalDetrModelOutput,
    encode_sinusoidal_position_embedding,
)
from transformers.models.detr.modeling_detr import (
    DetrCrossAttention,
    DetrDecoder,
    DetrDecoderLayer,
    DetrDecoderOutput,
    DetrModelOutput,
    DetrObjectDetectionOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from smca_kernels.inputs import FLOATING_DTYPES
from smca_kernels.nn.hosts.grids import check_options, checked_shape, image_sizes
from smca_kernels.nn.linear import UnitLinear, XavierLinear
from smca_kernels.nn.projected import ProjectedCoAttention, boxes_around


class Grid(NamedTuple):
    """The feature map that the decoder attends to: sizes alone, which nothing is learnt through."""

    spatial_shapes: tuple[tuple[int, int]]  # (height, width) in cells
    image_sizes: Tensor  # [B, 2], (height, width) of each image in pixels, without padding
    key_padding_mask: Tensor | None  # [B, T] bool, True = padding; None where no mask was given


class SmcaDetrCrossAttention(DetrCrossAttention):
    """The host's cross-attention with a `ProjectedCoAttention`, its `smca`, between the projections."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, E]
        key_value_states: Tensor,  # [B, T, E]
        position_embeddings: Tensor,  # [B, N, E]
        encoder_position_embeddings: Tensor,  # [B, T, E]
        features: Tensor,  # [B, N, E]: hidden_states + position_embeddings from before the self-attention
        reference_logits: Tensor | None,  # [B, N, 2]
        grid: Grid,
    ) -> tuple[Tensor, None, Tensor]:
        """Return the output, no attention weights, and the reference logits."""
        query = hidden_states + position_embeddings
        attended, prior = self.smca(
            self.q_proj(query),
            self.k_proj(key_value_states + encoder_position_embeddings),
            self.v_proj(key_value_states),
            grid.spatial_shapes,
            prior_features=features if self.smca.prior.geometry == "official" else query,
            reference_logits=reference_logits,
            image_sizes=grid.image_sizes,
            key_padding_mask=grid.key_padding_mask,
            scale=self.scaling,
        )
        return self.o_proj(attended), None, prior.reference_logits


class SmcaDetrDecoderLayer(DetrDecoderLayer):
    """The host's decoder layer, which takes reference logits and returns them."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, E]
        attention_mask: Tensor | None,
        spatial_position_embeddings: Tensor,  # [B, T, E]
        object_queries_position_embeddings: Tensor,  # [B, N, E]
        encoder_hidden_states: Tensor,  # [B, T, E]
        reference_logits: Tensor | None,  # [B, N, 2]; None: predict them
        *,
        grid: Grid,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        features = hidden_states + object_queries_position_embeddings
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            position_embeddings=object_queries_position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + F.dropout(attended, self.dropout, self.training))
        attended, _, reference_logits = self.encoder_attn(
            hidden_states,
            encoder_hidden_states,
            object_queries_position_embeddings,
            spatial_position_embeddings,
            features,
            reference_logits,
            grid,
        )
        hidden_states = self.encoder_attn_layer_norm(hidden_states + F.dropout(attended, self.dropout, self.training))
        return self.final_layer_norm(hidden_states + self.mlp(hidden_states)), reference_logits


@dataclass
class SmcaDetrDecoderOutput(DetrDecoderOutput):
    """The host's output, and the point that every box is predicted around.

    Attributes:
        reference_logits: [B, N, 2], (x, y) before the sigmoid.
    """

    reference_logits: Tensor | None = None


class _PriorsBeginAsTheyShould:
    """The part of a decoder that initialises what a checkpoint lacks: the host's way is not the prior's."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (XavierLinear, UnitLinear)):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class SmcaDetrDecoder(_PriorsBeginAsTheyShould, DetrDecoder):
    """The host's decoder, which hands the reference logits from the first layer to the later ones."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,  # [B, N, E]
        attention_mask: Tensor | None,  # [B, N]
        encoder_hidden_states: Tensor,  # [B, T, E]
        spatial_position_embeddings: Tensor,  # [B, T, E]
        object_queries_position_embeddings: Tensor,  # [B, N, E]
        grid: Grid,
        **kwargs: Any,
    ) -> SmcaDetrDecoderOutput:
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
            )
        hidden_states, reference_logits, intermediate = inputs_embeds, None, []
        for layer in self.layers:
            hidden_states, reference_logits = layer(
                hidden_states,
                attention_mask,
                spatial_position_embeddings,
                object_queries_position_embeddings,
                encoder_hidden_states,
                reference_logits,
                grid=grid,
                **kwargs,
            )
            if self.config.auxiliary_loss:
                hidden_states = self.layernorm(hidden_states)  # what the next layer takes, too: the host's way
                intermediate.append(hidden_states)
        return SmcaDetrDecoderOutput(
            last_hidden_state=self.layernorm(hidden_states),
            intermediate_hidden_states=torch.stack(intermediate) if intermediate else None,
            reference_logits=reference_logits,
        )


@dataclass
class SmcaDetrModelOutput(DetrModelOutput):
    """The host's output, and the point that every box is predicted around.

    Attributes:
        reference_logits: [B, N, 2], (x, y) before the sigmoid.
    """

    reference_logits: Tensor | None = None


class SmcaDetrModel(DetrModel):
    """The host's backbone, encoder and decoder; the decoder is told the size of the feature map and of the images."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor | None = None,  # [B, height, width], 1 = image
        decoder_attention_mask: Tensor | None = None,  # [B, N]
        encoder_outputs: Any = None,
        inputs_embeds: None = None,
        decoder_inputs_embeds: Tensor | None = None,  # [B, N, E]
        **kwargs: Any,
    ) -> SmcaDetrModelOutput:
        """Compute queries from images; arguments as the host's.

        Raises:
            ValueError: for inputs_embeds, and where the backbone's stride is not that of `config.smca`.
        """
        grid, positions, encoder_outputs = _encode(
            self, pixel_values, pixel_mask, encoder_outputs, inputs_embeds, **kwargs
        )
        query_pos = self.query_position_embeddings.weight.unsqueeze(0).repeat(len(pixel_values), 1, 1)
        decoder_outputs = self.decoder(
            inputs_embeds=torch.zeros_like(query_pos) if decoder_inputs_embeds is None else decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            spatial_position_embeddings=positions,
            object_queries_position_embeddings=query_pos,
            grid=grid,
            **kwargs,
        )
        return SmcaDetrModelOutput(
            **_model_outputs(encoder_outputs, decoder_outputs), reference_logits=decoder_outputs.reference_logits
        )


class SmcaDetrForObjectDetection(DetrForObjectDetection):
    """Hugging Face's `DetrForObjectDetection` with a spatial prior on the decoder's co-attention.

    `config.smca`, if it is there, is a dict of arguments of `SpatialPrior`: geometry, modulation, scale_type, beta, and
    strides, which has the backbone's one stride (32 by default; 16 with config.dilation). It is saved and loaded with
    the model. Inputs, outputs and the loss are the host's; but inputs_embeds is refused, and cross_attentions stays
    empty, as no attention weights are stored (`smca_kernels.attention_map` recomputes them).

    Raises:
        TypeError, ValueError: for a config.smca with other keys or values.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        _modulate(self, _DETR, _options_of(config))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor | None = None,  # [B, height, width], 1 = image
        decoder_attention_mask: Tensor | None = None,  # [B, N]
        encoder_outputs: Any = None,
        inputs_embeds: None = None,
        decoder_inputs_embeds: Tensor | None = None,  # [B, N, E]
        labels: list[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> DetrObjectDetectionOutput:
        """Detect objects; arguments and outputs as the host's.

        Raises:
            ValueError: for inputs_embeds, and where the backbone's stride is not that of `config.smca`.
        """
        outputs = self.model(
            pixel_values,
            pixel_mask=pixel_mask,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            **kwargs,
        )
        logits, pred_boxes = self._heads(outputs.last_hidden_state, outputs.reference_logits)
        losses: dict[str, Any] = {}
        if labels is not None:
            auxiliary: tuple[Tensor | None, Tensor | None] = (None, None)
            if self.config.auxiliary_loss:
                auxiliary = self._heads(outputs.intermediate_hidden_states, outputs.reference_logits)
            computed = self.loss_function(logits, labels, self.device, pred_boxes, self.config, *auxiliary)
            losses = dict(zip(("loss", "loss_dict", "auxiliary_outputs"), computed, strict=True))
        shared = {name: getattr(outputs, name) for name in _SHARED_OUTPUTS}
        return DetrObjectDetectionOutput(logits=logits, pred_boxes=pred_boxes, **losses, **shared)

    def _heads(self, hidden_states: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of queries [..., B, N, E]."""
        return self.class_labels_classifier(hidden_states), boxes_around(
            self.bbox_predictor(hidden_states), reference_logits
        )


class SmcaConditionalDetrCrossAttention(ConditionalDetrDecoderCrossAttention):
    """The host's cross-attention with a `ProjectedCoAttention`, its `smca`, between the projections."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, E]
        encoder_hidden_states: Tensor,  # [B, T, E]
        query_sine_embed: Tensor,  # [B, N, E]
        encoder_position_embeddings: Tensor,  # [B, T, E]
        query_position_embeddings: Tensor,  # [B, N, E]
        features: Tensor,  # [B, N, E]: hidden_states + query_position_embeddings from before the self-attention
        reference_logits: Tensor,  # [B, N, 2]
        grid: Grid,
        is_first: bool,
    ) -> tuple[Tensor, None]:
        """Return the output and no attention weights."""
        query, key = self.q_content_proj(hidden_states), self.k_content_proj(encoder_hidden_states)
        key_pos = self.k_pos_proj(encoder_position_embeddings)
        if is_first:
            query, key = query + self.q_pos_proj(query_position_embeddings), key + key_pos
        after = hidden_states + query_position_embeddings
        attended, _ = self.smca(
            self._beside(query, self.q_pos_sine_proj(query_sine_embed)),
            self._beside(key, key_pos),
            self.v_proj(encoder_hidden_states),
            grid.spatial_shapes,
            prior_features=features if self.smca.prior.geometry == "official" else after,
            reference_logits=reference_logits,
            image_sizes=grid.image_sizes,
            key_padding_mask=grid.key_padding_mask,
            scale=self.scaling,
        )
        return self.o_proj(attended), None

    def _beside(self, content: Tensor, position: Tensor) -> Tensor:
        """Content and position [B, length, H · D] side by side in each head: [B, length, H · 2 D]."""
        parts = [tensor.unflatten(2, (self.num_attention_heads, -1)) for tensor in (content, position)]
        return torch.cat(parts, -1).flatten(2)


class SmcaConditionalDetrDecoderLayer(ConditionalDetrDecoderLayer):
    """The host's decoder layer, which takes reference logits."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, E]
        spatial_position_embeddings: Tensor,  # [B, T, E]
        query_position_embeddings: Tensor,  # [B, N, E]
        query_sine_embed: Tensor,  # [B, N, E]
        encoder_hidden_states: Tensor,  # [B, T, E]
        reference_logits: Tensor,  # [B, N, 2]
        *,
        grid: Grid,
        is_first: bool,
        **kwargs: Any,
    ) -> Tensor:
        features = hidden_states + query_position_embeddings
        attended, _ = self.self_attn(
            hidden_states=hidden_states, query_position_embeddings=query_position_embeddings, **kwargs
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + F.dropout(attended, self.dropout, self.training))
        attended, _ = self.encoder_attn(
            hidden_states,
            encoder_hidden_states,
            query_sine_embed,
            spatial_position_embeddings,
            query_position_embeddings,
            features,
            reference_logits,
            grid,
            is_first,
        )
        hidden_states = self.encoder_attn_layer_norm(hidden_states + F.dropout(attended, self.dropout, self.training))
        return self.final_layer_norm(hidden_states + self.mlp(hidden_states))


class SmcaConditionalDetrDecoder(_PriorsBeginAsTheyShould, ConditionalDetrDecoder):
    """The host's decoder, which hands its reference points to the priors of all layers."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,  # [B, N, E]
        encoder_hidden_states: Tensor,  # [B, T, E]
        spatial_position_embeddings: Tensor,  # [B, T, E]
        object_queries_position_embeddings: Tensor,  # [B, N, E]
        grid: Grid,
        **kwargs: Any,
    ) -> ConditionalDetrDecoderOutput:
        hidden_states, intermediate = inputs_embeds, []
        reference_logits = self.ref_point_head(object_queries_position_embeddings)
        reference_points = reference_logits.sigmoid()
        sine = encode_sinusoidal_position_embedding(reference_points, num_pos_feats=self.config.d_model // 2)
        for i, layer in enumerate(self.layers):
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(
                hidden_states,
                spatial_position_embeddings,
                object_queries_position_embeddings,
                sine if i == 0 else sine * self.query_scale(hidden_states),
                encoder_hidden_states,
                reference_logits,
                grid=grid,
                is_first=i == 0,
                **kwargs,
            )
            if self.config.auxiliary_loss:
                hidden_states = self.layernorm(hidden_states)  # what the next layer takes, too: the host's way
                intermediate.append(hidden_states)
        return ConditionalDetrDecoderOutput(
            last_hidden_state=self.layernorm(hidden_states),
            intermediate_hidden_states=torch.stack(intermediate) if intermediate else None,
            reference_points=reference_points.transpose(0, 1),  # [N, B, 2] is what the box head takes
        )


class SmcaConditionalDetrModel(ConditionalDetrModel):
    """The host's backbone, encoder and decoder; the decoder is told the size of the feature map and of the images."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor | None = None,  # [B, height, width], 1 = image
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> ConditionalDetrModelOutput:
        """Compute queries from images; arguments as the host's, which ignores both of the decoder's, too.

        Raises:
            ValueError: for inputs_embeds, and where the backbone's stride is not that of `config.smca`.
        """
        grid, positions, encoder_outputs = _encode(
            self, pixel_values, pixel_mask, encoder_outputs, inputs_embeds, **kwargs
        )
        query_pos = self.query_position_embeddings.weight.unsqueeze(0).repeat(len(pixel_values), 1, 1)
        decoder_outputs = self.decoder(
            inputs_embeds=torch.zeros_like(query_pos),
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            spatial_position_embeddings=positions,
            object_queries_position_embeddings=query_pos,
            grid=grid,
            **kwargs,
        )
        return ConditionalDetrModelOutput(
            **_model_outputs(encoder_outputs, decoder_outputs), reference_points=decoder_outputs.reference_points
        )


class SmcaConditionalDetrForObjectDetection(ConditionalDetrForObjectDetection):
    """Hugging Face's `ConditionalDetrForObjectDetection` with a spatial prior on the decoder's co-attention.

    The prior's centre is the host's own reference point, which its boxes are predicted around, moved by offsets. All
    else as `SmcaDetrForObjectDetection`.

    Raises:
        TypeError, ValueError: for a config.smca with other keys or values.
    """

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        _modulate(self, _CONDITIONAL_DETR, _options_of(config))


_SHARED_OUTPUTS = (
    "last_hidden_state",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
)


def apply_smca_to_detr(model: Any, *, strides: tuple[float, ...] = (32,), **prior: Any) -> SmcaDetrForObjectDetection:
    """Give a DETR that is already built a spatial prior, in place.

    Its parameters stay the same tensors, and those of the prior are added to the decoder's layers: make the optimiser,
    compile and wrap for distributed training afterwards.

    Args:
        model: a `DetrForObjectDetection`, which becomes a `SmcaDetrForObjectDetection`.
        strides: the backbone's stride in pixels per cell, alone: the encoder has one feature map.
        prior: geometry, modulation, scale_type and beta, as `SpatialPrior` takes them.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: for another model, one that has a prior already, and for options that don't exist.
    """
    return _applied(model, _DETR, {"strides": strides, **prior})


def apply_smca_to_conditional_detr(
    model: Any, *, strides: tuple[float, ...] = (32,), **prior: Any
) -> SmcaConditionalDetrForObjectDetection:
    """Give a Conditional DETR that is already built a spatial prior, in place.

    Args:
        model: a `ConditionalDetrForObjectDetection`, which becomes a `SmcaConditionalDetrForObjectDetection`.
        strides, prior: as `apply_smca_to_detr`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `apply_smca_to_detr`.
    """
    return _applied(model, _CONDITIONAL_DETR, {"strides": strides, **prior})


@dataclass(frozen=True)
class _Classes:
    """Classes of the host, and those that take their places."""

    host: Any
    detector: Any
    model: Any
    decoder: Any
    layer: Any
    attention: Any
    predicts_center: bool  # the first layer's prior does, else the host


_DETR = _Classes(
    DetrForObjectDetection,
    SmcaDetrForObjectDetection,
    SmcaDetrModel,
    SmcaDetrDecoder,
    SmcaDetrDecoderLayer,
    SmcaDetrCrossAttention,
    predicts_center=True,
)
_CONDITIONAL_DETR = _Classes(
    ConditionalDetrForObjectDetection,
    SmcaConditionalDetrForObjectDetection,
    SmcaConditionalDetrModel,
    SmcaConditionalDetrDecoder,
    SmcaConditionalDetrDecoderLayer,
    SmcaConditionalDetrCrossAttention,
    predicts_center=False,
)
# Old checkpoints are renamed by the name of the class that they are loaded into.
for _name in ("DetrModel", "ConditionalDetrModel"):
    register_checkpoint_conversion_mapping(f"Smca{_name}", get_checkpoint_conversion_mapping(_name), overwrite=True)


def _options_of(config: Any) -> dict[str, Any]:
    options = getattr(config, "smca", None)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(f"config.smca must be a dict of options of the prior, got {type(options).__name__}")
    return options


def _applied(model: Any, classes: _Classes, options: dict[str, Any]) -> Any:
    if isinstance(model, classes.detector):
        raise ValueError(f"model must be a plain {classes.host.__name__}, got a {type(model).__name__}")
    if not isinstance(model, classes.host):
        raise TypeError(f"model must be a {classes.host.__name__}, got a {type(model).__name__}{_why_not(model)}")
    _modulate(model, classes, options)
    model.config.smca = {**options, "strides": list(options["strides"])}
    return model


def _why_not(model: Any) -> str:
    """The reason for which a whole family of detectors can't have a prior, if the model is of one."""
    if isinstance(model, nn.Module) and any("deformable" in type(part).__name__.lower() for part in model.modules()):
        return (
            ": deformable attention samples a few points, and has no softmax over all cells that a prior could change"
        )
    return ""


def _modulate(detector: Any, classes: _Classes, options: dict[str, Any]) -> None:
    """Add a prior to each decoder layer, and change the classes that hand it on. Nothing is changed if this raises."""
    options = {"strides": (32,), **options}
    check_options(options)
    decoder, config = detector.model.decoder, detector.config
    attentions = []
    for i, layer in enumerate(decoder.layers):
        attention = ProjectedCoAttention(
            config.d_model,
            config.decoder_attention_heads,
            predicts_center=classes.predicts_center and i == 0,
            dropout=layer.encoder_attn.attention_dropout,
            **options,
        )
        weight = layer.encoder_attn.o_proj.weight
        dtype = weight.dtype if weight.dtype in FLOATING_DTYPES else None
        attentions.append(attention.to(weight.device, dtype).train(layer.training))
    # A class notes what output_hidden_states records when it is first made.
    with torch.device("meta"):
        classes.decoder(config)
    for layer, attention in zip(decoder.layers, attentions, strict=True):
        layer.encoder_attn.smca = attention
        layer.encoder_attn.__class__ = classes.attention
        layer.__class__ = classes.layer
    decoder.__class__ = classes.decoder
    detector.model.__class__ = classes.model
    detector.__class__ = classes.detector
    for part in (detector, detector.model, decoder):
        part._no_split_modules = {*part._no_split_modules, classes.layer.__name__}


def _encode(
    model: Any,
    pixel_values: Tensor,  # [B, 3, height, width]
    pixel_mask: Tensor | None,  # [B, height, width]
    encoder_outputs: Any,
    inputs_embeds: None,
    **kwargs: Any,
) -> tuple[Grid, Tensor, Any]:
    """The grid, the position embeddings of its cells [B, T, E], and the encoder's outputs."""
    if inputs_embeds is not None:
        raise ValueError("inputs_embeds must be None: the prior needs the height and width of the feature map")
    batch, _, height, width = pixel_values.shape
    mask = pixel_values.new_ones(batch, height, width) if pixel_mask is None else pixel_mask
    feature_map, mask = model.backbone(pixel_values, mask)[-1]
    prior = model.decoder.layers[0].encoder_attn.smca.prior
    shape = checked_shape(feature_map, height, width, prior.strides[0])
    positions = model.position_embedding(
        shape=feature_map.shape, device=pixel_values.device, dtype=pixel_values.dtype, mask=mask
    )
    positions = positions.flatten(2).transpose(1, 2)
    if encoder_outputs is None:
        encoder_outputs = model.encoder(
            inputs_embeds=model.input_projection(feature_map).flatten(2).transpose(1, 2),
            attention_mask=mask.flatten(1),
            spatial_position_embeddings=positions,
            **kwargs,
        )
    if pixel_mask is None:
        sizes = [feature_map.new_full((batch,), size, dtype=torch.float32) for size in (height, width)]
        return Grid((shape,), torch.stack(sizes, -1), None), positions, encoder_outputs
    return Grid((shape,), image_sizes(pixel_mask), ~mask.flatten(1)), positions, encoder_outputs


def _model_outputs(encoder_outputs: Any, decoder_outputs: Any) -> dict[str, Any]:
    """The fields of a model's output, by the names that encoder and decoder have for them."""
    return {
        "last_hidden_state": decoder_outputs.last_hidden_state,
        "decoder_hidden_states": decoder_outputs.hidden_states,
        "decoder_attentions": decoder_outputs.attentions,
        "cross_attentions": decoder_outputs.cross_attentions,
        "encoder_last_hidden_state": encoder_outputs.last_hidden_state,
        "encoder_hidden_states": encoder_outputs.hidden_states,
        "encoder_attentions": encoder_outputs.attentions,
        "intermediate_hidden_states": decoder_outputs.intermediate_hidden_states,
    }
