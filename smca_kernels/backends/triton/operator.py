"""The Triton backend as torch.library operators: fake implementations, autograd, and what it can't serve.

`torch.ops.smca_kernels.forward` and `.backward` are opaque to torch.compile and torch.export, synchronise with nothing
and draw no random numbers themselves (dropout takes a seed tensor), so they can be captured in a CUDA graph. An eager
call takes a plain autograd function around the same launches: an operator's dispatch takes longer than a small call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smca_kernels.backends.devices import capability, is_nvidia
from smca_kernels.backends.transforms import (
    folding_rule,
    in_transform,
    is_traced,
    needs_operator,
    one_by_one_rule,
    register_derivatives,
)
from smca_kernels.backends.triton import hopper, launch
from smca_kernels.backends.triton.channels import INTERPRETED
from smca_kernels.inputs import DIFFERENTIABLE, SCHEMA, AttentionInputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FOUR_TENSORS = "(Tensor, Tensor, Tensor, Tensor)"
SIX_TENSORS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op("smca_kernels::forward", mutates_args=(), schema=f"({SCHEMA}, Tensor? seed) -> {FOUR_TENSORS}")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *flat, seed = arguments
    return launch.forward(AttentionInputs.of_flat(flat), seed)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = AttentionInputs.of_flat(arguments[:-1])
    query, scales = inputs.query, len(inputs.spatial_shapes)
    batch, heads, queries, head_dim = query.shape
    return (
        launch.empty_rows_like(launch.last_axis_contiguous(query)),
        query.new_empty(batch, heads, queries, scales, head_dim, dtype=torch.float32),
        query.new_empty(batch, heads, queries, scales, dtype=torch.float32),
        query.new_empty(launch.plan_shape(inputs), dtype=torch.int32),
    )


@torch.library.custom_op(
    "smca_kernels::backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {SCHEMA}, Tensor? seed, Tensor scale_outputs, Tensor lse, Tensor plan, "
    f"bool needs_query, bool needs_key) -> {SIX_TENSORS}",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grad_out, *flat, seed, scale_outputs, lse, plan, needs_query, needs_key = arguments
    inputs = AttentionInputs.of_flat(flat)
    return launch.backward(grad_out, inputs, seed, plan, scale_outputs, lse, needs_query, needs_key)


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, *flat, _, _, lse, _, needs_query, needs_key = arguments
    inputs = AttentionInputs.of_flat(flat)
    query = inputs.query

    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return launch.empty_rows_like(launch.last_axis_contiguous(tensor)) if wanted else query.new_empty(0)

    prior = query.new_empty(*lse.shape, 2, dtype=torch.float32) if needs_query else query.new_empty(0)
    return (
        like(query, needs_query),
        like(inputs.key, needs_key),
        like(inputs.value, needs_key),
        prior,
        torch.empty_like(prior),
        query.new_empty(0) if inputs.scale_weights is None else torch.empty_like(lse),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.sides, ctx.dropout_p, ctx.scale, ctx.mass_tolerance, seed = inputs
    ctx.save_for_backward(*tensors, seed, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_arguments(ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the backward operator takes after grad_out; `saved` are the saved tensors, which unpack once."""
    *tensors, seed, scale_outputs, lse, plan = saved
    wanted = ctx.needs_input_grad
    return (
        *tensors, ctx.sides, ctx.dropout_p, ctx.scale, ctx.mass_tolerance, seed, scale_outputs, lse, plan,
        wanted[0] or wanted[3] or wanted[4], wanted[1] or wanted[2],
    )  # fmt: skip


def _wanted(ctx: Any, saved: tuple[Any, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that need one, summed over heads where these share an input."""

    def over_heads(gradient: Tensor, like: Tensor) -> Tensor:
        return gradient.sum(1, keepdim=True) if like.shape[1] == 1 < gradient.shape[1] else gradient

    count = len(DIFFERENTIABLE)
    triples = zip(gradients, saved[:count], ctx.needs_input_grad[:count], strict=True)
    return *(over_heads(g, like) if is_wanted else None for g, like, is_wanted in triples), *(None,) * 7


def _differentiate(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    call = _transformable_backward if in_transform() else _backward
    return _wanted(ctx, saved, call(grad_out, *_backward_arguments(ctx, saved)))


def _forward_rule(call: Any) -> Any:
    """Make vmap's rule: image by image with dropout, which knows an image by its place in the batch."""
    folded, separate = folding_rule(call, tensors=8), one_by_one_rule(call)
    return lambda info, dims, *arguments: (folded if arguments[12] is None else separate)(info, dims, *arguments)


def _backward_rule(call: Any) -> Any:
    """Make vmap's rule for a call with its arguments in another order: first all tensors."""

    def reordered(*arguments: Any) -> Any:
        return call(*arguments[:9], *arguments[12:17], *arguments[9:12], *arguments[17:])

    def order(arguments: Any) -> Any:
        return *arguments[:9], *arguments[14:17], *arguments[9:14], *arguments[17:]

    folded, separate = folding_rule(reordered, tensors=12), one_by_one_rule(reordered)
    return lambda info, dims, *arguments: (folded if arguments[13] is None else separate)(
        info, order(dims), *order(arguments)
    )


_transformable_forward, _transformable_backward = register_derivatives(
    _forward,
    _backward,
    rules=(_forward_rule, _backward_rule),
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
    name="smca_attention: backend 'triton'",
)


class _Attention(torch.autograd.Function):
    """The operator without its dispatch; one that torch.func could transform would take as long to apply."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *flat, seed = arguments
        output = launch.forward(AttentionInputs.of_flat(flat), seed)
        *tensors, ctx.sides, ctx.dropout_p, ctx.scale, ctx.mass_tolerance = flat
        ctx.save_for_backward(*tensors, seed, *output[1:])
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        arguments = _backward_arguments(ctx, saved)
        if needs_operator((grad_out,)):
            return _wanted(ctx, saved, _backward(grad_out, *arguments))
        *flat, seed, scale_outputs, lse, plan, needs_query, needs_key = arguments
        inputs = AttentionInputs.of_flat(flat)
        gradients = launch.backward(grad_out, inputs, seed, plan, scale_outputs, lse, needs_query, needs_key)
        return _wanted(ctx, saved, gradients)


def attention(inputs: AttentionInputs) -> Tensor:
    """The output [B, H, N, D] of the backend "triton"."""
    query, weights = inputs.query, inputs.scale_weights
    seed = None
    if inputs.dropout_p > 0.0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    *rest, mass_tolerance = inputs.flat()[6:]
    # Whether a plan pays must not become a condition on the sizes of a compiled graph: there the operator looks.
    if not (torch.compiler.is_compiling() or launch.is_planned(inputs)):
        mass_tolerance = 0.0
    arguments = (
        query, inputs.key, inputs.value, inputs.center.float(), inputs.precision.float(),
        None if weights is None else weights.float(), *rest, mass_tolerance, seed,
    )  # fmt: skip
    if is_traced(query):
        out: Tensor = _forward(*arguments)[0]
    elif in_transform():
        out = _transformable_forward(*arguments)[0]
    else:
        out = _Attention.apply(*arguments)
    return out


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why the Triton kernels can't serve these inputs on this device, or None if they can."""
    query, scale = inputs.query, inputs.scale
    if not (is_nvidia(query.device) or INTERPRETED):
        return f"needs an NVIDIA GPU, or TRITON_INTERPRET=1 set before Triton is imported; query is on {query.device}"
    if query.shape[0] == 0 or query.shape[2] == 0:
        return f"needs at least one image and one query; query is {list(query.shape)}"
    if query.dtype not in DTYPES:
        return f"serves float16, bfloat16 and float32; query is {query.dtype}"
    if query.is_cuda and query.dtype == torch.bfloat16 and capability(query.device) < (8, 0):
        return "needs compute capability 8.0 for bfloat16"
    if not 2.0**-20 <= scale <= 2.0**20:
        return f"divides the prior by the softmax scale, which must be in [2^-20, 2^20]; it is {scale}"
    return hopper.unsupported(query.device)


def mix(x: Tensor) -> Tensor:
    """Twin of `channels.mix` on int64 tensors that hold uint32 values."""
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
    row_keys = mix(counter(queries) ^ mix(counter(batch * heads) ^ low)[:, None]) ^ high
    key_keys = counter(keys) * 0x9E3779B9 & 0xFFFFFFFF
    elements = mix(row_keys[:, :, None] ^ key_keys)
    signed = elements - (elements >> 31 << 32)
    return (signed >= launch.dropout_threshold(dropout_p)).view(batch, heads, queries, keys)
