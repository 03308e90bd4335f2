"""What the runs of ablations.py say: results.json, table.md and curves.png, from as many of them as are over.

python -m smca_model.demo.ablation_report demo_output/ablations

AP is compared after as many epochs, and after as much CPU time: that of the fastest run, where the others' AP is
interpolated linearly between their evaluations. CPU time of one thread, because a busy machine changes it little.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from smca_kernels.files import replacing, write_text

from . import ablation_variants
from .ablation_variants import Variant

Run = dict[str, Any]
MEASURES = {"AP": "equal epochs", "AP_at_equal_time": "equal time"}
TABLES = {2: "the prior (Table 2)", 3: "levels, encoder and scale selection (Table 3)"}


def write_report(folder: Path) -> None:
    """Write results.json, table.md and curves.png of a set into its folder, whatever part of it is there.

    Raises:
        ValueError: for a folder without a set, and damaged files.
    """
    plan, runs = read_json(folder / "plan.json"), read_runs(folder)
    found = summarize(runs)
    results = {"plan": plan, **found, "runs": runs}
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "table.md", format_report(plan, found, runs))
    draw_curves(runs, found["equal_seconds"], folder / "curves.png")


def read_runs(folder: Path) -> list[Run]:
    """The runs of a set, those under way with what they have so far: then `finished` is False.

    Returns:
        By variant and seed: variant, seed, finished, error ("" where it went well), evaluations, settings, versions,
        cpu; the last three of runs that are over alone.

    Raises:
        ValueError: naming the file that is damaged.
    """
    order = [variant.name for variant in ablation_variants.VARIANTS]
    runs = []
    for run_folder in sorted((folder / "runs").glob("*-*")):
        name, _, seed = run_folder.name.rpartition("-")
        if name not in order or not seed.isdecimal():
            continue
        record = run_folder / "run.json"
        if record.exists():
            run = read_json(record)
            missing = [key for key in ("error", "evaluations", "settings", "versions") if key not in run]
            if missing:
                raise ValueError(f"{record} must be the record of a run, but lacks {', '.join(missing)}")
            run = {**run, "finished": bool(run["evaluations"]) and not run["error"]}
        else:
            run = {"error": "", "evaluations": read_evaluations(run_folder), "finished": False}
        runs.append({**run, "variant": name, "seed": int(seed)})
    return sorted(runs, key=lambda run: (order.index(run["variant"]), run["seed"]))


def read_json(path: Path) -> dict[str, Any]:
    """A file of the set.

    Raises:
        ValueError: naming it, when it can't be read or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run so far: epoch, AP, AP50, seconds, and the CPU seconds that training took until then."""
    from ..training.metrics import read_metrics

    names = ("epoch", "AP", "AP50", "seconds", "cpu_seconds")
    return [{name: line[name] for name in names} for line in read_metrics(folder) if "AP" in line]


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Means and spreads of the finished runs, and their order beside the paper's.

    Returns:
        equal_seconds: the CPU seconds that the fastest run took, None without runs.
        variants: one dict each with variant, paper_ap, seeds (their number), and of every measure the mean and the
            standard deviation over seeds (None for fewer than two); seconds (mean CPU seconds of a run).
        order: {table: {measure: `compare_order`}}.
    """
    finished = [run for run in runs if run["finished"]]
    equal = min((float(run["evaluations"][-1]["cpu_seconds"]) for run in finished), default=None)
    values: dict[str, dict[str, dict[int, float]]] = {}  # measure, variant, seed
    for run in finished:
        last = run["evaluations"][-1]
        assert equal is not None
        at_equal = ap_at(run["evaluations"], equal)
        numbers = {"AP": last["AP"], "AP50": last["AP50"], "AP_at_equal_time": at_equal, "seconds": last["cpu_seconds"]}
        for measure, value in numbers.items():
            values.setdefault(measure, {}).setdefault(run["variant"], {})[run["seed"]] = value
    rows = []
    for variant in ablation_variants.VARIANTS:
        row: dict[str, Any] = {"variant": variant.name, "paper_ap": variant.paper_ap}
        row["seeds"] = len(values.get("AP", {}).get(variant.name, {}))
        for measure in ("AP", "AP50", "AP_at_equal_time", "seconds"):
            seeds = list(values.get(measure, {}).get(variant.name, {}).values())
            row[measure] = statistics.mean(seeds) if seeds else None
            row[f"{measure}_deviation"] = statistics.stdev(seeds) if len(seeds) > 1 else None
        rows.append(row)
    order = {
        str(table): {measure: compare_order(of_table(table), values.get(measure, {})) for measure in MEASURES}
        for table in TABLES
    }
    return {"equal_seconds": equal, "variants": rows, "order": order}


def of_table(table: int) -> list[Variant]:
    """The variants of one of the paper's tables, in the order of its AP, the best first."""
    return sorted((v for v in ablation_variants.VARIANTS if table in v.tables), key=lambda variant: -variant.paper_ap)


def ap_at(evaluations: list[dict[str, Any]], seconds: float) -> float:
    """AP after that much CPU time, linear between evaluations; 0 at the start, which isn't evaluated."""
    import numpy as np

    times = [0.0, *(line["cpu_seconds"] for line in evaluations)]
    return float(np.interp(seconds, times, [0.0, *(line["AP"] for line in evaluations)]))


def compare_order(variants: list[Variant], values: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Every pair that the paper's AP orders, and that has a seed in common.

    Args:
        variants: those to compare.
        values: {variant: {seed: AP}}.

    Returns:
        For each pair higher and lower (in the paper), paper ([its two AP]), here ([means over the common seeds]), seeds
        (the number of these), alike (in how many of them the order is the paper's), and agrees, of the means.
    """
    pairs = []
    for one, other in itertools.combinations(variants, 2):
        common = sorted(values.get(one.name, {}).keys() & values.get(other.name, {}).keys())
        if one.paper_ap == other.paper_ap or not common:
            continue
        higher, lower = (one, other) if one.paper_ap > other.paper_ap else (other, one)
        here = [[values[variant.name][seed] for seed in common] for variant in (higher, lower)]
        means = [statistics.mean(each) for each in here]
        pairs.append(
            {
                "higher": higher.name,
                "lower": lower.name,
                "paper": [higher.paper_ap, lower.paper_ap],
                "here": means,
                "seeds": len(common),
                "alike": sum(a > b for a, b in zip(*here, strict=True)),
                "agrees": means[0] > means[1],
            }
        )
    return pairs


# ------------------------------------------------------------------------------------------------------- words


def format_report(plan: dict[str, Any], found: dict[str, Any], runs: list[Run]) -> str:
    """The set as Markdown: what was run, a table for each of the paper's, and where the order is another."""
    data, training = plan["data"], plan["training"]
    over, begun = sum(run["finished"] for run in runs), sum(not run["finished"] for run in runs)
    lines = [
        "# Ablations in small",
        "",
        f"Digits ({data['train']} scenes of {data['size']} × {data['size']} pixels, AP on {data['val']} held out): "
        f"{training['epochs']} epochs, batches of {training['batch_size']}, learning rate {training['lr']:g} without a "
        "drop, one CPU thread. The paper's AP are those of COCO after 50 epochs, in percent.",
        "",
        f"Finished runs: {over}{f'; under way or not finite: {begun}' if begun else ''}. Mean ± standard deviation "
        "over the seeds of finished runs.",
    ]
    if found["equal_seconds"] is not None:
        lines += [
            "",
            f"Equal time is the {found['equal_seconds']:.0f} CPU seconds of training that the fastest run took; AP "
            "there is interpolated linearly between a run's evaluations.",
        ]
    rows = {row["variant"]: row for row in found["variants"]}
    for table, title in TABLES.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *_table(table, rows)]
        for measure, name in MEASURES.items():
            lines += ["", *_order(found["order"][str(table)][measure], name)]
    failed = [run for run in runs if run["error"]]
    if failed:
        lines += ["", "Runs that ended without a result, which are in no mean:", ""]
        lines += [f"- {run['variant']}, seed {run['seed']}: {run['error']}" for run in failed]
    return "\n".join(lines) + "\n"


def _table(table: int, rows: dict[str, dict[str, Any]]) -> list[str]:
    variants = of_table(table)
    header = ["variant", "", "seeds", "AP", "AP50", "AP at equal time", "CPU s a run", "place", "paper's AP", "place"]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    ours = {v.name: rows[v.name]["AP"] for v in variants if rows[v.name]["AP"] is not None}
    theirs = {v.name: v.paper_ap for v in variants}
    for variant in variants:
        row = rows[variant.name]
        cells = [f"`{variant.name}`", variant.row, str(row["seeds"])]
        cells += [_spread(row, measure, ".3f") for measure in ("AP", "AP50", "AP_at_equal_time")]
        cells += [_spread(row, "seconds", ".0f"), _place(variant.name, ours)]
        cells += [f"{variant.paper_ap:.1f}", _place(variant.name, theirs)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(row: dict[str, Any], measure: str, form: str) -> str:
    if row[measure] is None:
        return "–"
    deviation = row[f"{measure}_deviation"]
    return f"{row[measure]:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def _place(name: str, values: dict[str, float]) -> str:
    return str(1 + sum(value > values[name] for value in values.values())) if name in values else "–"


def _order(pairs: list[dict[str, Any]], name: str) -> list[str]:
    """Say which pairs are in the paper's order and name those which are not."""
    if not pairs:
        return [f"At {name} there is nothing to compare yet."]
    differing = [pair for pair in pairs if not pair["agrees"]]
    if not differing:
        return [f"At {name} all {len(pairs)} pairs are in the paper's order."]
    lines = [
        f"At {name} **the order differs from the paper's** in {len(differing)} of {len(pairs)} pairs (over the seeds "
        "that both have):",
        "",
    ]
    for pair in differing:
        here, paper = pair["here"], pair["paper"]
        relation = "below" if here[0] < here[1] else "level with"
        against = pair["seeds"] - pair["alike"]
        lines.append(
            f"- `{pair['higher']}` is {relation} `{pair['lower']}`: {here[0]:.3f} and {here[1]:.3f}, the paper has "
            f"{paper[0]:.1f} and {paper[1]:.1f}; so in {against} of {pair['seeds']} seeds"
        )
    return lines


def draw_curves(runs: list[Run], equal_seconds: float | None, path: Path) -> None:
    """AP over epochs and over CPU seconds, a row for each table; a thin line a run, a thick one the mean of a variant.

    Means are those of finished runs.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained", sharey=True)
    axes_of = {"epoch": "epochs", "cpu_seconds": "CPU seconds of training"}
    for row, (table, title) in zip(panels, TABLES.items(), strict=True):
        for axes, (key, label) in zip(row, axes_of.items(), strict=True):
            for i, variant in enumerate(reversed(of_table(table))):
                mine = [run for run in runs if run["variant"] == variant.name and run["evaluations"]]
                for run in mine:
                    axes.plot(*_curve(run["evaluations"], key), color=f"C{i}", linewidth=0.7, alpha=0.5)
                finished = [_curve(run["evaluations"], key) for run in mine if run["finished"]]
                if finished:
                    x, y = np.mean(finished, 0)
                    axes.plot(x, y, "o-", color=f"C{i}", markersize=3, label=f"{variant.name} ({len(finished)})")
            axes.set(xlabel=label, ylabel="AP, held-out scenes", title=title)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(title="mean (seeds)", fontsize=8)
        if equal_seconds is not None:
            row[1].axvline(equal_seconds, color="black", linestyle=":")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def _curve(evaluations: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [0.0, *(line[key] for line in evaluations)], [0.0, *(line["AP"] for line in evaluations)]


def main() -> int:
    """Write the report of a folder of ablations anew."""
    if len(sys.argv) != 2:
        print("usage: python -m smca_model.demo.ablation_report FOLDER", file=sys.stderr)
        return 2
    try:
        write_report(Path(sys.argv[1]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(Path(sys.argv[1], "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
