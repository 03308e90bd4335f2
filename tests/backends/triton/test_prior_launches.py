"""Launches of the prior: one each way, no copy before it, no kernel for other sizes, no wait for the GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from devices import needs_gpu
from launch_recorder import Recorder
from prior_problems import DTYPES, GRIDS, OPTIONS, OUTPUTS, make_prior, make_problem, operators
from torch import Tensor

pytest.importorskip("triton")

from smca_kernels.backends.triton import prior as kernels

LINEAR_LAYERS = {"addmm", "relu", "native_layer_norm"}
PARTS: dict[str, dict[str, Any]] = {
    "grid": {},
    "image_sizes": {"image_sizes": torch.tensor([[80, 100], [160, 200]])},
    "valid_shapes": {"valid_shapes": torch.tensor([[(11, 17), (5, 9), (2, 3)], [(21, 34), (11, 17), (5, 9)]])},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_after_the_linear_layers_there_is_one_operator_call(
    geometry: str, modulation: str, scale_type: str, dtype: torch.dtype, part: str, device: torch.device
) -> None:
    prior, features = make_prior(device, geometry=geometry, modulation=modulation, scale_type=scale_type)
    prior, features = prior.to(dtype), features.to(dtype)
    given = {name: tensor.to(device) for name, tensor in PARTS[part].items()}
    with torch.no_grad():
        names = operators(lambda: prior(features, GRIDS[:3], backend="triton", **given))
    assert [name for name in names if name not in LINEAR_LAYERS] == ["prior"]
    assert names[-1] == "prior"


def test_the_backward_is_one_operator_call(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device, dtype=torch.float16)
    output = problem.locate("triton")
    names = operators(lambda: torch.autograd.backward(output, problem.upstream))
    # "detach" is how the gradients of leaves are kept.
    assert [name for name in names if name != "detach"] == ["prior_backward"]


KERNELS = ("prior_kernel", "prior_backward_kernel")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    recorders = {name: Recorder(getattr(kernels, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, name, recorder)
    return recorders


@pytest.mark.parametrize("layout", ["cut from wider", "sequence first", "every other query", "expanded"])
def test_strided_projections_reach_the_kernels_without_a_copy(
    layout: str, recorders: dict[str, Recorder], device: torch.device, generator: torch.Generator
) -> None:
    problem = make_problem(generator, device, layout=layout, part="cells")
    problem.run("triton")
    for name, recorder in recorders.items():
        (arguments,) = recorder.launches
        for ours, theirs in (("logits", "reference_logits"), ("object_scale",) * 2, ("selection",) * 2):
            assert arguments[ours].data_ptr() == problem.raw[theirs].data_ptr(), (name, ours)
        assert arguments["valid_shapes"].data_ptr() == problem.part[1].data_ptr()
        if "backward" in name:
            for ours, theirs in zip(OUTPUTS, ("center", "precision", "weights"), strict=True):
                assert arguments[f"grad_{theirs}"].data_ptr() == getattr(problem.upstream, ours).data_ptr()


def specialisation(arguments: dict[str, Any]) -> dict[str, Any]:
    """What Triton compiles for where it specialises on no number: types, alignment, constants, options."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            result[name] = (value.dtype, value.data_ptr() % 16 == 0)
        elif name.islower() and isinstance(value, int) and name != "enable_fp_fusion":
            result[name] = -(2**31) <= value < 2**31
        else:
            result[name] = value
    return result


def test_other_grids_batches_and_queries_need_no_other_kernel(
    recorders: dict[str, Recorder], device: torch.device, generator: torch.Generator
) -> None:
    for batch, queries, layout in [
        (2, 5, "contiguous"), (1, 1, "sequence first"), (3, 16, "expanded"), (4, 300, "contiguous"),
    ]:  # fmt: skip
        problem = make_problem(generator, device, batch=batch, queries=queries, layout=layout)
        sides = torch.randint(1, 400, (3, 2), generator=generator).tolist()
        dataclasses.replace(problem, shapes=tuple(map(tuple, sides))).run("triton")
    for name, recorder in recorders.items():
        first, *others = [specialisation(arguments) for arguments in recorder.launches]
        assert others == [first] * 3, name
        # Compile-time constants are written in capitals.
        numbers = {each for each in recorder.names if each.islower() and isinstance(recorder.launches[0][each], int)}
        assert {"rows", "queries", "r_b", "g0"} <= numbers
        assert numbers <= set(kernels.UNSPECIALIZED), name


@needs_gpu
def test_other_sizes_add_nothing_to_the_kernel_caches(device: torch.device, generator: torch.Generator) -> None:
    def compiled() -> int:
        caches = [getattr(kernels, name).device_caches[torch.cuda.current_device()] for name in KERNELS]
        return sum(len(cache[0]) for cache in caches)

    make_problem(generator, device).run("triton")
    before = compiled()
    for batch, queries in [(1, 1), (3, 16), (4, 300)]:
        make_problem(generator, device, batch=batch, queries=queries).run("triton")
    assert compiled() == before


@needs_gpu
def test_a_cuda_graph_replays_with_new_inputs(device: torch.device, generator: torch.Generator) -> None:
    problem, others = (make_problem(generator, device, part="image_sizes") for _ in range(2))
    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        problem.run("triton")
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run("triton")
    with torch.no_grad():
        pairs = [*zip(problem.raw.values(), others.raw.values(), strict=True)]
        pairs += [*zip(problem.upstream, others.upstream, strict=True), (problem.part[0], others.part[0])]
        for ours, theirs in pairs:
            ours.copy_(theirs)
    graph.replay()
    for name, expected in others.run("triton").items():
        assert torch.equal(captured[name], expected), name


@needs_gpu
@pytest.mark.parametrize("part", PARTS)
def test_a_call_never_waits_for_the_gpu(part: str, device: torch.device) -> None:
    prior, features = make_prior(device)
    given = {name: tensor.to(device) for name, tensor in PARTS[part].items()}
    prior(features, GRIDS[:3], backend="triton", **given).center.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prior(features, GRIDS[:3], backend="triton", **given).center.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
