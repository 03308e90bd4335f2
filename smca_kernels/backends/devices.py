"""What a GPU can do; asked once, because asking is slow beside a small call."""

from __future__ import annotations

from functools import cache

import torch


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device: (8, 0) for sm_80."""
    # Compilers can't trace a cache.
    return torch.cuda.get_device_capability(device) if torch.compiler.is_compiling() else _capability(device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_nvidia(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU: on ROCm, torch calls AMD's "cuda" too."""
    return device.type == "cuda" and torch.version.hip is None


def reaches_tensor_cores(device: torch.device) -> bool:
    """Whether Triton's products run on the tensor cores of a device."""
    return is_nvidia(device) and capability(device) >= (8, 0)
