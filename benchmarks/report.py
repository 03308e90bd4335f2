"""Tables and plots of a run of `smca bench`, made from its JSON file alone.

`markdown` formats the tables, `plot_speedup` and `plot_keys` draw the plots, and `render` writes all of them beside the
file, after a run or by `smca bench --render FILE`.
"""

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
FAMILY = ("basic", "dc5", "full", "pyramid")  # workloads that differ only in their keys
COLORS = {
    "triton": "#d62728", "triton-all": "#ff9896", "sdpa": "#ff7f0e", "naive": "#7f7f7f", "naive-compiled": "#8c564b",
    "sdpa-mask": "#1f77b4", "sdpa-wide": "#17becf", "flex": "#2ca02c", "flex-wide": "#bcbd22", "plain-sdpa": "#9467bd",
    "deformable": "#e377c2",
}  # fmt: skip
# Marks after the names of peers.
OTHER_FUNCTION = "*"
OVER_BUDGET = "†"
MARKS = f"{OTHER_FUNCTION} computes something else   {OVER_BUDGET} beyond the error budget"


def load(path: Path) -> Json:
    """Read the JSON file of a run.

    Raises:
        ValueError: for a file that can't be read or isn't of a run.
    """
    try:
        run = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a run's JSON: {error}") from None
    missing = {"environment", "workloads", "peers", "rows", "parity", "bars", "not_measured", "defaults"} - set(run)
    if missing:
        raise ValueError(f"{path} is not a run's JSON: it has no {', '.join(sorted(missing))}")
    return dict(run)


class Table:
    """Rows and parity of a run, to be looked up by workload, step, dtype and peer."""

    def __init__(self, run: Json) -> None:
        self.run = run
        self.rows = {
            (row["measure"], row["workload"], row["step"], row["dtype"], row["peer"]): row for row in run["rows"]
        }
        self.parity = {(each["workload"], each["dtype"], each["peer"]): each for each in run["parity"]}

    def value(self, measure: str, workload: str, step: str, dtype: str, peer: str) -> float | None:
        """Value of a row, None if it was not measured."""
        row = self.rows.get((measure, workload, step, dtype, peer))
        return None if row is None else row["value"]

    def work_time(self, workload: str, step: str, dtype: str, peer: str) -> float | None:
        """Time without launches: of a CUDA graph's replay, or of a call if no replay was measured."""
        replay = self.value("replay", workload, step, dtype, peer)
        return self.value("time", workload, step, dtype, peer) if replay is None else replay

    def ratio(self, measure: str, workload: str, step: str, dtype: str, over: str, under: str) -> float | None:
        """Value of peer `over` divided by that of peer `under`, None if one of them was not measured."""
        numerator, denominator = (self.value(measure, workload, step, dtype, peer) for peer in (over, under))
        return numerator / denominator if numerator is not None and denominator else None

    def timed(self) -> list[tuple[str, str]]:
        """Pairs of dtype and workload that have times, in the order of measurement."""
        pairs = ((row["dtype"], row["workload"]) for row in self.run["rows"] if row["measure"] == "time")
        return list(dict.fromkeys(pairs))

    def label(self, peer: str, dtype: str, *workloads: str) -> str:
        """Peer's name, marked if it computes another function or exceeds its error budget in one of the workloads."""
        parities = (self.parity.get((workload, dtype, peer)) for workload in workloads)
        over_budget = any(parity is not None and not parity["within"] for parity in parities)
        return peer + OTHER_FUNCTION * (not self.run["peers"][peer]["same"]) + OVER_BUDGET * over_budget


# ---------------------------------------------------------------------------------------------------------- Markdown


def markdown(run: Json) -> str:
    """Format a run as Markdown: environment, bars if judged, peers, then a table for each workload and dtype."""
    table = Table(run)
    lines = ["# Spatially modulated co-attention, measured", ""]
    facts = run["environment"]
    lines += [", ".join(f"{name} {fact}" for name, fact in facts.items()) + ".", ""]
    if not run.get("finished", True):
        lines += ["**This run did not finish.**", ""]
    lines += [*_bars(run), *_peers(run)]
    for dtype, workload in table.timed():
        lines += _workload(table, dtype, workload)
    lines += [*_slowdown(table), *_computed(table), *_overhead(table), *_not_measured(run)]
    return "\n".join(lines) + "\n"


def _table(headings: list[str], rows: list[list[str]], numbers: int = 0) -> list[str]:
    """Lines of a table; its last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(headings) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)] + [""]


def _bars(run: Json) -> list[str]:
    if not run["bars"]:
        return []
    rows = []
    for bar in run["bars"]:
        faster = "as fast as" in bar["bar"]
        ratio = bar["base"] / bar["value"] if faster else bar["value"] / bar["base"]
        against = f"{ratio:.3g} × {bar['against']} ({bar['base']:.4g})"
        cells = [bar["measure"], bar["workload"], bar["step"], bar["dtype"], bar["peer"], bar["bar"]]
        rows.append([*cells, f"{bar['value']:.4g}", against, "met" if bar["met"] else "**missed**"])
    headings = ["measure", "workload", "step", "dtype", "peer", "bar", "value", "that is", ""]
    return ["## Bars", "", *_table(headings, rows)]


def _peers(run: Json) -> list[str]:
    lines = ["## Peers", ""]
    lines += [f"- {name}{OTHER_FUNCTION * (not peer['same'])}: {peer['what']}" for name, peer in run["peers"].items()]
    explanation = (
        f"{OTHER_FUNCTION} computes something else. {OVER_BUDGET} is beyond the error budget, by what its row says."
    )
    return [*lines, "", explanation, ""]


def _workload(table: Table, dtype: str, workload: str) -> Iterator[str]:
    shape = table.run["workloads"][workload]
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
    for peer in table.run["peers"]:
        cells = [_time(table, dtype, workload, step, peer) for step in (FORWARD, BOTH)]
        if not any(cells):
            continue
        same = table.run["peers"][peer]["same"]
        speed = [table.ratio("time", workload, step, dtype, "naive", peer) for step in (FORWARD, BOTH)]
        forward = table.value("time", workload, FORWARD, dtype, peer)
        rate = shape["elements"] / forward / 1e6 if forward and same else None  # 10⁹ a second
        shares = [table.ratio("time", workload, step, dtype, "limit", peer) for step in (FORWARD, BOTH) if same]
        parity = table.parity.get((workload, dtype, peer))
        memory = [table.value(*kind, dtype, peer) for kind in (("peak", workload, BOTH), ("saved", workload, FORWARD))]
        compiling = [table.value("compile", workload, step, dtype, peer) for step in (FORWARD, BOTH)]
        seconds = [value for value in compiling if value is not None]
        rows.append([
            table.label(peer, dtype, workload) + " (default)" * (table.run["defaults"].get(dtype) == peer),
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
    """Format a row's median and quantiles."""
    spread = "" if row["q20"] is None else f" ({row['q20']:.4g}–{row['q80']:.4g})"
    return f"{row['value']:.4g}{spread}"


def _replays(table: Table, dtype: str, workload: str) -> list[list[str]]:
    rows = []
    for peer in table.run["peers"]:
        cells = [_time(table, dtype, workload, step, peer, "replay") for step in (FORWARD, BOTH)]
        if any(cells):
            rows.append([table.label(peer, dtype, workload), *cells])
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _slowdown(table: Table) -> list[str]:
    rows = []
    for (measure, workload, step, dtype, peer), row in table.rows.items():
        if measure == "slowdown":
            quiet = table.value("time", workload, step, dtype, peer)
            rows.append(
                [workload, dtype, step, table.label(peer, dtype, workload), _number(quiet, "{:.4g}"), _value(row)]
            )
    if not rows:
        return []
    headings = ["workload", "dtype", "step", "peer", "alone, ms", "times as long"]
    return ["## Beside a process that keeps one core busy", "", *_table(headings, rows, 2)]


def _computed(table: Table) -> list[str]:
    rows = []
    for (measure, workload, step, dtype, peer), row in table.rows.items():
        if measure == "computed" and peer == "triton":
            total = table.value(measure, workload, step, dtype, "triton-all")
            assert total is not None
            prior = table.run["workloads"][workload]["prior"]
            rows.append(
                [workload, prior, dtype, f"{total:.4g}", f"{row['value']:.4g}", f"{total / row['value']:.2f} ×"]
            )
    if not rows:
        return []
    headings = ["workload", "prior", "dtype", "of", "computed", "fewer"]
    lines = ["## Elements that a plan leaves to compute, in millions", ""]
    lines += [
        "Counted for the blocks of sm_90, with the default mass_tolerance. Calls this small are computed whole.",
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


def _not_measured(run: Json) -> list[str]:
    where: dict[tuple[str, str, str], list[str]] = {}
    for skipped in run["not_measured"]:
        about = (skipped["peer"] or "everything", skipped["step"] or "all steps", skipped["reason"])
        where.setdefault(about, []).append(f"{skipped['workload']} {skipped['dtype']}")
    if not where:
        return []
    rows = [[peer, step, ", ".join(dict.fromkeys(names)), reason] for (peer, step, reason), names in where.items()]
    return ["## Not measured", "", *_table(["peer", "step", "where", "why"], rows)]


# ------------------------------------------------------------------------------------------------------------- plots


def render(path: Path) -> list[Path]:
    """Write a run's tables (.md) beside its JSON file, and its plots (`_speedup.png`, `_keys.png`) with matplotlib.

    Returns:
        the files written.

    Raises:
        ValueError: as `load`.
    """
    run = load(path)
    target = path.with_suffix(".md")
    write_text(target, markdown(run))
    written = [target]
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return written
    for name, plot in (("speedup", plot_speedup), ("keys", plot_keys)):
        figure = plot(run)
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


def _caption(run: Json, dtype: str) -> str:
    facts = run["environment"]
    return f"{facts['name']}, {dtype}, torch {facts['torch']}, commit {facts['commit'][:9]}"


def plot_speedup(run: Json) -> Any:
    """Plot the speed of each peer relative to naive, for each workload in the first dtype measured."""
    table = Table(run)
    timed = table.timed()
    if not timed:
        return None
    dtype = timed[0][0]
    workloads = [workload for other, workload in timed if other == dtype]
    figure, axes = _figure(2, 6.0 + 1.2 * len(workloads))
    for axis, step in zip(axes, (FORWARD, BOTH), strict=True):
        names = [p for p in run["peers"] if any(table.value("time", w, step, dtype, p) for w in workloads)]
        for i, peer in enumerate(names):
            speed = [table.ratio("time", workload, step, dtype, "naive", peer) or math.nan for workload in workloads]
            positions = [x + 0.84 * ((i + 0.5) / len(names) - 0.5) for x in range(len(workloads))]
            label = table.label(peer, dtype, *workloads)
            hatch = "" if run["peers"][peer]["same"] else "///"
            axis.bar(
                positions, speed, 0.84 / len(names), label=label, color=COLORS.get(peer), hatch=hatch, edgecolor="white"
            )
        axis.set_yscale("log")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(workloads)), workloads, rotation=30, ha="right")
        axis.set_title(step)
        axis.set_ylabel("times as fast as naive PyTorch")
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=10, loc="outside lower center")
    figure.suptitle(f"{_caption(run, dtype)}\n{MARKS}", fontsize=9)
    return figure


def plot_keys(run: Json) -> Any:
    """Plot time and peak memory of forward + backward against the keys, for workloads that differ only in these."""
    table = Table(run)
    timed = table.timed()
    families: dict[tuple[str, str], list[str]] = {}
    for dtype, workload in timed:
        grid, _, batch = workload.partition("-")
        if grid in FAMILY and batch == f"b{run['workloads'][workload]['batch']}":
            families.setdefault((dtype, batch), []).append(workload)
    families = {key: names for key, names in families.items() if key[0] == timed[0][0] and len(names) > 1}
    if not families:
        return None
    dtype, batch = max(families, key=lambda key: (len(families[key]), int(key[1][1:])))
    workloads = sorted(families[dtype, batch], key=lambda name: run["workloads"][name]["keys"])
    keys = [run["workloads"][workload]["keys"] for workload in workloads]
    figure, axes = _figure(2, 11.0)
    for axis, measure, label in zip(axes, ("time", "peak"), ("time, ms", "peak memory, MB"), strict=True):
        for peer in run["peers"]:
            values = [table.value(measure, workload, BOTH, dtype, peer) or math.nan for workload in workloads]
            if not all(map(math.isnan, values)):
                style = "-" if run["peers"][peer]["same"] else ":"
                name = table.label(peer, dtype, *workloads)
                axis.plot(keys, values, style, marker="o", markersize=4, label=name, color=COLORS.get(peer))
        axis.set(xscale="log", yscale="log", xlabel="keys of an image", ylabel=label, title=f"{FORWARD} + backward")
        axis.set_xticks(
            keys, [f"{name.partition('-')[0]}\n{count}" for name, count in zip(workloads, keys, strict=True)]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=10, loc="outside lower center")
    note = f"batch of {batch[1:]}; memory beyond inputs, output and gradients"
    figure.suptitle(f"{_caption(run, dtype)}\n{note}\n{MARKS}", fontsize=9)
    return figure
