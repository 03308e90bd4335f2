"""What co-attention costs, scale by scale: `smca_kernels.profile` around any code that calls the operator.

While the block runs, every call of `smca_attention` is noted with the tensors that it got. At its end each call is
repeated as it was, and each of its scales on its own, all in turns; nothing is measured while the code itself runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smca_kernels import attention
from smca_kernels.autocast import autocast_off
from smca_kernels.files import replacing
from smca_kernels.profiling.measure import interleaved_times

FORWARD, BOTH = "forward", "forward + backward"
MOST_CALLS = 100  # their tensors are kept until the end of the block
WIDTH_QUANTILES = (0.5, 0.9)


@dataclass(frozen=True)
class Row:
    """One scale of one call.

    Attributes:
        call: number of the call, from 1.
        scale: number of the scale, from 1.
        height, width: of its grid, in cells.
        keys: height · width.
        valid_keys: keys that count, neither padded nor masked, as a mean over the images of the batch.
        tiles: key tiles that the forward kernel walks, over all images, heads and blocks of queries; None for a
            backend without tiles.
        tiles_skipped: key tiles that it leaves out, because all of their keys are padding or because the prior makes
            them too unlikely for a whole block (mass_tolerance).
        milliseconds: median time of the call with this scale alone.
        share: of the sum of these times over all calls and scales.
        bytes_moved: what the operations of this scale take and give; a fused kernel's tensors count once.
        scale_weight: mean α over images, heads and queries; 1 without scale weights.
        sigma_median, sigma_90: median and 90th percentile of the prior's σ = 1 / √(2 p) in cells, over images, heads,
            queries and both axes; None where the prior is switched off (infinite).
    """

    call: int
    scale: int
    height: int
    width: int
    keys: int
    valid_keys: float
    tiles: int | None
    tiles_skipped: int | None
    milliseconds: float
    share: float
    bytes_moved: int
    scale_weight: float
    sigma_median: float | None
    sigma_90: float | None


@dataclass(frozen=True)
class CallRow:
    """One call with all its scales, as it was made.

    Attributes:
        call: its number, from 1.
        backend, dtype, device: where and how it ran.
        step: "forward", or "forward + backward" where a gradient was wanted.
        batch, heads, queries, head_dim: sizes of its query.
        milliseconds: median time.
    """

    call: int
    backend: str
    dtype: str
    device: str
    step: str
    batch: int
    heads: int
    queries: int
    head_dim: int
    milliseconds: float


class Profile:
    """The calls of a block and, once it has ended, what each scale of them costs."""

    def __init__(self, repeats: int, progress: bool) -> None:
        self._repeats, self._progress = repeats, progress
        self._calls: list[_Call] = []
        self._left_out = 0
        self._measured: tuple[list[CallRow], list[Row]] | None = None

    def rows(self) -> list[Row]:
        """A row for each scale of each call, in order.

        Raises:
            RuntimeError: before the block has ended, or when it made no call.
        """
        return self._results()[1]

    def calls(self) -> list[CallRow]:
        """A row for each call with all its scales.

        Raises:
            RuntimeError: as `rows`.
        """
        return self._results()[0]

    def table(self) -> str:
        """All rows as text.

        Raises:
            RuntimeError: as `rows`.
        """
        return "\n".join(_table(*self._results(), self._repeats, self._left_out))

    def as_dict(self) -> dict[str, Any]:
        """All rows as JSON holds them.

        Raises:
            RuntimeError: as `rows`.
        """
        calls, rows = self._results()
        return {
            "calls": [asdict(call) for call in calls],
            "rows": [asdict(row) for row in rows],
            "repeats": self._repeats,
            "calls_left_out": self._left_out,
        }

    def picture(self, path: Path) -> None:
        """Write or replace a PNG file: a bar of time for each scale of each call.

        Raises:
            RuntimeError: as `rows`.
            ImportError: without matplotlib.
        """
        _draw(*self._results(), path)

    def _results(self) -> tuple[list[CallRow], list[Row]]:
        if self._measured is None:
            raise RuntimeError("the profile's block must have ended without an error before its results are asked for")
        if not self._measured[0]:
            raise RuntimeError(
                "no call of smca_attention was made in the profile's block; replays of CUDA graphs are not seen"
            )
        return self._measured

    def _watch(self, backend: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The backend's function, noting what it is called with."""

        def noted(*inputs: Any) -> Tensor:
            if len(self._calls) == MOST_CALLS:
                self._left_out += 1
                return function(*inputs)
            self._calls.append(_Call.of(backend, function, inputs))
            with record_function(f"co-attention {len(self._calls)}"):
                return function(*inputs)

        return noted

    def _measure(self) -> None:
        calls, rows = [], []
        for number, call in enumerate(self._calls, 1):
            if self._progress:
                print(f"co-attention {number} of {len(self._calls)} …", file=sys.stderr, flush=True)
            with call.circumstances():
                seconds = call.seconds(f"co-attention {number}", self._repeats)
                tiles = call.tiles()
                scales = [call.of_scale(s) for s in range(len(call.spatial_shapes))]
                rows += [scale.row(number, s, seconds[s], *tiles[s - 1]) for s, scale in enumerate(scales, 1)]
            calls.append(call.call_row(number, seconds[0]))
        total = sum(row.milliseconds for row in rows)
        self._measured = calls, [replace(row, share=row.milliseconds / total) for row in rows]
        self._calls.clear()


@contextmanager
def profile(repeats: int = 10, *, progress: bool = False) -> Iterator[Profile]:
    """Measure every call of `smca_attention` in a block of code, scale by scale.

        with smca_kernels.profile() as profile:
            model(images)
        print(profile.table())

    Where gradients were recorded for a call, its backward is measured as well, whether the block ran it or not. The
    tensors of up to 100 calls are kept until the end of the block, then measured, unless the block raised: put one
    step into it. What torch.compile made runs eagerly meanwhile. Random numbers drawn after the block are those drawn
    without it.

    Args:
        repeats: how often each call and each scale is measured; the median counts.
        progress: tell on stderr which call is being measured.

    Raises:
        ValueError: when repeats is less than 1.
        RuntimeError: inside another profile's block.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if attention.watch is not None:
        raise RuntimeError("profile() must not be used inside another profile's block")
    recorded = Profile(repeats, progress)
    # Importing what compiles takes seconds, and nothing is compiled where nobody imported it.
    is_compiler_there = "torch._dynamo" in sys.modules
    stance: Any = torch.compiler.set_stance("force_eager") if is_compiler_there else nullcontext()
    with stance:
        attention.watch = recorded._watch
        try:
            yield recorded
        finally:
            attention.watch = None
    recorded._measure()


# ------------------------------------------------------------------------------------------------------------- one call


@dataclass(frozen=True)
class _Call:
    backend: str
    function: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]  # query, key, value, center, precision, scale_weights
    wanted: tuple[bool, ...]  # which of them want a gradient
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_shapes: Tensor | None
    key_padding_mask: Tensor | None
    dropout_p: float
    scale: float
    mass_tolerance: float

    @classmethod
    def of(cls, backend: str, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> _Call:
        tensors, rest = inputs[:6], inputs[6:]
        recording = torch.is_grad_enabled()
        wanted = tuple(recording and tensor is not None and tensor.requires_grad for tensor in tensors)
        return cls(backend, function, tuple(None if t is None else t.detach() for t in tensors), wanted, *rest)

    @property
    def query(self) -> Tensor:
        query = self.tensors[0]
        assert query is not None
        return query

    @property
    def step(self) -> str:
        return BOTH if any(self.wanted) else FORWARD

    def of_scale(self, s: int) -> _Call:
        """The call with one scale alone."""
        sizes = [height * width for height, width in self.spatial_shapes]
        start = sum(sizes[:s])
        keys = slice(start, start + sizes[s])
        query, key, value, center, precision, weights = self.tensors
        assert key is not None
        assert value is not None
        assert center is not None
        assert precision is not None

        # Keys keep their strides; what the kernels would copy to make it contiguous is copied here, unmeasured.
        def part(tensor: Tensor | None, *index: Any) -> Tensor | None:
            return None if tensor is None else tensor[index].contiguous()

        one = slice(s, s + 1)
        return replace(
            self,
            tensors=(
                query,
                key[:, :, keys],
                value[:, :, keys],
                part(center, ..., one, slice(None)),
                part(precision, ..., one, slice(None)),
                part(weights, ..., one),
            ),
            spatial_shapes=(self.spatial_shapes[s],),
            valid_shapes=part(self.valid_shapes, slice(None), one),
            key_padding_mask=part(self.key_padding_mask, slice(None), keys),
        )

    @contextmanager
    def circumstances(self) -> Iterator[None]:
        """As a backend is called: no autocast, gradients if they are wanted; and no random number is used up."""
        device = self.query.device
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(autocast_off(device.type))
            stack.enter_context(torch.set_grad_enabled(any(self.wanted)))
            stack.enter_context(torch.random.fork_rng(devices))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield

    def run(self) -> None:
        """Forward and, if a gradient is wanted, backward."""
        tensors = [
            tensor.detach().requires_grad_() if wanted and tensor is not None else tensor
            for tensor, wanted in zip(self.tensors, self.wanted, strict=True)
        ]
        masks = self.spatial_shapes, self.valid_shapes, self.key_padding_mask
        out = self.function(*tensors, *masks, self.dropout_p, self.scale, self.mass_tolerance)
        leaves = [tensor for tensor, wanted in zip(tensors, self.wanted, strict=True) if wanted and tensor is not None]
        if leaves:
            torch.autograd.grad(out, leaves, out.detach())

    def seconds(self, name: str, repeats: int) -> list[float]:
        """Median seconds of the call as it is, then of each scale on its own."""
        # Chrome traces are ASCII.
        subjects = {f"{name}, {self.step}, all scales": self}
        for s, (height, width) in enumerate(self.spatial_shapes):
            subjects[f"{name}, {self.step}, scale {s + 1} ({height}x{width})"] = self.of_scale(s)

        def labelled(label: str, call: _Call, repeat: int) -> None:
            with record_function(label):
                call.run()

        calls = {label: partial(labelled, label, call) for label, call in subjects.items()}
        seconds = interleaved_times(calls, repeats, self.query.device, ahead=True)
        return [statistics.median(values) for values in seconds.values()]

    def call_row(self, number: int, seconds: float) -> CallRow:
        dtype = str(self.query.dtype).removeprefix("torch.")
        batch, heads, queries, head_dim = self.query.shape
        device, milliseconds = str(self.query.device), 1e3 * seconds
        return CallRow(
            number, self.backend, dtype, device, self.step, batch, heads, queries, head_dim, milliseconds
        )  # fmt: skip

    def row(self, call: int, scale: int, seconds: float, tiles: int | None, tiles_skipped: int | None) -> Row:
        """Of a call with one scale; its share is not known yet."""
        ((height, width),) = self.spatial_shapes
        precision, weights = self.tensors[4:]
        assert precision is not None
        sigma_median, sigma_90 = prior_width(precision)
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
        height, width = self.spatial_shapes[s]
        if self.valid_shapes is None:
            return [(height, width)] * self.query.shape[0]
        return [(min(max(h, 0), height), min(max(w, 0), width)) for h, w in self.valid_shapes[:, s].tolist()]

    def valid_keys(self) -> float:
        """Of the only scale."""
        if self.key_padding_mask is not None:
            return float((~self.key_padding_mask).sum() / self.query.shape[0])
        return statistics.fmean(height * width for height, width in self.valid_sizes(0))

    def tiles(self) -> list[tuple[int | None, int | None]]:
        """Of each scale, the tiles that the forward kernel computes and skips."""
        if self.backend != "triton":
            return [(None, None)] * len(self.spatial_shapes)
        from smca_kernels.backends.triton import launch, operator

        query, key, _, center, precision, _ = self.tensors
        assert query is not None
        assert key is not None
        assert center is not None
        assert precision is not None
        batch, heads, queries, head_dim = query.shape
        chosen = launch.configuration("forward", launch.architecture(query.device), query.dtype, head_dim)
        each = heads * -(-queries // chosen.block_n)
        plan = operator.plan_of(
            query, key, center, precision, self.spatial_shapes, self.valid_shapes, self.key_padding_mask,
            self.scale, self.mass_tolerance,
        )  # fmt: skip

        def cover(height: int, width: int) -> int:
            return -(-height // chosen.tile_h) * -(-width // chosen.tile_w)

        counts: list[tuple[int | None, int | None]] = []
        for s, shape in enumerate(self.spatial_shapes):
            if plan is None:
                walked = each * sum(cover(*size) for size in self.valid_sizes(s))
            else:
                windows = plan.windows[..., s, :].flatten(0, -2).tolist()
                walked = sum(cover(y1 - y0, x1 - x0) for x0, y0, x1, y1 in windows)
            counts.append((walked, batch * each * cover(*shape) - walked))
        return counts


def prior_width(precision: Tensor) -> tuple[float | None, float | None]:
    """Median and 90th percentile of σ = 1 / √(2 p), by nearest rank; None for an infinite one."""
    ordered = precision.detach().flatten().float().sort(descending=True).values
    ranks = [math.ceil(quantile * ordered.numel()) - 1 for quantile in WIDTH_QUANTILES]
    median, wide = (None if p == 0 else (2 * p) ** -0.5 for p in ordered[ranks].tolist())
    return median, wide


def bytes_moved(call: Callable[[], object]) -> int:
    """Bytes of the tensors that torch's operations in a call take and give; views and empty tensors cost nothing.

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


# --------------------------------------------------------------------------------------------------- table and picture


def _told(value: float | None, form: str, missing: str) -> str:
    return missing if value is None else format(value, form)


HEADER = ("call", "scale", "grid", "keys", "valid", "tiles", "skipped", "ms", "share", "MB", "α", "σ 50 %", "σ 90 %")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.call),
        str(row.scale),
        f"{row.height}×{row.width}",
        str(row.keys),
        f"{row.valid_keys:.0f}",
        _told(row.tiles, "d", "–"),
        _told(row.tiles_skipped, "d", "–"),
        f"{row.milliseconds:.3f}",
        f"{row.share:.1%}",
        f"{row.bytes_moved / 1e6:.2f}",
        f"{row.scale_weight:.3f}",
        _told(row.sigma_median, ".2f", "∞"),
        _told(row.sigma_90, ".2f", "∞"),
    )


def _table(calls: list[CallRow], rows: list[Row], repeats: int, left_out: int) -> Iterator[str]:
    lines: list[tuple[str, ...]] = [HEADER]
    for call in calls:
        lines += [_cells(row) for row in rows if row.call == call.call]
        together = {"call": str(call.call), "scale": "all", "ms": f"{call.milliseconds:.3f}"}
        lines.append(tuple(together.get(name, "") for name in HEADER))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield ""
    for subject, numbers in _subjects(calls).items():
        yield f"{numbers}: {subject}"
    yield f"Time: median of {repeats}, each scale on its own; all: the call as it was made. α: mean. σ in cells."
    if left_out:
        yield f"{left_out} more calls were not measured."


def _subjects(calls: list[CallRow]) -> dict[str, str]:
    """What the calls were, and the numbers of those that were alike."""
    numbers: dict[str, list[int]] = {}
    for call in calls:
        sizes = f"batch {call.batch}, {call.heads} heads, {call.queries} queries of {call.head_dim} channels"
        subject = f"{call.step}, backend {call.backend}, {call.dtype} on {call.device}, {sizes}"
        numbers.setdefault(subject, []).append(call.call)
    return {
        subject: f"calls {same[0]} … {same[-1]}" if len(same) > 1 else f"call {same[0]}"
        for subject, same in numbers.items()
    }


def _draw(calls: list[CallRow], rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.32 * (len(rows) + len(calls))), dpi=100, layout="constrained")
    colors = pyplot.get_cmap("viridis")
    most = max(row.scale for row in rows)
    place, ticks, names = 0.0, [], []
    for _, group in itertools.groupby(rows, lambda row: row.call):
        for row in group:
            color = colors(0.15 + 0.7 * (row.scale - 1) / max(1, most - 1))
            axes.barh(place, row.milliseconds, height=0.85, color=color)
            median, wide = (_told(sigma, ".1f", "∞") for sigma in (row.sigma_median, row.sigma_90))
            label = f" {row.share:.0%}   α {row.scale_weight:.2f}   σ {median} / {wide}"
            axes.text(row.milliseconds, place, label, va="center", fontsize=9)
            ticks.append(place)
            names.append(f"{row.call} · {row.height}×{row.width}")
            place += 1.0
        place += 0.6
    axes.set_yticks(ticks, names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(row.milliseconds for row in rows))  # room for the labels
    axes.set_xlabel(f"ms, {' or '.join(sorted({call.step for call in calls}))}")
    axes.set_ylabel("call · grid")
    axes.set_title(
        f"Co-attention scale by scale on {calls[0].device}, backend {calls[0].backend}, {calls[0].dtype}\n"
        "share of the sum, mean scale weight α, prior's σ in cells: median / 90th percentile",
        fontsize=10,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
