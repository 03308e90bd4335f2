"""What the parts of the machine see of the whole: each knows these, and none the file that has them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from smca_kernels.testing.machine.arithmetic import Array
from smca_kernels.testing.machine.ptx import Immediate


class Registers(Protocol):
    """A kernel's registers, constants and parameters, to those who write code for it."""

    counts: dict[str, int]
    numbers: dict[str, str]
    specials: dict[str, str]
    parameter_number: dict[str, int]

    def constant(self, immediate: Immediate, cls: str, view: str) -> str: ...


class Lanes(Protocol):
    """The lanes that run, to those who check or execute what they do."""

    arch: int
    lanes: int
    warps: int
    threads: int
    ctas: int
    time: int
    grid: tuple[int, int, int]
    parameters: dict[str, int]
    own: Array
    base: Array
    epoch_of_lane: Array
    grid_size: int
    all_lanes: Array
    cta_of_lane: Array
    thread_of_lane: Array
    global_cta: Array
    shared: Any

    @property
    def fault(self) -> Callable[..., None]: ...
    @property
    def report(self) -> Callable[..., None]: ...
    @property
    def lanes_of(self) -> Callable[..., Any]: ...
    @property
    def whole_ctas(self) -> Callable[..., Any]: ...
    @property
    def need_whole_warps(self) -> Callable[..., Any]: ...
    @property
    def check_async_read(self) -> Callable[..., Any]: ...
    @property
    def issue_wgmma(self) -> Callable[..., Any]: ...
    @property
    def accumulators(self) -> Callable[..., Any]: ...
