"""SnapshotService: look at snapshots, label, delete and verify them, make them one file, bring them
from server to server."""

from __future__ import annotations

from collections.abc import AsyncIterator

from forkpoint.v1 import snapshot_service_pb2 as pb
from forkpointd.model import FieldViolation, Snapshot
from forkpointd.rpc import convert, orders, pages
from forkpointd.rpc.call import Call
from forkpointd.rpc.ports import ArchivePort, Position, SnapshotPort
from forkpointd.rpc.rules import Limits
from forkpointd.rpc.status import invalid_fields
from forkpointd.rpc.validation import check
from forkpointd.rpc.watching import released


class SnapshotService:
    """Snapshots that are READY."""

    def __init__(self, *, snapshots: SnapshotPort, archives: ArchivePort, limits: Limits) -> None:
        self._snapshots = snapshots
        self._archives = archives
        self._limits = limits

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, _: Call) -> pb.GetSnapshotResponse:
        """One snapshot."""
        check(request, self._limits)
        found = await self._snapshots.get_with_room(request.snapshot_id)
        return pb.GetSnapshotResponse(snapshot=convert.snapshot(found))

    async def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, _: Call
    ) -> pb.ListSnapshotsResponse:
        """A page of snapshots."""
        check(request, self._limits)
        page = await self._snapshots.list(
            page_size=orders.page_size(request.page_size),
            after=pages.position_of(request.page_token, request),
            labels=dict(request.labels),
            source_sandbox_id=request.source_sandbox_id or None,
        )
        snapshots, token = pages.page_of(page, request, convert.snapshot, _position)
        return pb.ListSnapshotsResponse(snapshots=snapshots, next_page_token=token)

    async def UpdateSnapshot(
        self, request: pb.UpdateSnapshotRequest, _: Call
    ) -> pb.UpdateSnapshotResponse:
        """Changes labels, which is all that a mask may name."""
        check(request, self._limits)
        changed = await self._snapshots.set_labels(request.snapshot_id, dict(request.labels))
        return pb.UpdateSnapshotResponse(snapshot=convert.snapshot(changed))

    async def DeleteSnapshot(
        self, request: pb.DeleteSnapshotRequest, _: Call
    ) -> pb.DeleteSnapshotResponse:
        """Takes a snapshot out of the API."""
        check(request, self._limits)
        await self._snapshots.delete(request.snapshot_id)
        return pb.DeleteSnapshotResponse()

    async def FlattenSnapshot(self, request: pb.FlattenSnapshotRequest, call: Call) -> None:
        """Makes a layer one file, and follows that."""
        check(request, self._limits)
        async with released(self._snapshots.flattening(request.snapshot_id)) as states:
            async for each in states:
                await call.write(
                    pb.FlattenSnapshotResponse(
                        snapshot=convert.snapshot(each.snapshot),
                        done_bytes=each.progress.done_bytes,
                        total_bytes=each.progress.total_bytes,
                    )
                )

    async def VerifySnapshot(self, request: pb.VerifySnapshotRequest, call: Call) -> None:
        """Compares a snapshot with its checksums, and follows that."""
        check(request, self._limits)
        async with released(self._snapshots.verifying(request.snapshot_id)) as states:
            async for each in states:
                await call.write(
                    pb.VerifySnapshotResponse(
                        snapshot_id=each.snapshot_id,
                        done_bytes=each.done_bytes,
                        total_bytes=each.total_bytes,
                        verified=each.verified,
                    )
                )

    async def ExportSnapshot(self, request: pb.ExportSnapshotRequest, call: Call) -> None:
        """The pieces of an archive, no faster than the client takes them."""
        check(request, self._limits)
        order = orders.export_order(request)
        async with released(self._archives.export(order)) as pieces:
            async for each in pieces:
                await call.write(convert.archive_piece(each))

    async def ImportSnapshot(self, call: Call) -> pb.ImportSnapshotResponse:
        """A snapshot of the pieces that come."""
        request: pb.ImportSnapshotRequest | None = await call.next_request()
        if request is None or request.WhichOneof("message") == "data":
            raise invalid_fields((FieldViolation("options", "must be the first message"),))
        check(request, self._limits)
        pieces = self._pieces(call)
        made = await self._archives.import_(orders.import_order(request.options), pieces)
        return pb.ImportSnapshotResponse(snapshot=convert.snapshot(made))

    async def _pieces(self, call: Call) -> AsyncIterator[bytes]:
        while (request := await call.next_request()) is not None:
            check(request, self._limits)
            if request.WhichOneof("message") != "data":
                wrong = FieldViolation("options", "is the first message only")
                raise invalid_fields((wrong,))
            yield request.data


def _position(it: Snapshot) -> Position:
    return it.create_time, it.snapshot_id
