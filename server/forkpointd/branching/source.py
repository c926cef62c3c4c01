"""A branch's source: its dirty base, and the window that is opened on it.

A base is never guessed. It is PENDING, durably, from before the window's first byte until it is
settled what the window did (steps 4 and 6):

    the snapshot became READY             VALID, the snapshot
    written, to be a layer                VALID at once, the old base and the diff over it; when the
                                          layer became READY, it takes the place of both
    written, but something failed later   VALID, the old base and the diff that is kept
    the VMM could not write the memory    VALID, the old base: its dirty log is whole again
    anything else                         INVALID

While layers are being stored the base moves under the branches behind them, so what a branch stands
on is read from the row whenever it is needed, and never kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace

from forkpointd.branching.imaging import DiffLost, Staged
from forkpointd.branching.line import SourceLine
from forkpointd.branching.opening import Prepared, drive_failure, window_failure
from forkpointd.branching.record import BranchRecord
from forkpointd.branching.workshop import Workshop
from forkpointd.images import Extents, ImageError, first_of, total_bytes
from forkpointd.model import (
    Branch,
    BranchMode,
    DirtyBase,
    DirtyBaseState,
    ForkpointError,
    Layout,
    PauseWindow,
    Reason,
    Sandbox,
    SandboxState,
    UnmergedDiff,
)
from forkpointd.sandboxes.live import LastDiff, LiveSandbox, RowDraft, remove_diffs
from forkpointd.vmm import DriveClones, WindowOutcome, resident_bytes

log = logging.getLogger(__name__)

REMEMBERED_EXTENTS = 16_384
"""At most so many are kept of a window, and given room before the next: each is a system call."""


class Source:
    """The source of one branch."""

    def __init__(
        self, shop: Workshop, live: LiveSandbox, record: BranchRecord, line: SourceLine
    ) -> None:
        self.live = live
        self.dirty_bytes = 0
        """What its window wrote."""
        self.drive_failure: ForkpointError | None = None
        """Why its drives are no clones of the window; the memory is that of it all the same."""
        self._shop = shop
        self._record = record
        self._line = line

    @property
    def base(self) -> DirtyBase:
        """What its next diff stands on, as of now."""
        return self.live.row.dirty_base

    @property
    def memory_bytes(self) -> int:
        """Size of its memory."""
        return self.live.row.machine.memory_bytes

    def still_there(self) -> bool:
        """Whether it has not been deleted meanwhile."""
        return self._shop.sandboxes.live.get(self.live.sandbox_id) is self.live

    # --- the window ---

    async def open_window(
        self, staged: Staged, clones: DriveClones | None, held: AsyncExitStack
    ) -> PauseWindow:
        """Marks the base PENDING, opens the window, and settles what it did to the base.

        Raises when no snapshot was written; then the base is VALID or INVALID as said above, and
        the staging files are gone. The source runs, or stays paused by its owner.
        """
        async with self.live.turn:
            with ExitStack() as quiet:
                try:
                    prepared = await self._make_pending(staged, clones, quiet)
                except BaseException:
                    await asyncio.shield(self._shop.windows.remove(staged))
                    raise
                running = asyncio.ensure_future(prepared.vmm.run_window(prepared.window))
                predicted_us = self._record.branch.predicted_pause_us or 0
                deadline = max(self._shop.window_deadline_seconds, 10 * predicted_us / 1e6)
                done, _ = await asyncio.wait({running}, timeout=deadline)
                if not done:
                    await self._give_up_waiting(prepared, running, held, deadline)
                outcome = running.result()
            failure = await self._settle_base(prepared, outcome)
            window = await self._shop.windows.describe(prepared, outcome, self.dirty_bytes)
        await self._settle_resume(outcome)
        self.drive_failure = drive_failure(self.live.sandbox_id, outcome)
        if failure is not None:
            await self._shop.windows.remove(staged)
            raise failure
        return window

    async def _make_pending(
        self, staged: Staged, clones: DriveClones | None, quiet: ExitStack
    ) -> Prepared:
        """The last step before the window: all is built, copies begin to hold still (until `quiet`
        is closed), then the base is PENDING, durably."""
        live, branch = self.live, self._record.branch
        assert branch.mode is not None
        vmm = live.require_callable()
        was_paused = live.row.state is SandboxState.PAUSED
        prepared = await self._shop.sandboxes.ask(
            live,
            self._shop.windows.prepare(
                vmm, branch.mode, staged, was_paused=was_paused, clones=clones
            ),
        )
        try:
            quiet.enter_context(self._shop.quiet.window())
            await self._record.save()
            await live.edit(
                lambda row: replace(row, dirty_base=row.dirty_base.pending(branch.branch_id))
            )
        except BaseException:
            prepared.window.close()
            raise
        return prepared

    async def _settle_resume(self, outcome: WindowOutcome) -> None:
        """A resume that Firecracker refused is asked for again: the owner's wish stands."""
        if not outcome.resume_failed or outcome.process_gone:
            return
        log.error("sandbox %s was not resumed: %s", self.live.sandbox_id, outcome.fault)
        await self.live.set_state(SandboxState.UNKNOWN)
        self._shop.tasks.start_unwatched(
            self._shop.sandboxes.reconcile(self.live), f"resume {self.live.sandbox_id}"
        )

    async def _settle_base(
        self, prepared: Prepared, outcome: WindowOutcome
    ) -> ForkpointError | None:
        """What the window did to the base; returns why it failed, if it did. A base that stays
        PENDING is settled by `base_becomes` or `keep_diff`."""
        branch = self._record.branch
        assert branch.mode is not None
        if outcome.created:
            try:
                extents = await self._shop.windows.read_extents(
                    prepared.staged, branch.mode, self.memory_bytes
                )
            except (OSError, ImageError) as error:
                await self._lose(f"the extents of branch {branch.branch_id} could not be stored")
                return write_failed("right after its pause window", error)
            self.dirty_bytes = total_bytes(extents)
            if branch.mode is BranchMode.DIFF:
                await self._remember(extents, prepared.vmm.record.pid)
            return None
        failure = window_failure(self.live.sandbox_id, outcome)
        if outcome.memory_write_failed:
            await self._change_base(
                lambda base: base.back_to_valid() if self._is_pending(base) else base
            )
        else:
            await self._lose(str(failure))
        return failure

    async def _remember(self, extents: Extents, pid: int) -> None:
        """What the next window is expected to find."""
        resident = await self._shop.run(lambda: resident_bytes(pid))
        kept = first_of(extents, self.memory_bytes, REMEMBERED_EXTENTS)
        self.live.last_diff = LastDiff(kept, resident)

    # --- a window that is late ---

    async def _give_up_waiting(
        self,
        prepared: Prepared,
        running: asyncio.Future[WindowOutcome],
        held: AsyncExitStack,
        deadline: float,
    ) -> None:
        """The deadline is over: FAILED and UNKNOWN, but the window is still open. What it needs
        (its connection, files, room and the branches' turn at the source) is kept until its last
        reply. The turn at Firecracker is not: UNKNOWN keeps all others away, but a delete."""
        live = self.live
        await live.set_state(SandboxState.UNKNOWN)
        kept = held.pop_all()
        self._shop.tasks.start_unwatched(
            self._settle_late(prepared, running, kept), f"late window of {live.sandbox_id}"
        )
        raise ForkpointError(
            Reason.WINDOW_TIMED_OUT,
            f"Firecracker of sandbox {live.sandbox_id} did not answer within {deadline:.0f} s. "
            "The sandbox is UNKNOWN until it does; then it runs on by itself",
            metadata={"sandbox_id": live.sandbox_id},
        )

    async def _settle_late(
        self, prepared: Prepared, running: asyncio.Future[WindowOutcome], kept: AsyncExitStack
    ) -> None:
        """A late window has had its last reply: its diff is kept with the source."""
        async with kept:
            outcome = await running
            if not self.still_there():
                await self._shop.windows.remove(prepared.staged)
                return
            failure = await self._settle_base(prepared, outcome)
            if failure is None:
                await self.keep_diff(prepared.staged)
            else:
                await self._shop.windows.remove(prepared.staged)
        if not outcome.process_gone:
            await self._shop.sandboxes.reconcile(self.live)

    # --- the base afterwards ---

    def base_becomes(self, snapshot_id: str, draft: RowDraft) -> DirtyBase:
        """In the row that is committed with READY: the snapshot is the base, or (LAYERED) takes the
        place of what its layer holds. Returns the base whose diffs nobody needs any more then.
        Raises IMAGE_DAMAGED where what the layer stands on was lost meanwhile."""
        branch, base = self._record.branch, draft.row.dirty_base
        if branch.layout is not Layout.LAYERED:
            draft.row = self._after_window(draft.row, DirtyBase.of(snapshot_id))
            return base
        below = self._below_own(base)
        draft.row = replace(draft.row, dirty_base=base.stored(branch.branch_id, snapshot_id))
        return below

    def note_diff(self, staged: Staged, draft: RowDraft) -> None:
        """In the row that is committed with RESUMED: the next diff stands on this one, whose layer
        is to be stored. Raises IMAGE_DAMAGED where what it stands on was lost meanwhile."""
        if not self._is_pending(draft.row.dirty_base):
            raise self._damaged(draft.row.dirty_base.invalid_reason)
        draft.row = self._over_diff(draft.row, staged)

    async def keep_diff(self, staged: Staged) -> None:
        """Keeps the window's pages with the source: they exist nowhere else. Where what they lie
        over is lost they say nothing any more, and go."""
        branch, old = self._record.branch, self.base
        if not self.still_there():
            await self._shop.windows.remove(staged)
            return
        if self._is_pending(old):
            await self.live.edit(lambda row: self._over_diff(row, staged))
            if branch.mode is BranchMode.FULL:
                await self._shop.run(lambda: remove_diffs(old))
        elif old.below(branch.branch_id) is None:
            await self._shop.windows.remove(staged)
            return
        await self._shop.run(staged.remove_vmstate)

    def layer(self) -> tuple[str, tuple[UnmergedDiff, ...]]:
        """What this branch's layer stands on now, and the diffs that it holds: its own, and those
        before it that no snapshot has. Raises IMAGE_DAMAGED where some of that is lost."""
        base = self.base
        below = self._below_own(base)
        assert below.snapshot_id is not None, "a layer has a parent"
        return below.snapshot_id, base.unmerged[: len(below.unmerged) + 1]

    async def lose_base(self, error: ImageError) -> ForkpointError:
        """What the next diff would stand on can't be trusted any more: only a FULL branch helps.
        Where a diff is lost, those below it are stored all the same."""
        if isinstance(error, DiffLost):
            why, branch_id = str(error), error.branch_id
            await self._change_base(lambda base: base.cut_at(branch_id, why))
        else:
            why = f"its image is damaged: {error}"
            await self._change_base(lambda base: base.unusable(why))
        await self.forget_invalid()
        return self._damaged(why)

    async def _lose(self, why: str) -> None:
        await self._change_base(lambda base: base.unusable(why))
        await self.forget_invalid()

    async def forget_invalid(self, *, but_for: int = 0) -> None:
        """Of an INVALID base nothing is needed once nobody (but so many) stands in line."""
        if len(self._line) == but_for:
            await forget_invalid(self._shop, self.live)

    def _below_own(self, base: DirtyBase) -> DirtyBase:
        below = base.below(self._record.branch.branch_id)
        if below is None:
            raise self._damaged(base.invalid_reason)
        return below

    def _is_pending(self, base: DirtyBase) -> bool:
        """Whether it waits for what this branch's window did."""
        return base.branch_id == self._record.branch.branch_id

    async def _change_base(self, change: Callable[[DirtyBase], DirtyBase]) -> None:
        await self.live.edit(lambda row: replace(row, dirty_base=change(row.dirty_base)))

    def _over_diff(self, row: Sandbox, staged: Staged) -> Sandbox:
        kept = with_diff(row.dirty_base, self._record.branch, staged, self.dirty_bytes)
        return self._after_window(row, kept)

    def _after_window(self, row: Sandbox, base: DirtyBase) -> Sandbox:
        """The row with its new base; what this window wrote is what the next is expected to."""
        if self._record.branch.mode is BranchMode.DIFF:
            row = replace(row, last_diff_bytes=self.dirty_bytes)
        return replace(row, dirty_base=base)

    def _damaged(self, why: str) -> ForkpointError:
        return ForkpointError(
            Reason.IMAGE_DAMAGED,
            f"what the next diff of sandbox {self.live.sandbox_id} stands on can't be used: {why}. "
            "The source runs on; branch it with mode FULL",
            metadata={"sandbox_id": self.live.sandbox_id},
        )


def with_diff(base: DirtyBase, branch: Branch, staged: Staged, data_bytes: int) -> DirtyBase:
    """The base that stands for the source's memory at this branch's window, by its diff."""
    diff = UnmergedDiff(staged.memory_path, staged.extents_path, data_bytes, branch.branch_id)
    return (DirtyBase.empty() if branch.mode is BranchMode.FULL else base).over(diff)


async def forget_invalid(shop: Workshop, live: LiveSandbox) -> None:
    """Drops what an INVALID base was kept for: nobody stores a layer of it any more."""
    old = live.row.dirty_base
    if old.state is not DirtyBaseState.INVALID or not (old.unmerged or old.snapshot_id):
        return
    await live.edit(lambda row: replace(row, dirty_base=DirtyBase.invalid(old.invalid_reason)))
    await shop.run(lambda: remove_diffs(old))
    shop.tasks.start_unwatched(shop.sandboxes.snapshots.collect(), "collect snapshots")


def write_failed(when: str, error: BaseException) -> ForkpointError:
    """What a client is told about a file that could not be written."""
    return ForkpointError(
        Reason.WRITE_FAILED,
        f"a file of the snapshot could not be written {when}: {error}. The source runs on and no "
        "page is lost: make room, or put away what is in the way, and branch again",
    )
