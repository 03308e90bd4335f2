"""Transforms of torch.func for operators that don't know them: vmap, grad, what is made of the two, and no jvp.

What torch.vmap maps over is folded into the images of a batch, which no result crosses. Transforms need an
autograd.Function: they refuse the one that torch.library makes of an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Rule: TypeAlias = Callable[..., tuple[Any, Any]]  # as torch.library.register_vmap takes it


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is going on, outside of a compiler."""
    if torch.compiler.is_compiling():
        return False
    transforming: bool = torch._C._are_functorch_transforms_active()
    return transforming or forward_ad._current_level >= 0


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler, torch.jit.trace, a mode or a subclass looks on, which has to see operators and no caches."""
    looked_at = torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)
    return looked_at or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def needs_operator(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a backward of these gradients has to be an operator's.

    A graph of it is wanted, which the operator refuses to be, it is one of many in a batch, or something looks on.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    is_batched = any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in present)
    return torch.is_grad_enabled() or is_batched or any(is_traced(gradient) for gradient in present[:1])


def folding_rule(call: Callable[..., Any], tensors: int) -> Rule:
    """The rule of vmap for a call whose first `tensors` arguments are tensors [B, ...] or None.

    Its results are tensors [B, ...] of at least two dimensions, or have one and no elements where they stand for
    nothing.
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
    """The rule of vmap for a call whose random numbers depend on the place of an image in its batch."""

    def rule(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        pairs = list(zip(arguments, dims, strict=True))
        rows = [
            call(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in pairs)) for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return results, (0,) * len(results)

    return rule


def transformable(
    call: Callable[..., Any],
    make_rule: Callable[[Callable[..., Any]], Rule],
    save_for_backward: Callable[..., None],
    backward: Callable[..., Any],
    refusal: str,
) -> Callable[..., Any]:
    """Make a function of an operator that torch.func can transform.

    Args:
        call: the operator.
        make_rule: makes vmap's rule of the function.
        save_for_backward, backward: as `torch.library.register_autograd` takes them.
        refusal: the message for forward-mode differentiation, which there is none of.
    """

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
            raise RuntimeError(refusal)

    apply: Callable[..., Any] = Transformable.apply
    return apply


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save nothing, for a backward that refuses."""
