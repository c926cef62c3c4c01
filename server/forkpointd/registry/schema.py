"""The tables, and how a file of an older release becomes one of this release.

`PRAGMA user_version` is the number of migrations that a file has seen; each runs in a transaction
of its own together with its number. A migration that was released is never edited: what changes is
a further one.

References between tables are plain columns, without foreign keys, where the row may outlive what it
names: a snapshot its source, a sandbox the snapshot it came from. Only a child's outcome belongs to
its fork. Instants are text in UTC of one length (`codec.instant_text`), so they sort as text;
nested data is JSON text.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from forkpointd.registry.errors import RegistryUnusable

APPLICATION_ID = 0x666B7074
"""`fkpt`: what tells our file from another program's SQLite database."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE sandboxes (
            sandbox_id TEXT NOT NULL PRIMARY KEY,
            state TEXT NOT NULL,
            wished_state TEXT NOT NULL,
            machine TEXT NOT NULL,
            vmm TEXT NOT NULL,
            create_time TEXT NOT NULL,
            labels TEXT NOT NULL,
            boot TEXT,
            snapshot_id TEXT,
            source_sandbox_id TEXT,
            fork_id TEXT,
            ttl_seconds REAL,
            expire_time TEXT,
            on_expiry TEXT NOT NULL,
            dirty_base TEXT NOT NULL,
            last_diff_bytes INTEGER,
            process TEXT,
            start_time TEXT,
            exit TEXT,
            -- What keeps a deleted snapshot's files: never stored beside what it is derived from.
            needed_snapshot_id TEXT GENERATED ALWAYS AS (
                CASE WHEN json_extract(dirty_base, '$.state') IN ('VALID', 'PENDING')
                THEN json_extract(dirty_base, '$.snapshot_id') END
            ) VIRTUAL
        )
        """,
        "CREATE INDEX sandboxes_in_order ON sandboxes (create_time, sandbox_id)",
        """
        CREATE INDEX sandboxes_on_base ON sandboxes (needed_snapshot_id)
            WHERE needed_snapshot_id IS NOT NULL
        """,
        """
        CREATE TABLE snapshots (
            snapshot_id TEXT NOT NULL PRIMARY KEY,
            create_time TEXT NOT NULL,
            source_sandbox_id TEXT NOT NULL,
            branch_id TEXT NOT NULL,
            parent_snapshot_id TEXT,
            mode TEXT NOT NULL,
            layout TEXT NOT NULL,
            machine TEXT NOT NULL,
            vmm TEXT NOT NULL,
            disk_bytes INTEGER NOT NULL,
            dirty_bytes INTEGER NOT NULL,
            labels TEXT NOT NULL,
            deleted INTEGER NOT NULL
        )
        """,
        """
        CREATE INDEX snapshots_in_order ON snapshots (create_time, snapshot_id)
            WHERE deleted = 0
        """,
        """
        CREATE INDEX snapshots_of_source ON snapshots (source_sandbox_id, create_time, snapshot_id)
            WHERE deleted = 0
        """,
        "CREATE INDEX snapshots_deleted ON snapshots (snapshot_id) WHERE deleted = 1",
        """
        CREATE TABLE branches (
            branch_id TEXT NOT NULL PRIMARY KEY,
            sandbox_id TEXT NOT NULL,
            snapshot_id TEXT NOT NULL,
            sequence INTEGER NOT NULL,
            -- Up to where memory may have run ahead of the row (sequences.py).
            sequence_limit INTEGER NOT NULL,
            stage TEXT NOT NULL,
            stages TEXT NOT NULL,
            requested_mode TEXT NOT NULL,
            requested_layout TEXT NOT NULL,
            layout TEXT NOT NULL,
            create_time TEXT NOT NULL,
            mode TEXT,
            mode_reason TEXT NOT NULL,
            snapshot_labels TEXT NOT NULL,
            max_pause_us INTEGER,
            predicted_pause_us INTEGER,
            precopy TEXT,
            pause_window TEXT,
            merge TEXT,
            fork_id TEXT,
            error TEXT,
            end_time TEXT,
            staging_serial INTEGER,
            staging TEXT,
            base_snapshot_id TEXT
        )
        """,
        "CREATE INDEX branches_in_order ON branches (create_time, branch_id)",
        "CREATE INDEX branches_of_sandbox ON branches (sandbox_id, create_time, branch_id)",
        "CREATE INDEX branches_of_snapshot ON branches (snapshot_id)",
        "CREATE INDEX branches_of_fork ON branches (fork_id) WHERE fork_id IS NOT NULL",
        """
        CREATE INDEX branches_unfinished ON branches (branch_id)
            WHERE stage NOT IN ('READY', 'FAILED', 'CANCELLED')
        """,
        "CREATE INDEX branches_ended ON branches (end_time) WHERE end_time IS NOT NULL",
        """
        CREATE TABLE forks (
            fork_id TEXT NOT NULL PRIMARY KEY,
            snapshot_id TEXT NOT NULL,
            sequence INTEGER NOT NULL,
            sequence_limit INTEGER NOT NULL,
            stage TEXT NOT NULL,
            spec TEXT NOT NULL,
            create_time TEXT NOT NULL,
            branch_id TEXT,
            error TEXT,
            end_time TEXT
        )
        """,
        """
        CREATE INDEX forks_unfinished ON forks (snapshot_id)
            WHERE stage NOT IN ('READY', 'FAILED')
        """,
        "CREATE INDEX forks_ended ON forks (end_time) WHERE end_time IS NOT NULL",
        """
        CREATE TABLE fork_children (
            fork_id TEXT NOT NULL REFERENCES forks (fork_id) ON DELETE CASCADE,
            child_index INTEGER NOT NULL,
            sandbox_id TEXT NOT NULL,
            state TEXT NOT NULL,
            error TEXT,
            start_us INTEGER,
            PRIMARY KEY (fork_id, child_index)
        ) WITHOUT ROWID
        """,
        "CREATE INDEX fork_children_by_id ON fork_children (sandbox_id)",
        """
        CREATE TABLE requests (
            request_id TEXT NOT NULL PRIMARY KEY,
            method TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            resource_id TEXT NOT NULL,
            -- What resource_id is an id of: the same id may be a sandbox's and a branch's.
            resource_kind TEXT NOT NULL,
            create_time TEXT NOT NULL
        )
        """,
        "CREATE INDEX requests_in_order ON requests (create_time)",
        "CREATE INDEX requests_of_resource ON requests (resource_id)",
        """
        CREATE TABLE counters (
            name TEXT NOT NULL PRIMARY KEY,
            next_value INTEGER NOT NULL
        )
        """,
        """
        CREATE TABLE server (
            start_number INTEGER PRIMARY KEY AUTOINCREMENT,
            start_time TEXT NOT NULL,
            boot_id TEXT NOT NULL,
            version TEXT NOT NULL,
            pid INTEGER NOT NULL
        )
        """,
    ),
    (
        # What stands on a snapshot: a deleted one's files are kept for it.
        """
        CREATE INDEX layers_on_parent ON snapshots (parent_snapshot_id) WHERE layout = 'LAYERED'
        """,
    ),
    (
        # An INVALID base that has a snapshot needs it too: layers over it are still being stored.
        "DROP INDEX sandboxes_on_base",
        "ALTER TABLE sandboxes DROP COLUMN needed_snapshot_id",
        """
        ALTER TABLE sandboxes ADD COLUMN needed_snapshot_id TEXT
            GENERATED ALWAYS AS (json_extract(dirty_base, '$.snapshot_id')) VIRTUAL
        """,
        """
        CREATE INDEX sandboxes_on_base ON sandboxes (needed_snapshot_id)
            WHERE needed_snapshot_id IS NOT NULL
        """,
    ),
    (
        "ALTER TABLE snapshots ADD COLUMN digest TEXT",
        "CREATE INDEX snapshots_without_digest ON snapshots (snapshot_id) WHERE digest IS NULL",
    ),
    (
        # Images in memory: what they have been asked for, and what is gone with it.
        "ALTER TABLE branches ADD COLUMN durability TEXT NOT NULL DEFAULT 'DISK'",
        "ALTER TABLE snapshots ADD COLUMN durability TEXT NOT NULL DEFAULT 'DISK'",
        "ALTER TABLE snapshots ADD COLUMN state TEXT NOT NULL DEFAULT 'READY'",
        """
        CREATE INDEX snapshots_in_memory ON snapshots (create_time, snapshot_id)
            WHERE durability = 'MEMORY'
        """,
    ),
)

PROMISES: tuple[str, ...] = (
    "PRAGMA temp_store = MEMORY",
    "CREATE TEMP TABLE imports (snapshot_id TEXT NOT NULL PRIMARY KEY)",
)
"""Of the writer's connection, gone with it: ids of snapshots that are being imported. What a server
that is gone was importing nobody goes on with."""


def schema_version(connection: sqlite3.Connection) -> int:
    """How many migrations the file has seen."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def migrate(
    connection: sqlite3.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS
) -> int:
    """Brings the file to this release's schema; returns how many migrations that took.

    Refuses what `check_ours` refuses. A migration that fails leaves the file as the one before it
    did.
    """
    version = check_ours(connection, migrations)
    for number in range(version, len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in migrations[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {number + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    return len(migrations) - version


def check_ours(
    connection: sqlite3.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS
) -> int:
    """Refuses (`RegistryUnusable`) another program's database and a newer release's, having changed
    nothing; returns how many migrations the file has seen."""
    version = schema_version(connection)
    application: int = connection.execute("PRAGMA application_id").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application != APPLICATION_ID and not (empty and application == 0 and version == 0):
        raise RegistryUnusable(
            "it is a SQLite database of another program: move it away or choose another --data-dir"
        )
    if version > len(migrations):
        raise RegistryUnusable(
            f"it was written by a newer forkpoint (schema {version}; this release knows "
            f"{len(migrations)}): run that release, or choose another --data-dir"
        )
    return version
