"""Operations that belong to no single resource: starts of the server, counters, retention."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from forkpointd.registry.codec import instant_text, parse_instant
from forkpointd.registry.rows import BRANCH_UNFINISHED, FORK_UNFINISHED
from forkpointd.registry.sequences import SEQUENCE_BLOCK
from forkpointd.registry.tables import Connection

SERIAL_BLOCK = 1000
"""Serials that are taken with one commit. What a crash leaves of a block is never used."""

STARTS_KEPT = 100
PRUNE_AT_ONCE = 500
"""Rows that one operation removes, so that others wait a moment only."""


@dataclass(frozen=True, slots=True)
class ServerStart:
    """A start of the server on this data folder."""

    start_time: datetime
    boot_id: str
    """/proc/sys/kernel/random/boot_id: tells whether the host was restarted between two starts."""
    version: str
    pid: int


def raise_sequences(connection: Connection) -> None:
    """What a former server may have shown beyond the rows of unfinished work is below its limit:
    goes on from there. Once, when the file is opened."""
    for table, unfinished in (("branches", BRANCH_UNFINISHED), ("forks", FORK_UNFINISHED)):
        connection.execute(
            f"UPDATE {table} SET sequence = sequence_limit,"
            f" sequence_limit = sequence_limit + {SEQUENCE_BLOCK} WHERE {unfinished}"
        )


def take_serials(connection: Connection, count: int = SERIAL_BLOCK) -> range:
    """So many numbers that nobody had before or gets again."""
    connection.execute("INSERT OR IGNORE INTO counters (name, next_value) VALUES ('serial', 1)")
    first: int = connection.execute(
        "SELECT next_value FROM counters WHERE name = 'serial'"
    ).fetchone()[0]
    connection.execute("UPDATE counters SET next_value = ? WHERE name = 'serial'", (first + count,))
    return range(first, first + count)


def note_start(connection: Connection, start: ServerStart) -> ServerStart | None:
    """Notes a start of the server; returns the one before it."""
    row = connection.execute(
        "SELECT start_time, boot_id, version, pid FROM server ORDER BY start_number DESC LIMIT 1"
    ).fetchone()
    connection.execute(
        "INSERT INTO server (start_time, boot_id, version, pid) VALUES (?, ?, ?, ?)",
        (instant_text(start.start_time), start.boot_id, start.version, start.pid),
    )
    connection.execute(
        "DELETE FROM server WHERE start_number <= (SELECT max(start_number) FROM server) - ?",
        (STARTS_KEPT,),
    )
    return None if row is None else ServerStart(parse_instant(row[0]), *row[1:])


def prune_ended(connection: Connection, before: datetime) -> int:
    """Removes some of the branches and forks that ended before an instant; returns how many, 0 when
    none is left. A branch stays as long as a sandbox keeps its diff (what is made of the diff later
    is described by it), a fork as long as the branch that it was part of."""
    limit = (instant_text(before), PRUNE_AT_ONCE)
    branches = connection.execute(
        "DELETE FROM branches WHERE branch_id IN (SELECT branch_id FROM branches"
        f" WHERE end_time < ? AND NOT ({BRANCH_UNFINISHED})"
        " AND branch_id NOT IN (SELECT json_extract(diff.value, '$.branch_id')"
        " FROM sandboxes, json_each(sandboxes.dirty_base, '$.unmerged') AS diff) LIMIT ?)",
        limit,
    ).rowcount
    forks = connection.execute(
        "DELETE FROM forks WHERE fork_id IN (SELECT fork_id FROM forks"
        f" WHERE end_time < ? AND NOT ({FORK_UNFINISHED})"
        " AND NOT EXISTS (SELECT 1 FROM branches WHERE branches.fork_id = forks.fork_id) LIMIT ?)",
        limit,
    ).rowcount
    return branches + forks
