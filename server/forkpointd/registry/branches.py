"""Operations on the branches table."""

from __future__ import annotations

from forkpointd.model import (
    Branch,
    BranchStage,
    BranchView,
    Fork,
    Page,
    Reason,
    RequestKey,
    Sandbox,
    Snapshot,
)
from forkpointd.registry import forks, requests, sandboxes, snapshots
from forkpointd.registry.requests import ResourceKind
from forkpointd.registry.rows import (
    BRANCH_UNFINISHED,
    BRANCHES,
    Filter,
    Position,
    exists,
    id_taken,
    list_page,
    not_there,
)
from forkpointd.registry.sequences import check_growth, sequence_limit
from forkpointd.registry.tables import Connection


def insert(
    connection: Connection, branch: Branch, fork: Fork | None, request: RequestKey | None
) -> None:
    """A new branch, with the fork of its children. Raises ID_TAKEN for the id of the branch, its
    snapshot, its fork or a child."""
    requests.remember(connection, request, ResourceKind.BRANCH, branch.branch_id)
    if exists(connection, "branches", "branch_id = ?", branch.branch_id):
        raise id_taken("branch", branch.branch_id)
    snapshots.check_id(connection, branch.snapshot_id, branch.branch_id)
    if fork is not None:
        forks.insert(connection, fork, (), None)
    BRANCHES.insert(connection, [branch], sequence_limit=sequence_limit(branch.sequence))


def put(
    connection: Connection,
    branch: Branch,
    sandbox: Sandbox | None,
    snapshot: Snapshot | None,
    fork: Fork | None,
) -> None:
    """Replaces a branch, and with it its source (unless that was removed meanwhile) and its fork;
    inserts its snapshot. Raises BRANCH_NOT_FOUND, FORK_NOT_FOUND, ID_TAKEN."""
    check_growth(connection, "branches", "branch_id", branch.branch_id, branch.sequence)
    if not BRANCHES.update(connection, branch, sequence_limit=sequence_limit(branch.sequence)):
        raise not_there("branch", Reason.BRANCH_NOT_FOUND, branch.branch_id)
    if sandbox is not None:
        sandboxes.put_those_left(connection, [sandbox])
    if snapshot is not None:
        snapshots.insert(connection, snapshot, branch.branch_id)
    if fork is not None:
        forks.put(connection, fork)


def get(connection: Connection, branch_id: str) -> Branch | None:
    """One branch."""
    return BRANCHES.get(connection, branch_id)


def view(connection: Connection, branch: Branch) -> BranchView:
    """A branch with its snapshot (also once that was deleted) and its fork, of one moment.

    A snapshot of the same id that another branch made is not this branch's."""
    snapshot = snapshots.get(connection, branch.snapshot_id, include_deleted=True)
    if snapshot is not None and snapshot.branch_id != branch.branch_id:
        snapshot = None
    fork = None if branch.fork_id is None else forks.get(connection, branch.fork_id)
    return BranchView(branch, snapshot, fork)


def get_view(connection: Connection, branch_id: str) -> BranchView | None:
    """One branch with what belongs to it."""
    branch = get(connection, branch_id)
    return None if branch is None else view(connection, branch)


def list_views(
    connection: Connection,
    page_size: int,
    after: Position | None,
    sandbox_id: str | None,
    stages: frozenset[BranchStage],
) -> Page[BranchView]:
    """As `list_some`, each with what belongs to it."""
    page = list_some(connection, page_size, after, sandbox_id, stages)
    return Page(tuple(view(connection, branch) for branch in page.items), page.next_position)


def list_some(
    connection: Connection,
    page_size: int,
    after: Position | None,
    sandbox_id: str | None,
    stages: frozenset[BranchStage],
) -> Page[Branch]:
    """A page of those of this source in one of the stages."""
    filter_ = Filter()
    filter_.equals("sandbox_id", sandbox_id)
    filter_.one_of("stage", stages)
    return list_page(connection, BRANCHES, page_size, after, filter_)


def unfinished(connection: Connection) -> list[Branch]:
    """Branches that have not ended, in order of admission."""
    return BRANCHES.all(connection, BRANCH_UNFINISHED)
