"""The console script `smca`: a table of subcommands, each imported only when it is chosen.

A subcommand's module defines `add_arguments(parser)` and `run(args)`, which returns the exit status.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from smca_kernels import __version__
from smca_kernels.tools.arguments import first_line, is_out_of_memory

# name: (module, what it does)
COMMANDS = {
    "demo": ("smca_model.demo.command", "the layer on two photographs, and a detector trained on digits in minutes"),
    "train": ("smca_model.train", "train a detector on data in the layout of COCO, Roboflow or YOLO"),
    "eval": ("smca_model.evaluate", "COCO's average precision of trained weights"),
    "detect": ("smca_model.detect", "boxes in images, drawn, with the attention behind them"),
    "export": ("smca_model.export", "a detector as a file that runs without this library: ONNX, torch.export"),
    "presets": ("smca_model.presets", "the models of the paper: parameters and GFLOPs"),
    "data": ("smca_model.data.command", "make a small data set of real digits, or check your own"),
    "parity": ("smca_kernels.tools.parity.command", "check every backend here against PyTorch in float64"),
    "cost": ("smca_kernels.tools.cost.command", "compile the kernels without a GPU and count their instructions"),
    "bench": ("smca_benchmarks.bench_attention", "time and memory of every backend here and of its rivals"),
    "predict": ("smca_benchmarks.predict", "times of the kernels on cards that aren't here, predicted"),
    "bench-model": ("smca_benchmarks.bench_model", "detectors with naive and fused co-attention: time, memory, batch"),
    "profile": ("smca_benchmarks.profile", "what each scale of the co-attention costs, call by call"),
    "env": ("smca_kernels.tools.env", "versions, devices and the backend of each dtype, for a bug report"),
}
FULL_DISK = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no EDQUOT
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run `smca` with the given arguments (default: those of the process) and return its exit status.

    A subcommand's ValueError is printed as ``smca NAME: error: …`` with exit status 2, an error of the system (a full
    disk, say) as the same line with the file's name and exit status 1, and so is what does not fit into memory.
    Characters that the output's encoding lacks are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        # Words for people: in an encoding without × or –, a question mark is better than the end of a run.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    arguments = sys.argv[1:] if argv is None else list(argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    description = "Spatially modulated co-attention (SMCA) for DETR decoders."
    parser = argparse.ArgumentParser(prog="smca", description=description)
    parser.add_argument("--version", action="version", version=f"smca_kernels {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", dest="name", metavar="NAME", required=True)
    try:
        for name, (module_name, purpose) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=purpose, description=purpose)
            if name == chosen:
                module = import_module(module_name)
                module.add_arguments(subparser)
        args = parser.parse_args(arguments)
        status: int = module.run(args)
        sys.stdout.flush()
        return status
    except ValueError as error:
        print(f"smca {chosen}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads the output (`smca cost | head`) has had enough.
        _discard_output()
        return 1
    except OSError as error:
        if error.errno is None:  # no error of the system
            raise
        file = error.filename
        if file is None and error.errno in FULL_DISK:  # errors of files have their names
            file = "output"
            _discard_output()
        print(f"smca {chosen}: error: {f'{file}: ' if file else ''}{error.strerror}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        told = first_line(error)
        if told.startswith("DataLoader worker"):  # the system ended it
            told += "; where memory, or shared memory, is lacking, fewer --workers take less"
        elif not is_out_of_memory(error):
            raise
        print(f"smca {chosen}: error: {told}", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """Let what is still to be printed vanish, or the flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
