"""The files that the command line writes archives to and reads them from."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

STANDARD = "-"


@contextmanager
def archive_to(name: str) -> Iterator[BinaryIO]:
    """A file to write to, which has its name when the block ends well, and is gone else (Ctrl-C
    too); "-" is standard output. Raises ValueError with what is wrong with the name, the disk, or a
    terminal that would show it."""
    if name == STANDARD:
        if sys.stdout.isatty():
            raise ValueError(
                "an archive is not for a terminal: give a file with -o FILE, or redirect the output"
            )
        with _told("standard output"):
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        return
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    with _told(name):
        fd, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise


@contextmanager
def archive_from(name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read, and its size; 0 where that isn't known. "-" is standard input. Raises
    ValueError with what is wrong."""
    if name == STANDARD:
        if sys.stdin.isatty():
            raise ValueError("an archive is not typed in: give its file, or redirect the input")
        with _told("standard input"):
            yield sys.stdin.buffer, 0
        return
    with _told(name), open(name, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the operating system says, as the command line says it. Errors of calls are left."""
    try:
        yield
    except TimeoutError:  # DeadlineExceeded is one too
        raise
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
