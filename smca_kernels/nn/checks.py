"""Checks of the layers' arguments: each raises a TypeError or ValueError that names the argument and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smca_kernels.inputs import MAX_SCALES, check_dense, is_number


def check_shape(name: str, tensor: Any, **axes: int | None) -> None:
    """Check that it is a tensor with these axes, named in order with their lengths; None allows any length."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    fits = tensor.dim() == len(axes) and all(
        size is None or actual == size for actual, size in zip(tensor.shape, axes.values(), strict=True)
    )
    if not fits:
        # Only here: formatting a size while tracing would fix it.
        expected = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{name} must be [{expected}], got {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def check_device_of_features(name: str, tensor: Tensor, features: Tensor) -> None:
    if tensor.device != features.device:
        raise ValueError(f"{name} must be on {features.device} as features, got {tensor.device}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_state_dict(name: str, value: Mapping[str, Tensor]) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a state dict, got {type(value).__name__}")


def check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_positive_number(name: str, value: float) -> None:
    _check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def check_probability(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_strides(strides: Sequence[float]) -> None:
    """Check for 1 to MAX_SCALES positive numbers of pixels per cell."""
    if not isinstance(strides, Sequence):
        raise TypeError(f"strides must be a sequence of pixels per cell, got {type(strides).__name__}")
    if not 1 <= len(strides) <= MAX_SCALES:
        raise ValueError(f"strides must have 1 to {MAX_SCALES} scales, got {len(strides)}")
    for s, stride in enumerate(strides):
        check_positive_number(f"strides[{s}]", stride)


def check_padding_mask(mask: Any, batch: int, keys: int, features: Tensor) -> None:
    check_shape("key_padding_mask", mask, B=batch, T=keys)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be a torch.bool tensor, got {mask.dtype}")
    check_device_of_features("key_padding_mask", mask, features)


def _check_number(name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
