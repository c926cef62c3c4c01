"""Whether a copy may stay in the page cache, or would push out what running guests use.

A child's memory is a mapped file: what it has not written lies in the page cache. A pre-copy reads
one image and writes another; both stay cached, which is good (the next pre-copy and the children
find them there) as long as there is memory that nobody uses. Where there isn't, the kernel takes
mapped pages too: beside branches of another source a child lost all but 2 of its 302 MiB. Such a
copy leaves the cache as it goes, at the price of being read from the disk next time.
"""

from __future__ import annotations

from pathlib import Path

from forkpointd.images import MEMINFO, meminfo_bytes
from forkpointd.vmm import MemoryCgroup


class PageCache:
    """The page cache that this server and its guests share."""

    def __init__(self, cgroup: MemoryCgroup | None, meminfo: Path = MEMINFO) -> None:
        """`cgroup`: the one that they run in; its limit, or one above it, may be nearer than the
        host's."""
        self._cgroup = cgroup
        self._meminfo = meminfo

    def room_bytes(self) -> int:
        """Memory that is free, or caches what no process has mapped. Blocks. Raises OSError."""
        free, active, inactive, mapped = meminfo_bytes(
            "MemFree", "Active(file)", "Inactive(file)", "Mapped", path=self._meminfo
        )
        room = free + active + inactive - mapped
        for group in () if self._cgroup is None else self._cgroup.upwards():
            try:
                if found := group.limit_and_use():
                    limit, used = found
                    room = min(room, limit - used - group.mapped_bytes())
            except OSError:  # the root of version 2 has no such files
                continue
        return max(0, room)

    def is_crowded_by(self, count: int) -> bool:
        """Whether `count` bytes more would push out what is mapped. Blocks. Raises OSError."""
        return self.room_bytes() < count
