"""`smca predict`: times of the Triton kernels on cards that aren't here. Predicted, not measured.

    seconds = Σ_kernels  ceil(programs / SMs) · elements of a program · cycles per element / clock / efficiency

Cycles per element are those of `smca cost`, which reads them off the compiled kernels, for full tiles: edges of grids
and the last block of queries cost as much as whole tiles. All keys are computed, as with mass_tolerance=0, since the
saving of narrow priors depends on the priors. Beside the prediction, and alone where the machine code can't be read
(V100), stands the limit: the time that the card would take if its busiest unit never idled.

Efficiency is predicted over measured time of a measured card; without one it is 1, and the times are lower bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smca_kernels.files import write_text
from smca_kernels.tools.arguments import check_output_files, check_packages
from smca_kernels.tools.cost.architectures import ARCHITECTURES

from . import limits, report, schedule
from .workloads import BOTH, FORWARD, WORKLOADS, Workload

CARDS = (70, 80, 90)  # V100, A100, H100
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# The cost report divides the count of a kernel without a loop over keys by this many keys of each query.
NOMINAL_KEYS = sum(height * width for height, width in WORKLOADS["full-b1"].spatial_shapes)

COMPUTE_ALL = ("triton-all", "triton")  # peers that compute all keys, the second one where the first was not measured

Cost = dict[str, Any]  # a row of `smca cost --json`


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step: of its kernels, None where these can't be counted, and at the card's limit."""

    card: int
    workload: str
    step: str
    kernels: float | None
    limit: float


def kernel_seconds(cost: Cost, workload: Workload, multiprocessors: int | None = None) -> float:
    """Seconds of one kernel at efficiency 1.

    Args:
        cost: its row of the cost report.
        workload: shapes of the inputs.
        multiprocessors: SMs of the card; None: those of the product in the report.
    """
    from smca_kernels.backends.triton import launch

    card, constants = ARCHITECTURES[int(cost["arch"][3:])], cost["constexprs"]
    sms = multiprocessors or card.multiprocessors
    cycles = card.multiprocessors * card.clock_hz / cost["predicted_elements_per_second"]
    block_n = constants["BLOCK_N"]
    blocks = -(-workload.queries // block_n)
    images = workload.batch * workload.heads
    if "KEYS" not in constants:
        programs, elements = images * blocks, float(block_n * NOMINAL_KEYS)
    else:
        size = constants["KEYS"]
        tiles = sum(-(-h * w // size) for image in workload.valid_shapes for h, w in image)
        whole = sum(-(-h * w // size) for h, w in workload.spatial_shapes)
        if "key_major" in cost["kernel"]:
            programs, elements, trips = workload.heads * tiles, float(blocks * block_n * size), blocks
        else:
            programs, elements, trips = images * blocks, tiles / workload.batch * size * block_n, whole
        splits = launch.splits_of(programs, trips, int(cost.get("blocks_per_sm") or 1), sms)
        programs, elements = programs * splits, elements / splits
    rounds = -(-programs // sms)
    return rounds * elements * cycles / card.clock_hz


def predict(
    costs: Sequence[Cost], workload: Workload, dtype: str, arch: int, sms: int | None = None
) -> list[Prediction]:
    """Predict both steps of a workload on a card at efficiency 1."""
    wanted = (f"sm_{arch}", DTYPES[dtype], workload.head_dim)
    kernels = [
        row
        for row in costs
        if (row["arch"], row["dtype"], row["head_dim"]) == wanted and not row["kernel"].endswith(" total")
    ]
    found = []
    for step, passes in limits.STEPS.items():
        rows = [row for row in kernels if row["pass"] in passes]
        counted = {row["pass"] for row in rows} == set(passes)
        counted = counted and all(row["predicted_elements_per_second"] for row in rows)
        seconds = sum(kernel_seconds(row, workload, sms) for row in rows) if counted else None
        rate = limits.elements_per_second(ARCHITECTURES[arch], step, dtype, workload.head_dim)
        found.append(Prediction(arch, workload.name, step, seconds, workload.elements / rate))
    return found


@dataclass(frozen=True)
class Fit:
    """Comparison of a measured card with its own prediction: median efficiency of each step, and all times."""

    card: str
    dtype: str
    efficiency: dict[str, float]
    times: dict[tuple[str, str], tuple[float, float]]  # (workload, step): predicted at efficiency 1, measured


def fit(measured: dict[str, Any], costs: Sequence[Cost], dtype: str) -> Fit:
    """Find the efficiency of the card that a run of `smca bench` was made on.

    Raises:
        ValueError: if the run isn't from a GPU that `smca cost` knows, or has no times of ours to compare.
    """
    facts = measured["environment"]
    arch = int("".join(re.findall(r"\d+", facts.get("capability", "")) or ["0"]))
    if facts["device"] != "cuda" or arch not in ARCHITECTURES:
        raise ValueError(f"--measured must be a run on a GPU that smca cost knows, got one on {facts.get('name')}")
    sms = int(facts["multiprocessors"])
    table = report.Table(measured)
    times: dict[tuple[str, str], tuple[float, float]] = {}
    for name, workload in WORKLOADS.items():
        for prediction in predict(costs, workload, dtype, arch, sms):
            values = (table.work_time(name, prediction.step, dtype, peer) for peer in COMPUTE_ALL)
            value = next((value for value in values if value is not None), None)
            if value is not None and prediction.kernels is not None:
                times[name, prediction.step] = prediction.kernels, value / 1e3
    efficiency = {}
    for step in (FORWARD, BOTH):
        ratios = [predicted / taken for (_, other), (predicted, taken) in times.items() if other == step]
        if not ratios:
            raise ValueError(f"--measured has no {step} times of triton in {dtype} to compare predictions with")
        efficiency[step] = statistics.median(ratios)
    return Fit(facts["name"], dtype, efficiency, times)


def markdown(predictions: Sequence[Prediction], dtype: str, fitted: Fit | None, triton: str) -> str:
    """Format the predictions as a Markdown table, and how well they fit on a measured card."""
    lines = [f"# Predicted times of the Triton kernels, {dtype}", ""]
    if fitted is None:
        lines += ["**Predicted, on none of these cards measured.** No GPU has been measured: efficiency is taken as 1."]
        lines += ["Read these as lower bounds where all keys are computed: no latency, memory or launching is in them."]
    else:
        shares = ", ".join(f"{100 * value:.0f} % in {step}" for step, value in fitted.efficiency.items())
        lines += [f"**Predicted.** The efficiency is that measured on {fitted.card}: {shares}."]
    lines += [
        f"Kernels: counted instructions, Triton {triton}. Limit: the busiest unit of the card never idles. ms.",
        "",
    ]
    cards = list(dict.fromkeys(prediction.card for prediction in predictions))
    headings = ["workload", "step"]
    for arch in cards:
        headings += [f"{ARCHITECTURES[arch].product}, kernels", "limit"]
    rows: dict[tuple[str, str], list[str]] = {}
    for prediction in predictions:
        share = 1.0 if fitted is None else fitted.efficiency[prediction.step]
        cells = rows.setdefault((prediction.workload, prediction.step), [])
        cells.append("–" if prediction.kernels is None else f"{1e3 * prediction.kernels / share:.3g}")
        cells.append(f"{1e3 * prediction.limit:.3g}")
    lines += [f"| {' | '.join(headings)} |", f"|---|---|{'---:|' * 2 * len(cards)}"]
    lines += [f"| {workload} | {step} | {' | '.join(cells)} |" for (workload, step), cells in rows.items()]
    lines += ["", "–: the machine code of this card can't be read here; smca_attention takes the sdpa backend there."]
    if fitted is not None:
        lines += ["", f"## Fit on {fitted.card}", "", "| workload | step | predicted, ms | measured, ms | ratio |"]
        lines += ["|---|---|---:|---:|---:|"]
        for (workload, step), (predicted, taken) in fitted.times.items():
            seconds = predicted / fitted.efficiency[step]
            lines.append(f"| {workload} | {step} | {1e3 * seconds:.3g} | {1e3 * taken:.3g} | {seconds / taken:.2f} |")
        errors = [abs(math.log(p / fitted.efficiency[step] / t)) for (_, step), (p, t) in fitted.times.items()]
        lines += ["", f"Half of the predictions are within {100 * math.expm1(statistics.median(errors)):.0f} %."]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca predict`."""
    parser.description = (
        "Times of every workload on V100, A100 and H100, predicted from the compiled kernels and the cards' limits, "
        "with the efficiency that a measured card reached if --measured gives one."
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="rows of `smca cost --json`; default: compile now")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="JSON of `smca bench` on a GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument(
        "--schedule", action="store_true",
        help="instead: how the programs of each kernel fill A100 and H100 at batch sizes 1 to 16, simulated",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --schedule: write its rows there")


def run(args: argparse.Namespace) -> int:
    """Run `smca predict`: print the table.

    Raises:
        ValueError: without Triton, and for files that can't be read or lack what is needed.
    """
    check_packages(("triton",), "triton")
    check_output_files({"--out": args.out, "--json": args.json})
    measured = None if args.measured is None else report.load(args.measured)
    if args.cost is not None:
        try:
            costs = json.loads(args.cost.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--cost {args.cost} can't be read as a cost report: {error}") from None
    else:
        from smca_kernels.tools.cost.report import compile_report

        head_dims = sorted({workload.head_dim for workload in WORKLOADS.values()})
        combinations = [(arch, DTYPES[args.dtype], d) for arch in CARDS if arch >= 80 for d in head_dims]
        costs = compile_report(combinations)
        if args.schedule:
            costs += compile_report(combinations, module="smca_kernels.tools.cost.plain")
    if args.schedule:
        fillings = schedule.fill_cards(costs, DTYPES[args.dtype])
        text = schedule.markdown(fillings, args.dtype, costs[0]["triton"])
        if args.json is not None:
            write_text(args.json, json.dumps([asdict(each) for each in fillings], indent=1) + "\n")
        print(text)
        if args.out is not None:
            write_text(args.out, text)
        return 0
    fitted = None if measured is None else fit(measured, costs, args.dtype)
    predictions = [
        prediction
        for workload in WORKLOADS.values()
        for arch in CARDS
        for prediction in predict(costs, workload, args.dtype, arch)
    ]
    text = markdown(predictions, args.dtype, fitted, costs[0]["triton"] if costs else "–")
    print(text)
    if args.out is not None:
        write_text(args.out, text)
    return 0
