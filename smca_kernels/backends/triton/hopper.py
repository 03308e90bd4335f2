"""Compilers that are known to be wrong on Hopper (sm_90), and what to compile with instead.

Triton before 3.7 leaves out the fence between an asynchronous copy and the wgmma that reads what it copied. In ptxas
before 13.3, an asynchronous wgmma whose left operand is in registers may read registers that were already overwritten,
and packed 16-bit additions lose an immediate (triton #9433, #11781, #11581): wrong numbers without an error. Triton
comes with two ptxas: up to 3.8 it takes the older one for Hopper, from 3.9 on the newer one, which is new enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from smca_kernels.backends.devices import is_nvidia
from smca_kernels.backends.triton import fences

HOPPER = 90
MIN_PTXAS = (13, 3)
MIN_TRITON = (3, 7)


@cache
def tools() -> tuple[Any, Any]:
    """The tool that Triton takes for Hopper, and the newer of its two."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(HOPPER), knobs.nvidia.ptxas_blackwell


def usable_tool() -> Any:
    """The first of the tools that is right on Hopper, or None."""
    return next((tool for tool in tools() if version_of(tool) >= MIN_PTXAS), None)


@cache
def triton_version() -> tuple[int, ...]:
    """Major and minor version of the installed Triton."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def version_of(tool: Any) -> tuple[int, ...]:
    """Version of a tool as numbers: 13.3 is (13, 3)."""
    return tuple(int(part) for part in tool.version.split("."))


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU; tensors without storage may be on one where there is none."""
    is_there = is_nvidia(device) and torch.cuda.is_available()
    return is_there and torch.cuda.get_device_capability(device) == (9, 0)


@torch.compiler.assume_constant_result  # a compiler can't trace Triton's settings
def unsupported(device: torch.device) -> str | None:
    """Why what Triton compiles for a device can't be trusted, or None if it can."""
    if not is_hopper(device):
        return None
    if triton_version() < MIN_TRITON:
        return "needs Triton ≥ 3.7 on Hopper: older ones leave out a fence before products read what was copied"
    if usable_tool() is not None:
        return None
    return (
        f"compiles for Hopper with ptxas {tools()[0].version}, which computes wrong numbers there; needs ptxas "
        f"{'.'.join(map(str, MIN_PTXAS))} or newer: Triton ≥ 3.8, or TRITON_PTXAS_PATH"
    )


def right_compiler(device: torch.device) -> AbstractContextManager[None]:
    """Let kernels that are first launched in this block be compiled by a ptxas that is right on the device, and fast.

    On Hopper that is without the fences that Triton repeats (fences.py).
    """
    return _for_hopper() if is_hopper(device) else nullcontext()


def compiler_for(arch: int) -> AbstractContextManager[None]:
    """Let kernels be compiled in this block as `right_compiler` does on a GPU of an architecture, but for ptxas."""
    return fences.taken_out() if arch == HOPPER else nullcontext()


@contextmanager
def _for_hopper() -> Iterator[None]:
    tool = usable_tool()
    with fences.taken_out(), nullcontext() if tool is None or tool is tools()[0] else _ptxas(tool.path):
        yield


@contextmanager
def _ptxas(path: str) -> Iterator[None]:
    from triton import knobs

    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = path
        yield
