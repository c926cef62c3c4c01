"""Checksums of snapshots: computed in the background, compared when asked.

A snapshot is READY before it has any: hashing takes the time of a copy, and nobody who forks needs
it. So they are computed afterwards, one snapshot at a time, in half of one CPU's time, and like
all copies not while a window is open. (A thread of low priority is no way: it would hold the
interpreter's lock while it waits for a CPU, and the whole server with it.) A flatten makes another
file, and so other checksums.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from forkpointd.branching.imaging import PROGRESS_SECONDS, CopyWorkers, Meter
from forkpointd.branching.quiet import Pace
from forkpointd.images import (
    Checksums,
    Damaged,
    ImageError,
    SnapshotStore,
    StoredSnapshot,
    compare,
    compute,
    data_bytes_of,
    digest_of,
    work_bytes,
)
from forkpointd.model import ForkpointError, Reason, Verification
from forkpointd.registry import Registry
from forkpointd.sandboxes.snapshots import Snapshots, image_damaged
from forkpointd.sandboxes.tasks import Tasks

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
RETRY_SECONDS = 60.0
"""What failed is not tried again before."""


LONGEST_REST_SECONDS = 0.05
"""A chunk that waited for a window to close did not work all that time."""
FLATTENED_TRIES = 50
"""A flatten is seen on the disk first, and in its row moments later."""


class Rests:
    """Rests after each chunk for as long as it took."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self, _: int) -> None:
        """After a chunk."""
        time.sleep(min(time.monotonic() - self._since, LONGEST_REST_SECONDS))
        self._since = time.monotonic()


class _Flattened(Exception):
    """A snapshot is kept in another way than a moment ago."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """A snapshot and what it is compared with."""

    stored: StoredSnapshot
    sums: Checksums


class Checksummer:
    """Computes the checksums of snapshots, each once at a time, and compares them."""

    def __init__(
        self,
        *,
        registry: Registry,
        snapshots: Snapshots,
        store: SnapshotStore,
        computing: CopyWorkers,
        comparing: CopyWorkers,
    ) -> None:
        self._registry = registry
        self._snapshots = snapshots
        self._store = store
        self._computing = computing
        self._comparing = comparing
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self.tasks = Tasks("checksums")

    # --- computing ---

    async def compute_all(self) -> None:
        """Computes what is missing, for good, the oldest first."""
        failed: dict[str, float] = {}
        while True:
            clock = time.monotonic()
            failed = {each: at for each, at in failed.items() if clock - at < RETRY_SECONDS}
            try:
                missing = await self._registry.snapshots_without_digest()
            except Exception:
                log.exception("what has no checksums can't be found; it is tried again")
                missing = []
            for snapshot_id in missing:
                if snapshot_id in failed:
                    continue
                try:
                    await self._have(snapshot_id)
                except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                    failed[snapshot_id] = time.monotonic()
                    log.warning("snapshot %s has no checksums: %s", snapshot_id, error)
            await asyncio.sleep(LOOK_SECONDS)

    async def _have(self, snapshot_id: str) -> None:
        """Computes the checksums of a snapshot, unless somebody is at it."""
        task = self._at_work.get(snapshot_id)
        if task is None:
            work = self._compute(snapshot_id)
            task = self.tasks.start_unwatched(work, f"checksums of {snapshot_id}")
            self._at_work[snapshot_id] = task
            task.add_done_callback(lambda _: self._at_work.pop(snapshot_id))
        await asyncio.shield(task)

    async def _compute(self, snapshot_id: str) -> None:
        with self._snapshots.hold(snapshot_id):
            if await self._registry.get_snapshot(snapshot_id, include_deleted=True) is None:
                return
            stored = await asyncio.to_thread(self._store.open, snapshot_id)
            async with self._computing.slot():
                sums = await self._computing.run(
                    lambda pace: compute(
                        stored,
                        progress=pace.paying(Rests()),
                        should_stop=pace.should_stop,
                        gate=pace.gate,
                    )
                )
            content = sums.to_json()
            await asyncio.to_thread(self._store.write_checksums, stored, content)
            disk_bytes = await asyncio.to_thread(data_bytes_of, stored.folder)
            await self._snapshots.note_digest(stored, digest_of(content), disk_bytes)

    # --- comparing ---

    async def verify(self, snapshot_id: str) -> AsyncGenerator[Verification, None]:
        """Compares a snapshot, with all that it stands on, with their checksums: how far that is,
        as it changes; ends with `verified`, or raises IMAGE_DAMAGED. Waits for checksums that are
        still to be computed."""
        meter, reading = Meter(), [snapshot_id]
        work = self._compare_all(snapshot_id, meter, reading)
        task = self.tasks.start(work, f"verify {snapshot_id}")
        try:
            told = None
            while not task.done():
                state = Verification(reading[0], meter.done_bytes, meter.total_bytes)
                if state != told:
                    yield state
                    told = state
                await asyncio.wait({task}, timeout=PROGRESS_SECONDS)
            task.result()
            yield Verification(snapshot_id, meter.done_bytes, meter.total_bytes, verified=True)
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _compare_all(self, snapshot_id: str, meter: Meter, reading: list[str]) -> None:
        for _ in range(FLATTENED_TRIES):
            try:
                with _as_damage(snapshot_id):
                    async with self._snapshots.reading(snapshot_id) as chain:
                        await self._compare_chain((chain.image, *chain.layers), meter, reading)
                return
            except _Flattened:
                meter.done_bytes = meter.total_bytes = 0
                await asyncio.sleep(PROGRESS_SECONDS)
        raise image_damaged(
            snapshot_id,
            ImageError("it is kept in another way than the registry says: see `forkpointd fsck`"),
        )

    async def _compare_chain(
        self, chain: Sequence[StoredSnapshot], meter: Meter, reading: list[str]
    ) -> None:
        checked = [await self._checked(stored) for stored in chain]
        counts = [await asyncio.to_thread(work_bytes, each.stored) for each in checked]
        meter.total_bytes = sum(counts)
        async with self._comparing.slot():
            for each in checked:
                reading[0] = each.stored.manifest.snapshot_id
                with _as_damage(reading[0]):
                    await self._compare(each, meter)

    async def _compare(self, checked: _Checked, meter: Meter) -> None:
        """Raises Damaged, ImageError, OSError; _Flattened where that is why it differs."""
        manifest = checked.stored.manifest
        try:
            await self._comparing.run(_comparison(checked, meter))
        except (ImageError, OSError):
            now = await asyncio.to_thread(self._store.open, manifest.snapshot_id)
            if now.manifest.layout is not manifest.layout:
                raise _Flattened from None
            raise

    async def _checked(self, stored: StoredSnapshot) -> _Checked:
        """A snapshot with its checksums, of which the registry knows the digest. Raises
        IMAGE_DAMAGED where they are gone or altered, _Flattened."""
        snapshot_id = stored.manifest.snapshot_id
        with _as_damage(snapshot_id):
            row = await self._registry.get_snapshot(snapshot_id, include_deleted=True)
            if row is not None and row.digest is None:
                await self._have(snapshot_id)
                row = await self._registry.get_snapshot(snapshot_id, include_deleted=True)
            if row is None:
                raise ImageError(f"snapshot {snapshot_id} has no row any more")
            if row.layout is not stored.manifest.layout or row.digest is None:
                raise _Flattened
            content = await asyncio.to_thread(self._store.read_checksums, stored)
            if digest_of(content) != row.digest:
                raise ImageError(
                    f"the checksums of snapshot {snapshot_id} are not those that were "
                    f"computed: their digest was {row.digest}"
                )
            return _Checked(stored, Checksums.from_json(content))

    async def close(self) -> None:
        """Stops all work; a later start begins it anew."""
        await self.tasks.cancel()


def _comparison(checked: _Checked, meter: Meter) -> Callable[[Pace], None]:
    return lambda pace: compare(
        checked.stored,
        checked.sums,
        progress=pace.paying(meter.add),
        should_stop=pace.should_stop,
        gate=pace.gate,
    )


@contextmanager
def _as_damage(snapshot_id: str) -> Iterator[None]:
    """What is wrong with a snapshot's files, as a client is told."""
    try:
        yield
    except Damaged as error:
        told = image_damaged(snapshot_id, error)
        raise ForkpointError(
            told.reason,
            str(told),
            metadata={
                "snapshot_id": snapshot_id,
                "file": error.path.name,
                "offset_bytes": str(error.offset_bytes),
                "length_bytes": str(error.length_bytes),
            },
        ) from error
    except ImageError as error:
        raise image_damaged(snapshot_id, error) from error
    except OSError as error:
        raise ForkpointError(
            Reason.IMAGE_DAMAGED,
            f"snapshot {snapshot_id} can't be read: {error}",
            metadata={"snapshot_id": snapshot_id},
        ) from error
