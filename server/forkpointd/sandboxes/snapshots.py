"""Snapshots: looked at, labelled, deleted, and kept while something stands on them.

A deleted snapshot leaves the API at once. Its files go when no live sandbox has it as its dirty
base (its own diffs, or a child that has not branched yet), which the registry derives from the
sandboxes' rows, when no layer stands on it, and when nobody is just reading it (`hold`). The pages
that a layer had go when it was flattened, and likewise nobody reads them any more; so do files in
memory that were written back, when no child has them mapped.

What was kept in memory and went with it is LOST: it is shown, and can be deleted, and all else is
refused (`usable`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from forkpointd.images import Chain, SnapshotStore, StoredSnapshot
from forkpointd.model import (
    DirtyBase,
    Flattening,
    FlattenProgress,
    ForkpointError,
    Layout,
    Page,
    Reason,
    Snapshot,
    SnapshotState,
    Verification,
)
from forkpointd.registry import Registry
from forkpointd.sandboxes.tasks import Tasks
from forkpointd.vmm import has_mapped

A = TypeVar("A")
T = TypeVar("T")

log = logging.getLogger(__name__)


class Flattener(Protocol):
    """Makes LAYERED snapshots FLAT, each once at a time."""

    async def flatten(self, snapshot_id: str) -> StoredSnapshot:
        """The snapshot, FLAT from now on."""

    def watch(self, snapshot_id: str) -> AsyncIterator[FlattenProgress]:
        """The same: how far it is, as that changes, at least once."""


class Verifier(Protocol):
    """Compares snapshots with their checksums."""

    def verify(self, snapshot_id: str) -> AsyncGenerator[Verification, None]:
        """How far it is, as that changes; ends with `verified`, or raises IMAGE_DAMAGED."""


class WriteBack(Protocol):
    """Brings snapshots from memory to the disk."""

    async def on_disk(self, snapshot_id: str) -> None:
        """Returns once a snapshot, and all that it stands on, is there."""


class Snapshots:
    """The snapshots of this server."""

    def __init__(self, registry: Registry, store: SnapshotStore, files: Executor) -> None:
        self._registry = registry
        self._store = store
        self._files = files
        self._tasks = Tasks("snapshots")
        self._held: Counter[str] = Counter()
        self._passed_over: set[str] = set()
        """Whose files `collect` left alone since they were held."""
        self._collecting = asyncio.Lock()
        self._flattened: set[str] = set()
        """Whose layer's file may still be there."""
        self._left_in_memory: set[str] = set()
        """What was written back, and is in memory still."""
        self._edit = asyncio.Lock()
        self.flattener: Flattener | None = None
        """Set by those who copy images, as is the next."""
        self.write_back: WriteBack | None = None
        self.verifier: Verifier | None = None
        """Set by those who read them."""

    async def flat(self, stored: StoredSnapshot) -> StoredSnapshot:
        """The snapshot as one file that children can map, made now if it is LAYERED. Raises
        IMAGE_DAMAGED, NO_DISK_SPACE, WRITE_FAILED."""
        if stored.manifest.layer is None:
            return stored
        assert self.flattener is not None, "the server is built"
        return await self.flattener.flatten(stored.manifest.snapshot_id)

    async def flattening(self, snapshot_id: str) -> AsyncIterator[Flattening]:
        """The same, step by step. One who leaves ends nothing."""
        snapshot = await self.usable(snapshot_id)
        progress = FlattenProgress(0, 0)
        if snapshot.layout is Layout.FLAT:
            yield Flattening(snapshot, progress)
            return
        async for progress in self.flatten_progress(snapshot_id):
            yield Flattening(snapshot, progress)
        yield Flattening(await self.get(snapshot_id), progress)

    def flatten_progress(self, snapshot_id: str) -> AsyncIterator[FlattenProgress]:
        """How far the flatten of a LAYERED snapshot is, which is begun unless it is at work. Raises
        what `flat` raises."""
        assert self.flattener is not None, "the server is built"
        return self.flattener.watch(snapshot_id)

    async def verifying(self, snapshot_id: str) -> AsyncIterator[Verification]:
        """Compares a snapshot, with all that it stands on, with their checksums. Ends with whoever
        leaves. What is in memory is written back first: it has checksums from then on. Raises
        IMAGE_DAMAGED, and what `on_disk` raises."""
        await self.usable(snapshot_id)
        await self.on_disk(snapshot_id)
        assert self.verifier is not None, "the server is built"
        async with aclosing(self.verifier.verify(snapshot_id)) as states:
            async for each in states:
                yield each

    async def on_disk(self, snapshot_id: str) -> None:
        """Returns once a snapshot, and all that it stands on, is on the disk. Raises IMAGE_DAMAGED,
        NO_DISK_SPACE, WRITE_FAILED."""
        assert self.write_back is not None, "the server is built"
        await self.write_back.on_disk(snapshot_id)

    async def get(self, snapshot_id: str) -> Snapshot:
        """A snapshot, READY or LOST."""
        snapshot = await self._registry.get_snapshot(snapshot_id)
        if snapshot is None:
            raise snapshot_not_found(snapshot_id)
        return snapshot

    async def get_with_room(self, snapshot_id: str) -> Snapshot:
        """The same, with what it holds on the disk."""
        return (await self._with_rooms([await self.get(snapshot_id)]))[0]

    async def _with_rooms(self, snapshots: Sequence[Snapshot]) -> Sequence[Snapshot]:
        rooms = await self._registry.rooms_of_snapshots([each.snapshot_id for each in snapshots])
        return [replace(each, room=rooms.get(each.snapshot_id)) for each in snapshots]

    async def usable(self, snapshot_id: str) -> Snapshot:
        """A READY snapshot. Raises SNAPSHOT_NOT_FOUND, SNAPSHOT_LOST."""
        snapshot = await self.get(snapshot_id)
        if snapshot.state is SnapshotState.LOST:
            raise snapshot_lost(snapshot_id)
        return snapshot

    async def check_not_lost(self, snapshot_id: str) -> None:
        """The same of one that may be deleted by now."""
        snapshot = await self._registry.get_snapshot(snapshot_id, include_deleted=True)
        if snapshot is not None and snapshot.state is SnapshotState.LOST:
            raise snapshot_lost(snapshot_id)

    async def list(
        self,
        *,
        page_size: int,
        after: tuple[datetime, str] | None,
        labels: Mapping[str, str],
        source_sandbox_id: str | None,
    ) -> Page[Snapshot]:
        """A page of snapshots, READY or LOST, with what they hold on the disk."""
        page = await self._registry.list_snapshots(
            page_size=page_size, after=after, labels=labels, source_sandbox_id=source_sandbox_id
        )
        return replace(page, items=tuple(await self._with_rooms(page.items)))

    async def set_labels(self, snapshot_id: str, labels: Mapping[str, str]) -> Snapshot:
        """Replaces the labels."""
        async with self._edit:
            snapshot = replace(await self.usable(snapshot_id), labels=dict(labels))
            await self._registry.put_snapshot(snapshot)
        return (await self._with_rooms([snapshot]))[0]

    async def delete(self, snapshot_id: str) -> None:
        """Takes a snapshot out of the API (durably), and its files away if nobody needs them."""
        async with self._edit:
            await self.get(snapshot_id)
            await self._registry.mark_snapshot_deleted(snapshot_id)
        await self.collect()

    @contextmanager
    def hold(self, snapshot_id: str) -> Iterator[None]:
        """Keeps a snapshot's files while something is being made from it."""
        self._held[snapshot_id] += 1
        try:
            yield
        finally:
            self._held[snapshot_id] -= 1
            if not self._held[snapshot_id]:
                del self._held[snapshot_id]
                if snapshot_id in self._passed_over | self._flattened | self._left_in_memory:
                    self.collect_soon()

    @asynccontextmanager
    async def reading(self, snapshot_id: str) -> AsyncIterator[Chain]:
        """A snapshot with all that it stands on, whose files stay in the block. Raises ImageError,
        OSError."""
        async with self._holding_chain(snapshot_id):
            yield await self._run(self._store.chain, snapshot_id)

    @asynccontextmanager
    async def _holding_chain(self, snapshot_id: str) -> AsyncIterator[Sequence[str]]:
        """Holds a snapshot and all that the rows say it stands on, the newest first. They are held
        before any file is looked at: what is flattened meanwhile keeps what it had."""
        with ExitStack() as held:
            chain: Sequence[str] | None = None
            while (found := await self._registry.chain_of_snapshot(snapshot_id)) != chain:
                for each in found:
                    held.enter_context(self.hold(each))
                chain = found
            yield found

    @asynccontextmanager
    async def reading_base(self, base: DirtyBase) -> AsyncIterator[Chain | None]:
        """The same of what a dirty base stands on; None for the empty image."""
        if base.snapshot_id is None:
            yield None
        else:
            async with self.reading(base.snapshot_id) as chain:
                yield chain

    async def check_base(self, base: DirtyBase) -> None:
        """Whether all that a dirty base stands on is there: a layer over it would be lost else.
        Raises ImageError, OSError."""
        if base.snapshot_id is not None:
            async with self._holding_chain(base.snapshot_id) as chain:
                await self._run(self._store.check_there, chain)

    async def became_flat(self, snapshot_id: str, disk_bytes: int) -> None:
        """A layer was flattened on the disk: so is its row now. What it stood on, and its pages,
        go with the next `collect` when nobody reads them."""
        async with self._edit:
            await self._registry.snapshot_is_flat(snapshot_id, disk_bytes)
        self._flattened.add(snapshot_id)

    async def note_digest(self, stored: StoredSnapshot, digest: str, disk_bytes: int) -> bool:
        """The checksums of these files are beside them; False where the row says that they were
        flattened meanwhile, or the snapshot is gone."""
        manifest = stored.manifest
        async with self._edit:
            return await self._registry.set_snapshot_digest(
                manifest.snapshot_id, manifest.layout, digest, disk_bytes
            )

    async def came_to_disk(self, snapshot_id: str, disk_bytes: int) -> None:
        """What was in memory was written back: so says its row now. What is in memory goes with the
        next `collect` when nobody reads it."""
        async with self._edit:
            await self._registry.snapshot_is_on_disk(snapshot_id, disk_bytes)
        self.is_left_in_memory(snapshot_id)

    def is_left_in_memory(self, snapshot_id: str) -> None:
        """Its files in memory go with the next `collect` when nobody reads them."""
        self._left_in_memory.add(snapshot_id)

    def collect_soon(self) -> None:
        """Collects while the caller goes on."""
        self._tasks.start_unwatched(self.collect(), "collect snapshots")

    async def collect(self) -> int:
        """Removes the files, then the rows, of deleted snapshots that nobody needs; returns how
        many. A file that can't be removed keeps its row and is tried again the next time."""
        removed = 0
        async with self._collecting:
            self._passed_over.clear()
            await self._remove_flattened_layers()
            await self._remove_from_memory()
            while found := await self._remove_unneeded():
                removed += found  # what only they stood on is next
        return removed

    async def _remove_unneeded(self) -> int:
        removed = 0
        for snapshot_id in await self._registry.snapshots_nobody_needs():
            # Files that are large take their time: what was so when the list was made may not be.
            if self._passes_over(snapshot_id):
                continue
            if snapshot_id not in await self._registry.snapshots_nobody_needs():
                continue
            if self._passes_over(snapshot_id):
                continue
            if await self._is_removed(self._store.delete, "files", snapshot_id):
                await self._registry.remove_snapshot_row(snapshot_id)
                self._flattened.discard(snapshot_id)
                self._left_in_memory.discard(snapshot_id)
                removed += 1
        return removed

    def _passes_over(self, snapshot_id: str) -> bool:
        """Whether it is held. Who gives it free looks again."""
        if held := self._held[snapshot_id] > 0:
            self._passed_over.add(snapshot_id)
        return held

    async def close(self) -> None:
        """Stops what is being removed; a later start goes on."""
        await self._tasks.cancel()

    async def _remove_from_memory(self) -> None:
        """As long as a child has a file mapped its pages stay in memory, whether it has a name or
        not: so it keeps its name, by which it is counted."""
        remove = self._store.remove_from_memory
        for snapshot_id in list(self._left_in_memory):
            if self._held[snapshot_id]:
                continue
            # Who has looked for the files before that and holds them no more has a row by now; who
            # looks from now on finds those on the disk.
            users = await self._registry.users_of_snapshot(snapshot_id)
            path = self._store.memory_copy(snapshot_id)
            if users.starting or (
                path is not None and await self._run(_is_mapped, (path, users.pids))
            ):
                continue
            if await self._is_removed(remove, "files in memory", snapshot_id):
                self._left_in_memory.discard(snapshot_id)

    async def _remove_flattened_layers(self) -> None:
        for snapshot_id in list(self._flattened):
            if self._held[snapshot_id]:
                continue
            if await self._is_removed(self._store.remove_layer, "layer", snapshot_id):
                self._flattened.discard(snapshot_id)

    async def _is_removed(
        self, remove: Callable[[str], object], what: str, snapshot_id: str
    ) -> bool:
        """Whether that worked; else it is tried again by the next `collect`."""
        try:
            await self._run(remove, snapshot_id)
        except OSError as error:
            log.error("can't remove the %s of snapshot %s: %s", what, snapshot_id, error)
            return False
        return True

    def _run(self, work: Callable[[A], T], argument: A) -> asyncio.Future[T]:
        """File work, in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._files, work, argument)


def _is_mapped(of: tuple[Path, Sequence[int]]) -> bool:
    """Whether any of these processes has a file mapped. Blocks."""
    path, pids = of
    return any(has_mapped(pid, path) for pid in pids)


def snapshot_lost(snapshot_id: str) -> ForkpointError:
    """The error for a snapshot that is LOST."""
    return ForkpointError(
        Reason.SNAPSHOT_LOST,
        f"snapshot {snapshot_id} is LOST: it, or what it stands on, was kept in memory only, and "
        "went with it (a reboot, a logout, or somebody who emptied that folder). Delete it and "
        "branch again, with mode FULL where it was the source's dirty base",
        metadata={"snapshot_id": snapshot_id},
    )


def image_damaged(snapshot_id: str, error: Exception) -> ForkpointError:
    """The error for files that are not what they should be."""
    return ForkpointError(
        Reason.IMAGE_DAMAGED,
        f"snapshot {snapshot_id} can't be used: {error}. Put its files back from a copy, or delete "
        "it and branch again",
        metadata={"snapshot_id": snapshot_id},
    )


def snapshot_not_found(snapshot_id: str) -> ForkpointError:
    """The error for an id that no READY snapshot has."""
    return ForkpointError(
        Reason.SNAPSHOT_NOT_FOUND,
        f"there is no READY snapshot {snapshot_id}; `forkpoint snapshot list` shows what there is",
        metadata={"snapshot_id": snapshot_id},
    )
