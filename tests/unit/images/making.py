"""A manifest, a host and a draft, as a branch would make them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from forkpointd.images import Draft, DriveWitness, HostFacts, Manifest, SnapshotStore
from forkpointd.model import BranchMode, Layout, VmmKind, VmmVersion

MIB = 1 << 20
MEMORY_BYTES = 4 * MIB

HOST = HostFacts(
    vmm=VmmVersion(VmmKind.FIRECRACKER, "1.12.1"),
    snapshot_version="6.0.0",
    architecture="x86_64",
    cpu_vendor="GenuineIntel",
    cpu_model="Xeon (cpu family 6, model 106)",
    cpu_features=frozenset({"sse4_2", "avx2", "avx512f", "pti", "rep_good"}),
    kernel_release="6.1.0",
    page_bytes=4096,
)


def manifest(snapshot_id: str = "snap-a", branch_id: str = "br-a") -> Manifest:
    return Manifest(
        snapshot_id=snapshot_id,
        create_time=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        source_sandbox_id="agent-7",
        branch_id=branch_id,
        parent_snapshot_id="snap-0",
        mode=BranchMode.DIFF,
        layout=Layout.FLAT,
        memory_bytes=MEMORY_BYTES,
        vcpus=2,
        vmm=HOST.vmm,
        snapshot_version=HOST.snapshot_version,
        architecture=HOST.architecture,
        cpu_vendor=HOST.cpu_vendor,
        cpu_model=HOST.cpu_model,
        cpu_features=HOST.cpu_features,
        kernel_release=HOST.kernel_release,
        page_bytes=HOST.page_bytes,
        vmstate_bytes=5,
        drives=(
            DriveWitness(
                drive_id="root",
                path=Path("/images/root.ext4"),
                read_only=True,
                root_device=True,
                size_bytes=MIB,
                mtime_ns=1,
                inode=2,
            ),
        ),
        boot={"kernel_image": "/images/vmlinux"},
    )


def filled(draft: Draft, memory: bytes = b"memory") -> Draft:
    """A draft with its memory and vmstate."""
    with draft.memory_path.open("wb") as file:
        file.truncate(MEMORY_BYTES)
        file.write(memory)
    draft.vmstate_path.write_bytes(b"state")
    return draft


def stored(store: SnapshotStore, snapshot_id: str = "snap-a", branch_id: str = "br-a") -> Path:
    """A finished snapshot's folder."""
    made = replace(manifest(snapshot_id, branch_id), drives=())
    return store.finalise(filled(store.draft(branch_id)), made)
