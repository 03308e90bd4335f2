"""Writing a file so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def is_replaceable(path: Path) -> bool:
    """Whether a rename may put a file there: the path is free, or has a regular file that is not this process's output.

    In place of a pipe, a device or `/dev/stdout`, the new file would cut off whoever reads from them.
    """
    try:
        there = path.stat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(there.st_mode) and not any(os.path.samestat(there, own) for own in _own_output())


def _own_output() -> Iterator[os.stat_result]:
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            yield os.fstat(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder that takes the path's place if all goes well, and else vanishes.

    Its permissions are those of every new file, by the umask. Its name is no longer than the path's, or 8 characters,
    so that every name that the folder can hold can be written.

    Args:
        path: where the file is to be; its folder must exist.

    Raises:
        OSError: with the path's name, when the folder is missing, full or can't be written, and when what is there is
            no regular file.
    """
    with naming(path), _replacing(path) as temporary:
        yield temporary


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    if not is_replaceable(path):
        raise OSError(errno.EINVAL, "not a regular file, and not replaced by one")
    name = _new_file(path.absolute())
    try:
        yield name
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _new_file(path: Path) -> Path:
    """An empty file beside a path; its name is no longer than the path's unless that has less than 8 characters."""
    room = len(os.fsencode(path.name)) - 1
    while True:
        # `tempfile` makes files that nobody else can read, and os.umask can't be asked without being changed.
        name = path.with_name("." + os.urandom(8).hex()[: max(7, min(room, 16))])
        try:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return name


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by a text, as a whole.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give every OSError inside the name of the file that is written; those of writing, unlike opening, have none."""
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, OSError):  # of another file, written inside and named there
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
