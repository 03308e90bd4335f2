"""Where each query looks, from the raw outputs of the prior's linear layers: one launch, and one for the gradients.

For a query, with head h, scale s and axis a (x or y), of reference logits r [a], head offset o [s, h, a], object scale
u [s, h, a] (or [s, h], or 1) and selection logits t [s]:

    center    = sigmoid(r) · extent + o          extent [s, a]: columns or rows of the scale that are image, in cells
    precision = factor · u²                      or, in the paper's geometry, factor / max(u², floor); factor [s]
    weights   = softmax_s(t)

    dr = sigmoid'(r) Σ_{s,h} extent · dcenter    do = dcenter
    du = dprecision · precision'(u)              dt = weights · (dweights - Σ_s weights · dweights)

A program owns BLOCK_N queries, each with all of its pairs (s, h), which lie in the order of the linear layers' outputs:
every sum is made by one program in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smca_kernels.backends.devices import capability, is_nvidia
from smca_kernels.backends.transforms import (
    folding_rule,
    in_transform,
    is_traced,
    needs_operator,
    register_derivatives,
)
from smca_kernels.backends.triton import hopper
from smca_kernels.backends.triton.channels import INTERPRETED, grid_of_scale
from smca_kernels.backends.triton.launch import device_of, last_axis_contiguous, packed_grids
from smca_kernels.backends.triton.launcher import launcher
from smca_kernels.backends.triton.operator import DTYPES
from smca_kernels.inputs import SpatialShapes, shapes_of_sides

# Nothing that changes with the sizes of a batch may start a compilation. What a module is made with may.
UNSPECIALIZED = [
    *("r_b", "r_n", "o_b", "o_n", "u_b", "u_n", "t_b", "t_n", "rows", "queries"),
    *("g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"),
]


@triton.jit
def tile_of_program(rows, queries, HEADS: tl.constexpr, SCALES: tl.constexpr, PAIRS: tl.constexpr,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    """Image, query and existence [BLOCK_N]; scale, pair and axis, which broadcast to [1, PAIRS, 2]; mask of all."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    row = tl.minimum(row, rows - 1)
    pair, a = tl.arange(0, PAIRS)[None, :, None], tl.arange(0, 2)[None, None, :]
    mask = exists[:, None, None] & (pair < SCALES * HEADS) & (a < 2)
    scale = tl.minimum(pair // HEADS, SCALES - 1)
    return (row // queries).to(tl.int64), (row % queries).to(tl.int64), exists, scale, pair, a, mask


@triton.jit
def of_scale(s, VALUES: tl.constexpr, SCALES: tl.constexpr):
    """VALUES[s] in fp32."""
    value = tl.full(s.shape, VALUES[0], tl.float32)
    for i in tl.static_range(1, SCALES):
        value = tl.where(s == i, VALUES[i], value)
    return value


@triton.jit
def extent_of_scale(image_sizes, valid_shapes, b, s, a, g0, g1, g2, g3, g4, g5, g6, g7, STRIDES: tl.constexpr,
                    SCALES: tl.constexpr):  # fmt: skip
    """Columns (a = 0) or rows (a = 1) of scale s that are image, in cells; b, s and a broadcast."""
    height, width = grid_of_scale(s, g0, g1, g2, g3, g4, g5, g6, g7)
    side = tl.where(a == 0, width, height)
    if image_sizes is not None:
        pixels = tl.load(image_sizes + b * 2 + 1 - a).to(tl.float32)
        return tl.div_rn(pixels, of_scale(s, STRIDES, SCALES))
    elif valid_shapes is not None:
        valid = tl.load(valid_shapes + (b * SCALES + s) * 2 + 1 - a).to(tl.int32)
        return tl.minimum(tl.maximum(valid, 0), side).to(tl.float32)
    else:
        return side.to(tl.float32)


@triton.jit
def sigmoid(x):
    """sigmoid(x) and its derivative; with e ≤ 1, neither overflows or cancels."""
    e = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, e), 1.0 + e), tl.div_rn(e, (1.0 + e) * (1.0 + e))


@triton.jit
def precision_of(u, factor, FLOOR: tl.constexpr):
    """The precision of object scale u, and its derivative; FLOOR None: the official geometry."""
    if FLOOR is None:
        return factor * (u * u), 2.0 * factor * u
    else:
        squared = tl.where(u * u < FLOOR, FLOOR, u * u)  # keeps a NaN
        p = tl.div_rn(factor, squared)
        return p, tl.where(u * u < FLOOR, 0.0, tl.div_rn(-2.0 * p * u, squared))


@triton.jit
def weights_of(rows, SCALES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Softmax of the selection logits [BLOCK_N, BLOCK_S] whose rows start at `rows`; 0 beyond SCALES."""
    s = tl.arange(0, BLOCK_S)[None, :]
    t = tl.load(rows[:, None] + s, mask=s < SCALES, other=float("-inf")).to(tl.float32)
    e = tl.exp(t - tl.max(t, 1)[:, None])
    return tl.div_rn(e, tl.sum(e, 1)[:, None])


@triton.jit
def load_or_zero(pointer, at, mask):
    if pointer is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prior_kernel(
    logits,  # [B, N, 2]: r
    offset,  # [B, N, S · H · 2]: o, or None
    object_scale,  # [B, N, S · H · AXES]: u, or None
    selection,  # [B, N, S]: t, or None
    image_sizes,  # [B, 2] contiguous, (height, width) in pixels, or None
    valid_shapes,  # [B, S, 2] contiguous, (height, width) in cells, or None
    center,  # [B, H, N, S, 2], as all that follow contiguous and in fp32
    precision,  # [B, H, N, S, 2]
    scale_weights,  # [B, 1, N, S], or None
    wide_logits,  # [B, N, 2]: r in fp32, or None
    r_b, r_n, o_b, o_n, u_b, u_n, t_b, t_n,  # strides
    rows, queries,  # B · N, N
    g0, g1, g2, g3, g4, g5, g6, g7,  # height << 32 | width of each scale
    STRIDES: tl.constexpr, FACTORS: tl.constexpr, FLOOR: tl.constexpr,  # None: the official geometry
    HEADS: tl.constexpr, SCALES: tl.constexpr, AXES: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    image, query, exists, s, pair, a, mask = tile_of_program(rows, queries, HEADS, SCALES, PAIRS, BLOCK_N)
    b, n = image[:, None, None], query[:, None, None]
    at = (((b * HEADS + pair % HEADS) * queries + n) * SCALES + s) * 2 + a

    r = tl.load(logits + b * r_b + n * r_n + a).to(tl.float32)
    if wide_logits is not None:
        tl.store(wide_logits + (b * queries + n) * 2 + a, r, mask=exists[:, None, None])
    share, _ = sigmoid(r)
    c = share * extent_of_scale(image_sizes, valid_shapes, b, s, a, g0, g1, g2, g3, g4, g5, g6, g7, STRIDES, SCALES)
    if offset is not None:
        c += tl.load(offset + b * o_b + n * o_n + pair * 2 + a, mask=mask, other=0.0).to(tl.float32)
    tl.store(center + at, c, mask=mask)

    p = of_scale(s, FACTORS, SCALES)
    if AXES > 0:
        at_u = pair * 2 + a if AXES == 2 else pair
        u = tl.load(object_scale + b * u_b + n * u_n + at_u, mask=pair < SCALES * HEADS, other=1.0).to(tl.float32)
        p = precision_of(u, p, FLOOR)[0]
    tl.store(precision + at, tl.broadcast_to(p, mask.shape), mask=mask)

    if selection is not None:
        weights = weights_of(selection + image * t_b + query * t_n, SCALES, BLOCK_S)
        i = tl.arange(0, BLOCK_S)[None, :]
        at = (image * queries + query)[:, None] * SCALES + i
        tl.store(scale_weights + at, weights, mask=exists[:, None] & (i < SCALES))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prior_backward_kernel(
    logits, offset, object_scale, selection, image_sizes, valid_shapes,
    grad_center,  # [B, H, N, S, 2]; this and the next three contiguous and in fp32, or None for zeros
    grad_precision,  # [B, H, N, S, 2]
    grad_weights,  # [B, 1, N, S]
    grad_wide,  # [B, N, 2]
    grad_logits,  # contiguous in the shapes and dtypes of what they belong to; None where that is None
    grad_offset,
    grad_object_scale,
    grad_selection,
    r_b, r_n, o_b, o_n, u_b, u_n, t_b, t_n,
    rows, queries,
    g0, g1, g2, g3, g4, g5, g6, g7,
    STRIDES: tl.constexpr, FACTORS: tl.constexpr, FLOOR: tl.constexpr,
    HEADS: tl.constexpr, SCALES: tl.constexpr, AXES: tl.constexpr,
    BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    image, query, exists, s, pair, a, mask = tile_of_program(rows, queries, HEADS, SCALES, PAIRS, BLOCK_N)
    b, n = image[:, None, None], query[:, None, None]
    at = (((b * HEADS + pair % HEADS) * queries + n) * SCALES + s) * 2 + a
    at_row = (b * queries + n) * (SCALES * HEADS)

    dc = load_or_zero(grad_center, at, mask)
    if grad_offset is not None:
        tl.store(grad_offset + (at_row + pair) * 2 + a, dc.to(grad_offset.dtype.element_ty), mask=mask)
    dc *= extent_of_scale(image_sizes, valid_shapes, b, s, a, g0, g1, g2, g3, g4, g5, g6, g7, STRIDES, SCALES)
    # [BLOCK_N, 2]
    xy = tl.arange(0, 2)[None, :]
    r = tl.load(logits + image[:, None] * r_b + query[:, None] * r_n + xy).to(tl.float32)
    at_xy = (image * queries + query)[:, None] * 2 + xy
    dr = tl.sum(dc, 1) * sigmoid(r)[1] + load_or_zero(grad_wide, at_xy, exists[:, None])
    tl.store(grad_logits + at_xy, dr.to(grad_logits.dtype.element_ty), mask=exists[:, None])

    if AXES > 0:
        at_u = pair * 2 + a if AXES == 2 else pair
        u = tl.load(object_scale + b * u_b + n * u_n + at_u, mask=pair < SCALES * HEADS, other=1.0).to(tl.float32)
        du = load_or_zero(grad_precision, at, mask) * precision_of(u, of_scale(s, FACTORS, SCALES), FLOOR)[1]
        if AXES == 2:
            tl.store(grad_object_scale + at_row * 2 + at_u, du.to(grad_object_scale.dtype.element_ty), mask=mask)
        else:
            du = tl.sum(du, 2)[:, :, None].to(grad_object_scale.dtype.element_ty)
            tl.store(grad_object_scale + at_row + pair, du, mask=exists[:, None, None] & (pair < SCALES * HEADS))

    if selection is not None:
        weights = weights_of(selection + image * t_b + query * t_n, SCALES, BLOCK_S)
        i = tl.arange(0, BLOCK_S)[None, :]
        at = (image * queries + query)[:, None] * SCALES + i
        mask = exists[:, None] & (i < SCALES)
        dw = load_or_zero(grad_weights, at, mask)
        dt = weights * (dw - tl.sum(weights * dw, 1)[:, None])
        tl.store(grad_selection + at, dt.to(grad_selection.dtype.element_ty), mask=mask)


def constants(
    axes: int, strides: Sequence[float], factors: Sequence[float], floor: float | None, heads: int
) -> dict[str, Any]:
    """The compile-time arguments of both kernels: they depend on how a module was made, and on nothing else."""
    pairs = triton.next_power_of_2(len(strides) * heads)
    return {
        "STRIDES": tuple(strides), "FACTORS": tuple(factors), "FLOOR": floor,
        "HEADS": heads, "SCALES": len(strides), "AXES": axes,
        # 512 elements a program: the 300 queries of one image then occupy many multiprocessors.
        "BLOCK_N": min(64, max(1, 256 // pairs)), "PAIRS": pairs, "BLOCK_S": triton.next_power_of_2(len(strides)),
    }  # fmt: skip


def launch(kernel: Any, inputs: Sequence[Any], others: Sequence[Tensor | None]) -> None:
    """Launch a kernel on `inputs`, as in the schema below; `others` are the tensors between those and the strides."""
    *tensors, spatial_shapes, strides, factors, floor, heads = inputs
    raw: list[Any] = [None if t is None else last_axis_contiguous(t) for t in tensors[:4]]
    sizes = [None if t is None else t.contiguous() for t in tensors[4:]]
    outer = [stride for t in raw for stride in ((0, 0) if t is None else t.stride()[:2])]
    batch, queries, _ = raw[0].shape
    axes = 0 if raw[2] is None else raw[2].shape[2] // (len(strides) * heads)
    compile_time = constants(axes, strides, factors, floor, heads)
    # The backward sums products over lanes. Fused, each lane would add its own product unrounded to the rounded ones of
    # others: the lanes' sums would differ in the last bit, and which of them is stored would be left to chance.
    is_fused = kernel is prior_kernel
    with device_of(raw[0]):
        launcher(kernel)[(-(-batch * queries // compile_time["BLOCK_N"]),)](
            *raw, *sizes, *others, *outer, batch * queries, queries, *packed_grids(shapes_of_sides(spatial_shapes)),
            **compile_time, enable_fp_fusion=is_fused,
        )  # fmt: skip


# floor None: the official geometry. heads: those with a map of their own, 1 if it is shared.
INPUTS = (
    "Tensor logits, Tensor? offset, Tensor? object_scale, Tensor? selection, Tensor? image_sizes, "
    "Tensor? valid_shapes, SymInt[] spatial_shapes, float[] strides, float[] factors, float? floor, int heads"
)
UPSTREAM = "Tensor? grad_center, Tensor? grad_precision, Tensor? grad_weights, Tensor? grad_wide"
FOUR_TENSORS = "(Tensor, Tensor, Tensor, Tensor)"


def _empty_results(
    logits, offset, object_scale, selection, image_sizes, valid_shapes, spatial_shapes, strides, *others
):
    """Memory for center, precision, scale_weights and fp32 logits; none for the last two where they aren't computed."""
    (batch, queries, _), scales, heads = logits.shape, len(strides), others[-1]
    center = logits.new_empty(batch, heads, queries, scales, 2, dtype=torch.float32)
    weights = (0,) if selection is None else (batch, 1, queries, scales)
    wide = (0,) if logits.dtype == torch.float32 else logits.shape
    return center, torch.empty_like(center), center.new_empty(weights), center.new_empty(wide)


def _empty_gradients(*inputs):
    """Memory for the gradients of logits, offset, object_scale and selection; none where there is no such input."""
    return tuple(inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:4])


def _launch_forward(*inputs):
    results = _empty_results(*inputs)
    launch(prior_kernel, inputs, [t if t.numel() else None for t in results])
    return results


def _launch_backward(*arguments):
    inputs, upstream = arguments[:-4], arguments[-4:]
    gradients = _empty_gradients(*inputs)
    others = [None if g is None or not g.numel() else g.contiguous() for g in upstream]
    launch(prior_backward_kernel, inputs, others + [t if t.numel() else None for t in gradients])
    return gradients


@torch.library.custom_op("smca_kernels::prior", mutates_args=(), schema=f"({INPUTS}) -> {FOUR_TENSORS}")
def _prior(*inputs):
    return _launch_forward(*inputs)


@torch.library.custom_op(
    "smca_kernels::prior_backward", mutates_args=(), schema=f"({INPUTS}, {UPSTREAM}) -> {FOUR_TENSORS}"
)
def _backward(*arguments):
    return _launch_backward(*arguments)


_prior.register_fake(_empty_results)
_backward.register_fake(_empty_gradients)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.configuration = inputs[6:]
    ctx.set_materialize_grads(False)  # what nothing used needs no tensor of zeros


def _differentiate(ctx, *upstream, call=None):
    call = call or (_transformable_backward if in_transform() else _backward)
    gradients = call(*ctx.saved_tensors, *ctx.configuration, *upstream)
    wanted = ctx.needs_input_grad[:4]
    return *(g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)), *(None,) * 7


def _backward_rule(call):
    """Make vmap's rule for a call with its arguments in another order: first all tensors."""

    def reordered(*arguments):
        return call(*arguments[:6], *arguments[10:], *arguments[6:10])

    rule = folding_rule(reordered, tensors=10)
    return lambda info, dims, *arguments: rule(
        info, (*dims[:6], *dims[-4:], *dims[6:-4]), *arguments[:6], *arguments[-4:], *arguments[6:-4]
    )


_transformable_prior, _transformable_backward = register_derivatives(
    _prior,
    _backward,
    rules=(partial(folding_rule, tensors=6), _backward_rule),
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
    name="SpatialPrior: backend 'triton'",
)


class _EagerPrior(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than the launch."""

    @staticmethod
    def forward(ctx, *inputs):
        results = _launch_forward(*inputs)
        _save_for_backward(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx, *upstream):
        return _differentiate(ctx, *upstream, call=_backward if needs_operator(upstream) else _launch_backward)


def prior(
    logits: Tensor,  # [B, N, 2]
    offset: Tensor | None,  # [B, N, S · H · 2]
    object_scale: Tensor | None,  # [B, N, S · H · AXES]
    selection: Tensor | None,  # [B, N, S]
    image_sizes: Tensor | None,  # [B, 2] in pixels
    valid_shapes: Tensor | None,  # [B, S, 2] in cells; without both, the whole grids
    spatial_shapes: SpatialShapes,
    *configuration: Any,  # strides, factors, floor, heads: as in the schema
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Center and precision [B, H, N, S, 2], scale weights [B, 1, N, S] and logits, all in fp32."""
    flat = [side for shape in spatial_shapes for side in shape]
    call = _prior if is_traced(logits) else _transformable_prior if in_transform() else _EagerPrior.apply
    center, precision, weights, wide = call(
        logits, offset, object_scale, selection, image_sizes, valid_shapes, flat, *configuration
    )
    return center, precision, None if selection is None else weights, logits if logits.dtype == torch.float32 else wide


def unsupported(raw: Sequence[Tensor], image_sizes: Tensor | None) -> str | None:
    """Why the kernels can't serve these projections, of which the first is the logits, or None if they can."""
    logits = raw[0]
    if not (is_nvidia(logits.device) or INTERPRETED):
        where = f"features is on {logits.device}"
        return f"needs an NVIDIA GPU, or TRITON_INTERPRET=1 set before Triton is imported; {where}"
    if logits.shape[0] == 0 or logits.shape[1] == 0:
        return f"needs at least one image and one query; reference_logits is {list(logits.shape)}"
    for dtype in [t.dtype for t in raw]:
        if dtype not in DTYPES:
            return f"serves float16, bfloat16 and float32; the prior's projections are {dtype}"
        if dtype == torch.bfloat16 and logits.is_cuda and capability(logits.device) < (8, 0):
            return "needs compute capability 8.0 for bfloat16"
    if image_sizes is not None and image_sizes.requires_grad:
        return "has no gradient to image_sizes"
    return hopper.unsupported(logits.device)
