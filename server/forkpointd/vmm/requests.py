"""The requests that boot a guest or load a snapshot.

Everything that a snapshot's vmstate remembers by path is given relative to the sandbox's folder,
in which each VMM runs, so that any number of children share one snapshot and each finds its own
(drives keep the path they were made with).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forkpointd.model import Boot, Drive
from forkpointd.vmm.api import ApiRequest

DRIVES_FOLDER = "drives"
"""In a sandbox's folder: a drive by its id, a symbolic link or, writable, a file of its own."""


def boot_requests(boot: Boot) -> tuple[ApiRequest, ...]:
    """What boots a kernel. The dirty log is on from the first instruction: the first branch of a
    booted sandbox is then a Diff over zeros."""
    source: dict[str, Any] = {"kernel_image_path": str(boot.kernel_image)}
    if boot.boot_args:
        source["boot_args"] = boot.boot_args
    if boot.initrd is not None:
        source["initrd_path"] = str(boot.initrd)
    machine = {
        "vcpu_count": boot.machine.vcpus,
        "mem_size_mib": boot.machine.memory_mib,
        "track_dirty_pages": True,
    }
    return (
        ApiRequest("PUT", "/boot-source", source),
        ApiRequest("PUT", "/machine-config", machine),
        *(_drive_request(drive) for drive in boot.machine.drives),
        ApiRequest("PUT", "/actions", {"action_type": "InstanceStart"}),
    )


def load_requests(vmstate_path: Path, memory_path: Path, *, resume: bool) -> tuple[ApiRequest, ...]:
    """What loads a snapshot. The memory file is mapped privately: it must never change while the
    VMM lives. Dirty tracking is not part of a snapshot, so it is asked for again."""
    return (
        ApiRequest(
            "PUT",
            "/snapshot/load",
            {
                "snapshot_path": str(vmstate_path),
                "mem_backend": {"backend_type": "File", "backend_path": str(memory_path)},
                "enable_diff_snapshots": True,
                "resume_vm": resume,
            },
        ),
    )


def link_drives(folder: Path, drives: Iterable[Drive]) -> None:
    """Makes the links under which the VMM in `folder` finds its read-only drives, and the folder
    of all. A writable one is a file at `drive_path`, and the caller's. Blocks on the disk."""
    made = False
    for drive in drives:
        if os.sep in drive.drive_id or drive.drive_id in ("", ".", ".."):
            raise ValueError(f"{drive.drive_id!r} can't name a drive")
        if not made:
            (folder / DRIVES_FOLDER).mkdir(mode=0o700)
            made = True
        if drive.read_only:
            drive_path(folder, drive.drive_id).symlink_to(drive.path)


def drive_path(folder: Path, drive_id: str) -> Path:
    """Where the VMM in `folder` finds a drive."""
    return folder / DRIVES_FOLDER / drive_id


def _drive_request(drive: Drive) -> ApiRequest:
    return ApiRequest(
        "PUT",
        f"/drives/{drive.drive_id}",
        {
            "drive_id": drive.drive_id,
            "path_on_host": f"{DRIVES_FOLDER}/{drive.drive_id}",
            "is_root_device": drive.root_device,
            "is_read_only": drive.read_only,
        },
    )
