"""The life of one branch (DESIGN section 4), and what each failure leaves behind.

Until its window a branch may be cancelled at any await: all that it holds (room, its turn at the
source, staging files, the draft) is undone by an exit stack. From the moment at which its source's
dirty base is PENDING it runs to its end; whatever fails then, the source runs as its owner wishes,
and the pages that were written in the window are kept: in the snapshot, or with the source.

    QUEUED -> PRECOPYING -> [dirty base PENDING] -> PAUSED, RESUMED -> MERGING -> FINALIZING
           -> [snapshot READY, dirty base VALID] -> FORKING -> READY
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from forkpointd.branching.admission import (
    Admission,
    Holding,
    expected_diff_bytes,
    private_bytes,
)
from forkpointd.branching.imaging import (
    PROGRESS_SECONDS,
    CopyWorkers,
    Meter,
    Staged,
    make_base_image,
    merge_staged_diff,
    place_staged_full,
)
from forkpointd.branching.opening import Prepared, Windows, window_failure
from forkpointd.branching.prediction import PausePredictor
from forkpointd.images import Draft, HostFacts, ImageError, Manifest, SnapshotStore, data_bytes_of
from forkpointd.model import (
    Branch,
    BranchMode,
    BranchStage,
    BranchView,
    DirtyBase,
    Fork,
    ForkpointError,
    ForkStage,
    Layout,
    MergeProgress,
    PauseWindow,
    PrecopyProgress,
    Reason,
    SandboxState,
    Snapshot,
    UnmergedDiff,
    now,
)
from forkpointd.registry import Registry
from forkpointd.sandboxes.feed import Feed
from forkpointd.sandboxes.forks import Forks
from forkpointd.sandboxes.live import LiveSandbox
from forkpointd.sandboxes.service import Sandboxes
from forkpointd.sandboxes.tasks import Tasks
from forkpointd.vmm import VmmFault, VmmGone, WindowOutcome

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every branch works with."""

    registry: Registry
    sandboxes: Sandboxes
    forks: Forks
    store: SnapshotStore
    admission: Admission
    predictor: PausePredictor
    windows: Windows
    precopies: CopyWorkers
    merges: CopyWorkers
    files: Executor
    host: HostFacts
    tasks: Tasks
    window_deadline_seconds: float

    async def run(self, work: Callable[[], T]) -> T:
        """Short file work, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.files, work)


class BranchLife:
    """One branch at work. `run` returns when it has ended; it never raises.

    `source` is None only where a restarted server goes on from FORKING and the source is gone.
    """

    def __init__(
        self,
        shop: Workshop,
        branch: Branch,
        source: LiveSandbox | None,
        holding: Holding,
        source_turn: asyncio.Lock,
        feed: Feed[BranchView],
    ) -> None:
        self.branch = branch
        self.feed = feed
        self.past_queue = asyncio.Event()
        """Set once the branch no longer holds its source's turn (or has ended)."""
        self._shop = shop
        self._source = source
        self._holding = holding
        self._source_turn = source_turn
        self._until_window: asyncio.Task[Staged] | None = None
        self._stopped_by: ForkpointError | None = None
        self._draft: Draft | None = None
        self._base: DirtyBase | None = None
        self._dirty_bytes = 0
        self._snapshot: Snapshot | None = None
        self._fork = feed.latest.fork

    @property
    def _live(self) -> LiveSandbox:
        assert self._source is not None, "only children are left to be started"
        return self._source

    # --- from outside ---

    @property
    def cancellable(self) -> bool:
        """Whether the window is still ahead."""
        return self._until_window is not None and not self._until_window.done()

    def stop(self, why: ForkpointError) -> None:
        """Ends a cancellable branch: CANCELLED for BRANCH_CANCELLED, else FAILED with `why`."""
        assert self._until_window is not None and self.cancellable
        self._stopped_by = why
        self._until_window.cancel()

    # --- the whole way ---

    def begin(self) -> None:
        """Starts the cancellable part, so that `stop` works from the first moment on."""
        self._stack = AsyncExitStack()
        self._stack.callback(self._release_room)
        self._until_window = self._shop.tasks.start(
            self._to_the_window(self._stack), f"branch {self.branch.branch_id} until its window"
        )

    def _release_room(self) -> None:
        self._holding.release()

    async def run(self) -> None:
        """From QUEUED to the end."""

        async def work() -> None:
            async with self._stack as held:
                await self._snapshot_source(held)

        await self._to_the_end(work)

    async def run_from_merge(self, base: DirtyBase, staged: Staged, draft: Draft) -> None:
        """From MERGING on, after a restart: the window is over, its diff and extents are there."""

        async def work() -> None:
            self._base, self._draft = base, draft
            assert self.branch.pause_window is not None
            self._dirty_bytes = self.branch.pause_window.dirty_bytes
            async with self._source_turn:
                await self._after_resumed(staged)

        await self._to_the_end(work)

    async def run_from_forking(self, snapshot: Snapshot, fork: Fork) -> None:
        """From FORKING on, after a restart: the snapshot is READY."""
        self._snapshot = snapshot
        forks = self._shop.forks
        starting = (
            forks.run_queued(fork.fork_id, snapshot)
            if fork.stage is ForkStage.QUEUED
            else forks.resume_after_restart(fork)
        )

        async def work() -> None:
            self.past_queue.set()
            if not fork.stage.ended:
                await self._follow_children(starting, fork.fork_id)
            else:
                starting.close()
                await self._end_with(fork)

        await self._to_the_end(work)

    async def _to_the_end(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            self.past_queue.set()
            if self._snapshot is not None and self.branch.stage is BranchStage.FORKING:
                assert self.branch.fork_id is not None
                await self._follow_children(
                    self._shop.forks.run_queued(self.branch.fork_id, self._snapshot),
                    self.branch.fork_id,
                )
        except asyncio.CancelledError:
            raise  # the server leaves: a restart goes on from what the registry says
        except Exception as error:
            log.exception("branch %s failed unexpectedly", self.branch.branch_id)
            if not self.branch.stage.ended:
                await self._fail(
                    ForkpointError(Reason.INTERNAL, f"the branch failed unexpectedly: {error!r}")
                )
        finally:
            self.past_queue.set()

    async def _snapshot_source(self, held: AsyncExitStack) -> None:
        assert self._until_window is not None
        try:
            staged = await self._until_window
        except asyncio.CancelledError:
            if self._stopped_by is None:
                raise
            await self._fail(self._stopped_by)
            return
        except ForkpointError as error:
            await self._fail(error)
            return
        except OSError as error:
            await self._fail(_write_failed("before its pause window", error))
            return
        try:
            window = await self._open(staged, held)
        except (ForkpointError, OSError, VmmFault, VmmGone) as error:
            await self._fail(
                error
                if isinstance(error, ForkpointError)
                else _write_failed("when its pause window was to open", error)
            )
            return
        await self._after_window(staged, window)

    async def _after_window(self, staged: Staged, window: PauseWindow) -> None:
        """PAUSED and RESUMED, before any further work; then the rest."""
        mode = self.branch.mode
        assert mode is not None
        self._shop.predictor.observe(mode, window)
        self.branch = replace(self.branch, pause_window=window)
        try:
            await self._enter(BranchStage.PAUSED, BranchStage.RESUMED)
        except Exception as error:  # noqa: BLE001 - whatever it was, the pages are kept
            await self._fail_with_diff(staged, error)
        else:
            await self._after_resumed(staged)

    async def _after_resumed(self, staged: Staged) -> None:
        """MERGING to READY (or FORKING)."""
        try:
            await self._merge(staged)
            await self._finalise()
        except Exception as error:  # noqa: BLE001 - whatever it was, the pages are kept
            await self._fail_with_diff(staged, error)
        else:
            await self._shop.windows.remove(staged)

    async def _fail_with_diff(self, staged: Staged, error: Exception) -> None:
        """Whatever failed after the window: its pages exist nowhere else, so they are kept."""
        if not isinstance(error, ForkpointError | OSError):
            log.error("branch %s failed after its window", self.branch.branch_id, exc_info=error)
        await self._discard_draft()  # first: what it took up may be what is missing
        try:
            await self._keep_diff(staged)
        except Exception:
            log.exception("the diff of branch %s is kept, but not noted", self.branch.branch_id)
        await self._fail(
            error
            if isinstance(error, ForkpointError)
            else _write_failed("after its pause window", error)
        )

    # --- until the window ---

    async def _to_the_window(self, held: AsyncExitStack) -> Staged:
        """Everything that can be undone; cancellable at any await."""
        await held.enter_async_context(self._source_turn)
        live, shop = self._live, self._shop
        live.require_callable()
        row = live.row
        expected = await shop.run(lambda: expected_diff_bytes(row, private_bytes))
        plan = shop.admission.decide(
            row,
            self.branch.requested_mode,
            self.branch.max_pause_us,
            self._holding.staging,
            expected,
        )
        if plan.mode is not self._holding.mode:
            # AUTO, and an earlier branch changed what the base is: other room is needed.
            self._holding.release()
            self._holding = await shop.run(lambda: shop.admission.reserve(row, plan.mode))
        base = row.dirty_base
        self._base = base
        serial = await shop.registry.next_serial()
        self.branch = replace(
            self.branch,
            mode=plan.mode,
            mode_reason=plan.reason,
            predicted_pause_us=plan.predicted_us,
            base_snapshot_id=base.snapshot_id if plan.mode is BranchMode.DIFF else None,
            staging=self._holding.staging,
            staging_serial=serial,
        )
        self._draft = await shop.run(lambda: shop.store.draft(self.branch.branch_id))
        if plan.mode is BranchMode.DIFF:
            await self._precopy(base, self._draft)
        return await shop.windows.stage(self._holding.staging, serial, row.machine.memory_bytes)

    async def _precopy(self, base: DirtyBase, draft: Draft) -> None:
        shop, meter = self._shop, Meter(self._holding.image)
        memory_bytes = self._live.row.machine.memory_bytes
        async with shop.precopies.slot():
            await self._enter(BranchStage.PRECOPYING)
            async with self._reporting(lambda: self._note_precopy(meter)):
                try:
                    result = await shop.precopies.run(
                        lambda should_stop: make_base_image(
                            shop.store, base, memory_bytes, draft.memory_path, meter, should_stop
                        )
                    )
                except ImageError as error:
                    raise await self._lose_base(error) from error
        self.branch = replace(
            self.branch,
            precopy=PrecopyProgress(
                done_bytes=meter.done_bytes,
                total_bytes=meter.total_bytes,
                hole_bytes=memory_bytes - (0 if result is None else result.copied_bytes),
                method=None if result is None else result.method,
            ),
        )

    async def _lose_base(self, error: ImageError) -> ForkpointError:
        """The base's image can't be trusted any more: only a FULL branch helps."""
        await self._set_base(DirtyBase.invalid(f"its image is damaged: {error}"))
        return ForkpointError(
            Reason.IMAGE_DAMAGED,
            f"the image under the next diff of sandbox {self._live.sandbox_id} is damaged: "
            f"{error}. The source runs on; branch it with mode FULL",
            metadata={"sandbox_id": self._live.sandbox_id},
        )

    def _note_precopy(self, meter: Meter) -> None:
        holes = self._live.row.machine.memory_bytes - meter.total_bytes
        self.branch = replace(
            self.branch,
            precopy=PrecopyProgress(
                meter.done_bytes, max(meter.total_bytes, meter.done_bytes), max(0, holes), None
            ),
        )

    # --- the window ---

    async def _open(self, staged: Staged, held: AsyncExitStack) -> PauseWindow:
        """Marks the base PENDING, opens the window, and settles what it did to the base.

        Raises when no snapshot was written; then the source's base is VALID or INVALID as DESIGN
        4.7 says, and the staging files are gone. The source runs, or stays paused by its owner.
        """
        live, mode = self._live, self.branch.mode
        assert mode is not None
        async with live.turn:
            try:
                prepared = await self._make_pending(staged, mode)
            except BaseException:
                await asyncio.shield(self._shop.windows.remove(staged))
                raise
            running = asyncio.ensure_future(prepared.vmm.run_window(prepared.window))
            deadline = max(
                self._shop.window_deadline_seconds, 10 * (self.branch.predicted_pause_us or 0) / 1e6
            )
            done, _ = await asyncio.wait({running}, timeout=deadline)
            if not done:
                await self._give_up_waiting(prepared, running, held, deadline)
            outcome = running.result()
            failure = await self._settle_base(prepared, outcome)
            window = await self._shop.windows.describe(prepared, outcome, self._dirty_bytes)
        await self._settle_resume(outcome)
        if failure is not None:
            await self._shop.windows.remove(staged)
            raise failure
        return window

    async def _make_pending(self, staged: Staged, mode: BranchMode) -> Prepared:
        """The last step before the window: all is built, then the base is PENDING, durably."""
        live, branch_id = self._live, self.branch.branch_id
        vmm = live.require_callable()
        was_paused = live.row.state is SandboxState.PAUSED
        prepared = await self._shop.sandboxes.ask(
            live, self._shop.windows.prepare(vmm, mode, staged, was_paused=was_paused)
        )
        try:
            await self._save()
            await live.edit(lambda row: replace(row, dirty_base=row.dirty_base.pending(branch_id)))
        except BaseException:
            prepared.window.close()
            raise
        return prepared

    async def _settle_resume(self, outcome: WindowOutcome) -> None:
        """A resume that Firecracker refused is asked for again: the owner's wish stands."""
        if not outcome.resume_failed or outcome.process_gone:
            return
        log.error("sandbox %s was not resumed: %s", self._live.sandbox_id, outcome.fault)
        await self._live.set_state(SandboxState.UNKNOWN)
        self._shop.tasks.start_unwatched(
            self._shop.sandboxes.reconcile(self._live), f"resume {self._live.sandbox_id}"
        )

    async def _settle_base(
        self, prepared: Prepared, outcome: WindowOutcome
    ) -> ForkpointError | None:
        """What the window did to the dirty base, made durable; returns why it failed, if it did."""
        live, base = self._live, self._base
        assert base is not None and self.branch.mode is not None
        if outcome.created:
            try:
                self._dirty_bytes = await self._shop.windows.read_extents(
                    prepared.staged, self.branch.mode, live.row.machine.memory_bytes
                )
            except OSError as error:
                why = f"the extents of branch {self.branch.branch_id} could not be stored"
                await self._set_base(DirtyBase.invalid(why))
                return _write_failed("right after its pause window", error)
            written = self._dirty_bytes
            if self.branch.mode is BranchMode.DIFF:
                await live.edit(lambda row: replace(row, last_diff_bytes=written))
            return None
        failure = window_failure(live.sandbox_id, outcome)
        if outcome.memory_write_failed:
            await self._set_base(base.back_to_valid())
        else:
            await self._set_base(DirtyBase.invalid(str(failure)))
        return failure

    async def _set_base(self, base: DirtyBase) -> None:
        await self._live.edit(lambda row: replace(row, dirty_base=base))

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
        live = self._live
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
        live = self._live
        async with kept:
            outcome = await running
            if not self._still_there():
                await self._shop.windows.remove(prepared.staged)
                return
            failure = await self._settle_base(prepared, outcome)
            if failure is None:
                await self._keep_diff(prepared.staged)
            else:
                await self._shop.windows.remove(prepared.staged)
        if not outcome.process_gone:
            await self._shop.sandboxes.reconcile(live)

    # --- after the window ---

    async def _merge(self, staged: Staged) -> None:
        shop, meter, draft = self._shop, Meter(self._holding.image), self._draft
        assert draft is not None
        place = merge_staged_diff if self.branch.mode is BranchMode.DIFF else place_staged_full
        async with shop.merges.slot():
            if self.branch.stage is BranchStage.RESUMED:
                await self._enter(BranchStage.MERGING)
            async with self._reporting(lambda: self._note_merge(meter)):
                await shop.merges.run(lambda should_stop: place(staged, draft, meter, should_stop))
        self._note_merge(meter)

    def _note_merge(self, meter: Meter) -> None:
        self.branch = replace(self.branch, merge=MergeProgress(meter.done_bytes, meter.total_bytes))

    async def _finalise(self) -> None:
        """Makes the snapshot durable, then READY: row, dirty base and stage in one commit."""
        shop, live, branch, draft = self._shop, self._live, self.branch, self._draft
        assert draft is not None and branch.mode is not None and branch.pause_window is not None
        if branch.stage is BranchStage.MERGING:
            await self._enter(BranchStage.FINALIZING)
        manifest = Manifest.describe(
            branch=branch, machine=live.row.machine, vmm=live.row.vmm, host=shop.host
        )
        folder = await shop.run(lambda: shop.store.finalise(draft, manifest))
        self._draft = None
        snapshot = Snapshot(
            snapshot_id=branch.snapshot_id,
            create_time=now(),
            source_sandbox_id=branch.sandbox_id,
            branch_id=branch.branch_id,
            parent_snapshot_id=branch.base_snapshot_id,
            mode=branch.mode,
            layout=Layout.FLAT,
            machine=live.row.machine,
            vmm=live.row.vmm,
            disk_bytes=await shop.run(lambda: data_bytes_of(folder)),
            dirty_bytes=branch.pause_window.dirty_bytes,
            labels=branch.snapshot_labels,
        )
        try:
            await self._commit_ready(snapshot)
        except BaseException:
            await shop.run(lambda: shop.store.delete(snapshot.snapshot_id))
            raise

    async def _commit_ready(self, snapshot: Snapshot) -> None:
        old_base = self._base
        stage = BranchStage.READY if self.branch.fork_id is None else BranchStage.FORKING
        branch = replace(self.branch.entering(stage, now()), sequence=self.branch.sequence + 1)
        async with self._live.editing() as draft:
            if self._still_there():
                draft.row = replace(draft.row, dirty_base=DirtyBase.of(snapshot.snapshot_id))
            await self._shop.registry.put_branch(
                branch, sandbox=draft.row if self._still_there() else None, snapshot=snapshot
            )
        self.branch = branch
        self._snapshot = snapshot
        self._publish(milestone=True)
        if old_base is not None:
            await self._shop.run(lambda: remove_diffs(old_base))
            self._shop.tasks.start_unwatched(
                self._shop.sandboxes.snapshots.collect(), "collect snapshots"
            )

    def _still_there(self) -> bool:
        """Whether the source has not been deleted meanwhile."""
        return self._shop.sandboxes.live.get(self._live.sandbox_id) is self._live

    async def _keep_diff(self, staged: Staged) -> None:
        """Keeps the window's pages with the source: they exist nowhere else (DESIGN 4.7)."""
        base = self._base
        assert base is not None
        if not self._still_there():
            await self._shop.windows.remove(staged)
            return
        await self._set_base(with_diff(base, self.branch, staged, self._dirty_bytes))
        await self._shop.run(staged.remove_vmstate)

    async def _follow_children(self, starting: Coroutine[Any, Any, Fork], fork_id: str) -> None:
        work = self._shop.tasks.start(starting, f"children of {fork_id}")
        async for fork in self._shop.forks.watch(fork_id, 0):
            self._fork = fork
            self._publish(milestone=False)
        await self._end_with(await work)

    async def _end_with(self, fork: Fork) -> None:
        """READY when every child has its outcome; FAILED where DELETE_ALL applied."""
        self._fork = fork
        if fork.stage is ForkStage.FAILED and fork.error is not None:
            await self._fail(ForkpointError.of(fork.error))
        else:
            await self._enter(BranchStage.READY)

    # --- stages ---

    async def _fail(self, error: ForkpointError) -> None:
        """Ends the branch, durably if the registry lets us, and in any case for its watchers."""
        await self._discard_draft()
        if self._fork is not None and not self._fork.stage.ended:
            try:
                self._fork = await self._shop.forks.fail(self._fork.fork_id, error.problem)
            except Exception:
                log.exception("the end of fork %s is not durable", self._fork.fork_id)
        cancelled = error.reason is Reason.BRANCH_CANCELLED
        self.branch = replace(self.branch, error=error.problem)
        await self._enter(BranchStage.CANCELLED if cancelled else BranchStage.FAILED)

    async def _discard_draft(self) -> None:
        """Removes what there is of the image. What can't be removed goes at the next start."""
        draft, self._draft = self._draft, None
        if draft is not None:
            try:
                await self._shop.run(lambda: self._shop.store.discard(draft))
            except OSError as error:
                log.error("the draft of branch %s stays: %s", self.branch.branch_id, error)

    async def _enter(self, *stages: BranchStage) -> None:
        """Enters a stage (or PAUSED and RESUMED together): durable first, then published. An end
        that can't be made durable is published all the same; a restart then finds the branch
        unfinished and ends it again."""
        branch = self.branch
        for stage in stages:
            window = branch.pause_window
            at = window.start_time if stage is BranchStage.PAUSED and window else now()
            branch = branch.entering(stage, at)
        branch = replace(branch, sequence=branch.sequence + 1)
        try:
            await self._shop.registry.put_branch(branch)
        except Exception:
            if not branch.stage.ended:
                raise
            log.exception("the end of branch %s is not durable", branch.branch_id)
        self.branch = branch
        self._publish(milestone=True)

    async def _save(self) -> None:
        await self._shop.registry.put_branch(self.branch)

    def _publish(self, *, milestone: bool) -> None:
        if not milestone:
            self.branch = replace(self.branch, sequence=self.branch.sequence + 1)
        self.feed.publish(
            BranchView(self.branch, self._snapshot, self._fork),
            milestone=milestone,
            ended=self.branch.stage.ended,
        )

    @asynccontextmanager
    async def _reporting(self, note: Callable[[], None]) -> AsyncIterator[None]:
        """Publishes progress now and then while the block runs."""

        async def report() -> None:
            while True:
                await asyncio.sleep(PROGRESS_SECONDS)
                note()
                self._publish(milestone=False)

        reporter = self._shop.tasks.start(report(), "progress")
        try:
            yield
        finally:
            reporter.cancel()
            with suppress(asyncio.CancelledError):
                await reporter
            note()


def with_diff(base: DirtyBase, branch: Branch, staged: Staged, data_bytes: int) -> DirtyBase:
    """The base that stands for the source's memory at this branch's window, by its kept diff."""
    diff = UnmergedDiff(staged.memory_path, staged.extents_path, data_bytes, branch.branch_id)
    if branch.mode is BranchMode.FULL:
        return replace(DirtyBase.empty(), unmerged=(diff,))
    return replace(base.back_to_valid(), unmerged=(*base.unmerged, diff))


def remove_diffs(base: DirtyBase) -> None:
    """Unlinks the kept diffs of a base that is not used any more."""
    for diff in base.unmerged:
        diff.memory_path.unlink(missing_ok=True)
        diff.extents_path.unlink(missing_ok=True)


def _write_failed(when: str, error: BaseException) -> ForkpointError:
    return ForkpointError(
        Reason.WRITE_FAILED,
        f"a file of the snapshot could not be written {when}: {error}. The source runs on and no "
        "page is lost: make room and branch again",
    )
