"""What the server knows, as plain data: no message of the wire, no connection.

Spans are `timedelta`, instants aware `datetime`s in UTC, sizes are named `_bytes` or `_mib`. What
is absent is None, never an empty string. `forkpoint.Sandbox` and `forkpoint.Snapshot` are these
views with verbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from forkpoint.enums import (
    BranchMode,
    BranchStage,
    CheckOutcome,
    CopyMethod,
    DirtyBaseState,
    Durability,
    ExpiryAction,
    FailureAction,
    ForkChildState,
    ForkStage,
    Layout,
    SandboxExitCause,
    SandboxState,
    SnapshotState,
    StagingKind,
    VmmKind,
    WishedState,
)
from forkpoint.errors import ForkpointError


@dataclass(frozen=True, slots=True)
class Vmm:
    """Which VMM a sandbox runs on."""

    kind: VmmKind
    version: str
    """For example "1.12.1"."""

    def __str__(self) -> str:
        return f"{self.kind.value.capitalize()} {self.version}".rstrip()


@dataclass(frozen=True, slots=True)
class Drive:
    """A block device of a guest. Of a writable one every sandbox has a file of its own."""

    drive_id: str
    """Unique in the sandbox: [a-z][a-z0-9_]{0,31}."""
    path: str
    """Absolute path on the server's host, inside one of its image roots; a writable drive starts
    as a clone of it."""
    read_only: bool = True
    root_device: bool = False
    """Whether the guest boots from it."""


@dataclass(frozen=True, slots=True)
class DirtyBase:
    """The snapshot whose memory equals the source's when its dirty log was last cleared."""

    state: DirtyBaseState = DirtyBaseState.UNSPECIFIED
    snapshot_id: str | None = None
    """None for the empty image of a freshly booted sandbox, and where the base is INVALID."""
    branch_id: str | None = None
    """The branch it waits for; only while PENDING."""
    unmerged_bytes: int = 0
    """Diffs that were taken but not merged yet, as the disk was full."""
    invalid_reason: str | None = None


@dataclass(frozen=True, slots=True)
class SandboxExit:
    """How a sandbox's process ended."""

    time: datetime | None
    exit_code: int | None
    """None where it is not known or where a signal ended it."""
    signal: int | None
    last_words: str
    """The end of the VMM's log and standard error."""
    cause: SandboxExitCause = SandboxExitCause.UNSPECIFIED
    explanation: str | None = None
    """The cause in words, with what to do; None without one."""


@dataclass(frozen=True, slots=True)
class SandboxMemory:
    """What a sandbox has of the host's memory."""

    private_bytes: int
    """Its own: what it really costs."""
    shared_bytes: int
    """Pages of its snapshot's image that it has looked at: there once for all that came from it."""


@dataclass(slots=True, kw_only=True)
class SandboxView:
    """One microVM, as of the moment the server was asked."""

    id: str
    state: SandboxState
    wished_state: WishedState
    labels: Mapping[str, str]
    create_time: datetime | None
    start_time: datetime | None
    """When its process started to run the guest."""
    snapshot_id: str | None
    """The snapshot it was made from; None where it was booted."""
    source_sandbox_id: str | None
    """The sandbox that snapshot was branched from."""
    fork_id: str | None
    """The fork that made it."""
    vcpus: int
    memory_mib: int
    drives: tuple[Drive, ...]
    ttl: timedelta | None
    """Time to live as asked; None: until it is deleted."""
    expire_time: datetime | None
    """When it expires; None without a ttl and while it is paused."""
    on_expiry: ExpiryAction
    dirty_base: DirtyBase
    exit: SandboxExit | None
    vmm: Vmm | None
    pid: int | None
    """Process id of the VMM on the server's host."""
    memory: SandboxMemory | None
    """Only as of a `get` or `refresh`, and only where it has a process."""


@dataclass(slots=True, kw_only=True)
class SnapshotView:
    """An immutable image from which sandboxes start: complete and bootable, unless it is LOST."""

    id: str
    create_time: datetime | None
    source_sandbox_id: str | None
    """The sandbox it was branched from (which may be deleted by now)."""
    branch_id: str | None
    parent_snapshot_id: str | None
    """The snapshot that was the source's dirty base. A LAYERED one stands on it; of a FLAT one this
    is lineage only."""
    mode: BranchMode
    layout: Layout
    labels: Mapping[str, str]
    vcpus: int
    memory_mib: int
    disk_bytes: int
    """What its files take on the disk, or in memory (holes take none)."""
    dirty_bytes: int
    """What its window wrote."""
    drives: tuple[Drive, ...]
    vmm: Vmm | None
    digest: str | None = None
    """Of the checksums of its files: `blake3:` and hexadecimal digits; None until they are
    computed."""
    exclusive_bytes: int | None = None
    """What its deletion would free now; None where it wasn't asked for (a branch's snapshot)."""
    shared_bytes: int | None = None
    """What else its image needs on the disk."""
    state: SnapshotState = SnapshotState.READY
    durability: Durability = Durability.DISK
    """What its files have now: of one that was made with MEMORY this is DISK once it was written
    back."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is."""

    done_bytes: int
    total_bytes: int
    hole_bytes: int = 0
    """Holes of the base, which are not copied."""
    method: CopyMethod = CopyMethod.UNSPECIFIED

    @property
    def fraction(self) -> float:
        """0.0 to 1.0; 1.0 where there is nothing to copy."""
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0


@dataclass(frozen=True, slots=True)
class FlattenUpdate:
    """How far it is that a snapshot becomes FLAT."""

    snapshot: SnapshotView
    progress: Progress

    @property
    def over(self) -> bool:
        """Whether it is."""
        return self.snapshot.layout is Layout.FLAT


@dataclass(frozen=True, slots=True)
class VerifyUpdate:
    """How far it is that a snapshot is compared with its checksums."""

    snapshot_id: str
    """The one that is being read: of a LAYERED one first what it stands on."""
    progress: Progress
    verified: bool
    """Everything is as it was: the last update."""


@dataclass(frozen=True, slots=True)
class StageEntry:
    """When a branch entered a stage."""

    stage: BranchStage
    enter_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseWindow:
    """How long the source stood still, from the pause request to the reply of the resume."""

    start_time: datetime | None
    total: timedelta
    """By the server's monotonic clock."""
    pause: timedelta
    """The VMM's own time for the pause; zero where the owner had paused the source."""
    snapshot: timedelta
    """The VMM's own time for writing."""
    resume: timedelta
    """The VMM's own time for the resume; zero where the source stays paused."""
    vmm_total: timedelta
    """pause + snapshot + resume."""
    dirty_bytes: int
    """What the window wrote."""
    staging: StagingKind
    was_paused: bool
    """True where nothing was stopped for this branch: its owner had paused the source."""
    drive_clone: timedelta = timedelta(0)
    """What the clones of writable drives took, between snapshot and resume."""


@dataclass(frozen=True, slots=True)
class ForkChild:
    """One child of a fork."""

    id: str
    """Its sandbox's id."""
    state: ForkChildState
    error: ForkpointError | None = None
    start_duration: timedelta | None = None
    """From the start of its process to the reply of the load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkUpdate:
    """A fork as of one moment."""

    id: str
    snapshot_id: str
    branch_id: str | None
    sequence: int
    stage: ForkStage
    count: int
    ready_count: int
    failed_count: int
    children: tuple[ForkChild, ...]
    on_failure: FailureAction
    error: ForkpointError | None
    create_time: datetime | None
    end_time: datetime | None
    flatten: Progress | None = None
    """What the children wait for: their snapshot is made one file."""


@dataclass(frozen=True, slots=True)
class ArchivePiece:
    """Some bytes of an archive, and how far it is with them."""

    data: bytes
    """Empty in the first piece."""
    progress: Progress
    """Of the content, before it is packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchUpdate:
    """A branch as of one moment. Each update is whole: one that was missed takes nothing away."""

    id: str
    sandbox_id: str
    """The source."""
    snapshot_id: str
    """What it makes; usable once `snapshot` is there."""
    sequence: int
    """Grows with every change; compare, don't count."""
    stage: BranchStage
    stages: tuple[StageEntry, ...]
    """The stages it has entered, in order, with the time of each."""
    requested_mode: BranchMode
    mode: BranchMode
    """FULL or DIFF; UNSPECIFIED while it is QUEUED."""
    mode_reason: str | None
    """Why AUTO chose that mode."""
    requested_layout: Layout
    layout: Layout
    precopy: Progress | None
    pause: PauseWindow | None
    """There from RESUMED on."""
    merge: Progress | None
    snapshot: SnapshotView | None
    fork: ForkUpdate | None
    error: ForkpointError | None
    """Why it FAILED or was CANCELLED."""
    create_time: datetime | None
    end_time: datetime | None
    predicted_pause: timedelta | None
    durability: Durability = Durability.DISK
    """What READY means for its snapshot."""

    @property
    def duration(self) -> timedelta | None:
        """From its admission to its end; None before."""
        if self.create_time is None or self.end_time is None:
            return None
        return self.end_time - self.create_time


@dataclass(frozen=True, slots=True)
class HostCheck:
    """One thing that a host can or can't do."""

    name: str
    outcome: CheckOutcome
    detail: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """The memory budget of a server: what would cross it is refused with NO_MEMORY."""

    budget_bytes: int
    used_bytes: int
    """All that is counted; it may be above the budget, for guests that run go on."""
    sandbox_bytes: int
    """Private resident memory of all sandboxes' VMMs."""
    headroom_bytes: int
    """What sandboxes are counted with beyond that."""
    staging_bytes: int
    """What is staged and reserved on tmpfs."""
    child_headroom_bytes: int
    """The headroom of one sandbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """The server's facts."""

    version: str
    client_version: str
    """The version of this package, to compare."""
    vmm: Vmm | None
    """What new sandboxes run on; None where there is none: see `checks`."""
    vmm_path: str | None
    checks: tuple[HostCheck, ...] = field(default=())
    start_time: datetime | None
    image_roots: tuple[str, ...]
    data_dir: str
    max_fork_count: int
    max_queued_branches: int
    staging: StagingKind
    reflink: bool
    image_free_bytes: int
    """Less what is reserved, and within quota and low-water mark."""
    staging_free_bytes: int
    memory: MemoryUse | None
    """None from a server that has no memory budget yet."""
    image_used_bytes: int = 0
    images_quota_bytes: int = 0
    """The most that images may take up; 0: there is no quota."""
    images_low_water_bytes: int = 0
    """So much of the disk stays free."""
