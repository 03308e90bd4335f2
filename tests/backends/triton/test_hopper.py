"""On Hopper no kernel is compiled by a Triton or a ptxas that is known to be wrong there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from smca_kernels.backends.triton import hopper, prior

GPU = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], str, str], None]:
    """Pretends a card of a capability and the versions of Triton's two tools, of which Hopper gets the first."""

    def pretend(capability: tuple[int, int], first: str, second: str) -> None:
        monkeypatch.setattr(hopper, "is_hopper", hopper.is_hopper.__wrapped__)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        tools = tuple(SimpleNamespace(path=f"/{version}", version=version) for version in (first, second))
        monkeypatch.setattr(hopper, "tools", lambda: tools)
        monkeypatch.setattr(hopper, "triton_version", lambda: (3, 9))

    return pretend


def test_on_hopper_an_old_ptxas_is_refused_with_its_version(card: Callable[..., None]) -> None:
    card((9, 0), "12.8", "13.1")
    reason = hopper.unsupported(GPU)
    assert reason is not None
    assert "ptxas 12.8" in reason
    assert "ptxas 13.3 or newer" in reason


def test_the_prior_is_refused_where_the_attention_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "unsupported", lambda device: "an old ptxas")
    assert prior.unsupported([torch.empty(1, 2, 2)], None) == "an old ptxas"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)])
def test_other_cards_are_served_by_any_ptxas(card: Callable[..., None], capability: tuple[int, int]) -> None:
    card(capability, "12.8", "13.1")
    assert hopper.unsupported(GPU) is None
    before = knobs.nvidia.ptxas.path
    with hopper.right_compiler(GPU):
        assert knobs.nvidia.ptxas.path == before


def test_a_ptxas_that_is_new_enough_is_left_alone(card: Callable[..., None]) -> None:
    card((9, 0), "13.10", "13.4")
    assert hopper.unsupported(GPU) is None
    before = knobs.nvidia.ptxas.path
    with hopper.right_compiler(GPU):
        assert knobs.nvidia.ptxas.path == before


def test_the_second_ptxas_compiles_where_the_first_is_too_old(
    card: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card((9, 0), "12.9", "13.3")
    assert hopper.unsupported(GPU) is None
    monkeypatch.setattr(knobs.NvidiaTool, "from_path", lambda path: SimpleNamespace(path=path))
    before = knobs.nvidia.ptxas.path
    with hopper.right_compiler(GPU):
        assert knobs.nvidia.ptxas.path == "/13.3"
    assert knobs.nvidia.ptxas.path == before


def test_the_ptxas_of_this_triton_are_found() -> None:
    assert all(hopper.version_of(tool) >= (12, 0) for tool in hopper.tools())


@pytest.mark.parametrize(("version", "is_served"), [((3, 6), False), ((3, 7), True), ((3, 10), True)])
def test_on_hopper_triton_must_know_the_fence(
    version: tuple[int, int], is_served: bool, card: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card((9, 0), "13.4", "13.4")
    monkeypatch.setattr(hopper, "triton_version", lambda: version)
    reason = hopper.unsupported(GPU)
    assert (reason is None) == is_served
    assert is_served or "Triton ≥ 3.7" in str(reason)


def test_the_installed_triton_has_a_version() -> None:
    assert hopper.triton_version() >= (3, 6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_call_asks_too(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from smca_kernels.attention import smca_attention
    from smca_kernels.testing.cases import Case, make_inputs

    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "triton_version", lambda: (3, 9))
    monkeypatch.setattr(hopper, "MIN_PTXAS", (12, 0))
    arguments = make_inputs(Case("", ((3, 5),), queries=5), torch.Generator().manual_seed(0), device).arguments()
    compiled = torch.compile(smca_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments, backend="triton"), smca_attention(**arguments, backend="triton"))
