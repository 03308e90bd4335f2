"""The portable backend: error budgets on each of its paths, its columns alone, memory, tracing and dropout."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smca_kernels import smca_attention
from smca_kernels.backends import reference
from smca_kernels.backends.sdpa import backward, forward, operator
from smca_kernels.inputs import AttentionInputs
from smca_kernels.profiling.measure import saved_bytes
from smca_kernels.testing.cases import CASES, PRIORS, Case, CaseInputs, make_inputs
from smca_kernels.testing.check import TENSORS, attend, check, run_backend, run_reference

SHAPES = ((9, 17), (5, 8))
SMALL_CASES = [case for case in CASES if not case.large]
HALVES = (torch.float16, torch.bfloat16)


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def set_dense_limit(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "MAX_DENSE_SCORES", scores)


def set_block_scores(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "CPU_BLOCK", scores // torch.get_num_threads())
    monkeypatch.setattr(backward, "DEVICE_BLOCK", scores)


@pytest.fixture
def always_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases, too, through widened queries and keys."""
    set_dense_limit(monkeypatch, 0)


def run(inputs: CaseInputs) -> Tensor:
    return attend(inputs, "sdpa")


def results(inputs: CaseInputs) -> list[Tensor]:
    return list(run_backend(inputs, "sdpa").values())


# --- error budgets ---


def assert_passes(case: Case, generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(case, generator, device)
    over = [str(c) for c in check(inputs, "sdpa") if not c.ratio <= 1.0]
    assert not over, "\n".join(over)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=names(SMALL_CASES))
def test_results_are_within_their_budgets(
    case: Case, dtype: str, generator: torch.Generator, device: torch.device
) -> None:
    assert_passes(dataclasses.replace(case, dtype=dtype), generator, device)


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("case", SMALL_CASES, ids=names(SMALL_CASES))
def test_results_by_widened_columns_are_within_their_budgets(
    case: Case, generator: torch.Generator, device: torch.device
) -> None:
    assert_passes(case, generator, device)


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=names(SMALL_CASES))
def test_results_by_columns_in_half_precision_are_within_their_budgets(
    case: Case, dtype: str, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "sdpa_dtype", lambda query, shapes: query.dtype)
    assert_passes(dataclasses.replace(case, dtype=dtype), generator, device)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 by plain products, head by head, on any device."""
    for module in (forward, operator):
        monkeypatch.setattr(module, "fused_rounds_to_tf32", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(forward, "DEVICE_BLOCK", 1)


@pytest.mark.usefixtures("always_widened", "as_on_a_gpu")
@pytest.mark.parametrize("case", SMALL_CASES, ids=names(SMALL_CASES))
def test_results_by_plain_products_are_within_their_budgets(
    case: Case, generator: torch.Generator, device: torch.device
) -> None:
    assert_passes(case, generator, device)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_plain_products_drop_out_without_nan_where_no_key_counts(
    generator: torch.Generator, device: torch.device
) -> None:
    inputs = make_inputs(Case("empty", SHAPES, batch=2, queries=9, mask="empty_scale_padding"), generator, device)
    for dropout_p in (0.3, 1.0):
        found = run_backend(inputs, "sdpa", dropout_p=dropout_p)
        assert all(tensor.isfinite().all() for tensor in found.values())
    assert not found["output"].any()


@pytest.mark.parametrize("prior", PRIORS)
def test_a_large_grid_is_within_its_budgets(prior: str, generator: torch.Generator, device: torch.device) -> None:
    case = Case("large grid", ((100, 134),), batch=1, heads=1, queries=64, head_dim=16, prior=prior)
    assert_passes(case, generator, device)


@pytest.mark.parametrize("dense_limit", [0, 2**14])
def test_a_backward_inside_of_an_autocast_region_is_the_one_outside(
    dense_limit: int, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_dense_limit(monkeypatch, dense_limit)
    inputs = make_inputs(Case("autocast", SHAPES, heads=2, prior_heads=1), generator, device)
    leaves, out = list(inputs.differentiable().values()), run(inputs)
    expected = torch.autograd.grad(out, leaves, inputs.grad_output, retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        found = torch.autograd.grad(out, leaves, inputs.grad_output)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("shape", [(2, 3), (1, 11), (19, 27), (11, 47)])
def test_a_grid_that_leaves_few_keys_for_the_last_product_is_within_its_budgets(
    shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> None:
    case = Case("few keys left over", (shape,), heads=2, queries=70)
    inputs = make_inputs(case, generator, device)
    # Narrow across one axis and wide along the other: many keys count, and large terms cancel in their logits.
    is_narrow = torch.rand(inputs.precision.shape, generator=generator) < 0.5
    precision = torch.where(is_narrow, 100.0, 0.1).to(device).requires_grad_()
    over = [str(c) for c in check(dataclasses.replace(inputs, precision=precision), "sdpa") if not c.ratio <= 1.0]
    assert not over, "\n".join(over)


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("mask", ["none", "valid_shapes", "random"])
def test_float64_is_computed_in_float64(mask: str, generator: torch.Generator, device: torch.device) -> None:
    case = Case("float64", SHAPES, dtype="float64", prior_dtype="float64", mask=mask)
    inputs = make_inputs(case, generator, device)
    for ours, exact in zip(results(inputs), run_reference(inputs).values(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10 * exact.abs().max().item())


def test_several_blocks_give_what_one_gives(
    generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(Case("blocks", SHAPES, heads=3, queries=33, mask="valid_shapes"), generator, device)
    at_once = results(inputs)
    for limit in (4 * 9 * 17, 2 * 33 * 9 * 17):  # parts of one head, two heads of six
        set_block_scores(monkeypatch, limit)
        for ours, expected in zip(results(inputs), at_once, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.usefixtures("always_widened")
def test_center_and_precision_may_have_different_heads(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("heads", SHAPES, batch=1, heads=3), generator, device)
    for name in ("center", "precision"):
        shared = getattr(inputs, name)[:, :1].detach().requires_grad_()
        mixed = dataclasses.replace(inputs, **{name: shared})
        assert all(c.ratio <= 1.0 for c in check(mixed, "sdpa"))


def test_only_some_inputs_may_want_a_gradient(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("some", SHAPES), generator, device)
    gradients = run_backend(inputs, "sdpa")
    for name in ("value", "center"):
        alone = {n: t.detach() for n, t in inputs.differentiable().items()}
        alone[name].requires_grad_()
        out = run(dataclasses.replace(inputs, **alone))
        (gradient,) = torch.autograd.grad(out, alone[name], inputs.grad_output)
        assert torch.equal(gradient, gradients[name])


@pytest.mark.usefixtures("always_widened")
def test_an_expanded_gradient_is_taken(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("sum", SHAPES), generator, device)
    inputs = dataclasses.replace(inputs, grad_output=torch.ones((), device=device).expand(inputs.query.shape))
    assert all(c.ratio <= 1.0 for c in check(inputs, "sdpa"))


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("scale", [1e-30, -1e-30, 30.0])
def test_extreme_scales_are_taken(scale: float, generator: torch.Generator, device: torch.device) -> None:
    assert_passes(Case("scale", SHAPES, scale=scale), generator, device)


# --- masks ---


@pytest.mark.usefixtures("always_widened")
@pytest.mark.parametrize("mask", ["valid_shapes", "random"])
def test_ignored_keys_have_no_weight_at_all(mask: str, generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("garbage", SHAPES, mask=mask), generator, device)
    ignored = torch.cat(reference.ignored_keys(SHAPES, inputs.valid_shapes, inputs.key_padding_mask), 1)
    garbage = {
        name: torch.where(ignored[:, None, :, None], 1e4, getattr(inputs, name)).detach().requires_grad_()
        for name in ("key", "value")
    }
    clean, dirty = results(inputs), results(dataclasses.replace(inputs, **garbage))
    for name, ours, expected in zip(TENSORS, dirty, clean, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(), msg=name)
    for gradient in dirty[2:4]:  # of key and value
        assert not gradient.masked_select(ignored[:, None, :, None]).any()


@pytest.mark.parametrize("widened", [False, True])
def test_an_image_without_valid_keys_gives_zeros_and_no_gradient(
    widened: bool, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if widened:
        set_dense_limit(monkeypatch, 0)
    inputs = make_inputs(Case("empty", SHAPES, batch=2), generator, device)
    valid = torch.tensor([[[9, 17], [5, 8]], [[0, 3], [2, 0]]], device=device)
    for result in results(dataclasses.replace(inputs, valid_shapes=valid)):
        assert result.isfinite().all()
        assert result[0].any()
        assert not result[1].any()


@pytest.mark.usefixtures("always_widened")
def test_an_image_alone_in_a_batch_and_padded_gives_the_same(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("batch", SHAPES), generator, device)
    first = {name: tensor.detach()[:1] for name, tensor in inputs.differentiable().items()}
    alone = smca_attention(**first, spatial_shapes=SHAPES, backend="sdpa")
    torch.testing.assert_close(alone, run(inputs)[:1], rtol=1e-5, atol=1e-5)
    padded_shapes = [(height + 3, width + 2) for height, width in SHAPES]
    padded = {}
    for name in ("key", "value"):
        grids = [
            torch.nn.functional.pad(grid.unflatten(2, shape), (0, 0, 0, 2, 0, 3), value=7.0).flatten(2, 3)
            for grid, shape in zip(first[name].split([9 * 17, 5 * 8], 2), SHAPES, strict=True)
        ]
        padded[name] = torch.cat(grids, 2)
    out = smca_attention(**(first | padded), spatial_shapes=padded_shapes, valid_shapes=[list(SHAPES)], backend="sdpa")
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


# --- dtypes of columns and probabilities ---


def test_grids_too_large_for_half_precision_coordinates_use_float32() -> None:
    query = torch.empty(1, dtype=torch.float16, device="meta")
    assert forward.sdpa_dtype(query, ((511, 2),)) == torch.float16
    assert forward.sdpa_dtype(query, ((2, 512),)) == torch.float32


def test_probabilities_are_never_subnormal_on_a_cpu() -> None:
    keys, heads = 4200, 8
    query, key, prior = torch.zeros(1, heads, 1, 16), torch.zeros(1, heads, keys, 16), torch.zeros(1, 1, 1, 1, 2)
    inputs = AttentionInputs(query, key, key, prior, prior, None, None, None, ((1, keys),), 0.0, 1.0, 0.0)
    workspace = torch.empty(3, heads, 1, keys)
    workspace[0] = torch.linspace(0.0, 300.0, keys)  # -logG
    assert workspace[0].numel() > backward.MAX_DENSE_SCORES
    gradients = backward.GradientAccumulator(torch.zeros_like(query), inputs)
    gradients.add(workspace, (slice(0, heads), slice(0, 1), slice(0, keys), 0))
    assert (workspace[0] >= torch.finfo(torch.float32).smallest_normal).all()


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                # Of what is stored: an expanded tensor is a view.
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_for_backward_grows_with_the_keys_and_not_with_queries_times_keys(
    dtype: str, generator: torch.Generator, device: torch.device
) -> None:
    for side in (8, 16, 32):
        case = Case("saved", ((side, side), (side // 2, side // 2)), queries=200, dtype=dtype)
        inputs = make_inputs(case, generator, device)
        given = sum(tensor.nbytes for tensor in inputs.differentiable().values())
        assert saved_bytes(partial(run, inputs)) <= 2.5 * given


def test_no_tensor_of_queries_times_keys_is_made(
    generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 2**14
    set_block_scores(monkeypatch, block)
    largest = []
    for side in (16, 32):
        case = Case("large", ((side, side),), batch=1, heads=1, queries=512, head_dim=16, mask="valid_shapes")
        inputs = make_inputs(case, generator, device)
        with LargestTensor() as mode:
            results(inputs)
        largest.append(mode.elements)
        assert mode.elements < 512 * side * side / 2
    assert largest[1] <= 4 * largest[0]


def test_the_same_inputs_give_the_same_bits(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("bits", ((25, 42), (13, 21)), queries=100, mask="valid_shapes"), generator, device)
    for first, second in zip(results(inputs), results(inputs), strict=True):
        assert torch.equal(first, second)


# --- tracing, autograd ---


@pytest.fixture
def inputs(generator: torch.Generator, device: torch.device) -> CaseInputs:
    return make_inputs(Case("small", SHAPES, mask="valid_shapes"), generator, device)


def operator_arguments(inputs: CaseInputs, grad_output: Tensor | None = None) -> tuple[Any, ...]:
    return inputs.flat() if grad_output is None else (grad_output, *inputs.detached().flat())


def test_the_operators_pass_opcheck(inputs: CaseInputs) -> None:
    operators = torch.ops.smca_kernels
    torch.library.opcheck(operators.sdpa_forward.default, operator_arguments(inputs))
    torch.library.opcheck(operators.sdpa_backward.default, operator_arguments(inputs, inputs.grad_output))


def test_opcheck_passes_without_scale_weights(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("small", SHAPES, scale_weights=False, prior_heads=1), generator, device)
    torch.library.opcheck(torch.ops.smca_kernels.sdpa_forward.default, operator_arguments(inputs))
    arguments = operator_arguments(inputs, inputs.grad_output)
    torch.library.opcheck(torch.ops.smca_kernels.sdpa_backward.default, arguments)


@pytest.mark.parametrize("dense_limit", [0, 2**20])
def test_the_operators_return_the_layout_that_compilers_were_promised(
    dense_limit: int, generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_dense_limit(monkeypatch, dense_limit)
    inputs = make_inputs(Case("small", SHAPES, batch=1, heads=2), generator, device)
    # As projections leave them: heads inside of the sequence.
    tensors = {
        name: t.detach().transpose(1, 2).contiguous().transpose(1, 2) for name, t in inputs.differentiable().items()
    }
    arguments = dataclasses.replace(inputs, **tensors).flat()
    output = torch.ops.smca_kernels.sdpa_forward(*arguments)
    gradients = torch.ops.smca_kernels.sdpa_backward(inputs.grad_output, *arguments)
    assert all(tensor.is_contiguous() for tensor in (output, *gradients))


@pytest.mark.parametrize("traced", [False, True])
def test_double_backward_raises(inputs: CaseInputs, traced: bool) -> None:
    out = torch.ops.smca_kernels.sdpa_forward(*operator_arguments(inputs)) if traced else run(inputs)
    tensors = list(inputs.differentiable().values())
    for gradient in torch.autograd.grad(out, tensors, inputs.grad_output, create_graph=True):
        with pytest.raises(RuntimeError, match="'sdpa' has no double backward"):
            torch.autograd.grad(gradient.sum(), inputs.query)


def attend_to_maps(query: Tensor, maps: list[Tensor], prior: list[Tensor], valid: Tensor | None = None) -> Tensor:
    """Keys and grid sizes from feature maps [B, H, D, height, width], as a detector has them."""
    key = torch.cat([m.flatten(3) for m in maps], 3).transpose(2, 3)
    shapes = [(m.shape[3], m.shape[4]) for m in maps]
    return smca_attention(query, key, key, *prior[:2], shapes, *prior[2:], valid_shapes=valid)


def map_arguments(
    batch: int, shapes: tuple[tuple[int, int], ...], generator: torch.Generator, device: torch.device, masked: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    def leaf(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device).requires_grad_()

    prior = (batch, 3, 20, len(shapes), 2)
    maps = [leaf(batch, 3, 16, *shape) for shape in shapes]
    valid = torch.tensor([[[h - 1, w] for h, w in shapes]] * batch, device=device) if masked else None
    return leaf(batch, 3, 20, 16), maps, [leaf(*prior), leaf(*prior), leaf(*prior[:-1])], valid


@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_serves_changing_grids_and_batches(
    masked: bool, generator: torch.Generator, device: torch.device
) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_to_maps, fullgraph=True, dynamic=True, backend=counter)
    compiled_frames = set()
    for batch, shapes in ((5, ((9, 13), (6, 7))), (4, ((11, 8), (10, 21))), (7, ((23, 31), (12, 15)))):
        arguments = map_arguments(batch, shapes, generator, device, masked)
        leaves = [arguments[0], *arguments[1], *arguments[2]]
        grad = torch.randn(batch, 3, 20, 16, generator=generator).to(device)
        outs = [function(*arguments) for function in (compiled, attend_to_maps)]
        torch.testing.assert_close(*outs)
        for ours, expected in zip(*(torch.autograd.grad(out, leaves, grad) for out in outs), strict=True):
            torch.testing.assert_close(ours, expected)
        compiled_frames.add(counter.frame_count)
    assert len(compiled_frames) == 1


def test_compiled_dropout_runs(inputs: CaseInputs) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(smca_attention, fullgraph=True, backend="aot_eager")
    tensors = inputs.differentiable()
    out = compiled(**tensors, spatial_shapes=SHAPES, valid_shapes=inputs.valid_shapes, dropout_p=0.5, backend="sdpa")
    for gradient in torch.autograd.grad(out, list(tensors.values()), inputs.grad_output):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_serves_other_grids(strict: bool, generator: torch.Generator, device: torch.device) -> None:
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, maps: list[Tensor], prior: list[Tensor]) -> Tensor:
            return attend_to_maps(query, maps, prior)

    batch = torch.export.Dim("batch", min=2, max=64)
    sides = [
        {3: torch.export.Dim(f"h{s}", min=2, max=200), 4: torch.export.Dim(f"w{s}", min=2, max=200)} for s in (0, 1)
    ]
    first = {0: batch}
    dynamic = (first, [first | side for side in sides], [first] * 3)
    example = map_arguments(3, ((9, 13), (6, 7)), generator, device, False)[:3]
    program = torch.export.export(Attend(), example, dynamic_shapes=dynamic, strict=strict).module()
    other = map_arguments(4, ((20, 11), (10, 6)), generator, device, False)[:3]
    torch.testing.assert_close(program(*other), attend_to_maps(*other))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(inputs: CaseInputs, use_reentrant: bool) -> None:
    tensors = inputs.differentiable()

    def attend(*values: Tensor) -> Tensor:
        return smca_attention(**dict(zip(tensors, values, strict=True)), spatial_shapes=SHAPES, backend="sdpa")

    gradients = []
    for call in (attend, lambda *values: checkpoint(attend, *values, use_reentrant=use_reentrant)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        call(*leaves).backward(inputs.grad_output)
        gradients.append([leaf.grad for leaf in leaves])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


# --- dropout ---


def one_hot_inputs(generator: torch.Generator, device: torch.device, **options: Any) -> CaseInputs:
    """One scale, and values that show P: out[..., k] is P[k] after dropout."""
    case = Case("dropout", ((4, 8),), heads=3, queries=50, head_dim=32, scale_weights=False, **options)
    inputs = make_inputs(case, generator, device)
    eye = torch.eye(32, device=device).expand(inputs.value.shape).contiguous().requires_grad_()
    return dataclasses.replace(inputs, value=eye)


def test_dropout_keeps_the_given_share_and_scales_it_up(generator: torch.Generator, device: torch.device) -> None:
    inputs = one_hot_inputs(generator, device, prior="wide")
    probabilities = run(inputs)
    dropped = attend(inputs, "sdpa", dropout_p=0.3)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], probabilities[kept] / 0.7, rtol=1e-4, atol=1e-7)
    share = kept.float().mean().item()
    assert abs(share - 0.7) < 5 * math.sqrt(0.7 * 0.3 / kept.numel())


def test_each_element_is_dropped_in_some_calls_and_kept_in_others(
    generator: torch.Generator, device: torch.device
) -> None:
    inputs, calls = one_hot_inputs(generator, device, prior="wide"), 200
    with torch.no_grad():
        kept = sum((attend(inputs, "sdpa", dropout_p=0.3) != 0).float() for _ in range(calls))
    # One of them is farther off with a chance of 2 exp(-2 · 200 · 0.3²) = 5e-16 (Hoeffding).
    assert ((kept / calls - 0.7).abs() < 0.3).all()


def test_the_backward_drops_what_the_forward_dropped(generator: torch.Generator, device: torch.device) -> None:
    inputs = one_hot_inputs(generator, device)
    torch.manual_seed(3)
    mask = (attend(inputs, "sdpa", dropout_p=0.4) != 0).detach()
    value = torch.randn(inputs.value.shape, generator=generator).to(device).requires_grad_()
    inputs = dataclasses.replace(inputs, value=value)
    torch.manual_seed(3)
    actual = run_backend(inputs, "sdpa", dropout_p=0.4)
    probabilities = reference.scale_probabilities(
        inputs.query, inputs.key, inputs.center[:, :, :, 0], inputs.precision[:, :, :, 0], 4, 8, None, 32**-0.5
    )
    out = (probabilities * mask / 0.6) @ value
    tensors = inputs.differentiable()
    gradients = torch.autograd.grad(out, list(tensors.values()), inputs.grad_output)
    for name, expected in zip(("output", *tensors), (out, *gradients), strict=True):
        torch.testing.assert_close(actual[name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=name)


def test_dropout_of_everything_gives_zeros(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("dropout", SHAPES), generator, device)
    assert not attend(inputs, "sdpa", dropout_p=1.0).any()


def test_without_dropout_no_random_number_is_drawn(generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("small", SHAPES), generator, device)
    state = torch.get_rng_state()
    run(inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dropout_gives_the_dtype_of_query(dtype: str, generator: torch.Generator, device: torch.device) -> None:
    inputs = make_inputs(Case("dropout", SHAPES, dtype=dtype, mask="empty_scale"), generator, device)
    for name, result in run_backend(inputs, "sdpa", dropout_p=0.2).items():
        assert result.isfinite().all()
        assert result.dtype == (inputs.query if name == "output" else getattr(inputs, name)).dtype
