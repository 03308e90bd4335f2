"""Work of the portable backend on a CPU, shared out among threads that need not wait for each other.

torch shares out every operation by itself, and each of hundreds then waits until its slowest thread has finished: a
thread whose core another process keeps busy holds up all the others. Here a thread takes a part of the heads
through all the operations of a pass, and there is one wait at its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch
from torch import Tensor

from smca_kernels.backends.transforms import is_traced

MIN_SHARED_SCORES = 2**20  # below, handing work over takes longer than waiting

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = Lock()


def share_out(work: Callable[[int, int], None], count: int, scores: int, tensor: Tensor) -> None:
    """Call `work(first, last)` for parts that cover range(count), in threads that record no gradients.

    There is one part, for the calling thread, where the whole work has few scores, where `tensor` isn't on a CPU, and
    where a compiler, a mode or a profiler looks at it: they see the calling thread only.
    """
    threads = torch.get_num_threads()
    parts = min(threads, count)
    is_watched = is_traced(tensor) or torch._C._autograd._profiler_enabled()
    if parts == 1 or scores < MIN_SHARED_SCORES or not tensor.is_cpu or is_watched:
        work(0, count)
        return
    inference = torch.is_inference_mode_enabled()

    def part(i: int) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            work(i * count // parts, (i + 1) * count // parts)

    for _ in _pool(parts, threads // parts).map(part, range(parts)):
        pass


def _pool(size: int, threads: int) -> ThreadPoolExecutor:
    """Threads of Python that compute with so many of torch's each."""
    with _lock:
        pool = _pools.get((size, threads))
        if pool is None:
            started, before = Barrier(size + 1), torch.get_num_threads()

            def start() -> None:
                torch.get_num_threads()  # first: until asked, a thread takes the number that was set last anywhere
                torch.set_num_threads(threads)
                started.wait()

            pool = ThreadPoolExecutor(size, "smca_sdpa")
            try:
                for _ in range(size):
                    pool.submit(start)
                started.wait()
            except BaseException:
                started.abort()  # those that wait there would hold up the end of the program
                raise
            finally:
                torch.set_num_threads(before)  # for threads that others start
            _pools[size, threads] = pool
        return pool


def _forget() -> None:
    global _lock
    _pools.clear()
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # which has none of the threads
