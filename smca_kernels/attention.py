"""The operation itself: check the arguments, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smca_kernels import backends
from smca_kernels.autocast import autocast_off, autocast_on
from smca_kernels.backends import BACKENDS, reference
from smca_kernels.inputs import INTEGER_DTYPES, AttentionInputs, ValidShapes, shape_of

# Takes a backend's name and function and returns the function to call instead: how `smca_kernels.profile` sees calls.
call_hook: Callable[[str, backends.Attention], backends.Attention] | None = None


@dataclass(frozen=True)
class BackendChoice:
    """The backend that serves a call, why, and why each other one does not.

    Attributes:
        backend: "triton", "sdpa" or "reference".
        reason: why this one.
        passed_over: for every other backend, why not that one.
    """

    backend: str
    reason: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        others = [f"  not {name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join([f"{self.backend}: {self.reason}", *others])


def smca_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, D_v]
    center: Tensor,  # [B, H or 1, N, S, 2]
    precision: Tensor,  # [B, H or 1, N, S, 2]
    spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
    scale_weights: Tensor | None = None,  # [B, H or 1, N, S]
    *,
    valid_shapes: ValidShapes | None = None,  # [B, S, 2]
    key_padding_mask: Tensor | None = None,  # [B, T]
    dropout_p: float = 0.0,
    scale: float | None = None,
    mass_tolerance: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, H, N, D_v]
    """Spatially modulated co-attention of object queries to the feature maps of one or more scales.

    For every query and scale s: ``P_s = softmax_k(scale · q·k - p_x (x - c_x)² - p_y (y - c_y)²)`` over the cells
    (x, y) of that scale alone, and ``out = Σ_s scale_weights_s Σ_k P_s[k] value[k]``.

    Args:
        query: [B, H, N, D], float32, float16, bfloat16 or float64, D ≤ 128; any strides.
        key: [B, H, T, D], dtype of query; the scales one after the other, row-major inside a scale.
        value: [B, H, T, D_v], dtype of query, D_v ≤ 128. D_v may differ from D, as in Conditional DETR, whose keys are
            twice as wide: "triton" then fills up the narrower with zeros, which costs memory and time.
        center: [B, H or 1, N, S, 2], (x, y) in cells of each scale's own grid; float32 or dtype of query.
        precision: [B, H or 1, N, S, 2], (p_x, p_y) ≥ 0 per cell²; 0 switches the prior off on that axis.
        spatial_shapes: (height, width) of each of the 1 to 8 scales in cells; T = Σ height · width.
        scale_weights: [B, H or 1, N, S], weight of each scale; None lets every scale count 1.
        valid_shapes: [B, S, 2], (height, width) in cells of the top-left part of each grid that is image: a nested
            list or an integer tensor on query's device. Values outside 0…(height, width) raise on the CPU; tensors
            on other devices are not looked at, and values there act as if clamped to the grid.
        key_padding_mask: [B, T] bool, True = ignore that key. Not together with valid_shapes.
        dropout_p: probability of dropping each element of P after the softmax, in [0, 1].
        scale: softmax scale; None is D ** -0.5.
        mass_tolerance: of each query's softmax over each scale, the most that may be left out: keys which the prior
            provably makes that unlikely need not be looked at. In [0, 1); 0 computes all. None leaves out less than
            the rounding of query's dtype: 2⁻²⁴ for float32, 2⁻¹⁴ for float16, 2⁻¹¹ for bfloat16 (docs/locality.md).
            Only "triton" makes use of it, from a size on where that saves time in training.
        backend: "auto", "triton", "sdpa" or "reference"; `explain_backend` tells what "auto" chooses.

    Returns:
        [B, H, N, D_v] in query's dtype (under autocast: in the autocast dtype). A scale without a valid key for an
        image contributes 0 and no gradient.

    Raises:
        TypeError, ValueError: for an argument of wrong type, dtype, device, shape or range, and for an explicit
            backend that can't serve this call.

    Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021, Eq. 3–9.
    """
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key, value = _cast(dtype, query, key, value)
    inputs = AttentionInputs.checked(
        query, key, value, center, precision, spatial_shapes, scale_weights, valid_shapes=valid_shapes,
        key_padding_mask=key_padding_mask, dropout_p=dropout_p, scale=scale, mass_tolerance=mass_tolerance,
    )  # fmt: skip
    name = _choose(backend, inputs)[0]
    attention = backends.attention(name)
    if call_hook is not None:
        attention = call_hook(name, attention)
    if dtype is None:
        return attention(inputs)
    # The dtypes are settled; autocast inside a backend would round the prior.
    with torch.autocast(query.device.type, enabled=False):
        return attention(inputs)


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    scale_weights: Tensor | None = None,
    *,
    valid_shapes: ValidShapes | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    mass_tolerance: float | None = None,
    backend: str = "auto",
) -> BackendChoice:
    """Tell which backend `smca_attention` would use for these arguments, and why not the others.

    Args:
        query, …: as `smca_attention` takes them.

    Returns:
        The choice with its reasons; print it.

    Raises:
        TypeError, ValueError: as `smca_attention`.
    """
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key, value = _cast(dtype, query, key, value)
    inputs = AttentionInputs.checked(
        query, key, value, center, precision, spatial_shapes, scale_weights, valid_shapes=valid_shapes,
        key_padding_mask=key_padding_mask, dropout_p=dropout_p, scale=scale, mass_tolerance=mass_tolerance,
    )  # fmt: skip
    chosen, passed_over = _choose(backend, inputs)
    if backend != "auto":
        others = {name: f"backend={backend!r} was asked for" for name in BACKENDS if name != chosen}
        return BackendChoice(chosen, "asked for", others)
    # A backend after the chosen one was never tried; its own reason comes first if it has one.
    rest = BACKENDS[BACKENDS.index(chosen) + 1 :]
    later = {name: backends.objection(name, inputs) or f"{chosen} is faster" for name in rest}
    return BackendChoice(chosen, "the fastest that serves this call", passed_over | later)


@torch.no_grad()
def attention_map(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, T, D]
    center: Tensor,  # [B, H or 1, N, S, 2]
    precision: Tensor,  # [B, H or 1, N, S, 2]
    spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
    *,
    queries: Tensor | Sequence[int] | None = None,  # [n]
    valid_shapes: ValidShapes | None = None,  # [B, S, 2]
    key_padding_mask: Tensor | None = None,  # [B, T]
    scale: float | None = None,
) -> list[Tensor]:  # S × [B, H, n, height, width]
    """Compute attention P of chosen queries over the grid of each scale, for pictures; without gradient.

    Args:
        queries: indices of the n queries wanted, a list or an integer tensor; None: all N.
        query, …: as `smca_attention` takes them.

    Returns:
        For each scale P_s [B, H, n, height, width] in float32 (float64 for float64 inputs): it sums to 1 over the grid,
        or is 0 everywhere for an image with no valid key at that scale.

    Raises:
        TypeError, ValueError: as `smca_attention`.
        IndexError: for a query index outside [-N, N).

    Source: Eq. 6.
    """
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key = _cast(dtype, query, key)
    inputs = AttentionInputs.checked(
        query, key, key, center, precision, spatial_shapes,
        valid_shapes=valid_shapes, key_padding_mask=key_padding_mask, scale=scale,
    )  # fmt: skip
    if queries is not None:
        chosen = _query_indices(queries, query.shape[2], query.device)
        query, center, precision = query[:, :, chosen], center[:, :, chosen], precision[:, :, chosen]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, center, precision = query.to(dtype), key.to(dtype), center.to(dtype), precision.to(dtype)
    keys = key.split(inputs.keys_per_scale(), dim=2)
    ignored = reference.ignored_keys(inputs.spatial_shapes, inputs.valid_shapes, inputs.key_padding_mask)
    with autocast_off(query.device.type):
        return [
            reference.scale_probabilities(
                query, keys[s], center[..., s, :], precision[..., s, :], height, width, ignored[s], inputs.scale
            ).unflatten(-1, (height, width))
            for s, (height, width) in enumerate(inputs.spatial_shapes)
        ]


def _autocast_dtype(query: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts to on query's device, or None outside of autocast regions."""
    if not isinstance(query, Tensor):
        return None
    # `device.type` makes a new string each time, which is slow beside a small call.
    device_type = "cpu" if query.is_cpu else "cuda" if query.is_cuda else query.device.type
    return torch.get_autocast_dtype(device_type) if autocast_on(device_type) else None


def _cast(dtype: torch.dtype, *tensors: Tensor) -> Iterator[Tensor]:
    """Cast every floating dtype but float64, as torch's own attention does."""
    for tensor in tensors:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        yield tensor.to(dtype) if eligible else tensor


def _choose(backend: str, inputs: AttentionInputs) -> tuple[str, dict[str, str]]:
    """The backend to use, and the reasons against the ones that were tried before it."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
        reason = backends.unsupported(backend, inputs)
        if reason is not None:
            raise ValueError(f"backend={backend!r} can't serve this call: {reason}")
        return backend, {}
    passed_over: dict[str, str] = {}
    for name in BACKENDS:
        reason = backends.objection(name, inputs)
        if reason is None:
            break
        passed_over[name] = reason
    return name, passed_over


def _query_indices(queries: Tensor | Sequence[int], count: int, device: torch.device) -> Tensor:
    if isinstance(queries, Tensor):
        indices = queries
    else:
        try:
            indices = torch.tensor(queries, device="cpu")  # whatever the default device
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"queries must be integer indices, got {queries!r}") from error
        if not indices.numel():
            indices = indices.long()  # of no index torch makes floating numbers
    if indices.dtype not in INTEGER_DTYPES:
        raise TypeError(f"queries must be integer indices, got {indices.dtype}")
    if indices.dim() != 1:
        raise ValueError(f"queries must be a list of indices or a tensor [n], got {shape_of(indices)}")
    for index in indices.tolist():
        if not -count <= index < count:
            raise IndexError(f"queries must be indices from {-count} to {count - 1}, got {index}")
    return indices.to(device, torch.int64)
