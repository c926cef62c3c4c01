"""Layers made whole: a child maps one file with all of the memory, so what is LAYERED is flattened
before anything starts from it. Those who come at once for the same snapshot share one flatten."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from forkpointd.branching.admission import Admission
from forkpointd.branching.imaging import PROGRESS_SECONDS, CopyWorkers, Meter, make_image
from forkpointd.images import (
    ImageError,
    SnapshotStore,
    StoredSnapshot,
    allocated_bytes,
)
from forkpointd.model import FlattenProgress, ForkpointError, Reason
from forkpointd.registry import Registry
from forkpointd.sandboxes.snapshots import Snapshots, image_damaged, snapshot_not_found
from forkpointd.sandboxes.tasks import Tasks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    """A flatten at work, or ended."""

    task: asyncio.Task[StoredSnapshot]
    meter: Meter


class Flattener:
    """Flattens snapshots, each at most once at a time."""

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
        self._at_work: dict[str, _Job] = {}
        self.tasks = Tasks("flattening")

    async def flatten(self, snapshot_id: str) -> StoredSnapshot:
        """The snapshot, FLAT from now on. A caller that is cancelled ends nothing.

        Raises IMAGE_DAMAGED, NO_DISK_SPACE, WRITE_FAILED.
        """
        return await asyncio.shield(self._job(snapshot_id).task)

    async def watch(self, snapshot_id: str) -> AsyncIterator[FlattenProgress]:
        """The same: how far it is, as that changes, at least once."""
        job = self._job(snapshot_id)
        told = None
        while True:
            ended = job.task.done()
            state = FlattenProgress(job.meter.done_bytes, job.meter.total_bytes)
            if state != told:
                yield state
                told = state
            if ended:
                break
            await asyncio.wait({job.task}, timeout=PROGRESS_SECONDS)
        job.task.result()

    def _job(self, snapshot_id: str) -> _Job:
        job = self._at_work.get(snapshot_id)
        if job is None:
            meter = Meter()
            work = self.tasks.start_unwatched(
                self._flatten(snapshot_id, meter), f"flatten {snapshot_id}"
            )
            job = self._at_work[snapshot_id] = _Job(work, meter)
            work.add_done_callback(lambda _: self._at_work.pop(snapshot_id))
        return job

    async def recover(self) -> None:
        """Ends what a former server had almost done: FLAT on the disk, LAYERED in its row. What
        that leaves goes with the next `collect`."""
        for snapshot_id in await asyncio.to_thread(self._store.flattened_layers):
            try:
                await self._became_flat(
                    await asyncio.to_thread(self._store.flatten, snapshot_id, _is_flat_already)
                )
            except (ImageError, OSError) as error:  # whoever uses it is told
                log.error("the flatten of snapshot %s is not ended: %s", snapshot_id, error)

    async def _flatten(self, snapshot_id: str, meter: Meter) -> StoredSnapshot:
        with self._snapshots.hold(snapshot_id):
            stored, depth = await self._flatten_held(snapshot_id, meter)
        # Nobody who waits for the image waits for the end of what it no longer stands on.
        self._snapshots.collect_soon()
        if depth:  # else somebody else had just done it
            log.info("snapshot %s is flat: it had %d layers", snapshot_id, depth)
        return stored

    async def _flatten_held(self, snapshot_id: str, meter: Meter) -> tuple[StoredSnapshot, int]:
        """The snapshot, FLAT, and how many layers it had."""
        snapshot = await self._registry.get_snapshot(snapshot_id, include_deleted=True)
        if snapshot is None:
            raise snapshot_not_found(snapshot_id)
        memory_bytes = snapshot.machine.memory_bytes
        await self._snapshots.on_disk(snapshot_id)  # where what is flattened lies
        try:
            stored = await asyncio.to_thread(self._store.open, snapshot_id)
            if stored.manifest.layer is None:
                return stored, 0
            what = f"the image of layered snapshot {snapshot_id}"
            with await asyncio.to_thread(
                self._admission.reserve_bytes, memory_bytes, what
            ) as meter.reservation:
                async with self._copies.slot(), self._snapshots.reading(snapshot_id) as chain:
                    stored = await self._copies.run(
                        lambda pace: self._store.flatten(
                            snapshot_id,
                            lambda path: make_image(chain, (), memory_bytes, path, meter, pace),
                        )
                    )
                    await self._became_flat(stored)
                    return stored, chain.depth
        except ImageError as error:
            raise image_damaged(snapshot_id, error) from error
        except OSError as error:
            raise ForkpointError(
                Reason.WRITE_FAILED,
                f"snapshot {snapshot_id} is kept in layers, and its image could not be written: "
                f"{error}. Make room and try again: nothing is lost",
                metadata={"snapshot_id": snapshot_id},
            ) from error

    async def _became_flat(self, stored: StoredSnapshot) -> None:
        paths = (stored.memory_path, stored.vmstate_path)
        disk_bytes = await asyncio.to_thread(lambda: sum(map(allocated_bytes, paths)))
        await self._snapshots.became_flat(stored.manifest.snapshot_id, disk_bytes)

    async def close(self) -> None:
        """Stops all work; a later start begins it anew."""
        await self.tasks.cancel()


def _is_flat_already(path: Path) -> None:
    raise AssertionError(f"{path} is there already")
