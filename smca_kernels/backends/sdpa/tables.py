"""Tables that depend on the grids alone, kept on the device: making one takes longer than a small call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

from smca_kernels.backends.transforms import is_traced
from smca_kernels.inputs import SpatialShapes

Table = TypeVar("Table")
Maker = Callable[[SpatialShapes, torch.dtype, torch.device], Table]
Getter = Callable[[SpatialShapes, torch.dtype, Tensor], Table]

MAX_KEPT = 64  # a detector's grids change from batch to batch


class NotKeptError(Exception):
    """There is no such table yet, and during a capture none may be kept."""


def kept_on_device(make: Maker[Table]) -> Getter[Table]:
    """Keep the last tables that were made for (shapes, dtype, a tensor's device).

    While something is watching (`is_traced`), a table is made anew, so that it is seen how. One that a CUDA graph was
    captured with is kept for good, since the graph holds its address; one made during a capture belongs to the graph.
    """

    @lru_cache(MAX_KEPT)
    def kept(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> Table:
        if is_captured(device):
            raise NotKeptError
        with torch.inference_mode(False):
            table = make(shapes, dtype, device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # calls on other streams find it complete
        return table

    in_graphs: dict[tuple[SpatialShapes, torch.dtype, torch.device], Table] = {}

    @wraps(make)
    def get(shapes: SpatialShapes, dtype: torch.dtype, like: Tensor) -> Table:
        key = shapes, dtype, like.device
        if is_traced(like):
            return make(*key)
        table = in_graphs.get(key)
        if table is None:
            try:
                table = kept(*key)
            except NotKeptError:
                return make(*key)
            if is_captured(like.device):
                in_graphs[key] = table
        return table

    return get


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
