"""The model to messages: what the API shows of a sandbox, a snapshot, a branch, a fork, the server.

One function a message, with every field of it in the order of the .proto. What the model keeps to
itself (paths of kernels, records of processes, names of staging files) has no field there; the
tests name each such attribute, so that a new one is either shown or left out on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc.status_pb2 import Status

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    server_service_pb2,
    snapshot_pb2,
    snapshot_service_pb2,
)
from forkpointd import model
from forkpointd.rpc import scalars
from forkpointd.rpc.scalars import (
    duration,
    duration_of_seconds,
    optional_duration,
    optional_timestamp,
    text,
    timestamp,
)
from forkpointd.rpc.status import to_status

LAST_WORDS_BYTES = 4096
"""Of a process that ended, as sandbox.proto promises."""


def sandbox(it: model.Sandbox) -> sandbox_pb2.Sandbox:
    """One microVM."""
    return sandbox_pb2.Sandbox(
        sandbox_id=it.sandbox_id,
        state=scalars.SANDBOX_STATE.to_wire(it.state),
        wished_state=scalars.WISHED_STATE.to_wire(it.wished_state),
        labels=_labels(it.labels),
        create_time=timestamp(it.create_time),
        snapshot_id=it.snapshot_id or "",
        source_sandbox_id=it.source_sandbox_id or "",
        fork_id=it.fork_id or "",
        vcpus=it.machine.vcpus,
        memory_mib=it.machine.memory_mib,
        drives=[drive(each) for each in it.machine.drives],
        ttl=duration_of_seconds(it.ttl_seconds),
        expire_time=optional_timestamp(it.expire_time),
        on_expiry=scalars.EXPIRY_ACTION.to_wire(it.on_expiry),
        dirty_base=dirty_base(it.dirty_base),
        exit=None if it.exit is None else sandbox_exit(it.exit),
        vmm=vmm(it.vmm),
        pid=0 if it.process is None else it.process.pid,
        start_time=optional_timestamp(it.start_time),
    )


def sandbox_memory(it: model.SandboxMemory) -> sandbox_pb2.SandboxMemory:
    """What a sandbox has of the host's memory."""
    return sandbox_pb2.SandboxMemory(private_bytes=it.private_bytes, shared_bytes=it.shared_bytes)


def drive(it: model.Drive) -> sandbox_pb2.Drive:
    """A block device."""
    return sandbox_pb2.Drive(
        drive_id=it.drive_id,
        path=text(it.path),
        read_only=it.read_only,
        root_device=it.root_device,
    )


def vmm(it: model.VmmVersion) -> sandbox_pb2.Vmm:
    """A VMM and its version."""
    return sandbox_pb2.Vmm(kind=scalars.VMM_KIND.to_wire(it.kind), version=text(it.version))


def dirty_base(it: model.DirtyBase) -> sandbox_pb2.DirtyBase:
    """What the next diff would stand on."""
    invalid = it.state is model.DirtyBaseState.INVALID
    return sandbox_pb2.DirtyBase(
        state=scalars.DIRTY_BASE_STATE.to_wire(it.state),
        snapshot_id="" if invalid else it.snapshot_id or "",
        branch_id=it.branch_id or "",
        unmerged_bytes=sum(diff.data_bytes for diff in it.unmerged),
        invalid_reason=text(it.invalid_reason),
    )


def sandbox_exit(it: model.SandboxExit) -> sandbox_pb2.SandboxExit:
    """How a process ended, with the end of its last words."""
    words = text(it.last_words).encode()[-LAST_WORDS_BYTES:]
    return sandbox_pb2.SandboxExit(
        exit_time=timestamp(it.time),
        exit_code=it.exit_code,
        signal=it.signal,
        last_words=words.decode("utf-8", "ignore"),
        cause=scalars.EXIT_CAUSE.or_unspecified(it.cause),
        explanation=text(it.explanation),
    )


def snapshot(it: model.Snapshot) -> snapshot_pb2.Snapshot:
    """An image that is READY, or LOST."""
    return snapshot_pb2.Snapshot(
        snapshot_id=it.snapshot_id,
        create_time=timestamp(it.create_time),
        source_sandbox_id=it.source_sandbox_id,
        branch_id=it.branch_id,
        parent_snapshot_id=it.parent_snapshot_id or "",
        mode=scalars.BRANCH_MODE.to_wire(it.mode),
        layout=scalars.LAYOUT.to_wire(it.layout),
        labels=_labels(it.labels),
        vcpus=it.machine.vcpus,
        memory_mib=it.machine.memory_mib,
        disk_bytes=it.disk_bytes,
        dirty_bytes=it.dirty_bytes,
        drives=[drive(each) for each in it.machine.drives],
        vmm=vmm(it.vmm),
        digest=it.digest or "",
        room=None
        if it.room is None
        else snapshot_pb2.SnapshotRoom(
            exclusive_bytes=it.room.exclusive_bytes, shared_bytes=it.room.shared_bytes
        ),
        state=scalars.SNAPSHOT_STATE.to_wire(it.state),
        durability=scalars.DURABILITY.to_wire(it.durability),
    )


def archive_piece(it: model.ArchivePiece) -> snapshot_service_pb2.ExportSnapshotResponse:
    """Some bytes of an archive; in the first piece, which has none, what it will hold."""
    info = None
    if not it.data:
        info = snapshot_service_pb2.ArchiveInfo(
            snapshot_id=it.snapshot_id,
            layout=scalars.LAYOUT.to_wire(it.layout),
            image_count=it.image_count,
            data_bytes=it.data_bytes,
            content_bytes=it.total_bytes,
        )
    return snapshot_service_pb2.ExportSnapshotResponse(
        info=info, data=it.data, done_bytes=it.done_bytes
    )


def branch(view: model.BranchView, forks: ForkMessages | None = None) -> branch_pb2.Branch:
    """A branch, with its snapshot and its children as far as they are there.

    `forks` helps where states of the same branch follow each other.
    """
    convert_fork = fork if forks is None else forks.message
    it = view.branch
    return branch_pb2.Branch(
        branch_id=it.branch_id,
        sandbox_id=it.sandbox_id,
        snapshot_id=it.snapshot_id,
        sequence=it.sequence,
        stage=scalars.BRANCH_STAGE.to_wire(it.stage),
        stages=[_stage_entry(entry) for entry in it.stages],
        requested_mode=scalars.BRANCH_MODE.to_wire(it.requested_mode),
        mode=scalars.BRANCH_MODE.or_unspecified(it.mode),
        mode_reason=text(it.mode_reason),
        requested_layout=scalars.LAYOUT.to_wire(it.requested_layout),
        layout=scalars.LAYOUT.to_wire(it.layout),
        precopy=None if it.precopy is None else _precopy(it.precopy),
        pause_window=None if it.pause_window is None else pause_window(it.pause_window),
        merge=None if it.merge is None else _merge(it.merge),
        snapshot=None if view.snapshot is None else snapshot(view.snapshot),
        fork=None if view.fork is None else convert_fork(view.fork),
        error=_error(it.error),
        create_time=timestamp(it.create_time),
        end_time=optional_timestamp(it.end_time),
        predicted_pause=optional_duration(it.predicted_pause_us),
        durability=scalars.DURABILITY.to_wire(it.durability),
    )


def pause_window(it: model.PauseWindow) -> branch_pb2.PauseWindow:
    """What the window took, to the microsecond."""
    return branch_pb2.PauseWindow(
        start_time=timestamp(it.start_time),
        total=duration(it.total_us),
        pause=duration(it.pause_us),
        snapshot=duration(it.snapshot_us),
        resume=duration(it.resume_us),
        vmm_total=duration(it.vmm_total_us),
        dirty_bytes=it.dirty_bytes,
        staging=scalars.STAGING_KIND.to_wire(it.staging),
        was_paused=it.was_paused,
        drive_clone=duration(it.drive_clone_us),
    )


def fork(it: model.Fork) -> fork_pb2.Fork:
    """A fork and each of its children."""
    message = _fork_head(it)
    message.children.extend([_fork_child(child) for child in it.children])
    return message


class ForkMessages:
    """Messages of the successive states of one fork, for one stream.

    Each holds every child, so N children that become ready one by one would be N * N conversions:
    a second of the event loop for some hundreds. Only children that changed (another object in
    their place) are converted; the others are copied from the message before, inside protobuf.
    """

    def __init__(self) -> None:
        self._children: tuple[model.ForkChild, ...] = ()
        self._message = fork_pb2.Fork()

    def message(self, it: model.Fork) -> fork_pb2.Fork:
        """The message of the next state."""
        message = _fork_head(it)
        if len(it.children) == len(self._children):
            message.children.MergeFrom(self._message.children)
            for index, child in enumerate(it.children):
                if child is not self._children[index]:
                    message.children[index].CopyFrom(_fork_child(child))
        else:
            message.children.extend([_fork_child(child) for child in it.children])
        self._children, self._message = it.children, message
        return message


def server_info(it: model.ServerFacts) -> server_service_pb2.GetServerInfoResponse:
    """The server's facts."""
    return server_service_pb2.GetServerInfoResponse(
        version=it.version,
        vmm=None if it.vmm is None else vmm(it.vmm),
        vmm_path="" if it.vmm_path is None else text(it.vmm_path),
        checks=[_host_check(check) for check in it.checks],
        start_time=timestamp(it.start_time),
        image_roots=[text(root) for root in it.image_roots],
        data_dir=text(it.data_dir),
        max_fork_count=it.max_fork_count,
        max_queued_branches=it.max_queued_branches,
        staging=scalars.STAGING_KIND.to_wire(it.staging),
        reflink=it.reflink,
        image_free_bytes=max(0, it.image_free_bytes),
        image_used_bytes=it.image_used_bytes,
        images_quota_bytes=it.images_quota_bytes,
        images_low_water_bytes=it.images_low_water_bytes,
        staging_free_bytes=max(0, it.staging_free_bytes),
        memory=memory_use(it.memory),
    )


def memory_use(it: model.MemoryUse) -> server_service_pb2.MemoryUse:
    """The memory budget and what is counted against it."""
    return server_service_pb2.MemoryUse(
        budget_bytes=it.budget_bytes,
        used_bytes=it.used_bytes,
        sandbox_bytes=it.sandbox_bytes,
        headroom_bytes=it.headroom_bytes,
        staging_bytes=it.staging_bytes,
        child_headroom_bytes=it.child_headroom_bytes,
    )


def _fork_head(it: model.Fork) -> fork_pb2.Fork:
    """All of a fork but its children."""
    states = [child.state for child in it.children]
    return fork_pb2.Fork(
        fork_id=it.fork_id,
        snapshot_id=it.snapshot_id,
        branch_id=it.branch_id or "",
        sequence=it.sequence,
        stage=scalars.FORK_STAGE.to_wire(it.stage),
        count=it.spec.count,
        ready_count=states.count(model.ForkChildState.READY),
        failed_count=states.count(model.ForkChildState.FAILED),
        on_failure=scalars.FAILURE_ACTION.to_wire(it.spec.on_failure),
        error=_error(it.error),
        create_time=timestamp(it.create_time),
        end_time=optional_timestamp(it.end_time),
        flatten=None if it.flatten is None else _flatten(it.flatten),
    )


def _flatten(it: model.FlattenProgress) -> fork_pb2.FlattenProgress:
    return fork_pb2.FlattenProgress(done_bytes=it.done_bytes, total_bytes=it.total_bytes)


def _stage_entry(it: model.StageEntry) -> branch_pb2.BranchStageEntry:
    return branch_pb2.BranchStageEntry(
        stage=scalars.BRANCH_STAGE.to_wire(it.stage), enter_time=timestamp(it.enter_time)
    )


def _precopy(it: model.PrecopyProgress) -> branch_pb2.PrecopyProgress:
    return branch_pb2.PrecopyProgress(
        done_bytes=it.done_bytes,
        total_bytes=it.total_bytes,
        hole_bytes=it.hole_bytes,
        method=scalars.COPY_METHOD.or_unspecified(it.method),
    )


def _merge(it: model.MergeProgress) -> branch_pb2.MergeProgress:
    return branch_pb2.MergeProgress(done_bytes=it.done_bytes, total_bytes=it.total_bytes)


def _fork_child(it: model.ForkChild) -> fork_pb2.ForkChild:
    return fork_pb2.ForkChild(
        sandbox_id=it.sandbox_id,
        state=scalars.FORK_CHILD_STATE.to_wire(it.state),
        error=_error(it.error),
        start_duration=optional_duration(it.start_us),
    )


def _host_check(it: model.HostCheck) -> server_service_pb2.HostCheck:
    return server_service_pb2.HostCheck(
        name=it.name,
        outcome=scalars.CHECK_OUTCOME.to_wire(it.outcome),
        detail=text(it.detail),
        remedy=text(it.remedy),
    )


def _error(problem: model.Problem | None) -> Status | None:
    return None if problem is None else to_status(problem)


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    return {text(key): text(value) for key, value in labels.items()}
