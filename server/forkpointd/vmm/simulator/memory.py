"""Guest memory: one sparse private mapping, and a dirty log of one byte a 4 KiB page.

Offsets are those of a memory file: where the guest has a gap for devices below 4 GiB its regions
lie back to back, here and in the file alike. Only the guest thread writes, and only while the
machine runs; the API thread reads it while the machine is paused. So there is no lock.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from typing import Final

PAGE_BYTES: Final = 4096
WORDS_PER_PAGE: Final = PAGE_BYTES // 8
_GAP_BEGIN_BYTES: Final = 3328 << 20  # 3.25 GiB, Firecracker 1.12
_GAP_END_BYTES: Final = 4 << 30
_WRITE_BYTES: Final = 1 << 30  # one write(2) takes less than 2 GiB
_MAP_NORESERVE: Final = 0x4000  # in Python's mmap only from 3.12 on

Region = tuple[int, int]
"""Guest-physical address and size, both in bytes."""


def regions(size_bytes: int) -> list[Region]:
    """How a guest of this size sees its memory."""
    if size_bytes <= _GAP_BEGIN_BYTES:
        return [(0, size_bytes)]
    return [(0, _GAP_BEGIN_BYTES), (_GAP_END_BYTES, size_bytes - _GAP_BEGIN_BYTES)]


class GuestMemory:
    """The memory of one machine. `tracked` says whether a dirty log is kept."""

    def __init__(self, mapping: mmap.mmap, *, tracked: bool) -> None:
        self.size_bytes: Final = len(mapping)
        self.pages: Final = self.size_bytes // PAGE_BYTES
        self.tracked: Final = tracked
        self.bytes: Final = memoryview(mapping)
        self.words: Final = self.bytes.cast("Q")
        self._dirty = bytearray(self.pages if tracked else 0)

    @classmethod
    def anonymous(cls, size_bytes: int, *, tracked: bool) -> GuestMemory:
        """Zeros, of which only what is touched costs anything. Raises OSError."""
        try:
            mapping = mmap.mmap(
                -1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            )
        except OverflowError as error:
            raise OSError(errno.ENOMEM, "too large for this machine") from error
        mapping.madvise(mmap.MADV_NOHUGEPAGE)  # a touched page costs a page
        return cls(mapping, tracked=tracked)

    @classmethod
    def of_file(cls, path: str, size_bytes: int, *, tracked: bool) -> GuestMemory:
        """A memory file, mapped privately: what the guest writes never reaches the file.

        Raises OSError where it can't be opened, ValueError where it is too short.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapping = mmap.mmap(
                fd,
                size_bytes,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(fd)
        return cls(mapping, tracked=tracked)

    # --- writing: the guest, and the loader before it runs ------------------------------------

    def mark(self, first_page: int, count: int) -> None:
        """Enters pages in the dirty log."""
        if self.tracked:
            self._dirty[first_page : first_page + count] = b"\x01" * count

    def write(self, offset: int, data: bytes) -> None:
        """Puts bytes at an offset, and the pages they lie in into the dirty log."""
        if not data:
            return
        self.bytes[offset : offset + len(data)] = data
        first = offset // PAGE_BYTES
        self.mark(first, (offset + len(data) - 1) // PAGE_BYTES - first + 1)

    # --- the dirty log -------------------------------------------------------------------------

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        """Runs of dirty pages as [first, end), ascending."""
        log, end = self._dirty, 0
        while (first := log.find(1, end)) >= 0:
            end = log.find(0, first)
            if end < 0:
                end = self.pages
            yield first, end

    def clear_dirty(self) -> None:
        """Empties the dirty log."""
        self._dirty = bytearray(len(self._dirty))

    # --- writing it to a file ------------------------------------------------------------------

    def dump(self, fd: int, runs: Iterator[tuple[int, int]]) -> None:
        """Writes runs of pages to their places in the file. Raises OSError."""
        for first, end in runs:
            at, stop = first * PAGE_BYTES, end * PAGE_BYTES
            while at < stop:
                at += os.pwrite(fd, self.bytes[at : min(stop, at + _WRITE_BYTES)], at)

    def everything(self) -> Iterator[tuple[int, int]]:
        """All pages as one run."""
        yield 0, self.pages


def limited(runs: Iterator[tuple[int, int]], pages: int) -> Iterator[tuple[int, int]]:
    """The first so many pages of these runs."""
    for first, end in runs:
        if pages <= 0:
            return
        yield first, min(end, first + pages)
        pages -= end - first
