"""Operations on the sandboxes table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forkpointd.model import Page, Reason, RequestKey, Sandbox, SandboxState
from forkpointd.registry import requests
from forkpointd.registry.requests import ResourceKind
from forkpointd.registry.rows import (
    SANDBOXES,
    Filter,
    Position,
    chunks,
    exists,
    id_taken,
    list_page,
    marks,
    not_there,
)
from forkpointd.registry.tables import Connection


def insert(
    connection: Connection, sandboxes: Sequence[Sandbox], request: RequestKey | None
) -> None:
    """New sandboxes. Raises ID_TAKEN for an id that exists or is promised to another fork."""
    if request is not None:
        if len(sandboxes) != 1:
            raise ValueError("a request makes one sandbox")
        requests.remember(connection, request, ResourceKind.SANDBOX, sandboxes[0].sandbox_id)
    for sandbox in sandboxes:
        check_id(connection, sandbox.sandbox_id, sandbox.fork_id)
        SANDBOXES.insert(connection, [sandbox])


def check_id(connection: Connection, sandbox_id: str, fork_id: str | None) -> None:
    """Raises ID_TAKEN unless a sandbox (a child of `fork_id`, if any) may be called so."""
    if exists(connection, "sandboxes", "sandbox_id = ?", sandbox_id):
        raise id_taken("sandbox", sandbox_id)
    promised = connection.execute(
        "SELECT fork_id FROM fork_children JOIN forks USING (fork_id)"
        " WHERE fork_children.sandbox_id = ? AND fork_children.state = 'PENDING'"
        " AND forks.stage NOT IN ('READY', 'FAILED') AND fork_id IS NOT ?",
        (sandbox_id, fork_id),
    ).fetchone()
    if promised is not None:
        raise id_taken("sandbox", sandbox_id, f"is being started by fork {promised[0]}")


def put(connection: Connection, sandboxes: Sequence[Sandbox]) -> None:
    """Replaces rows. Raises SANDBOX_NOT_FOUND for one that was removed; then none is changed."""
    for sandbox in sandboxes:
        if not SANDBOXES.update(connection, sandbox):
            raise not_there("sandbox", Reason.SANDBOX_NOT_FOUND, sandbox.sandbox_id)


def put_those_left(connection: Connection, sandboxes: Sequence[Sandbox]) -> None:
    """Replaces rows; leaves out those that were removed meanwhile."""
    for sandbox in sandboxes:
        SANDBOXES.update(connection, sandbox)


def get(connection: Connection, sandbox_id: str) -> Sandbox | None:
    """One sandbox."""
    return SANDBOXES.get(connection, sandbox_id)


def everything(connection: Connection) -> list[Sandbox]:
    """All sandboxes, in order of creation."""
    return SANDBOXES.all(connection)


def list_some(
    connection: Connection,
    page_size: int,
    after: Position | None,
    labels: Mapping[str, str],
    states: frozenset[SandboxState],
) -> Page[Sandbox]:
    """A page of those that have all labels and one of the states."""
    filter_ = Filter()
    filter_.one_of("state", states)
    filter_.labels("sandboxes", labels)
    return list_page(connection, SANDBOXES, page_size, after, filter_)


def remove(connection: Connection, sandbox_ids: Sequence[str], forget_requests: bool) -> int:
    """Removes rows; returns how many there were."""
    removed = 0
    for ids in chunks(sandbox_ids):
        removed += connection.execute(
            f"DELETE FROM sandboxes WHERE sandbox_id IN ({marks(len(ids))})", ids
        ).rowcount
    if forget_requests:
        requests.forget(connection, ResourceKind.SANDBOX, list(sandbox_ids))
    return removed
