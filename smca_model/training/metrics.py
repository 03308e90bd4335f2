"""The numbers that a run reports: lines of JSON, which a resumed run goes on from, and loggers."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from smca_kernels.files import naming, write_text

from .loggers import Loggers


class Metrics:
    """The run's numbers as lines of metrics.jsonl and in loggers.

    Args:
        folder: of the run.
        step: of the checkpoint it goes on from; lines after it are dropped, for their steps are run again.
        loggers: what else takes the numbers.
    """

    def __init__(self, folder: Path, step: int, loggers: Loggers) -> None:
        self.path = folder / "metrics.jsonl"
        # The evaluation at the step itself is run again: it may not have come to its end.
        kept = [line for line in read_metrics(folder) if line["step"] < step + ("AP" not in line)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.loggers = loggers

    def write(self, group: str, numbers: dict[str, float]) -> None:
        """One line, of numbers by name; `step` is among them.

        Raises:
            OSError: with the file's name, when it can't be written; no part of the line is left in it. Loggers raise
                nothing.
        """
        # JSON has no infinity, which the norm of an overflown gradient in fp16 is.
        line = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        with naming(self.path):
            whole = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError:
                os.truncate(self.path, whole)
                raise
        named = {f"{group}/{name}": number for name, number in numbers.items() if name != "step"}
        self.loggers.log(int(numbers["step"]), named)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a last one that a crash cut off; those of evaluations have "AP".

    Raises:
        ValueError: with file and line, for a line that is no JSON object with a `step`, and a file that can't be read.
    """
    path = folder / "metrics.jsonl"
    try:
        texts = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror})") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError
        except ValueError:  # UnicodeDecodeError and JSONDecodeError are such
            if number == len(texts):
                break
            shown = text[:60].decode("utf-8", "backslashreplace")
            raise ValueError(
                f"{path}, line {number}: must be a JSON object with a step, got {shown!r}; "
                "take the line out, or move the file away"
            ) from None
        lines.append(line)
    return lines
