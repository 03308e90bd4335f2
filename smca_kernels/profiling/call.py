"""One recorded call of a backend: run again as it was, or with one of its scales alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from smca_kernels.autocast import autocast_off
from smca_kernels.inputs import AttentionInputs
from smca_kernels.profiling.measure import interleaved_times
from smca_kernels.profiling.rows import CallRow, Row
from smca_kernels.profiling.traffic import bytes_moved

FORWARD, BOTH = "forward", "forward + backward"
WIDTH_QUANTILES = (0.5, 0.9)


@dataclass(frozen=True)
class RecordedCall:
    """A backend's function and what it was called with."""

    backend: str
    function: Callable[[AttentionInputs], Tensor]
    inputs: AttentionInputs  # detached
    wanted: tuple[str, ...]  # names of the tensors that want a gradient

    @classmethod
    def of(cls, backend: str, function: Callable[[AttentionInputs], Tensor], inputs: AttentionInputs) -> RecordedCall:
        """Record a call that is about to be made."""
        tensors = inputs.differentiable() if torch.is_grad_enabled() else {}
        wanted = tuple(name for name, tensor in tensors.items() if tensor.requires_grad)
        return cls(backend, function, inputs.detached(), wanted)

    @property
    def step(self) -> str:
        return BOTH if self.wanted else FORWARD

    def of_scale(self, s: int) -> RecordedCall:
        """The call with one scale alone."""
        inputs = self.inputs
        sizes = inputs.keys_per_scale()
        keys = slice(sum(sizes[:s]), sum(sizes[: s + 1]))
        one = slice(s, s + 1)
        weights, valid_shapes, mask = inputs.scale_weights, inputs.valid_shapes, inputs.key_padding_mask
        # Keys keep their strides; what the kernels would copy to make it contiguous is copied here, unmeasured.
        part = replace(
            inputs,
            key=inputs.key[:, :, keys],
            value=inputs.value[:, :, keys],
            center=inputs.center[..., one, :].contiguous(),
            precision=inputs.precision[..., one, :].contiguous(),
            scale_weights=None if weights is None else weights[..., one].contiguous(),
            spatial_shapes=inputs.spatial_shapes[one],
            valid_shapes=None if valid_shapes is None else valid_shapes[:, one].contiguous(),
            key_padding_mask=None if mask is None else mask[:, keys].contiguous(),
        )
        return replace(self, inputs=part)

    @contextmanager
    def circumstances(self) -> Iterator[None]:
        """As a backend is called: no autocast, gradients if they are wanted; and no random number is used up."""
        device = self.inputs.query.device
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(autocast_off(device.type))
            stack.enter_context(torch.set_grad_enabled(bool(self.wanted)))
            stack.enter_context(torch.random.fork_rng(devices))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

    def run(self) -> None:
        """Forward and, if a gradient is wanted, backward."""
        leaves = {name: getattr(self.inputs, name).detach().requires_grad_() for name in self.wanted}
        out = self.function(replace(self.inputs, **leaves))
        if leaves:
            torch.autograd.grad(out, list(leaves.values()), out.detach())

    def seconds(self, name: str, repeats: int) -> list[float]:
        """Median seconds of the call as it is, then of each scale on its own."""
        # Chrome traces are ASCII.
        calls_to_time = {f"{name}, {self.step}, all scales": self}
        for s, (height, width) in enumerate(self.inputs.spatial_shapes):
            calls_to_time[f"{name}, {self.step}, scale {s + 1} ({height}x{width})"] = self.of_scale(s)

        def labelled(label: str, call: RecordedCall, repeat: int) -> None:
            with record_function(label):
                call.run()

        calls = {label: partial(labelled, label, call) for label, call in calls_to_time.items()}
        seconds = interleaved_times(calls, repeats, self.inputs.query.device, ahead=True)
        return [statistics.median(values) for values in seconds.values()]

    def call_row(self, number: int, seconds: float) -> CallRow:
        dtype = str(self.inputs.query.dtype).removeprefix("torch.")
        batch, heads, queries, head_dim = self.inputs.query.shape
        device, milliseconds = str(self.inputs.query.device), 1e3 * seconds
        return CallRow(
            number, self.backend, dtype, device, self.step, batch, heads, queries, head_dim, milliseconds
        )  # fmt: skip

    def row(self, call: int, scale: int, seconds: float, tiles: int | None, tiles_skipped: int | None) -> Row:
        """The row of a call with one scale; its share is not known yet."""
        ((height, width),) = self.inputs.spatial_shapes
        weights = self.inputs.scale_weights
        sigma_median, sigma_90 = prior_width(self.inputs.precision)
        return Row(
            call=call,
            scale=scale,
            height=height,
            width=width,
            keys=height * width,
            valid_keys=self.valid_keys(),
            tiles=tiles,
            tiles_skipped=tiles_skipped,
            milliseconds=1e3 * seconds,
            share=math.nan,
            bytes_moved=bytes_moved(self.run),
            scale_weight=1.0 if weights is None else float(weights.float().mean()),
            sigma_median=sigma_median,
            sigma_90=sigma_90,
        )

    def valid_sizes(self, s: int) -> list[tuple[int, int]]:
        """(height, width) of each image's part of a grid, as valid_shapes has it."""
        height, width = self.inputs.spatial_shapes[s]
        if self.inputs.valid_shapes is None:
            return [(height, width)] * self.inputs.query.shape[0]
        return [(min(max(h, 0), height), min(max(w, 0), width)) for h, w in self.inputs.valid_shapes[:, s].tolist()]

    def valid_keys(self) -> float:
        """Keys of the only scale that count, as a mean over images."""
        if self.inputs.key_padding_mask is not None:
            return float((~self.inputs.key_padding_mask).sum() / self.inputs.query.shape[0])
        return statistics.fmean(height * width for height, width in self.valid_sizes(0))

    def tiles(self) -> list[tuple[int | None, int | None]]:
        """Tiles of each scale that the forward kernel computes and skips."""
        inputs = self.inputs
        if self.backend != "triton":
            return [(None, None)] * len(inputs.spatial_shapes)
        from smca_kernels.backends.triton import configurations, launch

        batch, heads, queries, head_dim = inputs.query.shape
        arch = configurations.architecture(inputs.query.device)
        chosen = configurations.configuration("forward", arch, inputs.query.dtype, head_dim)
        blocks = heads * -(-queries // chosen.block_n)
        plan = launch.read_plan(inputs)

        def cover(height: int, width: int) -> int:
            return -(-height * width // chosen.keys)

        counts: list[tuple[int | None, int | None]] = []
        for s, shape in enumerate(inputs.spatial_shapes):
            if plan is None:
                computed = blocks * sum(cover(*size) for size in self.valid_sizes(s))
            else:
                windows = plan.windows[..., s, :].flatten(0, -2).tolist()
                computed = sum(cover(y1 - y0, x1 - x0) for x0, y0, x1, y1 in windows)
            counts.append((computed, batch * blocks * cover(*shape) - computed))
        return counts


def is_measurable(inputs: AttentionInputs) -> bool:
    """Whether a call can be run again: its tensors have elements and values, and are none of a vmap's, which ends."""
    tensors = inputs.differentiable().values()
    return inputs.query.numel() > 0 and not any(tensor.is_meta or _is_mapped(tensor) for tensor in tensors)


def _is_mapped(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def prior_width(precision: Tensor) -> tuple[float | None, float | None]:
    """Find the median and 90th percentile of σ = 1 / √(2 p), by nearest rank; None for an infinite one."""
    if not precision.numel():
        return None, None
    ordered = precision.detach().flatten().float().sort(descending=True).values
    ranks = [math.ceil(quantile * ordered.numel()) - 1 for quantile in WIDTH_QUANTILES]
    median, wide = (None if p == 0 else (2 * p) ** -0.5 for p in ordered[ranks].tolist())
    return median, wide
