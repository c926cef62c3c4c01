"""`sequential-disk`: a branch as others have published it, on plain sockets.

Pause, create and resume are three calls, each sent after the reply to the one before, and
Firecracker writes to the disk meanwhile. Then the image of the last snapshot is copied whole, holes
and all, the diff is laid over the copy, and that is fsynced. In FULL the file that Firecracker
wrote is the image.
"""

from __future__ import annotations

import os
from pathlib import Path

from bench.sparse import copy_extent, data_extents


def copy_whole(source: Path, target: Path) -> int:
    """Copies a file to a new one that has no hole; returns the number of bytes."""
    with source.open("rb") as opened, target.open("xb") as made:
        size = os.fstat(opened.fileno()).st_size
        copy_extent(opened.fileno(), made.fileno(), 0, size)
    return size


def lay_over(diff: Path, image: Path) -> int:
    """Writes the data of a sparse file over an image of the same size, and fsyncs the image;
    returns the number of bytes. Raises ValueError where the sizes differ."""
    written = 0
    with diff.open("rb") as opened, image.open("r+b") as target:
        size = os.fstat(opened.fileno()).st_size
        if os.fstat(target.fileno()).st_size != size:
            raise ValueError(f"{image} has another size than {diff}")
        for start, end in data_extents(opened.fileno(), size):
            copy_extent(opened.fileno(), target.fileno(), start, end)
            written += end - start
        os.fsync(target.fileno())
    return written
