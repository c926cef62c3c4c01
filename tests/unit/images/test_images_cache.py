"""Copies that leave the page cache as they go, but for what somebody has mapped."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkpointd.images import copy_full, copy_image, find_extents_of, merge_diff, punch_zeros
from forkpointd.images.syscalls import filesystem_of
from tests.unit.images.filesystems import Failing

MIB = 1 << 20
SIZE = 24 * MIB
MAPPED = 5 * MIB
CALLBACKS: dict[str, Any] = {
    "progress": lambda _: None,
    "should_stop": lambda: False,
    "gate": lambda: None,
}


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def cached_mib(path: Path) -> int:
    """How many MiB of a file begin with a page that is in the cache, by mincore(2). A read with
    RWF_NOWAIT would start to read ahead, and so bring in what it looks for."""
    if filesystem_of(path) == "tmpfs":
        pytest.skip("a tmpfs is all cache")
    pages = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
    # A copy on write, for an address can be had of what may be written to; nothing is touched.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), SIZE, access=mmap.ACCESS_COPY) as m:
        first = ctypes.c_char.from_buffer(m)
        failed = _libc.mincore(ctypes.addressof(first), SIZE, ctypes.addressof(pages))
        del first  # else the map can't be closed
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(pages[at // mmap.PAGESIZE] & 1 for at in range(0, SIZE, MIB))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    with path.open("wb") as opened:
        opened.write(os.urandom(SIZE))
        os.fsync(opened.fileno())
    assert cached_mib(path) == SIZE // MIB
    return path


def precopy(base: Path, image: Path, **options: Any) -> None:
    copy_image(base, image, SIZE, **CALLBACKS, **options)


def merge(base: Path, image: Path, **options: Any) -> None:
    with image.open("wb") as opened:
        opened.truncate(SIZE)
    merge_diff(base, find_extents_of(base, SIZE), image, **CALLBACKS, **options)


def place_full(base: Path, image: Path, **options: Any) -> None:
    copy_full(base, image, left_out=lambda _: None, **CALLBACKS, **options)


COPIES = pytest.mark.parametrize("copy", [precopy, merge, place_full])


@COPIES
def test_a_copy_stays_in_the_cache_unless_it_is_told(
    tmp_path: Path, base: Path, copy: Callable[..., None]
) -> None:
    copy(base, tmp_path / "image")
    assert cached_mib(base) == cached_mib(tmp_path / "image") == SIZE // MIB


@COPIES
def test_a_copy_that_is_dropped_behind_leaves_what_is_mapped(
    tmp_path: Path, base: Path, copy: Callable[..., None]
) -> None:
    image = tmp_path / "image"
    with (
        base.open("rb") as opened,
        mmap.mmap(opened.fileno(), MAPPED, access=mmap.ACCESS_READ) as m,
    ):
        assert sum(m[at] for at in range(0, MAPPED, mmap.PAGESIZE)) > 0
        copy(base, image, drop_behind=True)
        assert cached_mib(base) <= MAPPED // MIB + 1
        assert cached_mib(base) >= MAPPED // MIB
        assert cached_mib(image) == 0
    assert image.read_bytes() == base.read_bytes()


def test_looking_for_zeros_leaves_the_cache_too(base: Path) -> None:
    content = base.read_bytes()
    assert punch_zeros(base, **CALLBACKS, drop_behind=True) == 0
    assert cached_mib(base) == 0
    assert base.read_bytes() == content


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_that_fails_meanwhile_fails_the_copy(
    tmp_path: Path, base: Path, failing: Failing, number: int
) -> None:
    failing.watch("leave_cache")
    failing.at(2, number)
    if number == errno.EIO:
        with pytest.raises(OSError, match=r"image|base"):
            precopy(base, tmp_path / "image", drop_behind=True)
        assert not (tmp_path / "image").exists()
    else:
        precopy(base, tmp_path / "image", drop_behind=True)
        assert (tmp_path / "image").read_bytes() == base.read_bytes()
