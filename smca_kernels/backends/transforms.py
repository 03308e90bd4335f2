"""Derivatives of operators, once, and the transforms of torch.func that follow from them: vmap and grad, but no jvp.

torch.vmap's dimension is folded into the batch, whose images do not depend on each other. The transforms need an
autograd.Function of their own: they refuse the one that torch.library makes of an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Rule: TypeAlias = Callable[..., tuple[Any, Any]]  # as torch.library.register_vmap takes it


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active, outside of a compiler."""
    if torch.compiler.is_compiling():
        return False
    transforming: bool = torch._C._are_functorch_transforms_active()
    return transforming or forward_ad._current_level >= 0


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler, torch.jit.trace, a mode or a subclass is watching: it must see operators, and no caches."""
    is_watched = torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
    return is_watched or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def needs_operator(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a backward of these upstream gradients has to go through the operator.

    It has to where a graph of the backward is wanted (the operator refuses), where autograd has batched the gradients
    (`is_grads_batched`), and where something is watching (`is_traced`).
    """
    present = [gradient for gradient in gradients if gradient is not None]
    is_batched = any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in present)
    return torch.is_grad_enabled() or is_batched or any(is_traced(gradient) for gradient in present[:1])


def folding_rule(call: Callable[..., Any], tensors: int) -> Rule:
    """Make vmap's rule for a call whose first `tensors` arguments are tensors [B, ...] or None.

    Its results are tensors [B, ...] of at least two dimensions; an empty tensor of one dimension stands for no result.
    """

    def rule(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return mapped.flatten(0, 1)

        def unfold(result: Tensor) -> Tensor:
            return result if result.dim() == 1 else result.unflatten(0, (size, result.shape[0] // size))

        folded = [fold(tensor, dim) for tensor, dim in zip(arguments[:tensors], dims[:tensors], strict=True)]
        results = call(*folded, *arguments[tensors:])
        if isinstance(results, Tensor):
            return unfold(results), 0
        return tuple(map(unfold, results)), tuple(None if result.dim() == 1 else 0 for result in results)

    return rule


def one_by_one_rule(call: Callable[..., Any]) -> Rule:
    """Make vmap's rule for a call whose random numbers depend on an image's place in its batch: call after call."""

    def rule(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        pairs = list(zip(arguments, dims, strict=True))
        rows = [
            call(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in pairs)) for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return results, (0,) * len(results)

    return rule


def register_derivatives(
    forward: Any,
    backward: Any,
    *,
    rules: tuple[Callable[[Callable[..., Any]], Rule], Callable[[Callable[..., Any]], Rule]],
    save_for_backward: Callable[..., None],
    differentiate: Callable[..., Any],
    name: str,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register autograd and vmap of an operator and of the operator that computes its gradients.

    Args:
        forward, backward: the two operators, of torch.library.custom_op.
        rules: for each a function that makes vmap's rule of a call.
        save_for_backward, differentiate: setup_context and backward, as `torch.library.register_autograd` takes them.
        name: begins the messages that refuse second derivatives and forward mode: "smca_attention: backend 'sdpa'".

    Returns:
        Functions of both operators that torch.func can transform.
    """

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{name} has no double backward; use backend='reference' for second derivatives")

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    forward.register_autograd(differentiate, setup_context=save_for_backward)
    backward.register_autograd(refuse)
    forward.register_vmap(rules[0](forward))
    backward.register_vmap(rules[1](backward))
    return (
        _transformable(forward, rules[0], save_for_backward, differentiate, name),
        _transformable(backward, rules[1], save_nothing, refuse, name),
    )


def _transformable(
    call: Callable[..., Any],
    make_rule: Callable[[Callable[..., Any]], Rule],
    save_for_backward: Callable[..., None],
    backward: Callable[..., Any],
    name: str,
) -> Callable[..., Any]:
    """Make a function of an operator that torch.func can transform."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return call(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save_for_backward(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

        @staticmethod
        def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
            return make_rule(Transformable.apply)(info, dims, *arguments)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(
                f"{name} has no forward-mode differentiation; use backend='reference' for jvp and jacfwd"
            )

    apply: Callable[..., Any] = Transformable.apply
    return apply
