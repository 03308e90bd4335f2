"""`smca demo --serve`: a page on this machine that shows the boxes in a photograph and the attention behind each.

page.py is the page, explore.py computes what it shows. Nothing comes from or goes to anywhere else: the page listens
on 127.0.0.1 alone and has no fonts, scripts or counters of others. Photographs are deleted when the command ends.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smca_kernels.tools.arguments import check_packages, choose_device, naming_option

PACKAGES = ("gradio", "matplotlib", "safetensors", "skimage", "sklearn", "torchvision")
HOST, PORT = "127.0.0.1", 7860
SCENES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca demo` about its page."""
    group = parser.add_argument_group("page", "nothing is trained: the detector is that of an earlier run")
    group.add_argument("--serve", action="store_true", help=f"show a page to try a detector in, on {HOST}")
    group.add_argument("--port", type=int, metavar="N", help=f"of the page; default: {PORT}")
    group.add_argument("--weights", type=Path, metavar="FILE", help="the page's detector; default: the one in --out")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for options of `smca demo` that don't go together."""
    for option in ("compare", "ablations"):
        if args.serve and getattr(args, option):
            raise ValueError(f"--{option} must go without --serve, which trains nothing")
    for option in ("port", "weights"):
        if not args.serve and getattr(args, option) is not None:
            raise ValueError(f"--{option} must go with --serve, got {getattr(args, option)}")


def run(args: argparse.Namespace) -> int:
    """`smca demo --serve`: show the page until it is interrupted.

    Raises:
        ValueError: when it can't start: packages or weights are missing, the port is taken.
        KeyboardInterrupt: at the end.
    """
    check_packages(PACKAGES, "model,serve")
    port = PORT if args.port is None else args.port
    _check_port(port)
    file = args.weights or args.out / "detector" / "smca-tiny" / "model.safetensors"
    if args.weights is None and not file.is_file():
        raise ValueError(
            f"--serve needs a trained detector, and there is no {file}: run `smca demo --out {args.out}` first, which "
            "trains one in minutes, or give --weights FILE"
        )
    from .. import weights

    with naming_option("--weights"):
        model = weights.load(file)
    model = model.to(choose_device())
    with tempfile.TemporaryDirectory(prefix="smca.") as temporary, _environment(temporary):
        from .page import TITLE, build_page, launch  # gradio reads the environment

        page = build_page(model, str(file), make_examples(Path(temporary, "examples")))
        try:
            launch(page, HOST, port)
        except OSError as error:  # another program was faster
            raise _taken(port, error) from None
        print(f"{TITLE}: http://{HOST}:{port} (end with Ctrl-C)", flush=True)
        try:
            while True:
                time.sleep(3600)
        finally:
            page.close(verbose=False)


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be in 1 … 65535, got {port}")
    with socket.socket() as trial:
        if os.name != "nt":  # where it would share a port in use
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise _taken(port, error) from None


def _taken(port: int, error: OSError) -> ValueError:
    return ValueError(f"--port {port} can't be used ({error.strerror or error}): choose another")


@contextmanager
def _environment(temporary: str) -> Iterator[None]:
    """gradio's settings that are variables of the environment: where files go, no counting, no proxy to ourselves."""
    without_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST)))
    wanted = {
        "GRADIO_TEMP_DIR": str(Path(temporary, "gradio")),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "NO_PROXY": without_proxy,
        "no_proxy": without_proxy,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make_examples(folder: Path) -> list[tuple[Path, str]]:
    """Files and names of the photographs of `smca demo` and of held-out scenes of digits, written to a new folder."""
    import skimage.data
    from PIL import Image

    from ..data.digits import make_digits
    from .photographs import POINTS

    make_digits(folder, train=1, val=SCENES, progress=False)
    examples = [(file, f"digits {i + 1}") for i, file in enumerate(sorted((folder / "val").iterdir()))]
    for name in POINTS:
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
        examples.append((folder / f"{name}.png", name))
    return examples
