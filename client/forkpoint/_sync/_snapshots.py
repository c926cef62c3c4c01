# Made of client/forkpoint/_async/_snapshots.py by tools/unasync_client.py: never edit.
"""Snapshots: look at them, label them, delete them, fork them, make them one file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, BinaryIO

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from forkpoint import _status, _wire, durations
from forkpoint._orders import export_request, fork_spec, import_options, new_request_id
from forkpoint._seam import blocking as seam
from forkpoint._sync._calls import Calls, Follower
from forkpoint.enums import ArchiveLayout, ExpiryAction, FailureAction
from forkpoint.errors import SnapshotNotFound
from forkpoint.v1 import snapshot_service_pb2 as messages
from forkpoint.v1.sandbox_service_pb2 import ForkSandboxesRequest
from forkpoint.views import ArchivePiece, FlattenUpdate, Progress, SnapshotView, VerifyUpdate

if TYPE_CHECKING:
    from forkpoint._sync._forks import Children

_PIECE_BYTES = 512 * 1024
"""Of an archive in one message: servers take messages of 1 MiB."""


class Snapshot(SnapshotView):
    """A snapshot with its verbs: the view's fields, as of the last answer about it."""

    __slots__ = ("_calls",)

    def __init__(self, calls: Calls, view: SnapshotView) -> None:
        self._calls = calls
        self._take(view)

    def _take(self, view: SnapshotView) -> None:
        for field in fields(SnapshotView):
            setattr(self, field.name, getattr(view, field.name))

    def __repr__(self) -> str:
        return f"<Snapshot {self.id} {self.mode} of {self.source_sandbox_id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def refresh(self) -> Snapshot:
        """Asks the server again; updates this object and returns it."""
        self._take(Snapshots(self._calls).get(self.id))
        return self

    def update(self, *, labels: Mapping[str, str]) -> Snapshot:
        """Replaces all labels; updates this object and returns it."""
        self._take(Snapshots(self._calls).update(self.id, labels=labels))
        return self

    def delete(self) -> None:
        """Deletes it. What was made from it stays. No error when it is gone already."""
        Snapshots(self._calls).delete(self.id, missing_ok=True)

    def flatten(self, *, timeout: durations.Duration | None = None) -> Snapshot:
        """Makes it FLAT and waits for that; updates this object and returns it."""
        for update in Snapshots(self._calls).flatten(self.id, timeout=timeout):
            self._take(update.snapshot)
        return self

    def verify(self, *, timeout: durations.Duration | None = None) -> None:
        """Compares its files with their checksums. Raises `DataLoss` where they differ."""
        for _ in Snapshots(self._calls).verify(self.id, timeout=timeout):
            pass

    def fork(
        self,
        count: int = 1,
        *,
        fork_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl: durations.Duration | None = None,
        on_expiry: ExpiryAction | str = ExpiryAction.DELETE,
        on_failure: FailureAction | str = FailureAction.KEEP,
        allow_drive_copy: bool = False,
        strict: bool = False,
        request_id: str | None = None,
        timeout: durations.Duration | None = None,
    ) -> Children:
        """Starts `count` children of this snapshot; see `Sandbox.fork`.

        Leaving the block deletes the children, and never this snapshot.
        """
        from forkpoint._sync._forks import Children  # it knows this module already

        request = ForkSandboxesRequest(
            request_id=request_id or new_request_id(),
            snapshot_id=self.id,
            fork=fork_spec(count, fork_id, labels, ttl, on_expiry, on_failure, allow_drive_copy),
        )
        return Children.of_snapshot(self._calls, request, strict=strict, timeout=timeout)


class Snapshots:
    """The server's snapshots. They are made by `Sandbox.branch`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def get(self, snapshot_id: str) -> Snapshot:
        """One snapshot. Raises `SnapshotNotFound`."""
        response = self._calls.unary(
            self._calls.snapshots.GetSnapshot, messages.GetSnapshotRequest(snapshot_id=snapshot_id)
        )
        return Snapshot(self._calls, _wire.snapshot(response.snapshot))

    def list(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        source: str | None = None,
        page_size: int = 0,
    ) -> Iterator[Snapshot]:
        """All snapshots that have all these labels and came from this sandbox, oldest first.

        Asks for a page at a time, while it is iterated; `page_size` 0 leaves it to the server.
        """
        token = ""
        while True:
            response = self._calls.unary(
                self._calls.snapshots.ListSnapshots,
                messages.ListSnapshotsRequest(
                    page_size=page_size,
                    page_token=token,
                    labels=labels,
                    source_sandbox_id=source or "",
                ),
            )
            for message in response.snapshots:
                yield Snapshot(self._calls, _wire.snapshot(message))
            token = response.next_page_token
            if not token:
                return

    def update(self, snapshot_id: str, *, labels: Mapping[str, str]) -> Snapshot:
        """Replaces all labels of a snapshot."""
        response = self._calls.unary(
            self._calls.snapshots.UpdateSnapshot,
            messages.UpdateSnapshotRequest(
                snapshot_id=snapshot_id, update_mask=FieldMask(paths=["labels"]), labels=labels
            ),
        )
        return Snapshot(self._calls, _wire.snapshot(response.snapshot))

    def flatten(
        self, snapshot_id: str, *, timeout: durations.Duration | None = None
    ) -> Iterator[FlattenUpdate]:
        """Makes a LAYERED snapshot FLAT, and follows that: nothing is sent before the first `next`.

        What starts from it first does the same. The work belongs to the server: leaving the loop,
        and `timeout`, end the watching only.
        """
        request = messages.FlattenSnapshotRequest(snapshot_id=snapshot_id)

        def attach(seconds: float | None) -> seam.Stream[messages.FlattenSnapshotResponse]:
            return self._calls.snapshots.FlattenSnapshot(request, timeout=seconds)

        follower = Follower(
            self._calls,
            attach,
            lambda _, seconds: attach(seconds),
            lambda seen: _wire.flattening(seen).over,
            timeout=timeout,
        )
        try:
            while (response := follower.next()) is not None:
                yield _wire.flattening(response)
        finally:
            follower.close()

    def verify(
        self, snapshot_id: str, *, timeout: durations.Duration | None = None
    ) -> Iterator[VerifyUpdate]:
        """Compares a snapshot, with all that it stands on, with the checksums of their files:
        nothing is sent before the first `next`.

        Raises `DataLoss`, whose metadata names the first bad range. Leaving the loop, and
        `timeout`, end the work; a lost connection begins it again.
        """
        request = messages.VerifySnapshotRequest(snapshot_id=snapshot_id)

        def attach(seconds: float | None) -> seam.Stream[messages.VerifySnapshotResponse]:
            return self._calls.snapshots.VerifySnapshot(request, timeout=seconds)

        follower = Follower(
            self._calls,
            attach,
            lambda _, seconds: attach(seconds),
            lambda seen: seen.verified,
            timeout=timeout,
        )
        try:
            while (response := follower.next()) is not None:
                yield _wire.verifying(response)
        finally:
            follower.close()

    def export(
        self,
        snapshot_id: str,
        *,
        layout: ArchiveLayout | str = ArchiveLayout.FLAT,
        level: int | None = None,
        timeout: durations.Duration | None = None,
    ) -> Generator[ArchivePiece, None, None]:
        """A snapshot as an archive: the data of all pieces, one after another.

        `level` is how hard zstd tries, from 1 (fast) to 12 (small). A stream that broke is to be
        begun anew.
        """
        self._calls.check_open()
        seconds = None if timeout is None else durations.parse(timeout).total_seconds()
        request = export_request(snapshot_id, layout, level)
        call = self._calls.snapshots.ExportSnapshot(request, timeout=seconds)
        total = 0
        try:
            for response in call:
                self._calls.reached()
                total = response.info.content_bytes or total
                yield ArchivePiece(response.data, Progress(response.done_bytes, total))
        except grpc.RpcError as raw:
            raise self._calls.explain(_status.from_call(raw), seconds) from raw
        finally:
            call.cancel()

    def export_to(
        self,
        file: BinaryIO,
        snapshot_id: str,
        *,
        layout: ArchiveLayout | str = ArchiveLayout.FLAT,
        level: int | None = None,
        timeout: durations.Duration | None = None,
        on_progress: Callable[[Progress], object] = lambda _: None,
    ) -> int:
        """Writes a snapshot as an archive to a file that is open for writing; returns its bytes."""
        written = 0
        with closing(
            self.export(snapshot_id, layout=layout, level=level, timeout=timeout)
        ) as pieces:
            for piece in pieces:
                seam.to_thread(file.write, piece.data)
                written += len(piece.data)
                on_progress(piece.progress)
        return written

    def import_from(
        self,
        file: BinaryIO,
        *,
        snapshot_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
        timeout: durations.Duration | None = None,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> Snapshot:
        """Makes a snapshot of an archive, read from a file from where it stands.

        It keeps its id unless another is given. `on_progress` is told how many bytes were sent.
        The snapshot is there when this returns; if it fails there is nothing of it. Import only
        archives that come from somebody you trust.
        """
        self._calls.check_open()
        seconds = None if timeout is None else durations.parse(timeout).total_seconds()
        failures: list[BaseException] = []

        def messages_of() -> Iterator[messages.ImportSnapshotRequest]:
            yield import_options(snapshot_id, labels, request_id)
            sent = 0
            try:
                while data := seam.to_thread(file.read, _PIECE_BYTES):
                    yield messages.ImportSnapshotRequest(data=data)
                    sent += len(data)
                    on_progress(sent)
            except Exception as error:
                failures.append(error)  # gRPC only says that the call was cancelled
                raise

        try:
            response = self._calls.snapshots.ImportSnapshot(messages_of(), timeout=seconds)
        except (grpc.RpcError, seam.CallEnded) as raw:
            if failures:
                raise failures[0] from None
            if not isinstance(raw, grpc.RpcError):
                raise
            raise self._calls.explain(_status.from_call(raw), seconds) from raw
        self._calls.reached()
        return Snapshot(self._calls, _wire.snapshot(response.snapshot))

    def delete(self, snapshot_id: str, *, missing_ok: bool = False) -> None:
        """Deletes a snapshot. Nothing that was made from it breaks."""
        try:
            self._calls.unary(
                self._calls.snapshots.DeleteSnapshot,
                messages.DeleteSnapshotRequest(snapshot_id=snapshot_id),
            )
        except SnapshotNotFound:
            if not missing_ok:
                raise
