"""Snapshots that leave as archives, and archives that become snapshots.

All file work is done in threads of its own, a frame or a message at a time, so that a client that
is slow keeps no thread; it holds still while a window is open, as other copies do. An export writes
nothing. An import writes to drafts, whose room is reserved before, and which a restarted server
removes as it does a branch's; it becomes a snapshot, with its row, when its last byte was checked.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from forkpointd.branching.admission import Admission
from forkpointd.branching.imaging import CopyWorkers
from forkpointd.branching.quiet import Pace
from forkpointd.images import (
    DEFAULT_LEVEL,
    Chain,
    Draft,
    DriveWitness,
    ImageError,
    Manifest,
    Packing,
    Reservation,
    SnapshotStore,
    Table,
    Unpacking,
    adopted,
    allocated_bytes,
    pack_frame,
)
from forkpointd.model import (
    ArchiveLayout,
    ArchivePiece,
    Drive,
    ExportOrder,
    ForkpointError,
    ImportOrder,
    Machine,
    Reason,
    Snapshot,
    now,
)
from forkpointd.registry import Registry
from forkpointd.sandboxes.repeats import Repeats
from forkpointd.sandboxes.service import new_id
from forkpointd.sandboxes.snapshots import Snapshots, image_damaged
from forkpointd.sandboxes.starting import Starter, check_memory
from forkpointd.sandboxes.tasks import Tasks

log = logging.getLogger(__name__)

PIECE_BYTES = 512 * 1024
"""Of an archive in one message."""

FRAMES_AHEAD = 2
"""How many are packed at a time for one export."""


class Archives:
    """Exports and imports."""

    def __init__(
        self,
        *,
        registry: Registry,
        snapshots: Snapshots,
        store: SnapshotStore,
        starter: Starter,
        admission: Admission,
        workers: CopyWorkers,
        image_roots: Sequence[Path],
    ) -> None:
        self._registry = registry
        self._snapshots = snapshots
        self._store = store
        self._starter = starter
        self._admission = admission
        self._workers = workers
        self._image_roots = tuple(image_roots)
        self.tasks = Tasks("imports")
        self._repeats: Repeats[Snapshot] = Repeats(registry, self.tasks)

    # --- export ---

    async def export(self, order: ExportOrder) -> AsyncIterator[ArchivePiece]:
        """A snapshot as an archive, in pieces: the first says what it will hold. Raises
        SNAPSHOT_NOT_FOUND, WRITABLE_DRIVE, IMAGE_DAMAGED."""
        snapshot_id = order.snapshot_id
        await self._snapshots.usable(snapshot_id)
        try:
            async with self._snapshots.reading(snapshot_id) as chain:
                _check_exportable(snapshot_id, (chain.layers or (chain.image,))[-1].manifest)
                dirty = await self._dirty_bytes(chain)
                packing = await self._workers.run(
                    lambda pace: _packing(chain, order.layout, dirty, pace)
                )
                try:
                    async with aclosing(self._pieces(order, packing)) as pieces:
                        async for piece in pieces:
                            yield piece
                finally:
                    await asyncio.to_thread(packing.close)
        except (ImageError, OSError) as error:
            raise image_damaged(snapshot_id, error) from error

    async def _dirty_bytes(self, chain: Chain) -> list[int]:
        """What the windows of a chain wrote, oldest first."""
        found = []
        for stored in (chain.image, *chain.layers):
            row = await self._registry.get_snapshot(
                stored.manifest.snapshot_id, include_deleted=True
            )
            found.append(0 if row is None else row.dirty_bytes)
        return found

    async def _pieces(
        self, order: ExportOrder, packing: Packing
    ) -> AsyncGenerator[ArchivePiece, None]:
        index = packing.index
        total = index.content_bytes

        def piece(data: bytes, done: int) -> ArchivePiece:
            return ArchivePiece(
                snapshot_id=order.snapshot_id,
                layout=index.layout,
                image_count=len(index.images),
                data_bytes=index.data_bytes,
                total_bytes=total,
                done_bytes=done,
                data=data,
            )

        yield piece(b"", 0)
        table = Table()
        done = 0
        level = DEFAULT_LEVEL if order.level is None else order.level
        async with aclosing(self._packed(packing, level)) as frames:
            async for frame, content_bytes in frames:
                await asyncio.to_thread(table.add, frame, content_bytes)
                done += content_bytes
                for data in _cut(frame):
                    yield piece(data, done)
        for data in _cut(await asyncio.to_thread(table.end)):
            yield piece(data, done)

    async def _packed(
        self, packing: Packing, level: int
    ) -> AsyncGenerator[tuple[bytes, int], None]:
        """The frames and the size of their content, in order, a few ahead of who takes them."""
        ahead: deque[tuple[asyncio.Task[bytes], int]] = deque()
        ended = False
        try:
            while True:
                while not ended and len(ahead) < FRAMES_AHEAD:
                    content = await self._workers.run(lambda pace: _next_content(packing, pace))
                    if content is None:
                        ended = True
                    else:
                        task = asyncio.create_task(self._pack(content, level))
                        ahead.append((task, len(content)))
                if not ahead:
                    return
                task, content_bytes = ahead[0]
                frame = await task
                ahead.popleft()
                yield frame, content_bytes
        finally:
            for task, _ in ahead:
                task.cancel()
            await asyncio.gather(*(task for task, _ in ahead), return_exceptions=True)

    async def _pack(self, content: bytearray, level: int) -> bytes:
        def work(pace: Pace) -> bytes:
            pace.gate()
            return pack_frame(content, level)

        return await self._workers.run(work)

    # --- import ---

    async def import_(self, order: ImportOrder, pieces: AsyncIterator[bytes]) -> Snapshot:
        """The snapshot that an archive holds, READY, or nothing of it. A repeat of the same request
        joins it, or gets what it made.

        Raises ARCHIVE_INVALID, ID_TAKEN, HOST_MISMATCH, NO_MEMORY, DRIVE_CHANGED, WRITABLE_DRIVE,
        NO_DISK_SPACE, WRITE_FAILED, REQUEST_ID_REUSED; IMPORT_BROKEN_OFF where another call sent
        the bytes and was left.
        """
        inbox = _Inbox()
        making = asyncio.ensure_future(
            self._repeats.run(
                order.request,
                lambda: self._import(order, inbox),
                self._snapshots.get,
                f"import {order.snapshot_id or ''}",
            )
        )
        sending = asyncio.create_task(inbox.fill(pieces))
        try:
            await asyncio.wait({making, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                sending.result()  # raises what was wrong with a message
            return await asyncio.shield(making)
        finally:
            inbox.broken.set()
            sending.cancel()
            if not inbox.is_read:
                making.cancel()  # it is another call's: only the waiting for it ends
            await asyncio.wait({sending, making})

    async def _import(self, order: ImportOrder, inbox: _Inbox) -> Snapshot:
        """One import, as a task of the server."""
        work = _Import(order)
        try:
            while (data := await inbox.next()) is not None:
                await self._feed(work, data)
                if work.unpacking.waits:
                    await self._admit(work)
                    await self._feed(work, b"")
            await self._workers.run(lambda _: work.unpacking.finish())
            return await self._commit(work)
        except OSError as error:
            raise ForkpointError(
                Reason.WRITE_FAILED,
                f"the archive could not be written to the disk: {error}. Nothing of it was kept: "
                "make room and import it again",
            ) from error
        finally:
            await self._clean_up(work)

    async def _feed(self, work: _Import, data: bytes) -> None:
        def feed(pace: Pace) -> None:
            work.unpacking.feed(data, pace.gate, pace.should_stop)

        await self._workers.run(feed)

    async def _admit(self, work: _Import) -> None:
        """What is in an archive is known: whether it fits here, and where it goes."""
        unpacking, order = work.unpacking, work.order
        index = unpacking.index
        assert index is not None, "the manifests come after the index"
        top = unpacking.manifests[-1]
        snapshot_id = order.snapshot_id or top.snapshot_id
        check_memory(_machine(top))
        self._starter.check_fits(top, snapshot_id)
        await asyncio.to_thread(self._check_drives, snapshot_id, top.drives)
        ids = [*(new_id("snap") for _ in unpacking.manifests[1:]), snapshot_id]
        await self._registry.promise_snapshots(ids)
        work.promised = ids
        work.manifests = adopted(unpacking.manifests, ids)
        what = f"the archive of snapshot {snapshot_id}"
        work.room = await asyncio.to_thread(self._admission.reserve_bytes, index.disk_bytes, what)
        for _ in ids:
            work.drafts.append(await asyncio.to_thread(self._store.draft, new_id("import")))

        def place(pace: Pace) -> None:
            assert work.room is not None
            unpacking.place(
                work.drafts,
                landed=pace.paying(work.room.consume),
                drop_behind=pace.page_cache.is_crowded_by(index.disk_bytes),
            )

        await self._workers.run(place)

    def _check_drives(self, snapshot_id: str, drives: Sequence[DriveWitness]) -> None:
        """Whether the drives that a guest knows are here. A path of an archive is as little to be
        believed as a client's: only what lies in the image roots. Blocks."""
        roots = [Path(os.path.realpath(root)) for root in self._image_roots]
        for drive in drives:
            why: str | None
            if not drive.read_only:
                raise _writable(snapshot_id, drive)
            real = Path(os.path.realpath(drive.path))
            if real != drive.path or not any(real.is_relative_to(root) for root in roots):
                inside = ", ".join(map(str, roots)) or "none"
                why = f"{drive.path} is not in an image root of this server ({inside})"
            else:
                why = drive.changed()
            if why:
                raise ForkpointError(
                    Reason.DRIVE_CHANGED,
                    f"drive {drive.drive_id} of snapshot {snapshot_id}: {why}. An archive holds no "
                    f"drives: copy the file to {drive.path} with its time (cp -p, rsync -t), then "
                    "import again",
                    metadata={"snapshot_id": snapshot_id, "drive_id": drive.drive_id},
                )

    async def _commit(self, work: _Import) -> Snapshot:
        """All is here and checked: durable, then visible."""
        rows = []
        index = work.unpacking.index
        assert index is not None and work.manifests, "the archive was whole"
        last = work.manifests[-1]
        for draft, manifest, image in zip(
            tuple(work.drafts), work.manifests, index.images, strict=True
        ):
            disk_bytes = await self._workers.run(partial(self._finalise, draft, manifest))
            work.drafts.remove(draft)
            work.finalised.append(manifest.snapshot_id)
            row = _row(manifest, disk_bytes, image.dirty_bytes)
            # What it stands on is no snapshot of its own: it goes with the last that needs it.
            own = replace(row, labels=dict(work.order.labels))
            rows.append(own if manifest is last else replace(row, deleted=True))
        await self._registry.insert_imported(rows, work.order.request)
        work.finalised.clear()
        work.promised = []
        snapshot = rows[-1]
        log.info("snapshot %s was imported, in %d images", snapshot.snapshot_id, len(rows))
        return snapshot

    def _finalise(self, draft: Draft, manifest: Manifest, pace: Pace) -> int:
        """Makes one image durable; returns what it takes on the disk. Blocks."""
        pace.gate()
        memory_path = draft.memory_path if manifest.layer is None else draft.layer_path
        disk_bytes = sum(map(allocated_bytes, (memory_path, draft.vmstate_path)))
        self._store.finalise(draft, manifest)
        return disk_bytes

    async def _clean_up(self, work: _Import) -> None:
        """Of an import that failed, everything; of one that did not, the reservation."""

        def remove() -> None:
            work.unpacking.close()
            for draft in work.drafts:
                self._store.discard(draft)
            for snapshot_id in work.finalised:
                self._store.delete(snapshot_id)

        try:
            await asyncio.to_thread(remove)
        except OSError as error:
            log.error("what is left of an import goes at the next start: %s", error)
        finally:
            if work.room is not None:
                work.room.release()
            if work.promised:
                await self._registry.take_snapshots_back(work.promised)

    async def close(self) -> None:
        """Stops all imports; nothing of them is left."""
        await self.tasks.cancel()


@dataclass(slots=True)
class _Import:
    """One import, and what has to be undone if it fails."""

    order: ImportOrder
    unpacking: Unpacking = field(default_factory=Unpacking)
    manifests: tuple[Manifest, ...] = ()
    promised: list[str] = field(default_factory=list)
    room: Reservation | None = None
    drafts: list[Draft] = field(default_factory=list)
    finalised: list[str] = field(default_factory=list)


class _Inbox:
    """The bytes of an archive on their way from the call to the work, one message at a time."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self.broken = asyncio.Event()
        """Whoever sent them is gone."""
        self.is_read = False
        """Whether there is somebody who takes them."""

    async def fill(self, pieces: AsyncIterator[bytes]) -> None:
        """Hands over all pieces, then the end."""
        async for piece in pieces:
            await self._queue.put(piece)
        await self._queue.put(None)
        await asyncio.Event().wait()  # until the work is over

    async def next(self) -> bytes | None:
        """The next piece; None at the end. Raises IMPORT_BROKEN_OFF."""
        self.is_read = True
        getting = asyncio.ensure_future(self._queue.get())
        breaking = asyncio.ensure_future(self.broken.wait())
        try:
            await asyncio.wait({getting, breaking}, return_when=asyncio.FIRST_COMPLETED)
            if self.broken.is_set():
                raise ForkpointError(
                    Reason.IMPORT_BROKEN_OFF,
                    "the client that sent the archive left before its end. Nothing of it was kept: "
                    "import it again",
                )
            return getting.result()
        finally:
            getting.cancel()
            breaking.cancel()


def _packing(
    chain: Chain, layout: ArchiveLayout, dirty_bytes: Sequence[int], pace: Pace
) -> Packing:
    """Raises ImageError, OSError."""
    paths = [stored.memory_path for stored in (chain.image, *chain.layers)]
    crowded = pace.page_cache.is_crowded_by(sum(map(allocated_bytes, paths)))
    if layout is ArchiveLayout.KEPT:
        return Packing.kept(chain, dirty_bytes, drop_behind=crowded)
    return Packing.flat(chain, dirty_bytes[-1], drop_behind=crowded)


def _next_content(packing: Packing, pace: Pace) -> bytearray | None:
    pace.gate()
    content = packing.next_frame()
    if content is not None:
        pace.bandwidth.spend(len(content), pace.should_stop)
    return content


def _cut(data: bytes) -> list[bytes]:
    return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]


def _check_exportable(snapshot_id: str, manifest: Manifest) -> None:
    """An archive holds no drives, so each must be one that nobody writes to."""
    for drive in manifest.drives:
        if not drive.read_only:
            raise _writable(snapshot_id, drive)


def _writable(snapshot_id: str, drive: DriveWitness) -> ForkpointError:
    return ForkpointError(
        Reason.WRITABLE_DRIVE,
        f"drive {drive.drive_id} of snapshot {snapshot_id} is writable, and an archive holds no "
        "drives: memory and disk would come apart. Only what has read-only drives is exported and "
        "imported: boot the guest so, and keep what it writes in its memory",
        metadata={"snapshot_id": snapshot_id, "drive_id": drive.drive_id},
    )


def _machine(manifest: Manifest) -> Machine:
    return Machine(
        vcpus=manifest.vcpus,
        memory_mib=manifest.memory_bytes >> 20,
        drives=tuple(
            Drive(drive.drive_id, drive.path, drive.read_only, drive.root_device)
            for drive in manifest.drives
        ),
    )


def _row(manifest: Manifest, disk_bytes: int, dirty_bytes: int) -> Snapshot:
    return Snapshot(
        snapshot_id=manifest.snapshot_id,
        create_time=now(),
        source_sandbox_id=manifest.source_sandbox_id,
        branch_id=manifest.branch_id,
        parent_snapshot_id=manifest.parent_snapshot_id,
        mode=manifest.mode,
        layout=manifest.layout,
        machine=_machine(manifest),
        vmm=manifest.vmm,
        disk_bytes=disk_bytes,
        dirty_bytes=dirty_bytes,
    )
