"""Processes in which Triton compiles, whatever it does in the one that asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def compiling_processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Make a pool of processes that import Triton for themselves, without TRITON_INTERPRET, and use one thread each."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_prepare)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # of an interrupted run, only what is under way is waited for


def _prepare() -> None:
    import torch

    # Triton reads this when it is imported, which nothing has done here yet.
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
