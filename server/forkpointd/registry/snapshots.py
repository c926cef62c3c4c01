"""Operations on the snapshots table, and what still needs a deleted snapshot's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from forkpointd.model import (
    LayeredRow,
    Layout,
    Page,
    Reason,
    RequestKey,
    SandboxState,
    Snapshot,
)
from forkpointd.registry import requests
from forkpointd.registry.codec import instant_text, parse_instant
from forkpointd.registry.requests import ResourceKind
from forkpointd.registry.rows import (
    BRANCH_UNFINISHED,
    FORK_UNFINISHED,
    SNAPSHOTS,
    Filter,
    Position,
    exists,
    id_taken,
    list_page,
    not_there,
)
from forkpointd.registry.tables import Connection

CHAIN = (
    "WITH RECURSIVE chain (snapshot_id, below, disk_bytes, depth) AS ("
    " SELECT snapshot_id, IIF(layout = 'LAYERED', parent_snapshot_id, NULL), disk_bytes, 0"
    " FROM snapshots WHERE snapshot_id = ?"
    " UNION ALL SELECT s.snapshot_id, IIF(s.layout = 'LAYERED', s.parent_snapshot_id, NULL),"
    " s.disk_bytes, chain.depth + 1 FROM snapshots AS s JOIN chain ON s.snapshot_id = chain.below)"
)
"""A snapshot and all that it stands on, deleted ones included."""


@dataclass(frozen=True, slots=True)
class SnapshotUsers:
    """Who has a snapshot's files open, or is about to."""

    starting: bool
    """Somebody is being started from it, or will be."""
    pids: tuple[int, ...]
    """Processes that were."""


def insert(connection: Connection, snapshot: Snapshot, branch_id: str | None = None) -> None:
    """A new snapshot (made by `branch_id`, to which its id was promised). Raises ID_TAKEN."""
    check_id(connection, snapshot.snapshot_id, branch_id)
    SNAPSHOTS.insert(connection, [snapshot])


def promise(connection: Connection, snapshot_ids: Sequence[str]) -> None:
    """Keeps ids for snapshots that are being imported. Raises ID_TAKEN."""
    for snapshot_id in snapshot_ids:
        check_id(connection, snapshot_id, None)
        connection.execute("INSERT INTO imports VALUES (?)", (snapshot_id,))


def take_back(connection: Connection, snapshot_ids: Sequence[str]) -> None:
    """Gives ids free that were promised. Idempotent."""
    for snapshot_id in snapshot_ids:
        connection.execute("DELETE FROM imports WHERE snapshot_id = ?", (snapshot_id,))


def insert_imported(
    connection: Connection, snapshots: Sequence[Snapshot], request: RequestKey | None
) -> None:
    """New snapshots whose ids were promised: the last is what was asked for. Raises `RequestSeen`,
    REQUEST_ID_REUSED."""
    ids = [snapshot.snapshot_id for snapshot in snapshots]
    requests.remember(connection, request, ResourceKind.SNAPSHOT, ids[-1])
    take_back(connection, ids)
    for snapshot in snapshots:
        insert(connection, snapshot)


def check_id(connection: Connection, snapshot_id: str, branch_id: str | None) -> None:
    """Raises ID_TAKEN unless a snapshot may be called so: also the id of one whose files wait to
    be removed, that is being imported, or that an unfinished branch (other than `branch_id`) will
    make, is taken."""
    if exists(connection, "imports", "snapshot_id = ?", snapshot_id):
        raise id_taken("snapshot", snapshot_id, "is being imported")
    if exists(connection, "snapshots", "snapshot_id = ? AND deleted = 0", snapshot_id):
        raise id_taken("snapshot", snapshot_id)
    if exists(connection, "snapshots", "snapshot_id = ?", snapshot_id):
        raise id_taken("snapshot", snapshot_id, "was deleted, but sandboxes still stand on it")
    promised = connection.execute(
        f"SELECT branch_id FROM branches WHERE snapshot_id = ? AND {BRANCH_UNFINISHED}"
        " AND branch_id IS NOT ?",
        (snapshot_id, branch_id),
    ).fetchone()
    if promised is not None:
        raise id_taken("snapshot", snapshot_id, f"is being made by branch {promised[0]}")


def put(connection: Connection, snapshot: Snapshot) -> None:
    """Replaces the row of a snapshot that is not deleted. Raises SNAPSHOT_NOT_FOUND."""
    if get(connection, snapshot.snapshot_id) is None:
        raise not_there("snapshot", Reason.SNAPSHOT_NOT_FOUND, snapshot.snapshot_id)
    SNAPSHOTS.update(connection, snapshot)


def get(connection: Connection, snapshot_id: str, include_deleted: bool = False) -> Snapshot | None:
    """One snapshot."""
    return SNAPSHOTS.get(connection, snapshot_id, "1" if include_deleted else "deleted = 0")


def list_some(
    connection: Connection,
    page_size: int,
    after: Position | None,
    labels: Mapping[str, str],
    source_sandbox_id: str | None,
) -> Page[Snapshot]:
    """A page of those, not deleted, that have all labels and this source."""
    filter_ = Filter()
    filter_.conditions.append("deleted = 0")
    filter_.equals("source_sandbox_id", source_sandbox_id)
    filter_.labels("snapshots", labels)
    return list_page(connection, SNAPSHOTS, page_size, after, filter_)


def all_ids(connection: Connection) -> frozenset[str]:
    """Every snapshot that has a row, deleted ones included."""
    return frozenset(row[0] for row in connection.execute("SELECT snapshot_id FROM snapshots"))


def mark_deleted(connection: Connection, snapshot_id: str) -> None:
    """The tombstone. Idempotent; raises SNAPSHOT_NOT_FOUND where there is no row at all."""
    changed = connection.execute(
        "UPDATE snapshots SET deleted = 1 WHERE snapshot_id = ?", (snapshot_id,)
    ).rowcount
    if not changed:
        raise not_there("snapshot", Reason.SNAPSHOT_NOT_FOUND, snapshot_id)


def nobody_needs(connection: Connection) -> list[str]:
    """Deleted snapshots whose files may go: no sandbox has one as the base of its next diff, no
    unfinished fork will start children from it, and no layer stands on it, or will when its branch
    is finished."""
    rows = connection.execute(
        "SELECT snapshot_id FROM snapshots WHERE deleted = 1"
        " AND NOT EXISTS (SELECT 1 FROM sandboxes"
        " WHERE needed_snapshot_id IS NOT NULL AND needed_snapshot_id = snapshots.snapshot_id)"
        " AND NOT EXISTS (SELECT 1 FROM forks"
        f" WHERE forks.snapshot_id = snapshots.snapshot_id AND {FORK_UNFINISHED})"
        " AND NOT EXISTS (SELECT 1 FROM snapshots AS layers WHERE layers.layout = 'LAYERED'"
        " AND layers.parent_snapshot_id = snapshots.snapshot_id)"
        " AND NOT EXISTS (SELECT 1 FROM branches WHERE branches.layout = 'LAYERED'"
        f" AND {BRANCH_UNFINISHED} AND branches.base_snapshot_id = snapshots.snapshot_id)"
        " ORDER BY snapshot_id"
    )
    return [row[0] for row in rows]


def chain_of(connection: Connection, snapshot_id: str) -> list[str]:
    """A snapshot and all that it stands on, deleted ones included, the newest first."""
    rows = connection.execute(
        f"{CHAIN} SELECT snapshot_id FROM chain ORDER BY depth", (snapshot_id,)
    )
    return [row[0] for row in rows]


def bytes_of_chain(connection: Connection, snapshot_id: str) -> int:
    """What a snapshot and all that it stands on have on the disk."""
    held: int = connection.execute(
        f"{CHAIN} SELECT coalesce(sum(disk_bytes), 0) FROM chain", (snapshot_id,)
    ).fetchone()[0]
    return held


def prunable(
    connection: Connection, keep_last: int | None, older_than: datetime | None
) -> list[str]:
    """Of each source all but the newest `keep_last`, and of these only those made before
    `older_than`, the oldest first. None: that rule keeps nothing."""
    rows = connection.execute(
        "SELECT snapshot_id FROM (SELECT snapshot_id, create_time, row_number() OVER ("
        " PARTITION BY source_sandbox_id ORDER BY create_time DESC, snapshot_id DESC) AS place"
        " FROM snapshots WHERE deleted = 0)"
        " WHERE place > ? AND (? IS NULL OR create_time < ?) ORDER BY create_time, snapshot_id",
        (keep_last or 0, *(2 * (None if older_than is None else instant_text(older_than),))),
    )
    return [row[0] for row in rows]


def layered(connection: Connection) -> list[LayeredRow]:
    """All that are LAYERED and not LOST, deleted ones included, in no order."""
    rows = connection.execute(
        "SELECT snapshot_id, parent_snapshot_id, disk_bytes, create_time, deleted"
        " FROM snapshots WHERE layout = 'LAYERED' AND state = 'READY'"
    )
    return [
        LayeredRow(snapshot_id, parent, disk_bytes, parse_instant(created), bool(deleted))
        for snapshot_id, parent, disk_bytes, created, deleted in rows
    ]


def flattened(connection: Connection, snapshot_id: str, disk_bytes: int) -> None:
    """A layer, deleted or not, stands on nothing any more. Idempotent."""
    connection.execute(
        "UPDATE snapshots SET layout = 'FLAT', disk_bytes = ?,"
        " digest = IIF(layout = 'FLAT', digest, NULL) WHERE snapshot_id = ?",
        (disk_bytes, snapshot_id),
    )


def without_digest(connection: Connection) -> list[str]:
    """Those whose checksums are still to be computed, the oldest first: all on the disk that are
    shown, and deleted ones that a layer stands on."""
    rows = connection.execute(
        "SELECT snapshot_id FROM snapshots WHERE digest IS NULL AND durability = 'DISK'"
        " AND state = 'READY' AND (deleted = 0"
        " OR EXISTS (SELECT 1 FROM snapshots AS layers WHERE layers.layout = 'LAYERED'"
        " AND layers.parent_snapshot_id = snapshots.snapshot_id))"
        " ORDER BY create_time, snapshot_id"
    )
    return [row[0] for row in rows]


def set_digest(
    connection: Connection, snapshot_id: str, layout: Layout, digest: str, disk_bytes: int
) -> bool:
    """Notes the checksums of a snapshot, if it still has this layout; whether it has."""
    changed = connection.execute(
        "UPDATE snapshots SET digest = ?, disk_bytes = ? WHERE snapshot_id = ? AND layout = ?",
        (digest, disk_bytes, snapshot_id, str(layout)),
    ).rowcount
    return changed == 1


def in_memory(connection: Connection) -> list[Snapshot]:
    """All whose files are in memory, or were: deleted and LOST ones included."""
    return SNAPSHOTS.all(connection, "durability = 'MEMORY'")


def on_disk(connection: Connection, snapshot_id: str, disk_bytes: int) -> None:
    """The files of a snapshot, deleted or not, were written to the disk. Idempotent."""
    connection.execute(
        "UPDATE snapshots SET durability = 'DISK', disk_bytes = ? WHERE snapshot_id = ?",
        (disk_bytes, snapshot_id),
    )


def note_lost(connection: Connection, gone: Sequence[str]) -> frozenset[str]:
    """LOST are these, and what stands on them; READY is all else, also what was LOST before and
    is there again. Returns all that are LOST."""
    connection.execute("UPDATE snapshots SET state = 'READY' WHERE state = 'LOST'")
    connection.execute(
        "WITH RECURSIVE lost (snapshot_id) AS (SELECT value FROM json_each(?)"
        " UNION SELECT s.snapshot_id FROM snapshots AS s JOIN lost"
        " ON s.layout = 'LAYERED' AND s.parent_snapshot_id = lost.snapshot_id)"
        " UPDATE snapshots SET state = 'LOST' WHERE snapshot_id IN (SELECT snapshot_id FROM lost)",
        (json.dumps(list(gone)),),
    )
    return lost(connection)


def lost(connection: Connection) -> frozenset[str]:
    """All that are LOST, deleted ones included."""
    rows = connection.execute("SELECT snapshot_id FROM snapshots WHERE state = 'LOST'")
    return frozenset(row[0] for row in rows)


def users(connection: Connection, snapshot_id: str) -> SnapshotUsers:
    """Who has a snapshot's files open, or is about to."""
    rows = connection.execute(
        "SELECT state, json_extract(process, '$.pid') FROM sandboxes WHERE snapshot_id = ?",
        (snapshot_id,),
    ).fetchall()
    starting = exists(
        connection, "forks", f"snapshot_id = ? AND {FORK_UNFINISHED}", snapshot_id
    ) or any(state == SandboxState.CREATING for state, _ in rows)
    return SnapshotUsers(starting, tuple(pid for _, pid in rows if pid is not None))


def remove(connection: Connection, snapshot_id: str) -> None:
    """Removes the row of a deleted snapshot, whose files are gone. Idempotent."""
    if exists(connection, "snapshots", "snapshot_id = ? AND deleted = 0", snapshot_id):
        raise AssertionError(f"snapshot {snapshot_id} has no tombstone")
    connection.execute("DELETE FROM snapshots WHERE snapshot_id = ?", (snapshot_id,))
