"""Checks that commands share, made before any work: files to write, packages to import, the device to run on.

Also which errors mean that memory is lacking, and the line of another library's error that messages quote.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smca_kernels.files import is_replaceable

if TYPE_CHECKING:
    import torch

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# In messages of torch, of its allocator on the CPU, of cuBLAS, and of cuDNN.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "unable to find an engine")


def check_output_file(option: str, path: Path | None) -> None:
    """Check that an option's file can be written: a regular one or a new one, in a folder that exists. None is no file.

    Raises:
        ValueError: naming the option and the path.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{option} must name a file in an existing folder, got {path}")
    if not is_replaceable(path):
        raise ValueError(f"{option} must name a regular file or a new one, no pipe, device or stream, got {path}")


def check_output_files(paths: Mapping[str, Path | None]) -> None:
    """Check the files of several options as `check_output_file` does, and that each is another.

    Raises:
        ValueError: naming an option and its path.
    """
    options: dict[Path, str] = {}
    for option, path in paths.items():
        check_output_file(option, path)
        if path is None:
            continue
        other = options.setdefault(path.absolute().parent.resolve() / path.name, option)  # a link itself is replaced
        if other != option:
            raise ValueError(f"{option} must name another file than {other}, got {path}")


def make_folder(option: str, path: Path) -> None:
    """Make an option's folder, with those above it, unless it is there.

    Raises:
        ValueError: naming the option and the path, when it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} must be a folder that can be written, got {path} ({error})") from None


@contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Name a command's option where an error is of `path`, the argument that it is handed on as."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub("^path must ", f"{option} must ", str(error))) from error


def check_packages(modules: Iterable[str], extra: str) -> None:
    """Check that modules can be imported, without importing them.

    Args:
        modules: names as in an import statement.
        extra: extras of smca_kernels that install them, e.g. "model" or "model,demo".

    Raises:
        ValueError: naming the missing distributions and the command that installs them.
    """
    missing = [DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'smca_kernels[{extra}]'")


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of that name, or, if None, the first GPU if there is one and else the CPU.

    Raises:
        ValueError: for a name that torch doesn't know or a device that is not there.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise ValueError(f"--device {name} can't be used: it has shapes, but no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} can't be used: {first_line(error)}") from None
    return device


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or, where there is none, the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is lacking; of torch's, torch.OutOfMemoryError is not the only one."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)
