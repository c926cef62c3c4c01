"""What a VMM leaves behind in words: the ends of its standard error and of its log.

Firecracker says why it ends on one of the two, never on both (its log by `error!`, a panic or a
refused argument on standard error), so a reader is shown both.
"""

from __future__ import annotations

import os
from pathlib import Path

from forkpointd.vmm.holes import BLOCK_BYTES, punch_head

LOG_NAME = "vmm.log"
ERROR_NAME = "vmm.err"
LAST_WORDS_BYTES = 4096
KEPT_LOG_BYTES = 64 * 1024


def read_last_words(folder: Path) -> str:
    """The ends of `vmm.err` and `vmm.log`, together at most 4 KiB; empty where there are none.

    Blocks on the disk. A file that can't be read has no words.
    """
    half = LAST_WORDS_BYTES // 2
    errors = _tail(folder / ERROR_NAME, LAST_WORDS_BYTES)
    log = _tail(folder / LOG_NAME, LAST_WORDS_BYTES)
    if len(errors) + len(log) > LAST_WORDS_BYTES:
        errors = errors[-max(half, LAST_WORDS_BYTES - len(log)) :]
        log = log[-(LAST_WORDS_BYTES - len(errors)) :]
    parts = (part.decode(errors="replace").strip("\0\n ") for part in (errors, log))
    words = "\n".join(part for part in parts if part)
    return words.encode()[-LAST_WORDS_BYTES:].decode(errors="ignore")


def trim_log(folder: Path) -> None:
    """Gives the old end of the log back, beyond its last 64 KiB."""
    trim_head(folder / LOG_NAME, KEPT_LOG_BYTES)


def trim_head(path: Path, keep_bytes: int) -> None:
    """Makes a hole of all but the last `keep_bytes` of a file (to the block); nothing where there
    is no file, or nothing to be given back. Blocks on the disk."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        keep_from = os.fstat(fd).st_size - keep_bytes
        if keep_from >= BLOCK_BYTES and os.lseek(fd, 0, os.SEEK_DATA) <= keep_from - BLOCK_BYTES:
            punch_head(fd, keep_from)
    finally:
        os.close(fd)


def _tail(path: Path, count: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            return os.pread(opened.fileno(), count, max(0, size - count))
    except OSError:
        return b""
