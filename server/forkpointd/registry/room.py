"""What snapshots hold on the disk, and what the deletion of one would free: found from the rows."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from forkpointd.model import SnapshotRoom
from forkpointd.registry.rows import BRANCH_UNFINISHED, FORK_UNFINISHED
from forkpointd.registry.tables import Connection


@dataclass(frozen=True, slots=True)
class _Row:
    below: str | None
    disk_bytes: int
    deleted: bool
    layers: int
    """So many stand on it."""
    needed: bool
    """By something that is no layer."""


def rooms_of(connection: Connection, snapshot_ids: Collection[str]) -> dict[str, SnapshotRoom]:
    """The room of each that is there. Every row of their chains is looked at once."""
    rows = _chains(connection, snapshot_ids)
    held: dict[str, int] = {}
    for snapshot_id in snapshot_ids:
        way: list[str] = []
        at: str | None = snapshot_id
        while at is not None and at in rows and at not in held:
            way.append(at)
            at = rows[at].below
        total = held.get(at, 0) if at is not None else 0
        for each in reversed(way):
            total += rows[each].disk_bytes
            held[each] = total
    rooms = {}
    for snapshot_id in snapshot_ids:
        if snapshot_id in rows:
            exclusive = _freed_by(rows, snapshot_id)
            rooms[snapshot_id] = SnapshotRoom(exclusive, held[snapshot_id] - exclusive)
    return rooms


def _freed_by(rows: dict[str, _Row], snapshot_id: str) -> int:
    """What goes with it. A row goes with at most one that is shown, so that these walks together
    are as long as all chains."""
    row = rows[snapshot_id]
    if row.needed or row.layers:
        return 0
    freed = row.disk_bytes
    while row.below is not None and (below := rows.get(row.below)) is not None:
        if not below.deleted or below.needed or below.layers > 1:
            break
        freed += below.disk_bytes
        row = below
    return freed


def _chains(connection: Connection, snapshot_ids: Collection[str]) -> dict[str, _Row]:
    """These and all that they stand on. What a sandbox's process has mapped is needed as well: the
    disk has its file until the process ends."""
    found = connection.execute(
        "WITH RECURSIVE chains (snapshot_id) AS (SELECT value FROM json_each(?)"
        " UNION SELECT s.parent_snapshot_id FROM snapshots AS s JOIN chains USING (snapshot_id)"
        " WHERE s.layout = 'LAYERED'),"
        " mapped (snapshot_id) AS (SELECT DISTINCT snapshot_id FROM sandboxes"
        " WHERE snapshot_id IS NOT NULL AND process IS NOT NULL)"
        " SELECT s.snapshot_id, IIF(s.layout = 'LAYERED', s.parent_snapshot_id, NULL),"
        " s.disk_bytes, s.deleted,"
        " (SELECT count(*) FROM snapshots AS layers WHERE layers.layout = 'LAYERED'"
        " AND layers.parent_snapshot_id = s.snapshot_id),"
        " s.snapshot_id IN (SELECT snapshot_id FROM mapped)"
        " OR EXISTS (SELECT 1 FROM sandboxes"
        " WHERE needed_snapshot_id IS NOT NULL AND needed_snapshot_id = s.snapshot_id)"
        " OR EXISTS (SELECT 1 FROM forks"
        f" WHERE forks.snapshot_id = s.snapshot_id AND {FORK_UNFINISHED})"
        " OR s.snapshot_id IN (SELECT base_snapshot_id FROM branches WHERE layout = 'LAYERED'"
        f" AND base_snapshot_id IS NOT NULL AND {BRANCH_UNFINISHED})"
        " FROM snapshots AS s JOIN chains USING (snapshot_id)",
        (json.dumps(list(snapshot_ids)),),
    )
    return {
        snapshot_id: _Row(below, disk_bytes, bool(deleted), layers, bool(needed))
        for snapshot_id, below, disk_bytes, deleted, layers, needed in found
    }
