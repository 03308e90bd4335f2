"""Autocast: whether it is on, and off around code whose dtypes are settled: it would round a float32 prior to half."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_on(device_type: str) -> bool:
    """Whether the caller is in an autocast region of "cuda", "cpu" …; False where there are none of that kind."""
    # Some releases of torch (2.8, 2.11) can't trace the question of availability, whose answer is known for these two.
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast on "cuda", "cpu" …; outside of autocast it does nothing at all."""
    return torch.autocast(device_type, enabled=False) if autocast_on(device_type) else nullcontext()
