"""The cost report as text: a line per kernel, its schedule, notes, totals, waits and whole programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smca_kernels.tools.cost.machine_code import CLASSES
from smca_kernels.tools.cost.report import DTYPES, Row

_COLUMNS: tuple[tuple[str, str, str], ...] = (  # heading, key, format
    ("kernel", "kernel", "<22"),
    ("arch", "arch", "<6"),
    ("dtype", "dtype", "<5"),
    ("D", "head_dim", ">3"),
    ("regs", "registers", ">4"),
    ("spill", "spill_bytes", ">5"),
    ("local", "local_bytes", ">5"),
    ("shared", "shared_bytes", ">6"),
    ("warps", "resident_warps", ">5"),
    *((name[:6], name, ">6.2f") for name in CLASSES),
    ("total", "instructions_per_element", ">6.2f"),
    ("bound by", "bound_by", "<8"),
    ("ceiling", "predicted_elements_per_second", ">7.0f"),  # G/s
)


_SCHEDULE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    *_COLUMNS[:4],
    ("blocks", "blocks_per_sm", ">6"),
    ("warps", "num_warps", ">5"),
    ("cycles", "cycles_per_trip", ">7.0f"),
    ("elements", "elements_per_trip", ">8.0f"),
    ("el/cycle", "elements_per_cycle", ">8.2f"),
    ("G/s", "elements_per_second", ">6.0f"),
    ("ceiling", "predicted_elements_per_second", ">7.0f"),
    ("issue", "issue_share", ">5.2f"),
    ("start", "start_cycles", ">6.0f"),
    ("scale", "scale_cycles", ">6.0f"),
    ("bound by", "scheduled_bound_by", "<13"),
    ("ptxas", "ptxas_warnings", "<6"),
)
SCHEDULE_HEADING = (
    "Simulated: cycles of a trip of all blocks that fit an SM, elements of a block's trip, 10⁹ elements a second"
)


def format_table(rows: Sequence[Row]) -> str:
    """The report as text: a line per kernel, notes and errors, then a line per pass and architecture."""
    lines = _table(_COLUMNS, rows)
    lines += ["", SCHEDULE_HEADING]
    lines += _table(_SCHEDULE_COLUMNS, [row for row in rows if row["elements_per_second"]])
    notes: dict[str, list[str]] = {}
    for row in rows:
        if not row["kernel"].endswith(" total"):
            name = f"{row['kernel']} {row['arch']} {row['dtype']} {row['head_dim']}"
            messages = [row[key] for key in ("note", "schedule_note", "ptxas_note")] + (row["ptxas_warnings"] or [])
            for message in messages:
                if message:
                    notes.setdefault(message, []).append(name)
            if row["error"]:
                notes.setdefault("ERROR " + row["error"], []).append(name)
    lines += [f"\n{note}\n    {', '.join(names)}" for note, names in notes.items()]
    lines.append("\nInstructions per attention element, all kernels of a pass together:")
    for (pass_, arch), totals in _totals(rows).items():
        lines.append(f"{pass_:<16} {arch:<6} " + ", ".join(f"{name} {value}" for name, value in totals))
    return "\n".join(lines)


def _table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Row]) -> list[str]:
    lines = [" ".join(f"{heading:{spec.split('.')[0]}}" for heading, _, spec in columns).rstrip()]
    for row in rows:
        cells = []
        for _, key, spec in columns:
            value = row[key]
            if value is not None and key.endswith("elements_per_second"):
                value /= 1e9
            if key == "ptxas_warnings" and value is not None:
                value = " ".join(sorted({warning.split(":")[0] for warning in value})) or "none"
            cells.append(f"{'-':{spec.split('.')[0]}}" if value is None else f"{value:{spec}}")
        lines.append(" ".join(cells).rstrip())
    return lines


def format_timeline(rows: Sequence[Row], shortest: float) -> str:
    """List where the warps of each kernel wait, instructions of `shortest` cycles per trip and more."""
    lines: list[str] = []
    for row in rows:
        if row["waits"]:
            trip = f"{row['cycles_per_trip']:.0f} cycles a trip of {row['blocks_per_sm']} blocks"
            lines.append(f"\n{row['kernel']} {row['arch']} {row['dtype']} {row['head_dim']}: {trip}")
            for wait in row["waits"]:
                if wait["cycles"] >= shortest:
                    cause = f"{wait['reason']} {wait['producer']}".strip()
                    lines.append(f"{wait['cycles']:7.0f}  {cause:<44} {wait['source']:<22} {wait['instruction']}")
    return "\n".join(lines) if lines else "\nno kernel was scheduled"


def format_programs(rows: Sequence[Row], trips: Sequence[int]) -> str:
    """List the cycles of whole programs that make `trips` trips of the loop over tiles, scale by scale."""
    lines = [f"\nCycles of one program, beside as many as fit the SM, with {' + '.join(map(str, trips))} trips:"]
    for row in rows:
        if row["start_cycles"] and not row["kernel"].endswith(" total"):
            scales = len(trips) * row["scale_cycles"]
            loop = sum(trips) * row["cycles_per_trip"]
            name = f"{row['kernel']} {row['arch']} {row['dtype']} {row['head_dim']}"
            total = row["start_cycles"] + scales + loop
            parts = f"start {row['start_cycles']:.0f}, scales {scales:.0f}, trips {loop:.0f}"
            lines.append(f"{name:<40} {total:9.0f} = {parts}")
    return "\n".join(lines)


def _totals(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    totals: dict[tuple[str, str, str, int], Row] = {}
    for row in rows:  # a pass's total row follows its kernels
        totals[row["pass"], row["arch"], row["dtype"], row["head_dim"]] = row
    lines: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (pass_, arch, dtype, head_dim), row in sorted(totals.items(), key=lambda item: _footer_order(*item[0])):
        value = row["instructions_per_element"]
        cell = (f"{dtype}/{head_dim}", "-" if value is None else f"{value:.2f}")
        lines.setdefault((pass_, arch), []).append(cell)
    return lines


def _footer_order(pass_: str, arch: str, dtype: str, head_dim: int) -> tuple[Any, ...]:
    return (
        not pass_.endswith("forward"),
        pass_.startswith("planned"),
        int(arch.removeprefix("sm_")),
        DTYPES.index(dtype),
        head_dim,
    )
