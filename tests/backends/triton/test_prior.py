"""The prior in one launch against its PyTorch form, and as an operator: torch.library, compilation, launches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import ON_GPU, needs_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from smca_kernels.backends.triton import prior as kernels
from smca_kernels.nn import GEOMETRIES, SCALE_TYPES, SpatiallyModulatedCoAttention, SpatialPrior, SpatialPriorOutput
from smca_kernels.nn.prior import MIN_SQUARED_OBJECT_SCALE
from smca_kernels.testing.budget import assert_within_budget, poisoned_memory
from smca_kernels.tools.cost.report import compile_report
from smca_kernels.tools.cost.specializations import Specialization

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = list(itertools.product(GEOMETRIES, ("per_head", "shared"), SCALE_TYPES))
GRIDS = ((21, 34), (11, 17), (5, 9), (3, 4), (1, 1), (7, 2), (9, 9), (2, 50))
STRIDES = (8, 12, 32, 40, 64, 100, 7, 48)
BETA = 5.0
OUTPUTS = ("center", "precision", "scale_weights")


# --- one launch against PyTorch ---


@dataclasses.dataclass(frozen=True)
class Problem:
    """Raw projections of a prior, what says how large its images are, and a gradient for everything that comes out."""

    prior: SpatialPrior
    raw: dict[str, Tensor | None]  # reference_logits, offset, object_scale, selection
    part: tuple[Tensor | None, Tensor | None]  # image_sizes, cells
    shapes: tuple[tuple[int, int], ...]
    upstream: SpatialPriorOutput

    def double(self) -> Problem:
        raw = {name: None if t is None else t.detach().double().requires_grad_() for name, t in self.raw.items()}
        upstream = SpatialPriorOutput(*(None if t is None else t.double() for t in self.upstream))
        return dataclasses.replace(self, raw=raw, upstream=upstream)

    def locate(self, backend: str) -> SpatialPriorOutput:
        return self.prior._locate(*self.raw.values(), *self.part, self.shapes, backend)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Outputs by their names, gradients by those of the raw projections with "grad " before."""
        outputs, inputs = self.locate(backend), {name: t for name, t in self.raw.items() if t is not None}
        reached = [i for i, out in enumerate(outputs) if out is not None and out.requires_grad]
        gradients = torch.autograd.grad(
            [outputs[i] for i in reached], list(inputs.values()), [self.upstream[i] for i in reached]
        )
        results = {name: out.detach() for name in OUTPUTS if (out := getattr(outputs, name)) is not None}
        return results | {f"grad {name}": g for name, g in zip(inputs, gradients, strict=True)}

    def absolute_sums(self) -> dict[str, float]:
        """Largest sum of absolute terms behind an element, for results that are sums: the problem is in float64."""
        positive = SpatialPriorOutput(*(None if t is None else t.abs() for t in self.upstream))
        # Extents, and the derivatives of sigmoid and of s², have one sign for all terms of a sum.
        of_positive = dataclasses.replace(self, upstream=positive).run("reference")
        sums = {name: of_positive[name].abs().max().item() for name in of_positive if name.startswith("grad")}
        share, offset = self.raw["reference_logits"].sigmoid(), self.raw["offset"]
        largest = max(max(shape) for shape in self.shapes) if self.part == (None, None) else 400.0
        sums["center"] = share.max().item() * largest + (0.0 if offset is None else offset.abs().max().item())
        if self.raw["selection"] is not None:
            sums["grad selection"] = 2 * self.upstream.scale_weights.abs().max().item()
        return sums


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    # what a slice of one larger projection looks like, at an odd place
    "cut from wider": lambda t: torch.cat([torch.full_like(t[..., :1], math.nan), t, t], -1)[..., 1 : t.shape[-1] + 1],
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other query": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "last axis strided": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def make_problem(
    generator: torch.Generator,
    device: torch.device,
    *,
    batch: int = 2,
    queries: int = 7,
    heads: int = 2,
    scales: int = 3,
    dtype: torch.dtype = torch.float32,
    part: str = "grid",
    layout: str = "contiguous",
    **options: Any,
) -> Problem:
    prior = SpatialPrior(8, heads, STRIDES[:scales], beta=BETA, **options)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(shape, generator=generator)

    maps, axes = prior.map_heads, prior.axes
    # Some sigmoids and softmaxes are saturated, some far from it.
    spread = torch.tensor([1.0, 5.0, 100.0])[torch.arange(queries) % 3, None]
    raw = {
        "reference_logits": spread * normal(batch, queries, 2),
        "offset": normal(batch, queries, scales * maps * 2, spread=3.0) if prior.offset is not None else None,
        # Around 0, where the paper's clamp is, to 5.
        "object_scale": normal(batch, queries, scales * maps * axes) ** 3 if axes else None,
        "selection": spread[:, :1] * normal(batch, queries, scales) if prior.scale_selection is not None else None,
    }
    laid_out = {
        name: None if t is None else LAYOUTS[layout](t.to(device, dtype)).detach().requires_grad_()
        for name, t in raw.items()
    }
    shapes = GRIDS[:scales]
    sizes = torch.randint(1, 400, (batch, 2), generator=generator).to(device)
    cells = torch.stack([torch.randint(0, 60, (batch, 2), generator=generator) for _ in shapes], 1).to(device)
    parts = {
        "grid": (None, None),
        "image_sizes": (sizes, None),
        "float image_sizes": (sizes.flip(-1).half().flip(-1), None),
        "cells": (None, cells),
        "strided cells": (None, cells.transpose(0, 1).contiguous().transpose(0, 1)),
    }
    of_maps = (batch, maps, queries, scales)
    upstream = (normal(*of_maps, 2), normal(*of_maps, 2), normal(batch, 1, queries, scales), normal(batch, queries, 2))
    absent = raw["selection"] is None
    center, precision, weights, logits = (t.to(device) for t in upstream)
    return Problem(
        prior, laid_out, parts[part], shapes, SpatialPriorOutput(center, precision, None if absent else weights, logits)
    )


def by_scale(name: str, tensor: Tensor, scales: int) -> list[Tensor]:
    """Parts that are compared each with a budget of its own: scales differ in size by orders of magnitude."""
    if name in ("center", "precision"):
        return list(tensor.unbind(3))
    if name in ("grad offset", "grad object_scale"):
        return list(tensor.unflatten(2, (scales, -1)).unbind(2))
    return [tensor]


def check(problem: Problem) -> None:
    with poisoned_memory():
        actual = problem.run("triton")
    wide = problem.double()
    eager, oracle, sums = problem.run("reference"), wide.run("reference"), wide.absolute_sums()
    assert actual.keys() == oracle.keys()
    for name in oracle:
        parts = [by_scale(name, results[name], len(problem.shapes)) for results in (actual, oracle, eager)]
        for s, (ours, exact, plain) in enumerate(zip(*parts, strict=True)):
            assert_within_budget(ours, exact, plain, f"{name} {s}", absolute_sum=sums.get(name, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("geometry", "modulation", "scale_type"), OPTIONS)
def test_every_configuration_is_within_its_budget(
    geometry: str,
    modulation: str,
    scale_type: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    options = {"geometry": geometry, "modulation": modulation, "scale_type": scale_type}
    check(make_problem(generator, device, dtype=dtype, queries=33, **options))


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5, 8])
def test_any_number_of_scales_heads_and_queries_is_within_its_budget(
    scales: int, heads: int, queries: int, device: torch.device, generator: torch.Generator
) -> None:
    check(make_problem(generator, device, batch=1, scales=scales, heads=heads, queries=queries))


@pytest.mark.parametrize("heads", [3, 12, 60])
def test_heads_need_not_be_a_power_of_two(heads: int, device: torch.device, generator: torch.Generator) -> None:
    check(make_problem(generator, device, heads=heads, queries=5, geometry="paper", scale_type="single"))


@pytest.mark.parametrize("part", ["grid", "image_sizes", "float image_sizes", "cells", "strided cells"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_description_of_the_images_is_within_its_budget(
    part: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    check(make_problem(generator, device, batch=3, part=part, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale_type", ["independent", "single"])
def test_every_layout_of_the_projections_is_within_its_budget(
    layout: str, dtype: torch.dtype, scale_type: str, device: torch.device, generator: torch.Generator
) -> None:
    check(make_problem(generator, device, layout=layout, dtype=dtype, scale_type=scale_type, part="image_sizes"))


def test_without_scale_selection_there_are_no_weights(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device, scale_selection=False)
    assert problem.locate("triton").scale_weights is None
    check(problem)


def test_the_projections_may_differ_in_dtype(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device)
    dtypes = dict(zip(problem.raw, (torch.float32, torch.float16, torch.bfloat16, torch.float32), strict=True))
    raw = {name: t.detach().to(dtypes[name]).requires_grad_() for name, t in problem.raw.items()}
    check(dataclasses.replace(problem, raw=raw))


@pytest.mark.parametrize("logit", [0.0, 20.0, 88.0, 1e4, math.inf])
def test_saturated_logits_neither_overflow_nor_lose_their_gradient(logit: float, device: torch.device) -> None:
    problem = make_problem(torch.Generator().manual_seed(0), device, modulation="shared", scales=1)
    logits = torch.tensor([logit, -logit], device=device).expand(2, 7, 2).clone().requires_grad_()
    center = dataclasses.replace(problem, raw=problem.raw | {"reference_logits": logits}).locate("triton").center
    (gradient,) = torch.autograd.grad(center.sum(), logits)
    share = torch.tensor([logit, -logit], dtype=torch.float64).sigmoid()
    extent = torch.tensor([34.0, 21.0], dtype=torch.float64)
    # Below 2⁻¹²⁶ a float32 may be flushed to 0.
    close = {"rtol": 2e-5, "atol": 1e-36}
    torch.testing.assert_close(center[0, 0, 0, 0].double().cpu(), share * extent, **close)
    torch.testing.assert_close(gradient[0, 0].double().cpu(), share.prod() * extent, **close)


def test_the_clamp_of_the_paper_stops_the_gradient_where_torch_does(
    device: torch.device, generator: torch.Generator
) -> None:
    problem = make_problem(generator, device, geometry="paper", modulation="shared", scales=1, queries=4)
    edge = MIN_SQUARED_OBJECT_SCALE**0.5
    scales = torch.tensor([[0.0, -0.0], [0.9 * edge, -0.9 * edge], [1.1 * edge, -1.1 * edge], [2.0, -2.0]])
    object_scale = scales.expand(2, 4, 2).clone().to(device).requires_grad_()
    problem = dataclasses.replace(problem, raw=problem.raw | {"object_scale": object_scale})
    actual, expected = problem.run("triton"), problem.run("reference")
    torch.testing.assert_close(actual["precision"], expected["precision"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(actual["grad object_scale"], expected["grad object_scale"], rtol=1e-6, atol=0.0)
    assert (actual["grad object_scale"] == 0).any(-1).tolist() == [[True, True, False, False]] * 2


def test_only_what_is_used_has_a_gradient(device: torch.device, generator: torch.Generator) -> None:
    """Zero where the derivative is; elsewhere not, but for what underflows.

    Sigmoid's derivative of a float32 is off by 2⁻²⁴ times an extent of 34 cells and an upstream gradient of 6: 1.2e-5,
    less than float16's smallest normal number, 6.1e-5.
    """
    problem = make_problem(generator, device, dtype=torch.float16)
    exact = problem.double()
    for index in range(4):
        gradients = []
        for of, backend in ((problem, "triton"), (exact, "reference")):
            output = of.locate(backend)[index]
            with poisoned_memory():
                gradients.append(
                    torch.autograd.grad(output, list(of.raw.values()), of.upstream[index], materialize_grads=True)
                )
        for ours, derivative in zip(*gradients, strict=True):
            assert not ours[derivative == 0].any()
            assert (ours[derivative.abs() >= torch.finfo(torch.float16).smallest_normal] != 0).all()


def test_an_image_alone_and_in_a_batch_gives_the_same_bits(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device, batch=3, queries=50, part="image_sizes")
    alone = dataclasses.replace(
        problem,
        raw={name: t.detach()[1:2].requires_grad_() for name, t in problem.raw.items()},
        part=(problem.part[0][1:2], None),
        upstream=SpatialPriorOutput(*(t[1:2] for t in problem.upstream)),
    )
    results, repeated = problem.run("triton"), problem.run("triton")
    for name, expected in alone.run("triton").items():
        assert torch.equal(results[name][1:2], expected), name
        assert torch.equal(results[name], repeated[name]), name


# --- when it serves ---


def make_prior(device: torch.device, **options: Any) -> tuple[SpatialPrior, Tensor]:
    prior = SpatialPrior(8, 2, STRIDES[:3], **options).to(device)
    return prior, torch.randn(2, 5, 8, device=device)


def test_float64_is_refused_with_the_reason_and_auto_takes_pytorch(device: torch.device) -> None:
    prior, features = make_prior(device)
    with pytest.raises(ValueError, match=r"backend='triton' can't serve this call: serves .*float64"):
        prior.double()(features, GRIDS[:3], backend="triton")
    assert prior(features, GRIDS[:3]).center.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_batches_are_refused_with_the_reason_and_auto_takes_pytorch(
    shape: tuple[int, ...], device: torch.device
) -> None:
    prior, _ = make_prior(device)
    features = torch.randn(shape, device=device)
    with pytest.raises(ValueError, match="can't serve this call: needs at least one image and one query"):
        prior(features, GRIDS[:3], backend="triton")
    assert prior(features, GRIDS[:3]).center.shape == (shape[0], 2, shape[1], 3, 2)


def test_image_sizes_with_a_gradient_are_left_to_pytorch(device: torch.device) -> None:
    prior, features = make_prior(device)
    sizes = torch.full((2, 2), 90.0, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="can't serve this call: has no gradient to image_sizes"):
        prior(features, GRIDS[:3], image_sizes=sizes, backend="triton")
    prior(features, GRIDS[:3], image_sizes=sizes).center.sum().backward()
    assert sizes.grad.all()


def test_double_backward_is_refused(device: torch.device, generator: torch.Generator) -> None:
    problem = make_problem(generator, device)
    offset = problem.raw["object_scale"]
    (gradient,) = torch.autograd.grad(problem.locate("triton").precision.sum(), offset, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        torch.autograd.grad(gradient.sum(), offset)


def operators(function: Callable[[], Any]) -> list[str]:
    """Names of the operators that a call runs, views left out."""
    names = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            returns = func._schema.returns
            if not any(each.alias_info is not None and not each.alias_info.is_write for each in returns):
                names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Recording():
        function()
    return [name for name in names if name not in ("promote_types", "_unsafe_view")]


@needs_gpu
def test_auto_takes_one_launch_on_a_gpu(device: torch.device) -> None:
    prior, features = make_prior(device)
    assert ("prior" in operators(lambda: prior(features, GRIDS[:3]))) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_other_backends_take_the_pytorch_form(backend: str, device: torch.device) -> None:
    prior, features = make_prior(device)
    assert "prior" not in operators(lambda: prior(features, GRIDS[:3], backend=backend))


# --- launches ---

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


class Recorder:
    """Stands in for a kernel: keeps the arguments of each launch and computes nothing."""

    def __init__(self, kernel: Any) -> None:
        self.names = list(kernel.arg_names)
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(dict(zip(self.names, args, strict=False)) | kwargs)


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


# --- torch.library, compilation, export ---


def operator_arguments(problem: Problem) -> tuple[Any, ...]:
    """Arguments of torch.ops.smca_kernels.prior."""
    prior = problem.prior
    floor = MIN_SQUARED_OBJECT_SCALE if prior.geometry == "paper" else None
    flat = [side for shape in problem.shapes for side in shape]
    configuration = (list(map(float, prior.strides)), prior._factors(), floor, prior.map_heads)
    return *problem.raw.values(), *problem.part, flat, *configuration


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"part": "image_sizes", "layout": "cut from wider"},
        {"part": "cells", "modulation": "shared", "scale_type": "single", "geometry": "paper"},
        {"dtype": torch.float16, "scale_selection": False, "layout": "last axis strided"},
        {"scale_type": "fixed", "scales": 1, "batch": 1, "queries": 1},
    ],
)
def test_operator_passes_opcheck(options: dict[str, Any], device: torch.device, generator: torch.Generator) -> None:
    arguments = operator_arguments(make_problem(generator, device, **options))
    torch.library.opcheck(torch.ops.smca_kernels.prior.default, arguments)


@pytest.mark.parametrize("frozen", [("reference_logits",), ("offset", "object_scale", "selection")])
def test_operator_passes_opcheck_with_frozen_inputs(
    frozen: tuple[str, ...], device: torch.device, generator: torch.Generator
) -> None:
    problem = make_problem(generator, device)
    raw = {name: t.detach() if name in frozen else t for name, t in problem.raw.items()}
    arguments = operator_arguments(dataclasses.replace(problem, raw=raw))
    torch.library.opcheck(torch.ops.smca_kernels.prior.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("part", ["grid", "image_sizes", "valid_shapes", "key_padding_mask"])
def test_full_graph_compiles_once_for_all_grids_batches_and_queries(part: str, device: torch.device) -> None:
    prior = SpatialPrior(8, 2, (8, 32)).to(device)
    compiled = torch.compile(prior, fullgraph=True, dynamic=True, backend="inductor" if ON_GPU else "aot_eager")
    stance = "default"
    # Dynamo takes sizes that are equal at first for one: these all differ, and none is 2.
    for batch, queries, shapes in [(3, 10, ((6, 7), (4, 5))), (4, 7, ((9, 5), (3, 8))), (5, 4, ((6, 3), (3, 4)))]:
        keys = sum(height * width for height, width in shapes)
        given = {
            "grid": {},
            "image_sizes": {"image_sizes": torch.full((batch, 2), 70, device=device)},
            "valid_shapes": {"valid_shapes": torch.tensor([shapes] * batch, device=device)},
            "key_padding_mask": {"key_padding_mask": torch.zeros(batch, keys, dtype=torch.bool, device=device)},
        }[part]
        features = torch.randn(batch, queries, 8, device=device)
        expected = prior(features, shapes, backend="triton", **given)
        upstream = [torch.randn_like(t) for t in expected]
        parameters = list(prior.parameters())
        with torch.compiler.set_stance(stance):
            actual = compiled(features, shapes, backend="triton", **given)
            gradients = torch.autograd.grad(actual, parameters, upstream)
        torch.testing.assert_close(tuple(actual), tuple(expected))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters, upstream))
        stance = "fail_on_recompile"


@pytest.mark.usefixtures("fresh_dynamo")
def test_an_exported_prior_gives_the_same_outputs(device: torch.device) -> None:
    prior, features = make_prior(device)
    program = torch.export.export(prior, (features, GRIDS[:3]), {"backend": "triton"})
    actual = program.module()(features, GRIDS[:3], backend="triton")
    torch.testing.assert_close(tuple(actual), tuple(prior(features, GRIDS[:3], backend="triton")))


def test_activation_checkpointing_changes_no_bit(device: torch.device) -> None:
    prior, features = make_prior(device)
    parameters = list(prior.parameters())

    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        arguments: Any = (prior, features, GRIDS[:3])
        if checkpointed:
            outputs = checkpoint(*arguments, backend="triton", use_reentrant=False)
        else:
            outputs = prior(*arguments[1:], backend="triton")
        return torch.autograd.grad([t.square().sum() for t in outputs], parameters)

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_changes_no_bit(device: torch.device) -> None:
    prior, features = make_prior(device)
    plain = prior(features, GRIDS[:3], backend="triton")
    with torch.autocast(device.type, torch.bfloat16):
        cast = prior(features, GRIDS[:3], backend="triton")
    for ours, theirs in zip(cast, plain, strict=True):
        assert torch.equal(ours, theirs)


# --- what the compiler takes, which is less than the interpreter does ---


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """Both kernels as launches of different configurations compile them, under `launch.py`'s interface."""
    rows = []
    for scales, heads, axes, floor, absent, kernel in (
        (*configuration, kernel)
        for configuration in [
            (3, 8, 2, None, ("image_sizes", "valid_shapes")),
            (3, 8, 2, None, ("valid_shapes", "wide_logits", "grad_wide")),
            (4, 1, 1, 1e-3, ("image_sizes", "offset", "grad_offset")),
            (1, 8, 0, 1e-3, ("valid_shapes", "object_scale", "selection", "scale_weights", "grad_precision",
                             "grad_object_scale", "grad_weights", "grad_selection")),
            (8, 16, 2, 1e-3, ("image_sizes", "grad_center", "grad_weights")),
        ]
        for kernel in (kernels.prior_kernel, kernels.prior_backward_kernel)
    ):  # fmt: skip
        names = kernel.arg_names
        constexprs: dict[str, Any] = kernels.constants(axes, (8.0, 16.0) * scales, (0.1, 0.2) * scales, floor, heads)
        constexprs |= {"SCALES": scales} | {name: None for name in absent if name in names}
        of_input_dtype = {"logits", "offset", "object_scale", "selection"}
        types = {"image_sizes": "*i64", "valid_shapes": "*i64"}
        types |= dict.fromkeys(of_input_dtype | {f"grad_{name}" for name in of_input_dtype}, f"*{dtype}")
        types |= {name: "i64" if name[1:].isdigit() else "i32" for name in kernels.UNSPECIALIZED}
        signature = {name: "constexpr" if name in constexprs else types.get(name, "*fp32") for name in names}
        rows.append(
            Specialization(
                kernel=kernel.__name__,
                pass_="forward" if kernel is kernels.prior_kernel else "backward",
                function=kernel,
                signature=signature,
                constexprs=constexprs,
                attrs={},
                num_warps=4,
                num_stages=3,
                elements_per_iteration=0,
                tensor_flops_per_element=0,
                elements_per_program=1,
            )
        )
    return rows


def test_every_configuration_compiles_without_a_spilled_register() -> None:
    rows = compile_report([(80, "fp16", 32), (90, "fp32", 32)], module=__name__)
    rows = [row for row in rows if not row["kernel"].endswith(" total")]
    assert len(rows) == 20
    for row in rows:
        assert not row["error"], row
        assert row["spill_bytes"] == row["local_bytes"] == 0, row


# --- in the layer ---


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_layer_hands_its_backend_to_the_prior(geometry: str, batch_first: bool, device: torch.device) -> None:
    layer = SpatiallyModulatedCoAttention(32, 2, STRIDES[:2], geometry=geometry, batch_first=batch_first).to(device)
    query, key = torch.randn(4, 3, 32, device=device), torch.randn(24 + 6, 3, 32, device=device)
    features = torch.randn_like(query)
    if batch_first:
        query, key, features = (t.transpose(0, 1) for t in (query, key, features))
    results: dict[str, tuple[Tensor, ...]] = {}

    def attend(backend: str) -> None:
        output, prior = layer(query, key, key, ((4, 6), (2, 3)), prior_features=features, backend=backend)
        gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        results[backend] = (output, *prior, *gradients)

    for backend, called in (("triton", True), ("reference", False)):
        names = operators(lambda backend=backend: attend(backend))
        assert ("prior" in names, "prior_backward" in names) == (called, called)
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-3, atol=1e-3)
