"""What can go wrong, as exceptions a program can tell apart.

Every failure that a server reports, and every server that can't be reached, is a `ForkpointError`.
Its subclasses follow the gRPC code (`NotFound`, `FailedPrecondition`, ...); below them the cases a
program is likely to handle have a class of their own (`SandboxNotFound`, `PauseTooLong`, ...).
`reason` is the name of the contract's `ErrorReason` without its prefix.

Misuse that needs no server to be seen (a mode that doesn't exist, "10 minuets") is a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request, or one way in which a snapshot doesn't fit a host."""

    field: str
    """Its path in the request, for example `fork.count`."""
    description: str
    """What is wrong and what would be right."""


class ForkpointError(Exception):
    """A call was refused, or a branch, a fork or a child failed."""

    code: str = "UNKNOWN"
    """The gRPC code's name."""

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        code: str | None = None,
        metadata: Mapping[str, str] | None = None,
        fields: tuple[FieldViolation, ...] = (),
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What happened and what to do, for a person."""
        self.reason = reason
        """Why, for a program; None where gRPC itself failed."""
        if code is not None:
            self.code = code
        self.metadata: Mapping[str, str] = dict(metadata or {})
        """Figures and ids that the message names."""
        self.fields = fields
        """What exactly was wrong."""
        self.retry_after = retry_after
        """When waiting helps: how long."""

    def __str__(self) -> str:
        said = [self.message]
        said += [f"  {wrong.field}: {wrong.description}" for wrong in self._unsaid_fields()]
        return "\n".join(said)

    def _unsaid_fields(self) -> list[FieldViolation]:
        """The fields whose description the message doesn't have already."""
        return [wrong for wrong in self.fields if wrong.description not in self.message]


class InvalidArgument(ForkpointError):
    """The request is wrong; `fields` names what."""

    code = "INVALID_ARGUMENT"


class NotFound(ForkpointError):
    """There is none with this id."""

    code = "NOT_FOUND"


class SandboxNotFound(NotFound):
    """No sandbox has this id."""


class SnapshotNotFound(NotFound):
    """No snapshot has this id, or it is not READY yet."""


class BranchNotFound(NotFound):
    """No branch has this id."""


class ForkNotFound(NotFound):
    """No fork has this id."""


class AlreadyExists(ForkpointError):
    """The id, or the request id, was used before."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(ForkpointError):
    """It can't be done as things stand; the message says what would change that."""

    code = "FAILED_PRECONDITION"


class SandboxNotRunning(FailedPrecondition):
    """The sandbox's process has ended."""


class SandboxDeleted(FailedPrecondition):
    """The sandbox was deleted while the call waited."""


class PauseTooLong(FailedPrecondition):
    """The predicted pause window is longer than `max_pause` allows."""

    @property
    def predicted_pause(self) -> timedelta | None:
        """How long the source would stand still."""
        text = self.metadata.get("predicted_pause_ms")
        try:
            return None if text is None else timedelta(milliseconds=float(text))
        except ValueError:
            return None


class DirtyBaseInvalid(FailedPrecondition):
    """A DIFF was asked for and the source has no valid dirty base; branch it FULL once."""


class BranchNotCancellable(FailedPrecondition):
    """The branch has reached its pause window or has ended; delete its snapshot instead."""


class SnapshotLost(FailedPrecondition):
    """The snapshot was kept in memory only, and went with it; delete it."""


class HostMismatch(FailedPrecondition):
    """The snapshot doesn't fit this host; `fields` names each difference."""


class ConsoleBusy(FailedPrecondition):
    """Someone else is this console's writer."""


class NoVmm(FailedPrecondition):
    """The server has no working VMM; `forkpoint doctor` says why."""


class ResourceExhausted(ForkpointError):
    """There is no room: disk, memory, staging, or a queue that is full."""

    code = "RESOURCE_EXHAUSTED"


class BranchQueueFull(ResourceExhausted):
    """As many branches of this source wait as the server allows; `retry_after` says how long."""


class ConsoleFull(ResourceExhausted):
    """The guest does not read its console."""


class OutOfRange(ForkpointError):
    """The console's output at this offset is gone or not written yet."""

    code = "OUT_OF_RANGE"


class Aborted(ForkpointError):
    """The work was given up halfway; asking again can succeed."""

    code = "ABORTED"


class Cancelled(ForkpointError):
    """A client cancelled it."""

    code = "CANCELLED"


class DeadlineExceeded(ForkpointError, TimeoutError):
    """It took longer than allowed. What the server has begun goes on in the server."""

    code = "DEADLINE_EXCEEDED"


class DataLoss(ForkpointError):
    """A file of the snapshot is gone, cut or altered."""

    code = "DATA_LOSS"


class Internal(ForkpointError):
    """A fault of the server or of the VMM."""

    code = "INTERNAL"


class Unimplemented(ForkpointError):
    """The server doesn't know this call: its version differs from the client's."""

    code = "UNIMPLEMENTED"


class Unavailable(ForkpointError):
    """Not now; the same call can succeed later."""

    code = "UNAVAILABLE"


class SandboxUnresponsive(Unavailable):
    """The sandbox's VMM does not answer; it takes calls again once it does."""


class ServerDraining(Unavailable):
    """The server is going down and takes no new work."""


class ServerNotFound(Unavailable):
    """No server can be reached at this address; the message says how to start one."""


class ConnectionLost(Unavailable):
    """The server was there and is gone, for longer than the client waits for it."""


class VersionMismatchWarning(UserWarning):
    """Client and server are of different versions."""
