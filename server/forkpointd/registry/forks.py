"""Operations on the forks and fork_children tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forkpointd.model import Fork, ForkChild, Reason, RequestKey, Sandbox
from forkpointd.registry import requests, sandboxes
from forkpointd.registry.requests import ResourceKind
from forkpointd.registry.rows import (
    CHILDREN,
    FORK_UNFINISHED,
    FORKS,
    SANDBOXES,
    exists,
    id_taken,
    not_there,
)
from forkpointd.registry.sequences import check_growth, sequence_limit
from forkpointd.registry.tables import Connection

_CHILD_COLUMNS = CHILDREN.columns


def insert(
    connection: Connection,
    fork: Fork,
    children_rows: Sequence[Sandbox],
    request: RequestKey | None,
) -> None:
    """A new fork, and those of its children that have a row already. Raises ID_TAKEN."""
    requests.remember(connection, request, ResourceKind.FORK, fork.fork_id)
    if exists(connection, "forks", "fork_id = ?", fork.fork_id):
        raise id_taken("fork", fork.fork_id)
    for child in fork.children:
        sandboxes.check_id(connection, child.sandbox_id, fork.fork_id)
    FORKS.insert(connection, [fork], sequence_limit=sequence_limit(fork.sequence))
    _write_children(connection, fork, range(len(fork.children)))
    SANDBOXES.insert(connection, children_rows)


def put(connection: Connection, fork: Fork, sandbox_rows: Sequence[Sandbox] = ()) -> None:
    """Replaces a fork, its children's outcomes and rows of sandboxes (those that were not removed
    meanwhile). Raises FORK_NOT_FOUND."""
    check_growth(connection, "forks", "fork_id", fork.fork_id, fork.sequence)
    if not FORKS.update(connection, fork, sequence_limit=sequence_limit(fork.sequence)):
        raise not_there("fork", Reason.FORK_NOT_FOUND, fork.fork_id)
    stored = _stored_children(connection, fork.fork_id)
    if len(stored) != len(fork.children):
        raise AssertionError(f"fork {fork.fork_id} was admitted with {len(stored)} children")
    changed = [index for index, child in enumerate(fork.children) if child != stored[index]]
    _write_children(connection, fork, changed)
    sandboxes.put_those_left(connection, sandbox_rows)


def get(connection: Connection, fork_id: str) -> Fork | None:
    """One fork."""
    forks = _select(connection, "fork_id = ?", fork_id)
    return forks[0] if forks else None


def unfinished(connection: Connection) -> list[Fork]:
    """Forks that have not ended, in order of creation."""
    return _select(connection, FORK_UNFINISHED)


def _select(connection: Connection, condition: str, *values: object) -> list[Fork]:
    rows = connection.execute(
        f"{FORKS.select} WHERE {condition} ORDER BY create_time, fork_id", values
    ).fetchall()
    place = FORKS.columns.index(FORKS.key)
    return [
        FORKS.decode(row, children=tuple(_stored_children(connection, row[place]))) for row in rows
    ]


def _stored_children(connection: Connection, fork_id: str) -> list[ForkChild]:
    rows = connection.execute(
        f"{CHILDREN.select} WHERE fork_id = ? ORDER BY child_index", (fork_id,)
    )
    return [CHILDREN.decode(row) for row in rows]


def _write_children(connection: Connection, fork: Fork, indexes: Sequence[int]) -> None:
    names = ", ".join(_CHILD_COLUMNS)
    places = ", ".join(f":{column}" for column in _CHILD_COLUMNS)

    def row(index: int) -> dict[str, Any]:
        values = CHILDREN.encode(fork.children[index])
        return values | {"fork_id": fork.fork_id, "child_index": index}

    connection.executemany(
        f"INSERT OR REPLACE INTO fork_children (fork_id, child_index, {names})"
        f" VALUES (:fork_id, :child_index, {places})",
        [row(index) for index in indexes],
    )
