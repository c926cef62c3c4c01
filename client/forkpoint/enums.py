"""The words of the contract as enums; every value is the contract's name without its prefix.

A value that a newer server sends and this client doesn't know reads as `UNSPECIFIED`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

E = TypeVar("E", bound=StrEnum)


def choose(kind: type[E], value: E | str) -> E:
    """The member that `value` names, in any case; ValueError names what could be chosen."""
    if isinstance(value, kind):
        return value
    try:
        return kind(str(value).upper())
    except ValueError:
        choices = ", ".join(repr(member.value.lower()) for member in kind)
        raise ValueError(f"{value!r} is no {kind.__name__}: choose one of {choices}") from None


class SandboxState(StrEnum):
    """What a sandbox does."""

    UNSPECIFIED = "UNSPECIFIED"
    CREATING = "CREATING"
    """Its process is being started."""
    RUNNING = "RUNNING"
    """The guest runs."""
    PAUSED = "PAUSED"
    """The guest stands still because its owner asked for it."""
    UNKNOWN = "UNKNOWN"
    """Its VMM does not answer; no call is taken until it does."""
    STOPPED = "STOPPED"
    """Its process has ended; `exit` says how."""
    DELETING = "DELETING"
    """It is being deleted."""


class WishedState(StrEnum):
    """What the owner wants a sandbox to do."""

    UNSPECIFIED = "UNSPECIFIED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"


class SandboxExitCause(StrEnum):
    """Why a sandbox's process was ended, where more is known than its exit code or signal."""

    UNSPECIFIED = "UNSPECIFIED"
    """Nothing more is known."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """The kernel's out-of-memory killer ended it: its log names the process."""
    PROBABLY_OUT_OF_MEMORY = "PROBABLY_OUT_OF_MEMORY"
    """That killer ended some process just then; the server may not read the log to see which."""


class ExpiryAction(StrEnum):
    """What happens when a sandbox's ttl is over."""

    UNSPECIFIED = "UNSPECIFIED"
    """The same as DELETE."""
    DELETE = "DELETE"
    PAUSE = "PAUSE"
    """It is paused; resuming it starts its ttl anew."""
    BRANCH = "BRANCH"
    """It is branched, and deleted once the snapshot is READY."""


class VmmKind(StrEnum):
    """Kinds of virtual machine monitor."""

    UNSPECIFIED = "UNSPECIFIED"
    FIRECRACKER = "FIRECRACKER"
    """Firecracker on KVM: a real machine."""
    SIMULATOR = "SIMULATOR"
    """No guest code runs. For developing clients on machines without KVM."""


class DirtyBaseState(StrEnum):
    """Whether the next branch of a sandbox can be a DIFF."""

    UNSPECIFIED = "UNSPECIFIED"
    VALID = "VALID"
    PENDING = "PENDING"
    """A branch has opened its window, or is about to; its snapshot becomes the base."""
    INVALID = "INVALID"
    """Only a FULL branch gives this source a base again."""


class BranchMode(StrEnum):
    """What the pause window writes."""

    UNSPECIFIED = "UNSPECIFIED"
    AUTO = "AUTO"
    """DIFF wherever the source's dirty base is valid."""
    FULL = "FULL"
    """All of the memory."""
    DIFF = "DIFF"
    """Only the pages dirtied since the dirty base."""


class Layout(StrEnum):
    """How a snapshot is kept."""

    UNSPECIFIED = "UNSPECIFIED"
    AUTO = "AUTO"
    FLAT = "FLAT"
    """One sparse file with all of the memory."""
    LAYERED = "LAYERED"
    """The diff of the window over the parent: nothing of the parent is copied."""


class Durability(StrEnum):
    """What READY means for the files of a snapshot."""

    UNSPECIFIED = "UNSPECIFIED"
    """The same as DISK."""
    DISK = "DISK"
    """They are synced to the disk."""
    MEMORY = "MEMORY"
    """They are in memory: there after a restart of the server, but not after a reboot. The server
    writes them to the disk in the background."""


class SnapshotState(StrEnum):
    """Whether a snapshot can be used."""

    UNSPECIFIED = "UNSPECIFIED"
    READY = "READY"
    LOST = "LOST"
    """It was kept in memory only, and went with it: all that is left to do is to delete it."""


class BranchStage(StrEnum):
    """Where a branch stands. READY, FAILED and CANCELLED end it."""

    UNSPECIFIED = "UNSPECIFIED"
    QUEUED = "QUEUED"
    """Waits for an earlier branch of the same source or for its turn to copy."""
    PRECOPYING = "PRECOPYING"
    """The known part of the image is copied while the source runs."""
    PAUSED = "PAUSED"
    """The pause window. Known, and delivered, together with RESUMED."""
    RESUMED = "RESUMED"
    """The source runs again."""
    MERGING = "MERGING"
    """The diff is laid over the image."""
    FINALIZING = "FINALIZING"
    """The snapshot is made durable."""
    FORKING = "FORKING"
    """The snapshot is READY and its children are started."""
    READY = "READY"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def over(self) -> bool:
        """Whether the branch has ended."""
        return self in (BranchStage.READY, BranchStage.FAILED, BranchStage.CANCELLED)


class CopyMethod(StrEnum):
    """How bytes get from one file to another."""

    UNSPECIFIED = "UNSPECIFIED"
    REFLINK = "REFLINK"
    """The file system shares the blocks."""
    COPY = "COPY"
    """The data extents are copied."""


class ArchiveLayout(StrEnum):
    """How a snapshot is kept in an archive."""

    UNSPECIFIED = "UNSPECIFIED"
    FLAT = "FLAT"
    """One image."""
    KEPT = "KEPT"
    """As the server keeps it: a LAYERED one with all that it stands on."""


class StagingKind(StrEnum):
    """Where Firecracker writes in the window."""

    UNSPECIFIED = "UNSPECIFIED"
    TMPFS = "TMPFS"
    DISK = "DISK"


class ForkStage(StrEnum):
    """Where a fork stands. READY and FAILED end it."""

    UNSPECIFIED = "UNSPECIFIED"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    READY = "READY"
    """Every child has its outcome; partial success is normal."""
    FAILED = "FAILED"
    """No child is left."""

    @property
    def over(self) -> bool:
        """Whether the fork has ended."""
        return self in (ForkStage.READY, ForkStage.FAILED)


class ForkChildState(StrEnum):
    """Where a child stands."""

    UNSPECIFIED = "UNSPECIFIED"
    PENDING = "PENDING"
    READY = "READY"
    FAILED = "FAILED"
    DELETED = "DELETED"
    """Deleted since another child failed (on_failure DELETE_ALL)."""


class FailureAction(StrEnum):
    """What happens to the good children when one fails."""

    UNSPECIFIED = "UNSPECIFIED"
    """The same as KEEP."""
    KEEP = "KEEP"
    DELETE_ALL = "DELETE_ALL"


class CheckOutcome(StrEnum):
    """Outcome of a check of the host."""

    UNSPECIFIED = "UNSPECIFIED"
    OK = "OK"
    WARNING = "WARNING"
    """It works, but slower or with less."""
    FAILED = "FAILED"
    """It doesn't work."""
