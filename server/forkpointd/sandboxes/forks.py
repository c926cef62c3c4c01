"""Forks: starting N children of one snapshot.

A fork belongs to the server. Its children's ids are fixed at admission; children start side by
side, a bounded number at once; what became of them is committed in batches (all that finished
while the last commit was under way), so a hundred children don't pay a hundred commits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from forkpointd.images import Reservation, StoredSnapshot
from forkpointd.model import (
    DirtyBase,
    FailureAction,
    ForkChild,
    ForkChildState,
    ForkOrder,
    ForkpointError,
    ForkSpec,
    ForkStage,
    Machine,
    Problem,
    Reason,
    Sandbox,
    Snapshot,
    now,
)
from forkpointd.model import Fork as ForkRow
from forkpointd.registry import Registry
from forkpointd.sandboxes.feed import Feed
from forkpointd.sandboxes.live import LiveSandbox
from forkpointd.sandboxes.repeats import Repeats
from forkpointd.sandboxes.service import Sandboxes, new_id, start_failure
from forkpointd.sandboxes.tasks import Tasks
from forkpointd.vmm import Vmm

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one child."""

    index: int
    live: LiveSandbox | None
    vmm: Vmm | None = None
    problem: Problem | None = None


class Forks:
    """The forks of this server."""

    def __init__(self, sandboxes: Sandboxes, *, concurrent_starts: int) -> None:
        self.tasks = Tasks("forks")
        self._sandboxes = sandboxes
        self._registry: Registry = sandboxes.registry
        self._feeds: dict[str, Feed[ForkRow]] = {}
        self._admissions: Repeats[ForkRow] = Repeats(self._registry, self.tasks)
        self._promised: dict[str, Reservation] = {}
        """For children of forks that wait for their snapshot."""
        self._starts = asyncio.Semaphore(concurrent_starts)

    # --- looking ---

    async def get(self, fork_id: str) -> ForkRow:
        """The fork as of now."""
        feed = self._feeds.get(fork_id)
        fork = feed.latest if feed is not None else await self._registry.get_fork(fork_id)
        if fork is None:
            raise ForkpointError(
                Reason.FORK_NOT_FOUND,
                f"there is no fork {fork_id}",
                metadata={"fork_id": fork_id},
            )
        return fork

    async def watch(self, fork_id: str, after_sequence: int) -> AsyncIterator[ForkRow]:
        """The fork as of now (unless its sequence is `after_sequence`), then each change."""
        feed = self._feeds.get(fork_id) or Feed(await self.get(fork_id), ended=True)
        async for fork in feed.watch(skip_first=feed.latest.sequence == after_sequence):
            yield fork

    # --- starting ---

    async def start(self, order: ForkOrder) -> ForkRow:
        """Admits a fork, or finds the one that this request_id made."""
        return await self._admissions.run(
            order.request, lambda: self._admit(order), self.get, f"admit {order.snapshot_id}"
        )

    async def _admit(self, order: ForkOrder) -> ForkRow:
        snapshots = self._sandboxes.snapshots
        with snapshots.hold(order.snapshot_id):
            snapshot = await snapshots.usable(order.snapshot_id)
            self._sandboxes.starter.check_cloning(
                snapshot.machine, allow_copy=order.spec.allow_drive_copy
            )
            stored = await self._sandboxes.starter.check_loadable(order.snapshot_id)
            fork = new_fork(order.spec, order.snapshot_id, branch_id=None)
            fork = replace(fork, stage=ForkStage.STARTING)
            rows = self._child_rows(fork, snapshot)
            with await self.memory_for(fork, snapshot.machine):
                await self._registry.insert_fork(fork, rows, order.request)
                lives = [self._sandboxes.hold_row(row) for row in rows]
        self._feeds[fork.fork_id] = Feed(fork)
        self.tasks.start_unwatched(self._run(fork, lives, stored), f"fork {fork.fork_id}")
        return fork

    async def memory_for(self, fork: ForkRow, machine: Machine) -> Reservation:
        """Memory for the children of a fork, until the promise is released. Raises NO_MEMORY."""
        children = "1 child" if fork.spec.count == 1 else f"{fork.spec.count} children"
        what = f"{children} of snapshot {fork.snapshot_id}"
        return await self._sandboxes.memory_for(fork.spec.count, machine, what)

    def show(self, fork: ForkRow, memory: Reservation | None = None) -> None:
        """Lets an unfinished fork be watched; takes over what its children are promised."""
        self._feeds[fork.fork_id] = Feed(fork)
        if memory is not None:
            self._promised[fork.fork_id] = memory

    async def run_queued(self, fork_id: str, snapshot: Snapshot) -> ForkRow:
        """Starts the children of a fork that waited for `snapshot`; returns it ended."""
        fork = self._feeds[fork_id].latest
        try:
            await self._sandboxes.snapshots.check_not_lost(snapshot.snapshot_id)
            stored = await self._sandboxes.starter.check_loadable(snapshot.snapshot_id)
            # Before there are rows: a server that is killed meanwhile begins again.
            fork, stored = await self._flat(fork, stored)
        except ForkpointError as error:
            return await self.fail(fork_id, error.problem)
        fork = await self._commit(replace(fork, stage=ForkStage.STARTING))
        taken: list[_Outcome] = []
        rows: list[Sandbox] = []
        for index, row in enumerate(self._child_rows(fork, snapshot)):
            if row.sandbox_id in self._sandboxes.live:
                problem = Problem(
                    Reason.ID_TAKEN,
                    f"a sandbox {row.sandbox_id} was made meanwhile: choose another fork_id",
                    {"sandbox_id": row.sandbox_id},
                )
                taken.append(_Outcome(index, None, problem=problem))
            else:
                rows.append(row)
        await self._registry.insert_sandboxes(rows)
        lives = [self._sandboxes.hold_row(row) for row in rows]
        self._release_memory(fork.fork_id)  # from here on the rows count
        return await self._run(fork, lives, stored, taken)

    async def fail(self, fork_id: str, problem: Problem) -> ForkRow:
        """Ends a fork whose snapshot never came."""
        fork = self._feeds[fork_id].latest
        children = tuple(
            replace(child, state=ForkChildState.FAILED, error=problem) for child in fork.children
        )
        return await self._end(replace(fork, children=children), ForkStage.FAILED, problem)

    async def recover(self) -> int:
        """Goes on with the forks that are no part of a branch; returns how many."""
        forks = [fork for fork in await self._registry.unfinished_forks() if not fork.branch_id]
        for fork in forks:
            self.show(fork)
            self.tasks.start_unwatched(self.resume_after_restart(fork), f"fork {fork.fork_id}")
        return len(forks)

    async def resume_after_restart(self, fork: ForkRow) -> ForkRow:
        """Finishes a fork (`show`n before) that a former server had begun: children that run were
        adopted, the others are started now."""
        lives = [
            self._sandboxes.find(child.sandbox_id)
            for child in fork.children
            if child.state is ForkChildState.PENDING and child.sandbox_id in self._sandboxes.live
        ]
        gone = [
            _Outcome(
                index,
                None,
                problem=Problem(
                    Reason.SERVER_RESTARTED,
                    f"child {child.sandbox_id} was not started before the server was restarted",
                ),
            )
            for index, child in enumerate(fork.children)
            if child.state is ForkChildState.PENDING
            and child.sandbox_id not in self._sandboxes.live
        ]
        try:
            await self._sandboxes.snapshots.check_not_lost(fork.snapshot_id)
            stored = await self._sandboxes.starter.check_loadable(fork.snapshot_id)
        except ForkpointError as error:
            await self._sandboxes.discard(lives)
            return await self.fail(fork.fork_id, error.problem)
        return await self._run(fork, lives, stored, gone)

    def _child_rows(self, fork: ForkRow, snapshot: Snapshot) -> list[Sandbox]:
        return [
            replace(
                self._sandboxes.new_row(
                    child.sandbox_id, snapshot.machine, DirtyBase.of(snapshot.snapshot_id)
                ),
                snapshot_id=snapshot.snapshot_id,
                source_sandbox_id=snapshot.source_sandbox_id,
                fork_id=fork.fork_id,
                labels=dict(fork.spec.labels),
                ttl_seconds=fork.spec.ttl_seconds,
                on_expiry=fork.spec.on_expiry,
            )
            for child in fork.children
            if child.state is ForkChildState.PENDING
        ]

    async def _run(
        self,
        fork: ForkRow,
        lives: Sequence[LiveSandbox],
        stored: StoredSnapshot,
        known: Sequence[_Outcome] = (),
    ) -> ForkRow:
        """Starts the children and commits what becomes of them, in batches; returns it ended."""
        index_of = {child.sandbox_id: index for index, child in enumerate(fork.children)}
        outcomes: asyncio.Queue[_Outcome] = asyncio.Queue()
        for outcome in known:
            outcomes.put_nowait(outcome)
        waiting = len(lives) + len(known)
        try:
            fork, stored = await self._flat(fork, stored)
        except Exception as error:  # noqa: BLE001 - whatever it is, each child has its outcome
            for live in lives:
                outcomes.put_nowait(_no_start(index_of[live.sandbox_id], live, error))
            lives = ()
        starts = [
            self.tasks.start_unwatched(
                self._start_child(fork.spec, index_of[live.sandbox_id], live, stored, outcomes),
                f"start {live.sandbox_id}",
            )
            for live in lives
        ]
        while waiting:
            batch = [await outcomes.get()]
            while not outcomes.empty():
                batch.append(outcomes.get_nowait())
            waiting -= len(batch)
            fork = await self._commit_outcomes(fork, batch)
            failed = any(outcome.problem is not None for outcome in batch)
            if failed and fork.spec.on_failure is FailureAction.DELETE_ALL:
                for start in starts:
                    start.cancel()
                await asyncio.gather(*starts, return_exceptions=True)
                while not outcomes.empty():
                    fork = await self._commit_outcomes(fork, [outcomes.get_nowait()])
                return await self._delete_all(fork, lives)
        self._sandboxes.expiry_changed()
        return await self._end(fork, ForkStage.READY, None)

    async def _flat(self, fork: ForkRow, stored: StoredSnapshot) -> tuple[ForkRow, StoredSnapshot]:
        """The snapshot as one file; the fork shows how far that is as long as it waits for it."""
        if stored.manifest.layer is None:
            return fork, stored
        snapshots, feed = self._sandboxes.snapshots, self._feeds[fork.fork_id]
        async for progress in snapshots.flatten_progress(fork.snapshot_id):
            fork = replace(fork, sequence=fork.sequence + 1, flatten=progress)
            feed.publish(fork, milestone=False)
        stored = await self._sandboxes.starter.check_loadable(fork.snapshot_id)
        return replace(fork, flatten=None), stored

    async def _start_child(
        self,
        spec: ForkSpec,
        index: int,
        live: LiveSandbox,
        stored: StoredSnapshot,
        outcomes: asyncio.Queue[_Outcome],
    ) -> None:
        try:
            async with self._starts, live.turn:
                live.require_not_deleting()
                # At once, not with the outcome: a delete that waits for the turn ends it.
                vmm = live.vmm = await self._sandboxes.starter.load(
                    live.row, stored, allow_drive_copy=spec.allow_drive_copy
                )
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, this child has its outcome
            outcomes.put_nowait(_no_start(index, live, error))
        else:
            outcomes.put_nowait(_Outcome(index, live, vmm=vmm))

    async def _commit_outcomes(self, fork: ForkRow, batch: Sequence[_Outcome]) -> ForkRow:
        """Makes the outcomes of some children durable, then visible."""
        children = list(fork.children)
        async with AsyncExitStack() as stack:
            rows = []
            for outcome in batch:
                child = children[outcome.index]
                if outcome.vmm is None or outcome.live is None:
                    children[outcome.index] = replace(
                        child, state=ForkChildState.FAILED, error=outcome.problem
                    )
                    continue
                draft = await stack.enter_async_context(outcome.live.editing())
                draft.row = self._sandboxes.started(draft.row, outcome.vmm)
                rows.append(draft.row)
                if self._sandboxes.live.get(child.sandbox_id) is outcome.live:
                    self._sandboxes.attach(outcome.live, outcome.vmm)
                children[outcome.index] = replace(
                    child, state=ForkChildState.READY, start_us=outcome.vmm.start_us
                )
            fork = await self._commit(replace(fork, children=tuple(children)), rows)
        dead = [outcome.live for outcome in batch if outcome.problem and outcome.live]
        if dead:
            await self._sandboxes.discard(dead)
        return fork

    async def _delete_all(self, fork: ForkRow, lives: Sequence[LiveSandbox]) -> ForkRow:
        """What on_failure DELETE_ALL asks for once a child failed."""
        never_started = [live for live in lives if live.vmm is None]
        await self._sandboxes.discard(
            [live for live in never_started if live.sandbox_id in self._sandboxes.live]
        )
        good = [
            child.sandbox_id
            for child in fork.children
            if child.state is ForkChildState.READY and child.sandbox_id in self._sandboxes.live
        ]
        for outcome in await asyncio.gather(
            *(self._sandboxes.delete(sandbox_id) for sandbox_id in good), return_exceptions=True
        ):
            if isinstance(outcome, BaseException):
                log.error("a child of fork %s is not deleted: %s", fork.fork_id, outcome)
        problem = Problem(
            Reason.CHILDREN_FAILED,
            "a child did not start and on_failure is DELETE_ALL, so all were deleted: "
            + next(child.error.message for child in fork.children if child.error is not None),
            {"fork_id": fork.fork_id},
        )
        children = tuple(
            child
            if child.state is ForkChildState.FAILED
            else replace(child, state=ForkChildState.DELETED)
            for child in fork.children
        )
        return await self._end(replace(fork, children=children), ForkStage.FAILED, problem)

    async def _commit(self, fork: ForkRow, sandboxes: Sequence[Sandbox] = ()) -> ForkRow:
        fork = replace(fork, sequence=fork.sequence + 1)
        await self._registry.put_fork(fork, sandboxes=sandboxes)
        self._feeds[fork.fork_id].publish(fork, milestone=False)
        return fork

    async def _end(self, fork: ForkRow, stage: ForkStage, problem: Problem | None) -> ForkRow:
        fork = replace(fork, sequence=fork.sequence + 1, stage=stage, error=problem, end_time=now())
        await self._registry.put_fork(fork)
        self._release_memory(fork.fork_id)
        self._feeds.pop(fork.fork_id).publish(fork, milestone=True, ended=True)
        if any(child.state is not ForkChildState.READY for child in fork.children):
            self.tasks.start_unwatched(self._sandboxes.snapshots.collect(), "collect snapshots")
        return fork

    def _release_memory(self, fork_id: str) -> None:
        promise = self._promised.pop(fork_id, None)
        if promise is not None:
            promise.release()

    async def close(self) -> None:
        """Stops following forks; a restart finishes them."""
        await self.tasks.cancel()


def _no_start(index: int, live: LiveSandbox, error: Exception) -> _Outcome:
    """The outcome of a child that did not start."""
    failure = start_failure(live.sandbox_id, error)
    if not isinstance(failure, ForkpointError):
        log.error("child %s did not start", live.sandbox_id, exc_info=error)
        failure = ForkpointError(Reason.INTERNAL, f"child {live.sandbox_id} did not start: {error}")
    return _Outcome(index, live, problem=failure.problem)


def new_fork(spec: ForkSpec, snapshot_id: str, *, branch_id: str | None) -> ForkRow:
    """A fork as it is admitted: every child's id is fixed."""
    fork_id = spec.fork_id or new_id("fork")
    return ForkRow(
        fork_id=fork_id,
        snapshot_id=snapshot_id,
        sequence=1,
        stage=ForkStage.QUEUED,
        spec=replace(spec, fork_id=fork_id),
        children=tuple(ForkChild(f"{fork_id}-{index}") for index in range(spec.count)),
        create_time=now(),
        branch_id=branch_id,
    )
