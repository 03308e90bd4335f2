"""The implementations of the operator: a backend's name is its path.

Each is a module with two functions: `attention(inputs)`, and `unsupported(inputs)`, which gives the reason why it can't
serve these inputs, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TypeAlias

from torch import Tensor
from torch.nn.functional import pad

from smca_kernels.backends import reference
from smca_kernels.backends.devices import is_nvidia, reaches_tensor_cores
from smca_kernels.backends.sdpa import operator as sdpa_operator
from smca_kernels.inputs import AttentionInputs

BACKENDS = ("triton", "sdpa", "reference")  # fastest first
MIN_TRITON = (3, 6)  # the oldest that the kernels are tested with

Attention: TypeAlias = Callable[[AttentionInputs], Tensor]  # → [B, H, N, D_v]


def load(name: str) -> ModuleType:
    """The module of a backend. Triton is imported when it is first wanted.

    Raises:
        ImportError: as `check_triton`.
    """
    if name == "triton":
        check_triton()
        from smca_kernels.backends.triton import operator

        return operator
    return sdpa_operator if name == "sdpa" else reference


def check_triton() -> None:
    """Check that Triton is there and new enough; to be called before anything is imported from backends/triton/.

    Raises:
        ImportError: where Triton can't be imported, or is older than `MIN_TRITON`.
    """
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        raise ImportError(f"needs Triton {'.'.join(map(str, MIN_TRITON))} or newer, found {triton.__version__}")


def attention(name: str) -> Attention:
    """The function of a backend, for values of any width."""
    function: Attention = load(name).attention
    if name != "triton":
        return function

    def between_equal_widths(inputs: AttentionInputs) -> Tensor:
        """The kernels' output, for which the narrower of keys and values is filled up with zeros."""
        key_dim, value_dim = inputs.key.shape[3], inputs.value.shape[3]
        if key_dim == value_dim:
            return function(inputs)
        wide = max(key_dim, value_dim)
        query, key = pad(inputs.query, (0, wide - key_dim)), pad(inputs.key, (0, wide - key_dim))
        value = pad(inputs.value, (0, wide - value_dim))
        return function(replace(inputs, query=query, key=key, value=value))[..., :value_dim]

    return between_equal_widths


def unsupported(name: str, inputs: AttentionInputs) -> str | None:
    """Why a backend can't serve, or None."""
    try:
        module = load(name)
    except ImportError as error:
        return f"it can't be imported here ({error})"
    reason: str | None = module.unsupported(inputs)
    return reason


def objection(name: str, inputs: AttentionInputs) -> str | None:
    """Why backend "auto" passes over a backend: it can't serve, or it is the wrong one for the device; or None."""
    query = inputs.query
    if name == "triton":
        if not is_nvidia(query.device):
            return "the kernels are compiled for NVIDIA GPUs only, and the tensors are not on one"
        if not reaches_tensor_cores(query.device):
            return "Triton's tl.dot does not reach the tensor cores below sm_80; torch's SDPA is faster on this device"
    return unsupported(name, inputs)
