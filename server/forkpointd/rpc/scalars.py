"""Enums, instants, spans and text, between the model's types and the wire's.

Enums are mapped by name: a member `RUNNING` of the model is the value `SANDBOX_STATE_RUNNING` of
the message, whose prefix is taken from its value 0. The tables are built at import, which fails if
the two sides don't have the same names.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from forkpoint.v1 import (
    branch_pb2,
    errors_pb2,
    fork_pb2,
    sandbox_pb2,
    server_service_pb2,
    snapshot_pb2,
    snapshot_service_pb2,
)
from forkpointd import model

if TYPE_CHECKING:
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper

M = TypeVar("M", bound=StrEnum)
V = TypeVar("V", bound=int)

MICROS_PER_SECOND = 1_000_000
NANOS_PER_MICRO = 1_000
NANOS_PER_SECOND = 1_000_000_000


class EnumMap(Generic[M, V]):
    """One enum of the model and its twin on the wire."""

    def __init__(self, members: type[M], wire: _EnumTypeWrapper[V]) -> None:
        values = {value.name: value.number for value in wire.DESCRIPTOR.values}
        prefix = wire.DESCRIPTOR.values_by_number[0].name.removesuffix("UNSPECIFIED")
        wanted = {f"{prefix}{member.name}" for member in members}
        there = {name for name, number in values.items() if number != 0}
        if wanted != there:
            raise TypeError(
                f"{members.__name__} and {wire.DESCRIPTOR.full_name} differ: {wanted ^ there}"
            )
        self._to_wire = {member: cast("V", values[f"{prefix}{member.name}"]) for member in members}
        self._to_model = {number: member for member, number in self._to_wire.items()}

    def to_wire(self, member: M) -> V:
        """The message's value."""
        return self._to_wire[member]

    def or_unspecified(self, member: M | None) -> V:
        """As `to_wire`, with UNSPECIFIED for what is not known yet."""
        return cast("V", 0) if member is None else self._to_wire[member]

    def to_model(self, number: V) -> M:
        """The model's member. `KeyError` for UNSPECIFIED and for numbers of a newer contract,
        which validation refuses before."""
        return self._to_model[number]

    def or_default(self, number: V, default: M) -> M:
        """As `to_model`, with a meaning for UNSPECIFIED."""
        return default if number == 0 else self._to_model[number]


SANDBOX_STATE = EnumMap(model.SandboxState, sandbox_pb2.SandboxState)
WISHED_STATE = EnumMap(model.WishedState, sandbox_pb2.WishedState)
EXPIRY_ACTION = EnumMap(model.ExpiryAction, sandbox_pb2.ExpiryAction)
EXIT_CAUSE = EnumMap(model.ExitCause, sandbox_pb2.SandboxExitCause)
VMM_KIND = EnumMap(model.VmmKind, sandbox_pb2.VmmKind)
DIRTY_BASE_STATE = EnumMap(model.DirtyBaseState, sandbox_pb2.DirtyBaseState)
BRANCH_MODE = EnumMap(model.BranchMode, snapshot_pb2.BranchMode)
LAYOUT = EnumMap(model.Layout, snapshot_pb2.Layout)
ARCHIVE_LAYOUT = EnumMap(model.ArchiveLayout, snapshot_service_pb2.ArchiveLayout)
DURABILITY = EnumMap(model.Durability, snapshot_pb2.Durability)
SNAPSHOT_STATE = EnumMap(model.SnapshotState, snapshot_pb2.SnapshotState)
BRANCH_STAGE = EnumMap(model.BranchStage, branch_pb2.BranchStage)
COPY_METHOD = EnumMap(model.CopyMethod, branch_pb2.CopyMethod)
STAGING_KIND = EnumMap(model.StagingKind, branch_pb2.StagingKind)
FORK_STAGE = EnumMap(model.ForkStage, fork_pb2.ForkStage)
FORK_CHILD_STATE = EnumMap(model.ForkChildState, fork_pb2.ForkChildState)
FAILURE_ACTION = EnumMap(model.FailureAction, fork_pb2.FailureAction)
CHECK_OUTCOME = EnumMap(model.CheckOutcome, server_service_pb2.HostCheckOutcome)
ERROR_REASON = EnumMap(model.Reason, errors_pb2.ErrorReason)


def text(value: object) -> str:
    """`str(value)` as something a message can hold.

    Names of files and the last words of a process may hold bytes that are no UTF-8; Python carries
    them as lone surrogates, which protobuf refuses. They are shown as escapes.
    """
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def timestamp(instant: datetime) -> Timestamp:
    """An aware instant, exact to the microsecond."""
    if instant.tzinfo is None:
        raise ValueError(f"{instant!r} has no time zone")
    span = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return Timestamp(
        seconds=span.days * 86_400 + span.seconds, nanos=span.microseconds * NANOS_PER_MICRO
    )


def optional_timestamp(instant: datetime | None) -> Timestamp | None:
    """As `timestamp`; absent stays absent."""
    return None if instant is None else timestamp(instant)


def duration(micros: int) -> Duration:
    """A span of whole microseconds, exactly. Seconds and nanos have the same sign."""
    seconds, rest = divmod(abs(micros), MICROS_PER_SECOND)
    sign = -1 if micros < 0 else 1
    return Duration(seconds=sign * seconds, nanos=sign * rest * NANOS_PER_MICRO)


def optional_duration(micros: int | None) -> Duration | None:
    """As `duration`; absent stays absent."""
    return None if micros is None else duration(micros)


def duration_of_seconds(seconds: float | None) -> Duration | None:
    """A span that the model holds in seconds, to the nearest microsecond."""
    return None if seconds is None else duration(round(seconds * MICROS_PER_SECOND))


def micros(span: Duration) -> int:
    """Whole microseconds of a span, the rest cut off."""
    nanos = span.seconds * NANOS_PER_SECOND + span.nanos
    return nanos // NANOS_PER_MICRO if nanos >= 0 else -(-nanos // NANOS_PER_MICRO)


def seconds(span: Duration) -> float:
    """A span in seconds, as the model holds a time to live: exact for whole microseconds below
    285 years."""
    return micros(span) / MICROS_PER_SECOND
