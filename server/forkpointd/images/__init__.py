"""Snapshot folders on disk: layout, staging, extents, sparse copies, room, manifests.

    extents     which bytes of a diff are data, and the file that says so
    copying     pre-copy, merge and plain copies that leave holes alone
    layers      diffs that stand on one another, and the image that they are together
    cold_pages  free memory that is slow to write to, made ready before a window
    staging     where a window is written, and whether a folder is fit for it
    space       room that is reserved before it is used
    manifest    what a snapshot is; `fits` says whether it can be loaded on a host (hostfacts)
    packing     a snapshot as an archive, unpacking the way back; archive and seekable: its format
    store       snapshot folders, on the disk and in memory: seen whole or not at all
    checksums   whether their files still hold what they held

This room knows files only: not Firecracker, not the registry, not sandboxes. All of it is
synchronous and blocks; it is run in threads and never on the event loop.
"""

from forkpointd.images.checksums import Checksums, Damaged, compare, compute, digest_of, work_bytes
from forkpointd.images.cold_pages import free_pages_are_cold, warm
from forkpointd.images.copying import (
    CopyResult,
    can_reflink,
    clone_whole,
    copy_image,
    copy_whole,
    make_empty_image,
    merge_diff,
)
from forkpointd.images.errors import ImageError, NoReflink, Stopped
from forkpointd.images.extents import (
    Extent,
    Extents,
    StoredExtents,
    data_extents,
    data_extents_of,
    find_extents,
    find_extents_of,
    first_of,
    load_extents,
    save_extents,
    total_bytes,
)
from forkpointd.images.fits import Mismatch, can_read, check_fits
from forkpointd.images.hostfacts import HostFacts, read_host_facts
from forkpointd.images.layers import Layer, copy_chain, shown, union
from forkpointd.images.manifest import DriveWitness, LayerWitness, Manifest
from forkpointd.images.packing import Packing
from forkpointd.images.seekable import (
    DEFAULT_LEVEL,
    MAX_LEVEL,
    Table,
    pack_frame,
)
from forkpointd.images.space import (
    MEMINFO,
    Budget,
    Ledger,
    Limit,
    MemoryRoom,
    NoRoom,
    Reservation,
    Room,
    StagingChoice,
    StagingRoom,
    choose_staging,
    low_water,
    meminfo_bytes,
    quota,
)
from forkpointd.images.staging import (
    StagingArea,
    StagingNames,
    StagingProbe,
    allocated_bytes,
    probe_staging,
)
from forkpointd.images.store import (
    Chain,
    Draft,
    SnapshotStore,
    StoredSnapshot,
    check_parent,
    data_bytes_of,
)
from forkpointd.images.syscalls import filesystem_of
from forkpointd.images.unpacking import Unpacking, adopted
from forkpointd.images.zeros import copy_full, punch_between, punch_zeros

__all__ = [
    "DEFAULT_LEVEL",
    "MAX_LEVEL",
    "MEMINFO",
    "Budget",
    "Chain",
    "Checksums",
    "CopyResult",
    "Damaged",
    "Draft",
    "DriveWitness",
    "Extent",
    "Extents",
    "HostFacts",
    "ImageError",
    "Layer",
    "LayerWitness",
    "Ledger",
    "Limit",
    "Manifest",
    "MemoryRoom",
    "Mismatch",
    "NoReflink",
    "NoRoom",
    "Packing",
    "Reservation",
    "Room",
    "SnapshotStore",
    "StagingArea",
    "StagingChoice",
    "StagingNames",
    "StagingProbe",
    "StagingRoom",
    "Stopped",
    "StoredExtents",
    "StoredSnapshot",
    "Table",
    "Unpacking",
    "adopted",
    "allocated_bytes",
    "can_read",
    "can_reflink",
    "check_fits",
    "check_parent",
    "choose_staging",
    "clone_whole",
    "compare",
    "compute",
    "copy_chain",
    "copy_full",
    "copy_image",
    "copy_whole",
    "data_bytes_of",
    "data_extents",
    "data_extents_of",
    "digest_of",
    "filesystem_of",
    "find_extents",
    "find_extents_of",
    "first_of",
    "free_pages_are_cold",
    "load_extents",
    "low_water",
    "make_empty_image",
    "meminfo_bytes",
    "merge_diff",
    "pack_frame",
    "probe_staging",
    "punch_between",
    "punch_zeros",
    "quota",
    "read_host_facts",
    "save_extents",
    "shown",
    "total_bytes",
    "union",
    "warm",
    "work_bytes",
]
