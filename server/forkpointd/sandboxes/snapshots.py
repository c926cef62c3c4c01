"""Snapshots that are READY: looked at, labelled, deleted, and kept while something stands on them.

A deleted snapshot leaves the API at once. Its files go when no live sandbox has it as its dirty
base (its own diffs, or a child that has not branched yet), which the registry derives from the
sandboxes' rows, and when nobody is just starting from it (`hold`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from forkpointd.images import SnapshotStore
from forkpointd.model import ForkpointError, Page, Reason, Snapshot
from forkpointd.registry import Registry

log = logging.getLogger(__name__)


class Snapshots:
    """The snapshots of this server."""

    def __init__(self, registry: Registry, store: SnapshotStore, files: Executor) -> None:
        self._registry = registry
        self._store = store
        self._files = files
        self._held: Counter[str] = Counter()
        self._collecting = asyncio.Lock()
        self._edit = asyncio.Lock()

    async def get(self, snapshot_id: str) -> Snapshot:
        """A READY snapshot."""
        snapshot = await self._registry.get_snapshot(snapshot_id)
        if snapshot is None:
            raise snapshot_not_found(snapshot_id)
        return snapshot

    async def list(
        self,
        *,
        page_size: int,
        after: tuple[datetime, str] | None,
        labels: Mapping[str, str],
        source_sandbox_id: str | None,
    ) -> Page[Snapshot]:
        """A page of READY snapshots."""
        return await self._registry.list_snapshots(
            page_size=page_size, after=after, labels=labels, source_sandbox_id=source_sandbox_id
        )

    async def set_labels(self, snapshot_id: str, labels: Mapping[str, str]) -> Snapshot:
        """Replaces the labels."""
        async with self._edit:
            snapshot = replace(await self.get(snapshot_id), labels=dict(labels))
            await self._registry.put_snapshot(snapshot)
        return snapshot

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

    async def collect(self) -> int:
        """Removes the files, then the rows, of deleted snapshots that nobody needs; returns how
        many. A file that can't be removed keeps its row and is tried again the next time."""
        loop = asyncio.get_running_loop()
        removed = 0
        async with self._collecting:
            for snapshot_id in await self._registry.snapshots_nobody_needs():
                if self._held[snapshot_id]:
                    continue
                try:
                    await loop.run_in_executor(self._files, self._store.delete, snapshot_id)
                except OSError as error:
                    log.error("can't remove the files of snapshot %s: %s", snapshot_id, error)
                    continue
                await self._registry.remove_snapshot_row(snapshot_id)
                removed += 1
        return removed


def snapshot_not_found(snapshot_id: str) -> ForkpointError:
    """The error for an id that no READY snapshot has."""
    return ForkpointError(
        Reason.SNAPSHOT_NOT_FOUND,
        f"there is no READY snapshot {snapshot_id}; `forkpoint snapshot list` shows what there is",
        metadata={"snapshot_id": snapshot_id},
    )
