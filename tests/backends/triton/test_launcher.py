"""A kernel launched past Triton's binder is the one that Triton would launch, on the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from smca_kernels.backends.triton import hopper
from smca_kernels.backends.triton.launcher import Launcher, launcher

NUMBERS = ["stride", "side", "factor"]
OPTIONS = {"BLOCK": 128, "TWICE": False, "num_warps": 1}


def kernel(x, y, out, stride, side, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    n = tl.arange(0, BLOCK)
    total = tl.load(x + n * stride).to(tl.float32) * factor + (side >> 32)
    if y is not None:
        total += tl.load(y + n).to(tl.float32)
    tl.store(out + n, total + total if TWICE else total)


class StandIn:
    """A driver of a GPU that is not there: keeps what would have been launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[Any, ...]:
        return None, hash(binary), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: self.launches.append(arguments)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    stand_in = StandIn()
    monkeypatch.setattr(driver, "_active", stand_in)
    for name, function in compiled_language().items():
        monkeypatch.setattr(tl.core, name, function)
    return stand_in.launches


def compiled_language() -> dict[str, Any]:
    """What a kernel is compiled with: where the interpreter has run a function of tl.standard, it leaves its own."""
    functions = {}
    for name, function in vars(tl.core).items():
        while "member" in (getattr(function, "__kwdefaults__", None) or {}):  # the interpreter's, around another
            function = functions[name] = function.__kwdefaults__["member"]
    return functions


def arguments(
    dtype: torch.dtype = torch.float16, has_y: bool = True, start: int = 0, stride: int = 1, side: int = 5 << 32
) -> tuple[Any, ...]:
    """Arguments of the kernel; start: of y, in elements of 4 bytes of memory that is aligned to 64 bytes."""
    y = torch.zeros(256)[start:] if has_y else None
    return torch.zeros(256, dtype=dtype), y, torch.zeros(256), stride, side, 0.5


VARIED = [
    arguments(), arguments(start=1), arguments(start=4), arguments(dtype=torch.bfloat16), arguments(has_y=False),
    arguments(stride=16), arguments(stride=2**31 - 1), arguments(stride=2**31), arguments(stride=-(2**31)),
    arguments(side=1 << 32 | 1), arguments(side=3),
]  # fmt: skip


def test_a_launch_is_the_one_that_triton_makes(launches: list[tuple[Any, ...]]) -> None:
    by_triton = JITFunction(kernel, do_not_specialize=NUMBERS)
    ours = Launcher(JITFunction(kernel, do_not_specialize=NUMBERS))
    for _ in range(2):
        for options in (OPTIONS, OPTIONS | {"TWICE": True}):
            for given in VARIED:
                by_triton[(3, 2)](*given, **options)
                ours[(3, 2)](*given, **options)
                theirs, direct = map(_comparable, launches[-2:])
                assert direct == theirs


def _comparable(launch: tuple[Any, ...]) -> list[Any]:
    """The arguments of a launch: tensors by their identity, what a profiler is told of it by its contents."""
    return [id(x) if isinstance(x, torch.Tensor) else x.data if isinstance(x, LazyDict) else x for x in launch]


def test_triton_looks_at_arguments_of_one_kind_once(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Launcher(JITFunction(kernel, do_not_specialize=NUMBERS))
    ours[(1,)](*arguments(), **OPTIONS)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton looked again"))
    for given in (arguments(), arguments(start=4), arguments(stride=16)):
        ours[(4,)](*given, **OPTIONS)
    assert [launch[0] for launch in launches] == [1, 4, 4, 4]


def test_a_kernel_that_specializes_on_numbers_is_left_to_triton(launches: list[tuple[Any, ...]]) -> None:
    ours = Launcher(JITFunction(kernel))
    for stride in (1, 2, 1):
        ours[(1,)](*arguments(stride=stride), **OPTIONS)
    of_1, of_2, again = [launch[4] for launch in launches]
    assert of_1 == again != of_2


def test_tensors_of_another_device_are_another_kind(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "is_hopper", lambda device: False)  # the other device may not be there
    ours = Launcher(JITFunction(kernel, do_not_specialize=NUMBERS))
    x, *others = arguments()
    ours[(1,)](x, *others, **OPTIONS)
    ours[(1,)](_Elsewhere(x), *others, **OPTIONS)
    assert len(ours._compiled) == 2


class _Elsewhere(torch.Tensor):
    device = torch.device("cuda", 1)

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> _Elsewhere:
        return tensor.as_subclass(cls)


def test_a_kernel_that_is_interpreted_is_its_own_launcher() -> None:
    interpreted = InterpretedFunction(kernel)
    assert launcher(interpreted) is interpreted
    compiled = JITFunction(kernel)
    assert isinstance(launcher(compiled), Launcher)
    assert launcher(compiled) is launcher(compiled)
