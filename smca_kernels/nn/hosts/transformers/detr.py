"""SMCA in Hugging Face's DETR: the prior of the decoder's first layer predicts the point that boxes lie around.

Each class takes the place of one of the host's, from the cross-attention up to the detector, and hands the reference
logits on: from the first layer to the later ones, and from the last to the box head (Eq. 12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, DetrModel
from transformers.masking_utils import create_bidirectional_mask
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

from smca_kernels.nn.hosts.transformers.apply import Classes, PriorInitMixin, applied, modulate, options_of
from smca_kernels.nn.hosts.transformers.forward import Grid, attend, encode, model_outputs
from smca_kernels.nn.projected import boxes_around


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
        attended, reference_logits = attend(
            self,
            self.q_proj(query),
            self.k_proj(key_value_states + encoder_position_embeddings),
            self.v_proj(key_value_states),
            reference_logits,
            grid,
            before=features,
            after=query,
        )
        return attended, None, reference_logits


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


class SmcaDetrDecoder(PriorInitMixin, DetrDecoder):
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
        grid, positions, encoder_outputs = encode(
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
            **model_outputs(encoder_outputs, decoder_outputs), reference_logits=decoder_outputs.reference_logits
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
        modulate(self, _DETR, options_of(config))

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
    return applied(model, _DETR, {"strides": strides, **prior})


_DETR = Classes(
    DetrForObjectDetection,
    SmcaDetrForObjectDetection,
    SmcaDetrModel,
    SmcaDetrDecoder,
    SmcaDetrDecoderLayer,
    SmcaDetrCrossAttention,
    predicts_center=True,
)
