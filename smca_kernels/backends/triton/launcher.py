"""Launches of a kernel that skip Triton's inspection of its arguments where it has compiled for such before.

Before each launch Triton's binder inspects every argument, and every constant of the source, which takes longer than
many a small kernel. What it compiles depends on little: which tensors there are, their dtypes and whether they are
aligned to 16 bytes, whether an integer needs 64 bits, and the compile-time arguments. The kernels specialise on no
number (do_not_specialize).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel

from smca_kernels.backends.triton import hopper

INT32 = range(-(2**31), 2**31)


class Launcher:
    """Stands in for a kernel: `launcher[grid](*arguments, **options)` launches it, with its options in one order."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            device = arguments[0].device
            kinds = (*_kinds(arguments), *options.values(), device)
            known = self._compiled.get(kinds)
            if known is not None:
                compiled, constants = known
                compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
                return
            with hopper.right_compiler(device):
                compiled = self.kernel[grid](*arguments, **options)
            if isinstance(compiled, CompiledKernel) and self._specializes_on_no_number(arguments):
                constants = [options[name] for name in self.kernel.arg_names[len(arguments) :]]
                self._compiled[kinds] = compiled, constants

        return launch

    def _specializes_on_no_number(self, arguments: tuple[Any, ...]) -> bool:
        pairs = zip(arguments, self.kernel.params, strict=False)
        return all(param.do_not_specialize for argument, param in pairs if isinstance(argument, int))


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """What Triton compiles for in place of each argument."""
    return [
        argument in INT32 if isinstance(argument, int)
        else (argument.dtype, argument.data_ptr() % 16 == 0) if isinstance(argument, Tensor) else type(argument)
        for argument in arguments
    ]  # fmt: skip


@cache
def launcher(kernel: Any) -> Any:
    """The launcher of a kernel; the kernel itself where it is interpreted."""
    return Launcher(kernel) if isinstance(kernel, JITFunction) else kernel
