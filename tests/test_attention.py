"""`smca_attention` as a caller sees it: arguments, what is refused, which backend is chosen, and maps for pictures."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from smca_kernels import SpatialPrior, attention_map, backends, explain_backend, smca_attention
from smca_kernels import attention as attention_module
from smca_kernels.backends import devices, reference
from smca_kernels.backends.sdpa import operator as sdpa
from smca_kernels.inputs import AttentionInputs

BATCH, HEADS, QUERIES, HEAD_DIM = 2, 4, 5, 16
SHAPES = ((3, 4), (2, 2), (1, 1))
SCALES, KEYS = 3, 17


def make_arguments(
    generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    prior = (BATCH, HEADS, QUERIES, SCALES, 2)
    return {
        "query": normal(BATCH, HEADS, QUERIES, HEAD_DIM),
        "key": normal(BATCH, HEADS, KEYS, HEAD_DIM),
        "value": normal(BATCH, HEADS, KEYS, HEAD_DIM),
        "center": (3 * torch.rand(prior, generator=generator)).to(device),
        "precision": torch.rand(prior, generator=generator).to(device),
        "spatial_shapes": SHAPES,
        "scale_weights": torch.rand(prior[:-1], generator=generator).to(device),
    }


@pytest.fixture
def arguments(generator: torch.Generator, device: torch.device) -> dict[str, Any]:
    return make_arguments(generator, device)


def of_reference(arguments: dict[str, Any], scale: float = HEAD_DIM**-0.5, **masks: Tensor | None) -> Tensor:
    tensors = [arguments[name] for name in ("query", "key", "value", "center", "precision", "scale_weights")]
    masks = {"valid_shapes": None, "key_padding_mask": None} | masks
    shapes = arguments["spatial_shapes"]
    return reference.attention(AttentionInputs(*tensors, *masks.values(), shapes, 0.0, scale, 0.0))


# --- what is refused ---


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


FULL = [[[3, 4], [2, 2], [1, 1]]] * BATCH
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "query of integers": (
        {"query": tensor(2, 4, 5, 16, dtype=torch.int64)},
        TypeError,
        "query must be one of torch.float32, .*, got torch.int64",
    ),
    "query of rank 3": ({"query": tensor(2, 5, 16)}, ValueError, r"query must be \[B, H, N, D\], got \[2, 5, 16\]"),
    "query without heads": ({"query": tensor(2, 0, 5, 16)}, ValueError, r"query .* one head, got \[2, 0, 5, 16\]"),
    "head_dim 0": ({"query": tensor(2, 4, 5, 0)}, ValueError, r"head_dim D from 1 to 128, got \[2, 4, 5, 0\]"),
    "head_dim 129": ({"query": tensor(2, 4, 5, 129)}, ValueError, r"head_dim D from 1 to 128, got \[2, 4, 5, 129\]"),
    "key is no tensor": ({"key": None}, TypeError, "key must be a tensor, got NoneType"),
    "key of another dtype": (
        {"key": tensor(2, 4, 17, 16).half()},
        TypeError,
        "key must be torch.float32 .* torch.float16",
    ),
    "key of rank 3": ({"key": tensor(2, 17, 16)}, ValueError, r"key must be .*, got \[2, 17, 16\]"),
    "key of another batch": ({"key": tensor(3, 4, 17, 16)}, ValueError, r"key must be \[B=2, .*, got \[3, 4, 17, 16\]"),
    "key of other heads": ({"key": tensor(2, 1, 17, 16)}, ValueError, r"key must be .*H=4.*, got \[2, 1, 17, 16\]"),
    "grids that don't add up": (
        {"spatial_shapes": ((3, 4), (2, 2), (1, 2))},
        ValueError,
        r"key must be .*T=18.* for spatial_shapes \(\(3, 4\), \(2, 2\), \(1, 2\)\), got \[2, 4, 17, 16\]",
    ),
    "key of another head_dim": ({"key": tensor(2, 4, 17, 8)}, ValueError, r"key must be .*D=16.*, got \[2, 4, 17, 8\]"),
    "value of another dtype": ({"value": tensor(2, 4, 17, 16).double()}, TypeError, "value must be torch.float32"),
    "value of other keys": (
        {"value": tensor(2, 4, 16, 16)},
        ValueError,
        r"value must be .*T=17.*, got \[2, 4, 16, 16\]",
    ),
    "center is no tensor": ({"center": 1.0}, TypeError, "center must be a tensor, got float"),
    "center of half precision": (
        {"center": tensor(2, 4, 5, 3, 2).half()},
        TypeError,
        "center must be torch.float32 as query, got torch.float16",
    ),
    "center of another half precision": (
        {
            "query": tensor(2, 4, 5, 16).half(),
            "key": tensor(2, 4, 17, 16).half(),
            "value": tensor(2, 4, 17, 16).half(),
            "center": tensor(2, 4, 5, 3, 2).bfloat16(),
        },
        TypeError,
        "center must be torch.float32 or torch.float16 as query, got torch.bfloat16",
    ),
    "center of other heads": (
        {"center": tensor(2, 2, 5, 3, 2)},
        ValueError,
        r"center must be \[B=2, H=4 or 1, N=5, S=3, 2\], got \[2, 2, 5, 3, 2\]",
    ),
    "center of rank 4": ({"center": tensor(2, 4, 5, 6)}, ValueError, r"center must be .*, got \[2, 4, 5, 6\]"),
    "precision of other scales": (
        {"precision": tensor(2, 4, 5, 2, 2)},
        ValueError,
        r"precision must be \[B=2, H=4 or 1, N=5, S=3, 2\], got \[2, 4, 5, 2, 2\]",
    ),
    "precision of one axis": ({"precision": tensor(2, 4, 5, 3, 1)}, ValueError, "precision must be"),
    "precision of integers": ({"precision": tensor(2, 4, 5, 3, 2).int()}, TypeError, "precision .* got torch.int32"),
    "scale_weights is no tensor": ({"scale_weights": [1.0]}, TypeError, "scale_weights must be a tensor, got list"),
    "scale_weights of other queries": (
        {"scale_weights": tensor(2, 4, 6, 3)},
        ValueError,
        r"scale_weights must be \[B=2, H=4 or 1, N=5, S=3\], got \[2, 4, 6, 3\]",
    ),
    "spatial_shapes is a tensor": (
        {"spatial_shapes": torch.tensor(SHAPES)},
        TypeError,
        "spatial_shapes must be a list of .*, got torch.int64 tensor",
    ),
    "spatial_shapes is None": ({"spatial_shapes": None}, TypeError, "spatial_shapes must be a list .*, got NoneType"),
    "spatial_shapes without scales": (
        {"spatial_shapes": ()},
        ValueError,
        "spatial_shapes must have 1 to 8 scales, got 0",
    ),
    "spatial_shapes of nine scales": ({"spatial_shapes": ((1, 1),) * 9}, ValueError, "1 to 8 scales, got 9"),
    "spatial_shapes of plain ints": ({"spatial_shapes": (3, 4)}, TypeError, r"spatial_shapes .*, got \(3, 4\)"),
    "spatial_shapes of triples": ({"spatial_shapes": ((3, 4, 1),)}, TypeError, "spatial_shapes .*, got"),
    "spatial_shapes of floats": ({"spatial_shapes": ((3.0, 4),)}, TypeError, "must hold Python ints, got float"),
    "spatial_shapes of booleans": ({"spatial_shapes": ((True, 1),)}, TypeError, "must hold Python ints, got bool"),
    "an empty grid": ({"spatial_shapes": ((3, 0),)}, ValueError, r"at least 1 × 1, got \(\(3, 0\),\)"),
    "a negative grid": ({"spatial_shapes": ((-3, -4), (2, 2), (1, 1))}, ValueError, "at least 1 × 1"),
    "both masks": (
        {"valid_shapes": FULL, "key_padding_mask": tensor(2, 17, dtype=torch.bool)},
        ValueError,
        "valid_shapes and key_padding_mask exclude each other, got both",
    ),
    "key_padding_mask of floats": (
        {"key_padding_mask": tensor(2, 17)},
        TypeError,
        "key_padding_mask must be a torch.bool tensor, got torch.float32 tensor",
    ),
    "key_padding_mask is a list": ({"key_padding_mask": [[False] * 17] * 2}, TypeError, "got list"),
    "key_padding_mask of other keys": (
        {"key_padding_mask": tensor(2, 16, dtype=torch.bool)},
        ValueError,
        r"key_padding_mask must be \[B=2, T=17\], got \[2, 16\]",
    ),
    "valid_shapes of floats": ({"valid_shapes": tensor(2, 3, 2)}, TypeError, "valid_shapes must be an integer tensor"),
    "valid_shapes of booleans": ({"valid_shapes": tensor(2, 3, 2).bool()}, TypeError, "got torch.bool"),
    "valid_shapes of another batch": (
        {"valid_shapes": FULL[:1]},
        ValueError,
        r"valid_shapes must be \[B=2, S=3, 2\], got \[1, 3, 2\]",
    ),
    "valid_shapes of other scales": ({"valid_shapes": [[[3, 4]]] * 2}, ValueError, r"got \[2, 1, 2\]"),
    "valid_shapes is ragged": ({"valid_shapes": [[[3, 4], [2]]] * 2}, TypeError, "valid_shapes must be a nested list"),
    "valid_shapes is a list of floats": ({"valid_shapes": [[[3.0, 4.0]] * 3] * 2}, TypeError, "nested list .* of ints"),
    "valid_shapes is a string": (
        {"valid_shapes": "3x4"},
        TypeError,
        "valid_shapes must be a nested list .*, got '3x4'",
    ),
    "valid_shapes beyond the grid": (
        {"valid_shapes": [FULL[0], [[3, 4], [2, 3], [1, 1]]]},
        ValueError,
        r"valid_shapes\[1, 1\] must be from \(0, 0\) to \(2, 2\), got \(2, 3\)",
    ),
    "valid_shapes below zero": (
        {"valid_shapes": torch.tensor([FULL[0], [[3, -1], [2, 2], [1, 1]]])},
        ValueError,
        r"valid_shapes\[1, 0\] must be from \(0, 0\) to \(3, 4\), got \(3, -1\)",
    ),
    "query is sparse": (
        {"query": torch.zeros(2, 2, 5, 8).to_sparse()},
        TypeError,
        "query must be dense, got .* torch.sparse_coo",
    ),
    "precision is sparse": (
        {"precision": torch.zeros(2, 2, 5, 2, 2).to_sparse()},
        TypeError,
        "precision must be dense, got .*sparse_coo",
    ),
    "sparse key_padding_mask": (
        {"key_padding_mask": tensor(2, 17, dtype=torch.bool).to_sparse()},
        TypeError,
        "key_padding_mask must be dense, got .*sparse_coo",
    ),
    "sparse valid_shapes": (
        {"valid_shapes": torch.tensor(FULL).to_sparse()},
        TypeError,
        "valid_shapes must be dense, got .*sparse_coo",
    ),
    "scale is beyond floats": ({"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
    "dropout_p is True": ({"dropout_p": True}, TypeError, "dropout_p must be a number, got bool"),
    "scale is False": ({"scale": False}, TypeError, "scale must be a number or None, got bool"),
    "dropout_p is a string": ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
    "dropout_p below 0": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\], got -0.1"),
    "dropout_p above 1": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "dropout_p is NaN": ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\], got nan"),
    "scale is a tensor": (
        {"scale": torch.tensor(1.0)},
        TypeError,
        "scale must be a number or None, got torch.float32 tensor",
    ),
    "scale is NaN": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "mass_tolerance is a tensor": (
        {"mass_tolerance": torch.tensor(0.1)},
        TypeError,
        "mass_tolerance must be a number or None, got torch.float32 tensor",
    ),
    "mass_tolerance below 0": (
        {"mass_tolerance": -1e-9},
        ValueError,
        r"mass_tolerance must be in \[0, 1\), got -1e-09",
    ),
    "mass_tolerance of 1": ({"mass_tolerance": 1.0}, ValueError, r"mass_tolerance must be in \[0, 1\), got 1.0"),
    "mass_tolerance is NaN": (
        {"mass_tolerance": math.nan},
        ValueError,
        r"mass_tolerance must be in \[0, 1\), got nan",
    ),
    "scale is infinite": ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
    "an unknown backend": ({"backend": "cuda"}, ValueError, "backend must be one of .*'auto', .* got 'cuda'"),
    "backend is None": ({"backend": None}, ValueError, "backend must be one of .*, got None"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@pytest.mark.parametrize("function", [smca_attention, explain_backend])
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(
    function: Any, case: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, message = BAD_ARGUMENTS[case]
    for module in (sdpa, reference):
        monkeypatch.setattr(module, "attention", lambda *inputs: pytest.fail("a backend was called"))
    arguments = make_arguments(generator, torch.device("cpu"))
    with pytest.raises(error, match=message):
        function(**(arguments | change))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_is_refused(generator: torch.Generator) -> None:
    arguments = make_arguments(generator, torch.device("cpu"))
    arguments["key"] = torch.nested.nested_tensor(list(arguments["key"]))
    with pytest.raises(TypeError, match="key must be dense, got a nested tensor"):
        smca_attention(**arguments)


@pytest.mark.parametrize(
    "name", ["key", "value", "center", "precision", "scale_weights", "key_padding_mask", "valid_shapes"]
)
def test_a_tensor_on_another_device_is_refused(name: str, generator: torch.Generator) -> None:
    arguments = make_arguments(generator, torch.device("cpu"))
    arguments["key_padding_mask"] = tensor(BATCH, KEYS, dtype=torch.bool)
    if name == "valid_shapes":
        del arguments["key_padding_mask"]
        arguments[name] = torch.tensor(FULL)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on cpu as query, got meta"):
        smca_attention(**arguments)


# --- what is accepted ---


@pytest.mark.parametrize(
    "spatial_shapes",
    [list(SHAPES), [list(shape) for shape in SHAPES], [torch.Size(shape) for shape in SHAPES]],
    ids=["list of tuples", "list of lists", "list of torch.Size"],
)
def test_spatial_shapes_come_as_any_nested_sequence(arguments: dict[str, Any], spatial_shapes: Any) -> None:
    expected = smca_attention(**arguments)
    assert torch.equal(smca_attention(**(arguments | {"spatial_shapes": spatial_shapes})), expected)


@pytest.mark.parametrize("dtype", [None, torch.int64, torch.int32, torch.int16, torch.uint8])
def test_valid_shapes_come_as_a_nested_list_or_any_integer_tensor(
    arguments: dict[str, Any], dtype: torch.dtype | None, device: torch.device
) -> None:
    valid = torch.tensor([[[3, 4], [2, 2], [1, 1]], [[2, 3], [1, 2], [0, 0]]], device=device)
    expected = of_reference(arguments, valid_shapes=valid)
    given = valid.tolist() if dtype is None else valid.to(dtype)
    torch.testing.assert_close(smca_attention(**arguments, valid_shapes=given), expected)


@pytest.mark.parametrize("as_list", [False, True])
def test_valid_shapes_without_values_are_not_looked_at(arguments: dict[str, Any], as_list: bool) -> None:
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in arguments.items()}
        valid_shapes = FULL if as_list else torch.tensor(FULL, device=arguments["query"].device)
        assert smca_attention(**fakes, valid_shapes=valid_shapes).shape == (BATCH, HEADS, QUERIES, HEAD_DIM)


def test_lists_are_no_tensors_of_the_default_device(generator: torch.Generator) -> None:
    arguments = make_arguments(generator, torch.device("cpu"))
    del arguments["scale_weights"]
    of_map = {name: value for name, value in arguments.items() if name != "value"}
    expected = smca_attention(**arguments, valid_shapes=FULL), attention_map(**of_map, queries=[2])[0]
    with torch.device("meta"):
        found = smca_attention(**arguments, valid_shapes=FULL), attention_map(**of_map, queries=[2])[0]
        with pytest.raises(ValueError, match=r"valid_shapes\[0, 0\] must be from \(0, 0\) to \(3, 4\), got \(9, 9\)"):
            smca_attention(**arguments, valid_shapes=[[(9, 9)] * SCALES] * BATCH)
    assert all(map(torch.equal, found, expected))


def test_a_key_padding_mask_ignores_where_it_is_true(arguments: dict[str, Any], generator: torch.Generator) -> None:
    mask = (torch.rand(BATCH, KEYS, generator=generator) < 0.4).to(arguments["query"].device)
    expected = of_reference(arguments, key_padding_mask=mask)
    torch.testing.assert_close(smca_attention(**arguments, key_padding_mask=mask), expected)


def test_without_scale_weights_every_scale_counts_one(arguments: dict[str, Any]) -> None:
    ones = torch.ones_like(arguments["scale_weights"])
    without = smca_attention(**(arguments | {"scale_weights": None}))
    torch.testing.assert_close(without, smca_attention(**(arguments | {"scale_weights": ones})))


@pytest.mark.parametrize("scale", [0.0, 0, 1, -0.5])
def test_a_given_scale_is_used_even_if_it_is_zero(arguments: dict[str, Any], scale: float) -> None:
    torch.testing.assert_close(smca_attention(**arguments, scale=scale), of_reference(arguments, scale))


def test_the_default_scale_is_that_of_scaled_dot_product_attention(arguments: dict[str, Any]) -> None:
    torch.testing.assert_close(smca_attention(**arguments), of_reference(arguments, HEAD_DIM**-0.5))


@pytest.mark.parametrize("shared", ["center", "precision", "scale_weights"])
def test_each_part_of_the_prior_may_be_shared_by_all_heads(arguments: dict[str, Any], shared: str) -> None:
    arguments[shared] = arguments[shared][:, :1].clone().requires_grad_()
    out, expected = smca_attention(**arguments), of_reference(arguments)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(o.sum(), arguments[shared])[0] for o in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", ["query", "batch"])
def test_no_queries_and_no_images_give_an_empty_output_and_zero_gradients(
    arguments: dict[str, Any], empty: str
) -> None:
    for name in ("query", "center", "precision", "scale_weights"):
        arguments[name] = arguments[name][:, :, :0] if empty == "query" else arguments[name][:0]
    if empty == "batch":
        arguments |= {name: arguments[name][:0] for name in ("key", "value")}
    arguments["key"].requires_grad_()
    out = smca_attention(**arguments)
    assert out.shape == arguments["query"].shape
    (gradient,) = torch.autograd.grad(out.sum(), arguments["key"])
    assert gradient.shape == arguments["key"].shape
    assert not gradient.any()


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_autocast_casts_query_key_and_value_and_leaves_the_prior(
    arguments: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    prior = {name: arguments[name].requires_grad_() for name in ("center", "precision", "scale_weights")}
    device_type = arguments["query"].device.type
    with torch.autocast(device_type, dtype=dtype):
        out = smca_attention(**arguments, backend=backend)
    cast = {name: arguments[name].to(dtype) for name in ("query", "key", "value")}
    expected = smca_attention(**(arguments | cast), backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    for gradient in torch.autograd.grad(out.sum(), list(prior.values())):
        assert gradient.dtype == torch.float32


def test_autocast_leaves_float64_alone(generator: torch.Generator) -> None:
    arguments = make_arguments(generator, torch.device("cpu"), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert smca_attention(**arguments).dtype == torch.float64


def test_maps_under_autocast_are_those_of_the_cast_query_and_key(arguments: dict[str, Any]) -> None:
    prior = [arguments[name] for name in ("center", "precision", "spatial_shapes")]
    cast = [arguments[name].bfloat16() for name in ("query", "key")]
    expected = attention_map(*cast, *prior)
    with torch.autocast(arguments["query"].device.type, torch.bfloat16):
        for query in (arguments["query"], cast[0]):
            found = attention_map(query, arguments["key"], *prior)
            assert all(map(torch.equal, found, expected))


# --- which backend ---


def on_a_gpu(dtype: torch.dtype = torch.float16) -> Any:
    """As much of validated inputs on a GPU as the choice looks at."""
    query = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=dtype, shape=(2, 8, 300, 32))
    return SimpleNamespace(query=query)


@pytest.fixture
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    operator = SimpleNamespace(
        unsupported=lambda inputs: "serves no float64" if inputs.query.dtype == torch.float64 else None
    )
    modules = {"triton": operator, "sdpa": sdpa, "reference": reference}
    monkeypatch.setattr(backends, "load", modules.__getitem__)
    return operator


def set_capability(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(devices, "capability", lambda device: (major, 0))


def test_the_cpu_is_served_by_sdpa_and_never_by_the_interpreter(generator: torch.Generator) -> None:
    choice = explain_backend(**make_arguments(generator, torch.device("cpu")))
    assert choice.backend == "sdpa"
    assert "NVIDIA" in choice.passed_over["triton"]
    assert set(choice.passed_over) == {"triton", "reference"}


def test_a_choice_prints_its_reasons_line_by_line(generator: torch.Generator) -> None:
    lines = str(explain_backend(**make_arguments(generator, torch.device("cpu")))).splitlines()
    assert [line.split(":")[0] for line in lines] == ["sdpa", "  not triton", "  not reference"]


def test_an_explicit_backend_is_the_choice(arguments: dict[str, Any]) -> None:
    choice = explain_backend(**arguments, backend="reference")
    assert (choice.backend, choice.reason) == ("reference", "asked for")
    assert choice.passed_over == dict.fromkeys(("triton", "sdpa"), "backend='reference' was asked for")


@pytest.mark.parametrize(("major", "chosen"), [(7, "sdpa"), (8, "triton"), (9, "triton"), (12, "triton")])
@pytest.mark.usefixtures("triton_serves")
def test_triton_is_chosen_where_it_reaches_the_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, major: int, chosen: str
) -> None:
    set_capability(monkeypatch, major)
    backend, passed_over = attention_module._choose("auto", on_a_gpu())
    assert backend == chosen
    assert ("sm_80" in passed_over.get("triton", "")) == (major < 8)


@pytest.mark.usefixtures("triton_serves")
def test_what_triton_cannot_serve_on_a_gpu_goes_to_sdpa_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capability(monkeypatch, 9)
    assert attention_module._choose("auto", on_a_gpu(torch.float64)) == ("sdpa", {"triton": "serves no float64"})


def test_an_explicit_backend_that_cannot_serve_raises_its_reason(
    arguments: dict[str, Any], triton_serves: SimpleNamespace
) -> None:
    triton_serves.unsupported = lambda inputs: "it is Sunday"
    for function in (smca_attention, explain_backend):
        with pytest.raises(ValueError, match="backend='triton' can't serve this call: it is Sunday"):
            function(**arguments, backend="triton")


@pytest.mark.parametrize("version", ["3.4.0", "2.3.1+git"])
def test_an_older_triton_than_the_kernels_are_tested_with_is_the_reason(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    triton = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", triton)
    reason = f"needs Triton 3.6 or newer, found {re.escape(version)}"
    with pytest.raises(ValueError, match=reason):
        smca_attention(**arguments, backend="triton")
    with pytest.raises(ValueError, match=reason):
        SpatialPrior(32, 2, (16,))(torch.randn(1, 3, 32), [(2, 2)], backend="triton")


def test_without_triton_the_import_error_is_the_reason(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(name: str) -> Any:
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return sdpa

    monkeypatch.setattr(backends, "load", module)
    with pytest.raises(ValueError, match=r"can't be imported here \(No module named 'triton'\)"):
        smca_attention(**arguments, backend="triton")
    set_capability(monkeypatch, 9)
    backend, passed_over = attention_module._choose("auto", on_a_gpu())
    assert backend == "sdpa"
    assert "No module named 'triton'" in passed_over["triton"]


def test_no_queries_are_left_to_the_reference(arguments: dict[str, Any]) -> None:
    for name in ("query", "center", "precision", "scale_weights"):
        arguments[name] = arguments[name][:, :, :0]
    choice = explain_backend(**{name: t.cpu() if isinstance(t, Tensor) else t for name, t in arguments.items()})
    assert choice.backend == "reference"
    assert "query is [2, 4, 0, 16]" in choice.passed_over["sdpa"]


# --- maps ---


def test_maps_are_the_probabilities_of_the_reference(arguments: dict[str, Any]) -> None:
    names = ("query", "key", "center", "precision", "spatial_shapes")
    maps = attention_map(*(arguments[name] for name in names))
    keys = arguments["key"].split([12, 4, 1], dim=2)
    for s, (height, width) in enumerate(SHAPES):
        center, precision = arguments["center"][..., s, :], arguments["precision"][..., s, :]
        expected = reference.scale_probabilities(
            arguments["query"], keys[s], center, precision, height, width, None, HEAD_DIM**-0.5
        )
        assert maps[s].shape == (BATCH, HEADS, QUERIES, height, width)
        assert torch.equal(maps[s].flatten(-2), expected)


def test_maps_weight_the_values_as_the_attention_does(arguments: dict[str, Any]) -> None:
    valid = [[[3, 4], [2, 2], [1, 1]], [[2, 3], [1, 2], [0, 0]]]
    names = ("query", "key", "center", "precision", "spatial_shapes")
    maps = attention_map(*(arguments[name] for name in names), valid_shapes=valid, scale=0.7)
    weighted = [m.flatten(-2) * arguments["scale_weights"][..., s : s + 1] for s, m in enumerate(maps)]
    expected = smca_attention(**arguments, valid_shapes=valid, scale=0.7)
    torch.testing.assert_close(torch.cat(weighted, -1) @ arguments["value"], expected)
    assert not maps[2][1].any()


@pytest.mark.parametrize("queries", [[3, 0, -1], torch.tensor([3, 0, 4]), torch.tensor([3, 0, 4], dtype=torch.int32)])
def test_maps_of_chosen_queries_come_in_their_order(arguments: dict[str, Any], queries: Any) -> None:
    tensors = [arguments[name] for name in ("query", "key", "center", "precision", "spatial_shapes")]
    for some, full in zip(attention_map(*tensors, queries=queries), attention_map(*tensors), strict=True):
        torch.testing.assert_close(some, full[:, :, [3, 0, 4]])


def test_maps_of_no_query_are_empty(arguments: dict[str, Any]) -> None:
    tensors = [arguments[name] for name in ("query", "key", "center", "precision", "spatial_shapes")]
    assert [m.shape[2] for m in attention_map(*tensors, queries=[])] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_are_float32_or_float64_without_gradient(
    generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> None:
    arguments = make_arguments(generator, device, dtype)
    arguments["query"].requires_grad_()
    mask = torch.zeros(BATCH, KEYS, dtype=torch.bool, device=device)
    tensors = [arguments[name] for name in ("query", "key", "center", "precision", "spatial_shapes")]
    for m in attention_map(*tensors, key_padding_mask=mask):
        assert m.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not m.requires_grad
        torch.testing.assert_close(m.sum((-2, -1)), torch.ones_like(m[..., 0, 0]))


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        ([5], IndexError, "queries must be indices from -5 to 4, got 5"),
        (torch.tensor([-6]), IndexError, "queries must be indices from -5 to 4, got -6"),
        (torch.tensor([0.0]), TypeError, "queries must be integer indices, got torch.float32"),
        ([0.9, 1.7], TypeError, "queries must be integer indices, got torch.float32"),
        ([True, False], TypeError, "queries must be integer indices, got torch.bool"),
        ("ab", TypeError, "queries must be integer indices, got 'ab'"),
        ([[0], [1, 2]], TypeError, r"queries must be integer indices, got \[\[0\], \[1, 2\]\]"),
        (torch.tensor([[0]]), ValueError, r"queries must be a list of indices or a tensor \[n\], got \[1, 1\]"),
    ],
)
def test_bad_query_indices_are_refused(
    arguments: dict[str, Any], queries: Any, error: type[Exception], message: str
) -> None:
    tensors = [arguments[name] for name in ("query", "key", "center", "precision", "spatial_shapes")]
    with pytest.raises(error, match=message):
        attention_map(*tensors, queries=queries)
