"""Tables that depend on the grids alone, kept on the device: making one takes longer than a small call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

from smca_kernels.backends.folding import is_traced
from smca_kernels.inputs import SpatialShapes

Table = TypeVar("Table")
Maker = Callable[[SpatialShapes, torch.dtype, torch.device], Table]

MAX_KEPT = 64  # a detector's grids change from batch to batch


def kept_on_device(make: Maker[Table]) -> Callable[[SpatialShapes, torch.dtype, Tensor], Table]:
    """Keep the last tables that were made for (shapes, dtype, a tensor's device).

    While something looks on that has to see how a table is made, it is made anew. One that a CUDA graph was captured
    with is kept for good: the graph has its address.
    """

    @lru_cache(MAX_KEPT)
    def kept(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> Table:
        with torch.inference_mode(False):
            table = make(shapes, dtype, device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # calls on other streams find it complete
        return table

    in_graphs: dict[tuple[SpatialShapes, torch.dtype, torch.device], Table] = {}

    @wraps(make)
    def get(shapes: SpatialShapes, dtype: torch.dtype, like: Tensor) -> Table:
        device = like.device
        if is_traced(like):
            return make(shapes, dtype, device)
        table = in_graphs.get((shapes, dtype, device))
        if table is None:
            table = kept(shapes, dtype, device)
            if is_captured(device):
                in_graphs[shapes, dtype, device] = table
        return table

    return get


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
