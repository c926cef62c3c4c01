"""Firecracker: its HTTP API over a Unix socket, its processes, its versions; the simulator beside
it behind the same names.

This room knows sandboxes as folders and processes only: no registry, no snapshots' folders, no
gRPC. `Vmm` is what the rest of the server uses; everything else is what it is made of.
"""

from __future__ import annotations

from forkpointd.vmm.api import (
    ApiConnection,
    ApiReply,
    ApiRequest,
    VmmError,
    VmmFault,
    VmmGone,
)
from forkpointd.vmm.binary import (
    SUPPORTED_VERSIONS,
    Binary,
    inspect_binary,
    memory_write_failed,
    simulator_binary,
    snapshot_version,
)
from forkpointd.vmm.cgroups import MemoryCgroup, memory_cgroup
from forkpointd.vmm.guarded import DriveClone, DriveClones, GuardedWindow
from forkpointd.vmm.identity import Orphan, end_orphans, find_orphans
from forkpointd.vmm.latencies import WindowLatencies, trim_metrics
from forkpointd.vmm.machine import Vmm, VmmInfo
from forkpointd.vmm.oom_kills import OomKills, Verdict
from forkpointd.vmm.oom_order import OomOrder, take_place
from forkpointd.vmm.process import (
    CONSOLE_INPUT_NAME,
    CONSOLE_OUTPUT_NAME,
    EMPTIED_NAMES,
    Launched,
    boot_id,
    has_mapped,
    launch,
    process_memory,
    resident_bytes,
)
from forkpointd.vmm.requests import boot_requests, drive_path, link_drives, load_requests
from forkpointd.vmm.window import (
    MAX_WINDOW_BYTES,
    AnyWindow,
    DriveOutcome,
    Window,
    WindowOutcome,
)
from forkpointd.vmm.words import read_last_words, trim_head, trim_log

__all__ = [
    "CONSOLE_INPUT_NAME",
    "CONSOLE_OUTPUT_NAME",
    "EMPTIED_NAMES",
    "MAX_WINDOW_BYTES",
    "SUPPORTED_VERSIONS",
    "AnyWindow",
    "ApiConnection",
    "ApiReply",
    "ApiRequest",
    "Binary",
    "DriveClone",
    "DriveClones",
    "DriveOutcome",
    "GuardedWindow",
    "Launched",
    "MemoryCgroup",
    "OomKills",
    "OomOrder",
    "Orphan",
    "Verdict",
    "Vmm",
    "VmmError",
    "VmmFault",
    "VmmGone",
    "VmmInfo",
    "Window",
    "WindowLatencies",
    "WindowOutcome",
    "boot_id",
    "boot_requests",
    "drive_path",
    "end_orphans",
    "find_orphans",
    "has_mapped",
    "inspect_binary",
    "launch",
    "link_drives",
    "load_requests",
    "memory_cgroup",
    "memory_write_failed",
    "process_memory",
    "read_last_words",
    "resident_bytes",
    "simulator_binary",
    "snapshot_version",
    "take_place",
    "trim_head",
    "trim_log",
    "trim_metrics",
]
