"""What the operations on all tables share: the tables, pages, taken ids.

An operation is a plain function of a connection on which a transaction is open. One that refuses
something raises `ForkpointError` (or `RequestSeen`); its changes are then rolled back. To *insert*
makes rows; to *put* replaces whole rows and never makes one, so that a late change can't bring back
what was deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from forkpointd.model import (
    Branch,
    Fork,
    ForkChild,
    ForkpointError,
    Page,
    Reason,
    RememberedRequest,
    Sandbox,
    Snapshot,
)
from forkpointd.registry.codec import instant_text
from forkpointd.registry.tables import Connection, Table

T = TypeVar("T")

SANDBOXES = Table("sandboxes", Sandbox, "sandbox_id")
SNAPSHOTS = Table("snapshots", Snapshot, "snapshot_id", elsewhere=frozenset({"room"}))
BRANCHES = Table("branches", Branch, "branch_id")
FORKS = Table("forks", Fork, "fork_id", elsewhere=frozenset({"children", "flatten"}))
CHILDREN = Table("fork_children", ForkChild, "sandbox_id")
REQUESTS = Table("requests", RememberedRequest, "request_id")

# Word for word as in the schema's partial indexes, so that these are used.
BRANCH_UNFINISHED = "stage NOT IN ('READY', 'FAILED', 'CANCELLED')"
FORK_UNFINISHED = "stage NOT IN ('READY', 'FAILED')"

IDS_PER_STATEMENT = 500
"""Below the 999 variables that the oldest SQLite takes in one statement."""

Position = tuple[datetime, str]
"""Where a page starts: after this creation time and id."""


class Filter:
    """Conditions of a list, all of which have to hold."""

    def __init__(self) -> None:
        self.conditions: list[str] = []
        self.values: list[object] = []

    def equals(self, column: str, value: object | None) -> None:
        """The column has this value; None: any."""
        if value is not None:
            self.conditions.append(f"{column} = ?")
            self.values.append(value)

    def one_of(self, column: str, members: Iterable[StrEnum]) -> None:
        """The column is one of these; none: any."""
        values = sorted(member.value for member in members)
        if values:
            self.conditions.append(f"{column} IN ({marks(len(values))})")
            self.values += values

    def labels(self, table: str, labels: Mapping[str, str]) -> None:
        """The object has all of these labels."""
        for key, value in sorted(labels.items()):
            self.conditions.append(
                f"EXISTS (SELECT 1 FROM json_each({table}.labels) AS label"
                " WHERE label.key = ? AND label.value = ?)"
            )
            self.values += [key, value]


def list_page(
    connection: Connection,
    table: Table[T],
    page_size: int,
    after: Position | None,
    filter_: Filter,
) -> Page[T]:
    """A page in order of creation, then of id; of `page_size` items at most."""
    if page_size < 1:
        raise ValueError(f"a page of {page_size} items")
    conditions, values = list(filter_.conditions), list(filter_.values)
    if after is not None:
        conditions.append(f"(create_time, {table.key}) > (?, ?)")
        values += [instant_text(after[0]), after[1]]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = connection.execute(
        f"{table.select}{where} ORDER BY create_time, {table.key} LIMIT ?", (*values, page_size + 1)
    ).fetchall()
    items = tuple(table.decode(row) for row in rows[:page_size])
    if len(rows) <= page_size:
        return Page(items, None)
    last: Any = items[-1]
    return Page(items, (last.create_time, getattr(last, table.key)))


def exists(connection: Connection, table: str, condition: str, *values: object) -> bool:
    """Whether a row fulfils the condition."""
    found = connection.execute(f"SELECT 1 FROM {table} WHERE {condition} LIMIT 1", values)
    return found.fetchone() is not None


def marks(count: int) -> str:
    """`?` for each of so many values."""
    return ", ".join("?" * count)


def chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    """The ids in parts that fit into a statement."""
    everything = list(ids)
    for start in range(0, len(everything), IDS_PER_STATEMENT):
        yield everything[start : start + IDS_PER_STATEMENT]


def id_taken(kind: str, taken_id: str, because: str = "exists") -> ForkpointError:
    """The refusal of an id. `kind` is a word of the contract: sandbox, snapshot, branch, fork."""
    return ForkpointError(
        Reason.ID_TAKEN,
        f"a {kind} {taken_id} {because}: choose another {kind}_id, or leave the choice to the "
        "server",
        metadata={f"{kind}_id": taken_id},
    )


def not_there(kind: str, reason: Reason, missing_id: str) -> ForkpointError:
    """The refusal of a change to what has been deleted."""
    return ForkpointError(
        reason, f"there is no {kind} {missing_id}", metadata={f"{kind}_id": missing_id}
    )
