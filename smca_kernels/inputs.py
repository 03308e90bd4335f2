"""The operator's arguments as one object, checked once and then taken by every backend and tool.

`AttentionInputs.checked` refuses wrong arguments before anything runs, with a `ValueError` or `TypeError` that has the
argument's name, what was expected and what came.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_HEAD_DIM = 128
MAX_SCALES = 8

# The part of a query's softmax over a scale that may be left out unless a caller says otherwise: for float32 its unit
# roundoff, for half precision an eighth of that (docs/locality.md).
MASS_TOLERANCES = {torch.float32: 2.0**-24, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-11, torch.float64: 0.0}

SpatialShapes: TypeAlias = tuple[tuple[int, int], ...]  # S × (height, width)
ValidShapes: TypeAlias = Tensor | Sequence[Sequence[Sequence[int]]]  # [B, S, 2]

# Tensors that can have a gradient, in the order of `AttentionInputs.flat`.
DIFFERENTIABLE = ("query", "key", "value", "center", "precision", "scale_weights")
# `AttentionInputs.flat` in the language of torch.library.
SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor center, Tensor precision, Tensor? scale_weights, "
    "Tensor? valid_shapes, Tensor? key_padding_mask, SymInt[] spatial_shapes, "
    "float dropout_p, float scale, float mass_tolerance"
)


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of `smca_kernels.smca_attention`, which explains them; make one with `checked`."""

    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, H, T, D]
    value: Tensor  # [B, H, T, D_v]; D_v is D but for hosts such as Conditional DETR
    center: Tensor  # [B, H or 1, N, S, 2]
    precision: Tensor  # [B, H or 1, N, S, 2]
    scale_weights: Tensor | None  # [B, H or 1, N, S]
    valid_shapes: Tensor | None  # [B, S, 2] int64, on query's device
    key_padding_mask: Tensor | None  # [B, T] bool
    spatial_shapes: SpatialShapes
    dropout_p: float
    scale: float
    mass_tolerance: float

    @classmethod
    def checked(
        cls,
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
    ) -> AttentionInputs:
        """Check the arguments of `smca_attention` and fill in its defaults; sizes may be symbolic while tracing.

        Raises:
            TypeError, ValueError: for an argument of wrong type, dtype, device, shape or range.
        """
        _check_kinds(query, key, value, center, precision, scale_weights)
        shapes = check_spatial_shapes(spatial_shapes)
        _check_shapes(query, key, value, center, precision, scale_weights, shapes)
        if key_padding_mask is not None:
            if valid_shapes is not None:
                raise ValueError("valid_shapes and key_padding_mask exclude each other, got both")
            check_key_padding_mask(key_padding_mask, query.shape[0], shapes, query.device)
        if valid_shapes is not None:
            valid_shapes = check_valid_shapes(valid_shapes, query.shape[0], shapes, query.device)
        if not is_number(dropout_p):
            raise TypeError(f"dropout_p must be a number, got {kind_of(dropout_p)}")
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
        if scale is None:
            scale = query.shape[3] ** -0.5
        elif not is_number(scale):
            raise TypeError(f"scale must be a number or None, got {kind_of(scale)}")
        elif not abs(scale) <= sys.float_info.max:  # an int may be beyond
            raise ValueError(f"scale must be finite, got {scale}")
        if mass_tolerance is None:
            mass_tolerance = MASS_TOLERANCES[query.dtype]
        elif not is_number(mass_tolerance):
            raise TypeError(f"mass_tolerance must be a number or None, got {kind_of(mass_tolerance)}")
        elif not 0.0 <= mass_tolerance < 1.0:
            raise ValueError(f"mass_tolerance must be in [0, 1), got {mass_tolerance}")
        return cls(
            query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask,
            shapes, dropout_p, scale, mass_tolerance,
        )  # fmt: skip

    def flat(self) -> tuple[Any, ...]:
        """The fields in order, spatial_shapes as a list of sides: what a torch.library operator takes (SCHEMA)."""
        return (
            self.query, self.key, self.value, self.center, self.precision, self.scale_weights,
            self.valid_shapes, self.key_padding_mask, [side for shape in self.spatial_shapes for side in shape],
            self.dropout_p, self.scale, self.mass_tolerance,
        )  # fmt: skip

    @classmethod
    def of_flat(cls, arguments: Sequence[Any]) -> AttentionInputs:
        """Rebuild inputs from what `flat` returned, which is not checked again."""
        tensors, (sides, dropout_p, scale, mass_tolerance) = arguments[:8], arguments[8:]
        query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask = tensors
        return cls(
            query, key, value, center, precision, scale_weights, valid_shapes, key_padding_mask,
            shapes_of_sides(sides), dropout_p, scale, mass_tolerance,
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments with which `smca_attention` is called for these inputs."""
        return {name: getattr(self, name) for name in _ARGUMENTS}

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that can have a gradient, by name; without scale_weights where there are none."""
        tensors = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def keys_per_scale(self) -> list[int]:
        """height · width of every scale."""
        return [height * width for height, width in self.spatial_shapes]

    def detached(self) -> Self:
        """The same values, of which none requires a gradient."""
        tensors: dict[str, Any] = {name: tensor.detach() for name, tensor in self.differentiable().items()}
        return replace(self, **tensors)

    def double(self) -> Self:
        """The same values in float64, as fresh leaves that require gradients."""
        tensors: dict[str, Any] = {
            name: tensor.detach().double().requires_grad_() for name, tensor in self.differentiable().items()
        }
        return replace(self, **tensors)


_ARGUMENTS = tuple(field.name for field in fields(AttentionInputs))


def shapes_of_sides(sides: Sequence[int]) -> SpatialShapes:
    """(height, width) of each scale from a list of all sides, as torch.library operators take them."""
    return tuple(zip(sides[::2], sides[1::2], strict=True))


def _check_kinds(
    query: Tensor, key: Tensor, value: Tensor, center: Tensor, precision: Tensor, scale_weights: Tensor | None
) -> None:
    """Types, dtypes and devices."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {kind_of(query)}")
    dtype, device = query.dtype, query.device
    check_dense("query", query)
    if dtype not in FLOATING_DTYPES:
        raise TypeError(f"query must be one of {', '.join(map(str, FLOATING_DTYPES))}, got {dtype}")
    others = [key, value, center, precision]
    if scale_weights is not None:
        others.append(scale_weights)
    for i, tensor in enumerate(others):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{DIFFERENTIABLE[i + 1]} must be a tensor, got {kind_of(tensor)}")
        check_dense(DIFFERENTIABLE[i + 1], tensor)
        if tensor.dtype != dtype and (i < 2 or tensor.dtype != torch.float32):
            allowed = dict.fromkeys([dtype] if i < 2 else [torch.float32, dtype])  # each once
            expected = " or ".join(map(str, allowed))
            raise TypeError(f"{DIFFERENTIABLE[i + 1]} must be {expected} as query, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{DIFFERENTIABLE[i + 1]} must be on {device} as query, got {tensor.device}")


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    center: Tensor,
    precision: Tensor,
    scale_weights: Tensor | None,
    shapes: SpatialShapes,
) -> None:
    if query.dim() != 4:
        raise ValueError(f"query must be [B, H, N, D], got {shape_of(query)}")
    B, H, N, D = query.shape
    S, T = len(shapes), sum([height * width for height, width in shapes])
    if H < 1:
        raise ValueError(f"query must have at least one head, got {shape_of(query)}")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"query must have head_dim D from 1 to {MAX_HEAD_DIM}, got {shape_of(query)}")
    if key.shape != (B, H, T, D):
        expected = f"[B={B}, H={H}, T={T}, D={D}] for spatial_shapes {shapes}"
        raise ValueError(f"key must be {expected}, got {shape_of(key)}")
    if value.dim() != 4 or value.shape[:3] != (B, H, T) or not 1 <= value.shape[3] <= MAX_HEAD_DIM:
        expected = f"[B={B}, H={H}, T={T}, D_v from 1 to {MAX_HEAD_DIM}] for spatial_shapes {shapes}"
        raise ValueError(f"value must be {expected}, got {shape_of(value)}")
    wanted, shared = (B, H, N, S, 2), (B, 1, N, S, 2)
    for name, tensor in (("center", center), ("precision", precision)):
        if tensor.shape != wanted and tensor.shape != shared:
            raise ValueError(f"{name} must be [B={B}, H={H} or 1, N={N}, S={S}, 2], got {shape_of(tensor)}")
    if scale_weights is not None and scale_weights.shape not in (wanted[:4], shared[:4]):
        expected = f"[B={B}, H={H} or 1, N={N}, S={S}]"
        raise ValueError(f"scale_weights must be {expected}, got {shape_of(scale_weights)}")


def check_spatial_shapes(spatial_shapes: Sequence[Sequence[int]]) -> SpatialShapes:
    """Check the (height, width) of 1 to 8 scales and return them as tuples.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if not isinstance(spatial_shapes, (list, tuple)):
        raise TypeError(f"spatial_shapes must be a list of (height, width), got {kind_of(spatial_shapes)}")
    if not 1 <= len(spatial_shapes) <= MAX_SCALES:
        raise ValueError(f"spatial_shapes must have 1 to {MAX_SCALES} scales, got {len(spatial_shapes)}")
    for shape in spatial_shapes:
        if not isinstance(shape, (list, tuple)) or len(shape) != 2:
            raise TypeError(f"spatial_shapes must be a list of (height, width), got {spatial_shapes!r}")
        for size in shape:
            # Under symbolic tracing a size may be a torch.SymInt.
            if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
                raise TypeError(f"spatial_shapes must hold Python ints, got {kind_of(size)} in {spatial_shapes!r}")
            if size < 1:
                raise ValueError(f"spatial_shapes must be at least 1 × 1, got {spatial_shapes!r}")
    return tuple([(height, width) for height, width in spatial_shapes])


def check_valid_shapes(
    valid_shapes: ValidShapes,
    batch: int,
    shapes: SpatialShapes,
    device: torch.device,
) -> Tensor:
    """Check the valid part of each grid and return it as an int64 tensor [B, S, 2] on the device.

    The range is checked where values can be read without a synchronisation: in plain tensors on the CPU, outside of
    compilers and transforms of torch.func.

    Raises:
        TypeError, ValueError: for another type, dtype, device or shape, and for values outside of the grids.
    """

    def wanted() -> str:
        # Only for an error: formatting a symbolic size while tracing would fix it.
        return f"[B={batch}, S={len(shapes)}, 2]"

    if isinstance(valid_shapes, Tensor):
        if valid_shapes.dtype not in INTEGER_DTYPES:
            raise TypeError(f"valid_shapes must be an integer tensor, got {valid_shapes.dtype}")
        if valid_shapes.device != device:
            raise ValueError(f"valid_shapes must be on {device} as query, got {valid_shapes.device}")
        check_dense("valid_shapes", valid_shapes)
        tensor = valid_shapes
    else:
        try:
            tensor = torch.tensor(valid_shapes, device="cpu")  # whatever the default device
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"valid_shapes must be a nested list {wanted()} of ints, got {valid_shapes!r}") from error
        if tensor.dtype != torch.int64:
            raise TypeError(f"valid_shapes must be a nested list {wanted()} of ints, got {valid_shapes!r}")
    if tensor.shape != (batch, len(shapes), 2):
        raise ValueError(f"valid_shapes must be {wanted()}, got {shape_of(tensor)}")
    has_values = type(tensor) is Tensor and not torch._C._are_functorch_transforms_active()  # a fake one has none
    if tensor.device.type == "cpu" and has_values and not torch.compiler.is_compiling():
        for b, image in enumerate(tensor.tolist()):
            for s, (size, grid) in enumerate(zip(image, shapes, strict=True)):
                if not (0 <= size[0] <= grid[0] and 0 <= size[1] <= grid[1]):
                    raise ValueError(f"valid_shapes[{b}, {s}] must be from (0, 0) to {grid}, got {tuple(size)}")
    return tensor.to(device, torch.int64)


def check_key_padding_mask(key_padding_mask: Tensor, batch: int, shapes: SpatialShapes, device: torch.device) -> None:
    """Check a mask [B, T] of keys to ignore.

    Raises:
        TypeError, ValueError: for another dtype, device or shape.
    """
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be a torch.bool tensor, got {kind_of(key_padding_mask)}")
    if key_padding_mask.device != device:
        raise ValueError(f"key_padding_mask must be on {device} as query, got {key_padding_mask.device}")
    check_dense("key_padding_mask", key_padding_mask)
    T = sum([height * width for height, width in shapes])
    if key_padding_mask.shape != (batch, T):
        raise ValueError(f"key_padding_mask must be [B={batch}, T={T}], got {shape_of(key_padding_mask)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Check that a tensor is neither sparse nor nested.

    Raises:
        TypeError: for one that is.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        raise TypeError(f"{name} must be dense, got {kind}")


def shape_of(tensor: Tensor) -> list[int]:
    """Sizes of a tensor, as messages show them."""
    return list(tensor.shape)


def is_number(value: object) -> bool:
    """Whether an argument is a float or an int, which True is not."""
    return isinstance(value, (float, int)) and not isinstance(value, bool)


def kind_of(value: object) -> str:
    """Type of an argument, as messages name it: a tensor's dtype counts."""
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
