"""A profile as a table and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from smca_kernels.files import replacing
from smca_kernels.profiling.rows import CallRow, Row


def _format(value: float | None, form: str, missing: str) -> str:
    return missing if value is None else format(value, form)


HEADER = ("call", "scale", "grid", "keys", "valid", "tiles", "skipped", "ms", "share", "MB", "α", "σ 50 %", "σ 90 %")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.call),
        str(row.scale),
        f"{row.height}×{row.width}",
        str(row.keys),
        f"{row.valid_keys:.0f}",
        _format(row.tiles, "d", "–"),
        _format(row.tiles_skipped, "d", "–"),
        f"{row.milliseconds:.3f}",
        f"{row.share:.1%}",
        f"{row.bytes_moved / 1e6:.2f}",
        f"{row.scale_weight:.3f}",
        _format(row.sigma_median, ".2f", "∞"),
        _format(row.sigma_90, ".2f", "∞"),
    )


def table(calls: list[CallRow], rows: list[Row], repeats: int, skipped_calls: int) -> Iterator[str]:
    """Yield the lines of a table: a line for each scale of each call, and one for the call with all of them."""
    lines: list[tuple[str, ...]] = [HEADER]
    for call in calls:
        lines += [_cells(row) for row in rows if row.call == call.call]
        together = {"call": str(call.call), "scale": "all", "ms": f"{call.milliseconds:.3f}"}
        lines.append(tuple(together.get(name, "") for name in HEADER))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield ""
    for description, numbers in _descriptions(calls).items():
        yield f"{numbers}: {description}"
    yield f"Time: median of {repeats}, each scale on its own; all: the call as it was made. α: mean. σ in cells."
    if skipped_calls:
        yield f"{skipped_calls} more calls were not measured."


def _descriptions(calls: list[CallRow]) -> dict[str, str]:
    """Descriptions of the calls, with the numbers of those that were alike."""
    numbers: dict[str, list[int]] = {}
    for call in calls:
        sizes = f"batch {call.batch}, {call.heads} heads, {call.queries} queries of {call.head_dim} channels"
        description = f"{call.step}, backend {call.backend}, {call.dtype} on {call.device}, {sizes}"
        numbers.setdefault(description, []).append(call.call)
    return {
        description: f"calls {same[0]} … {same[-1]}" if len(same) > 1 else f"call {same[0]}"
        for description, same in numbers.items()
    }


def draw(calls: list[CallRow], rows: list[Row], path: Path) -> None:
    """Write or replace a PNG file: a bar of time for each scale of each call."""
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
            median, wide = (_format(sigma, ".1f", "∞") for sigma in (row.sigma_median, row.sigma_90))
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
