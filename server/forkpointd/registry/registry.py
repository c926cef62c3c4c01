"""`Registry`: the registry's methods, in the words of the model.

Every method that changes something returns once the change is on the disk, and raises without
having changed anything. Two changes that one task awaits one after the other are visible in this
order; so are changes that were handed over in this order without awaiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Rows
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from forkpointd.model import (
    Branch,
    BranchStage,
    BranchView,
    Fork,
    ForkpointError,
    LayeredRow,
    Layout,
    Page,
    Reason,
    RememberedRequest,
    RequestKey,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotRoom,
)
from forkpointd.registry import branches, forks, requests, room, sandboxes, snapshots, upkeep
from forkpointd.registry.ballast import Ballast
from forkpointd.registry.lanes import LaneStats, Operation, ReadLane, WriteLane
from forkpointd.registry.opening import connect_reader, connect_writer
from forkpointd.registry.rows import Position
from forkpointd.registry.snapshots import SnapshotUsers
from forkpointd.registry.upkeep import ServerStart

T = TypeVar("T")


class Registry:
    """An open registry. Of one event loop; made by `open`."""

    def __init__(self, writer: WriteLane, reader: ReadLane, ballast: Ballast) -> None:
        self._writer = writer
        self._reader = reader
        self._ballast = ballast
        self._serials = iter(range(0))
        self._taking_serials = asyncio.Lock()

    # --- its life ---

    @classmethod
    async def open(cls, path: Path) -> Registry:
        """Opens the file, makes it where there is none, and brings it to this release's schema.

        Raises `RegistryUnusable` with the reason and the remedy: damaged, of another program or of
        a newer release, no permission, no room.
        """
        writer = WriteLane("registry writer", partial(connect_writer, path))
        await writer.start()
        reader = ReadLane("registry reader", partial(connect_reader, path))
        try:
            await reader.start()
            await writer.run(upkeep.raise_sequences)
        except BaseException:
            await reader.close()
            await writer.close()
            raise
        return cls(writer, reader, Ballast(path))

    async def close(self) -> None:
        """Takes no more calls, finishes those under way, closes the file. Idempotent."""
        self._reader.refuse()
        self._writer.refuse()
        # The writer last: the last connection that is closed empties the write-ahead log.
        await self._reader.close()
        await self._writer.close()

    @property
    def writes(self) -> LaneStats:
        """How many operations were written, with how many commits."""
        return self._writer.stats

    @property
    def reads(self) -> LaneStats:
        """How many operations were read, in how many transactions."""
        return self._reader.stats

    async def write(self, operation: Operation[T]) -> T:
        """Runs an operation in the next group commit; returns its result once it is on the disk.
        One that finds the disk full is tried once more, with the room that the ballast took.

        If the operation raises, its changes are undone and the caller gets what it raised. A full
        disk is NO_DISK_SPACE, any other failure of SQLite `RegistryFault`. A caller that is
        cancelled does not undo what was handed over.
        """
        try:
            return await self._writer.run(operation)
        except ForkpointError as error:
            if error.reason is not Reason.NO_DISK_SPACE:
                raise
            await asyncio.to_thread(self._ballast.drop)
            return await self._writer.run(operation)

    async def restore_ballast(self) -> bool:
        """Takes room for the day on which the disk is full, if there is room now; whether it has
        it. To be called now and then."""
        return await asyncio.to_thread(self._ballast.restore)

    async def read(self, operation: Operation[T]) -> T:
        """Runs an operation that changes nothing, on all that was committed before it was handed
        over. Never waits for a commit."""
        return await self._reader.run(operation)

    # --- sandboxes ---

    async def insert_sandboxes(
        self, sandboxes_: Rows[Sandbox], request: RequestKey | None = None
    ) -> None:
        """New sandboxes, all or none; with `request` one only. Raises ID_TAKEN naming the id (it
        exists, or an unfinished fork will use it), `RequestSeen`, REQUEST_ID_REUSED."""
        await self.write(lambda c: sandboxes.insert(c, sandboxes_, request))

    async def put_sandbox(self, sandbox: Sandbox) -> None:
        """Replaces the row. Raises SANDBOX_NOT_FOUND: a removed row does not come back."""
        await self.put_sandboxes([sandbox])

    async def put_sandboxes(self, sandboxes_: Rows[Sandbox]) -> None:
        """Replaces the rows, all or none. Raises SANDBOX_NOT_FOUND."""
        await self.write(lambda c: sandboxes.put(c, sandboxes_))

    async def get_sandbox(self, sandbox_id: str) -> Sandbox | None:
        """One sandbox."""
        return await self.read(lambda c: sandboxes.get(c, sandbox_id))

    async def all_sandboxes(self) -> list[Sandbox]:
        """All of them, in order of creation."""
        return await self.read(sandboxes.everything)

    async def list_sandboxes(
        self,
        page_size: int,
        after: Position | None = None,
        labels: Mapping[str, str] | None = None,
        states: frozenset[SandboxState] = frozenset(),
    ) -> Page[Sandbox]:
        """A page of those that have all `labels` and one of `states` (none: any)."""
        return await self.read(
            lambda c: sandboxes.list_some(c, page_size, after, labels or {}, states)
        )

    async def remove_sandboxes(
        self, sandbox_ids: Rows[str], *, forget_requests: bool = False
    ) -> int:
        """Removes rows; returns how many there were. `forget_requests` also forgets the request_ids
        that made them: for a creation that failed and left nothing, so that a repeat tries anew."""
        return await self.write(lambda c: sandboxes.remove(c, sandbox_ids, forget_requests))

    # --- snapshots ---

    async def insert_snapshot(self, snapshot: Snapshot) -> None:
        """A snapshot that no branch of this registry makes. Raises ID_TAKEN."""
        await self.write(lambda c: snapshots.insert(c, snapshot))

    async def promise_snapshots(self, snapshot_ids: Rows[str]) -> None:
        """Keeps ids for snapshots that are being imported, all or none, as long as this server
        runs. Raises ID_TAKEN."""
        await self.write(lambda c: snapshots.promise(c, snapshot_ids))

    async def take_snapshots_back(self, snapshot_ids: Rows[str]) -> None:
        """Gives ids free that were promised. Idempotent."""
        await self.write(lambda c: snapshots.take_back(c, snapshot_ids))

    async def insert_imported(self, snapshots_: Rows[Snapshot], request: RequestKey | None) -> None:
        """New snapshots whose ids were promised, all or none; the last is what was asked for.
        Raises `RequestSeen`, REQUEST_ID_REUSED."""
        await self.write(lambda c: snapshots.insert_imported(c, snapshots_, request))

    async def put_snapshot(self, snapshot: Snapshot) -> None:
        """Replaces the row. Raises SNAPSHOT_NOT_FOUND for a missing or deleted one."""
        await self.write(lambda c: snapshots.put(c, snapshot))

    async def get_snapshot(
        self, snapshot_id: str, include_deleted: bool = False
    ) -> Snapshot | None:
        """One snapshot."""
        return await self.read(lambda c: snapshots.get(c, snapshot_id, include_deleted))

    async def list_snapshots(
        self,
        page_size: int,
        after: Position | None = None,
        labels: Mapping[str, str] | None = None,
        source_sandbox_id: str | None = None,
    ) -> Page[Snapshot]:
        """A page of those, not deleted, that have all `labels` and this source (None: any)."""
        return await self.read(
            lambda c: snapshots.list_some(c, page_size, after, labels or {}, source_sandbox_id)
        )

    async def snapshot_ids(self) -> frozenset[str]:
        """Of all snapshots, deleted ones included: whose folders have a row."""
        return await self.read(snapshots.all_ids)

    async def mark_snapshot_deleted(self, snapshot_id: str) -> None:
        """The tombstone: out of the API, its files are there still. Idempotent. Raises
        SNAPSHOT_NOT_FOUND where there is no row."""
        await self.write(lambda c: snapshots.mark_deleted(c, snapshot_id))

    async def snapshots_nobody_needs(self) -> list[str]:
        """Deleted ones that are no sandbox's dirty base (VALID or PENDING), from which no
        unfinished fork starts children, and on which no layer stands, or will when its branch is
        finished. Found from the rows each time, never counted along."""
        return await self.read(snapshots.nobody_needs)

    async def chain_of_snapshot(self, snapshot_id: str) -> list[str]:
        """It and all that it stands on, deleted ones included, the newest first."""
        return await self.read(lambda c: snapshots.chain_of(c, snapshot_id))

    async def rooms_of_snapshots(self, snapshot_ids: Collection[str]) -> dict[str, SnapshotRoom]:
        """What each of those that are there holds on the disk."""
        return await self.read(lambda c: room.rooms_of(c, snapshot_ids))

    async def bytes_of_chain(self, snapshot_id: str) -> int:
        """What it and all that it stands on have on the disk; 0 for one without a row."""
        return await self.read(lambda c: snapshots.bytes_of_chain(c, snapshot_id))

    async def layered_snapshots(self) -> list[LayeredRow]:
        """All that are LAYERED and not LOST, deleted ones included, in no order."""
        return await self.read(snapshots.layered)

    async def prunable_snapshots(
        self, keep_last: int | None, older_than: datetime | None
    ) -> list[str]:
        """Of each source all but the newest `keep_last`, and of these only those made before
        `older_than`, the oldest first. None: that rule keeps nothing."""
        return await self.read(lambda c: snapshots.prunable(c, keep_last, older_than))

    async def snapshot_is_flat(self, snapshot_id: str, disk_bytes: int) -> None:
        """A layer, deleted or not, was flattened. Idempotent."""
        await self.write(lambda c: snapshots.flattened(c, snapshot_id, disk_bytes))

    async def snapshots_without_digest(self) -> list[str]:
        """Those whose checksums are still to be computed, the oldest first."""
        return await self.read(snapshots.without_digest)

    async def set_snapshot_digest(
        self, snapshot_id: str, layout: Layout, digest: str, disk_bytes: int
    ) -> bool:
        """Notes the checksums of a snapshot, if it still has this layout; whether it has."""
        return await self.write(
            lambda c: snapshots.set_digest(c, snapshot_id, layout, digest, disk_bytes)
        )

    async def snapshots_in_memory(self) -> list[Snapshot]:
        """All whose files are in memory, or were (LOST), deleted ones included; in order of
        creation."""
        return await self.read(snapshots.in_memory)

    async def snapshot_is_on_disk(self, snapshot_id: str, disk_bytes: int) -> None:
        """What was in memory, deleted or not, was written to the disk. Idempotent."""
        await self.write(lambda c: snapshots.on_disk(c, snapshot_id, disk_bytes))

    async def note_lost(self, gone: Rows[str]) -> frozenset[str]:
        """LOST are these, and the layers over them; all else is READY. Returns all that are LOST,
        deleted ones included."""
        if not gone and not await self.lost_snapshots():
            return frozenset()
        return await self.write(lambda c: snapshots.note_lost(c, gone))

    async def lost_snapshots(self) -> frozenset[str]:
        """All that are LOST, deleted ones included."""
        return await self.read(snapshots.lost)

    async def users_of_snapshot(self, snapshot_id: str) -> SnapshotUsers:
        """Who has its files open, or is about to."""
        return await self.read(lambda c: snapshots.users(c, snapshot_id))

    async def remove_snapshot_row(self, snapshot_id: str) -> None:
        """After its files are gone. Idempotent; `AssertionError` for one without a tombstone."""
        await self.write(lambda c: snapshots.remove(c, snapshot_id))

    # --- branches ---

    async def insert_branch(
        self, branch: Branch, fork: Fork | None = None, request: RequestKey | None = None
    ) -> None:
        """A new branch, with the fork of its children. Raises ID_TAKEN for the id of the branch, of
        its snapshot (also of a deleted one whose files are there, or one that another unfinished
        branch makes), of its fork or of a child; `RequestSeen`, REQUEST_ID_REUSED."""
        await self.write(lambda c: branches.insert(c, branch, fork, request))

    async def put_branch(
        self,
        branch: Branch,
        *,
        sandbox: Sandbox | None = None,
        snapshot: Snapshot | None = None,
        fork: Fork | None = None,
    ) -> None:
        """Replaces a branch, and in the same transaction its source and its fork, and inserts its
        snapshot. A source that was removed meanwhile stays so: its branch ends without it.

        Raises BRANCH_NOT_FOUND, FORK_NOT_FOUND, ID_TAKEN (the snapshot's); `AssertionError` for a
        sequence below the row's.
        """
        await self.write(lambda c: branches.put(c, branch, sandbox, snapshot, fork))

    async def get_branch(self, branch_id: str) -> Branch | None:
        """One branch."""
        return await self.read(lambda c: branches.get(c, branch_id))

    async def list_branches(
        self,
        page_size: int,
        after: Position | None = None,
        sandbox_id: str | None = None,
        stages: frozenset[BranchStage] = frozenset(),
    ) -> Page[Branch]:
        """A page of those of this source (None: any) in one of `stages` (none: any)."""
        return await self.read(
            lambda c: branches.list_some(c, page_size, after, sandbox_id, stages)
        )

    async def get_branch_view(self, branch_id: str) -> BranchView | None:
        """One branch with its snapshot (also a deleted one) and its fork, all of one moment."""
        return await self.read(lambda c: branches.get_view(c, branch_id))

    async def list_branch_views(
        self,
        page_size: int,
        after: Position | None = None,
        sandbox_id: str | None = None,
        stages: frozenset[BranchStage] = frozenset(),
    ) -> Page[BranchView]:
        """As `list_branches`, each with its snapshot and its fork, all of one moment."""
        return await self.read(
            lambda c: branches.list_views(c, page_size, after, sandbox_id, stages)
        )

    async def unfinished_branches(self) -> list[Branch]:
        """Those that have not ended, in order of admission. After `open` their sequences are above
        all that the former server showed."""
        return await self.read(branches.unfinished)

    # --- forks ---

    async def insert_fork(
        self, fork: Fork, children_rows: Rows[Sandbox] = (), request: RequestKey | None = None
    ) -> None:
        """A new fork with rows of its children. Raises ID_TAKEN for its id or a child's,
        `RequestSeen`, REQUEST_ID_REUSED."""
        await self.write(lambda c: forks.insert(c, fork, children_rows, request))

    async def put_fork(self, fork: Fork, *, sandboxes: Rows[Sandbox] = ()) -> None:
        """Replaces a fork with its children's outcomes, and in the same transaction rows of
        sandboxes (those that were not removed meanwhile). Raises FORK_NOT_FOUND; `AssertionError`
        for a sequence below the row's."""
        await self.write(lambda c: forks.put(c, fork, sandboxes))

    async def get_fork(self, fork_id: str) -> Fork | None:
        """One fork."""
        return await self.read(lambda c: forks.get(c, fork_id))

    async def unfinished_forks(self) -> list[Fork]:
        """Those that have not ended, in order of creation; sequences as of unfinished branches."""
        return await self.read(forks.unfinished)

    # --- repeated requests ---

    async def find_request(self, request_id: str) -> RememberedRequest | None:
        """What a request made."""
        return await self.read(lambda c: requests.find(c, request_id))

    async def expire_requests(self, before: datetime) -> int:
        """Forgets what was remembered before an instant; returns how many."""
        return await self.write(lambda c: requests.expire(c, before))

    # --- the server itself ---

    async def next_serial(self) -> int:
        """A number from 1 on that was never given out and never will be, also across crashes."""
        async with self._taking_serials:
            serial = next(self._serials, None)
            if serial is None:
                self._serials = iter(await self.write(upkeep.take_serials))
                serial = next(self._serials)
        return serial

    async def note_start(self, start: ServerStart) -> ServerStart | None:
        """Notes a start of the server; returns the one before it."""
        return await self.write(lambda c: upkeep.note_start(c, start))

    async def prune_ended(self, before: datetime) -> int:
        """Removes branches and forks that ended before an instant; returns how many."""
        total = 0
        while removed := await self.write(lambda c: upkeep.prune_ended(c, before)):
            total += removed
        return total
