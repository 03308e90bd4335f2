"""Rivals of the operator, each set up as those who know it best would do it.

All compute spatially modulated co-attention over every scale, with scale weights, and give gradients to all six inputs;
only those marked `same=False` compute another function, and are there for context.

`wide` uses that the prior is a dot product, -p (x - c)² = -p x² + 2 p c · x + a constant of the row, which softmax
ignores: four more columns for queries and keys. Half precision rounds these columns, and the logits are then off by
whole units where the prior is steep, which `logit_error` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import grid_sample, pad, scaled_dot_product_attention

from smca_kernels import explain_backend, smca_attention
from smca_kernels.backends import reference
from smca_kernels.inputs import AttentionInputs

HALF = (torch.float16, torch.bfloat16)
POINTS = 4  # sampled by deformable attention, per head and scale


@dataclass(frozen=True)
class Peer:
    """One way to compute the attention, or something near it.

    Attributes:
        name: its name in tables and plots.
        what: its setup, in a line.
        attend: the whole forward, output [B, H, N, D].
        prepare: the part of `attend` before the attention proper, which is measured in it and also separately.
        unsupported: the reason why it can't run on these inputs, with or without gradients, or None.
        logit_error: largest absolute error of a logit, where inputs are rounded.
        ours: whether it is a backend of this library.
        same: whether it computes spatially modulated co-attention.
        compiled: whether its first call compiles, for one set of shapes.
    """

    name: str
    what: str
    attend: Callable[[AttentionInputs], Tensor]
    prepare: Callable[[AttentionInputs], Any] | None = None
    unsupported: Callable[[AttentionInputs, bool], str | None] = lambda inputs, with_gradients: None
    logit_error: Callable[[AttentionInputs], float] | None = None
    ours: bool = False
    same: bool = True
    compiled: bool = False


def _by_scale(tensor: Tensor, inputs: AttentionInputs) -> Sequence[Tensor]:
    return tensor.split(inputs.keys_per_scale(), dim=2)


def _combined(outputs: Iterable[Tensor], inputs: AttentionInputs) -> Tensor:
    """Σ_s α_s O_s in query's dtype."""
    total = None
    for s, output in enumerate(outputs):
        weighted = output if inputs.scale_weights is None else inputs.scale_weights[..., s : s + 1] * output
        total = weighted if total is None else total + weighted
    assert total is not None
    return total.to(inputs.query.dtype)


def _is_half(inputs: AttentionInputs) -> bool:
    return inputs.query.dtype in HALF


# -------------------------------------------------------------------------------------------------- ours and naive


def ours(inputs: AttentionInputs, **options: Any) -> Tensor:
    """`smca_attention` with options of its own."""
    return smca_attention(**inputs.arguments() | options)


def ours_unsupported(inputs: AttentionInputs, with_gradients: bool, **options: Any) -> str | None:
    """Reason why a backend can't be timed on these inputs, or need not be, or None."""
    if options["backend"] == "triton" and inputs.query.device.type == "cpu":
        return "its kernels are compiled for GPUs; Triton's interpreter only checks them here (`smca parity`)"
    try:
        explain_backend(**inputs.arguments() | options)
    except ValueError as error:
        return str(error)
    if options.get("mass_tolerance") == 0.0:
        from smca_kernels.backends.triton import launch

        if not launch.is_planned(inputs):
            return "it is the same as triton, which looks for keys to leave out in larger calls only"
    return None


OURS: dict[str, dict[str, Any]] = {  # name: options
    "triton": {"backend": "triton"},
    "triton-all": {"backend": "triton", "mass_tolerance": 0.0},
    "sdpa": {"backend": "sdpa"},
}


def naive(inputs: AttentionInputs) -> Tensor:
    """Every queries × keys tensor in eager PyTorch, scale after scale, as the authors' code does it."""
    return reference.attention(inputs)


# Static shapes and one graph for the whole forward: the compiler may use everything that it knows.
compiled = partial(torch.compile, dynamic=False, fullgraph=True)


# --------------------------------------------------------------------------------------- SDPA with a materialised mask


@lru_cache(maxsize=64)
def _coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Column and row of every cell, cached as a model would do it."""
    return reference.cell_coordinates(height, width, like=torch.empty(0, dtype=dtype, device=device))


def masks(inputs: AttentionInputs) -> list[Tensor]:
    """The prior of each scale as an additive mask [B, H, N, T_s] in query's dtype, padding merged."""
    heads, biases = inputs.query.shape[1], []
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
    for s, (height, width) in enumerate(inputs.spatial_shapes):
        center, precision = inputs.center[..., s, :], inputs.precision[..., s, :]
        keys = height * width
        # The memory-efficient kernel copies a mask whose rows don't start at multiples of 16 bytes.
        x, y = (pad(cell, (0, -keys % 8)) for cell in _coordinates(height, width, center.dtype, center.device))
        bias = -precision[..., :1] * (x - center[..., :1]) ** 2 - precision[..., 1:] * (y - center[..., 1:]) ** 2
        mask = ignored[s]
        if mask is not None:
            bias = bias.masked_fill(pad(mask, (0, -keys % 8))[:, None, None], -math.inf)
        biases.append(bias.to(inputs.query.dtype).expand(-1, heads, -1, -1)[..., :keys])
    return biases


def sdpa_mask(inputs: AttentionInputs) -> Tensor:
    """SDPA's memory-efficient kernel, which takes a mask and gives it a gradient; on the CPU the one that does."""
    query, scale = inputs.query, inputs.scale
    calls = zip(_by_scale(inputs.key, inputs), _by_scale(inputs.value, inputs), masks(inputs), strict=True)
    kernels = [SDPBackend.EFFICIENT_ATTENTION] if query.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        outputs = [scaled_dot_product_attention(query, k, v, mask, scale=scale) for k, v, mask in calls]
    return _combined(outputs, inputs)


# ------------------------------------------------------------------------------------------- wide queries and keys


@lru_cache(maxsize=64)
def _features(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """x², x, y² and y of every cell [T_s, 4], counted from the grid's middle, where they are smallest."""
    x, y = _coordinates(height, width, torch.promote_types(dtype, torch.float32), device)
    x, y = x - width // 2, y - height // 2
    return torch.stack([x**2, x, y**2, y], -1).to(dtype)


def wide(inputs: AttentionInputs) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of each scale, widened by the prior's four columns, and by one for padding if there is any.

    Zeros fill the channels up to a multiple of 8, so that rows start at multiples of 16 bytes.
    """
    batch, heads, _, head_dim = inputs.query.shape
    scale, dtype = inputs.scale, inputs.query.dtype
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
    pairs = []
    for s, ((height, width), key) in enumerate(zip(inputs.spatial_shapes, _by_scale(inputs.key, inputs), strict=True)):
        c_x, c_y = inputs.center[..., s, :1] - width // 2, inputs.center[..., s, 1:] - height // 2
        p_x, p_y = inputs.precision[..., s, :1], inputs.precision[..., s, 1:]
        coefficients = torch.cat([-p_x, 2 * p_x * c_x, -p_y, 2 * p_y * c_y], -1) / scale
        features = _features(height, width, dtype, key.device).expand(batch, -1, -1)
        mask = ignored[s]
        if mask is not None:
            coefficients = pad(coefficients, (0, 1), value=1.0)
            features = torch.cat([features, (mask * -3e4).to(dtype)[..., None]], -1)  # 0 after the softmax
        surplus = -(head_dim + features.shape[-1]) % 8
        coefficients = pad(coefficients.to(dtype), (0, surplus)).expand(-1, heads, -1, -1)
        features = pad(features, (0, surplus))[:, None].expand(-1, heads, -1, -1)
        pairs.append((torch.cat([inputs.query, coefficients], -1), torch.cat([key, features], -1)))
    return pairs


def _padded_wide(inputs: AttentionInputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each scale, all of the same width, as fused kernels want them."""
    pairs = zip(wide(inputs), _by_scale(inputs.value, inputs), strict=True)
    return [(query, key, pad(value, (0, query.shape[-1] - value.shape[-1]))) for (query, key), value in pairs]


def sdpa_wide(inputs: AttentionInputs) -> Tensor:
    """SDPA on widened queries and keys: the flash kernel, or for float32 on a GPU the memory-efficient one."""
    head_dim, scale = inputs.query.shape[-1], inputs.scale
    flash = _is_half(inputs) or not inputs.query.is_cuda
    triples = _padded_wide(inputs)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if flash else SDPBackend.EFFICIENT_ATTENTION):
        outputs = [scaled_dot_product_attention(*triple, scale=scale)[..., :head_dim] for triple in triples]
    return _combined(outputs, inputs)


def wide_logit_error(inputs: AttentionInputs) -> float:
    """Largest absolute error of a logit of `wide`, from the rounding of its columns, over the keys of the image."""
    scale, worst = inputs.scale, 0.0
    exact = inputs.double()
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
    with torch.no_grad():
        for (query, key), (exact_query, exact_key), mask in zip(wide(inputs), wide(exact), ignored, strict=True):
            error = scale * (query.double() @ key.double().mT - exact_query @ exact_key.mT)
            if mask is not None:
                error = error.masked_fill(mask[:, None, None], 0.0)
            worst = max(worst, error.abs().max().item())
    return worst


# ------------------------------------------------------------------------------------------------- FlexAttention


def _modulation(
    center: Sequence[Tensor],  # x and y, each [B, H, N]
    precision: Sequence[Tensor],
    valid: Sequence[Tensor] | None,  # height and width, each [B]
    width: int,
) -> Callable[..., Tensor]:
    """Express the prior as a score_mod. Each captured value is a tensor with a gradient of its own."""
    c_x, c_y = center
    p_x, p_y = precision

    def modulated(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = k // width, k % width
        d_x, d_y = column - c_x[b, h, q], row - c_y[b, h, q]
        score = score - p_x[b, h, q] * d_x * d_x - p_y[b, h, q] * d_y * d_y
        if valid is None:
            return score
        return torch.where((row < valid[0][b]) & (column < valid[1][b]), score, -math.inf)

    return modulated


def flex(inputs: AttentionInputs, attention: Callable[..., Any] = flex_attention) -> Tensor:
    """FlexAttention, one call for each scale; atomics sum the gradients of the captured tensors."""
    heads, scale = inputs.query.shape[1], inputs.scale

    def captured(prior: Tensor) -> list[Tensor]:
        return [axis.expand(-1, heads, -1).contiguous() for axis in prior.unbind(-1)]

    outputs = []
    for s, (key, value) in enumerate(zip(_by_scale(inputs.key, inputs), _by_scale(inputs.value, inputs), strict=True)):
        valid = None if inputs.valid_shapes is None else [side.contiguous() for side in inputs.valid_shapes[:, s].T]
        prior = captured(inputs.center[..., s, :]), captured(inputs.precision[..., s, :])
        score_mod = _modulation(*prior, valid, inputs.spatial_shapes[s][1])
        outputs.append(attention(inputs.query, key, value, score_mod=score_mod, scale=scale))
    return _combined(outputs, inputs)


def flex_wide(
    inputs: AttentionInputs, pairs: Sequence[tuple[Tensor, Tensor]], attention: Callable[..., Any] = flex_attention
) -> Tensor:
    """FlexAttention on widened queries and keys; values keep their own width."""
    triples = zip(pairs, _by_scale(inputs.value, inputs), strict=True)
    scale = inputs.scale
    return _combined([attention(query, key, value, scale=scale) for (query, key), value in triples], inputs)


_compiled_flex, _compiled_flex_wide, _compiled_attention = compiled(flex), compiled(flex_wide), compiled(flex_attention)


def flex_compiled(inputs: AttentionInputs) -> Tensor:
    """`flex`, compiled as a whole on a GPU; on a CPU call by call, as FlexAttention can't be fused with other code."""
    out: Tensor = _compiled_flex(inputs) if inputs.query.is_cuda else flex(inputs, _compiled_attention)
    return out


def flex_wide_compiled(inputs: AttentionInputs) -> Tensor:
    """`flex_wide`, compiled likewise, but for the widening: compiled code would rebuild its cached tables."""
    pairs = wide(inputs)
    out: Tensor
    out = _compiled_flex_wide(inputs, pairs) if inputs.query.is_cuda else flex_wide(inputs, pairs, _compiled_attention)
    return out


def flex_unsupported(inputs: AttentionInputs, with_gradients: bool) -> str | None:
    """Reason why FlexAttention can't run: it has no backward on a CPU."""
    if with_gradients and inputs.query.device.type == "cpu":
        return "FlexAttention has no backward on a CPU"
    return None


# ------------------------------------------------------------------------------------------------------- context


def plain_sdpa(inputs: AttentionInputs) -> Tensor:
    """Attention to all keys of all scales in one softmax, without any prior, as in DETR itself."""
    query, keys = inputs.query, inputs.key.shape[2]
    mask, kernel = None, SDPBackend.FLASH_ATTENTION
    if inputs.valid_shapes is not None:
        ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
        mask = ~torch.cat([each for each in ignored if each is not None], 1)
        mask = pad(mask, (0, -keys % 16))[:, None, None, :keys].expand(-1, query.shape[1], query.shape[2], -1)
    if query.is_cuda and (mask is not None or not _is_half(inputs)):
        kernel = SDPBackend.EFFICIENT_ATTENTION
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(query, inputs.key, inputs.value, mask, scale=inputs.scale)


def deformable(inputs: AttentionInputs) -> Tensor:
    """Deformable DETR's attention in plain PyTorch: 4 points per head and scale, around the centre, by grid_sample.

    Queries and keys are unused: a model predicts offsets and weights of the points from queries outside.
    """
    batch, heads, queries, head_dim = inputs.query.shape
    angles = torch.arange(POINTS, device=inputs.query.device) * (2 * math.pi / POINTS)
    outputs = []
    for s, (height, width) in enumerate(inputs.spatial_shapes):
        value = _by_scale(inputs.value, inputs)[s]
        image = value.mT.reshape(batch * heads, head_dim, height, width)
        center = inputs.center[..., s, :].expand(-1, heads, -1, -1)
        x, y = center[..., :1] + 2 * angles.cos(), center[..., 1:] + 2 * angles.sin()  # two cells away
        points = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        points = points.reshape(batch * heads, queries, POINTS, 2).to(image.dtype)
        sampled = grid_sample(image, points, padding_mode="zeros", align_corners=False)
        outputs.append(sampled.mean(-1).mT.reshape(batch, heads, queries, head_dim))
    return _combined(outputs, inputs)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("naive", "eager PyTorch, every queries × keys tensor stored", naive),
        *(
            Peer(
                name,
                f"smca_attention({', '.join(f'{option}={value!r}' for option, value in options.items())})",
                partial(ours, **options),
                unsupported=partial(ours_unsupported, **options),
                ours=True,
            )
            for name, options in OURS.items()
        ),
        Peer(
            "sdpa-mask",
            "SDPA with the prior as a mask, memory-efficient kernel; preparation builds the mask",
            sdpa_mask,
            prepare=masks,
        ),
        Peer(
            "sdpa-wide",
            "SDPA, flash kernel, on queries and keys widened by the prior's columns; preparation builds these",
            sdpa_wide,
            prepare=_padded_wide,
            logit_error=wide_logit_error,
        ),
        Peer("naive-compiled", "torch.compile of naive, static shapes", compiled(naive), compiled=True),
        Peer(
            "flex",
            "FlexAttention, static shapes, the prior in score_mod from captured tensors",
            flex_compiled,
            unsupported=flex_unsupported,
            compiled=True,
        ),
        Peer(
            "flex-wide",
            "FlexAttention, static shapes, on queries and keys widened as for sdpa-wide; preparation widens them",
            flex_wide_compiled,
            prepare=wide,
            unsupported=flex_unsupported,
            logit_error=wide_logit_error,
            compiled=True,
        ),
        Peer("plain-sdpa", "SDPA without a prior, one softmax over all scales, flash kernel", plain_sdpa, same=False),
        Peer("deformable", f"deformable attention, {POINTS} points a scale, by grid_sample", deformable, same=False),
    )
}
