"""Moving extents from one open file to another at equal offsets, in chunks.

The kernel copies where it can (copy_file_range); between file systems of different kinds, such as
tmpfs and ext4, bytes go through a buffer of this process.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forkpointd.images import syscalls
from forkpointd.images.errors import ImageError, Stopped
from forkpointd.images.extents import Extents, find_extents
from forkpointd.model import MIB

CHUNK_BYTES = 4 * MIB
"""Between two calls of `gate`: some milliseconds of copying on an ordinary disk."""

BUFFER_BYTES = MIB // 2
"""What is read stays in the processor's cache until it is written: 50 MiB from tmpfs to ext4, in
chunks of 4 MiB, took 100 ms through a buffer of 4 MiB, and 66 to 72 through one of 256 KiB to
1 MiB."""

CHUNK_EXTENTS = 256
"""The same for scattered pages, each of which costs as much as many bytes in a row."""

WRITEBACK_RUN_BYTES = 256 * 1024
"""Runs from this size on are given to the disk at once: a copy and its fsync took a quarter less
time together. For scattered pages it cost more than it gave."""

CHUNKS_BEHIND = 4
"""The disk has so many chunks to write at a time where they are dropped behind."""

_NO_COPY_FILE_RANGE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}
)

Progress = Callable[[int], None]
ShouldStop = Callable[[], bool]
Gate = Callable[[], None]
Piece = tuple[int, int]
"""Offset and length of an extent, or of a part of one."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What the caller wants to be asked and told between chunks."""

    progress: Progress
    should_stop: ShouldStop
    gate: Gate
    chunk_bytes: int
    drop_behind: bool = False
    """Take what was copied out of the page cache again: it would push out what guests use."""

    def before_chunk(self) -> None:
        """Holds still as long as the gate wants; raises Stopped."""
        self.gate()
        if self.should_stop():
            raise Stopped


# --- files that know their path ----------------------------------------------------------------


class OpenFile:
    """An open regular file that knows its path. A context manager; a file that was made for the
    `with` block is unlinked again if the block fails."""

    def __init__(self, path: Path, fd: int, *, made: bool) -> None:
        self.path = path
        self.fd = fd
        self._made = made

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self.fd)
        if error is not None and self._made:
            self.path.unlink(missing_ok=True)

    @property
    def size_bytes(self) -> int:
        """Its size as of now."""
        return os.fstat(self.fd).st_size

    def data(self) -> Extents:
        """Its data (`find_extents`). Raises OSError with the path."""
        try:
            return find_extents(self.fd, self.size_bytes)
        except OSError as error:
            raise self.named(error) from error

    def resize(self, size_bytes: int) -> None:
        """Cuts it, or makes it longer by a hole."""
        try:
            syscalls.ftruncate(self.fd, size_bytes)
        except OSError as error:
            raise self.named(error) from error

    def is_at(self, path: Path) -> bool:
        """Whether `path` is a name of this file."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(path))
        except FileNotFoundError:
            return False

    def named(self, error: OSError) -> OSError:
        """The same error with this path."""
        return OSError(error.errno, error.strerror, str(self.path))


def open_file(path: Path, flags: int) -> OpenFile:
    """An existing regular file. Raises ImageError for anything else, OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path} is not a regular file")
    return OpenFile(path, fd, made=False)


def create_file(path: Path) -> OpenFile:
    """A new file, private to this user. Raises FileExistsError, OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return OpenFile(path, os.open(path, flags, 0o600), made=True)


@contextmanager
def replacing(source_path: Path, target_path: Path) -> Iterator[tuple[OpenFile, OpenFile]]:
    """A file, and a new one under another name, to be made of it; unlinked again if the block
    fails. What had that name is unlinked first, never written into: it may have another name.
    Raises ImageError where both names are one file, OSError."""
    with open_file(source_path, os.O_RDONLY) as source:
        if source.is_at(target_path):
            raise ImageError(f"{target_path} is {source_path} itself")
        target_path.unlink(missing_ok=True)
        with create_file(target_path) as target:
            yield source, target


# --- moving ------------------------------------------------------------------------------------


def move(source: OpenFile, target: OpenFile, extents: Extents, steps: Steps) -> int:
    """Moves extents, chunk by chunk, by the best way that works between these two files; returns
    their bytes. Raises Stopped, ImageError (the source is cut), OSError with the path."""
    moved = 0
    by_kernel = True
    buffer: memoryview | None = None
    behind: deque[list[Piece]] = deque()
    for chunk, count in chunks(extents, steps.chunk_bytes):
        steps.before_chunk()
        if by_kernel:
            by_kernel = _copy_by_kernel(source, target, chunk)
        if not by_kernel:
            if buffer is None:
                length = min(BUFFER_BYTES, steps.chunk_bytes)
                buffer = memoryview(mmap.mmap(-1, length))  # page-aligned
            _copy_by_buffer(source, target, chunk, buffer)
        start_writeback(target, chunk)
        moved += count
        if steps.drop_behind:
            behind.append(chunk)
            if len(behind) > CHUNKS_BEHIND:
                leave_cache((source, target), behind.popleft())
        steps.progress(count)
    for chunk in behind:
        leave_cache((source, target), chunk)
    return moved


def chunks(extents: Extents, chunk_bytes: int) -> Iterator[tuple[list[Piece], int]]:
    """Cuts extents into chunks of at most `chunk_bytes` and CHUNK_EXTENTS, with their bytes."""
    for first in range(0, len(extents), CHUNK_EXTENTS):
        several = extents[first : first + CHUNK_EXTENTS]
        count = sum(several.lengths)
        if count <= chunk_bytes:
            yield list(several.pairs()), count
        else:
            yield from _cut(several, chunk_bytes)


def _cut(extents: Extents, chunk_bytes: int) -> Iterator[tuple[list[Piece], int]]:
    chunk: list[Piece] = []
    room = chunk_bytes
    for offset, length in extents.pairs():
        left = length
        while left > room:
            if room:
                chunk.append((offset + length - left, room))
            yield chunk, chunk_bytes
            left -= room
            chunk, room = [], chunk_bytes
        chunk.append((offset + length - left, left))
        room -= left
    yield chunk, chunk_bytes - room


def _copy_by_kernel(source: OpenFile, target: OpenFile, chunk: list[Piece]) -> bool:
    """copy_file_range; False where it doesn't work between these files (the chunk is then to be
    copied again by other means, which does no harm)."""
    copy, from_fd, to_fd = syscalls.copy_file_range, source.fd, target.fd
    for offset, length in chunk:
        done = 0
        while done < length:
            at = offset + done
            try:
                count = copy(from_fd, to_fd, length - done, at, at)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in _NO_COPY_FILE_RANGE:
                    return False
                raise target.named(error) from error
            if not count:
                raise _ended_early(source, at)
            done += count
    return True


def _copy_by_buffer(
    source: OpenFile, target: OpenFile, chunk: list[Piece], buffer: memoryview
) -> None:
    """Reads and writes each extent. Reading near ones together, with the holes between them, was
    tried: tmpfs takes longer to make up a page of a hole than a call of its own takes."""
    for offset, length in chunk:
        for at in range(offset, offset + length, len(buffer)):
            span = buffer[: offset + length - at]
            read_all(source, span, at)
            write_all(target, span, at)


def read_all(source: OpenFile, span: memoryview, offset: int) -> None:
    """Fills `span` from `offset` on. Raises ImageError (it ends there), OSError with its path."""
    done = 0
    while done < len(span):
        try:
            count = syscalls.preadv(source.fd, [span[done:] if done else span], offset + done)
        except OSError as error:
            raise source.named(error) from error
        if not count:
            raise _ended_early(source, offset + done)
        done += count


def write_all(target: OpenFile, span: memoryview, offset: int) -> None:
    """Writes `span` at `offset`. Raises OSError with the target's path."""
    done = 0
    while done < len(span):
        try:
            done += syscalls.pwrite(target.fd, span[done:] if done else span, offset + done)
        except OSError as error:
            raise target.named(error) from error


def start_writeback(target: OpenFile, chunk: list[Piece]) -> None:
    """Lets the disk begin with the long runs of a chunk. Raises OSError with the path."""
    try:
        for offset, length in chunk:
            if length >= WRITEBACK_RUN_BYTES:
                syscalls.start_writeback(target.fd, offset, length)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise target.named(error) from error


def leave_cache(files: Iterable[OpenFile], chunk: list[Piece]) -> None:
    """Takes a chunk of some files out of the page cache. Raises OSError with the path."""
    start, end = chunk[0][0], chunk[-1][0] + chunk[-1][1]
    for file in files:
        try:
            syscalls.leave_cache(file.fd, start, end - start)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise file.named(error) from error


def _ended_early(source: OpenFile, offset: int) -> ImageError:
    return ImageError(f"{source.path} ended at byte {offset}, within an extent: it was cut")
