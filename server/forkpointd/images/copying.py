"""Copies of memory files that leave holes alone: base to image, diff over image, staged to image.

All of them work in chunks. Before each chunk `gate()` is called, a place where a copy can be made
to hold still, then `should_stop()`; after it `progress(bytes)` with what has just landed in the
target. `drop_behind` takes what was copied out of the page cache again, where it would push out
what guests use; pages that some process has mapped stay. They never map a file and never look at
what the bytes are (`zeros` does, of FULL ones).

A diff is laid by the extents that were stored for it (`extents.load_extents`), whatever SEEK_DATA
says by then; a base image is read by SEEK_DATA, since a hole of an image is zeros.

Synchronous: run them in threads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forkpointd.images import syscalls
from forkpointd.images.errors import ImageError, NoReflink
from forkpointd.images.extents import Extent, Extents, check_extents, total_bytes
from forkpointd.images.moving import (
    CHUNK_BYTES,
    Gate,
    OpenFile,
    Progress,
    ShouldStop,
    Steps,
    create_file,
    move,
    open_file,
    replacing,
)
from forkpointd.model import CopyMethod

_NO_REFLINK = frozenset(
    {errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
)


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy of an image did."""

    method: CopyMethod
    copied_bytes: int
    """Data that was moved, or for REFLINK shared (by st_blocks)."""
    hole_bytes: int
    """The rest."""
    total_bytes: int
    """Size of the image."""


def copy_image(
    base_path: Path,
    image_path: Path,
    size_bytes: int,
    *,
    progress: Progress,
    should_stop: ShouldStop,
    gate: Gate,
    chunk_bytes: int = CHUNK_BYTES,
    drop_behind: bool = False,
    on_total: Progress | None = None,
    only: Callable[[], Extents] | None = None,
) -> CopyResult:
    """Makes `image_path`, which must not exist, equal to the image `base_path` of `size_bytes`.

    By reflink where the file system can: then nothing is moved, no room is taken and `progress`
    isn't called. Else the data alone, or what `only` says of it, and holes stay holes. `on_total`
    is told once how many bytes will be moved. Nothing is synced.

    Raises Stopped, ImageError (the base has another size), FileExistsError, OSError with the path
    (ENOSPC); then there is no `image_path`, unless it was there before.
    """
    steps = Steps(progress, should_stop, gate, chunk_bytes, drop_behind)
    with open_file(base_path, os.O_RDONLY) as base:
        _check_size(base, size_bytes)
        steps.before_chunk()
        with create_file(image_path) as image:
            if _reflinked(base, image):
                _check_size(image, size_bytes)
                shared = min(size_bytes, os.fstat(image.fd).st_blocks * 512)
                if on_total is not None:
                    on_total(0)
                return CopyResult(CopyMethod.REFLINK, shared, size_bytes - shared, size_bytes)
            return _copy_data(
                base, image, size_bytes, steps, on_total, None if only is None else only()
            )


def copy_whole(
    staged_path: Path,
    image_path: Path,
    *,
    progress: Progress,
    should_stop: ShouldStop,
    gate: Gate,
    chunk_bytes: int = CHUNK_BYTES,
    drop_behind: bool = False,
    on_total: Progress | None = None,
) -> CopyResult:
    """Makes `image_path` equal to a whole file (a vmstate, say), holes as holes.

    A file that was there under that name is unlinked first, never written into: it may have
    another name. Raises Stopped, ImageError, OSError with the path; then there is no `image_path`.
    """
    steps = Steps(progress, should_stop, gate, chunk_bytes, drop_behind)
    with replacing(staged_path, image_path) as (staged, image):
        return _copy_data(staged, image, staged.size_bytes, steps, on_total)


def clone_whole(
    source_path: Path,
    clone_path: Path,
    *,
    allow_copy: bool,
    should_stop: ShouldStop,
    gate: Gate,
) -> CopyMethod:
    """Makes `clone_path` equal to a whole file that is written to later (a drive, say): by reflink,
    or, where the file system can't and `allow_copy`, by a copy. Nothing is synced.

    Raises NoReflink, Stopped, ImageError, OSError with the path; then there is no `clone_path`.
    """
    steps = Steps(_untold, should_stop, gate, CHUNK_BYTES)
    with replacing(source_path, clone_path) as (source, clone):
        if _reflinked(source, clone):
            return CopyMethod.REFLINK
        if not allow_copy:
            raise NoReflink(f"{clone_path.parent} can't share blocks with {source_path}")
        _copy_data(source, clone, source.size_bytes, steps, None)
        return CopyMethod.COPY


def merge_diff(
    diff_path: Path,
    extents: Sequence[Extent],
    image_path: Path,
    *,
    progress: Progress,
    should_stop: ShouldStop,
    gate: Gate,
    chunk_bytes: int = CHUNK_BYTES,
    drop_behind: bool = False,
) -> int:
    """Lays exactly `extents` of the diff over the image, zeros included; returns their bytes.

    Doing it again does no harm, so a merge that was broken off is repeated from its start.
    Nothing is synced. Raises Stopped, ImageError (a size doesn't fit), OSError with the path
    (ENOSPC); then the image is neither the old nor the new one, and the diff is untouched.
    """
    steps = Steps(progress, should_stop, gate, chunk_bytes, drop_behind)
    with open_file(diff_path, os.O_RDONLY) as diff, open_file(image_path, os.O_RDWR) as image:
        if diff.is_at(image_path):
            raise ImageError(f"{image_path} is {diff_path} itself")
        if diff.size_bytes != image.size_bytes:
            raise ImageError(
                f"{diff_path} has {diff.size_bytes} bytes and {image_path} {image.size_bytes}: a "
                "diff is merged into an image of its own size"
            )
        check_extents(extents, image.size_bytes)
        return move(diff, image, Extents.of(extents), steps)


def make_empty_image(image_path: Path, size_bytes: int) -> None:
    """A new image of zeros: one hole. Raises FileExistsError, OSError with the path."""
    with create_file(image_path) as image:
        image.resize(size_bytes)


def can_reflink(folder: Path) -> bool:
    """Whether files in this folder can share blocks, by trying. Leaves nothing. Raises OSError."""
    source_path, target_path = (
        folder / f".probe-reflink-{os.getpid()}-{number}" for number in (1, 2)
    )
    try:
        with create_file(source_path) as source, create_file(target_path) as target:
            syscalls.pwrite(source.fd, bytes(syscalls.PAGE_BYTES), 0)
            return _reflinked(source, target)
    finally:
        source_path.unlink(missing_ok=True)
        target_path.unlink(missing_ok=True)


def _untold(_count: int) -> None:
    """Nobody asks how far it is."""


def _check_size(file: OpenFile, size_bytes: int) -> None:
    if file.size_bytes != size_bytes:
        raise ImageError(f"{file.path} has {file.size_bytes} bytes, not {size_bytes}")


def _reflinked(source: OpenFile, target: OpenFile) -> bool:
    try:
        syscalls.ficlone(target.fd, source.fd)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise target.named(error) from error
    return True


def _copy_data(
    source: OpenFile,
    target: OpenFile,
    size_bytes: int,
    steps: Steps,
    on_total: Progress | None,
    only: Extents | None = None,
) -> CopyResult:
    """The data of `source`, or `only` that part of it, into the empty `target`."""
    target.resize(size_bytes)
    extents = source.data() if only is None else only
    count = total_bytes(extents)
    if on_total is not None:
        on_total(count)
    moved = move(source, target, extents, steps)
    return CopyResult(CopyMethod.COPY, moved, size_bytes - moved, size_bytes)
