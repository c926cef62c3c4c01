"""Images in memory, written to the disk when nobody waits for it.

A snapshot of durability MEMORY is READY before any disk has seen it. In the background it is copied
to the disk, what it stands on before it; then its row says DISK, and what was in memory goes when
nobody reads it any more (`Snapshots.collect`). Whoever needs it on the disk at once (a layer of
durability DISK over it, a flatten) shares the copy that is at work.

    copy, sync, rename, sync the parent    the disk has it; a crash before leaves nothing but what
                                           the next start removes
    the row says DISK                      a crash before: the next start says it
    the files in memory go                 a crash before: the next start finds them

At a start it is looked what memory still has: what it has not is LOST, with the layers over it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import timedelta

from forkpointd.branching.admission import Admission
from forkpointd.branching.imaging import CopyWorkers, Meter, copy_to_disk
from forkpointd.images import ImageError, SnapshotStore, StoredSnapshot, data_bytes_of
from forkpointd.model import Durability, ForkpointError, Reason, Snapshot, SnapshotState, now
from forkpointd.registry import Registry
from forkpointd.sandboxes.snapshots import Snapshots, image_damaged
from forkpointd.sandboxes.tasks import Tasks

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""A write-back that failed is not tried again before, unless somebody waits for it."""


class WriteBack:
    """Brings snapshots from memory to the disk, each once at a time."""

    def __init__(
        self,
        *,
        registry: Registry,
        snapshots: Snapshots,
        store: SnapshotStore,
        admission: Admission,
        copies: CopyWorkers,
    ) -> None:
        self._registry = registry
        self._snapshots = snapshots
        self._store = store
        self._admission = admission
        self._copies = copies
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self.tasks = Tasks("write-back")

    async def on_disk(self, snapshot_id: str) -> None:
        """Returns once a snapshot, and all that it stands on, is on the disk. A caller that is
        cancelled ends nothing. Raises IMAGE_DAMAGED, NO_DISK_SPACE, WRITE_FAILED."""
        for each in reversed(await self._registry.chain_of_snapshot(snapshot_id)):
            snapshot = await self._registry.get_snapshot(each, include_deleted=True)
            if snapshot is not None and snapshot.durability is Durability.MEMORY:
                await asyncio.shield(self._job(each))

    def _job(self, snapshot_id: str) -> asyncio.Task[None]:
        job = self._at_work.get(snapshot_id)
        if job is None:
            job = self._at_work[snapshot_id] = self.tasks.start_unwatched(
                self._write_back(snapshot_id), f"write back {snapshot_id}"
            )
            job.add_done_callback(lambda _: self._at_work.pop(snapshot_id))
        return job

    async def _write_back(self, snapshot_id: str) -> None:
        with self._snapshots.hold(snapshot_id):
            snapshot = await self._registry.get_snapshot(snapshot_id, include_deleted=True)
            if snapshot is None or snapshot.durability is Durability.DISK:
                return  # deleted meanwhile, or somebody else has just done it
            try:
                stored, disk_bytes = await self._copy(snapshot_id)
            except ImageError as error:
                raise image_damaged(snapshot_id, error) from error
            except OSError as error:
                raise ForkpointError(
                    Reason.WRITE_FAILED,
                    f"snapshot {snapshot_id} is kept in memory, and could not be written to the "
                    f"disk: {error}. Make room: nothing is lost, and it is tried again",
                    metadata={"snapshot_id": snapshot_id},
                ) from error
            await self._snapshots.came_to_disk(snapshot_id, disk_bytes)
        log.info("snapshot %s is on the disk: %s", snapshot_id, stored.folder)
        self._snapshots.collect_soon()

    async def _copy(self, snapshot_id: str) -> tuple[StoredSnapshot, int]:
        """The snapshot on the disk, and what it has there."""
        needed = await asyncio.to_thread(self._store.used_bytes, snapshot_id)
        what = f"snapshot {snapshot_id}, which is kept in memory"
        reservation = await asyncio.to_thread(self._admission.reserve_bytes, needed, what)
        with reservation:
            meter = Meter(reservation)
            async with self._copies.slot():
                stored = await self._copies.run(
                    lambda pace: self._store.write_back(
                        snapshot_id,
                        lambda stored, file, target: copy_to_disk(
                            stored, file, target, meter, pace
                        ),
                    )
                )
        return stored, await asyncio.to_thread(data_bytes_of, stored.folder)

    # --- when nobody asks ---

    async def as_due(self, delay: timedelta) -> None:
        """Writes back, for good and one after the other, what has been in memory for so long."""
        failed: dict[str, float] = {}
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            clock = time.monotonic()
            failed = {each: at for each, at in failed.items() if clock - at < RETRY_SECONDS}
            try:
                found = await self._registry.snapshots_in_memory()
            except Exception:
                log.exception("what is in memory can't be found; it is tried again")
                continue
            for snapshot in found:
                if snapshot.state is SnapshotState.LOST or snapshot.snapshot_id in failed:
                    continue
                if now() - snapshot.create_time >= delay and not await self._wrote(snapshot):
                    failed[snapshot.snapshot_id] = time.monotonic()

    async def _wrote(self, snapshot: Snapshot) -> bool:
        """Whether that worked."""
        try:
            await self.on_disk(snapshot.snapshot_id)
        except ForkpointError as error:
            log.warning("snapshot %s stays in memory: %s", snapshot.snapshot_id, error)
            return False
        except Exception:
            log.exception("snapshot %s stays in memory", snapshot.snapshot_id)
            return False
        return True

    # --- after a restart ---

    async def recover(self) -> frozenset[str]:
        """Looks what memory still has; returns what is LOST. Before anything else looks at
        snapshots."""
        gone = []
        for snapshot in await self._registry.snapshots_in_memory():
            found = await asyncio.to_thread(self._find, snapshot)
            if found is None:
                gone.append(snapshot.snapshot_id)
            elif found is Durability.DISK:
                await self._snapshots.came_to_disk(
                    snapshot.snapshot_id,
                    await asyncio.to_thread(self._store.used_bytes, snapshot.snapshot_id),
                )
        for snapshot_id in await asyncio.to_thread(self._store.left_in_memory):
            self._snapshots.is_left_in_memory(snapshot_id)
        lost = await self._registry.note_lost(gone)
        for snapshot_id in sorted(lost):
            log.error("snapshot %s is LOST: what was kept in memory is gone", snapshot_id)
        return lost

    def _find(self, snapshot: Snapshot) -> Durability | None:
        """Where a snapshot is that its row says is in memory; None where it is gone, or another's.
        Files that can't be looked at are there: whoever uses them is told."""
        try:
            stored = self._store.open(snapshot.snapshot_id)
        except ImageError as error:
            log.warning("snapshot %s: %s", snapshot.snapshot_id, error)
            return None
        except OSError as error:
            log.error("snapshot %s: %s", snapshot.snapshot_id, error)
            return Durability.MEMORY
        if stored.manifest.branch_id != snapshot.branch_id:
            return None
        if self._store.is_in_memory(snapshot.snapshot_id):
            return Durability.MEMORY
        self._store.sync()  # whoever renamed it may have been ended before
        return Durability.DISK

    async def close(self) -> None:
        """Stops all work; a later start begins it anew."""
        await self.tasks.cancel()
