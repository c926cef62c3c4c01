"""`sequential-disk`: a branch as others have published it, on plain sockets.

Pause, create and resume are three calls, each sent after the reply to the one before, and
Firecracker writes to the disk meanwhile. Then the image of the last snapshot is copied whole, holes
and all, the diff is laid over the copy, and that is fsynced. In FULL the file that Firecracker
wrote is the image.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 8 << 20


def copy_whole(source: Path, target: Path) -> int:
    """Copies a file to a new one that has no hole; returns the number of bytes."""
    with source.open("rb") as opened, target.open("xb") as made:
        size = os.fstat(opened.fileno()).st_size
        _copy(opened.fileno(), made.fileno(), 0, size)
    return size


def lay_over(diff: Path, image: Path) -> int:
    """Writes the data of a sparse file over an image of the same size, and fsyncs the image;
    returns the number of bytes. Raises ValueError where the sizes differ."""
    written = 0
    with diff.open("rb") as opened, image.open("r+b") as target:
        size = os.fstat(opened.fileno()).st_size
        if os.fstat(target.fileno()).st_size != size:
            raise ValueError(f"{image} has another size than {diff}")
        for start, end in _extents(opened.fileno(), size):
            _copy(opened.fileno(), target.fileno(), start, end)
            written += end - start
        os.fsync(target.fileno())
    return written


def fsync(path: Path) -> None:
    """Brings a file to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after this
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _copy(source: int, target: int, start: int, end: int) -> None:
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        sent = os.sendfile(target, source, start, min(PIECE_BYTES, end - start))
        if not sent:
            raise OSError(f"the file ended at {start} instead of {end}")
        start += sent
