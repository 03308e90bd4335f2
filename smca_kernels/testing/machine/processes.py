"""Processes in which Triton compiles, whatever it does in the one that asks."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def compiling_processes(jobs: int) -> ProcessPoolExecutor:
    """Make a pool of processes that import Triton afresh, without TRITON_INTERPRET, and use one thread each."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    import torch

    # Triton reads this when it is imported, which nothing has done here yet.
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
