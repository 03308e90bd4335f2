"""Cross-attention of the hosts that have no call yet: without modulation, `ProjectedCoAttention` computes theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DabDetrConfig, DetrConfig, MaskFormerConfig, ResNetConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrAttention
from transformers.models.maskformer import modeling_maskformer
from transformers.models.table_transformer.modeling_table_transformer import TableTransformerAttention

from smca_kernels.nn import ProjectedCoAttention

DIM, HEADS, SHAPE = 32, 4, (4, 6)
Projected = tuple[Tensor, Tensor, Tensor]
Computed = tuple[Tensor, Projected, Callable[[Tensor], Tensor]]  # host's output, its projections, output projection


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, their positions, cells, and theirs."""
    return normal(2, 5, DIM), normal(2, 5, DIM), normal(2, 24, DIM), normal(2, 24, DIM)


def dab_detr() -> Computed:
    config = DabDetrConfig(hidden_size=DIM, decoder_attention_heads=HEADS, attention_dropout=0.0)
    attention: Any = DabDetrAttention(config, is_cross=True).double()
    query, key, value = normal(2, 5, 2 * DIM), normal(2, 24, 2 * DIM), normal(2, 24, DIM)
    return attention(query, key_states=key, value_states=value)[0], (query, key, value), attention.output_proj


def table_transformer() -> Computed:
    attention: Any = TableTransformerAttention(DIM, HEADS).double()
    queries, query_pos, cells, positions = features()
    output, _ = attention(
        queries, object_queries=query_pos, key_value_states=cells, spatial_position_embeddings=positions
    )
    query, key = attention.q_proj(queries + query_pos), attention.k_proj(cells + positions)
    return output, (query, key, attention.v_proj(cells)), attention.out_proj


def maskformer() -> Computed:
    decoder = DetrConfig(
        use_timm_backbone=False, backbone_config=ResNetConfig(), d_model=DIM, decoder_attention_heads=HEADS
    )  # the default backbone's is looked up on the network
    config = MaskFormerConfig(decoder_config=decoder.to_dict()).decoder_config
    config._attn_implementation = "eager"
    attention: Any = modeling_maskformer.MaskFormerDetrCrossAttention(config, DIM, HEADS).double()
    queries, query_pos, cells, positions = features()
    output, _ = attention(queries, cells, None, query_pos, positions)
    query, key = attention.q_proj(queries + query_pos), attention.k_proj(cells + positions)
    return output, (query, key, attention.v_proj(cells)), attention.o_proj


@pytest.mark.parametrize("host", [dab_detr, table_transformer, maskformer])
def test_without_modulation_it_is_the_hosts(host: Callable[[], Computed]) -> None:
    expected, projected, output_projection = host()
    attention = ProjectedCoAttention(DIM, HEADS, modulation="none").double()
    attended, _ = attention(*projected, [SHAPE], prior_features=normal(2, 5, DIM))
    torch.testing.assert_close(
        output_projection(attended), expected, atol=1e-6, rtol=0.0
    )  # DAB-DETR's softmax is in float32
