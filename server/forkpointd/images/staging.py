"""Staging: where Firecracker writes in the pause window, before it is made durable.

A staging folder is used only after a probe: a diff's holes mean "unchanged", so SEEK_DATA there
must name exactly the pages that were written, no page more and no page less. Plain tmpfs, ext4,
XFS and btrfs with blocks of 4 KiB do; tmpfs with huge pages, XFS with 16 KiB blocks and file
systems that turn written zeros into holes don't, and merged images would be wrong.

Names in it are short, since the three requests of a window must fit into 1,000 bytes together,
and a serial number is used once, ever: a stopped Firecracker may write to a name late.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forkpointd.images import syscalls
from forkpointd.images.cold_pages import warm
from forkpointd.images.errors import ImageError
from forkpointd.images.extents import PART_SUFFIX, Extent, Extents, data_extents
from forkpointd.images.moving import Gate, Progress, ShouldStop, Steps, chunks, open_file
from forkpointd.model import MIB

_PAGE = syscalls.PAGE_BYTES

# --- the probe ---------------------------------------------------------------------------------

PROBE_BYTES = 16 * MIB
"""Several huge pages of 2 MiB each."""

_PROBE_PREFIX = ".probe-"
_DATA = b"\xa5" * _PAGE
_ZEROS = bytes(_PAGE)


@dataclass(frozen=True, slots=True)
class StagingProbe:
    """Whether a folder can be used for staging."""

    ok: bool
    filesystem: str
    """For example `tmpfs`."""
    reason: str
    """Why not; empty where ok."""
    remedy: str
    """What to do about it; empty where ok."""
    bytes_checked: int
    """Size of the sparse file that was looked at."""
    pages_written: int
    preallocates: bool
    """Whether pages can be allocated ahead of the window and still read as holes."""


def probe_staging(folder: Path) -> StagingProbe:
    """Writes scattered pages (some of them zeros) to a sparse file and looks whether SEEK_DATA
    names exactly those, before and after a sync, and beside pages that are only allocated.

    Takes some milliseconds; leaves nothing. Raises OSError where the folder can't be written.
    """
    filesystem = syscalls.filesystem_of(folder)
    with _unnamed_file(folder) as fd:
        written = _write_scattered(fd)
        reason = ""
        for when in ("", " after fsync"):
            if when:
                syscalls.fsync(fd)
            reason = reason or _differs(fd, written, when)
        preallocates = False
        if not reason and _allocate_between(fd):
            preallocates = not _differs(fd, written, "")
            if not preallocates and filesystem == "tmpfs":
                reason = _differs(fd, written, " beside pages that are only allocated")
    return StagingProbe(
        ok=not reason,
        filesystem=filesystem,
        reason=reason,
        remedy=_remedy(filesystem, folder) if reason else "",
        bytes_checked=PROBE_BYTES,
        pages_written=len(written),
        preallocates=preallocates,
    )


@contextmanager
def _unnamed_file(folder: Path) -> Iterator[int]:
    fd, name = tempfile.mkstemp(prefix=_PROBE_PREFIX, dir=folder)
    try:
        os.unlink(name)
        syscalls.ftruncate(fd, PROBE_BYTES)
        yield fd
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(fd)


def _probe_pages() -> list[int]:
    """Single pages ever further apart, two beside each other, a run, the first and the last."""
    pages = {0, 5, 6, PROBE_BYTES // _PAGE - 1, *range(700, 740)}
    page, step = 11, 3
    while page < PROBE_BYTES // _PAGE:
        pages.add(page)
        page, step = page + step, step + 2
    return sorted(pages)


def _write_scattered(fd: int) -> list[int]:
    pages = _probe_pages()
    for number, page in enumerate(pages):
        content = _ZEROS if number % 4 == 1 else _DATA
        if syscalls.pwrite(fd, content, page * _PAGE) != _PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pages


def _allocate_between(fd: int) -> bool:
    """Allocates a range that has written pages in it and beside it; False where that can't be."""
    try:
        syscalls.fallocate(fd, 600 * _PAGE, 256 * _PAGE)
        syscalls.fallocate(fd, 3000 * _PAGE, 64 * _PAGE)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def _differs(fd: int, written: list[int], when: str) -> str:
    """How what SEEK_DATA names differs from what was written; empty if it doesn't."""
    try:
        found = data_extents(fd, PROBE_BYTES)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return "the file system knows no SEEK_DATA"
    if found == _runs(written):
        return ""
    pages = sum(extent.length_bytes for extent in found) / _PAGE
    return (
        f"of {len(written)} scattered pages that were written, SEEK_DATA{when} names "
        f"{pages:g} in {len(found)} runs instead of {len(_runs(written))}"
    )


def _runs(pages: list[int]) -> tuple[Extent, ...]:
    runs: list[Extent] = []
    for page in pages:
        if runs and runs[-1].end_bytes == page * _PAGE:
            runs[-1] = Extent(runs[-1].offset_bytes, runs[-1].length_bytes + _PAGE)
        else:
            runs.append(Extent(page * _PAGE, _PAGE))
    return tuple(runs)


def _remedy(filesystem: str, folder: Path) -> str:
    if filesystem == "tmpfs":
        return (
            "this tmpfs uses huge pages: mount one with huge=never (and see that "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled is not force), for example "
            f"mount -t tmpfs -o huge=never,mode=0700 tmpfs {folder}"
        )
    if filesystem == "xfs":
        return "use an XFS with blocks of 4096 bytes (mkfs.xfs -b size=4096), ext4 or btrfs"
    return "use a folder on tmpfs (huge=never), ext4, btrfs or an XFS with blocks of 4096 bytes"


# --- the area ----------------------------------------------------------------------------------

ALLOCATE_BYTES = 32 * MIB
"""Between two looks whether a window is open: some milliseconds of allocating."""

_NO_ALLOCATING = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC})

_LEFTOVER = re.compile(rf"(\d+)\.(m|v|x|x{re.escape(PART_SUFFIX)})|{re.escape(_PROBE_PREFIX)}.*")


@dataclass(frozen=True, slots=True)
class StagingNames:
    """The files of one window."""

    memory: Path
    vmstate: Path
    extents: Path


class StagingArea:
    """The staging files in one folder, by serial number. Safe to use from several threads as long
    as each serial belongs to one of them."""

    def __init__(self, root: Path, *, warms: bool = False) -> None:
        """`warms`: what is allocated ahead is touched before (`cold_pages`)."""
        self.root = root
        self._warms = warms

    def names(self, serial: int) -> StagingNames:
        """The names of one window's files, whether they exist or not."""
        if serial < 0:
            raise ValueError(f"a serial is not negative: {serial}")
        return StagingNames(
            self.root / f"{serial}.m", self.root / f"{serial}.v", self.root / f"{serial}.x"
        )

    def create(self, serial: int, memory_bytes: int) -> StagingNames:
        """Makes the sparse memory file that Firecracker writes into; it makes the vmstate itself.

        Raises ImageError if any name of this serial is in use: whoever made it may still write to
        it, so nothing is touched. OSError with the path (ENOSPC); then nothing is left.
        """
        names = self.names(serial)
        for path in (names.memory, names.vmstate, names.extents):
            if os.path.lexists(path):
                raise ImageError(f"staging serial {serial} was used before: there is {path}")
        try:
            fd = os.open(names.memory, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise ImageError(f"staging serial {serial} is used twice: {names.memory}") from error
        try:
            syscalls.ftruncate(fd, memory_bytes)
        except OSError as error:
            names.memory.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(names.memory)) from error
        finally:
            os.close(fd)
        return names

    def allocate(
        self,
        serial: int,
        extents: Sequence[Extent],
        *,
        progress: Progress,
        should_stop: ShouldStop,
        gate: Gate,
    ) -> int:
        """Gives parts of a memory file their room ahead of the window, whose writes are then 1.5 to
        8 times as fast on tmpfs (measured); returns their bytes. They still read as holes.

        For a FULL window, or for a DIFF where the probe says `preallocates`. The caller has
        reserved the room. Where there is none (ENOSPC) or the file system can't, the rest is left
        out: it is a help, and not needed. Raises Stopped, OSError with the path.
        """
        steps = Steps(progress, should_stop, gate, ALLOCATE_BYTES)
        allocated = 0
        with open_file(self.names(serial).memory, os.O_RDWR) as memory:
            for chunk, count in chunks(Extents.of(extents), ALLOCATE_BYTES):
                steps.before_chunk()
                if self._warms:
                    warm(count, should_stop=should_stop, gate=gate)
                try:
                    for offset, length in chunk:
                        syscalls.fallocate(memory.fd, offset, length)
                except OSError as error:
                    if error.errno in _NO_ALLOCATING:
                        break
                    raise memory.named(error) from error
                allocated += count
                progress(count)
        return allocated

    def remove(self, serial: int) -> None:
        """Unlinks what there is of one window: only after its last reply. Idempotent."""
        names = self.names(serial)
        part = names.extents.with_name(names.extents.name + PART_SUFFIX)
        for path in (names.memory, names.vmstate, names.extents, part):
            path.unlink(missing_ok=True)

    def leftovers(self) -> tuple[Path, ...]:
        """All staging files there are, by serial; others' files in the folder are not named."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return ()
        found = [name for name in names if _LEFTOVER.fullmatch(name)]
        return tuple(self.root / name for name in sorted(found, key=_by_serial))

    def used_bytes(self) -> int:
        """Room that the staging files take up now."""
        return sum(allocated_bytes(path) for path in self.leftovers())


def _by_serial(name: str) -> tuple[int, str]:
    serial = name.partition(".")[0]
    return (int(serial) if serial else -1, name)


def allocated_bytes(path: Path) -> int:
    """The blocks that a file has, in bytes; 0 for one that is gone."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
