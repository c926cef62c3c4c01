"""The memory control group of this process, in which its VMMs run too: cgroups(7).

Blocks: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """One control group, as the files of its version show it."""

    folder: Path
    mount: Path
    """The highest of its ancestors that can be seen from here."""
    version: int
    """1 or 2."""

    def upwards(self) -> Iterator[MemoryCgroup]:
        """This one, and each that it lies in."""
        folder = self.folder
        while True:
            yield MemoryCgroup(folder, self.mount, self.version)
            if folder == self.mount:
                return
            folder = folder.parent

    @property
    def kills_path(self) -> Path:
        """The file that counts, by the key `oom_kill`, how often the kernel ended a process of it
        for memory."""
        return self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")

    def limit_and_use(self) -> tuple[int, int] | None:
        """Bytes that it may have, and bytes that it has and the kernel can't simply take back:
        the page cache of files is not among them. None where there is no limit.

        Raises OSError where it has no such files: the root of version 2 has none.
        """
        if self.version == 2:
            limit_name, use_name = "memory.max", "memory.current"
            cache_keys = ("active_file", "inactive_file")
        else:
            limit_name, use_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_keys = ("total_active_file", "total_inactive_file")  # with the groups below it
        limit = (self.folder / limit_name).read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        use = int((self.folder / use_name).read_text(encoding="ascii"))
        stat = self._stat()
        return int(limit), max(0, use - sum(stat.get(key, 0) for key in cache_keys))

    def mapped_bytes(self) -> int:
        """Of files that its processes have mapped. Raises OSError as `limit_and_use`."""
        return self._stat()["file_mapped" if self.version == 2 else "total_mapped_file"]

    def _stat(self) -> dict[str, int]:
        lines = (self.folder / "memory.stat").read_text(encoding="ascii").splitlines()
        return {key: int(value) for key, value in map(str.split, lines)}


def memory_cgroup(cgroups: Path = _CGROUPS, mounts: Path = _MOUNTS) -> MemoryCgroup | None:
    """The one that this process is in; None where none is mounted, or it can't be seen."""
    try:
        lines = cgroups.read_text(encoding="utf-8").splitlines()
        mounted = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    own_of = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    legacy = next((path for key, path in own_of.items() if "memory" in key.split(",")), None)
    for fields in mounted:
        dash = fields.index("-")
        kind, options = fields[dash + 1], fields[dash + 3].split(",")
        # The controller is either in version 1 or in version 2, also where both are mounted.
        if kind == "cgroup" and "memory" in options and legacy is not None:
            return _seen_at(fields, legacy, 1)
        if kind == "cgroup2" and legacy is None and "" in own_of:
            return _seen_at(fields, own_of[""], 2)
    return None


def _seen_at(fields: list[str], own: str, version: int) -> MemoryCgroup | None:
    """By a line of proc_pid_mountinfo(5): the 4th field is which part of the hierarchy is mounted,
    the 5th where."""
    root, mount = fields[3].rstrip("/"), Path(fields[4])
    if own != root and not own.startswith(f"{root}/"):
        return None
    folder = mount / own.removeprefix(root).lstrip("/")
    return MemoryCgroup(folder, mount, version) if folder.is_dir() else None
