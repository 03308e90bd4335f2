"""Equations 3–9 written out, a query and a cell at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from small_layers import EMBED_DIM, HEADS, SHAPES
from torch import Tensor

from smca_kernels.nn import SpatiallyModulatedCoAttention, SpatialPrior
from smca_kernels.nn.prior import MIN_SQUARED_OBJECT_SCALE


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def prior_by_hand(prior: SpatialPrior, features: Tensor, cells: Tensor) -> dict[str, Tensor]:
    """Prior of one query of one image: features [E], cells [S, 2] (width, height) → center [H, S, 2] and the rest."""
    state = {name: parameter.detach() for name, parameter in prior.state_dict().items()}
    scales, official = len(prior.strides), prior.geometry == "official"
    if official and "norm.weight" in state:
        centred = features - features.mean()
        features = centred / (centred.square().mean() + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    heads = prior.num_heads if prior.modulation == "per_head" else 1
    result = {"center": cells.new_zeros(heads, scales, 2), "precision": cells.new_zeros(heads, scales, 2)}
    if "scale_selection.weight" in state:
        exponentials = linear(state, "scale_selection", features).exp()
        result["scale_weights"] = exponentials / exponentials.sum()
    if prior.modulation == "none":
        return result | {"reference_logits": cells.new_zeros(2)}
    x, depth = features, 3 if official else 2
    for index in range(depth):
        x = linear(state, f"center_mlp.{2 * index}", x)
        x = x.relu() if index < depth - 1 else x
    result["reference_logits"] = x
    offsets = linear(state, "offset", features) if heads > 1 else None
    spreads = linear(state, "object_scale", features) if prior.scale_type != "fixed" else None
    for s, head, axis in itertools.product(range(scales), range(heads), range(2)):
        center = cells[s, axis] / (1 + math.exp(-x[axis]))
        if offsets is not None:
            center = center + offsets[(s * heads + head) * 2 + axis]
        spread = 1.0
        if prior.scale_type == "independent":
            spread = float(spreads[(s * heads + head) * 2 + axis])
        elif prior.scale_type == "single":
            spread = float(spreads[s * heads + head])
        if official:
            precision = spread**2 * (prior.strides[s] / 32 if scales > 1 else 1.0) / prior.beta
        else:
            precision = 1 / (prior.beta * max(spread**2, MIN_SQUARED_OBJECT_SCALE))
        result["center"][head, s, axis] = center
        result["precision"][head, s, axis] = precision
    return result


def layer_by_hand(layer: SpatiallyModulatedCoAttention, inputs: dict[str, Any], b: int, n: int) -> Tensor:
    """Output [E] for query n of image b, one cell after the other (Eq. 3–9)."""
    cells = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64)
    prior = prior_by_hand(layer.prior, inputs["prior_features"][b, n], cells)
    w_q, w_k, w_v = layer.in_proj_weight.detach().split(EMBED_DIM)
    b_q, b_k, b_v = layer.in_proj_bias.detach().split(EMBED_DIM)
    head_dim = EMBED_DIM // HEADS
    heads = []
    for head in range(HEADS):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        query = w_q[rows] @ inputs["query"][b, n] + b_q[rows]
        first, output = 0, torch.zeros(head_dim, dtype=torch.float64)
        for s, (height, width) in enumerate(SHAPES):
            m = head if layer.prior.modulation == "per_head" else 0
            (c_x, c_y), (p_x, p_y) = prior["center"][m, s], prior["precision"][m, s]
            logits, values = [], []
            for k, (y, x) in enumerate(itertools.product(range(height), range(width)), start=first):
                key = w_k[rows] @ inputs["key"][b, k] + b_k[rows]
                log_gaussian = -p_x * (x - c_x) ** 2 - p_y * (y - c_y) ** 2
                logits.append(query @ key / math.sqrt(head_dim) + log_gaussian)
                values.append(w_v[rows] @ inputs["value"][b, k] + b_v[rows])
            first += height * width
            weights = [torch.exp(logit - max(logits)) for logit in logits]
            attended = torch.stack(weights) / sum(weights) @ torch.stack(values)
            output = output + prior["scale_weights"][s] * attended
        heads.append(output)
    return layer.out_proj.weight.detach() @ torch.cat(heads) + layer.out_proj.bias.detach()
