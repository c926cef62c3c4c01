"""Room that the registry keeps for the day on which its disk is full.

What has to be written just then matters most: that a branch failed, and which diff now holds the
only copy of its pages. So a file of some MiB lies beside the registry; a write that finds the disk
full removes it and tries again. It is put back when there is room. All of it blocks.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

BALLAST_BYTES = 8 * 1024 * 1024
"""Some thousand rows: the write-ahead log grows by 4 KiB pages."""


class Ballast:
    """The file beside one registry."""

    def __init__(self, registry_path: Path) -> None:
        self._path = registry_path.with_name(registry_path.name + "-ballast")

    def drop(self) -> None:
        """Gives the room to whoever writes next. Idempotent."""
        self._path.unlink(missing_ok=True)

    def restore(self) -> bool:
        """Takes the room back, if it was dropped and twice as much is free; whether it is there."""
        if self._path.exists():
            return True
        found = os.statvfs(self._path.parent)
        if found.f_bavail * found.f_frsize < 2 * BALLAST_BYTES:
            return False
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, BALLAST_BYTES)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.drop()
            return False
        finally:
            os.close(fd)
        return True
