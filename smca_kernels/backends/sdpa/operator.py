"""The portable backend as torch.library operators, with fake implementations and autograd.

An eager call takes a plain autograd function around the same passes: an operator's dispatch takes longer than a small
call. Compilers and tensor subclasses get the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smca_kernels.backends.sdpa.backward import backward
from smca_kernels.backends.sdpa.forward import (
    combine_scales,
    dense_outputs,
    forward,
    full_dtype,
    fused_rounds_to_tf32,
    widened_outputs,
)
from smca_kernels.backends.transforms import (
    folding_rule,
    in_transform,
    is_traced,
    needs_operator,
    register_derivatives,
)
from smca_kernels.inputs import DIFFERENTIABLE, SCHEMA, AttentionInputs


def attention(inputs: AttentionInputs) -> Tensor:
    """The output [B, H, N, D_v] of the backend "sdpa"."""
    query = inputs.query
    if inputs.dropout_p > 0.0:
        # Only SDPA knows what it dropped, so its own backward has to follow, in float32 for the columns' sake.
        dtype = full_dtype(query)
        is_dense = fused_rounds_to_tf32(query.device, dtype)
        outputs = dense_outputs(inputs) if is_dense else widened_outputs(inputs, dtype)
        return combine_scales(outputs, inputs.scale_weights).to(query.dtype)
    if is_traced(query):
        out: Tensor = _forward_operator(*inputs.flat())
    elif in_transform():
        out = _transformable_forward(*inputs.flat())
    else:
        out = _Attention.apply(inputs, *inputs.flat())
    return out


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why SDPA can't serve these inputs, or None if it can."""
    query = inputs.query
    if query.shape[0] == 0 or query.shape[2] == 0:
        return f"needs at least one image and one query; query is {list(query.shape)}"
    return None


@torch.library.custom_op("smca_kernels::sdpa_forward", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def _forward_operator(*arguments: Any) -> Tensor:
    return forward(AttentionInputs.of_flat(arguments)).contiguous()  # as its fake is


@torch.library.custom_op(
    "smca_kernels::sdpa_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_operator(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(gradient.contiguous() for gradient in backward(grad_out, AttentionInputs.of_flat(arguments)))


@_forward_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@_backward_operator.register_fake
def _(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    scale_weights = arguments[0].new_empty(0) if arguments[5] is None else arguments[5]
    return tuple(tensor.new_empty(tensor.shape) for tensor in (*arguments[:5], scale_weights))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sides, ctx.dropout_p, ctx.scale, ctx.mass_tolerance = inputs
    ctx.save_for_backward(*tensors)


def _saved_arguments(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, ctx.sides, ctx.dropout_p, ctx.scale, ctx.mass_tolerance


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    call = _transformable_backward if in_transform() else _backward_operator
    return _wanted(ctx.needs_input_grad, call(grad_out, *_saved_arguments(ctx)))


def _wanted(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    pairs = zip(gradients, wanted[: len(DIFFERENTIABLE)], strict=True)
    return *(gradient if is_wanted else None for gradient, is_wanted in pairs), *(None for _ in wanted[6:])


_transformable_forward, _transformable_backward = register_derivatives(
    _forward_operator,
    _backward_operator,
    rules=(partial(folding_rule, tensors=8), partial(folding_rule, tensors=9)),
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
    name="smca_attention: backend 'sdpa'",
)


class _Attention(torch.autograd.Function):
    """The operator without its dispatch; one that torch.func could transform would take as long to apply."""

    @staticmethod
    def forward(ctx: Any, inputs: AttentionInputs, *flat: Any) -> Tensor:  # flat: autograd looks for tensors there
        _save_for_backward(ctx, flat, flat[0])
        return forward(inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat = _saved_arguments(ctx)
        if needs_operator((grad_out,)):
            gradients = _backward_operator(grad_out, *flat)
        else:
            gradients = backward(grad_out, AttentionInputs.of_flat(flat))
        return None, *_wanted(ctx.needs_input_grad[1:], gradients)
