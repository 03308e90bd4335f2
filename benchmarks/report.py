"""Tables and plots of a run, from its JSON alone: `smca bench --render FILE`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smca_kernels.files import replacing, write_text

from .workloads import BOTH, FORWARD

Json = dict[str, Any]
FAMILY = ("basic", "dc5", "full", "pyramid")  # workloads that differ in their keys alone
COLORS = {
    "triton": "#d62728", "triton-all": "#ff9896", "sdpa": "#ff7f0e", "naive": "#7f7f7f", "naive-compiled": "#8c564b",
    "sdpa-mask": "#1f77b4", "sdpa-wide": "#17becf", "flex": "#2ca02c", "flex-wide": "#bcbd22", "plain-sdpa": "#9467bd",
    "deformable": "#e377c2",
}  # fmt: skip
CONTEXT = "*"  # behind the name of a peer that computes something else
OFF = "†"  # behind one that is beyond the error budget
MARKS = f"{CONTEXT} computes something else   {OFF} beyond the error budget"


def load(path: Path) -> Json:
    """The JSON of a run.

    Raises:
        ValueError: for a file that can't be read or isn't one.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a run's JSON: {error}") from None
    missing = {"environment", "workloads", "peers", "rows", "parity", "bars", "not_measured", "defaults"} - set(found)
    if missing:
        raise ValueError(f"{path} is not a run's JSON: it has no {', '.join(sorted(missing))}")
    return dict(found)


class Table:
    """The rows of a run by what they are about."""

    def __init__(self, found: Json) -> None:
        self.found = found
        self.rows = {
            (row["measure"], row["workload"], row["step"], row["dtype"], row["peer"]): row for row in found["rows"]
        }
        self.parity = {(each["workload"], each["dtype"], each["peer"]): each for each in found["parity"]}

    def value(self, measure: str, workload: str, step: str, dtype: str, peer: str) -> float | None:
        row = self.rows.get((measure, workload, step, dtype, peer))
        return None if row is None else row["value"]

    def work_time(self, workload: str, step: str, dtype: str, peer: str) -> float | None:
        """Time of a CUDA graph's replay, in which launching costs nothing, or of a call where that wasn't measured."""
        replay = self.value("replay", workload, step, dtype, peer)
        return self.value("time", workload, step, dtype, peer) if replay is None else replay

    def ratio(self, measure: str, workload: str, step: str, dtype: str, over: str, under: str) -> float | None:
        """How often `over`'s value contains `under`'s."""
        a, b = (self.value(measure, workload, step, dtype, peer) for peer in (over, under))
        return a / b if a is not None and b else None

    def subjects(self) -> list[tuple[str, str]]:
        """(dtype, workload) of everything that has times, in the order in which it was measured."""
        found = ((row["dtype"], row["workload"]) for row in self.found["rows"] if row["measure"] == "time")
        return list(dict.fromkeys(found))

    def label(self, peer: str, dtype: str, *workloads: str) -> str:
        """A peer's name with what must be known about it in any of these workloads."""
        found = (self.parity.get((workload, dtype, peer)) for workload in workloads)
        off = any(parity is not None and not parity["within"] for parity in found)
        return peer + CONTEXT * (not self.found["peers"][peer]["same"]) + OFF * off


# ---------------------------------------------------------------------------------------------------------- Markdown


def markdown(found: Json) -> str:
    """Everything that was measured, as tables: what was asked of it first, then workload by workload."""
    table = Table(found)
    lines = ["# Spatially modulated co-attention, measured", ""]
    facts = found["environment"]
    lines += [", ".join(f"{name} {fact}" for name, fact in facts.items()) + ".", ""]
    if not found.get("finished", True):
        lines += ["**This run did not finish.**", ""]
    lines += [*_bars(found), *_context(found)]
    for dtype, workload in table.subjects():
        lines += _workload(table, dtype, workload)
    lines += [*_computed(table), *_overhead(table), *_not_measured(found)]
    return "\n".join(lines) + "\n"


def _table(headings: list[str], rows: list[list[str]], numbers: int = 0) -> list[str]:
    """Lines of a table whose last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(headings) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)] + [""]


def _bars(found: Json) -> list[str]:
    if not found["bars"]:
        return []
    rows = []
    for bar in found["bars"]:
        faster = "as fast as" in bar["bar"]
        ratio = bar["base"] / bar["value"] if faster else bar["value"] / bar["base"]
        against = f"{ratio:.3g} × {bar['against']} ({bar['base']:.4g})"
        cells = [bar["measure"], bar["workload"], bar["step"], bar["dtype"], bar["peer"], bar["bar"]]
        rows.append([*cells, f"{bar['value']:.4g}", against, "met" if bar["met"] else "**missed**"])
    headings = ["measure", "workload", "step", "dtype", "peer", "bar", "value", "that is", ""]
    return ["## Bars", "", *_table(headings, rows)]


def _context(found: Json) -> list[str]:
    lines = ["## Peers", ""]
    lines += [f"- {name}{CONTEXT * (not peer['same'])}: {peer['what']}" for name, peer in found["peers"].items()]
    explanation = f"{CONTEXT} computes something else. {OFF} is beyond the error budget, by what its row says."
    return [*lines, "", explanation, ""]


def _workload(table: Table, dtype: str, workload: str) -> Iterator[str]:
    shape = table.found["workloads"][workload]
    grids = " + ".join(f"{height}×{width}" for height, width in shape["spatial_shapes"])
    padding = "" if shape["image_share"] == 1.0 else f", {100 * (1 - shape['image_share']):.0f} % padding"
    yield f"## {workload}, {dtype}"
    yield ""
    yield (
        f"{shape['batch']} × {shape['queries']} queries, {shape['heads']} heads of {shape['head_dim']}, {grids} = "
        f"{shape['keys']} keys{padding}; {shape['elements'] / 1e6:.4g} M elements. Times in ms, memory in MB."
    )
    yield ""
    rows = []
    for peer in table.found["peers"]:
        cells = [_time(table, dtype, workload, step, peer) for step in (FORWARD, BOTH)]
        if not any(cells):
            continue
        same = table.found["peers"][peer]["same"]
        speed = [table.ratio("time", workload, step, dtype, "naive", peer) for step in (FORWARD, BOTH)]
        forward = table.value("time", workload, FORWARD, dtype, peer)
        rate = shape["elements"] / forward / 1e6 if forward and same else None  # 10⁹ a second
        shares = [table.ratio("time", workload, step, dtype, "limit", peer) for step in (FORWARD, BOTH) if same]
        parity = table.parity.get((workload, dtype, peer))
        memory = [table.value(*kind, dtype, peer) for kind in (("peak", workload, BOTH), ("saved", workload, FORWARD))]
        compiling = [table.value("compile", workload, step, dtype, peer) for step in (FORWARD, BOTH)]
        seconds = [value for value in compiling if value is not None]
        rows.append([
            table.label(peer, dtype, workload) + " (default)" * (table.found["defaults"].get(dtype) == peer),
            *cells,
            _number(table.value("preparation", workload, FORWARD, dtype, peer), "{:.3g}"),
            *(_number(value, "{:.2f} ×") for value in speed),
            _number(rate, "{:.4g}"),
            " / ".join(f"{100 * share:.0f} %" for share in shares if share is not None),
            *(_number(value, "{:.4g}") for value in memory),
            _number(parity and parity["ratio"], "{:.2g}"),
            _number(parity and parity["logit_error"], "{:.2g}"),
            _number(sum(seconds) if seconds else None, "{:.1f}"),
        ])  # fmt: skip
    headings = ["peer", FORWARD, BOTH, "preparation", "speed-up", "and both", "10⁹ elements/s", "of the limit"]
    headings += ["peak", "saved", "error / budget", "logit error", "compile, s"]
    yield from _table(headings, rows, len(headings) - 1)
    replays = _replays(table, dtype, workload)
    if replays:
        yield "As replays of CUDA graphs, in ms:"
        yield ""
        yield from _table(["peer", FORWARD, BOTH], replays, 2)


def _time(table: Table, dtype: str, workload: str, step: str, peer: str, measure: str = "time") -> str:
    row = table.rows.get((measure, workload, step, dtype, peer))
    return "" if row is None else _value(row)


def _value(row: Json) -> str:
    """Median and quantiles."""
    spread = "" if row["q20"] is None else f" ({row['q20']:.4g}–{row['q80']:.4g})"
    return f"{row['value']:.4g}{spread}"


def _replays(table: Table, dtype: str, workload: str) -> list[list[str]]:
    rows = []
    for peer in table.found["peers"]:
        cells = [_time(table, dtype, workload, step, peer, "replay") for step in (FORWARD, BOTH)]
        if any(cells):
            rows.append([table.label(peer, dtype, workload), *cells])
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _computed(table: Table) -> list[str]:
    rows = []
    for (measure, workload, step, dtype, peer), row in table.rows.items():
        if measure == "computed" and peer == "triton":
            every = table.value(measure, workload, step, dtype, "triton-all")
            assert every is not None
            prior = table.found["workloads"][workload]["prior"]
            rows.append(
                [workload, prior, dtype, f"{every:.4g}", f"{row['value']:.4g}", f"{every / row['value']:.2f} ×"]
            )
    if not rows:
        return []
    headings = ["workload", "prior", "dtype", "of", "computed", "fewer"]
    lines = ["## Elements that a plan leaves to compute, in millions", ""]
    lines += [
        "Counted for the tiles and blocks of sm_90, with the default mass_tolerance; with 0 it is all of them.",
        "",
    ]
    return [*lines, *_table(headings, rows, 3)]


def _overhead(table: Table) -> list[str]:
    rows = []
    for (measure, _, step, dtype, peer), row in table.rows.items():
        if measure == "overhead":
            rows.append([dtype, step, peer, _value(row)])
    if not rows:
        return []
    return ["## Overhead of one tiny call, in µs", "", *_table(["dtype", "step", "peer", "median (20–80 %)"], rows, 1)]


def _not_measured(found: Json) -> list[str]:
    where: dict[tuple[str, str, str], list[str]] = {}
    for left in found["not_measured"]:
        about = (left["peer"] or "everything", left["step"] or "all steps", left["reason"])
        where.setdefault(about, []).append(f"{left['workload']} {left['dtype']}")
    if not where:
        return []
    rows = [[peer, step, ", ".join(dict.fromkeys(names)), reason] for (peer, step, reason), names in where.items()]
    return ["## Not measured", "", *_table(["peer", "step", "where", "why"], rows)]


# ------------------------------------------------------------------------------------------------------------- plots


def render(path: Path) -> list[Path]:
    """Beside a run's JSON: its tables (.md), and where matplotlib is installed `_speedup.png` and `_keys.png`.

    Returns:
        The files written.

    Raises:
        ValueError: as `load`.
    """
    found = load(path)
    target = path.with_suffix(".md")
    write_text(target, markdown(found))
    written = [target]
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return written
    for name, plot in (("speedup", plot_speedup), ("keys", plot_keys)):
        figure = plot(found)
        if figure is None:
            continue
        target = path.with_name(f"{path.stem}_{name}.png")
        with replacing(target) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        written.append(target)
    print("\n".join(f"wrote {each}" for each in written))
    return written


def _figure(panels: int, width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _caption(found: Json, dtype: str) -> str:
    facts = found["environment"]
    return f"{facts['name']}, {dtype}, torch {facts['torch']}, commit {facts['commit'][:9]}"


def plot_speedup(found: Json) -> Any:
    """How many times as fast as naive each peer is, workload by workload, in the first dtype measured."""
    table = Table(found)
    subjects = table.subjects()
    if not subjects:
        return None
    dtype = subjects[0][0]
    workloads = [workload for other, workload in subjects if other == dtype]
    figure, axes = _figure(2, 6.0 + 1.2 * len(workloads))
    for axis, step in zip(axes, (FORWARD, BOTH), strict=True):
        names = [p for p in found["peers"] if any(table.value("time", w, step, dtype, p) for w in workloads)]
        for i, peer in enumerate(names):
            speed = [table.ratio("time", workload, step, dtype, "naive", peer) or math.nan for workload in workloads]
            at = [x + 0.84 * ((i + 0.5) / len(names) - 0.5) for x in range(len(workloads))]
            label = table.label(peer, dtype, *workloads)
            hatch = "" if found["peers"][peer]["same"] else "///"
            axis.bar(at, speed, 0.84 / len(names), label=label, color=COLORS.get(peer), hatch=hatch, edgecolor="white")
        axis.set_yscale("log")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(workloads)), workloads, rotation=30, ha="right")
        axis.set_title(step)
        axis.set_ylabel("times as fast as naive PyTorch")
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=10, loc="outside lower center")
    figure.suptitle(f"{_caption(found, dtype)}\n{MARKS}", fontsize=9)
    return figure


def plot_keys(found: Json) -> Any:
    """Time and peak memory of forward + backward against the number of keys, where only that differs."""
    table = Table(found)
    subjects = table.subjects()
    families: dict[tuple[str, str], list[str]] = {}
    for dtype, workload in subjects:
        grid, _, batch = workload.partition("-")
        if grid in FAMILY and batch == f"b{found['workloads'][workload]['batch']}":
            families.setdefault((dtype, batch), []).append(workload)
    families = {key: names for key, names in families.items() if key[0] == subjects[0][0] and len(names) > 1}
    if not families:
        return None
    dtype, batch = max(families, key=lambda key: (len(families[key]), int(key[1][1:])))
    workloads = sorted(families[dtype, batch], key=lambda name: found["workloads"][name]["keys"])
    keys = [found["workloads"][workload]["keys"] for workload in workloads]
    figure, axes = _figure(2, 11.0)
    for axis, measure, label in zip(axes, ("time", "peak"), ("time, ms", "peak memory, MB"), strict=True):
        for peer in found["peers"]:
            values = [table.value(measure, workload, BOTH, dtype, peer) or math.nan for workload in workloads]
            if not all(map(math.isnan, values)):
                style = "-" if found["peers"][peer]["same"] else ":"
                name = table.label(peer, dtype, *workloads)
                axis.plot(keys, values, style, marker="o", markersize=4, label=name, color=COLORS.get(peer))
        axis.set(xscale="log", yscale="log", xlabel="keys of an image", ylabel=label, title=f"{FORWARD} + backward")
        axis.set_xticks(
            keys, [f"{name.partition('-')[0]}\n{count}" for name, count in zip(workloads, keys, strict=True)]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=10, loc="outside lower center")
    what = f"batch of {batch[1:]}; memory beyond inputs, output and gradients"
    figure.suptitle(f"{_caption(found, dtype)}\n{what}\n{MARKS}", fontsize=9)
    return figure
