"""Opening the file: its connections, and why one can't be opened. Runs on the lanes' threads."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from forkpointd.registry.errors import RegistryUnusable
from forkpointd.registry.schema import PROMISES, check_ours, migrate

OLDEST_SQLITE = (3, 31, 0)
"""The first with generated columns."""

BUSY_SECONDS = 5.0
"""How long a person's `sqlite3 forkpoint.db` may keep the server waiting. No other server writes:
the data folder is locked."""


def connect_writer(path: Path) -> sqlite3.Connection:
    """Opens the file for writing (and makes it, private to this user), checks it and brings it to
    this release's schema. Raises `RegistryUnusable`."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise RegistryUnusable(
            f"this Python's SQLite is {sqlite3.sqlite_version}, older than "
            f"{'.'.join(map(str, OLDEST_SQLITE))}: run the server with a newer Python"
        )
    try:
        _make(path)
        connection = _connect(path, "rw")
    except IsADirectoryError as error:
        raise _unusable(
            path, "it is a folder: move it away or choose another --data-dir"
        ) from error
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, f"{error}: check its owner, its mode and its disk") from error
    try:
        _prepare(connection)
        migrate(connection)
        for statement in PROMISES:
            connection.execute(statement)
    except RegistryUnusable as error:
        connection.close()
        raise _unusable(path, str(error)) from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise _unusable(path, _why(path, error)) from error
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Opens the file for reading, beside an open writer."""
    try:
        return _connect(path, "ro")
    except sqlite3.Error as error:
        raise _unusable(path, f"it can't be read: {error}") from error


def _make(path: Path) -> None:
    """The file's name is durable before anything in it is. SQLite gives its log the same mode."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return
    os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}"
    # No isolation level: the lanes say BEGIN and COMMIT themselves.
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    """Refuses a file that is not ours or damaged; then WAL, and an fsync with every commit."""
    check_ours(connection)
    found = [row[0] for row in connection.execute("PRAGMA quick_check(5)")]
    if found != ["ok"]:
        raise sqlite3.DatabaseError("; ".join(found))
    journal = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if journal != "wal":
        raise RegistryUnusable(
            f"its file system can't hold a write-ahead log (SQLite stays with {journal!r}): put "
            "the data folder on a local file system"
        )
    connection.execute("PRAGMA synchronous = FULL")


def _why(path: Path, error: sqlite3.DatabaseError) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return (
            f"it is damaged or no SQLite database ({error}): move {path.name}, {path.name}-wal and "
            f"{path.name}-shm away together, then put a backup in their place, or start without: "
            "the sandboxes and snapshots that are there are then not known"
        )
    if code == sqlite3.SQLITE_FULL:
        return "its disk is full: make room"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another program holds it locked ({error}): end that program"
    return f"{error}: check its owner, its mode and its disk"


def _unusable(path: Path, why: str) -> RegistryUnusable:
    return RegistryUnusable(f"the registry {path} can't be used: {why}")
