"""`smca train`: training/loop.py from the command line, with an option for every field of `Settings`.

smca train --data coco --out runs/smca-r50
torchrun --nproc-per-node 8 -m smca_model.train --data coco --out runs/smca-r50
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from smca_kernels.tools.arguments import check_packages

from .training import checkpoint, distributed
from .training.dry_run import dry_run, format_dry_run
from .training.engine import TrainingError
from .training.loop import train
from .training.settings import Settings
from .training.setup import check_packages_of, check_start
from .training.signals import Stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca train`: `Settings`, and what to do with them."""
    parser.description = (
        "Train a detector. One device: smca train …; eight: torchrun --nproc-per-node 8 -m smca_model.train … "
        "(batch-size is that of one device). SIGINT and SIGTERM save and stop; --resume goes on."
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its settings")
    parser.add_argument("--dry-run", action="store_true", help="report time and memory of a step, write nothing")
    for item in fields(Settings):
        argument: dict[str, Any] = dict(item.metadata)
        default = item.default
        if item.name == "pretrained_backbone" or isinstance(default, bool):
            argument["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            argument = {"nargs": "+", "type": str, **argument}
        else:
            argument["type"] = type(default)
        if default not in ("", (), None) and not isinstance(default, bool):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            argument["help"] += f"; default: {shown}"
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **argument)


def run(args: argparse.Namespace) -> int:
    """`smca train`: exit status 0; 1 for a loss that is not finite; 128 + a signal's number.

    Raises:
        ValueError: when it can't start.
        OSError: with the file's name, when one can't be written.
    """
    check_packages(("pycocotools", "safetensors", "scipy", "torchvision", "tqdm"), "model")
    given = {item.name: getattr(args, item.name) for item in fields(Settings) if hasattr(args, item.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if args.resume:
        if "out" in given:
            raise ValueError("--out can't be given with --resume: a run goes on in its own folder")
        path = Path(args.resume) / "checkpoint.pt"
        state = checkpoint.load(path)
        checkpoint.check(state, path)
        try:
            before = Settings(**state["settings"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged checkpoint: its settings can't be used ({error})") from error
        del state  # it is as large as the model, and read again by the run
        settings = replace(before, **{**given, "out": args.resume})
    else:
        absent = [name for name in ("data", *(() if args.dry_run else ("out",))) if not given.get(name)]
        if absent:
            raise ValueError(f"{' and '.join(f'--{name}' for name in absent)} must be given")
        settings = Settings(**given)
    check_packages_of(settings)
    try:
        if args.dry_run:
            if not args.resume:
                check_start(settings)
            report = dry_run(settings)
            if distributed.rank() == 0:
                print(format_dry_run(report))
            return 0
        train(settings, resume=bool(args.resume))
    except TrainingError as error:
        print(f"smca train: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if distributed.rank() == 0:  # the others can't know whether the checkpoint is there yet
            saved = (Path(settings.out) / "checkpoint.pt").exists()
            advice = f"go on with  smca train --resume {settings.out}" if saved else "before the first checkpoint"
            print(f"stopped by {stopped}; {advice}", file=sys.stderr)
        return stopped.status
    distributed.log(f"the weights are in {Path(settings.out) / 'model.safetensors'}")
    return 0


if __name__ == "__main__":  # as torchrun starts it
    from smca_kernels.tools.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
