# Made of client/forkpoint/_async/_forks.py by tools/unasync_client.py: never edit.
"""Forks: children of a sandbox or a snapshot, handed out as they become ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType

from forkpoint import _wire, durations
from forkpoint._seam import blocking as seam
from forkpoint._sync._branches import Branches, follow_branch
from forkpoint._sync._calls import Calls, Follower
from forkpoint._sync._sandboxes import Sandbox, Sandboxes
from forkpoint._sync._snapshots import Snapshot, Snapshots
from forkpoint.enums import ForkChildState
from forkpoint.errors import BranchNotCancellable, ForkpointError, SandboxNotFound
from forkpoint.v1 import fork_pb2
from forkpoint.v1 import sandbox_service_pb2 as messages
from forkpoint.views import BranchUpdate, ForkChild, ForkUpdate, PauseWindow

_BranchResponse = messages.BranchSandboxResponse | messages.WatchBranchResponse
_ForkResponse = messages.ForkSandboxesResponse | messages.WatchForkResponse

_OVER = frozenset({fork_pb2.FORK_STAGE_READY, fork_pb2.FORK_STAGE_FAILED})

_CLEANUP_SECONDS = 60.0
"""How long leaving a block waits for children that are still being started."""


def follow_fork(
    calls: Calls,
    request: messages.ForkSandboxesRequest | str,
    timeout: durations.Duration | None,
) -> Follower[_ForkResponse]:
    """Follows a fork: one to be started, or one that runs, by its id."""

    def start(seconds: float | None) -> seam.Stream[_ForkResponse]:
        if isinstance(request, str):
            return calls.sandboxes.WatchFork(
                messages.WatchForkRequest(fork_id=request), timeout=seconds
            )
        return calls.sandboxes.ForkSandboxes(request, timeout=seconds)

    def again(seen: _ForkResponse, seconds: float | None) -> seam.Stream[_ForkResponse]:
        watch = messages.WatchForkRequest(
            fork_id=seen.fork.fork_id, after_sequence=seen.fork.sequence
        )
        return calls.sandboxes.WatchFork(watch, timeout=seconds)

    def over(seen: _ForkResponse) -> bool:
        return seen.fork.stage in _OVER

    return Follower(calls, start, again, over, timeout=timeout)


class Children:
    """The children of one fork. Made by `Sandbox.fork` and `Snapshot.fork`.

        with source.fork(10, ttl="10m") as children:
            for child in children:
                ...

    Entering waits until the server has admitted the fork, and raises why it was refused.
    Iterating hands out the good children as they become ready, each a `Sandbox`; what did not
    start is in `failed`, or raised as an ExceptionGroup with `strict=True`. It raises when the
    branch itself fails.
    Leaving deletes the children, and the snapshot that was made for them, unless `keep` was
    called. Should this process die instead, the children live until their `ttl`.
    """

    def __init__(
        self,
        calls: Calls,
        *,
        branching: Follower[_BranchResponse] | None = None,
        forking: Follower[_ForkResponse] | None = None,
        strict: bool = False,
    ) -> None:
        self._calls = calls
        self._branching = branching
        self._forking = forking
        self._strict = strict
        self._branch: BranchUpdate | None = None
        self._fork: ForkUpdate | None = None
        self._snapshot: Snapshot | None = None
        self._ready: list[Sandbox] = []
        self._vanished: dict[str, ForkpointError] = {}
        self._kept = False
        self._kept_snapshot = branching is None
        self._turn = seam.Lock()

    @classmethod
    def of_sandbox(
        cls,
        calls: Calls,
        request: messages.BranchSandboxRequest,
        *,
        strict: bool,
        timeout: durations.Duration | None,
    ) -> Children:
        """Children of a branch to be made; its snapshot is temporary."""
        return cls(calls, branching=follow_branch(calls, request, timeout), strict=strict)

    @classmethod
    def of_snapshot(
        cls,
        calls: Calls,
        request: messages.ForkSandboxesRequest,
        *,
        strict: bool,
        timeout: durations.Duration | None,
    ) -> Children:
        """Children of a snapshot that is there, and stays."""
        return cls(calls, forking=follow_fork(calls, request, timeout), strict=strict)

    def __repr__(self) -> str:
        if self._fork is None:
            return "<Children, not heard of yet>"
        fork = self._fork
        return f"<Children of {fork.id}: {fork.ready_count} of {fork.count} ready>"

    @property
    def branch(self) -> BranchUpdate | None:
        """The branch the fork is part of, as of the last update; None for `Snapshot.fork`."""
        return self._branch

    @property
    def fork(self) -> ForkUpdate | None:
        """The fork as of the last update."""
        return self._fork

    @property
    def pause(self) -> PauseWindow | None:
        """How long the source stood still; None before, and for `Snapshot.fork`."""
        return None if self._branch is None else self._branch.pause

    @property
    def snapshot(self) -> Snapshot | None:
        """What the children start from; None before it is READY."""
        return self._snapshot

    @property
    def ready(self) -> list[Sandbox]:
        """The good children so far."""
        return list(self._ready)

    @property
    def failed(self) -> list[ForkChild]:
        """The children so far that did not start, or ended at once; `error` says why."""
        children = () if self._fork is None else self._fork.children
        failed = [child for child in children if child.state is ForkChildState.FAILED]
        failed += [
            ForkChild(child_id, ForkChildState.FAILED, error)
            for child_id, error in self._vanished.items()
        ]
        return failed

    def keep(self, *, snapshot: bool = True) -> None:
        """Leaves the children where they are when the block ends, and by default the snapshot."""
        self._kept = True
        self._kept_snapshot = self._kept_snapshot or snapshot

    def __enter__(self) -> Children:
        try:
            self.next()
        except ForkpointError:
            raise
        except BaseException:
            # Interrupted while the server may have admitted it already: join it, which its
            # request_id makes the same call, to take it back.
            with suppress(ForkpointError):
                self.next()
                self._clean_up()
            raise
        return self

    def __iter__(self) -> Iterator[Sandbox]:
        given = 0
        while True:
            while given < len(self._ready):
                given += 1
                yield self._ready[given - 1]
            if self.next() is None:
                break
        if given == len(self._ready):
            self._raise_failure()

    def wait(self) -> list[Sandbox]:
        """Waits until every child has its outcome, and returns the good ones."""
        while self.next() is not None:
            pass
        self._raise_failure()
        return self.ready

    def next(self) -> ForkUpdate | BranchUpdate | None:
        """The next update, of the branch where there is one; None after the last."""
        with self._turn:
            update = self._next_update()
            if update is not None and self._fork is not None:
                self._meet_children(self._fork)
            return update

    def _next_update(self) -> ForkUpdate | BranchUpdate | None:
        if self._branching is not None:
            response = self._branching.next()
            if response is None:
                return None
            self._branch = _wire.branch(response.branch)
            self._fork = self._branch.fork
            if self._snapshot is None and self._branch.snapshot is not None:
                self._snapshot = Snapshot(self._calls, self._branch.snapshot)
            return self._branch
        assert self._forking is not None
        answer = self._forking.next()
        if answer is None:
            return None
        self._fork = _wire.fork(answer.fork)
        if self._snapshot is None:
            self._snapshot = Snapshots(self._calls).get(self._fork.snapshot_id)
        return self._fork

    def _meet_children(self, fork: ForkUpdate) -> None:
        """Looks at each child that has become ready since the last update."""
        met = {child.id for child in self._ready} | self._vanished.keys()
        for child in fork.children:
            if child.state is ForkChildState.READY and child.id not in met:
                try:
                    self._ready.append(Sandboxes(self._calls).get(child.id))
                except SandboxNotFound as error:  # deleted, or expired, as soon as it ran
                    self._vanished[child.id] = error

    def _raise_failure(self) -> None:
        for update in (self._branch, self._fork):
            if update is not None and update.error is not None:
                raise update.error
        errors = [child.error for child in self.failed if child.error is not None]
        if self._strict and errors and self._fork is not None:
            raise ExceptionGroup(
                f"{len(errors)} of {self._fork.count} children did not start", errors
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        missed: ExceptionGroup[ForkpointError] | None = None
        try:
            if kind is None and self._strict:
                self.wait()
        finally:
            missed = self._clean_up()
            if missed is not None and error is not None:
                error.add_note(f"and cleaning up failed: {missed.exceptions[0]}")
        if missed is not None and error is None:
            raise missed

    def _clean_up(self) -> ExceptionGroup[ForkpointError] | None:
        """Leaves nothing behind that isn't kept; returns what could not be cleaned up."""
        failures: list[ForkpointError] = []
        if not self._kept:
            try:
                self._await_outcome()
            except ForkpointError as error:
                failures.append(error)
        self._stop_following()
        if not self._kept and self._fork is not None:
            sandboxes = Sandboxes(self._calls)
            jobs = [sandboxes.deletion(child.id) for child in self._fork.children]
            for outcome in seam.gather(jobs):
                if isinstance(outcome, ForkpointError):
                    failures.append(outcome)
                elif isinstance(outcome, Exception):
                    raise outcome
        if not self._kept_snapshot:
            try:
                self._delete_snapshot()
            except ForkpointError as error:
                failures.append(error)
        return ExceptionGroup("the fork could not be cleaned up", failures) if failures else None

    def _await_outcome(self) -> None:
        """Sees to it that no child appears after the others were deleted."""
        if self._fork is None or self._fork.stage.over:
            return
        if self._branch is not None:
            if self._branch.stage.over:
                return
            with suppress(BranchNotCancellable):  # too late: its children come, wait for them
                Branches(self._calls).cancel(self._branch.id)
        self._stop_following()
        watch = follow_fork(self._calls, self._fork.id, _CLEANUP_SECONDS)
        while (response := watch.next()) is not None:
            self._fork = _wire.fork(response.fork)

    def _delete_snapshot(self) -> None:
        """Deletes the temporary snapshot, where the branch came so far."""
        if self._branch is None:
            return
        if self._snapshot is None and not self._branch.stage.over:
            watch = follow_branch(self._calls, self._branch.id, _CLEANUP_SECONDS)
            while (response := watch.next()) is not None:
                self._branch = _wire.branch(response.branch)
        if self._branch.snapshot is not None:
            Snapshots(self._calls).delete(self._branch.snapshot_id, missing_ok=True)

    def _stop_following(self) -> None:
        for follower in (self._branching, self._forking):
            if follower is not None:
                follower.close()


class Forks:
    """The server's forks. They are started by `Sandbox.fork` and `Snapshot.fork`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def get(self, fork_id: str) -> ForkUpdate:
        """One fork as of now. Raises `ForkNotFound`."""
        response = self._calls.unary(
            self._calls.sandboxes.GetFork, messages.GetForkRequest(fork_id=fork_id)
        )
        return _wire.fork(response.fork)

    def watch(
        self, fork_id: str, *, timeout: durations.Duration | None = None
    ) -> Iterator[ForkUpdate]:
        """Follows a fork from its present state to its end."""
        follower = follow_fork(self._calls, fork_id, timeout)
        try:
            while (response := follower.next()) is not None:
                yield _wire.fork(response.fork)
        finally:
            follower.close()
