"""A server for the client's tests: the contract's services over plain dictionaries.

It keeps the contract's promises (whole messages with a sequence, request_ids, pages, rich errors)
and breaks on demand: a stream that is cut, a branch that fails, a child that does not start. It
runs on grpc's threads, so that async and sync clients are tested against the same thing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import grpc
from google.rpc import code_pb2

from forkpoint.v1 import (
    branch_pb2,
    sandbox_pb2,
    sandbox_service_pb2_grpc,
    server_service_pb2_grpc,
    snapshot_pb2,
    snapshot_service_pb2_grpc,
)
from forkpoint.v1 import server_service_pb2 as v
from forkpoint.v1 import snapshot_service_pb2 as p
from tests.unit.client_fake_branches import BranchCalls
from tests.unit.client_fake_sandboxes import SandboxCalls
from tests.unit.client_fake_state import (
    WAIT_SECONDS,
    Context,
    now,
    refuse,
    status_of,
)


class Fake(
    SandboxCalls,
    BranchCalls,
    sandbox_service_pb2_grpc.SandboxServiceServicer,
    snapshot_service_pb2_grpc.SnapshotServiceServicer,
    server_service_pb2_grpc.ServerServiceServicer,
):
    """The server: its life, its snapshots, itself."""

    _server: grpc.Server | None = None

    def start(self) -> None:
        """Listens; again after `stop`, with the same state."""
        self._server = grpc.server(ThreadPoolExecutor(32, "fake"))
        sandbox_service_pb2_grpc.add_SandboxServiceServicer_to_server(self, self._server)
        snapshot_service_pb2_grpc.add_SnapshotServiceServicer_to_server(self, self._server)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(self, self._server)
        # A path may be longer than a socket's: bind through the folder.
        folder = os.open(self.path.parent, os.O_PATH)
        try:
            self._server.add_insecure_port(f"unix:/proc/self/fd/{folder}/{quote(self.path.name)}")
        finally:
            os.close(folder)
        self._server.start()

    def stop(self) -> None:
        """Stops listening and breaks all connections."""
        if self._server is not None:
            self._server.stop(None).wait(WAIT_SECONDS)
            self._server = None

    # --- snapshots and the server ------------------------------------------------------------

    def GetSnapshot(  # noqa: N802
        self, request: p.GetSnapshotRequest, context: Context
    ) -> p.GetSnapshotResponse:
        self._note("GetSnapshot", request, context)
        found = self._find("snapshot", self.snapshots, request.snapshot_id, context)
        return p.GetSnapshotResponse(snapshot=found)

    def ListSnapshots(  # noqa: N802
        self, request: p.ListSnapshotsRequest, context: Context
    ) -> p.ListSnapshotsResponse:
        self._note("ListSnapshots", request, context)
        found = [
            each
            for each in self.snapshots.values()
            if request.source_sandbox_id in ("", each.source_sandbox_id)
            and all(each.labels.get(k) == value for k, value in request.labels.items())
        ]
        return p.ListSnapshotsResponse(snapshots=found)

    def UpdateSnapshot(  # noqa: N802
        self, request: p.UpdateSnapshotRequest, context: Context
    ) -> p.UpdateSnapshotResponse:
        self._note("UpdateSnapshot", request, context)
        found = self._find("snapshot", self.snapshots, request.snapshot_id, context)
        found.ClearField("labels")
        found.labels.update(request.labels)
        return p.UpdateSnapshotResponse(snapshot=found)

    def DeleteSnapshot(  # noqa: N802
        self, request: p.DeleteSnapshotRequest, context: Context
    ) -> p.DeleteSnapshotResponse:
        self._note("DeleteSnapshot", request, context)
        self._find("snapshot", self.snapshots, request.snapshot_id, context)
        del self.snapshots[request.snapshot_id]
        return p.DeleteSnapshotResponse()

    def FlattenSnapshot(  # noqa: N802
        self, request: p.FlattenSnapshotRequest, context: Context
    ) -> Iterator[p.FlattenSnapshotResponse]:
        self._note("FlattenSnapshot", request, context)
        found = self._find("snapshot", self.snapshots, request.snapshot_id, context)
        for done in (0, 6):
            found.layout = snapshot_pb2.LAYOUT_LAYERED
            yield p.FlattenSnapshotResponse(snapshot=found, done_bytes=done, total_bytes=10)
        if self.flattens_to_break:
            self.flattens_to_break -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        found.layout = snapshot_pb2.LAYOUT_FLAT
        yield p.FlattenSnapshotResponse(snapshot=found, done_bytes=10, total_bytes=10)

    def VerifySnapshot(  # noqa: N802
        self, request: p.VerifySnapshotRequest, context: Context
    ) -> Iterator[p.VerifySnapshotResponse]:
        self._note("VerifySnapshot", request, context)
        self._find("snapshot", self.snapshots, request.snapshot_id, context)
        for done in (0, 6):
            yield p.VerifySnapshotResponse(snapshot_id="parent", done_bytes=done, total_bytes=10)
        yield p.VerifySnapshotResponse(
            snapshot_id=request.snapshot_id, done_bytes=10, total_bytes=10, verified=True
        )

    def ExportSnapshot(  # noqa: N802
        self, request: p.ExportSnapshotRequest, context: Context
    ) -> Iterator[p.ExportSnapshotResponse]:
        self._note("ExportSnapshot", request, context)
        found = self._find("snapshot", self.snapshots, request.snapshot_id, context)
        yield p.ExportSnapshotResponse(
            info=p.ArchiveInfo(snapshot_id=found.snapshot_id, content_bytes=20)
        )
        yield p.ExportSnapshotResponse(data=b"archive of ", done_bytes=10)
        if self.exports_to_break:
            self.exports_to_break -= 1
            refuse(context, status_of(code_pb2.DATA_LOSS, "IMAGE_DAMAGED", "a file is gone"))
        yield p.ExportSnapshotResponse(data=found.snapshot_id.encode(), done_bytes=20)

    def ImportSnapshot(  # noqa: N802
        self, requests: Iterator[p.ImportSnapshotRequest], context: Context
    ) -> p.ImportSnapshotResponse:
        options = next(requests).options
        self._note("ImportSnapshot", options, context)
        archive = b""
        for request in requests:
            archive += request.data
            if not b"archive of ".startswith(archive[:11]):
                refuse(
                    context,
                    status_of(code_pb2.INVALID_ARGUMENT, "ARCHIVE_INVALID", "it is no archive"),
                )
        made = snapshot_pb2.Snapshot(
            snapshot_id=options.snapshot_id or archive[11:].decode(), labels=options.labels
        )
        self.snapshots[made.snapshot_id] = made
        return p.ImportSnapshotResponse(snapshot=made)

    def GetServerInfo(  # noqa: N802
        self, request: v.GetServerInfoRequest, context: Context
    ) -> v.GetServerInfoResponse:
        self._note("GetServerInfo", request, context)
        return v.GetServerInfoResponse(
            version=self.version,
            vmm=sandbox_pb2.Vmm(kind=sandbox_pb2.VMM_KIND_SIMULATOR, version="1.12.1"),
            checks=[
                v.HostCheck(
                    name="reflink",
                    outcome=v.HOST_CHECK_OUTCOME_WARNING,
                    detail="ext4 shares no blocks",
                    remedy="use XFS",
                )
            ],
            start_time=now(),
            image_roots=["/images"],
            data_dir="/data",
            max_fork_count=1000,
            max_queued_branches=16,
            staging=branch_pb2.STAGING_KIND_TMPFS,
            image_free_bytes=2**33,
            image_used_bytes=2**31,
            images_quota_bytes=2**34,
            staging_free_bytes=2**32,
            memory=v.MemoryUse(
                budget_bytes=2**34,
                used_bytes=7 * 2**28,
                sandbox_bytes=2**30,
                headroom_bytes=2**29,
                staging_bytes=2**28,
                child_headroom_bytes=2**24,
            ),
        )


def fresh_address(folder: Path) -> Path:
    """A socket's path that nobody uses."""
    return folder / f"{uuid.uuid4().hex[:8]}.sock"
