"""A branch as it stands: every stage is durable before anyone sees it, progress is only shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from forkpointd.branching.imaging import PROGRESS_SECONDS
from forkpointd.branching.workshop import Workshop
from forkpointd.model import (
    Branch,
    BranchStage,
    BranchView,
    CopyMethod,
    Fork,
    MergeProgress,
    PauseWindow,
    PrecopyProgress,
    Problem,
    Snapshot,
    now,
)
from forkpointd.sandboxes.feed import Feed
from forkpointd.sandboxes.live import RowDraft

log = logging.getLogger(__name__)


class BranchRecord:
    """The row of one branch, its feed, and what is shown beside it."""

    def __init__(self, shop: Workshop, view: BranchView) -> None:
        self.branch = view.branch
        self.snapshot = view.snapshot
        self.fork: Fork | None = view.fork
        self.feed: Feed[BranchView] = Feed(view)
        self._shop = shop

    @property
    def stage(self) -> BranchStage:
        """Where the branch stands."""
        return self.branch.stage

    # --- durable ---

    async def enter(self, *stages: BranchStage, source: RowDraft | None = None) -> None:
        """Enters a stage (or PAUSED and RESUMED together), and changes the source's row in the same
        commit: durable first, then published. An end that can't be made durable is published all
        the same; a restart then finds the branch unfinished and ends it again."""
        branch = self._entering(*stages)
        row = None if source is None else source.row
        try:
            await self._shop.registry.put_branch(branch, sandbox=row)
        except Exception:
            if not branch.stage.ended:
                raise
            log.exception("the end of branch %s is not durable", branch.branch_id)
        self._show(branch)

    async def become_ready(self, snapshot: Snapshot, stage: BranchStage, source: RowDraft) -> None:
        """READY or FORKING: the snapshot's row, the source's and the stage in one commit."""
        branch = self._entering(stage)
        await self._shop.registry.put_branch(branch, sandbox=source.row, snapshot=snapshot)
        self.snapshot = snapshot
        self._show(branch)

    async def save(self) -> None:
        """Makes what was noted durable, without showing it."""
        await self._shop.registry.put_branch(self.branch)

    def _entering(self, *stages: BranchStage) -> Branch:
        branch = self.branch
        for stage in stages:
            window = branch.pause_window
            at = window.start_time if stage is BranchStage.PAUSED and window else now()
            branch = branch.entering(stage, at)
        return replace(branch, sequence=branch.sequence + 1)

    def _show(self, branch: Branch) -> None:
        self.branch = branch
        self._publish(milestone=True)

    # --- noted, and shown with the next message ---

    def note_precopy(
        self, done_bytes: int, total_bytes: int, hole_bytes: int, method: CopyMethod | None
    ) -> None:
        """How far the pre-copy is."""
        progress = PrecopyProgress(
            done_bytes, max(total_bytes, done_bytes), max(0, hole_bytes), method
        )
        self.branch = replace(self.branch, precopy=progress)

    def note_merge(self, done_bytes: int, total_bytes: int) -> None:
        """How far the merge is."""
        self.branch = replace(self.branch, merge=MergeProgress(done_bytes, total_bytes))

    def note_window(self, window: PauseWindow) -> None:
        """The window's figures."""
        self.branch = replace(self.branch, pause_window=window)

    def note_error(self, problem: Problem) -> None:
        """Why the branch is about to fail."""
        self.branch = replace(self.branch, error=problem)

    def show_progress(self) -> None:
        """Publishes what was noted; coalesced for a slow reader."""
        self.branch = replace(self.branch, sequence=self.branch.sequence + 1)
        self._publish(milestone=False)

    @asynccontextmanager
    async def reporting(self, note: Callable[[], None]) -> AsyncIterator[None]:
        """Calls `note` and shows progress now and then while the block runs."""

        async def report() -> None:
            while True:
                await asyncio.sleep(PROGRESS_SECONDS)
                note()
                self.show_progress()

        reporter = self._shop.tasks.start(report(), "progress")
        try:
            yield
        finally:
            reporter.cancel()
            with suppress(asyncio.CancelledError):
                await reporter
            note()

    def _publish(self, *, milestone: bool) -> None:
        self.feed.publish(
            BranchView(self.branch, self.snapshot, self.fork),
            milestone=milestone,
            ended=self.branch.stage.ended,
        )
