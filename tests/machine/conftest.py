"""A process in which Triton compiles: in the tests' own it interprets where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from smca_kernels.testing.machine.processes import compiling_processes


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[..., Any]]:
    """Call a module's function with arguments in a process whose kernels are compiled, and return what it returns."""
    pytest.importorskip("triton")
    with compiling_processes(1) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
