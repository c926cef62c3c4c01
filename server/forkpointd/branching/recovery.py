"""What a restarted server does with the branches it finds unfinished.

    QUEUED, PRECOPYING, base not PENDING   nothing happened to the source: FAILED
    base PENDING, no RESUMED               the window may have cleared the dirty log: the base is
                                           INVALID and the branch FAILED
    RESUMED, MERGING, FINALIZING           the diff and its extents are there: finished (on the
                                           same boot; else FAILED, for pre-copies are not synced);
                                           layers of one source in the order of their windows
    FORKING                                the snapshot is READY: the children are finished

Staging files and drafts that no unfinished branch and no kept diff needs are removed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from forkpointd.branching.imaging import Staged
from forkpointd.branching.source import forget_invalid
from forkpointd.branching.workshop import Workshop
from forkpointd.images import Draft, StagingArea
from forkpointd.model import (
    Branch,
    BranchStage,
    DirtyBaseState,
    Layout,
    Problem,
    Reason,
    Sandbox,
    StagingKind,
    now,
)
from forkpointd.sandboxes.live import LiveSandbox
from forkpointd.sandboxes.snapshots import snapshot_lost
from forkpointd.vmm import boot_id

log = logging.getLogger(__name__)

_PAST_WINDOW = (
    BranchStage.PAUSED,
    BranchStage.RESUMED,
    BranchStage.MERGING,
    BranchStage.FINALIZING,
)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A branch that can be finished, and what it goes on with."""

    branch: Branch
    staged: Staged
    draft: Draft


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of the branches that were found."""

    to_merge: tuple[Unfinished, ...]
    to_fork: tuple[Branch, ...]
    failed: int
    removed_files: int


async def examine(shop: Workshop, areas: dict[StagingKind, StagingArea]) -> Recovered:
    """Fails what can't be finished, durably; removes what nobody needs; returns the rest."""
    to_merge: list[Unfinished] = []
    to_fork: list[Branch] = []
    failed = 0
    lost = await shop.registry.lost_snapshots()
    await _lose_bases(shop, lost)
    for branch in await shop.registry.unfinished_branches():
        if branch.stage is BranchStage.FORKING:
            to_fork.append(branch)
            continue
        if (parent_id := _lost_parent(shop, branch, lost)) is not None:
            await _fail(shop, branch, snapshot_lost(parent_id).problem)
            failed += 1
            continue
        unfinished = await _find_work(shop, branch)
        if unfinished is not None:
            to_merge.append(unfinished)
        else:
            await _fail(shop, branch, _restarted(branch))
            failed += 1
    await _settle_bases(shop, to_merge)
    removed = await _remove_leftovers(shop, areas, to_merge)
    to_merge.sort(key=lambda work: _place_of(shop, work.branch))
    return Recovered(tuple(to_merge), tuple(to_fork), failed, removed)


def _place_of(shop: Workshop, branch: Branch) -> int:
    """Where the diff of a branch lies among those of its source: the order of their stores."""
    below = shop.sandboxes.live[branch.sandbox_id].row.dirty_base.below(branch.branch_id)
    return 0 if below is None else len(below.unmerged)


async def _lose_bases(shop: Workshop, lost: Collection[str]) -> None:
    """A base that is LOST is none of a next diff. A copy of it that a branch has made by now stays
    good."""

    def lose(row: Sandbox) -> Sandbox:
        base = row.dirty_base
        why = f"snapshot {base.snapshot_id} is LOST: what was kept in memory is gone"
        return replace(row, dirty_base=base.unusable(why))

    for live in list(shop.sandboxes.live.values()):
        base = live.row.dirty_base
        if base.snapshot_id in lost and base.state is not DirtyBaseState.INVALID:
            await live.edit(lose)


def _lost_parent(shop: Workshop, branch: Branch, lost: Collection[str]) -> str | None:
    """What a layer stands on, if that is LOST."""
    live = shop.sandboxes.live.get(branch.sandbox_id)
    if live is None or branch.layout is not Layout.LAYERED or branch.stage not in _PAST_WINDOW:
        return None
    parent_id = live.row.dirty_base.snapshot_id
    return parent_id if parent_id in lost else None


async def _find_work(shop: Workshop, branch: Branch) -> Unfinished | None:
    """What a branch past its window goes on with; None where some of it is gone."""
    if branch.stage not in _PAST_WINDOW or branch.staging_serial is None or branch.staging is None:
        return None
    staged = shop.windows.staged(branch.staging, branch.staging_serial)
    needed = (staged.memory_path, staged.vmstate_path, staged.extents_path)
    live = shop.sandboxes.live.get(branch.sandbox_id)
    if live is None:
        return None  # deleted: what its snapshot would be made of is known to its row only
    process = live.row.process
    if process is None or process.boot_id != boot_id():
        return None  # another boot: what was pre-copied was not synced, and may be lost in part

    def look() -> Draft | None:
        if not all(path.exists() for path in needed):
            return None
        return shop.store.reopen_draft(branch.branch_id, branch.snapshot_id)

    draft = await shop.run(look)
    return None if draft is None else Unfinished(branch, staged, draft)


def _restarted(branch: Branch) -> Problem:
    return Problem(
        Reason.SERVER_RESTARTED,
        f"the server was restarted while branch {branch.branch_id} was {branch.stage}. The source "
        "was not left paused: branch it again",
        {"branch_id": branch.branch_id},
    )


async def _fail(shop: Workshop, branch: Branch, problem: Problem) -> None:
    """A branch that can't be finished ends, and its source's base with it if it was PENDING."""
    log.warning("branch %s was %s when the server ended: FAILED", branch.branch_id, branch.stage)
    live = shop.sandboxes.live.get(branch.sandbox_id)
    ended = replace(
        branch.entering(BranchStage.FAILED, now()), error=problem, sequence=branch.sequence + 1
    )
    if live is not None and live.row.dirty_base.branch_id == branch.branch_id:
        await _invalidate(shop, live, branch.branch_id)
    if branch.fork_id is not None:
        fork = await shop.registry.get_fork(branch.fork_id)
        if fork is not None and not fork.stage.ended:
            shop.forks.show(fork)
            await shop.forks.fail(fork.fork_id, problem)
    await shop.registry.put_branch(ended)


async def _settle_bases(shop: Workshop, to_merge: list[Unfinished]) -> None:
    """A base that is PENDING a branch that has ended (a late window) is INVALID now, and one that
    is INVALID is kept for as long only as a layer is to be stored over it."""
    finishing = {work.branch.branch_id for work in to_merge}
    stored_over = {work.branch.sandbox_id for work in to_merge}
    for live in list(shop.sandboxes.live.values()):
        base = live.row.dirty_base
        if base.state is DirtyBaseState.PENDING and base.branch_id not in finishing:
            await _invalidate(shop, live, base.branch_id or "")
        if live.sandbox_id not in stored_over:
            await forget_invalid(shop, live)


async def _invalidate(shop: Workshop, live: LiveSandbox, branch_id: str) -> None:
    why = f"the server ended in the pause window of branch {branch_id}"
    await live.edit(lambda row: replace(row, dirty_base=row.dirty_base.unusable(why)))


async def _remove_leftovers(
    shop: Workshop, areas: dict[StagingKind, StagingArea], to_merge: list[Unfinished]
) -> int:
    """Removes staging files and drafts that nobody goes on with; returns how many."""
    wanted: set[Path] = set()
    for work in to_merge:
        wanted |= {work.staged.memory_path, work.staged.vmstate_path, work.staged.extents_path}
    for live in shop.sandboxes.live.values():
        for diff in live.row.dirty_base.unmerged:
            wanted |= {diff.memory_path, diff.extents_path}

    def remove() -> int:
        leftovers = [
            path for area in areas.values() for path in area.leftovers() if path not in wanted
        ]
        for path in leftovers:
            path.unlink()
        drafts = shop.store.remove_drafts(keep=frozenset(w.branch.branch_id for w in to_merge))
        return len(leftovers) + drafts

    return await shop.run(remove)
