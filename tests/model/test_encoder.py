"""Encoder blocks against torch's own layers, and who attends to whom."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smca_model.encoder import EncoderBlock, SelfAttention, encoder_kinds

DIM, HEADS, FFN = 16, 2, 24
SIZES = [12, 6]  # tokens of two scales


def block(kind, *, share_self_attention=True, share_ffn=True, scales=2):
    return EncoderBlock(kind, scales, DIM, HEADS, FFN, 0.0, share_self_attention, share_ffn)


def inputs(sizes, batch=2):
    return torch.randn(batch, sum(sizes), DIM), torch.randn(batch, sum(sizes), DIM)


def test_self_attention_is_that_of_nn_multihead_attention():
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = SelfAttention(DIM, HEADS, 0.0)
    ours.load_state_dict(theirs.state_dict())
    tokens, positions = inputs([9])
    ignored = torch.zeros(2, 9, dtype=torch.bool)
    ignored[1, 5:] = True

    expected, _ = theirs(tokens + positions, tokens + positions, tokens, key_padding_mask=ignored)

    actual = ours.out_proj(ours.attend(*ours.project(tokens, positions), ignored))
    torch.testing.assert_close(actual, expected)


def test_a_block_is_that_of_nn_transformer_encoder_layer_where_there_are_no_positions():
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, FFN, dropout=0.0, batch_first=True)
    ours = block("intra", scales=1)
    state = {
        name.replace("self_attn.", "self_attn.0.").replace("linear", "ffn.0.linear"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    tokens = torch.randn(2, 9, DIM)
    ignored = torch.zeros(2, 9, dtype=torch.bool)
    ignored[1, 5:] = True

    actual = ours(tokens, torch.zeros_like(tokens), [ignored], [9])

    torch.testing.assert_close(actual, theirs(tokens, src_key_padding_mask=ignored))


def test_intra_blocks_keep_scales_apart():
    tokens, positions = inputs(SIZES)
    changed = tokens.clone()
    changed[:, SIZES[0] :] = torch.randn(2, SIZES[1], DIM)
    layer = block("intra")

    before, after = (layer(x, positions, [None, None], SIZES) for x in (tokens, changed))

    torch.testing.assert_close(after[:, : SIZES[0]], before[:, : SIZES[0]])


def test_multi_blocks_attend_across_scales():
    tokens, positions = inputs(SIZES)
    changed = tokens.clone()
    changed[:, -1] = torch.randn(2, DIM)  # one token of the second scale
    layer = block("multi")

    before, after = (layer(x, positions, [None, None], SIZES) for x in (tokens, changed))

    assert ((after - before)[:, : SIZES[0]].abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("kind", ["intra", "multi"])
def test_unshared_weights_that_are_equal_compute_what_shared_weights_do(kind):
    shared, unshared = block(kind), block(kind, share_self_attention=False, share_ffn=False)
    for ours, theirs in ((unshared.self_attn, shared.self_attn), (unshared.ffn, shared.ffn)):
        for module in ours:
            module.load_state_dict(theirs[0].state_dict())
    tokens, positions = inputs(SIZES)
    ignored = [None, torch.tensor([[False] * 6, [False] * 3 + [True] * 3])]

    torch.testing.assert_close(unshared(tokens, positions, ignored, SIZES), shared(tokens, positions, ignored, SIZES))


@pytest.mark.parametrize("name", ["self_attn.1.in_proj_weight", "self_attn.1.out_proj.weight", "ffn.1.linear1.weight"])
def test_unshared_weights_of_a_scale_serve_that_scale_alone(name):
    layer = block("intra", share_self_attention=False, share_ffn=False)
    tokens, positions = inputs(SIZES)
    before = layer(tokens, positions, [None, None], SIZES)

    with torch.no_grad():
        layer.get_parameter(name).normal_()
    after = layer(tokens, positions, [None, None], SIZES)

    torch.testing.assert_close(after[:, : SIZES[0]], before[:, : SIZES[0]])
    assert ((after - before)[:, SIZES[0] :].abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("kind", ["intra", "multi"])
def test_padded_tokens_are_not_attended_to(kind):
    tokens, positions = inputs(SIZES)
    ignored = [torch.tensor([[False] * 12, [False] * 7 + [True] * 5]), None]
    padding = torch.cat((ignored[0], torch.zeros(2, 6, dtype=torch.bool)), 1)
    changed = torch.where(padding.unsqueeze(-1), torch.randn_like(tokens), tokens)
    layer = block(kind)

    before, after = (layer(x, positions, ignored, SIZES) for x in (tokens, changed))

    torch.testing.assert_close(after[~padding], before[~padding])


def test_dropout_is_only_applied_while_training():
    layer = EncoderBlock("intra", 1, DIM, HEADS, FFN, 0.5, True, True)
    tokens, positions = inputs([9])

    training = [layer(tokens, positions, [None], [9]) for _ in range(2)]
    layer.eval()
    evaluating = [layer(tokens, positions, [None], [9]) for _ in range(2)]

    assert not torch.allclose(*training)
    assert torch.equal(*evaluating)


def test_shorthands_name_the_kinds_of_blocks_in_order():
    assert encoder_kinds("2intra+1multi+2intra") == ["intra", "intra", "multi", "intra", "intra"]
    assert encoder_kinds("3multi") == ["multi"] * 3


@pytest.mark.parametrize("wrong", ["", "intra", "0intra", "2inter", "2intra,1multi", "2intra+"])
def test_other_shorthands_are_refused(wrong):
    with pytest.raises(ValueError, match=r"encoder must be such as '2intra\+1multi\+2intra', got"):
        encoder_kinds(wrong)
