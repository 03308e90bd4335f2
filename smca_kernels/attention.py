"""The operation itself: check the arguments, choose a backend, call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from smca_kernels.backends import reference
from smca_kernels.backends.sdpa import operator as sdpa

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BACKENDS = ("triton", "sdpa", "reference")  # fastest first
OTHER_TENSORS = ("key", "value", "center", "precision", "scale_weights")
MAX_HEAD_DIM = 128
MAX_SCALES = 8

# Of a query's softmax over a scale, what may be left out unless a caller says otherwise: for float32 its unit
# roundoff, for half precision an eighth of that (docs/locality.md).
MASS_TOLERANCES = {torch.float32: 2.0**-24, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-11, torch.float64: 0.0}

# What every backend takes: query, key, value, center, precision, scale_weights, spatial_shapes, valid_shapes,
# key_padding_mask, dropout_p, scale, mass_tolerance.
Inputs: TypeAlias = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, reference.SpatialShapes, Tensor | None, Tensor | None,
    float, float, float,
]  # fmt: skip

# Of a backend's name and function, the function to call instead: how `smca_kernels.profile` sees calls. Usually unset.
watch: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]] | None = None


@dataclass(frozen=True)
class BackendChoice:
    """Which backend serves a call, why, and why each other one does not.

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
    value: Tensor,  # [B, H, T, D]
    center: Tensor,  # [B, H or 1, N, S, 2]
    precision: Tensor,  # [B, H or 1, N, S, 2]
    spatial_shapes: Sequence[Sequence[int]],  # S × (height, width)
    scale_weights: Tensor | None = None,  # [B, H or 1, N, S]
    *,
    valid_shapes: Tensor | Sequence[Sequence[Sequence[int]]] | None = None,  # [B, S, 2]
    key_padding_mask: Tensor | None = None,  # [B, T]
    dropout_p: float = 0.0,
    scale: float | None = None,
    mass_tolerance: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [B, H, N, D]
    """Spatially modulated co-attention of object queries to the feature maps of one or more scales.

    For every query and scale s: ``P_s = softmax_k(scale · q·k - p_x (x - c_x)² - p_y (y - c_y)²)`` over the cells
    (x, y) of that scale alone, and ``out = Σ_s scale_weights_s Σ_k P_s[k] value[k]``.

    Args:
        query: [B, H, N, D], float32, float16, bfloat16 or float64, D ≤ 128; any strides.
        key: [B, H, T, D], dtype of query; the scales one after the other, row-major inside a scale.
        value: [B, H, T, D], dtype of query.
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
            Only "triton" makes use of it, from a size on where that saves time.
        backend: "auto", "triton", "sdpa" or "reference"; `explain_backend` tells what "auto" chooses.

    Returns:
        [B, H, N, D] in query's dtype (under autocast: in the autocast dtype). A scale without a valid key for an image
        contributes 0 and no gradient.

    Raises:
        TypeError, ValueError: for an argument of wrong type, dtype, device, shape or range, and for an explicit
            backend that can't serve this call.

    Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021, Eq. 3–9.
    """
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key, value = _cast(dtype, query, key, value)
    inputs = _validated(
        query, key, value, center, precision, scale_weights, spatial_shapes, valid_shapes, key_padding_mask,
        dropout_p, scale, mass_tolerance,
    )  # fmt: skip
    backend = _choose(backend, inputs)[0]
    attention = _module(backend).attention
    if watch is not None:
        attention = watch(backend, attention)
    if dtype is None:
        return attention(*inputs)
    # The dtypes are settled; autocast inside a backend would round the prior.
    with torch.autocast(query.device.type, enabled=False):
        return attention(*inputs)


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    scale_weights: Tensor | None = None,
    *,
    valid_shapes: Tensor | Sequence[Sequence[Sequence[int]]] | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    mass_tolerance: float | None = None,
    backend: str = "auto",
) -> BackendChoice:
    """Which backend `smca_attention` would use for these arguments, and why not the others.

    Args:
        As `smca_attention`.

    Returns:
        The choice with its reasons; print it.

    Raises:
        As `smca_attention`.
    """
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key, value = _cast(dtype, query, key, value)
    inputs = _validated(
        query, key, value, center, precision, scale_weights, spatial_shapes, valid_shapes, key_padding_mask,
        dropout_p, scale, mass_tolerance,
    )  # fmt: skip
    chosen, passed_over = _choose(backend, inputs)
    if backend != "auto":
        others = {name: f"backend={backend!r} was asked for" for name in BACKENDS if name != chosen}
        return BackendChoice(chosen, "asked for", others)
    # What comes after the choice was never asked; its own reason comes first if it has one.
    rest = BACKENDS[BACKENDS.index(chosen) + 1 :]
    later = {name: _against(name, inputs) or f"{chosen} is faster" for name in rest}
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
    valid_shapes: Tensor | Sequence[Sequence[Sequence[int]]] | None = None,  # [B, S, 2]
    key_padding_mask: Tensor | None = None,  # [B, T]
    scale: float | None = None,
) -> list[Tensor]:  # S × [B, H, n, height, width]
    """Attention P of chosen queries over the grid of each scale, for pictures; without gradient.

    Args:
        queries: indices of the n queries wanted, a list or an integer tensor; None: all N.
        Others as `smca_attention`.

    Returns:
        For each scale P_s [B, H, n, height, width] in float32 (float64 for float64 inputs): it sums to 1 over the grid,
        or is 0 everywhere for an image with no valid key at that scale.

    Raises:
        As `smca_attention`; IndexError for a query index outside [-N, N).

    Source: Eq. 6.
    """
    inputs = _validated(
        query, key, key, center, precision, None, spatial_shapes, valid_shapes, key_padding_mask, 0.0, scale, 0.0
    )
    query, key, _, center, precision, _, shapes, valid, mask, _, softmax_scale, _ = inputs
    if queries is not None:
        chosen = _query_indices(queries, query.shape[2], query.device)
        query, center, precision = query[:, :, chosen], center[:, :, chosen], precision[:, :, chosen]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, center, precision = query.to(dtype), key.to(dtype), center.to(dtype), precision.to(dtype)
    keys = key.split([height * width for height, width in shapes], dim=2)
    ignored = reference.ignored_keys(shapes, valid, mask)
    return [
        reference.scale_probabilities(
            query, keys[s], center[..., s, :], precision[..., s, :], height, width, ignored[s], softmax_scale
        ).unflatten(-1, (height, width))
        for s, (height, width) in enumerate(shapes)
    ]


def _autocast_dtype(query: Tensor) -> torch.dtype | None:
    """What autocast casts to on query's device, or None outside of autocast regions."""
    if not isinstance(query, Tensor):
        return None
    # `device.type` makes a new string each time, which a small call would feel.
    device_type = "cpu" if query.is_cpu else "cuda" if query.is_cuda else query.device.type
    known = query.is_cpu or query.is_cuda or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def _cast(dtype: torch.dtype, *tensors: Tensor) -> Iterator[Tensor]:
    """As torch's own attention casts: every floating dtype but float64."""
    for tensor in tensors:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        yield tensor.to(dtype) if eligible else tensor


def _choose(backend: str, inputs: Inputs) -> tuple[str, dict[str, str]]:
    """The backend to use, and the reasons against the ones that were tried before it."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
        reason = _unsupported(backend, inputs)
        if reason is not None:
            raise ValueError(f"backend={backend!r} can't serve this call: {reason}")
        return backend, {}
    passed_over: dict[str, str] = {}
    for name in BACKENDS:
        reason = _against(name, inputs)
        if reason is None:
            break
        passed_over[name] = reason
    return name, passed_over


def _against(name: str, inputs: Inputs) -> str | None:
    """Why "auto" should not use a backend: it can't serve, or it is the wrong one for the device."""
    query = inputs[0]
    if name == "triton":
        if not query.is_cuda:
            return "the kernels are compiled for NVIDIA GPUs only, and the tensors are not on one"
        if not _has_triton_tensor_cores(query.device):
            return "Triton's tl.dot does not reach the tensor cores below sm_80; torch's SDPA is faster on this device"
    return _unsupported(name, inputs)


def _unsupported(name: str, inputs: Inputs) -> str | None:
    """Why a backend can't serve, or None."""
    try:
        module = _module(name)
    except ImportError as error:
        return f"it can't be imported here ({error})"
    reason: str | None = module.unsupported(*inputs)
    return reason


def _module(name: str) -> ModuleType:
    if name == "triton":
        from smca_kernels.backends.triton import operator  # the only import of Triton, and only when it is wanted

        return operator
    return sdpa if name == "sdpa" else reference


def _has_triton_tensor_cores(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= 8


def _validated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    spatial_shapes: Sequence[Sequence[int]],
    valid_shapes: Tensor | Sequence[Sequence[Sequence[int]]] | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    mass_tolerance: float | None,
) -> Inputs:
    """Everything checked and brought into the backends' form; sizes may be symbolic while tracing."""
    _check_kinds(query, key, value, center, precision, scale_weights)
    shapes = _grids(spatial_shapes)
    _check_shapes(query, key, value, center, precision, scale_weights, shapes)
    if key_padding_mask is not None:
        if valid_shapes is not None:
            raise ValueError("valid_shapes and key_padding_mask exclude each other, got both")
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be a torch.bool tensor, got {_kind(key_padding_mask)}")
        if key_padding_mask.device != query.device:
            raise ValueError(f"key_padding_mask must be on {query.device} as query, got {key_padding_mask.device}")
        B, T = key.shape[0], key.shape[2]
        if key_padding_mask.shape != (B, T):
            raise ValueError(f"key_padding_mask must be [B={B}, T={T}], got {_shape(key_padding_mask)}")
    if valid_shapes is not None:
        valid_shapes = _valid_shapes(valid_shapes, query.shape[0], shapes, query.device)

    if not isinstance(dropout_p, (float, int)):
        raise TypeError(f"dropout_p must be a number, got {_kind(dropout_p)}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if scale is None:
        scale = query.shape[3] ** -0.5
    elif not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a number or None, got {_kind(scale)}")
    elif not abs(scale) < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if mass_tolerance is None:
        mass_tolerance = MASS_TOLERANCES[query.dtype]
    elif not isinstance(mass_tolerance, (float, int)):
        raise TypeError(f"mass_tolerance must be a number or None, got {_kind(mass_tolerance)}")
    elif not 0.0 <= mass_tolerance < 1.0:
        raise ValueError(f"mass_tolerance must be in [0, 1), got {mass_tolerance}")
    return (
        query, key, value, center, precision, scale_weights, shapes, valid_shapes, key_padding_mask,
        dropout_p, scale, mass_tolerance,
    )  # fmt: skip


def _check_kinds(
    query: Tensor, key: Tensor, value: Tensor, center: Tensor, precision: Tensor, scale_weights: Tensor | None
) -> None:
    """Types, dtypes and devices."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {_kind(query)}")
    dtype, device = query.dtype, query.device
    if dtype not in FLOATING_DTYPES:
        raise TypeError(f"query must be one of {', '.join(map(str, FLOATING_DTYPES))}, got {dtype}")
    others = [key, value, center, precision]
    if scale_weights is not None:
        others.append(scale_weights)
    for i, tensor in enumerate(others):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OTHER_TENSORS[i]} must be a tensor, got {_kind(tensor)}")
        if tensor.dtype != dtype and (i < 2 or tensor.dtype != torch.float32):
            expected = f"{dtype} as query" if i < 2 else f"torch.float32 or {dtype} as query"
            raise TypeError(f"{OTHER_TENSORS[i]} must be {expected}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{OTHER_TENSORS[i]} must be on {device} as query, got {tensor.device}")


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    shapes: reference.SpatialShapes,
) -> None:
    if query.dim() != 4:
        raise ValueError(f"query must be [B, H, N, D], got {_shape(query)}")
    B, H, N, D = query.shape
    S, T = len(shapes), sum([height * width for height, width in shapes])
    if H < 1:
        raise ValueError(f"query must have at least one head, got {_shape(query)}")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"query must have head_dim D from 1 to {MAX_HEAD_DIM}, got {_shape(query)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != (B, H, T, D):
            expected = f"[B={B}, H={H}, T={T}, D={D}] for spatial_shapes {shapes}"
            raise ValueError(f"{name} must be {expected}, got {_shape(tensor)}")
    wanted, shared = (B, H, N, S, 2), (B, 1, N, S, 2)
    for name, tensor in (("center", center), ("precision", precision)):
        if tensor.shape != wanted and tensor.shape != shared:
            raise ValueError(f"{name} must be [B={B}, H={H} or 1, N={N}, S={S}, 2], got {_shape(tensor)}")
    if scale_weights is not None and scale_weights.shape not in (wanted[:4], shared[:4]):
        expected = f"[B={B}, H={H} or 1, N={N}, S={S}]"
        raise ValueError(f"scale_weights must be {expected}, got {_shape(scale_weights)}")


def _grids(spatial_shapes: Sequence[Sequence[int]]) -> reference.SpatialShapes:
    if not isinstance(spatial_shapes, (list, tuple)):
        raise TypeError(f"spatial_shapes must be a list of (height, width), got {_kind(spatial_shapes)}")
    if not 1 <= len(spatial_shapes) <= MAX_SCALES:
        raise ValueError(f"spatial_shapes must have 1 to {MAX_SCALES} scales, got {len(spatial_shapes)}")
    for shape in spatial_shapes:
        if not isinstance(shape, (list, tuple)) or len(shape) != 2:
            raise TypeError(f"spatial_shapes must be a list of (height, width), got {spatial_shapes!r}")
        for size in shape:
            # Under symbolic tracing a size may be a torch.SymInt.
            if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
                raise TypeError(f"spatial_shapes must hold Python ints, got {_kind(size)} in {spatial_shapes!r}")
            if size < 1:
                raise ValueError(f"spatial_shapes must be at least 1 × 1, got {spatial_shapes!r}")
    return tuple([(height, width) for height, width in spatial_shapes])


def _valid_shapes(
    valid_shapes: Tensor | Sequence[Sequence[Sequence[int]]],
    batch: int,
    shapes: reference.SpatialShapes,
    device: torch.device,
) -> Tensor:
    """As a tensor [B, S, 2]; the range is checked where that costs no synchronisation."""

    def wanted() -> str:
        # Only for an error: formatting a symbolic size while tracing would fix it.
        return f"[B={batch}, S={len(shapes)}, 2]"

    if isinstance(valid_shapes, Tensor):
        if valid_shapes.dtype not in INTEGER_DTYPES:
            raise TypeError(f"valid_shapes must be an integer tensor, got {valid_shapes.dtype}")
        if valid_shapes.device != device:
            raise ValueError(f"valid_shapes must be on {device} as query, got {valid_shapes.device}")
        tensor = valid_shapes
    else:
        try:
            tensor = torch.tensor(valid_shapes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"valid_shapes must be a nested list {wanted()} of ints, got {valid_shapes!r}") from error
        if tensor.dtype != torch.int64:
            raise TypeError(f"valid_shapes must be a nested list {wanted()} of ints, got {valid_shapes!r}")
    if tensor.shape != (batch, len(shapes), 2):
        raise ValueError(f"valid_shapes must be {wanted()}, got {_shape(tensor)}")
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        for b, image in enumerate(tensor.tolist()):
            for s, (size, grid) in enumerate(zip(image, shapes, strict=True)):
                if not (0 <= size[0] <= grid[0] and 0 <= size[1] <= grid[1]):
                    raise ValueError(f"valid_shapes[{b}, {s}] must be from (0, 0) to {grid}, got {tuple(size)}")
    return tensor.to(device, torch.int64)


def _query_indices(queries: Tensor | Sequence[int], count: int, device: torch.device) -> Tensor:
    indices = queries if isinstance(queries, Tensor) else torch.tensor(queries, dtype=torch.int64)
    if indices.dtype not in INTEGER_DTYPES:
        raise TypeError(f"queries must be integer indices, got {indices.dtype}")
    if indices.dim() != 1:
        raise ValueError(f"queries must be a list of indices or a tensor [n], got {_shape(indices)}")
    for index in indices.tolist():
        if not -count <= index < count:
            raise IndexError(f"queries must be indices from {-count} to {count - 1}, got {index}")
    return indices.to(device, torch.int64)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _kind(thing: object) -> str:
    return f"{thing.dtype} tensor" if isinstance(thing, Tensor) else type(thing).__name__
