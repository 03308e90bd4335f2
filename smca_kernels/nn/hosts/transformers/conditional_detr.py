"""SMCA in Hugging Face's Conditional DETR: its own reference points are the centres of all layers' priors.

Each class takes the place of one of the host's, from the cross-attention up to the detector. The box head stays as it
is: the host's boxes lie around these points already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ConditionalDetrModel
from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrDecoder,
    ConditionalDetrDecoderCrossAttention,
    ConditionalDetrDecoderLayer,
    ConditionalDetrDecoderOutput,
    ConditionalDetrModelOutput,
    encode_sinusoidal_position_embedding,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from smca_kernels.nn.hosts.transformers.apply import Classes, PriorInitMixin, applied, modulate, options_of
from smca_kernels.nn.hosts.transformers.forward import Grid, attend, encode, model_outputs


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
        attended, _ = attend(
            self,
            self._beside(query, self.q_pos_sine_proj(query_sine_embed)),
            self._beside(key, key_pos),
            self.v_proj(encoder_hidden_states),
            reference_logits,
            grid,
            before=features,
            after=hidden_states + query_position_embeddings,
        )
        return attended, None

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


class SmcaConditionalDetrDecoder(PriorInitMixin, ConditionalDetrDecoder):
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
        grid, positions, encoder_outputs = encode(
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
            **model_outputs(encoder_outputs, decoder_outputs), reference_points=decoder_outputs.reference_points
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
        modulate(self, _CONDITIONAL_DETR, options_of(config))


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
    return applied(model, _CONDITIONAL_DETR, {"strides": strides, **prior})


_CONDITIONAL_DETR = Classes(
    ConditionalDetrForObjectDetection,
    SmcaConditionalDetrForObjectDetection,
    SmcaConditionalDetrModel,
    SmcaConditionalDetrDecoder,
    SmcaConditionalDetrDecoderLayer,
    SmcaConditionalDetrCrossAttention,
    predicts_center=False,
)
