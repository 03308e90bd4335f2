"""Steps of the forward pass that both hosts share: encode the images, attend with a prior, name the outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from smca_kernels.nn.hosts.grids import checked_shape, image_sizes


class Grid(NamedTuple):
    """The feature map that the decoder attends to: sizes alone, which nothing is learnt through."""

    spatial_shapes: tuple[tuple[int, int]]  # (height, width) in cells
    image_sizes: Tensor  # [B, 2], (height, width) of each image in pixels, without padding
    key_padding_mask: Tensor | None  # [B, T] bool, True = padding; None where no mask was given


def encode(
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


def attend(
    attention: Any,  # a host's cross-attention with a `ProjectedCoAttention`, its `smca`
    query: Tensor,  # [B, N, Q], projected
    key: Tensor,  # [B, T, Q]
    value: Tensor,  # [B, T, E]
    reference_logits: Tensor | None,  # [B, N, 2]; None: predict them
    grid: Grid,
    *,
    before: Tensor,  # [B, N, E]: queries plus their positions from before the self-attention
    after: Tensor,  # [B, N, E]: the same from after it
) -> tuple[Tensor, Tensor]:
    """Output [B, N, E], projected, and the reference logits."""
    attended, prior = attention.smca(
        query,
        key,
        value,
        grid.spatial_shapes,
        prior_features=before if attention.smca.prior.geometry == "official" else after,
        reference_logits=reference_logits,
        image_sizes=grid.image_sizes,
        key_padding_mask=grid.key_padding_mask,
        scale=attention.scaling,
    )
    return attention.o_proj(attended), prior.reference_logits


def model_outputs(encoder_outputs: Any, decoder_outputs: Any) -> dict[str, Any]:
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
