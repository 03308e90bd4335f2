"""The best weights of a run, by AP, and whether it has got no better for long enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this needs the packages of the `model` extra, which `smca train --help` does without
    from ..detector import SMCA

BEST_FILE = "best.safetensors"


class Best:
    """The best weights of a run, in a file that also records how good they are: nothing else is asked for that.

    Args:
        folder: of the run.
        evaluations: its evaluations so far, with `step`, `epoch` and `AP`.
        resumed: whether the run goes on; a new one removes a file that is there.

    Attributes:
        evaluation: step, epoch and AP of the best weights; empty before there are any.
        waited: evaluations since then.

    Raises:
        ValueError: for a file that is damaged.
        OSError: with the file's name, when it can't be removed.
    """

    def __init__(self, folder: Path, evaluations: Sequence[dict[str, float]], resumed: bool) -> None:
        from ..weights import read_evaluation

        self.path = folder / BEST_FILE
        if not resumed:
            self.path.unlink(missing_ok=True)
        found = read_evaluation(self.path) if self.path.exists() else {}
        self.evaluation: dict[str, float] = {name: found[name] for name in ("step", "epoch", "AP") if name in found}
        if 0 < len(self.evaluation) < 3:
            raise ValueError(f"{self.path} is damaged: its evaluation must have step, epoch and AP, got {found}")
        self.waited = sum(line["step"] > self.evaluation.get("step", -1) for line in evaluations)

    def update(self, model: SMCA, classes: Sequence[str], evaluation: dict[str, float]) -> None:
        """Take note of an evaluation, and write the weights if they are better than all before.

        Args:
            model: what was evaluated.
            classes: the name of every label in order.
            evaluation: step, epoch and AP; the same step as the best's is that one, repeated.

        Raises:
            OSError: with the file's name, when it can't be written; it then holds the best before.
        """
        from .. import weights

        again = evaluation["step"] == self.evaluation.get("step")
        if again or not self.evaluation or evaluation["AP"] > self.evaluation["AP"]:
            weights.save(model, self.path, classes, evaluation)
            self.evaluation, self.waited = evaluation, 0
        else:
            self.waited += 1
