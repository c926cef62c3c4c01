"""`forkpointd fsck`: does the disk hold what the registry says, and nothing else?

References are derived from the rows each time, never counted along, so no count can be wrong. What
is looked at is whether everything that a row stands on is there and fits, and whether anything is
there that no row knows. The server must not run meanwhile; sandboxes may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from forkpointd.images import (
    ImageError,
    SnapshotStore,
    StoredSnapshot,
    check_parent,
    load_extents,
)
from forkpointd.model import (
    DirtyBase,
    DirtyBaseState,
    Durability,
    Layout,
    Sandbox,
    Snapshot,
    SnapshotState,
)
from forkpointd.registry import Registry
from forkpointd.sandboxes.datadir import DataDir


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    subject: str
    """Such as `snapshot snap-1`."""
    problem: str
    repair: str
    """What a repair does about it; empty where only its owner can help, as `problem` says."""


@dataclass(slots=True)
class Report:
    """What was looked at, and what was found."""

    snapshots: int = 0
    sandboxes: int = 0
    folders: int = 0
    findings: list[Finding] = field(default_factory=list)
    repaired: bool = False

    @property
    def left(self) -> list[Finding]:
        """What is still wrong."""
        return [each for each in self.findings if not (self.repaired and each.repair)]


Repair = Callable[[], Awaitable[object]]


class Check:
    """One look at a data folder."""

    def __init__(self, registry: Registry, store: SnapshotStore) -> None:
        self._registry = registry
        self._store = store
        self._report = Report()
        self._repairs: list[Repair] = []
        self._wrong: dict[str, str | None] = {}
        """Why a snapshot can't be used, by its id; None where it can."""
        self._stored: dict[str, StoredSnapshot] = {}
        self._gone: list[str] = []
        """What was kept in memory and is not there."""

    async def run(self, *, repair: bool) -> Report:
        """Looks at everything, and repairs what is safe to repair. Blocks for the disk."""
        rows = await self._rows()
        self._look_at_snapshots(rows)
        self._look_at_sandboxes(await self._registry.all_sandboxes())
        await self._look_at_folders(rows)
        if repair:
            for each in self._repairs:
                await each()
            if self._gone:
                lost = await self._registry.lost_snapshots()
                await self._registry.note_lost([*lost, *self._gone])
            self._report.repaired = True
        return self._report

    def _note(self, subject: str, problem: str, repair: str = "", do: Repair | None = None) -> None:
        self._report.findings.append(Finding(subject, problem, repair))
        if do is not None:
            self._repairs.append(do)

    async def _rows(self) -> dict[str, Snapshot]:
        rows = {}
        for snapshot_id in await self._registry.snapshot_ids():
            row = await self._registry.get_snapshot(snapshot_id, include_deleted=True)
            assert row is not None, "nobody else works here"
            rows[snapshot_id] = row
        return rows

    # --- snapshots ---

    def _look_at_snapshots(self, rows: dict[str, Snapshot]) -> None:
        self._report.snapshots = len(rows)
        for snapshot_id in rows:
            try:
                self._stored[snapshot_id] = self._store.open(snapshot_id)
            except (ImageError, OSError) as error:
                self._wrong[snapshot_id] = str(error)
        for snapshot_id, row in sorted(rows.items()):
            if row.state is SnapshotState.LOST:
                continue  # which everybody knows
            why = self._why_unusable(snapshot_id)
            stored = self._stored.get(snapshot_id)
            if row.durability is Durability.MEMORY and self._look_at_memory(row, rows):
                continue
            if why is not None and not row.deleted:
                self._note(
                    f"snapshot {snapshot_id}",
                    f"it can't be used: {why}. Put its files back from a copy, or delete it",
                )
            if stored is not None and stored.manifest.layout is not row.layout:
                self._look_at_layout(row, stored)

    def _look_at_memory(self, row: Snapshot, rows: dict[str, Snapshot]) -> bool:
        """Whether it is gone with memory: then the server's next start says LOST."""
        snapshot_id = row.snapshot_id
        missing = self._missing_under(snapshot_id)
        if missing in rows and rows[missing].durability is Durability.MEMORY:
            self._gone.append(snapshot_id)
            of = "it" if missing == snapshot_id else f"{missing}, on which it stands,"
            self._note(
                f"snapshot {snapshot_id}",
                f"{of} was kept in memory only, and is gone",
                "the registry says LOST",
            )
            return True
        if missing is None and not self._store.is_in_memory(snapshot_id):
            self._note(
                f"snapshot {snapshot_id}",
                "it is on the disk, and in memory by the registry: a write-back was broken off",
                "the registry says DISK",
                lambda: self._registry.snapshot_is_on_disk(snapshot_id, row.disk_bytes),
            )
        return False

    def _missing_under(self, snapshot_id: str) -> str | None:
        """The first of a snapshot and what it stands on that can't be opened."""
        seen: set[str] = set()
        position: str | None = snapshot_id
        while position is not None and position not in seen:
            if (stored := self._stored.get(position)) is None:
                return position
            seen.add(position)
            layered = stored.manifest.layer is not None
            position = stored.manifest.parent_snapshot_id if layered else None
        return None

    def _look_at_layout(self, row: Snapshot, stored: StoredSnapshot) -> None:
        kept = stored.manifest.layout
        if kept is Layout.FLAT:
            self._note(
                f"snapshot {row.snapshot_id}",
                "it is FLAT on the disk and LAYERED in the registry: a flatten was broken off",
                "the registry says FLAT",
                lambda: self._registry.snapshot_is_flat(row.snapshot_id, row.disk_bytes),
            )
        else:
            self._note(
                f"snapshot {row.snapshot_id}",
                f"it is {kept} on the disk and {row.layout} in the registry, so its parent may be "
                "removed: its folder was replaced by an older copy. Flatten it while the server "
                "runs, or put the right files back",
            )

    def _why_unusable(self, snapshot_id: str) -> str | None:
        """Why a snapshot can't be started from; None where it can. Each is looked at once."""
        chain: list[str] = []
        position: str | None = snapshot_id
        while position is not None and position not in self._wrong:
            if position in chain:
                self._settle(chain, f"snapshot {position} stands on itself")
                break
            chain.append(position)
            position = self._below(position)
        while chain:
            each = chain.pop()
            if each not in self._wrong:
                self._wrong[each] = self._with_parent(each)
        return self._wrong[snapshot_id]

    def _below(self, snapshot_id: str) -> str | None:
        """What a snapshot stands on; None for a FLAT one, and for one that isn't there."""
        stored = self._stored.get(snapshot_id)
        if stored is None:
            self._wrong.setdefault(snapshot_id, "the registry knows no snapshot of this id")
            return None
        return None if stored.manifest.layer is None else stored.manifest.parent_snapshot_id

    def _with_parent(self, snapshot_id: str) -> str | None:
        manifest = self._stored[snapshot_id].manifest
        parent_id = self._below(snapshot_id)
        if manifest.layer is None or parent_id is None:
            return None
        if (why := self._wrong[parent_id]) is not None:
            return f"it stands on {parent_id}: {why}"
        try:
            check_parent(self._stored[parent_id].manifest, manifest, manifest.layer)
        except ImageError as error:
            return str(error)
        return None

    def _settle(self, chain: Iterable[str], why: str) -> None:
        for each in chain:
            self._wrong[each] = why

    # --- sandboxes ---

    def _look_at_sandboxes(self, rows: list[Sandbox]) -> None:
        self._report.sandboxes = len(rows)
        for row in rows:
            if row.dirty_base.state is DirtyBaseState.INVALID:
                continue
            why = self._why_lost(row.dirty_base)
            if why is not None:
                lost = replace(row, dirty_base=DirtyBase.invalid(why))
                self._note(
                    f"sandbox {row.sandbox_id}",
                    f"the base of its next diff is lost: {why}",
                    "its next branch is FULL",
                    partial(self._registry.put_sandbox, lost),
                )

    def _why_lost(self, base: DirtyBase) -> str | None:
        if base.snapshot_id is not None:
            if base.snapshot_id not in self._stored and base.snapshot_id not in self._wrong:
                return f"there is no snapshot {base.snapshot_id}"
            why = self._why_unusable(base.snapshot_id)
            if why is not None:
                return f"snapshot {base.snapshot_id}: {why}"
        for diff in base.unmerged:
            try:
                load_extents(diff.extents_path)
                diff.memory_path.stat()
            except (ImageError, OSError) as error:
                return f"the kept diff of branch {diff.branch_id}: {error}"
        return None

    # --- what no row knows ---

    async def _look_at_folders(self, rows: dict[str, Snapshot]) -> None:
        unfinished = await self._registry.unfinished_branches()
        known = {*rows, *(branch.snapshot_id for branch in unfinished)}
        drafts = {self._store.draft_name(branch.branch_id) for branch in unfinished}
        self._report.folders = self._store.folder_count()
        for path in self._store.leftovers(known):
            if path.name not in drafts:
                self._note(
                    f"folder {path}",
                    "no snapshot of the registry, and no unfinished branch, is kept there",
                    "it is removed",
                    partial(asyncio.to_thread, self._store.remove_leftover, path),
                )
        for snapshot_id, stored in sorted(self._stored.items()):
            for path in self._store.odd_files(stored):
                self._note(
                    f"snapshot {snapshot_id}",
                    f"{path} is no part of it: a flatten was broken off",
                    "it is removed",
                    partial(asyncio.to_thread, path.unlink),
                )


def describe(report: Report) -> list[str]:
    """The report, line by line, for people."""
    lines = []
    for each in report.findings:
        lines.append(f"{each.subject}: {each.problem}")
        if each.repair:
            lines.append(f"  -> {'repaired' if report.repaired else '--repair'}: {each.repair}")
    lines.append(
        f"looked at {report.snapshots} snapshots, {report.sandboxes} sandboxes and "
        f"{report.folders} folders: {len(report.left)} findings"
        + (" left" if report.repaired else "")
    )
    return lines


async def check_data_folder(data: DataDir, *, repair: bool) -> Report:
    """The whole check of a data folder whose lock is held. Raises RegistryError, OSError."""
    registry = await Registry.open(data.registry_path)
    try:
        memory_root = data.memory_images if data.memory_images.is_dir() else None
        store = SnapshotStore(data.snapshots, memory_root=memory_root)
        return await Check(registry, store).run(repair=repair)
    finally:
        await registry.close()
