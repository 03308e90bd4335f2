"""The processes of one training run, one a device, as torchrun starts them; without torchrun there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started (NCCL, or gloo without GPUs), and give this process's device.

    The group ends with the context, at once in all processes where nothing went wrong. What reduces gradients in it
    (`Trainer.close`) must be gone by then: one that outlives its group may wait for it forever.

    Raises:
        ValueError: for more processes than the machine has GPUs, if it has any.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else None
    if device is not None:
        if local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"--nproc-per-node must be at most the {count} GPUs here, got a LOCAL_RANK of {local_rank}"
            )
        torch.cuda.set_device(device)
    device = device or torch.device("cpu")
    if "WORLD_SIZE" not in os.environ or _joined():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()  # none leaves while another still waits for it
    finally:
        dist.destroy_process_group()


def _joined() -> bool:
    """Whether this process is in a group; some builds of torch can't have any."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without torchrun. Process 0 alone writes files and speaks."""
    return dist.get_rank() if _joined() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if _joined() else 1


def summed(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over all processes."""
    if not _joined():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    result: list[float] = total.tolist()
    return result


def largest(number: float, device: torch.device) -> float:
    """The largest of a number that each process has."""
    if not _joined():
        return number
    found = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def joined(parts: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    if not _joined():
        return parts
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, parts)
    return [item for each in found for item in each]


def barrier() -> None:
    """Wait until every process is here."""
    if _joined():
        dist.barrier()


def log(line: str) -> None:
    """Print a line in process 0 alone, above the progress bar."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(line)
