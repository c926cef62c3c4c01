"""From a gRPC status to an exception of `forkpoint.errors`.

The details are `google.rpc` messages in the trailing metadata `grpc-status-details-bin`; the same
`google.rpc.Status` is inside a branch, a fork or a child that failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from forkpoint import errors
from forkpoint.errors import FieldViolation, ForkpointError

DOMAIN = "forkpoint"
_DETAILS_KEY = "grpc-status-details-bin"

_BY_REASON: dict[str, type[ForkpointError]] = {
    "SANDBOX_NOT_FOUND": errors.SandboxNotFound,
    "SNAPSHOT_NOT_FOUND": errors.SnapshotNotFound,
    "BRANCH_NOT_FOUND": errors.BranchNotFound,
    "FORK_NOT_FOUND": errors.ForkNotFound,
    "SANDBOX_NOT_RUNNING": errors.SandboxNotRunning,
    "SANDBOX_UNRESPONSIVE": errors.SandboxUnresponsive,
    "SANDBOX_DELETED": errors.SandboxDeleted,
    "BRANCH_QUEUE_FULL": errors.BranchQueueFull,
    "PAUSE_TOO_LONG": errors.PauseTooLong,
    "DIRTY_BASE_INVALID": errors.DirtyBaseInvalid,
    "BRANCH_NOT_CANCELLABLE": errors.BranchNotCancellable,
    "HOST_MISMATCH": errors.HostMismatch,
    "SNAPSHOT_LOST": errors.SnapshotLost,
    "CONSOLE_BUSY": errors.ConsoleBusy,
    "CONSOLE_FULL": errors.ConsoleFull,
    "NO_VMM": errors.NoVmm,
    "SERVER_DRAINING": errors.ServerDraining,
}

_BY_CODE: dict[str, type[ForkpointError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.AlreadyExists,
        errors.FailedPrecondition,
        errors.ResourceExhausted,
        errors.OutOfRange,
        errors.Aborted,
        errors.Cancelled,
        errors.DeadlineExceeded,
        errors.DataLoss,
        errors.Internal,
        errors.Unimplemented,
        errors.Unavailable,
    )
}


def from_call(raw: grpc.RpcError) -> ForkpointError:
    """The exception for a call that failed, sync or async."""
    call = cast("grpc.Call", raw)  # every RpcError of a call is one; aio's has the same methods
    code = call.code()
    details = str(call.details() or "")
    status = _details(call.trailing_metadata() or ())
    if status is None:
        status = status_pb2.Status(message=details)
    return from_status(status, code=code.name)


def from_status(status: status_pb2.Status, *, code: str | None = None) -> ForkpointError:
    """The exception for a status, for example that of a child that did not start."""
    if code is None:
        code = code_pb2.Code.Name(status.code) if status.code in _CODES else "UNKNOWN"
    reason: str | None = None
    metadata: dict[str, str] = {}
    fields: list[FieldViolation] = []
    retry_after: timedelta | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        precondition = error_details_pb2.PreconditionFailure()
        quota = error_details_pb2.QuotaFailure()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            if info.domain == DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(request):
            fields += [FieldViolation(v.field, v.description) for v in request.field_violations]
        elif detail.Unpack(precondition):
            fields += [FieldViolation(v.subject, v.description) for v in precondition.violations]
        elif detail.Unpack(quota):
            fields += [FieldViolation(v.subject, v.description) for v in quota.violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta()
    kind = _BY_REASON.get(reason or "") or _BY_CODE.get(code, ForkpointError)
    return kind(
        status.message or f"the call failed: {code}",
        reason=reason,
        code=code,
        metadata=metadata,
        fields=tuple(fields),
        retry_after=retry_after,
    )


_CODES = frozenset(code_pb2.Code.values())


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    """The rich status in a call's trailing metadata; None where there is none, or no whole one."""
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None
