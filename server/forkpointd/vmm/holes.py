"""Punching holes: how files that only grow give their old end back while offsets stay.

Firecracker keeps its console, log and metrics open and writes at its own position, so such a file
can't be cut or replaced under it; its old end can become a hole (fallocate(2), PUNCH_HOLE).
"""

from __future__ import annotations

import ctypes
import errno
import os

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
BLOCK_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_head(fd: int, keep_from: int) -> int:
    """Gives back the whole blocks before offset `keep_from`; returns the first offset that is
    still there (at most `keep_from`). 0 where the file system can't punch.

    Raises OSError for anything else that went wrong. Blocks on the disk.
    """
    end = keep_from // BLOCK_BYTES * BLOCK_BYTES
    if end <= 0:
        return 0
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, end) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return 0
        raise OSError(number, os.strerror(number))
    return end
