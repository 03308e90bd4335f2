"""Bytes that the operations of a call take and give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_moved(call: Callable[[], object]) -> int:
    """Count the bytes of the tensors that a call's operations take and give; views and empty tensors cost nothing.

    Elements that an expanded tensor repeats count once, and so do the tensors of an operator that is one kernel or more
    inside, whatever it reads again. Caches are not modelled.
    """
    with _Traffic() as traffic:
        call()
    return traffic.bytes


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name == "_unsafe_view" or "empty" in name):
            given = () if name.startswith("new_") or name.endswith("_like") else (args, kwargs)
            tensors = (leaf for leaf in tree_leaves((given, result)) if isinstance(leaf, Tensor))
            self.bytes += sum(_distinct_bytes(tensor) for tensor in tensors)
        return result


def _distinct_bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(sizes) * tensor.element_size()
