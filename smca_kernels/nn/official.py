"""Weights of the authors' released decoder layer, under our names.

Outputs of their linear layers are ordered (scale, head, xy) as ours are, so only names change. The options that a
layer must be made with (their type1, type2, type3; one scale or several; first layer or later) are read off the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smca_kernels.nn.checks import check_state_dict, check_strides

# Prefix of a parameter in the authors' decoder layer: the same in ours.
OFFICIAL_NAMES = {
    "multihead_attn.": "",
    "norm4.": "prior.norm.",
    "point1.layers.0.": "prior.center_mlp.0.",
    "point1.layers.1.": "prior.center_mlp.2.",
    "point1.layers.2.": "prior.center_mlp.4.",
    "point2.": "prior.offset.",
    "point3.": "prior.object_scale.",
    "point4.": "prior.scale_selection.",
}
REQUIRED_MODULES = ("in_proj_", "out_proj.", "prior.norm.", "prior.offset.")


def official_layer_state(
    state: Mapping[str, Tensor], prefix: str = "transformer.decoder.layers.0."
) -> dict[str, Tensor]:
    """Rename the co-attention and prior parameters of one decoder layer of the authors' model to ours.

    Args:
        state: the authors' state dict (``checkpoint["model"]``).
        prefix: what stands before ``multihead_attn.`` in its keys, for the decoder layer wanted.

    Returns:
        A state dict for a `SpatiallyModulatedCoAttention` of the same configuration; tensors are not copied.

    Raises:
        TypeError: for anything but a state dict.
        ValueError: when the co-attention, norm4 or point2 is not there.
    """
    check_state_dict("state", state)
    renamed = {
        ours + name.removeprefix(prefix + theirs): tensor
        for name, tensor in state.items()
        for theirs, ours in OFFICIAL_NAMES.items()
        if name.startswith(prefix + theirs)
    }
    required = [module + parameter for module in REQUIRED_MODULES for parameter in ("weight", "bias")]
    missing = [name for name in required if name not in renamed]
    if missing:
        raise ValueError(
            f"state must hold multihead_attn, norm4 and point2 under the prefix {prefix!r}, "
            f"missing: {', '.join(missing)}"
        )
    return renamed


def official_layer_options(
    state: Mapping[str, Tensor], prefix: str, num_heads: int, strides: Sequence[float]
) -> dict[str, Any]:
    """Find the constructor's arguments for a `SpatiallyModulatedCoAttention` that `state` fits.

    Args:
        state: parameters as `official_layer_state` returns them.
        prefix: what stood before their names; for messages.
        num_heads, strides: as the model was trained.

    Raises:
        ValueError: for parameters that fit no supported layer of that many heads and scales.
    """
    check_strides(strides)
    scales = len(strides)
    offsets = state["prior.offset.bias"].shape[0]
    if offsets != 2 * num_heads * scales:
        raise ValueError(f"{prefix}point2 must have 2 · num_heads={num_heads} · scales={scales} outputs, got {offsets}")
    scale_type = "fixed"
    if "prior.object_scale.bias" in state:
        outputs = state["prior.object_scale.bias"].shape[0]
        scale_types = {num_heads * scales: "single", 2 * num_heads * scales: "independent"}
        if outputs not in scale_types:
            raise ValueError(
                f"{prefix}point3 must have num_heads={num_heads} · scales={scales} outputs (type2) or "
                f"twice as many (type3), got {outputs}"
            )
        scale_type = scale_types[outputs]
    return {
        "embed_dim": state["prior.norm.weight"].shape[0],
        "num_heads": num_heads,
        "strides": strides,
        "geometry": "official",
        "modulation": "per_head",
        "scale_type": scale_type,
        "scale_selection": "prior.scale_selection.weight" in state,
        "predicts_center": "prior.center_mlp.0.weight" in state,
    }
