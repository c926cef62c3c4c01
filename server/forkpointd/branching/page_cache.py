"""Whether a copy may stay in the page cache, or would push out what running guests use.

A child's memory is a mapped file: what it has not written lies in the page cache. A pre-copy reads
one image and writes another; both stay cached, which is good (the next pre-copy and the children
find them there) as long as there is memory that nobody uses. Where there isn't, the kernel takes
mapped pages too: beside branches of another source a child lost all but 2 of its 302 MiB. Such a
copy leaves the cache as it goes, at the price of being read from the disk next time.
"""

from __future__ import annotations

from pathlib import Path

from forkpointd.vmm import MemoryCgroup

_MEMINFO = Path("/proc/meminfo")


class PageCache:
    """The page cache that this server and its guests share."""

    def __init__(self, cgroup: MemoryCgroup | None, meminfo: Path = _MEMINFO) -> None:
        """`cgroup`: the one that they run in; its limit, or one above it, may be nearer than the
        host's."""
        self._cgroup = cgroup
        self._meminfo = meminfo

    def room_bytes(self) -> int:
        """Memory that is free, or caches what no process has mapped. Blocks. Raises OSError."""
        figures = _figures(self._meminfo)
        room = 1024 * (
            figures["MemFree:"]
            + figures["Active(file):"]
            + figures["Inactive(file):"]
            - figures["Mapped:"]
        )
        for group in () if self._cgroup is None else self._cgroup.upwards():
            try:
                found = group.limit_and_use()
                mapped = _figures(group.folder / "memory.stat")[group.mapped_key]
            except OSError:  # the root of version 2 has no such files
                continue
            if found is not None:
                limit, used = found
                room = min(room, limit - used - mapped)
        return max(0, room)

    def is_crowded_by(self, count: int) -> bool:
        """Whether `count` bytes more would push out what is mapped. Blocks. Raises OSError."""
        return self.room_bytes() < count


def _figures(path: Path) -> dict[str, int]:
    """The first two words of each line."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {words[0]: int(words[1]) for words in map(str.split, lines)}
