"""What co-attention costs, scale by scale: `smca_kernels.profile` around any code that calls the operator.

While the block runs, every call of `smca_attention` is noted with the tensors that it got. At its end each call is
repeated as it was, and each of its scales on its own, all in turns; nothing is measured while the code itself runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from smca_kernels import attention
from smca_kernels.backends import Attention
from smca_kernels.inputs import AttentionInputs, kind_of
from smca_kernels.profiling.call import RecordedCall, is_measurable
from smca_kernels.profiling.report import draw, table
from smca_kernels.profiling.rows import CallRow, Row

MAX_CALLS = 100  # their tensors are kept until the end of the block


class Profile:
    """The calls of a block and, once it has ended, what each scale of them costs."""

    def __init__(self, repeats: int, progress: bool) -> None:
        self._repeats, self._progress = repeats, progress
        self._calls: list[RecordedCall] = []
        self._skipped = 0
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
        return "\n".join(table(*self._results(), self._repeats, self._skipped))

    def as_dict(self) -> dict[str, Any]:
        """All rows as JSON holds them: None for what is not a finite number.

        Raises:
            RuntimeError: as `rows`.
        """
        calls, rows = self._results()
        return {
            "calls": [asdict(call) for call in calls],
            "rows": [{name: _finite_or_none(value) for name, value in asdict(row).items()} for row in rows],
            "repeats": self._repeats,
            "calls_skipped": self._skipped,
        }

    def picture(self, path: Path) -> None:
        """Write or replace a PNG file: a bar of time for each scale of each call.

        Raises:
            RuntimeError: as `rows`.
            ImportError: without matplotlib.
        """
        draw(*self._results(), path)

    def _results(self) -> tuple[list[CallRow], list[Row]]:
        if self._measured is None:
            raise RuntimeError("the profile's block must have ended without an error before its results are asked for")
        if not self._measured[0]:
            raise RuntimeError(
                "no call of smca_attention that can be measured was made in the profile's block; replays of CUDA "
                "graphs are not seen"
            )
        return self._measured

    def _hook(self, backend: str, function: Attention) -> Attention:
        """Wrap a backend's function so that its calls are recorded."""

        def recorded(inputs: AttentionInputs) -> Tensor:
            if len(self._calls) == MAX_CALLS or not is_measurable(inputs):
                self._skipped += 1
                return function(inputs)
            self._calls.append(RecordedCall.of(backend, function, inputs))
            with record_function(f"co-attention {len(self._calls)}"):
                return function(inputs)

        return recorded

    def _measure(self) -> None:
        calls, rows = [], []
        for number, call in enumerate(self._calls, 1):
            if self._progress:
                print(f"co-attention {number} of {len(self._calls)} …", file=sys.stderr, flush=True)
            with call.circumstances():
                seconds = call.seconds(f"co-attention {number}", self._repeats)
                tiles = call.tiles()
                scales = [call.of_scale(s) for s in range(len(call.inputs.spatial_shapes))]
                rows += [scale.row(number, s, seconds[s], *tiles[s - 1]) for s, scale in enumerate(scales, 1)]
            calls.append(call.call_row(number, seconds[0]))
        total = sum(row.milliseconds for row in rows)
        self._measured = calls, [replace(row, share=row.milliseconds / total) for row in rows]
        self._calls.clear()


def _finite_or_none(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


@contextmanager
def profile(repeats: int = 10, *, progress: bool = False) -> Iterator[Profile]:
    """Measure every call of `smca_attention` in a block of code, scale by scale.

        with smca_kernels.profile() as profile:
            model(images)
        print(profile.table())

    Where gradients were recorded for a call, its backward is measured as well, whether the block ran it or not. The
    tensors of up to 100 calls are kept until the end of the block, then measured, unless the block raised: put one
    step into it. Calls inside of torch.vmap, without elements or without values can't be run again, and are counted
    alone. Compiled code runs eagerly in the block. Random numbers drawn after the block are those drawn without it.

    Args:
        repeats: how often each call and each scale is measured; the median counts.
        progress: print on stderr which call is being measured.

    Raises:
        TypeError: when repeats is no int.
        ValueError: when it is less than 1.
        RuntimeError: inside another profile's block.
    """
    if not isinstance(repeats, int) or isinstance(repeats, bool):
        raise TypeError(f"repeats must be an int, got {kind_of(repeats)}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if attention.call_hook is not None:
        raise RuntimeError("profile() must not be used inside another profile's block")
    recorded = Profile(repeats, progress)
    # Importing what compiles takes seconds, and nothing is compiled where nobody imported it.
    is_compiler_there = "torch._dynamo" in sys.modules
    stance: Any = torch.compiler.set_stance("force_eager") if is_compiler_there else nullcontext()
    with stance:
        attention.call_hook = recorded._hook
        try:
            yield recorded
        finally:
            attention.call_hook = None
    recorded._measure()
