"""The life of one branch, and what each failure leaves behind. The steps that the comments of this
server name are those of docs/design/diff-snapshots.md.

Until its window a branch may be cancelled at any await: all that it holds (room, its turn at the
source, staging files, the draft) is undone by an exit stack. From the moment at which its source's
dirty base is PENDING it runs to its end; whatever fails then, the source runs as its owner wishes,
and the pages that were written in the window are kept: in the snapshot, or with the source.

    QUEUED -> PRECOPYING -> [dirty base PENDING] -> PAUSED, RESUMED -> MERGING -> FINALIZING
           -> [snapshot READY, dirty base VALID] -> FORKING -> READY

A LAYERED branch copies nothing before its window, and is the next one's base from RESUMED on: there
it gives its turn at the source away, and stands in line for its layer to be stored (`line.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from forkpointd.branching.admission import (
    VMSTATE_BYTES,
    Holding,
    Plan,
    expected_diff_bytes,
)
from forkpointd.branching.drives import clones_of, data_bytes, make_ready
from forkpointd.branching.imaging import (
    Meter,
    Staged,
    check_diffs,
    make_image,
    merge_staged_diff,
    place_layer,
    place_staged_full,
)
from forkpointd.branching.line import Place, SourceLine
from forkpointd.branching.quiet import Pace
from forkpointd.branching.record import BranchRecord
from forkpointd.branching.source import Source, write_failed
from forkpointd.branching.workshop import Workshop
from forkpointd.images import (
    Draft,
    Extent,
    Extents,
    ImageError,
    LayerWitness,
    Manifest,
    data_bytes_of,
    first_of,
    total_bytes,
    warm,
)
from forkpointd.model import (
    Branch,
    BranchMode,
    BranchStage,
    DirtyBase,
    Durability,
    Fork,
    ForkpointError,
    ForkStage,
    Layout,
    Machine,
    PauseWindow,
    Reason,
    Snapshot,
    StagingKind,
    now,
)
from forkpointd.sandboxes.live import LiveSandbox, remove_diffs
from forkpointd.sandboxes.starting import check_drives_are_there
from forkpointd.vmm import DriveClones, VmmError, resident_bytes

log = logging.getLogger(__name__)


class BranchLife:
    """One branch at work. `run` returns when it has ended; it never raises.

    `live` is None only where a restarted server goes on from FORKING and the source is gone.
    """

    def __init__(
        self,
        shop: Workshop,
        record: BranchRecord,
        live: LiveSandbox | None,
        holding: Holding,
        line: SourceLine,
    ) -> None:
        self.record = record
        self.past_queue = asyncio.Event()
        """Set once nothing of it is left to be done at the source (or it has ended)."""
        self._shop = shop
        self._source_or_none = None if live is None else Source(shop, live, record, line)
        self._holding = holding
        self._line = line
        self._turn = AsyncExitStack()
        self._place: Place | None = None
        self._until_window: asyncio.Task[Staged] | None = None
        self._stopped_by: ForkpointError | None = None
        self._draft: Draft | None = None
        self._ahead_bytes = 0
        self._clones: DriveClones | None = None
        self.allow_drive_copy = False
        """Copy writable drives where they can't be cloned."""

    @property
    def branch(self) -> Branch:
        """The branch as of now."""
        return self.record.branch

    @property
    def _source(self) -> Source:
        assert self._source_or_none is not None, "only children are left to be started"
        return self._source_or_none

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

    def stand_in_line(self) -> None:
        """Takes the last place in the line of its source: before anything is awaited, for a
        restarted server, in the order of the windows."""
        self._place = self._line.join()

    async def run_from_merge(self, staged: Staged, draft: Draft) -> None:
        """From MERGING on, after a restart: the window is over, its diff and extents are there. A
        LAYERED one stands in line already."""

        async def work() -> None:
            assert self.branch.pause_window is not None
            self._draft = draft
            self._source.dirty_bytes = self.branch.pause_window.dirty_bytes
            if self._place is not None:
                await self._store_in_line(staged)
            else:
                async with self._line.turn:
                    await self._after_resumed(staged)

        await self._to_the_end(work)

    async def run_from_forking(self, snapshot: Snapshot, fork: Fork) -> None:
        """From FORKING on, after a restart: the snapshot is READY."""
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
            if self.record.stage is BranchStage.FORKING:
                snapshot, fork_id = self.record.snapshot, self.branch.fork_id
                assert snapshot is not None and fork_id is not None
                await self._follow_children(self._shop.forks.run_queued(fork_id, snapshot), fork_id)
        except asyncio.CancelledError:
            raise  # the server leaves: a restart goes on from what the registry says
        except Exception as error:
            log.exception("branch %s failed unexpectedly", self.branch.branch_id)
            if not self.record.stage.ended:
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
            await self._fail(write_failed("before its pause window", error))
            return
        try:
            window = await self._source.open_window(staged, self._clones, held)
        except (ForkpointError, OSError, VmmError) as error:
            await self._fail(
                error
                if isinstance(error, ForkpointError)
                else write_failed("when its pause window was to open", error)
            )
            return
        await self._after_window(staged, window)

    async def _after_window(self, staged: Staged, window: PauseWindow) -> None:
        """PAUSED and RESUMED, before any further work; then the rest."""
        mode = self.branch.mode
        assert mode is not None
        self._shop.predictor.observe(mode, window, memory_bytes=self._source.memory_bytes)
        self.record.note_window(window)
        if self._holding.staged is not None:
            self._holding.staged.consume(max(0, window.dirty_bytes - self._ahead_bytes))
        if self._source.drive_failure is not None:
            # Never RESUMED: a restarted server would take the drives for whole.
            await self._fail_with_diff(staged, self._source.drive_failure)
            return
        layered = self.branch.layout is Layout.LAYERED
        if layered and self._holding.image is not None:
            self._holding.image.keep(window.dirty_bytes + VMSTATE_BYTES)
        try:
            if layered:
                async with self._source.live.editing() as draft:
                    self._source.note_diff(staged, draft)
                    await self.record.enter(BranchStage.PAUSED, BranchStage.RESUMED, source=draft)
            else:
                await self.record.enter(BranchStage.PAUSED, BranchStage.RESUMED)
        except Exception as error:  # noqa: BLE001 - whatever it was, the pages are kept
            await self._fail_with_diff(staged, error)
            return
        if layered:
            self.stand_in_line()
            await self._turn.aclose()  # the next window may open
            await self._store_in_line(staged)
        else:
            await self._after_resumed(staged)

    async def _store_in_line(self, staged: Staged) -> None:
        """The rest, once all that this layer stands on is stored, or can't be."""
        place = self._place
        assert place is not None
        try:
            await self._line.first(place)
            await self._after_resumed(staged)
            await self._source.forget_invalid(but_for=1)
        finally:
            self._line.leave(place)

    async def _after_resumed(self, staged: Staged) -> None:
        """MERGING to READY (or FORKING)."""
        try:
            await self._finalise(await self._merge(staged))
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
            await self._source.keep_diff(staged)
        except Exception:
            log.exception("the diff of branch %s is kept, but not noted", self.branch.branch_id)
        await self._fail(
            error
            if isinstance(error, ForkpointError)
            else write_failed("after its pause window", error)
        )

    # --- until the window ---

    async def _to_the_window(self, held: AsyncExitStack) -> Staged:
        """Everything that can be undone; cancellable at any await."""
        await held.enter_async_context(self._turn)
        await self._turn.enter_async_context(self._line.turn)
        live, shop = self._source.live, self._shop
        live.require_callable()
        row = live.row
        await shop.run(lambda: check_drives_are_there(row.machine, live.folder))
        plan, layout, expected = await self._plan()
        if layout is not Layout.LAYERED and self._line:
            await self._line.empty()
            plan, layout, expected = await self._plan()
        if plan.mode is not self._holding.mode:
            # AUTO, and an earlier branch changed what the base is: other room is needed.
            self._holding.release()
            self._holding = await shop.reserve(row, plan.mode, self.branch)
        base = self._source.base
        serial = await shop.registry.next_serial()
        self.record.branch = replace(
            self.branch,
            mode=plan.mode,
            mode_reason=plan.reason,
            predicted_pause_us=plan.predicted_us,
            base_snapshot_id=base.snapshot_id if plan.mode is BranchMode.DIFF else None,
            layout=layout,
            staging=self._holding.staging,
            staging_serial=serial,
        )
        branch = self.branch
        self._draft = await shop.run(lambda: shop.store.draft(branch.branch_id, branch.durability))
        if layout is Layout.LAYERED:
            await self._check_parent()
        elif plan.mode is BranchMode.DIFF:
            await self._precopy(base, self._draft)
        staged = await shop.windows.stage(self._holding.staging, serial, self._source.memory_bytes)
        try:
            await self._get_pages_ahead(serial, expected)
            self._clones = await self._prepare_drives(row.machine, held)
        except BaseException:
            await asyncio.shield(shop.windows.remove(staged))
            raise
        return staged

    async def _plan(self) -> tuple[Plan, Layout, int]:
        """Mode and layout for the source as it is now, and the bytes that the window is expected to
        write."""
        live, shop = self._source.live, self._shop
        row = live.row
        expected = await shop.run(lambda: expected_diff_bytes(row, live.last_diff, resident_bytes))
        plan = shop.admission.decide(
            row,
            self.branch.requested_mode,
            self.branch.max_pause_us,
            self._holding.staging,
            expected,
        )
        return plan, await self._layout_of(plan.mode, row.dirty_base), expected

    async def _layout_of(self, mode: BranchMode, base: DirtyBase) -> Layout:
        """A layer needs something to stand on; what stands on nothing is whole."""
        if mode is not BranchMode.DIFF or base.snapshot_id is None:
            return Layout.FLAT
        if self.branch.requested_layout is not Layout.AUTO:
            return self.branch.requested_layout
        in_memory = self.branch.durability is Durability.MEMORY
        shop = self._shop
        least = shop.memory_layered_bytes if in_memory else shop.auto_layered_bytes
        if least is None:
            return Layout.FLAT
        held = await self._shop.registry.bytes_of_chain(base.snapshot_id)
        return Layout.LAYERED if held >= least else Layout.FLAT

    async def _check_parent(self) -> None:
        """A layer is no more than what it stands on."""
        while not await self._is_there(self._source.base):
            pass  # what the next one stands on is looked at anew

    async def _is_there(self, base: DirtyBase) -> bool:
        """Whether all that this base names is there. False: the base is another by now, for a layer
        before this one was stored, and with it went what it was made of. Raises IMAGE_DAMAGED."""
        try:
            await self._shop.sandboxes.snapshots.check_base(base)
            await self._shop.run(lambda: check_diffs(base.unmerged))
        except ImageError as error:
            if self._source.base != base:
                return False
            raise await self._source.lose_base(error) from error
        return True

    async def _precopy(self, base: DirtyBase, draft: Draft) -> None:
        shop, record, meter = self._shop, self.record, Meter(self._holding.image)
        memory_bytes = self._source.memory_bytes

        def note() -> None:
            holes = memory_bytes - meter.total_bytes
            record.note_precopy(meter.done_bytes, meter.total_bytes, holes, None)

        async with shop.precopies.slot():
            await record.enter(BranchStage.PRECOPYING)
            async with record.reporting(note):
                try:
                    async with shop.sandboxes.snapshots.reading_base(base) as chain:
                        result = await shop.precopies.run(
                            lambda pace: make_image(
                                chain, base.unmerged, memory_bytes, draft.memory_path, meter, pace
                            )
                        )
                except ImageError as error:
                    raise await self._source.lose_base(error) from error
        method = None if base.snapshot_id is None else result.method
        holes = memory_bytes - (0 if method is None else result.copied_bytes)
        record.note_precopy(meter.done_bytes, meter.total_bytes, holes, method)

    async def _get_pages_ahead(self, serial: int, expected_bytes: int) -> None:
        """Gets the pages that the window will write to: a fresh page of tmpfs costs more than the
        copy into it, and a cold one ten times that. What can be told by its place is allocated, the
        rest of what is expected is only made warm."""
        shop, holding = self._shop, self._holding
        if not shop.ahead_budget.limit_bytes:
            return
        on_tmpfs = holding.staging is StagingKind.TMPFS
        likely = Extents.of(())
        if holding.mode is BranchMode.FULL:
            expected_bytes = self._source.memory_bytes
            likely = Extents.of((Extent(0, expected_bytes),))
        elif on_tmpfs and self._source.live.last_diff is not None:
            last = self._source.live.last_diff.extents
            holding.ahead = shop.ahead_budget.take_up_to(total_bytes(last), "pages ahead")
            likely = first_of(last, holding.ahead.reserved_bytes, len(last))
        meter = Meter(holding.staged if on_tmpfs else holding.image)

        def get(pace: Pace) -> int:
            allocated = shop.windows.allocate_ahead(
                holding.staging, serial, likely, meter.add, pace
            )
            if shop.windows.cold_pages:
                cold = max(0, expected_bytes - (allocated if on_tmpfs else 0))
                with shop.ahead_budget.take_up_to(cold, "warm pages") as taken:
                    warm(taken.reserved_bytes, should_stop=pace.should_stop, gate=pace.gate)
            return allocated

        async with shop.allocations.slot():
            self._ahead_bytes = await shop.allocations.run(get)

    async def _prepare_drives(self, machine: Machine, held: AsyncExitStack) -> DriveClones | None:
        """What the window clones: writes what is dirty of it to the disk, makes the files."""
        if not machine.writable_drives:
            return None
        shop, draft, folder = self._shop, self._draft, self._source.live.folder
        assert draft is not None
        clones = clones_of(machine, folder, draft, shop, allow_copy=self.allow_drive_copy)
        if not shop.sandboxes.starter.reflink:
            what = f"copies of the drives of sandbox {self.branch.sandbox_id}"
            held.enter_context(
                await shop.run(lambda: shop.admission.reserve_bytes(data_bytes(clones), what))
            )
        async with shop.allocations.slot():
            await shop.allocations.run(lambda pace: make_ready(clones, pace))
        return clones

    # --- after the window ---

    async def _merge(self, staged: Staged) -> LayerWitness | None:
        """Puts the window's pages into the draft; returns what it holds where it is a layer."""
        shop, record, draft = self._shop, self.record, self._draft
        assert draft is not None
        meter = Meter(self._holding.image)
        async with shop.merges.slot():
            if record.stage is BranchStage.RESUMED:
                await record.enter(BranchStage.MERGING)
            async with record.reporting(
                lambda: record.note_merge(meter.done_bytes, meter.total_bytes)
            ):
                if self.branch.layout is Layout.LAYERED:
                    return await self._place_layer(staged, draft, meter)
                diff = self.branch.mode is BranchMode.DIFF
                place = merge_staged_diff if diff else place_staged_full
                await shop.merges.run(lambda pace: place(staged, draft, meter, pace))
        return None

    async def _place_layer(self, staged: Staged, draft: Draft, meter: Meter) -> LayerWitness:
        """The layer, over what is stored by now of what its window stood on."""
        shop, source = self._shop, self._source
        parent_id, diffs = source.layer()
        parent = await shop.registry.get_snapshot(parent_id, include_deleted=True)
        assert parent is not None, "a dirty base has a row"
        try:
            extents = await shop.merges.run(
                lambda pace: place_layer(staged, diffs, draft, meter, pace)
            )
        except ImageError as error:
            raise await source.lose_base(error) from error
        self.record.branch = replace(self.branch, base_snapshot_id=parent_id)
        return LayerWitness(parent.branch_id, extents)

    async def _finalise(self, layer: LayerWitness | None) -> None:
        """Makes the snapshot durable, then READY: row, dirty base and stage in one commit."""
        shop, row, branch, draft = self._shop, self._source.live.row, self.branch, self._draft
        assert draft is not None and branch.mode is not None and branch.pause_window is not None
        if branch.stage is BranchStage.MERGING:
            await self.record.enter(BranchStage.FINALIZING)
        if layer is not None and branch.durability is Durability.DISK:
            # On a disk it stands on nothing that a reboot takes away.
            assert branch.base_snapshot_id is not None, "a layer has a parent"
            await shop.sandboxes.snapshots.on_disk(branch.base_snapshot_id)
        try:
            folder = await shop.run(
                lambda: shop.store.finalise(
                    draft,
                    Manifest.describe(
                        branch=branch,
                        machine=row.machine,
                        vmm=row.vmm,
                        host=shop.host,
                        layer=layer,
                        clone_of=draft.drive_path,
                    ),
                )
            )
        except ImageError as error:  # something stands where the snapshot's folder should
            raise write_failed("under its name", error) from error
        self._draft = None
        snapshot = Snapshot(
            snapshot_id=branch.snapshot_id,
            create_time=now(),
            source_sandbox_id=branch.sandbox_id,
            branch_id=branch.branch_id,
            parent_snapshot_id=branch.base_snapshot_id,
            mode=branch.mode,
            layout=branch.layout,
            durability=branch.durability,
            machine=row.machine,
            vmm=row.vmm,
            disk_bytes=await shop.run(lambda: data_bytes_of(folder)),
            dirty_bytes=branch.pause_window.dirty_bytes,
            labels=branch.snapshot_labels,
        )
        try:
            await self._commit_ready(snapshot)
        except Exception:
            # Not when the server leaves: the commit may be on its way, and a restart finds out.
            await shop.run(lambda: shop.store.delete(snapshot.snapshot_id))
            raise

    async def _commit_ready(self, snapshot: Snapshot) -> None:
        source = self._source
        stage = BranchStage.READY if self.branch.fork_id is None else BranchStage.FORKING
        async with source.live.editing() as draft:
            old_base = source.base_becomes(snapshot.snapshot_id, draft)
            await self.record.become_ready(snapshot, stage, draft)
        self._shop.tasks.start_unwatched(
            self._shop.sandboxes.becomes_source(source.live), f"source {source.live.sandbox_id}"
        )
        await self._shop.run(lambda: remove_diffs(old_base))
        self._shop.tasks.start_unwatched(
            self._shop.sandboxes.snapshots.collect(), "collect snapshots"
        )

    # --- children ---

    async def _follow_children(self, starting: Coroutine[Any, Any, Fork], fork_id: str) -> None:
        work = self._shop.tasks.start(starting, f"children of {fork_id}")
        async for fork in self._shop.forks.watch(fork_id, 0):
            self.record.fork = fork
            self.record.show_progress()
        await self._end_with(await work)

    async def _end_with(self, fork: Fork) -> None:
        """READY when every child has its outcome; FAILED where DELETE_ALL applied."""
        self.record.fork = fork
        if fork.stage is ForkStage.FAILED and fork.error is not None:
            await self._fail(ForkpointError.of(fork.error))
        else:
            await self.record.enter(BranchStage.READY)

    # --- failing ---

    async def _fail(self, error: ForkpointError) -> None:
        """Ends the branch, durably if the registry lets us, and in any case for its watchers."""
        await self._discard_draft()
        fork = self.record.fork
        if fork is not None and not fork.stage.ended:
            try:
                self.record.fork = await self._shop.forks.fail(fork.fork_id, error.problem)
            except Exception:
                log.exception("the end of fork %s is not durable", fork.fork_id)
        cancelled = error.reason is Reason.BRANCH_CANCELLED
        self.record.note_error(error.problem)
        await self.record.enter(BranchStage.CANCELLED if cancelled else BranchStage.FAILED)

    async def _discard_draft(self) -> None:
        """Removes what there is of the image. What can't be removed goes at the next start."""
        draft, self._draft = self._draft, None
        if draft is not None:
            try:
                await self._shop.run(lambda: self._shop.store.discard(draft))
            except OSError as error:
                log.error("the draft of branch %s stays: %s", self.branch.branch_id, error)
