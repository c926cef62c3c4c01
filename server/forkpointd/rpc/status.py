"""Reasons to gRPC statuses, and back.

Every error of ours is a `google.rpc.Status` with an ErrorInfo (domain `forkpoint`, reason, figures)
first, then what helps a program: BadRequest, PreconditionFailure or QuotaFailure for the parts of
the problem, RetryInfo where waiting helps. The same Status is what a call ends with and what a
failed branch, fork or child carries.

A call's status travels in its trailing metadata, twice over (grpc-message and the details), and
receivers commonly take 8 KiB of metadata in all; so a status is cut to 4 KiB, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from forkpointd.model import FieldViolation, ForkpointError, Problem, Reason
from forkpointd.rpc.scalars import MICROS_PER_SECOND, duration, micros, text

DOMAIN = "forkpoint"
MAX_METADATA_BYTES = 4096
"""Of all trailing metadata, counted as HTTP/2 counts it (name + value + 32 an entry)."""

C = grpc.StatusCode
CODES: Mapping[Reason, grpc.StatusCode] = {
    Reason.INVALID_FIELD: C.INVALID_ARGUMENT,
    Reason.UNDECODABLE_MESSAGE: C.INVALID_ARGUMENT,
    Reason.SANDBOX_NOT_FOUND: C.NOT_FOUND,
    Reason.SNAPSHOT_NOT_FOUND: C.NOT_FOUND,
    Reason.BRANCH_NOT_FOUND: C.NOT_FOUND,
    Reason.FORK_NOT_FOUND: C.NOT_FOUND,
    Reason.ID_TAKEN: C.ALREADY_EXISTS,
    Reason.REQUEST_ID_REUSED: C.ALREADY_EXISTS,
    Reason.SANDBOX_NOT_RUNNING: C.FAILED_PRECONDITION,
    Reason.SANDBOX_UNRESPONSIVE: C.UNAVAILABLE,
    Reason.SANDBOX_DELETED: C.FAILED_PRECONDITION,
    Reason.BRANCH_QUEUE_FULL: C.RESOURCE_EXHAUSTED,
    Reason.NO_DISK_SPACE: C.RESOURCE_EXHAUSTED,
    Reason.NO_STAGING_SPACE: C.RESOURCE_EXHAUSTED,
    Reason.NO_MEMORY: C.RESOURCE_EXHAUSTED,
    Reason.PAUSE_TOO_LONG: C.FAILED_PRECONDITION,
    Reason.DIRTY_BASE_INVALID: C.FAILED_PRECONDITION,
    Reason.BRANCH_NOT_CANCELLABLE: C.FAILED_PRECONDITION,
    Reason.WINDOW_TIMED_OUT: C.DEADLINE_EXCEEDED,
    Reason.VMM_FAILED: C.INTERNAL,
    Reason.VMM_EXITED: C.ABORTED,
    Reason.WRITE_FAILED: C.RESOURCE_EXHAUSTED,
    Reason.HOST_MISMATCH: C.FAILED_PRECONDITION,
    Reason.IMAGE_DAMAGED: C.DATA_LOSS,
    Reason.SNAPSHOT_LOST: C.FAILED_PRECONDITION,
    Reason.NO_MEMORY_SPACE: C.RESOURCE_EXHAUSTED,
    Reason.WRITABLE_DRIVE: C.FAILED_PRECONDITION,
    Reason.DRIVE_CHANGED: C.FAILED_PRECONDITION,
    Reason.GUARDIAN_LOST: C.ABORTED,
    Reason.CONSOLE_BUSY: C.FAILED_PRECONDITION,
    Reason.CONSOLE_FULL: C.RESOURCE_EXHAUSTED,
    Reason.CONSOLE_OFFSET: C.OUT_OF_RANGE,
    Reason.SERVER_DRAINING: C.UNAVAILABLE,
    Reason.SERVER_RESTARTED: C.ABORTED,
    Reason.PAGE_TOKEN_INVALID: C.INVALID_ARGUMENT,
    Reason.BRANCH_CANCELLED: C.CANCELLED,
    Reason.CHILDREN_FAILED: C.ABORTED,
    Reason.NO_VMM: C.FAILED_PRECONDITION,
    Reason.INTERNAL: C.INTERNAL,
    Reason.ARCHIVE_INVALID: C.INVALID_ARGUMENT,
    Reason.IMPORT_BROKEN_OFF: C.ABORTED,
}
"""The code of each reason, as errors.proto names it (a test compares the two)."""

_QUOTAS: Mapping[Reason, str] = {
    Reason.BRANCH_QUEUE_FULL: "branch_queue",
    Reason.NO_DISK_SPACE: "disk",
    Reason.NO_STAGING_SPACE: "staging",
    Reason.NO_MEMORY: "memory",
    Reason.WRITE_FAILED: "disk",
}
"""What is used up, for a problem that names no parts of its own."""

_CODES_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each part of a problem a status keeps; bytes but for `fields`."""

    message: int
    value: int
    fields: int
    description: int


_CUTS = (
    Sizes(message=1024, value=256, fields=32, description=256),
    Sizes(message=512, value=128, fields=16, description=128),
    Sizes(message=384, value=64, fields=8, description=96),
    Sizes(message=192, value=32, fields=4, description=64),
    Sizes(message=96, value=16, fields=2, description=32),
)
"""Tried in order until a status fits; the last always does (with 16 figures at most)."""

_MAX_VALUES = 16
"""Figures of one problem."""


def code_of(status: Status) -> grpc.StatusCode:
    """The gRPC code of a Status."""
    return _CODES_BY_NUMBER[status.code]


def to_status(problem: Problem) -> Status:
    """The Status of a problem, whole: for a message, which has room."""
    code = CODES[problem.reason]
    status = Status(code=code.value[0], message=text(problem.message))
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=problem.reason.value,
            domain=DOMAIN,
            metadata={text(key): text(value) for key, value in problem.metadata.items()},
        )
    )
    parts = _parts(code, problem)
    if parts is not None:
        status.details.add().Pack(parts)
    if problem.retry_after_seconds is not None:
        wait = duration(round(problem.retry_after_seconds * MICROS_PER_SECOND))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status


def to_trailing_status(problem: Problem) -> Status:
    """The Status of a problem, cut so that all trailing metadata stays within 4 KiB."""
    status = to_status(problem)
    for sizes in _CUTS:
        if metadata_bytes(status) <= MAX_METADATA_BYTES:
            return status
        status = to_status(_cut(problem, sizes))
    return status


def to_grpc(problem: Problem) -> grpc.Status:
    """What `abort_with_status` takes."""
    return rpc_status.to_status(to_trailing_status(problem))


def from_status(status: Status) -> Problem:
    """The problem that `to_status` made this of. `ValueError` if it isn't one of ours."""
    info = error_details_pb2.ErrorInfo()
    if not _unpack(status, info) or info.domain != DOMAIN:
        raise ValueError(f"a status without ErrorInfo of {DOMAIN}: {status}")
    problem = Problem(Reason(info.reason), status.message, dict(info.metadata))
    problem = replace(problem, fields=_fields(status, problem))
    retry = error_details_pb2.RetryInfo()
    if _unpack(status, retry):
        wait = micros(retry.retry_delay) / MICROS_PER_SECOND
        problem = replace(problem, retry_after_seconds=wait)
    return problem


def metadata_bytes(status: Status) -> int:
    """What a status takes of the trailing metadata, on the wire: grpc-message is percent-encoded,
    the details are base64."""
    message = sum(
        1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode()
    )
    details = (status.ByteSize() + 2) // 3 * 4
    names = len("grpc-status") + len("grpc-message") + len("grpc-status-details-bin")
    return names + 3 * 32 + 2 + message + details


def _parts(code: grpc.StatusCode, problem: Problem) -> Message | None:
    """The parts of a problem, in the detail that its code calls for."""
    if code is C.RESOURCE_EXHAUSTED:
        return _quota(problem)
    if not problem.fields:
        return None
    if code is C.INVALID_ARGUMENT:
        return error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=text(part.field), description=text(part.description)
                )
                for part in problem.fields
            ]
        )
    return error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(
                type=problem.reason.value,
                subject=text(part.field),
                description=text(part.description),
            )
            for part in problem.fields
        ]
    )


def _quota(problem: Problem) -> error_details_pb2.QuotaFailure | None:
    parts = problem.fields
    if not parts and problem.reason in _QUOTAS:
        figures = ", ".join(f"{key}={value}" for key, value in sorted(problem.metadata.items()))
        parts = (FieldViolation(_QUOTAS[problem.reason], figures or problem.message),)
    if not parts:
        return None
    return error_details_pb2.QuotaFailure(
        violations=[
            error_details_pb2.QuotaFailure.Violation(
                subject=text(part.field), description=text(part.description)
            )
            for part in parts
        ]
    )


def _fields(status: Status, problem: Problem) -> tuple[FieldViolation, ...]:
    bad = error_details_pb2.BadRequest()
    if _unpack(status, bad):
        return tuple(FieldViolation(part.field, part.description) for part in bad.field_violations)
    precondition = error_details_pb2.PreconditionFailure()
    if _unpack(status, precondition):
        return tuple(
            FieldViolation(part.subject, part.description) for part in precondition.violations
        )
    quota = error_details_pb2.QuotaFailure()
    if _unpack(status, quota) and quota != _quota(problem):
        return tuple(FieldViolation(part.subject, part.description) for part in quota.violations)
    return ()


def _unpack(status: Status, into: Message) -> bool:
    return any(detail.Unpack(into) for detail in status.details)


def _cut(problem: Problem, sizes: Sizes) -> Problem:
    fields = problem.fields[: sizes.fields]
    left_out = len(problem.fields) - len(fields)
    cut = tuple(
        FieldViolation(
            _shorter(part.field, sizes.description), _shorter(part.description, sizes.description)
        )
        for part in fields
    )
    if left_out:
        cut += (FieldViolation("", f"and {left_out} more"),)
    return replace(
        problem,
        message=_shorter(problem.message, sizes.message),
        metadata={
            _shorter(key, 64): _shorter(value, sizes.value)
            for key, value in list(problem.metadata.items())[:_MAX_VALUES]
        },
        fields=cut,
    )


def _shorter(words: str, limit: int) -> str:
    """At most `limit` bytes as the wire counts them, with a mark where something was cut."""
    encoded = text(words).encode()
    if sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in encoded) <= limit:
        return words
    size, kept = 3, []
    for character in text(words):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode())
        if size > limit:
            break
        kept.append(character)
    return "".join(kept) + "..."


def invalid_fields(violations: tuple[FieldViolation, ...]) -> ForkpointError:
    """The one error for all wrong fields of a request."""
    words = "; ".join(f"{part.field}: {part.description}" for part in violations)
    return ForkpointError(Reason.INVALID_FIELD, words, fields=violations)
