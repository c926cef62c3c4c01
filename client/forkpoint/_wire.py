"""Between the wire's messages and the plain data of `forkpoint.views`; nothing else knows both."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.duration_pb2 import Duration as DurationMessage
from google.protobuf.timestamp_pb2 import Timestamp

from forkpoint import durations, enums, views
from forkpoint._status import from_status
from forkpoint._version import __version__
from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    server_service_pb2,
    snapshot_pb2,
    snapshot_service_pb2,
)

if TYPE_CHECKING:  # a class of the type hints only
    from google.protobuf.internal.enum_type_wrapper import _EnumTypeWrapper as EnumTypeWrapper


E = TypeVar("E", bound=StrEnum)
V = TypeVar("V", bound=int)


def enum_from(kind: type[E], wrapper: EnumTypeWrapper[V], number: V) -> E:
    """The member for a number of the wire; UNSPECIFIED for one that is not known here."""
    try:
        return kind(wrapper.Name(number).removeprefix(_prefix(wrapper)))
    except ValueError:
        return kind("UNSPECIFIED")


def enum_to(wrapper: EnumTypeWrapper[V], member: StrEnum) -> V:
    """The number of the wire for a member."""
    return wrapper.Value(_prefix(wrapper) + member.value)


def _prefix(wrapper: EnumTypeWrapper[V]) -> str:
    """What all names of an enum begin with, for example BRANCH_STAGE_; the first is UNSPECIFIED."""
    return wrapper.keys()[0].removesuffix("UNSPECIFIED")


def duration_to(value: durations.Duration | None) -> DurationMessage | None:
    """A span for the wire; None stays absent."""
    if value is None:
        return None
    message = DurationMessage()
    message.FromTimedelta(durations.parse(value))
    return message


def _span(message: DurationMessage) -> timedelta:
    return message.ToTimedelta()


def _instant(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def vmm(message: sandbox_pb2.Vmm) -> views.Vmm:
    """A VMM's kind and version."""
    return views.Vmm(enum_from(enums.VmmKind, sandbox_pb2.VmmKind, message.kind), message.version)


def _drive(message: sandbox_pb2.Drive) -> views.Drive:
    return views.Drive(message.drive_id, message.path, message.read_only, message.root_device)


def drive_to(drive: views.Drive) -> sandbox_pb2.Drive:
    """A drive for the wire."""
    return sandbox_pb2.Drive(
        drive_id=drive.drive_id,
        path=drive.path,
        read_only=drive.read_only,
        root_device=drive.root_device,
    )


def sandbox(message: sandbox_pb2.Sandbox) -> views.SandboxView:
    """A sandbox as of now."""
    base, ended = message.dirty_base, message.exit
    return views.SandboxView(
        id=message.sandbox_id,
        state=enum_from(enums.SandboxState, sandbox_pb2.SandboxState, message.state),
        wished_state=enum_from(enums.WishedState, sandbox_pb2.WishedState, message.wished_state),
        labels=dict(message.labels),
        create_time=_instant(message.create_time) if message.HasField("create_time") else None,
        start_time=_instant(message.start_time) if message.HasField("start_time") else None,
        snapshot_id=message.snapshot_id or None,
        source_sandbox_id=message.source_sandbox_id or None,
        fork_id=message.fork_id or None,
        vcpus=message.vcpus,
        memory_mib=message.memory_mib,
        drives=tuple(_drive(drive) for drive in message.drives),
        ttl=_span(message.ttl) if message.HasField("ttl") else None,
        expire_time=_instant(message.expire_time) if message.HasField("expire_time") else None,
        on_expiry=enum_from(enums.ExpiryAction, sandbox_pb2.ExpiryAction, message.on_expiry),
        dirty_base=views.DirtyBase(
            state=enum_from(enums.DirtyBaseState, sandbox_pb2.DirtyBaseState, base.state),
            snapshot_id=base.snapshot_id or None,
            branch_id=base.branch_id or None,
            unmerged_bytes=base.unmerged_bytes,
            invalid_reason=base.invalid_reason or None,
        ),
        exit=views.SandboxExit(
            time=_instant(ended.exit_time) if ended.HasField("exit_time") else None,
            exit_code=ended.exit_code if ended.exit_code >= 0 else None,
            signal=ended.signal or None,
            last_words=ended.last_words,
            cause=enum_from(enums.SandboxExitCause, sandbox_pb2.SandboxExitCause, ended.cause),
            explanation=ended.explanation or None,
        )
        if message.HasField("exit")
        else None,
        vmm=vmm(message.vmm) if message.HasField("vmm") else None,
        pid=message.pid or None,
        memory=views.SandboxMemory(message.memory.private_bytes, message.memory.shared_bytes)
        if message.HasField("memory")
        else None,
    )


def snapshot(message: snapshot_pb2.Snapshot) -> views.SnapshotView:
    """A snapshot."""
    return views.SnapshotView(
        id=message.snapshot_id,
        create_time=_instant(message.create_time) if message.HasField("create_time") else None,
        source_sandbox_id=message.source_sandbox_id or None,
        branch_id=message.branch_id or None,
        parent_snapshot_id=message.parent_snapshot_id or None,
        mode=enum_from(enums.BranchMode, snapshot_pb2.BranchMode, message.mode),
        layout=enum_from(enums.Layout, snapshot_pb2.Layout, message.layout),
        labels=dict(message.labels),
        vcpus=message.vcpus,
        memory_mib=message.memory_mib,
        disk_bytes=message.disk_bytes,
        dirty_bytes=message.dirty_bytes,
        drives=tuple(_drive(drive) for drive in message.drives),
        vmm=vmm(message.vmm) if message.HasField("vmm") else None,
        digest=message.digest or None,
        exclusive_bytes=message.room.exclusive_bytes if message.HasField("room") else None,
        shared_bytes=message.room.shared_bytes if message.HasField("room") else None,
        state=enum_from(enums.SnapshotState, snapshot_pb2.SnapshotState, message.state),
        durability=enum_from(enums.Durability, snapshot_pb2.Durability, message.durability),
    )


def verifying(message: snapshot_service_pb2.VerifySnapshotResponse) -> views.VerifyUpdate:
    """How far a verify is."""
    return views.VerifyUpdate(
        message.snapshot_id,
        views.Progress(message.done_bytes, message.total_bytes),
        message.verified,
    )


def flattening(message: snapshot_service_pb2.FlattenSnapshotResponse) -> views.FlattenUpdate:
    """How far a flatten is."""
    return views.FlattenUpdate(
        snapshot(message.snapshot), views.Progress(message.done_bytes, message.total_bytes)
    )


def _pause(message: branch_pb2.PauseWindow) -> views.PauseWindow:
    return views.PauseWindow(
        start_time=_instant(message.start_time) if message.HasField("start_time") else None,
        total=_span(message.total),
        pause=_span(message.pause),
        snapshot=_span(message.snapshot),
        resume=_span(message.resume),
        vmm_total=_span(message.vmm_total),
        dirty_bytes=message.dirty_bytes,
        staging=enum_from(enums.StagingKind, branch_pb2.StagingKind, message.staging),
        was_paused=message.was_paused,
        drive_clone=_span(message.drive_clone),
    )


def fork(message: fork_pb2.Fork) -> views.ForkUpdate:
    """A fork as of now."""
    children = tuple(
        views.ForkChild(
            id=child.sandbox_id,
            state=enum_from(enums.ForkChildState, fork_pb2.ForkChildState, child.state),
            error=from_status(child.error) if child.HasField("error") else None,
            start_duration=_span(child.start_duration)
            if child.HasField("start_duration")
            else None,
        )
        for child in message.children
    )
    return views.ForkUpdate(
        id=message.fork_id,
        snapshot_id=message.snapshot_id,
        branch_id=message.branch_id or None,
        sequence=message.sequence,
        stage=enum_from(enums.ForkStage, fork_pb2.ForkStage, message.stage),
        count=message.count,
        ready_count=message.ready_count,
        failed_count=message.failed_count,
        children=children,
        on_failure=enum_from(enums.FailureAction, fork_pb2.FailureAction, message.on_failure),
        error=from_status(message.error) if message.HasField("error") else None,
        create_time=_instant(message.create_time) if message.HasField("create_time") else None,
        end_time=_instant(message.end_time) if message.HasField("end_time") else None,
        flatten=views.Progress(message.flatten.done_bytes, message.flatten.total_bytes)
        if message.HasField("flatten")
        else None,
    )


def branch(message: branch_pb2.Branch) -> views.BranchUpdate:
    """A branch as of now."""
    precopy, merge = message.precopy, message.merge
    return views.BranchUpdate(
        id=message.branch_id,
        sandbox_id=message.sandbox_id,
        snapshot_id=message.snapshot_id,
        sequence=message.sequence,
        stage=enum_from(enums.BranchStage, branch_pb2.BranchStage, message.stage),
        stages=tuple(
            views.StageEntry(
                enum_from(enums.BranchStage, branch_pb2.BranchStage, entry.stage),
                _instant(entry.enter_time),
            )
            for entry in message.stages
        ),
        requested_mode=enum_from(enums.BranchMode, snapshot_pb2.BranchMode, message.requested_mode),
        mode=enum_from(enums.BranchMode, snapshot_pb2.BranchMode, message.mode),
        mode_reason=message.mode_reason or None,
        requested_layout=enum_from(enums.Layout, snapshot_pb2.Layout, message.requested_layout),
        layout=enum_from(enums.Layout, snapshot_pb2.Layout, message.layout),
        durability=enum_from(enums.Durability, snapshot_pb2.Durability, message.durability),
        precopy=views.Progress(
            precopy.done_bytes,
            precopy.total_bytes,
            precopy.hole_bytes,
            enum_from(enums.CopyMethod, branch_pb2.CopyMethod, precopy.method),
        )
        if message.HasField("precopy")
        else None,
        pause=_pause(message.pause_window) if message.HasField("pause_window") else None,
        merge=views.Progress(merge.done_bytes, merge.total_bytes)
        if message.HasField("merge")
        else None,
        snapshot=snapshot(message.snapshot) if message.HasField("snapshot") else None,
        fork=fork(message.fork) if message.HasField("fork") else None,
        error=from_status(message.error) if message.HasField("error") else None,
        create_time=_instant(message.create_time) if message.HasField("create_time") else None,
        end_time=_instant(message.end_time) if message.HasField("end_time") else None,
        predicted_pause=_span(message.predicted_pause)
        if message.HasField("predicted_pause")
        else None,
    )


def server_info(message: server_service_pb2.GetServerInfoResponse) -> views.ServerInfo:
    """The server's facts."""
    outcome = server_service_pb2.HostCheckOutcome
    return views.ServerInfo(
        version=message.version,
        client_version=__version__,
        vmm=vmm(message.vmm) if message.HasField("vmm") else None,
        vmm_path=message.vmm_path or None,
        checks=tuple(
            views.HostCheck(
                check.name,
                enum_from(enums.CheckOutcome, outcome, check.outcome),
                check.detail,
                check.remedy or None,
            )
            for check in message.checks
        ),
        start_time=_instant(message.start_time) if message.HasField("start_time") else None,
        image_roots=tuple(message.image_roots),
        data_dir=message.data_dir,
        max_fork_count=message.max_fork_count,
        max_queued_branches=message.max_queued_branches,
        staging=enum_from(enums.StagingKind, branch_pb2.StagingKind, message.staging),
        reflink=message.reflink,
        image_free_bytes=message.image_free_bytes,
        staging_free_bytes=message.staging_free_bytes,
        memory=_memory_use(message.memory) if message.HasField("memory") else None,
        image_used_bytes=message.image_used_bytes,
        images_quota_bytes=message.images_quota_bytes,
        images_low_water_bytes=message.images_low_water_bytes,
    )


def _memory_use(message: server_service_pb2.MemoryUse) -> views.MemoryUse:
    return views.MemoryUse(
        budget_bytes=message.budget_bytes,
        used_bytes=message.used_bytes,
        sandbox_bytes=message.sandbox_bytes,
        headroom_bytes=message.headroom_bytes,
        staging_bytes=message.staging_bytes,
        child_headroom_bytes=message.child_headroom_bytes,
    )
