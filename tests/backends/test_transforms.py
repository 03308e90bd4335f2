"""Transforms of torch.func, batches of gradients and torch.jit.trace: what the reference gives, or a clear refusal."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from smca_kernels import SpatiallyModulatedCoAttention, smca_attention

SHAPES = ((2, 3), (1, 2))
KEYS = 8
ALL = (0, 1, 2, 3, 4, 5)
fused = pytest.mark.parametrize("backend", ["sdpa", "triton"])
Attend = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def triton(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend") == "triton":
        pytest.importorskip("triton")


@pytest.fixture
def tensors(generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Query, key, value, center, precision and scale_weights, each of three calls: [3, B, ...]."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(3, 2, *shape, generator=generator).to(device)

    prior = normal(2, 3, 2, 2), normal(1, 3, 2, 2).abs()
    return [normal(2, 3, 16), normal(2, KEYS, 16), normal(2, KEYS, 16), *prior, normal(1, 3, 2)]


def attend_with(backend: str, **options: Any) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, center: Tensor, precision: Tensor, weights: Tensor) -> Tensor:
        return smca_attention(query, key, value, center, precision, SHAPES, weights, backend=backend, **options)

    return attend


def squared(function: Attend) -> Attend:
    return lambda *arguments: function(*arguments).square().sum()


def batched_gradients(attend: Attend, tensors: list[Tensor]) -> Any:
    first = [tensor[0].clone().requires_grad_() for tensor in tensors]
    upstream = torch.stack([torch.full_like(first[0], i) for i in range(1, 4)])
    return torch.autograd.grad(attend(*first), first, upstream, is_grads_batched=True)


TRANSFORMS: dict[str, Callable[[Attend, list[Tensor]], Any]] = {
    "grad": lambda attend, t: grad(squared(attend), ALL)(*(x[0] for x in t)),
    "vmap": lambda attend, t: vmap(attend)(*t),
    "vmap over queries alone": lambda attend, t: vmap(attend, (0, *(None,) * 5))(t[0], *(x[0] for x in t[1:])),
    "vmap over another axis": lambda attend, t: vmap(attend, (2, 0, 0, 0, 0, 0))(t[0].movedim(0, 2), *t[1:]),
    "vmap of grad": lambda attend, t: vmap(grad(squared(attend), ALL))(*t),
    "grad of vmap": lambda attend, t: grad(squared(vmap(attend, (0, None, 0, 0, 0, 0))), ALL)(t[0], t[1][0], *t[2:]),
    "vmap of vmap": lambda attend, t: vmap(vmap(attend, (0, *(None,) * 5)), (None, *(0,) * 5))(*t),
    "jacrev": lambda attend, t: jacrev(lambda *x: attend(*x).sum((0, 2)), (0, 3))(*(x[0] for x in t)),
    "is_grads_batched": batched_gradients,
}


def assert_close(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    else:
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs)


@fused
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_the_reference_gives(name: str, backend: str, tensors: list[Tensor]) -> None:
    transform = TRANSFORMS[name]
    # In float64: of a centre far outside, the reference's own float32 cancels.
    exact = transform(attend_with("reference"), [tensor.double() for tensor in tensors])
    assert_close(transform(attend_with(backend), tensors), exact)


@pytest.mark.parametrize("given", ["valid_shapes", "key_padding_mask", "neither"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_per_sample_gradients_of_the_layer(
    backend: str, given: str, generator: torch.Generator, device: torch.device
) -> None:
    layer = SpatiallyModulatedCoAttention(32, 4, (16, 32), batch_first=True).to(device)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    query, memory = (torch.randn(3, n, 32, generator=generator).to(device) for n in (4, KEYS))
    masks = {
        "valid_shapes": torch.tensor([[[2, 3], [1, 2]], [[1, 2], [1, 1]], [[2, 1], [1, 1]]], device=device),
        "key_padding_mask": torch.rand(3, KEYS, generator=generator).to(device) < 0.3,
    }

    def loss(parameters: dict[str, Tensor], query: Tensor, memory: Tensor, mask: Tensor | None, backend: str) -> Tensor:
        options = {} if mask is None else {given: mask[None]}
        memory = memory[None]
        inputs = {"prior_features": query[None], "backend": backend, **options}
        output, _ = functional_call(layer, parameters, (query[None], memory, memory, SHAPES), inputs)
        return output.square().sum()

    mask = masks.get(given)
    exact = {name: parameter.double() for name, parameter in parameters.items()}
    dims = (None, 0, 0, None if mask is None else 0, None)
    together = vmap(grad(loss), dims)(parameters, query, memory, mask, backend)
    for i in range(3):
        of_mask = None if mask is None else mask[i]
        alone = grad(loss)(exact, query[i].double(), memory[i].double(), of_mask, "reference")
        for name, expected in alone.items():
            torch.testing.assert_close(together[name][i].double(), expected, rtol=1e-3, atol=1e-3, msg=name)


def test_dropout_is_drawn_for_each_call_or_once_as_vmap_is_told(tensors: list[Tensor]) -> None:
    pytest.importorskip("triton")
    same = [tensor[:1].expand(3, *tensor.shape[1:]) for tensor in tensors]
    attend = attend_with("triton", dropout_p=0.5)
    first, second, _ = vmap(attend, randomness="different")(*same)
    assert not torch.equal(first, second)
    first, second, _ = vmap(attend, randomness="same")(*same)
    assert torch.equal(first, second)
    for gradient in vmap(grad(squared(attend), ALL), randomness="different")(*same):
        assert gradient.isfinite().all()


# --- what there is not ---


def make_dual(attend: Attend, query: Tensor, *others: Tensor) -> None:
    with forward_ad.dual_level():
        attend(forward_ad.make_dual(query, query), *others)


FORWARD_MODES: dict[str, Callable[..., Any]] = {
    "jvp": lambda attend, *t: jvp(lambda query: attend(query, *t[1:]), (t[0],), (t[0],)),
    "jacfwd": lambda attend, *t: jacfwd(lambda query: attend(query, *t[1:]))(t[0]),
    "dual numbers": make_dual,
}


@fused
@pytest.mark.parametrize("name", FORWARD_MODES)
def test_forward_mode_is_refused(name: str, backend: str, tensors: list[Tensor]) -> None:
    first = [tensor[0] for tensor in tensors]
    FORWARD_MODES[name](attend_with("reference"), *first)
    with pytest.raises(RuntimeError, match=f"'{backend}' has no forward-mode .* use backend='reference'"):
        FORWARD_MODES[name](attend_with(backend), *first)


@fused
def test_second_derivatives_are_refused(backend: str, tensors: list[Tensor]) -> None:
    query, *others = (tensor[0] for tensor in tensors)
    first = grad(squared(attend_with(backend)))
    with pytest.raises(RuntimeError, match=f"'{backend}' has no double backward; use backend='reference'"):
        grad(lambda query: first(query, *others).sum())(query)


def test_the_prior_refuses_both(generator: torch.Generator, device: torch.device) -> None:
    pytest.importorskip("triton")
    prior = SpatiallyModulatedCoAttention(32, 4, batch_first=True).to(device).prior
    features = torch.randn(1, 3, 32, generator=generator).to(device)

    def center(features: Tensor) -> Tensor:
        return prior(features, [(2, 3)], backend="triton").center.square().sum()

    with pytest.raises(RuntimeError, match="'triton' has no forward-mode"):
        jvp(center, (features,), (features,))
    with pytest.raises(RuntimeError, match="'triton' has no double backward"):
        grad(lambda x: grad(center)(x).sum())(features)


@fused
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_a_program_of_jit_trace_computes_with_the_tensors_that_it_is_given(backend: str, tensors: list[Tensor]) -> None:
    attend = attend_with(backend)
    first, other = ([tensor[i] for tensor in tensors] for i in (0, 1))
    program = io.BytesIO()
    torch.jit.save(torch.jit.trace(attend, first), program)
    program.seek(0)
    loaded = torch.jit.load(program)
    leaves = [tensor.clone().requires_grad_() for tensor in other]
    out = loaded(*leaves)
    assert_close(out, attend(*other).double())
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert_close(gradients, [gradient.double() for gradient in grad(squared(attend), ALL)(*other)])


@fused
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_a_layer_in_a_program_of_jit_trace_computes_with_the_features_that_it_is_given(
    backend: str, generator: torch.Generator, device: torch.device
) -> None:
    layer = SpatiallyModulatedCoAttention(16, 2, (16, 32), geometry="paper").to(device).requires_grad_(False)

    def attend(query: Tensor, memory: Tensor) -> Tensor:
        output: Tensor = layer(query, memory, memory, SHAPES, backend=backend)[0]
        return output

    inputs = [torch.randn(size, 2, 16, generator=generator).to(device) for size in (3, KEYS)]
    traced = torch.jit.trace(attend, inputs)
    others = [2 * tensor for tensor in inputs]
    assert_close(traced(*others), attend(*others).double())
