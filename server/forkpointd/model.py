"""The words of forkpoint as plain data: sandboxes, snapshots, branches, forks, windows, errors.

This module imports nothing of ours and knows neither gRPC, SQLite, Firecracker nor files. Every
object is immutable; a change is a new object (`dataclasses.replace`), so that a reader on another
thread or in another task always sees one moment. Units are in the names: `_bytes`, `_mib`,
`_seconds`; instants are aware `datetime`s in UTC, spans of the pause window are integers of
microseconds (`_us`) since that is what Firecracker reports.

Enum values are the names of the .proto's values without their prefix, so that the same word is
used from the wire to the table column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

MIB = 1024 * 1024
PAGE_BYTES = 4096

ID_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,62}")
"""What an id may look like; nothing else, so that no id is ever a path."""

FORK_ID_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,57}")
"""Shorter, so that `<fork_id>-9999` is an id too."""


def now() -> datetime:
    """The present instant, aware and in UTC."""
    return datetime.now(UTC)


# --- errors ------------------------------------------------------------------------------------


class Reason(StrEnum):
    """Why a call was refused or a piece of work failed: `ErrorReason` of the .proto."""

    INVALID_FIELD = "INVALID_FIELD"
    UNDECODABLE_MESSAGE = "UNDECODABLE_MESSAGE"
    SANDBOX_NOT_FOUND = "SANDBOX_NOT_FOUND"
    SNAPSHOT_NOT_FOUND = "SNAPSHOT_NOT_FOUND"
    BRANCH_NOT_FOUND = "BRANCH_NOT_FOUND"
    FORK_NOT_FOUND = "FORK_NOT_FOUND"
    ID_TAKEN = "ID_TAKEN"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    SANDBOX_NOT_RUNNING = "SANDBOX_NOT_RUNNING"
    SANDBOX_UNRESPONSIVE = "SANDBOX_UNRESPONSIVE"
    SANDBOX_DELETED = "SANDBOX_DELETED"
    BRANCH_QUEUE_FULL = "BRANCH_QUEUE_FULL"
    NO_DISK_SPACE = "NO_DISK_SPACE"
    NO_STAGING_SPACE = "NO_STAGING_SPACE"
    NO_MEMORY = "NO_MEMORY"
    PAUSE_TOO_LONG = "PAUSE_TOO_LONG"
    DIRTY_BASE_INVALID = "DIRTY_BASE_INVALID"
    BRANCH_NOT_CANCELLABLE = "BRANCH_NOT_CANCELLABLE"
    WINDOW_TIMED_OUT = "WINDOW_TIMED_OUT"
    VMM_FAILED = "VMM_FAILED"
    VMM_EXITED = "VMM_EXITED"
    WRITE_FAILED = "WRITE_FAILED"
    HOST_MISMATCH = "HOST_MISMATCH"
    IMAGE_DAMAGED = "IMAGE_DAMAGED"
    WRITABLE_DRIVE = "WRITABLE_DRIVE"
    DRIVE_CHANGED = "DRIVE_CHANGED"
    GUARDIAN_LOST = "GUARDIAN_LOST"
    CONSOLE_BUSY = "CONSOLE_BUSY"
    CONSOLE_FULL = "CONSOLE_FULL"
    CONSOLE_OFFSET = "CONSOLE_OFFSET"
    SERVER_DRAINING = "SERVER_DRAINING"
    SERVER_RESTARTED = "SERVER_RESTARTED"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"
    BRANCH_CANCELLED = "BRANCH_CANCELLED"
    CHILDREN_FAILED = "CHILDREN_FAILED"
    NO_VMM = "NO_VMM"
    INTERNAL = "INTERNAL"
    ARCHIVE_INVALID = "ARCHIVE_INVALID"
    IMPORT_BROKEN_OFF = "IMPORT_BROKEN_OFF"
    SNAPSHOT_LOST = "SNAPSHOT_LOST"
    NO_MEMORY_SPACE = "NO_MEMORY_SPACE"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request."""

    field: str
    """Its path in the message, for example `fork.count`."""
    description: str
    """What is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as data: what is stored with a failed branch or child, and what becomes a status."""

    reason: Reason
    message: str
    """For a person: what happened and what to do."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """For a program: figures and ids that the message names."""
    fields: tuple[FieldViolation, ...] = ()
    """Wrong fields (INVALID_FIELD); also the differences of HOST_MISMATCH."""
    retry_after_seconds: float | None = None
    """When waiting helps: how long."""


class ForkpointError(Exception):
    """A failure with a reason that a client is meant to see."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        fields: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.problem = Problem(reason, message, dict(metadata or {}), fields, retry_after_seconds)

    @classmethod
    def of(cls, problem: Problem) -> ForkpointError:
        """The exception for a stored problem."""
        return cls(
            problem.reason,
            problem.message,
            metadata=problem.metadata,
            fields=problem.fields,
            retry_after_seconds=problem.retry_after_seconds,
        )

    @property
    def reason(self) -> Reason:
        """Why."""
        return self.problem.reason


# --- sandboxes ---------------------------------------------------------------------------------


class SandboxState(StrEnum):
    """What a sandbox does now."""

    CREATING = "CREATING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    UNKNOWN = "UNKNOWN"
    """Firecracker does not answer; no call is taken until it does."""
    STOPPED = "STOPPED"
    """Its process has ended."""
    DELETING = "DELETING"


class WishedState(StrEnum):
    """What the owner last asked for; in the registry before Firecracker is asked."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"


class ExpiryAction(StrEnum):
    """What happens when a ttl is over."""

    DELETE = "DELETE"
    PAUSE = "PAUSE"
    BRANCH = "BRANCH"


class VmmKind(StrEnum):
    """What runs the guest."""

    FIRECRACKER = "FIRECRACKER"
    SIMULATOR = "SIMULATOR"


@dataclass(frozen=True, slots=True)
class VmmVersion:
    """A VMM and its version, for example `1.12.1`."""

    kind: VmmKind
    version: str


@dataclass(frozen=True, slots=True)
class Drive:
    """A block device."""

    drive_id: str
    path: Path
    """Absolute, resolved, inside an image root. Of a writable one: where its first contents came
    from; each sandbox writes to a file in its own folder."""
    read_only: bool = True
    root_device: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """The shape of a guest: what a snapshot fixes for all its children."""

    vcpus: int
    memory_mib: int
    drives: tuple[Drive, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Guest memory in bytes: also the size of its memory file."""
        return self.memory_mib * MIB

    @property
    def writable_drives(self) -> tuple[Drive, ...]:
        """Those of which every sandbox has a file of its own."""
        return tuple(drive for drive in self.drives if not drive.read_only)


@dataclass(frozen=True, slots=True)
class Boot:
    """How a guest is booted."""

    machine: Machine
    kernel_image: Path
    initrd: Path | None = None
    boot_args: str = ""


class DirtyBaseState(StrEnum):
    """Whether the next diff has something to stand on."""

    VALID = "VALID"
    PENDING = "PENDING"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True)
class UnmergedDiff:
    """A diff whose pages exist nowhere else: a layer that is being stored, or one that could not
    be merged (the disk was full)."""

    memory_path: Path
    extents_path: Path
    data_bytes: int
    branch_id: str


@dataclass(frozen=True, slots=True)
class DirtyBase:
    """The image whose memory, with `unmerged` laid over it in order, equals the source's memory at
    the moment its dirty log was last cleared."""

    state: DirtyBaseState
    snapshot_id: str | None = None
    """None with state VALID: the empty image of a freshly booted sandbox."""
    branch_id: str | None = None
    """Only PENDING: whose window may have cleared the dirty log."""
    unmerged: tuple[UnmergedDiff, ...] = ()
    """Oldest first. INVALID: what is still to be stored as layers, and no base of a next diff."""
    invalid_reason: str = ""

    @classmethod
    def empty(cls) -> DirtyBase:
        """Of a freshly booted sandbox: all zeros."""
        return cls(DirtyBaseState.VALID)

    @classmethod
    def of(cls, snapshot_id: str) -> DirtyBase:
        """Of a sandbox whose dirty log starts at this snapshot."""
        return cls(DirtyBaseState.VALID, snapshot_id)

    @classmethod
    def invalid(cls, reason: str) -> DirtyBase:
        """Nothing to stand on: only a FULL branch helps."""
        return cls(DirtyBaseState.INVALID, invalid_reason=reason)

    def pending(self, branch_id: str) -> DirtyBase:
        """This base, once a window of `branch_id` may have opened."""
        return replace(self, state=DirtyBaseState.PENDING, branch_id=branch_id)

    def back_to_valid(self) -> DirtyBase:
        """This base again: the window certainly left the dirty log whole."""
        return replace(self, state=DirtyBaseState.VALID, branch_id=None)

    def unusable(self, reason: str) -> DirtyBase:
        """Nothing for the next diff to stand on. What is being stored is stored all the same."""
        return replace(self, state=DirtyBaseState.INVALID, branch_id=None, invalid_reason=reason)

    def over(self, diff: UnmergedDiff) -> DirtyBase:
        """The base after a window that wrote this."""
        return replace(self.back_to_valid(), unmerged=(*self.unmerged, diff))

    def below(self, branch_id: str) -> DirtyBase | None:
        """What the diff of a branch lies over; None where this has no such diff."""
        for number, diff in enumerate(self.unmerged):
            if diff.branch_id == branch_id:
                return replace(self.back_to_valid(), unmerged=self.unmerged[:number])
        return None

    def stored(self, branch_id: str, snapshot_id: str) -> DirtyBase:
        """This base once the diff of a branch, with all below it, is a snapshot."""
        below = self.below(branch_id)
        assert below is not None, "what is stored was there"
        left = self.unmerged[len(below.unmerged) + 1 :]
        return replace(self, snapshot_id=snapshot_id, unmerged=left)

    def cut_at(self, branch_id: str, reason: str) -> DirtyBase:
        """INVALID, for the diff of a branch is lost, and with it all above it."""
        below = self.below(branch_id)
        return (self if below is None else below).unusable(reason)


class ExitCause(StrEnum):
    """Why a process was ended, where that is known beyond its signal."""

    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """The kernel's log names it."""
    PROBABLY_OUT_OF_MEMORY = "PROBABLY_OUT_OF_MEMORY"
    """The kernel counted a kill for memory just then, and nothing says whom it ended."""


@dataclass(frozen=True, slots=True)
class SandboxExit:
    """How a sandbox's process ended."""

    time: datetime
    exit_code: int
    """-1 where not known or ended by a signal."""
    signal: int
    last_words: str
    cause: ExitCause | None = None
    explanation: str = ""
    """The cause in words, with what to do; empty without one."""


@dataclass(frozen=True, slots=True)
class SandboxMemory:
    """What a sandbox has of the host's memory now."""

    private_bytes: int
    """Its own: what the guest has written to, and what the VMM needs."""
    shared_bytes: int
    """Pages of files, of its image above all, that others may have as well."""


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """What identifies a VMM's process across restarts of the server."""

    boot_id: str
    """/proc/sys/kernel/random/boot_id"""
    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat."""
    executable: Path
    """/proc/PID/exe at the spawn."""
    executable_device: int
    executable_inode: int


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One microVM."""

    sandbox_id: str
    state: SandboxState
    wished_state: WishedState
    machine: Machine
    vmm: VmmVersion
    create_time: datetime
    labels: Mapping[str, str] = field(default_factory=dict)
    boot: Boot | None = None
    """Only where it was booted."""
    snapshot_id: str | None = None
    """Only where it came from a snapshot (which may be deleted by now)."""
    source_sandbox_id: str | None = None
    fork_id: str | None = None
    ttl_seconds: float | None = None
    expire_time: datetime | None = None
    """None without a ttl and while paused."""
    on_expiry: ExpiryAction = ExpiryAction.DELETE
    dirty_base: DirtyBase = field(default_factory=DirtyBase.empty)
    last_diff_bytes: int | None = None
    """What the last window of this source wrote: the expectation for the next."""
    process: ProcessRecord | None = None
    start_time: datetime | None = None
    exit: SandboxExit | None = None


# --- snapshots and branches --------------------------------------------------------------------


class BranchMode(StrEnum):
    """What the window writes."""

    AUTO = "AUTO"
    FULL = "FULL"
    DIFF = "DIFF"


class Layout(StrEnum):
    """How a snapshot is kept."""

    AUTO = "AUTO"
    FLAT = "FLAT"
    LAYERED = "LAYERED"


class Durability(StrEnum):
    """What READY means for the files of a snapshot."""

    DISK = "DISK"
    MEMORY = "MEMORY"


class SnapshotState(StrEnum):
    """Whether a snapshot can be used."""

    READY = "READY"
    LOST = "LOST"
    """Gone with the memory that it was kept in."""


class StagingKind(StrEnum):
    """Where Firecracker writes in the window."""

    TMPFS = "TMPFS"
    DISK = "DISK"


class CopyMethod(StrEnum):
    """How bytes get from one file to another."""

    REFLINK = "REFLINK"
    COPY = "COPY"


@dataclass(frozen=True, slots=True)
class SnapshotRoom:
    """What a snapshot, with all that it stands on, holds on the disk."""

    exclusive_bytes: int
    """What its deletion would free now."""
    shared_bytes: int
    """The rest."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An immutable image that is, or was, READY. `deleted` ones are out of the API and wait for the
    last sandbox that stands on them."""

    snapshot_id: str
    create_time: datetime
    source_sandbox_id: str
    branch_id: str
    parent_snapshot_id: str | None
    mode: BranchMode
    layout: Layout
    machine: Machine
    vmm: VmmVersion
    disk_bytes: int
    dirty_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    deleted: bool = False
    digest: str | None = None
    """Of its checksums, as `blake3:` and hexadecimal digits; None until they are computed."""
    room: SnapshotRoom | None = None
    """As of a moment, where it was asked for: no part of the row."""
    state: SnapshotState = SnapshotState.READY
    durability: Durability = Durability.DISK
    """What its files have now."""


@dataclass(frozen=True, slots=True)
class LayeredRow:
    """What is needed of a LAYERED snapshot to choose what is flattened."""

    snapshot_id: str
    parent_snapshot_id: str
    disk_bytes: int
    create_time: datetime
    deleted: bool


@dataclass(frozen=True, slots=True)
class FlattenProgress:
    """How far a flatten is."""

    done_bytes: int
    total_bytes: int
    """0 as long as it isn't known, and where nothing has to be copied."""


@dataclass(frozen=True, slots=True)
class Flattening:
    """A snapshot that becomes FLAT."""

    snapshot: Snapshot
    progress: FlattenProgress


@dataclass(frozen=True, slots=True)
class Verification:
    """How far it is that a snapshot, with all that it stands on, is compared with its checksums."""

    snapshot_id: str
    """The one that is being read."""
    done_bytes: int
    total_bytes: int
    verified: bool = False
    """Everything is as it was."""


class BranchStage(StrEnum):
    """Stages of a branch, in their order."""

    QUEUED = "QUEUED"
    PRECOPYING = "PRECOPYING"
    PAUSED = "PAUSED"
    RESUMED = "RESUMED"
    MERGING = "MERGING"
    FINALIZING = "FINALIZING"
    FORKING = "FORKING"
    READY = "READY"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self in _ENDED_STAGES


_ENDED_STAGES = frozenset({BranchStage.READY, BranchStage.FAILED, BranchStage.CANCELLED})

BRANCH_TRANSITIONS: Mapping[BranchStage, frozenset[BranchStage]] = {
    BranchStage.QUEUED: frozenset(
        {BranchStage.PRECOPYING, BranchStage.PAUSED, BranchStage.FAILED, BranchStage.CANCELLED}
    ),
    BranchStage.PRECOPYING: frozenset(
        {BranchStage.PAUSED, BranchStage.FAILED, BranchStage.CANCELLED}
    ),
    BranchStage.PAUSED: frozenset({BranchStage.RESUMED, BranchStage.FAILED}),
    BranchStage.RESUMED: frozenset({BranchStage.MERGING, BranchStage.FAILED}),
    BranchStage.MERGING: frozenset({BranchStage.FINALIZING, BranchStage.FAILED}),
    BranchStage.FINALIZING: frozenset({BranchStage.FORKING, BranchStage.READY, BranchStage.FAILED}),
    BranchStage.FORKING: frozenset({BranchStage.READY, BranchStage.FAILED}),
    BranchStage.READY: frozenset(),
    BranchStage.FAILED: frozenset(),
    BranchStage.CANCELLED: frozenset(),
}
"""Which stage may follow which. QUEUED goes straight to PAUSED for FULL: nothing is pre-copied."""


@dataclass(frozen=True, slots=True)
class PrecopyProgress:
    """How far the pre-copy is."""

    done_bytes: int
    total_bytes: int
    hole_bytes: int
    method: CopyMethod | None


@dataclass(frozen=True, slots=True)
class MergeProgress:
    """How far the merge is."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PauseWindow:
    """The pause window, from the first byte of the pause request to the resume request's reply."""

    start_time: datetime
    total_us: int
    """The server's monotonic clock, on a thread of its own."""
    pause_us: int
    """Firecracker's latencies_us; 0 where the source was paused already."""
    snapshot_us: int
    resume_us: int
    dirty_bytes: int
    staging: StagingKind
    was_paused: bool = False
    drive_clone_us: int = 0
    """For the clones (or copies) of writable drives, between snapshot and resume."""

    @property
    def vmm_total_us(self) -> int:
        """Firecracker's own view of the window."""
        return self.pause_us + self.snapshot_us + self.resume_us


@dataclass(frozen=True, slots=True)
class StageEntry:
    """When a branch entered a stage."""

    stage: BranchStage
    enter_time: datetime


@dataclass(frozen=True, slots=True)
class Branch:
    """The operation that makes a snapshot of a live sandbox."""

    branch_id: str
    sandbox_id: str
    snapshot_id: str
    sequence: int
    stage: BranchStage
    stages: tuple[StageEntry, ...]
    requested_mode: BranchMode
    requested_layout: Layout
    layout: Layout
    create_time: datetime
    mode: BranchMode | None = None
    mode_reason: str = ""
    snapshot_labels: Mapping[str, str] = field(default_factory=dict)
    max_pause_us: int | None = None
    predicted_pause_us: int | None = None
    precopy: PrecopyProgress | None = None
    pause_window: PauseWindow | None = None
    merge: MergeProgress | None = None
    fork_id: str | None = None
    error: Problem | None = None
    end_time: datetime | None = None
    staging_serial: int | None = None
    """Names its files in the staging folder; never used twice."""
    staging: StagingKind | None = None
    base_snapshot_id: str | None = None
    """What a DIFF stands on; None for the empty image and for FULL."""
    durability: Durability = Durability.DISK
    """What READY means for its snapshot."""

    def entering(self, stage: BranchStage, at: datetime) -> Branch:
        """This branch in its next stage. The sequence is the caller's business."""
        if stage not in BRANCH_TRANSITIONS[self.stage]:
            raise AssertionError(f"branch {self.branch_id}: {self.stage} can't become {stage}")
        return replace(
            self,
            stage=stage,
            stages=(*self.stages, StageEntry(stage, at)),
            end_time=at if stage.ended else None,
        )


# --- forks -------------------------------------------------------------------------------------


class ForkStage(StrEnum):
    """Stages of a fork."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    READY = "READY"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self in (ForkStage.READY, ForkStage.FAILED)


class ForkChildState(StrEnum):
    """Where a child stands."""

    PENDING = "PENDING"
    READY = "READY"
    FAILED = "FAILED"
    DELETED = "DELETED"


class FailureAction(StrEnum):
    """What happens to the good children when one fails."""

    KEEP = "KEEP"
    DELETE_ALL = "DELETE_ALL"


@dataclass(frozen=True, slots=True)
class ForkSpec:
    """What children are wanted."""

    count: int
    fork_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl_seconds: float | None = None
    on_expiry: ExpiryAction = ExpiryAction.DELETE
    on_failure: FailureAction = FailureAction.KEEP
    allow_drive_copy: bool = False
    """Give children copies of writable drives where they can't be cloned."""


@dataclass(frozen=True, slots=True)
class ForkChild:
    """One child of a fork; its id is `<fork_id>-<index>`."""

    sandbox_id: str
    state: ForkChildState = ForkChildState.PENDING
    error: Problem | None = None
    start_us: int | None = None
    """From the start of its process to the reply of the load."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Starting N sandboxes from one snapshot."""

    fork_id: str
    snapshot_id: str
    sequence: int
    stage: ForkStage
    spec: ForkSpec
    children: tuple[ForkChild, ...]
    create_time: datetime
    branch_id: str | None = None
    error: Problem | None = None
    end_time: datetime | None = None
    flatten: FlattenProgress | None = None
    """Only shown, never stored: what the children wait for."""


# --- pages and repeated requests ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list, in order of creation, then of id."""

    items: tuple[T, ...]
    next_position: tuple[datetime, str] | None
    """Creation time and id of the last item, if more follow."""


@dataclass(frozen=True, slots=True)
class RememberedRequest:
    """A request_id and what it made: kept for 24 h, so that a repeat has no second effect."""

    request_id: str
    method: str
    fingerprint: str
    """Hash of the arguments."""
    resource_id: str
    """Id of the sandbox, branch or fork it made."""


# --- orders: what the edge hands inwards once it is checked -------------------------------------


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A request_id together with what it was sent for."""

    request_id: str
    method: str
    fingerprint: str

    def check(self, first: RequestKey | RememberedRequest) -> None:
        """Raises REQUEST_ID_REUSED unless this is a repeat of the first call with this id."""
        if (self.method, self.fingerprint) != (first.method, first.fingerprint):
            raise ForkpointError(
                Reason.REQUEST_ID_REUSED,
                f"request_id {self.request_id} was used for another {first.method} call: "
                "make a new one for every call that is not a repeat",
                metadata={"request_id": self.request_id},
            )


@dataclass(frozen=True, slots=True)
class CreateOrder:
    """Make a sandbox: by `boot` or from `snapshot_id`, exactly one of which is set."""

    sandbox_id: str | None = None
    boot: Boot | None = None
    snapshot_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl_seconds: float | None = None
    on_expiry: ExpiryAction = ExpiryAction.DELETE
    request: RequestKey | None = None
    allow_drive_copy: bool = False
    """Copy writable drives where they can't be cloned."""


@dataclass(frozen=True, slots=True)
class SandboxChange:
    """Change the named fields of a sandbox."""

    fields: frozenset[str]
    """Of labels, ttl, on_expiry."""
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl_seconds: float | None = None
    on_expiry: ExpiryAction = ExpiryAction.DELETE


@dataclass(frozen=True, slots=True)
class BranchOrder:
    """Branch a sandbox."""

    sandbox_id: str
    branch_id: str | None = None
    snapshot_id: str | None = None
    mode: BranchMode = BranchMode.AUTO
    layout: Layout = Layout.AUTO
    max_pause_us: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    fork: ForkSpec | None = None
    request: RequestKey | None = None
    durability: Durability = Durability.DISK
    allow_drive_copy: bool = False
    """Copy writable drives where they can't be cloned."""


@dataclass(frozen=True, slots=True)
class ForkOrder:
    """Start children of a snapshot."""

    snapshot_id: str
    spec: ForkSpec
    request: RequestKey | None = None


class ArchiveLayout(StrEnum):
    """How a snapshot is kept in an archive."""

    FLAT = "FLAT"
    """One image."""
    KEPT = "KEPT"
    """As it is: a LAYERED one with all that it stands on."""


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """Make an archive of a snapshot."""

    snapshot_id: str
    layout: ArchiveLayout = ArchiveLayout.FLAT
    level: int | None = None
    """Of zstd; None: the server's choice."""


@dataclass(frozen=True, slots=True)
class ImportOrder:
    """Make a snapshot of an archive."""

    snapshot_id: str | None = None
    """None: as the archive calls it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    request: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class ArchivePiece:
    """Some bytes of an archive, and how far it is with them."""

    snapshot_id: str
    layout: Layout
    """Of the snapshot in it."""
    image_count: int
    data_bytes: int
    """Of memory in it."""
    total_bytes: int
    """Of content, before it is packed."""
    done_bytes: int
    data: bytes
    """Empty in the first piece."""


@dataclass(frozen=True, slots=True)
class BranchView:
    """A branch with what its message shows beside it, all of one moment."""

    branch: Branch
    snapshot: Snapshot | None = None
    """Once it is READY."""
    fork: Fork | None = None


# --- what the host can do -----------------------------------------------------------------------


class CheckOutcome(StrEnum):
    """Outcomes of a check of the host."""

    OK = "OK"
    WARNING = "WARNING"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class HostCheck:
    """One thing that this host can or can't do."""

    name: str
    outcome: CheckOutcome
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory budget, and what is counted against it."""

    budget_bytes: int
    sandbox_bytes: int
    """Private resident memory of all VMMs."""
    headroom_bytes: int
    """What sandboxes are counted with beyond that: those that run and those that are promised."""
    staging_bytes: int
    """On tmpfs: what lies there and what is reserved."""
    child_headroom_bytes: int
    """The headroom of one sandbox."""

    @property
    def used_bytes(self) -> int:
        """All that is counted."""
        return self.sandbox_bytes + self.headroom_bytes + self.staging_bytes

    @property
    def free_bytes(self) -> int:
        """What is left of the budget; never negative."""
        return max(0, self.budget_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What GetServerInfo tells."""

    version: str
    vmm: VmmVersion | None
    vmm_path: Path | None
    checks: tuple[HostCheck, ...]
    start_time: datetime
    image_roots: tuple[Path, ...]
    data_dir: Path
    max_fork_count: int
    max_queued_branches: int
    staging: StagingKind
    reflink: bool
    image_free_bytes: int
    image_used_bytes: int
    images_quota_bytes: int
    """0: there is none."""
    images_low_water_bytes: int
    staging_free_bytes: int
    memory: MemoryUse
