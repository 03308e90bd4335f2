"""The decoder against torch's own layer, and what its layers have in common."""

from __future__ import annotations

import torch
from torch import nn

from smca_model.decoder import Decoder, DecoderLayer

DIM, HEADS, FFN = 16, 2, 24
GRID = [(3, 4)]
SIZE = {"valid_shapes": None, "image_sizes": torch.tensor([[96, 128], [96, 128]])}


def test_a_layer_without_modulation_is_that_of_nn_transformer_decoder_layer():
    theirs = nn.TransformerDecoderLayer(DIM, HEADS, FFN, dropout=0.0, batch_first=True)
    ours = DecoderLayer(DIM, HEADS, FFN, 0.0, (32,), predicts_center=True, modulation="none")
    state = {
        name.replace("multihead_attn.", "co_attn.").replace("linear", "ffn.linear"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    queries, memory = torch.randn(2, 5, DIM), torch.randn(2, 12, DIM)

    actual, _ = ours(
        queries,
        torch.zeros_like(queries),
        memory,
        memory,
        GRID,
        reference_logits=None,
        backend="reference",
        **SIZE,
    )

    torch.testing.assert_close(actual, theirs(queries, memory))


def test_only_the_first_layer_predicts_the_reference_point():
    decoder = Decoder(3, DIM, HEADS, FFN, 0.0, (32,))

    assert [layer.co_attn.prior.center_mlp is not None for layer in decoder.layers] == [True, False, False]


def test_the_queries_positions_alone_set_the_first_layer_s_centres():
    # Queries start at 0, so that the first prior is predicted from query_pos and not from the image.
    decoder = Decoder(2, DIM, HEADS, FFN, 0.0, (32,))
    query_pos = torch.randn(1, 5, DIM).expand(2, -1, -1)

    _, reference_logits = decoder(query_pos, torch.randn(2, 12, DIM), torch.randn(2, 12, DIM), GRID, **SIZE)

    torch.testing.assert_close(reference_logits[0], reference_logits[1])
    assert reference_logits[0].std(0).min() > 0


def test_one_norm_serves_every_layer_s_output():
    decoder = Decoder(3, DIM, HEADS, FFN, 0.0, (32,))
    nn.init.constant_(decoder.norm.weight, 3.0)
    nn.init.constant_(decoder.norm.bias, 2.0)

    outputs, _ = decoder(torch.randn(2, 5, DIM), torch.randn(2, 12, DIM), torch.randn(2, 12, DIM), GRID, **SIZE)

    assert outputs.shape == (3, 2, 5, DIM)
    torch.testing.assert_close(outputs.mean(-1), torch.full((3, 2, 5), 2.0))
    torch.testing.assert_close(outputs.var(-1, correction=0), torch.full((3, 2, 5), 9.0), rtol=1e-3, atol=0)


def test_the_paper_s_geometry_predicts_the_prior_from_the_query_as_attention_sees_it():
    layer = DecoderLayer(DIM, HEADS, FFN, 0.0, (32,), predicts_center=True, geometry="paper")
    seen = []
    layer.co_attn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    layer.co_attn.prior.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    queries, memory = torch.randn(2, 5, DIM), torch.randn(2, 12, DIM)

    layer(queries, torch.randn(2, 5, DIM), memory, memory, GRID, reference_logits=None, backend="sdpa", **SIZE)

    prior_features, query = seen
    assert torch.equal(prior_features, query)
