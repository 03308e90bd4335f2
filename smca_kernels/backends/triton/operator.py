"""The Triton backend as one torch.library operator: fake implementation, autograd, and what it can't serve.

`torch.ops.smca_kernels.plan`, `.forward` and `.backward` are opaque to torch.compile and torch.export, synchronise with
nothing and draw no random numbers themselves (dropout takes a seed tensor), so they can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smca_kernels.backends.reference import SpatialShapes
from smca_kernels.backends.triton import launch, locality
from smca_kernels.backends.triton.tiles import INTERPRETED

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("smca_kernels::plan", mutates_args=())
def _plan(
    query: Tensor,
    key: Tensor,
    center: Tensor,
    precision: Tensor,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    spatial_shapes: Sequence[int],
    scale: float,
    mass_tolerance: float,
) -> Tensor:
    return launch.plan(
        query, key, center, precision, valid_shapes, key_padding_mask, spatial_shapes, scale, mass_tolerance
    )


@_plan.register_fake
def _(query, key, center, precision, valid_shapes, key_padding_mask, spatial_shapes, scale, mass_tolerance):
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, heads, launch.plan_size(queries, len(spatial_shapes) // 2), dtype=torch.int32)


@torch.library.custom_op("smca_kernels::forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    plan: Tensor | None,
    spatial_shapes: Sequence[int],
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.forward(
        query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask, seed, plan,
        spatial_shapes, dropout_p, scale,
    )  # fmt: skip


@_forward.register_fake
def _(query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask, seed, plan,
      spatial_shapes, dropout_p, scale):  # fmt: skip
    batch, heads, queries, head_dim = query.shape
    scales = len(spatial_shapes) // 2
    return (
        torch.empty_like(launch.last_axis_contiguous(query)),
        query.new_empty(batch, heads, queries, scales, head_dim, dtype=torch.float32),
        query.new_empty(batch, heads, queries, scales, dtype=torch.float32),
    )


@torch.library.custom_op("smca_kernels::backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    plan: Tensor | None,
    scale_outputs: Tensor,
    lse: Tensor,
    spatial_shapes: Sequence[int],
    dropout_p: float,
    scale: float,
    of_query: bool,
    of_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch.backward(
        grad_out, query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask, seed, plan,
        scale_outputs, lse, spatial_shapes, dropout_p, scale, of_query, of_key,
    )  # fmt: skip


@_backward.register_fake
def _(grad_out, query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask, seed, plan,
      scale_outputs, lse, spatial_shapes, dropout_p, scale, of_query, of_key):  # fmt: skip
    def like(tensor, wanted):
        return torch.empty_like(launch.last_axis_contiguous(tensor)) if wanted else query.new_empty(0)

    prior = query.new_empty(*lse.shape, 2, dtype=torch.float32) if of_query else query.new_empty(0)
    return (
        like(query, of_query),
        like(key, of_key),
        like(value, of_key),
        prior,
        torch.empty_like(prior),
        query.new_empty(0) if scale_weights is None else torch.empty_like(lse),
    )


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.spatial_shapes, ctx.dropout_p, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_out, *_):
    tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    gradients = _backward(
        grad_out, *tensors, ctx.spatial_shapes, ctx.dropout_p, ctx.scale,
        wanted[0] or wanted[3] or wanted[4], wanted[1] or wanted[2],
    )  # fmt: skip

    def over_heads(gradient, of):
        return gradient.sum(1, keepdim=True) if of.shape[1] == 1 < gradient.shape[1] else gradient

    query, key, value, center, precision, scale_weights = (
        over_heads(gradient, of) if is_wanted else None
        for gradient, of, is_wanted in zip(gradients, tensors[:6], wanted[:6], strict=True)
    )
    return query, key, value, center, precision, scale_weights, *(None,) * 7


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "smca_attention: backend 'triton' has no double backward; use backend='reference' for second derivatives"
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_refuse)


def _mix(x: Tensor) -> Tensor:
    """`tiles.mix` on int64 tensors that hold uint32 values."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_mask(seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout_p: float) -> Tensor:
    """The elements that attention dropout keeps, as the kernels regenerate them: bool [B, H, N, T], for checking them.

    Args:
        seed: [1] int64, the operator's argument.
        dropout_p: probability of dropping an element.
    """

    def counter(size: int) -> Tensor:
        return torch.arange(size, device=seed.device)

    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    row_keys = _mix(counter(queries) ^ _mix(counter(batch * heads) ^ low)[:, None]) ^ high
    key_keys = counter(keys) * 0x9E3779B9 & 0xFFFFFFFF
    elements = _mix(row_keys[:, :, None] ^ key_keys)
    signed = elements - (elements >> 31 << 32)
    return (signed >= launch.dropout_threshold(dropout_p)).view(batch, heads, queries, keys)


def plan_of(
    query: Tensor,
    key: Tensor,
    center: Tensor,
    precision: Tensor,
    spatial_shapes: SpatialShapes,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    mass_tolerance: float,
) -> locality.Plan | None:
    """What `attention` computes of these arguments, or None where it computes all."""
    sides = [side for shape in spatial_shapes for side in shape]
    if mass_tolerance == 0.0 or not launch.plan_pays(query, sides):
        return None
    plan = _plan(
        query, key, center.float(), precision.float(), valid_shapes, key_padding_mask, sides, scale, mass_tolerance
    )
    batch, heads, queries, head_dim = query.shape
    block = launch.configuration("forward", launch.architecture(query.device), query.dtype, head_dim).block_n
    blocks, scales = -(-queries // block), len(spatial_shapes)
    windows = plan[..., queries : queries + blocks * scales * 4].view(batch, heads, blocks, scales, 4)
    return locality.Plan(plan[..., :queries].long(), windows.long(), block)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    spatial_shapes: SpatialShapes,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    mass_tolerance: float = 0.0,
) -> Tensor:
    """The backend "triton"; arguments as in `smca_kernels.smca_attention`, already validated."""
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    center, precision = center.float(), precision.float()
    sides = [side for shape in spatial_shapes for side in shape]
    plan = None
    # Whether it pays must not become a condition on the sizes of a compiled graph: there the operator looks.
    if mass_tolerance > 0.0 and (torch.compiler.is_compiling() or launch.plan_pays(query, sides)):
        tensors = (tensor.detach() for tensor in (query, key, center, precision))
        plan = _plan(*tensors, valid_shapes, key_padding_mask, sides, scale, mass_tolerance)
    out, _, _ = _forward(
        query, key, value, center, precision, None if scale_weights is None else scale_weights.float(),
        valid_shapes, key_padding_mask, seed, plan, sides, dropout_p, scale,
    )  # fmt: skip
    return out


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    spatial_shapes: SpatialShapes,
    valid_shapes: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float,
    mass_tolerance: float = 0.0,
) -> str | None:
    """Why the Triton kernels can't serve these inputs on this device, or None if they can."""
    if query.device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device, or TRITON_INTERPRET=1 set before Triton is imported; query is on {query.device}"
    if query.shape[0] == 0 or query.shape[2] == 0:
        return f"needs at least one image and one query; query is {list(query.shape)}"
    if query.dtype not in DTYPES:
        return f"serves float16, bfloat16 and float32; query is {query.dtype}"
    if query.is_cuda and query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs compute capability 8.0 for bfloat16"
    if not 2.0**-20 <= scale <= 2.0**20:
        return f"divides the prior by the softmax scale, which must be in [2^-20, 2^20]; it is {scale}"
    return None
