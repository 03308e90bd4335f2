"""A training run's state in one file: whatever the rest of the run depends on."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch

from smca_kernels.files import replacing
from smca_kernels.tools.arguments import first_line

FORMAT = 1
NUMBER = (int, float)
PARTS: dict[str, Any] = {  # of a run's state, and their kinds
    "settings": dict,
    "facts": dict,
    "step": int,
    "seconds": NUMBER,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain Python values; whoever reads meanwhile gets the one before.

    Raises:
        OSError: with the path's name, when the folder is missing, not writable or full.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # torch's writer ends in an error of its own; the file's is the one that it came upon.
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(errno.EIO, first_line(error)) from None


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, with all tensors on the CPU.

    Raises:
        ValueError: with the path's name, when there is no such file, or it is no checkpoint of a training run, or a
            damaged one.
    """
    if not path.is_file():
        raise ValueError(f"a run to resume must have a checkpoint, but there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever unpickling a damaged file comes upon
        raise ValueError(f"{path} can't be read as a checkpoint ({first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} must be a training checkpoint of format {FORMAT}, got {found}")
    return state


def check(state: dict[str, Any], path: Path) -> None:
    """Check that a loaded checkpoint has what a run goes on from, each part of its kind.

    Raises:
        ValueError: naming the file and the part.
    """
    for name, kind in PARTS.items():
        if not isinstance(state.get(name), kind):
            found = type(state[name]).__name__ if name in state else "nothing"
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise ValueError(f"{path} is a damaged checkpoint: its {name} must be a {wanted}, got {found}")
