"""The few Linux calls that this room makes on descriptors, under names that tests can fail.

Everything else imports this module and calls through it (`syscalls.pwrite(...)`), so that "the
Nth call fails" is one attribute replaced. Calls that Python's `os` doesn't have go through libc.
Linux only.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE_BYTES = 4096
"""Firecracker's dirty pages, on x86_64 and on its aarch64 kernels."""

copy_file_range = os.copy_file_range
preadv = os.preadv
pwrite = os.pwrite
sendfile = os.sendfile
lseek = os.lseek
ftruncate = os.ftruncate
fsync = os.fsync

_FICLONE = 0x40049409
"""_IOW(0x94, 9, int): include/uapi/linux/fs.h."""

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_MAP_POPULATE = 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_ALL = 7
"""Waits for what is being written, writes, and waits for that."""

_FILESYSTEM_NAMES = {
    0x01021994: "tmpfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x794C7630: "overlay",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x6969: "nfs",
    0x65735546: "fuse",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
}
"""include/uapi/linux/magic.h. ext2, ext3 and ext4 share one number."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_char_p]


def ficlone(target_fd: int, source_fd: int) -> None:
    """Makes the target share all blocks of the source (ioctl_ficlonerange(2)).

    Raises OSError EOPNOTSUPP, EINVAL, EXDEV or ENOTTY where the file system can't.
    """
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


def fallocate(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Gives a file its blocks ahead of time; its size and contents stay. Unlike glibc's
    posix_fallocate it never writes zeros where the file system can't: it raises EOPNOTSUPP."""
    _check(_libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes))


def punch_hole(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Gives a range of a file back to the disk: it reads as zeros from now on. Raises OSError
    EOPNOTSUPP where the file system can't."""
    flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    _check(_libc.fallocate(fd, flags, offset_bytes, length_bytes))


def same_bytes(one_address: int, other_address: int, length_bytes: int) -> bool:
    """Whether two ranges of this process's memory are equal. Other threads run meanwhile."""
    return bool(_libc.memcmp(one_address, other_address, length_bytes) == 0)


@contextmanager
def touched_memory(length_bytes: int) -> Iterator[None]:
    """Has so much memory of its own, each page of it written to, in the block. Where the kernel
    gives less, less is had. Unlike Python's mmap it lets other threads run meanwhile."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_POPULATE
    address = _libc.mmap(None, length_bytes, protection, flags, -1, 0)
    try:
        yield
    finally:
        if address != _MAP_FAILED:
            _check(_libc.munmap(address, length_bytes))


def start_writeback(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Lets the kernel begin to write dirty pages to the disk, so that a later fsync has less to
    wait for; promises nothing (sync_file_range(2)). May wait for a busy disk. Raises OSError."""
    _check(_libc.sync_file_range(fd, offset_bytes, length_bytes, _SYNC_FILE_RANGE_WRITE))


def leave_cache(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Takes a range of a file out of the page cache, written to the disk first if need be; pages
    that some process has mapped stay. Promises nothing. Blocks for the disk. Raises OSError."""
    _check(_libc.sync_file_range(fd, offset_bytes, length_bytes, _SYNC_FILE_RANGE_ALL))
    os.posix_fadvise(fd, offset_bytes, length_bytes, os.POSIX_FADV_DONTNEED)


def forget_cached(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Lets what is read next come from the disk: clean pages of this range that no process has
    mapped leave the page cache. Promises nothing. Raises OSError."""
    os.posix_fadvise(fd, offset_bytes, length_bytes, os.POSIX_FADV_DONTNEED)


def filesystem_of(path: Path) -> str:
    """The name of the file system that `path` lies on, for example `tmpfs`; its magic number in
    hexadecimal where it has no name here. Raises OSError."""
    # struct statfs begins with f_type as a long on all 64-bit architectures; it has 120 bytes.
    answer = ctypes.create_string_buffer(256)
    _check(_libc.statfs(os.fsencode(path), answer), path)
    magic = ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF
    return _FILESYSTEM_NAMES.get(magic, f"{magic:#x}")


def _check(result: int, path: Path | None = None) -> None:
    """What libc says by -1 and errno, as Python says it."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else str(path))
