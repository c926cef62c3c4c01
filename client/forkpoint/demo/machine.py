"""How large the demo's source may be on this machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

MIB = 2**20
WANTED_MIB = 4096
LEAST_MIB = 256

_MEMORY_TIMES = 3
"""The source itself is small (it touches 100 MiB); a FULL window is staged in memory, and the
copies go through the page cache."""
_DISK_TIMES = 4
"""The base, the image in the making, a FULL image on its way, and room to breathe."""


class TooSmall(Exception):
    """This machine has not the room for the smallest demo."""


def memory_mib(folder: Path, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory of the source in MiB: 4096, or halved until memory and the folder's disk hold it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text("utf-8"), re.MULTILINE)
    available_mib = int(found[1]) // 1024 if found else WANTED_MIB
    disk_mib = shutil.disk_usage(folder).free // MIB
    size = WANTED_MIB
    while size >= LEAST_MIB:
        if size * _MEMORY_TIMES <= available_mib and size * _DISK_TIMES <= disk_mib:
            return size
        size //= 2
    raise TooSmall(
        f"the demo needs {LEAST_MIB * _MEMORY_TIMES} MiB of memory and"
        f" {LEAST_MIB * _DISK_TIMES} MiB of disk in {folder}; there are {available_mib}"
        f" and {disk_mib}. Another folder is named by TMPDIR."
    )
