"""The parts of requests that both clients make the same way, checked before they are sent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping

from google.protobuf.field_mask_pb2 import FieldMask

from forkpoint import _wire, durations
from forkpoint.enums import (
    ArchiveLayout,
    BranchMode,
    Durability,
    ExpiryAction,
    FailureAction,
    Layout,
    choose,
)
from forkpoint.v1 import fork_pb2, sandbox_pb2, snapshot_pb2, snapshot_service_pb2
from forkpoint.v1 import sandbox_service_pb2 as messages
from forkpoint.views import Drive


class Unchanged:
    """The type of `UNCHANGED`."""

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED = Unchanged()
"""What an update leaves as it is; None clears."""


def new_request_id() -> str:
    """What makes a call safe to repeat."""
    return str(uuid.uuid4())


def _expiry(action: ExpiryAction | str) -> sandbox_pb2.ExpiryAction.ValueType:
    return _wire.enum_to(sandbox_pb2.ExpiryAction, choose(ExpiryAction, action))


def fork_spec(
    count: int,
    fork_id: str | None,
    labels: Mapping[str, str] | None,
    ttl: durations.Duration | None,
    on_expiry: ExpiryAction | str,
    on_failure: FailureAction | str,
    allow_drive_copy: bool = False,
) -> fork_pb2.ForkSpec:
    """What children are wanted."""
    if not 0 < count < 2**32:
        raise ValueError(f"count is {count}: ask for at least one child, within the limit")
    return fork_pb2.ForkSpec(
        count=count,
        fork_id=fork_id or "",
        labels=labels,
        ttl=_wire.duration_to(ttl),
        on_expiry=_expiry(on_expiry),
        on_failure=_wire.enum_to(fork_pb2.FailureAction, choose(FailureAction, on_failure)),
        allow_drive_copy=allow_drive_copy,
    )


def branch_request(
    sandbox_id: str,
    *,
    mode: BranchMode | str,
    layout: Layout | str,
    durability: Durability | str,
    branch_id: str | None,
    snapshot_id: str | None,
    max_pause: durations.Duration | None,
    labels: Mapping[str, str] | None,
    request_id: str | None,
    allow_drive_copy: bool = False,
    fork: fork_pb2.ForkSpec | None = None,
) -> messages.BranchSandboxRequest:
    """Asks for a branch."""
    return messages.BranchSandboxRequest(
        request_id=request_id or new_request_id(),
        sandbox_id=sandbox_id,
        branch_id=branch_id or "",
        snapshot_id=snapshot_id or "",
        mode=_wire.enum_to(snapshot_pb2.BranchMode, choose(BranchMode, mode)),
        layout=_wire.enum_to(snapshot_pb2.Layout, choose(Layout, layout)),
        durability=_wire.enum_to(snapshot_pb2.Durability, choose(Durability, durability)),
        max_pause=_wire.duration_to(max_pause),
        labels=labels,
        fork=fork,
        allow_drive_copy=allow_drive_copy,
    )


def create_request(
    sandbox_id: str | None,
    *,
    kernel: str | os.PathLike[str] | None,
    memory_mib: int | None,
    vcpus: int,
    initrd: str | os.PathLike[str] | None,
    boot_args: str | None,
    drives: Iterable[Drive],
    snapshot_id: str | None,
    labels: Mapping[str, str] | None,
    ttl: durations.Duration | None,
    on_expiry: ExpiryAction | str,
    request_id: str | None,
    allow_drive_copy: bool = False,
) -> messages.CreateSandboxRequest:
    """Asks for a sandbox, from a kernel or from a snapshot."""
    request = messages.CreateSandboxRequest(
        request_id=request_id or new_request_id(),
        sandbox_id=sandbox_id or "",
        labels=labels,
        ttl=_wire.duration_to(ttl),
        on_expiry=_expiry(on_expiry),
        allow_drive_copy=allow_drive_copy,
    )
    if (kernel is None) == (snapshot_id is None):
        raise ValueError("a sandbox starts from either a kernel or a snapshot: give one of them")
    if snapshot_id is not None:
        if memory_mib is not None or vcpus or initrd or boot_args or list(drives):
            raise ValueError(
                "a sandbox made from a snapshot has the snapshot's memory, vcpus and drives:"
                " leave memory_mib, vcpus, initrd, boot_args and drives out"
            )
        request.snapshot_id = snapshot_id
        return request
    if memory_mib is None:
        raise ValueError("memory_mib is missing: how much memory the guest gets")
    if kernel is not None:
        request.boot.kernel_image = os.path.abspath(kernel)
    if initrd is not None:
        request.boot.initrd = os.path.abspath(initrd)
    request.boot.boot_args = boot_args or ""
    _unsigned(request.boot, "vcpus", vcpus, 32)
    _unsigned(request.boot, "memory_mib", memory_mib, 64)
    request.boot.drives.extend(_wire.drive_to(drive) for drive in drives)
    return request


def _unsigned(boot: messages.BootSource, name: str, value: int, bits: int) -> None:
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name} is {value}, which can't be")
    setattr(boot, name, value)


def update_request(
    sandbox_id: str,
    labels: Mapping[str, str] | Unchanged | None,
    ttl: durations.Duration | Unchanged | None,
    on_expiry: ExpiryAction | str | Unchanged,
) -> messages.UpdateSandboxRequest:
    """Asks for a change of what is not UNCHANGED."""
    request = messages.UpdateSandboxRequest(sandbox_id=sandbox_id, update_mask=FieldMask())
    paths = request.update_mask.paths
    if not isinstance(labels, Unchanged):
        paths.append("labels")
        request.labels.update(labels or {})
    if not isinstance(ttl, Unchanged):
        paths.append("ttl")
        span = _wire.duration_to(ttl)
        if span is not None:
            request.ttl.CopyFrom(span)
    if not isinstance(on_expiry, Unchanged):
        paths.append("on_expiry")
        request.on_expiry = _expiry(on_expiry)
    if not paths:
        raise ValueError("nothing to update: give labels, ttl or on_expiry")
    return request


def export_request(
    snapshot_id: str, layout: ArchiveLayout | str, level: int | None
) -> snapshot_service_pb2.ExportSnapshotRequest:
    """Asks for an archive."""
    if level is not None and not 0 < level < 2**32:
        raise ValueError(f"level is {level}: give 1 (fast) to 12 (small)")
    return snapshot_service_pb2.ExportSnapshotRequest(
        snapshot_id=snapshot_id,
        layout=_wire.enum_to(snapshot_service_pb2.ArchiveLayout, choose(ArchiveLayout, layout)),
        level=level or 0,
    )


def import_options(
    snapshot_id: str | None, labels: Mapping[str, str] | None, request_id: str | None
) -> snapshot_service_pb2.ImportSnapshotRequest:
    """The first message of an import."""
    return snapshot_service_pb2.ImportSnapshotRequest(
        options=snapshot_service_pb2.ImportOptions(
            request_id=request_id or new_request_id(),
            snapshot_id=snapshot_id or "",
            labels=labels,
        )
    )


def console_attach(
    sandbox_id: str, from_offset: int | None, tail_bytes: int | None, read_only: bool
) -> messages.ConsoleAttach:
    """The first message to a console."""
    attach = messages.ConsoleAttach(sandbox_id=sandbox_id, read_only=read_only)
    _place(attach, from_offset, tail_bytes)
    return attach


def console_read(
    sandbox_id: str, from_offset: int | None, tail_bytes: int | None, follow: bool
) -> messages.ReadConsoleRequest:
    """Asks for a console's output."""
    request = messages.ReadConsoleRequest(sandbox_id=sandbox_id, follow=follow)
    _place(request, from_offset, tail_bytes)
    return request


def _place(
    request: messages.ConsoleAttach | messages.ReadConsoleRequest,
    from_offset: int | None,
    tail_bytes: int | None,
) -> None:
    """Says where the output starts."""
    if from_offset is not None and tail_bytes is not None:
        raise ValueError("give either from_offset or tail_bytes")
    for name, value in (("from_offset", from_offset), ("tail_bytes", tail_bytes)):
        if value is not None:
            if not 0 <= value < 2**64:
                raise ValueError(f"{name} is {value}: it is a number of bytes")
            setattr(request, name, value)
