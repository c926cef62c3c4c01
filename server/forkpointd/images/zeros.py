"""Leaving zeros out of a FULL image.

Firecracker writes all of a guest's memory in a FULL window, so its file has no hole, and most of it
is zeros that the guest never touched. In an *image* a hole is zeros and nothing else, so they are
left out here: the image takes the room, and each pre-copy of it the time, of what the guest holds.
A *diff*, in which a hole means "unchanged", is never looked at like this (step 6).

Synchronous: run it in threads.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from forkpointd.images import syscalls
from forkpointd.images.copying import CopyResult
from forkpointd.images.extents import Extents
from forkpointd.images.moving import (
    CHUNK_BYTES,
    Gate,
    OpenFile,
    Piece,
    Progress,
    ShouldStop,
    Steps,
    chunks,
    leave_cache,
    open_file,
    read_all,
    replacing,
    start_writeback,
    write_all,
)
from forkpointd.model import CopyMethod

BLOCK_BYTES = 64 * 1024
"""What is left out is whole blocks: by single pages an image of scattered ones would have more
extents than it saves bytes."""

GAPS_AT_ONCE = 256
"""Between two looks whether a window is open."""

_NO_PUNCHING = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC})
"""Where no hole can be punched, or (copy on write, a full disk) not now: the zeros then stay."""


def copy_full(
    staged_path: Path,
    image_path: Path,
    *,
    progress: Progress,
    left_out: Progress,
    should_stop: ShouldStop,
    gate: Gate,
    chunk_bytes: int = CHUNK_BYTES,
    drop_behind: bool = False,
) -> CopyResult:
    """Makes `image_path` equal to the memory file of a FULL window, with holes for its zeros.

    `progress` counts bytes that were written, `left_out` those that were not. A file that was there
    under that name is unlinked first, never written into: it may have another name. Raises
    Stopped, ImageError, OSError with the path; then there is no `image_path`.
    """
    steps = Steps(progress, should_stop, gate, chunk_bytes, drop_behind)
    with replacing(staged_path, image_path) as (staged, image):
        size_bytes = staged.size_bytes
        image.resize(size_bytes)
        copied = 0
        reader = _Reader(staged, chunk_bytes)
        for chunk, count in chunks(staged.data(), chunk_bytes):
            steps.before_chunk()
            written = 0
            for offset, length in chunk:
                for run_offset, run in reader.runs(offset, length, zeros=False):
                    write_all(image, run, run_offset)
                    start_writeback(image, [(run_offset, len(run))])
                    written += len(run)
            copied += written
            if drop_behind:
                leave_cache((staged, image), chunk)
            progress(written)
            left_out(count - written)
        return CopyResult(CopyMethod.COPY, copied, size_bytes - copied, size_bytes)


def punch_between(path: Path, extents: Extents, *, should_stop: ShouldStop, gate: Gate) -> int:
    """Makes holes of what lies between the extents of a diff, which says nothing: it was allocated
    ahead of the window, and not written. Returns the bytes that were looked for, 0 where the file
    system can't. Raises Stopped, ImageError, OSError with the path; the extents stay as they are.
    """
    steps = Steps(lambda _: None, should_stop, gate, CHUNK_BYTES)
    with open_file(path, os.O_RDWR) as diff:
        gaps = []
        position = 0
        for offset, length in (*extents.pairs(), (diff.size_bytes, 0)):
            if offset > position:
                gaps.append((position, offset - position))
            position = offset + length
        punched = 0
        for first in range(0, len(gaps), GAPS_AT_ONCE):
            steps.before_chunk()
            for offset, length in gaps[first : first + GAPS_AT_ONCE]:
                try:
                    syscalls.punch_hole(diff.fd, offset, length)
                except OSError as error:
                    if error.errno in _NO_PUNCHING:
                        return punched
                    raise diff.named(error) from error
                punched += length
        return punched


def punch_zeros(
    path: Path,
    *,
    progress: Progress,
    should_stop: ShouldStop,
    gate: Gate,
    chunk_bytes: int = CHUNK_BYTES,
    drop_behind: bool = False,
) -> int:
    """Makes holes of the zeros in the memory file of a FULL window, in place; what it reads as
    stays. Returns the bytes given back, 0 where the file system can't.

    `progress` counts bytes that were looked at. Raises Stopped, ImageError, OSError with the path;
    the file is then still whole.
    """
    steps = Steps(progress, should_stop, gate, chunk_bytes, drop_behind)
    with open_file(path, os.O_RDWR) as image:
        reader = _Reader(image, chunk_bytes)
        punched = 0
        for chunk, count in chunks(image.data(), chunk_bytes):
            steps.before_chunk()
            for offset, length in chunk:
                for run_offset, run in reader.runs(offset, length, zeros=True):
                    try:
                        syscalls.punch_hole(image.fd, run_offset, len(run))
                    except OSError as error:
                        if error.errno in _NO_PUNCHING:
                            return punched
                        raise image.named(error) from error
                    punched += len(run)
            if drop_behind:
                leave_cache((image,), chunk)
            progress(count)
        return punched


class _Reader:
    """Reads a file into a buffer and tells its zeros from the rest."""

    def __init__(self, source: OpenFile, chunk_bytes: int) -> None:
        self._source = source
        # Anonymous maps are page-aligned, and the second is never written to: zeros for ever.
        self._memory = mmap.mmap(-1, chunk_bytes)
        self._buffer = memoryview(self._memory)
        self._zeros_memory = mmap.mmap(-1, chunk_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._zeros = ctypes.addressof(ctypes.c_char.from_buffer(self._zeros_memory))

    def runs(self, offset: int, length: int, *, zeros: bool) -> Iterator[tuple[int, memoryview]]:
        """The runs of blocks that are all zeros, or of those that aren't: offset in the file and
        bytes, which are valid until the next one is asked for."""
        read_all(self._source, self._buffer[:length], offset)
        for start, count in self._parts(length, zeros):
            yield offset + start, self._buffer[start : start + count]

    def _parts(self, length: int, zeros: bool) -> Iterator[Piece]:
        if self._is_zero(0, length):
            if zeros:
                yield 0, length
            return
        start: int | None = None
        for at in range(0, length, BLOCK_BYTES):
            if self._is_zero(at, min(BLOCK_BYTES, length - at)) is zeros:
                start = at if start is None else start
            elif start is not None:
                yield start, at - start
                start = None
        if start is not None:
            yield start, length - start

    def _is_zero(self, at: int, length: int) -> bool:
        return syscalls.same_bytes(self._address + at, self._zeros, length)
