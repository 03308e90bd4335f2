"""Autocast switched off around code whose dtypes are settled: it would round a prior in float32 to half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast on "cuda", "cpu" …; outside of autocast it does nothing at all."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
