"""All branches of this server: admitted, followed, listed, cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any

from forkpointd.branching.admission import Holding, expected_diff_bytes
from forkpointd.branching.life import BranchLife
from forkpointd.branching.line import SourceLine
from forkpointd.branching.record import BranchRecord
from forkpointd.branching.recovery import Recovered, examine
from forkpointd.branching.unmerged import merge_kept_diffs
from forkpointd.branching.workshop import Workshop
from forkpointd.images import StagingArea
from forkpointd.model import (
    Branch,
    BranchMode,
    BranchOrder,
    BranchStage,
    BranchView,
    DirtyBaseState,
    Durability,
    ForkpointError,
    Layout,
    Page,
    Reason,
    Snapshot,
    StageEntry,
    StagingKind,
    now,
)
from forkpointd.sandboxes.feed import Feed
from forkpointd.sandboxes.forks import new_fork
from forkpointd.sandboxes.live import LiveSandbox
from forkpointd.sandboxes.repeats import Repeats
from forkpointd.sandboxes.service import new_id
from forkpointd.sandboxes.tasks import Tasks
from forkpointd.vmm import resident_bytes

log = logging.getLogger(__name__)

QUEUE_RETRY_SECONDS = 2.0
KEPT_DIFF_SECONDS = 5.0
"""How often it is looked whether a kept diff can be merged."""


class Branches:
    """The branches of this server."""

    def __init__(self, shop: Workshop, *, max_queued_branches: int) -> None:
        self._shop = shop
        self._max_queued_branches = max_queued_branches
        self._lives: dict[str, BranchLife] = {}
        self._feeds: dict[str, Feed[BranchView]] = {}
        self._lines: dict[str, SourceLine] = {}
        self._admitting: Counter[str] = Counter()
        """Branches that are being admitted, by their source: calls that come at once are many."""
        self._admissions: Repeats[Branch] = Repeats(shop.registry, shop.tasks)
        shop.sandboxes.before_delete.append(self._source_is_deleted)

    # --- looking ---

    async def get(self, branch_id: str) -> BranchView:
        """The branch as of now."""
        feed = self._feeds.get(branch_id)
        if feed is not None:
            return feed.latest
        view = await self._shop.registry.get_branch_view(branch_id)
        if view is None:
            raise ForkpointError(
                Reason.BRANCH_NOT_FOUND,
                f"there is no branch {branch_id}; `forkpoint branch list` shows those there are",
                metadata={"branch_id": branch_id},
            )
        return view

    async def list(
        self,
        *,
        page_size: int,
        after: tuple[datetime, str] | None,
        sandbox_id: str | None,
        stages: frozenset[BranchStage],
    ) -> Page[BranchView]:
        """A page, in order of admission."""
        page = await self._shop.registry.list_branch_views(
            page_size=page_size, after=after, sandbox_id=sandbox_id, stages=stages
        )
        views = (
            self._feeds[view.branch.branch_id].latest
            if view.branch.branch_id in self._feeds
            else view
            for view in page.items
        )
        return Page(tuple(views), page.next_position)

    async def watch(self, branch_id: str, after_sequence: int) -> AsyncIterator[BranchView]:
        """The branch as of now (unless its sequence is `after_sequence`), then each change."""
        feed = self._feeds.get(branch_id) or Feed(await self.get(branch_id), ended=True)
        skip = feed.latest.branch.sequence == after_sequence
        async for view in feed.watch(skip_first=skip):
            yield view

    # --- starting ---

    async def start(self, order: BranchOrder) -> Branch:
        """Admits a branch, or finds the one that this request_id made."""

        async def find(branch_id: str) -> Branch:
            return (await self.get(branch_id)).branch

        return await self._admissions.run(
            order.request, lambda: self._admit(order), find, f"admit {order.sandbox_id}"
        )

    async def _admit(self, order: BranchOrder) -> Branch:
        live = self._shop.sandboxes.find(order.sandbox_id)
        live.require_callable()
        waiting = self._waiting_on(order.sandbox_id)
        if waiting > self._max_queued_branches:
            raise ForkpointError(
                Reason.BRANCH_QUEUE_FULL,
                f"{waiting} branches of sandbox {order.sandbox_id} are at work or wait, more than "
                f"the server's limit of {self._max_queued_branches} that wait: retry when one has "
                "ended",
                metadata={"sandbox_id": order.sandbox_id, "waiting": str(waiting)},
                retry_after_seconds=QUEUE_RETRY_SECONDS,
            )
        self._admitting[order.sandbox_id] += 1
        try:
            return await self._admit_to_queue(order, live, waiting)
        finally:
            self._admitting[order.sandbox_id] -= 1
            if not self._admitting[order.sandbox_id]:
                del self._admitting[order.sandbox_id]

    async def _admit_to_queue(self, order: BranchOrder, live: LiveSandbox, waiting: int) -> Branch:
        mode = self._expected_mode(live, order.mode, waiting)
        row = live.row
        fork = memory = None
        with ExitStack() as held:
            holding = await self._shop.reserve(row, mode, order)
            held.callback(holding.release)
            if not waiting:
                expected = await self._shop.run(
                    lambda: expected_diff_bytes(row, live.last_diff, resident_bytes)
                )
                self._shop.admission.decide(
                    live.row, order.mode, order.max_pause_us, holding.staging, expected
                )
            if order.durability is Durability.MEMORY and row.machine.writable_drives:
                raise _drives_stay_on_disk(order.sandbox_id)
            self._shop.sandboxes.starter.check_cloning(
                row.machine, allow_copy=order.allow_drive_copy
            )
            branch = self._new_branch(order)
            if order.fork is not None:
                fork = new_fork(order.fork, branch.snapshot_id, branch_id=branch.branch_id)
                branch = replace(branch, fork_id=fork.fork_id)
                memory = held.enter_context(await self._shop.forks.memory_for(fork, row.machine))
            await self._shop.registry.insert_branch(branch, fork, order.request)
            held.pop_all()
        if fork is not None:
            self._shop.forks.show(fork, memory)
        record = BranchRecord(self._shop, BranchView(branch, None, fork))
        life = BranchLife(self._shop, record, live, holding, self._line_of(order.sandbox_id))
        life.allow_drive_copy = order.allow_drive_copy
        life.begin()
        self._follow(life, life.run())
        return branch

    def _follow(self, life: BranchLife, work: Coroutine[Any, Any, None]) -> None:
        branch_id = life.branch.branch_id
        self._feeds[branch_id] = life.record.feed
        self._lives[branch_id] = life
        task = self._shop.tasks.start_unwatched(work, f"branch {branch_id}")
        task.add_done_callback(lambda _: self._forget(branch_id))

    def _forget(self, branch_id: str) -> None:
        life = self._lives.pop(branch_id)
        self._feeds.pop(branch_id, None)
        source = life.branch.sandbox_id
        line = self._lines.get(source)
        # It may be held by what is no branch at work: a late window, or the merge of a kept diff.
        if line is None or not line.is_idle:
            return
        if not any(other.branch.sandbox_id == source for other in self._lives.values()):
            del self._lines[source]

    def _line_of(self, sandbox_id: str) -> SourceLine:
        return self._lines.setdefault(sandbox_id, SourceLine())

    def _waiting_on(self, sandbox_id: str) -> int:
        """Branches at work on this source, or waiting for it, or just being admitted to it."""
        return self._admitting[sandbox_id] + sum(
            life.branch.sandbox_id == sandbox_id and not life.past_queue.is_set()
            for life in self._lives.values()
        )

    def _expected_mode(self, live: LiveSandbox, requested: BranchMode, waiting: int) -> BranchMode:
        """What the mode will be, for the room to reserve; decided at the branch's turn."""
        if requested is not BranchMode.AUTO:
            return requested
        valid = waiting or live.row.dirty_base.state is DirtyBaseState.VALID
        return BranchMode.DIFF if valid else BranchMode.FULL

    def _new_branch(self, order: BranchOrder) -> Branch:
        at = now()
        return Branch(
            branch_id=order.branch_id or new_id("br"),
            sandbox_id=order.sandbox_id,
            snapshot_id=order.snapshot_id or new_id("snap"),
            sequence=1,
            stage=BranchStage.QUEUED,
            stages=(StageEntry(BranchStage.QUEUED, at),),
            requested_mode=order.mode,
            requested_layout=order.layout,
            layout=Layout.FLAT,
            durability=order.durability,
            create_time=at,
            snapshot_labels=dict(order.labels),
            max_pause_us=order.max_pause_us,
        )

    # --- after a restart ---

    async def recover(self, areas: dict[StagingKind, StagingArea]) -> Recovered:
        """Fails, durably, what can't be finished, and goes on with what can."""
        recovered = await examine(self._shop, areas)
        for work in recovered.to_merge:
            life = await self._restarted(work.branch, None)
            if work.branch.layout is Layout.LAYERED:
                life.stand_in_line()
            self._follow(life, life.run_from_merge(work.staged, work.draft))
        for branch in recovered.to_fork:
            snapshot = await self._shop.registry.get_snapshot(
                branch.snapshot_id, include_deleted=True
            )
            life = await self._restarted(branch, snapshot)
            fork = life.record.feed.latest.fork
            assert snapshot is not None and fork is not None, "they are committed with FORKING"
            self._follow(life, life.run_from_forking(snapshot, fork))
        return recovered

    async def _restarted(self, branch: Branch, snapshot: Snapshot | None) -> BranchLife:
        fork = None
        if branch.fork_id is not None:
            fork = await self._shop.registry.get_fork(branch.fork_id)
            if fork is not None and not fork.stage.ended:
                self._shop.forks.show(fork)
        live = self._shop.sandboxes.live.get(branch.sandbox_id)
        return BranchLife(
            self._shop,
            BranchRecord(self._shop, BranchView(branch, snapshot, fork)),
            live,
            Holding(branch.mode or BranchMode.DIFF, branch.staging or StagingKind.DISK, None, None),
            self._line_of(branch.sandbox_id),
        )

    # --- ending ---

    async def cancel(self, branch_id: str) -> BranchView:
        """Stops a branch before its window; returns it ended."""
        life = self._lives.get(branch_id)
        if life is None or not life.cancellable:
            view = await self.get(branch_id)
            if view.branch.stage is BranchStage.CANCELLED:
                return view
            raise ForkpointError(
                Reason.BRANCH_NOT_CANCELLABLE,
                _not_cancellable(view.branch),
                metadata={"branch_id": branch_id, "stage": str(view.branch.stage)},
            )
        life.stop(
            ForkpointError(
                Reason.BRANCH_CANCELLED,
                f"branch {branch_id} was cancelled before its pause window",
                metadata={"branch_id": branch_id},
            )
        )
        async for view in life.record.feed.watch(skip_first=True):
            if view.branch.stage.ended:
                return view
        return life.record.feed.latest

    async def _source_is_deleted(self, sandbox_id: str) -> None:
        """Ends the branches of a source that is being deleted, as far as they can be."""
        for life in list(self._lives.values()):
            if life.branch.sandbox_id == sandbox_id and life.cancellable:
                life.stop(
                    ForkpointError(
                        Reason.SANDBOX_DELETED,
                        f"sandbox {sandbox_id} was deleted before the branch's pause window",
                        metadata={"sandbox_id": sandbox_id},
                    )
                )
                await life.past_queue.wait()
            elif life.branch.sandbox_id == sandbox_id and life.branch.layout is Layout.LAYERED:
                await life.past_queue.wait()  # what it puts together goes with the source

    async def branch_and_wait(self, sandbox_id: str) -> bool:
        """Branches a sandbox (mode AUTO) and waits; whether the snapshot is READY."""
        branch = await self.start(BranchOrder(sandbox_id))
        stage = branch.stage
        async for view in self.watch(branch.branch_id, 0):
            stage = view.branch.stage
        return stage is BranchStage.READY

    async def merge_kept_diffs(self) -> None:
        """Merges, for good and as room returns, diffs that could not be merged when taken."""
        while True:
            await asyncio.sleep(KEPT_DIFF_SECONDS)
            for live in list(self._shop.sandboxes.live.values()):
                line = self._lines.get(live.sandbox_id)
                if not live.row.dirty_base.unmerged or (line is not None and not line.is_idle):
                    continue
                async with self._line_of(live.sandbox_id).turn:
                    try:
                        await merge_kept_diffs(self._shop, live)
                    except (ForkpointError, OSError) as error:
                        log.info("kept diffs of %s stay: %s", live.sandbox_id, error)

    @property
    def tasks(self) -> Tasks:
        """The branches' work."""
        return self._shop.tasks

    async def close(self) -> None:
        """Stops all work. What was past its window is finished by the next start."""
        await self._shop.tasks.cancel()


def _not_cancellable(branch: Branch) -> str:
    """Why it is too late, and what to do."""
    if branch.stage is BranchStage.FAILED:
        return f"branch {branch.branch_id} has FAILED already: there is nothing left to cancel"
    where = "opens its pause window" if branch.pause_window is None else f"is {branch.stage}"
    return (
        f"branch {branch.branch_id} {where} and can't be cancelled any more: delete its snapshot "
        f"{branch.snapshot_id} instead"
    )


def _drives_stay_on_disk(sandbox_id: str) -> ForkpointError:
    return ForkpointError(
        Reason.WRITABLE_DRIVE,
        f"sandbox {sandbox_id} has writable drives, whose clones lie on the disk with the drives: "
        "branch it with durability DISK",
        metadata={"sandbox_id": sandbox_id},
    )
