"""Files with holes, by the bench's own means: nothing of this is shared with the server."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 8 << 20
FICLONE = 0x40049409
"""linux/fs.h"""


def data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each part of a file that is no hole."""
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


def copy_extent(source: int, target: int, start: int, end: int) -> None:
    """Copies a part of a file to the same place of another. Raises OSError."""
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        sent = os.sendfile(target, source, start, min(PIECE_BYTES, end - start))
        if not sent:
            raise OSError(f"the file ended at {start} instead of {end}")
        start += sent


def clone(source: int, target: int) -> None:
    """Lets a file share all blocks of another. Raises OSError."""
    fcntl.ioctl(target, FICLONE, source)


def fsync(path: Path) -> None:
    """Brings a file to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocated_bytes(folder: Path) -> int:
    """Blocks of all that lies in a folder and below, in bytes. What goes away meanwhile counts
    nothing."""
    found = 0
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                found += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return found
