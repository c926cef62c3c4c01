"""What memory this host has for sandboxes: its own, less where a control group sets a limit.

In a container the host's figures are those of the machine below it; what the kernel will give is
decided by the limits of the control groups. Blocks: call it in a thread.
"""

from __future__ import annotations

from pathlib import Path

from forkpointd.images import MEMINFO, meminfo_bytes
from forkpointd.sandboxes.memory import HostMemory
from forkpointd.vmm import MemoryCgroup


def host_memory(cgroup: MemoryCgroup | None, meminfo: Path = MEMINFO) -> HostMemory:
    """The least of what the host has and what `cgroup` and those that it lies in may have. Raises
    OSError."""
    total, available = meminfo_bytes("MemTotal", "MemAvailable", path=meminfo)
    for group in () if cgroup is None else cgroup.upwards():
        try:
            found = group.limit_and_use()
        except OSError:  # the root of version 2 has no limit and no such files
            continue
        if found is not None:
            limit, used = found
            total, available = min(total, limit), min(available, limit - used)
    return HostMemory(total, max(0, available))
