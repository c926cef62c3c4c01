"""Requests to orders: what the edge hands inwards, with every default applied.

Only for requests that validation has passed. A default is a field that was left out: UNSPECIFIED of
an enum, 0 of a count that can't be 0, an empty string of an id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from forkpoint.v1 import fork_pb2, sandbox_service_pb2, snapshot_service_pb2
from forkpointd import model
from forkpointd.rpc import scalars
from forkpointd.rpc.fingerprint import fingerprint

DEFAULT_BOOT_ARGS = "console=ttyS0 reboot=k panic=1"
DEFAULT_PAGE_SIZE = 50


_WithTtl = (
    sandbox_service_pb2.CreateSandboxRequest
    | sandbox_service_pb2.UpdateSandboxRequest
    | fork_pb2.ForkSpec
)


def request_key(request: Message, request_id: str, method: str) -> model.RequestKey | None:
    """What makes a repeat of this call known; None where the client didn't ask for that."""
    if not request_id:
        return None
    return model.RequestKey(request_id.lower(), method, fingerprint(request))


def create_order(
    request: sandbox_service_pb2.CreateSandboxRequest, files: Mapping[str, Path]
) -> model.CreateOrder:
    """Make a sandbox. `files` has the resolved path of every field that names a file."""
    from_snapshot = request.WhichOneof("source") == "snapshot_id"
    return model.CreateOrder(
        sandbox_id=request.sandbox_id or None,
        boot=None if from_snapshot else boot(request.boot, files),
        snapshot_id=request.snapshot_id if from_snapshot else None,
        labels=dict(request.labels),
        ttl_seconds=_ttl(request),
        on_expiry=scalars.EXPIRY_ACTION.or_default(request.on_expiry, model.ExpiryAction.DELETE),
        allow_drive_copy=request.allow_drive_copy,
        request=request_key(request, request.request_id, "CreateSandbox"),
    )


def boot(request: sandbox_service_pb2.BootSource, files: Mapping[str, Path]) -> model.Boot:
    """How a guest is booted."""
    return model.Boot(
        machine=model.Machine(
            vcpus=request.vcpus or 1,
            memory_mib=request.memory_mib,
            drives=tuple(
                model.Drive(
                    drive_id=drive.drive_id,
                    path=files[f"boot.drives[{index}].path"],
                    read_only=drive.read_only,
                    root_device=drive.root_device,
                )
                for index, drive in enumerate(request.drives)
            ),
        ),
        kernel_image=files["boot.kernel_image"],
        initrd=files["boot.initrd"] if request.initrd else None,
        boot_args=request.boot_args or DEFAULT_BOOT_ARGS,
    )


def sandbox_change(request: sandbox_service_pb2.UpdateSandboxRequest) -> model.SandboxChange:
    """Change what the mask names; what it names and the request lacks is cleared."""
    return model.SandboxChange(
        fields=mask(request.update_mask),
        labels=dict(request.labels),
        ttl_seconds=_ttl(request),
        on_expiry=scalars.EXPIRY_ACTION.or_default(request.on_expiry, model.ExpiryAction.DELETE),
    )


def branch_order(request: sandbox_service_pb2.BranchSandboxRequest) -> model.BranchOrder:
    """Branch a sandbox, and fork the snapshot where children are wanted."""
    return model.BranchOrder(
        sandbox_id=request.sandbox_id,
        branch_id=request.branch_id or None,
        snapshot_id=request.snapshot_id or None,
        mode=scalars.BRANCH_MODE.or_default(request.mode, model.BranchMode.AUTO),
        layout=scalars.LAYOUT.or_default(request.layout, model.Layout.AUTO),
        durability=scalars.DURABILITY.or_default(request.durability, model.Durability.DISK),
        max_pause_us=scalars.micros(request.max_pause) if request.HasField("max_pause") else None,
        labels=dict(request.labels),
        fork=_fork_of_branch(request) if request.HasField("fork") else None,
        allow_drive_copy=request.allow_drive_copy,
        request=request_key(request, request.request_id, "BranchSandbox"),
    )


def fork_order(request: sandbox_service_pb2.ForkSandboxesRequest) -> model.ForkOrder:
    """Start children of a snapshot."""
    return model.ForkOrder(
        snapshot_id=request.snapshot_id,
        spec=fork_spec(request.fork),
        request=request_key(request, request.request_id, "ForkSandboxes"),
    )


def _fork_of_branch(request: sandbox_service_pb2.BranchSandboxRequest) -> model.ForkSpec:
    """Children of a branch may have copies of drives where the branch may."""
    spec = fork_spec(request.fork)
    return replace(spec, allow_drive_copy=spec.allow_drive_copy or request.allow_drive_copy)


def fork_spec(request: fork_pb2.ForkSpec) -> model.ForkSpec:
    """What children are wanted."""
    return model.ForkSpec(
        count=request.count,
        fork_id=request.fork_id or None,
        labels=dict(request.labels),
        ttl_seconds=_ttl(request),
        on_expiry=scalars.EXPIRY_ACTION.or_default(request.on_expiry, model.ExpiryAction.DELETE),
        on_failure=scalars.FAILURE_ACTION.or_default(request.on_failure, model.FailureAction.KEEP),
        allow_drive_copy=request.allow_drive_copy,
    )


def export_order(request: snapshot_service_pb2.ExportSnapshotRequest) -> model.ExportOrder:
    """Make an archive of a snapshot."""
    return model.ExportOrder(
        snapshot_id=request.snapshot_id,
        layout=scalars.ARCHIVE_LAYOUT.or_default(request.layout, model.ArchiveLayout.FLAT),
        level=request.level or None,
    )


def import_order(request: snapshot_service_pb2.ImportOptions) -> model.ImportOrder:
    """Make a snapshot of an archive."""
    return model.ImportOrder(
        snapshot_id=request.snapshot_id or None,
        labels=dict(request.labels),
        request=request_key(request, request.request_id, "ImportSnapshot"),
    )


def mask(update_mask: FieldMask) -> frozenset[str]:
    """The fields that an update names."""
    return frozenset(update_mask.paths)


def page_size(asked: int) -> int:
    """How many items a page has at most."""
    return asked or DEFAULT_PAGE_SIZE


def _ttl(request: _WithTtl) -> float | None:
    return scalars.seconds(request.ttl) if request.HasField("ttl") else None
