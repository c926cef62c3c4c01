"""Operations on the requests table: what makes a repeated call have no second effect.

A request is remembered in the transaction that inserts what it made, so there is neither a thing
without its request nor a request without its thing.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from forkpointd.model import RememberedRequest, RequestKey, now
from forkpointd.registry.codec import instant_text
from forkpointd.registry.errors import RequestSeen
from forkpointd.registry.rows import REQUESTS, chunks, marks
from forkpointd.registry.tables import Connection


class ResourceKind(StrEnum):
    """What a request made."""

    SANDBOX = "SANDBOX"
    BRANCH = "BRANCH"
    FORK = "FORK"
    SNAPSHOT = "SNAPSHOT"


def find(connection: Connection, request_id: str) -> RememberedRequest | None:
    """What a request made."""
    return REQUESTS.get(connection, request_id)


def remember(
    connection: Connection, key: RequestKey | None, kind: ResourceKind, resource_id: str
) -> None:
    """Remembers a request, before what it makes is inserted (an id that the request itself took is
    no conflict). Raises `RequestSeen` for a repeat, REQUEST_ID_REUSED for anything else."""
    if key is None:
        return
    remembered = find(connection, key.request_id)
    if remembered is not None:
        key.check(remembered)
        raise RequestSeen(remembered)
    request = RememberedRequest(key.request_id, key.method, key.fingerprint, resource_id)
    REQUESTS.insert(
        connection, [request], resource_kind=kind.value, create_time=instant_text(now())
    )


def forget(connection: Connection, kind: ResourceKind, resource_ids: list[str]) -> None:
    """Forgets the requests that made these: the calls had no effect after all."""
    for ids in chunks(resource_ids):
        connection.execute(
            f"DELETE FROM requests WHERE resource_kind = ? AND resource_id IN ({marks(len(ids))})",
            (kind.value, *ids),
        )


def expire(connection: Connection, before: datetime) -> int:
    """Forgets what was remembered before an instant; returns how many."""
    return connection.execute(
        "DELETE FROM requests WHERE create_time < ?", (instant_text(before),)
    ).rowcount
