"""The Triton backend as an operator: dropout, torch.library, compilation, export, launches."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from devices import COMPILER, needs_gpu
from launch_recorder import Recorder
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smca_kernels import smca_attention
from smca_kernels.backends import reference
from smca_kernels.inputs import AttentionInputs
from smca_kernels.testing.budget import assert_within_budget, poisoned_memory
from smca_kernels.testing.cases import Case, CaseInputs, make_inputs
from smca_kernels.testing.check import absolute_sums, attend, largest_errors, neighbours, run_backend

pytest.importorskip("triton")

from smca_kernels.backends.triton import forward, key_major, launch, operator, prepare, query_major, windows

SMALL = Case("", ((3, 5), (2, 2)), queries=5)


# --- dropout ---


def drop_seed_of_next_call(device: torch.device) -> Tensor:
    """The seed that the next call will draw, without drawing it."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    (torch.cuda.set_rng_state if device.type == "cuda" else torch.set_rng_state)(state)
    return seed


def kept(inputs: CaseInputs, seed: Tensor, dropout_p: float) -> Tensor:
    return operator.dropout_mask(seed, *inputs.query.shape[:3], inputs.key.shape[2], dropout_p)


def reference_under(keep: Tensor, inputs: CaseInputs, dropout_p: float) -> dict[str, Tensor]:
    """Output and gradients of the reference, with a given mask [B, H, N, T] in place of its own dropout."""
    shapes, scale = inputs.spatial_shapes, inputs.scale
    sizes = [height * width for height, width in shapes]
    keys, values, keeps = inputs.key.split(sizes, 2), inputs.value.split(sizes, 2), keep.split(sizes, 3)
    output = torch.zeros((), dtype=inputs.query.dtype, device=inputs.query.device)
    for s, (height, width) in enumerate(shapes):
        center, precision = inputs.center[..., s, :], inputs.precision[..., s, :]
        probabilities = reference.scale_probabilities(
            inputs.query, keys[s], center, precision, height, width, None, scale
        )
        dropped = (probabilities * keeps[s] / (1 - dropout_p)).to(values[s].dtype)
        output = output + inputs.scale_weights[..., s : s + 1] * (dropped @ values[s])
    output = output.to(inputs.query.dtype)
    tensors = inputs.differentiable()
    gradients = torch.autograd.grad(output, list(tensors.values()), inputs.grad_output)
    return {"output": output.detach(), **dict(zip(tensors, gradients, strict=True))}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dropout_uses_the_regenerated_mask_forward_and_backward(
    dtype: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, dtype=dtype, batch=2, queries=31), generator, device)
    shapes, dropout_p = inputs.spatial_shapes, 0.3
    keep = kept(inputs, drop_seed_of_next_call(device), dropout_p)
    with poisoned_memory():
        actual = run_backend(inputs, "triton", dropout_p=dropout_p)
    wide = inputs.double()
    eager, oracle = (reference_under(keep, each, dropout_p) for each in (inputs, wide))
    sums = absolute_sums(wide)
    neighbouring = [
        largest_errors(*(reference_under(keep, each, dropout_p) for each in (near, near.double())), shapes)
        for near in neighbours(inputs)
    ]
    for name in oracle:
        assert_within_budget(
            actual[name],
            oracle[name],
            eager[name],
            name,
            dtype=inputs.query.dtype,
            absolute_sum=max(sums[name]) / (1 - dropout_p),
            eager_error=max(max(errors[name]) for errors in neighbouring),
        )


def test_the_kernel_drops_exactly_the_elements_of_the_mask(device: torch.device, generator: torch.Generator) -> None:
    # With unit vectors as values, the output is P itself.
    case = Case("", ((4, 8),), batch=2, heads=2, queries=33, scale_weights=False, prior="wide")
    inputs = make_inputs(case, generator, device)
    inputs = dataclasses.replace(inputs, value=torch.eye(32, device=device).expand(2, 2, 32, 32))
    keep = kept(inputs, drop_seed_of_next_call(device), 0.5)
    with torch.no_grad(), poisoned_memory():
        dropped = attend(inputs, "triton", dropout_p=0.5)
        whole = attend(inputs, "triton")
    assert torch.equal(dropped != 0, keep)
    assert torch.equal(dropped, 2 * whole * keep)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_in_every_head_query_and_key(
    dropout_p: float, device: torch.device, generator: torch.Generator
) -> None:
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator).to(device)
    dropped = ~operator.dropout_mask(seed, 2, 4, 64, 512, dropout_p)
    for axes in [
        (0, 1, 2, 3),
        (2, 3),
        (0, 1, 3),
        (0, 1, 2),
    ]:  # over all; of each head; of each query; of each key
        rate = dropped.double().mean(axes)
        deviation = (dropout_p * (1 - dropout_p) * rate.numel() / dropped.numel()) ** 0.5
        # Of 600 rates, one beyond six standard deviations in a million runs.
        assert ((rate - dropout_p).abs() <= 6 * deviation).all(), axes


def test_dropout_masks_of_heads_queries_and_calls_are_unrelated(
    device: torch.device, generator: torch.Generator
) -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (4,), generator=generator).to(device)
    masks = torch.stack([operator.dropout_mask(seed[None], 1, 2, 16, 2048, 0.5) for seed in seeds])
    rows = masks.flatten(0, 3).double() * 2 - 1
    correlation = rows @ rows.T / rows.shape[1] - torch.eye(len(rows), device=device)
    assert correlation.abs().max() < 7 / 2048**0.5


def test_every_call_draws_another_mask_and_a_seed_repeats_it(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(SMALL, generator, device)
    with torch.no_grad():
        torch.manual_seed(5)
        first, second = (attend(inputs, "triton", dropout_p=0.5) for _ in range(2))
        torch.manual_seed(5)
        repeated = attend(inputs, "triton", dropout_p=0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, repeated)


def test_dropping_everything_gives_zeros_and_zero_gradients(device: torch.device, generator: torch.Generator) -> None:
    with poisoned_memory():
        results = run_backend(make_inputs(SMALL, generator, device), "triton", dropout_p=1.0)
    for name, result in results.items():
        assert not result.any(), name


# --- capability ---


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_softmax_scale_that_is_not_positive_is_refused_with_the_reason(
    scale: float, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, scale=scale), generator, device)
    with pytest.raises(ValueError, match=rf"backend='triton' can't serve this call: .*scale.* {scale}"):
        attend(inputs, "triton")


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_batches_are_refused_with_the_reason(
    empty: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, **{empty: 0}), generator, device)
    with pytest.raises(ValueError, match="can't serve this call: needs at least one image and one query"):
        attend(inputs, "triton")


def test_float64_is_refused_with_the_reason(device: torch.device, generator: torch.Generator) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, dtype="float64"), generator, device)
    with pytest.raises(ValueError, match=r"can't serve this call: .*float64"):
        attend(inputs, "triton")


# --- torch.library, compilation, export ---


def operator_arguments(inputs: CaseInputs, dropout_p: float = 0.0) -> tuple[Any, ...]:
    """Arguments of torch.ops.smca_kernels.forward."""
    seed = torch.ones(1, dtype=torch.int64, device=inputs.query.device) if dropout_p else None
    return *dataclasses.replace(inputs, dropout_p=dropout_p).flat(), seed


@pytest.mark.parametrize(
    ("case", "dropout_p"),
    [
        pytest.param(SMALL, 0.0, id="plain"),
        pytest.param(dataclasses.replace(SMALL, mask="valid_shapes", layout="projection"), 0.0, id="image"),
        pytest.param(dataclasses.replace(SMALL, mask="random", heads=2, prior_heads=1), 0.0, id="mask"),
        pytest.param(dataclasses.replace(SMALL, scale_weights=False, dtype="float16"), 0.0, id="no weights"),
        pytest.param(dataclasses.replace(SMALL, layout="last_axis_strided"), 0.0, id="strided"),
        pytest.param(SMALL, 0.2, id="dropout"),
    ],
)  # fmt: skip
def test_operator_passes_opcheck(
    case: Case, dropout_p: float, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(case, generator, device)
    # test_autograd_registration and the others run forward and backward with the real and the fake operator.
    torch.library.opcheck(torch.ops.smca_kernels.forward.default, operator_arguments(inputs, dropout_p))


@pytest.mark.parametrize("frozen", [(), ("key", "value"), ("query", "center", "precision", "scale_weights")])
def test_operator_passes_opcheck_with_frozen_inputs(
    frozen: tuple[str, ...], device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(SMALL, generator, device)
    detached = {name: getattr(inputs, name).detach() for name in frozen}
    arguments = operator_arguments(dataclasses.replace(inputs, **detached))
    torch.library.opcheck(torch.ops.smca_kernels.forward.default, arguments)


@pytest.mark.parametrize("mask", ["none", "valid_shapes", "random"])
@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_operator_passes_opcheck_with_a_plan(
    mask: str, tolerance: float, device: torch.device, generator: torch.Generator, always_planned: None
) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, mask=mask), generator, device)
    arguments = operator_arguments(dataclasses.replace(inputs, mass_tolerance=tolerance))
    torch.library.opcheck(torch.ops.smca_kernels.forward.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_call_plans_where_it_pays(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    is_planned = launch.is_planned

    def noted(inputs: AttentionInputs) -> bool:
        planned.append(is_planned(inputs))
        return planned[-1]

    monkeypatch.setattr(launch, "is_planned", noted)
    monkeypatch.setattr(launch, "MIN_PLANNED_ELEMENTS", 5 * 19)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=COMPILER)
    for queries, pays in ((4, False), (6, True)):
        inputs = make_inputs(dataclasses.replace(SMALL, queries=queries), generator, device)
        planned.clear()
        actual = compiled(inputs, "triton")
        assert planned
        assert all(each == pays for each in planned)
        torch.testing.assert_close(actual, attend(inputs, "triton", mass_tolerance=0.0))


def attend_maps(
    query: Tensor,  # [B, N, D]
    maps: list[Tensor],  # S × [B, D, height, width]
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor,
    valid_shapes: Tensor | None = None,
) -> Tensor:
    """Attention of one head to feature maps, whose sizes are read from their shapes as a detector does."""
    keys = torch.cat([each.flatten(2) for each in maps], dim=2).transpose(1, 2)
    query, keys = query[:, None], keys[:, None]
    spatial_shapes = [(each.shape[2], each.shape[3]) for each in maps]
    return smca_attention(
        query,
        keys,
        keys,
        center,
        precision,
        spatial_shapes,
        scale_weights,
        valid_shapes=valid_shapes,
        backend="triton",
    )


def maps_and_prior(device: torch.device, batch: int, queries: int, sides: list[tuple[int, int]]) -> tuple[Any, ...]:
    def leaf(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).requires_grad_()

    prior_shape = (batch, 1, queries, len(sides))
    maps = [leaf(batch, 16, *side) for side in sides]
    return leaf(batch, queries, 16), maps, leaf(*prior_shape, 2), leaf(*prior_shape, 2), leaf(*prior_shape)


def leaves(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [t for each in arguments for t in (each if isinstance(each, list) else [each])]


@pytest.mark.usefixtures("fresh_dynamo")
def test_full_graph_compiles_once_for_all_grids_batches_and_queries(device: torch.device) -> None:
    compiled = torch.compile(attend_maps, fullgraph=True, dynamic=True, backend=COMPILER)
    stance = "default"
    for batch, queries, sides in [
        # Dynamo takes sizes that are equal at first for one: these all differ, and none is 2.
        (3, 10, [(6, 7), (4, 5)]),
        (4, 7, [(4, 5), (3, 2)]),
        (2, 4, [(6, 3), (3, 2)]),
    ]:
        arguments = maps_and_prior(device, batch, queries, sides)
        expected = attend_maps(*arguments)
        upstream = torch.randn_like(expected)
        with torch.compiler.set_stance(stance):
            actual = compiled(*arguments)
            actual_gradients = torch.autograd.grad(actual, leaves(arguments), upstream)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(actual_gradients, torch.autograd.grad(expected, leaves(arguments), upstream))
        stance = "fail_on_recompile"


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mask", ["valid_shapes", "random"])
def test_masks_dropout_and_scale_compile_without_a_graph_break(
    mask: str, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, mask=mask, scale=0.3), generator, device)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=COMPILER)
    torch.testing.assert_close(compiled(inputs, "triton"), attend(inputs, "triton"))
    output = compiled(inputs, "triton", dropout_p=0.5)
    (gradient,) = torch.autograd.grad(output.sum(), inputs.query)
    assert gradient.isfinite().all()


class Module(torch.nn.Module):
    def forward(self, query: Tensor, maps: list[Tensor], *prior: Tensor) -> Tensor:
        return attend_maps(query, maps, *prior)


@pytest.mark.usefixtures("fresh_dynamo")
def test_an_exported_program_gives_the_same_output(device: torch.device) -> None:
    arguments = maps_and_prior(device, 2, 5, [(3, 5), (2, 3)])
    exported = torch.export.export(Module(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), attend_maps(*arguments))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_activation_checkpointing_changes_no_bit(
    dropout_p: float, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(SMALL, generator, device)
    leaves, query = list(inputs.differentiable().values()), inputs.query

    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        if checkpointed:
            # Of its arguments' devices alone does it restore the state that random numbers are drawn from.
            output = checkpoint(lambda _: attend(inputs, "triton", dropout_p=dropout_p), query, use_reentrant=False)
        else:
            output = attend(inputs, "triton", dropout_p=dropout_p)
        return torch.autograd.grad(output, leaves, inputs.grad_output)

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_query_key_value_and_leaves_the_prior(
    dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    inputs = make_inputs(SMALL, generator, device)
    with torch.autocast(device.type, dtype):
        output = attend(inputs, "triton")
    gradients = torch.autograd.grad(output, list(inputs.differentiable().values()), inputs.grad_output.to(dtype))
    cast = {name: getattr(inputs, name).detach().to(dtype) for name in ("query", "key", "value")}
    with torch.no_grad():
        assert torch.equal(output, attend(dataclasses.replace(inputs, **cast), "triton"))
    assert output.dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


# --- launches ---


MODULES = {
    "survey_kernel": windows,
    "window_kernel": windows,
    "forward_kernel": forward,
    "prepare_kernel": prepare,
    "key_major_kernel": key_major,
    "query_major_kernel": query_major,
}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch, always_planned: None, unsplit: None) -> dict[str, Recorder]:
    recorders = {name: Recorder(getattr(launch, name)) for name in MODULES}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch, name, recorder)
    return recorders


def test_transposed_projections_reach_the_kernels_without_a_copy(
    recorders: dict[str, Recorder], device: torch.device, generator: torch.Generator
) -> None:
    case = dataclasses.replace(SMALL, heads=2, layout="projection")
    inputs = make_inputs(case, generator, device)
    assert not inputs.query.is_contiguous()
    run_backend(inputs, "triton")
    given = {"query", "key", "value", "grad_out"}
    for kernel, recorder in recorders.items():
        (arguments,) = recorder.launches
        for name in given & set(recorder.names):
            tensor = inputs.grad_output if name == "grad_out" else getattr(inputs, name)
            assert arguments[name].data_ptr() == tensor.data_ptr(), (kernel, name)


def specialisation(arguments: dict[str, Any]) -> dict[str, Any]:
    """What Triton compiles for where it specialises on no number: types, alignment, constants, options."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            result[name] = (value.dtype, value.data_ptr() % 16 == 0)
        elif name.islower() and isinstance(value, (int, float)) and name not in ("num_warps", "num_stages"):
            fits = isinstance(value, float) or -(2**31) <= value < 2**31
            result[name] = (type(value), fits)
        else:
            result[name] = value
    return result


def test_other_grids_batches_and_queries_need_no_other_kernel(
    recorders: dict[str, Recorder], device: torch.device, generator: torch.Generator
) -> None:
    for batch, queries, shapes in [
        (2, 5, ((5, 9), (3, 5))),
        (1, 1, ((1, 1), (1, 1))),
        (3, 16, ((16, 16), (8, 8))),
        (4, 300, ((50, 84), (25, 42))),
        (1, 65, ((7, 333), (1, 17), (3, 4), (1, 2))),
    ]:
        case = Case("", shapes, batch=batch, heads=2, queries=queries, mask="valid_shapes", layout="projection")
        run_backend(make_inputs(case, generator, device), "triton")
    for name, recorder in recorders.items():
        first, *others = [specialisation(arguments) for arguments in recorder.launches]
        assert len(others) == 4
        assert others == [first] * 4, name


def test_no_kernel_leaves_it_to_triton_whether_products_are_contracted(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, always_planned: None
) -> None:
    names = [name for name in vars(launch) if name.endswith("_kernel")]
    recorders = {name: Recorder(getattr(launch, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch, name, recorder)
    monkeypatch.setattr(launch, "splits_of", lambda *_: 3)
    run_backend(make_inputs(SMALL, generator, device), "triton")
    assert len(names) == 9
    for name, recorder in recorders.items():
        assert recorder.launches, name
        # Triton's default is to change.
        assert all("enable_fp_fusion" in arguments for arguments in recorder.launches), name


def test_triton_is_told_to_specialise_on_no_number(
    recorders: dict[str, Recorder], device: torch.device, generator: torch.Generator
) -> None:
    run_backend(make_inputs(SMALL, generator, device), "triton")
    for name, recorder in recorders.items():
        (arguments,) = recorder.launches
        # Compile-time constants are written in capitals.
        numbers = {each for each in recorder.names if each.islower() and isinstance(arguments[each], (int, float))}
        assert {"heads", "queries", "scales"} <= numbers
        assert numbers <= set(MODULES[name].UNSPECIALIZED), name


@needs_gpu
def test_other_sizes_add_nothing_to_the_kernel_caches(
    device: torch.device, generator: torch.Generator, always_planned: None, unsplit: None
) -> None:
    def compiled() -> int:
        caches = [getattr(launch, name).device_caches[torch.cuda.current_device()] for name in MODULES]
        return sum(len(cache[0]) for cache in caches)

    run_backend(make_inputs(SMALL, generator, device), "triton")
    before = compiled()
    for batch, queries, shapes in [(1, 1, ((1, 1),)), (3, 16, ((16, 16), (8, 8))), (4, 300, ((50, 84),))]:
        case = dataclasses.replace(SMALL, batch=batch, queries=queries, spatial_shapes=shapes)
        run_backend(make_inputs(case, generator, device), "triton")
    assert compiled() == before


@needs_gpu
def test_a_cuda_graph_replays_with_new_inputs(
    device: torch.device, generator: torch.Generator, always_planned: None
) -> None:
    case = dataclasses.replace(SMALL, dtype="float16", mask="valid_shapes")
    inputs, others = make_inputs(case, generator, device), make_inputs(case, generator, device)
    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        run_backend(inputs, "triton")
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_backend(inputs, "triton")
    with torch.no_grad():
        for field in dataclasses.fields(inputs):
            if isinstance(tensor := getattr(inputs, field.name), Tensor):
                tensor.copy_(getattr(others, field.name))
    graph.replay()
    for name, expected in run_backend(others, "triton").items():
        assert torch.equal(captured[name], expected), name


@needs_gpu
def test_a_call_never_waits_for_the_gpu(device: torch.device, generator: torch.Generator, always_planned: None) -> None:
    inputs = make_inputs(dataclasses.replace(SMALL, mask="valid_shapes"), generator, device)
    run_backend(inputs, "triton", dropout_p=0.1)
    with _synchronisation_is_an_error():
        run_backend(inputs, "triton", dropout_p=0.1)


@contextlib.contextmanager
def _synchronisation_is_an_error() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
