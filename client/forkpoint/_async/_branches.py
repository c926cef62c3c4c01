"""Branches: followed while they run, looked at, cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterable
from typing import Any

from forkpoint import _wire, durations
from forkpoint._async._calls import Calls, Follower
from forkpoint._async._snapshots import Snapshot
from forkpoint._seam import aio as seam
from forkpoint.enums import BranchStage, choose
from forkpoint.errors import ForkpointError
from forkpoint.v1 import branch_pb2
from forkpoint.v1 import sandbox_service_pb2 as messages
from forkpoint.views import BranchUpdate, PauseWindow

_Response = messages.BranchSandboxResponse | messages.WatchBranchResponse

_OVER = frozenset(
    {
        branch_pb2.BRANCH_STAGE_READY,
        branch_pb2.BRANCH_STAGE_FAILED,
        branch_pb2.BRANCH_STAGE_CANCELLED,
    }
)


def follow_branch(
    calls: Calls,
    request: messages.BranchSandboxRequest | str,
    timeout: durations.Duration | None,
) -> Follower[_Response]:
    """Follows a branch: one to be started, or one that runs, by its id."""

    def start(seconds: float | None) -> seam.Stream[_Response]:
        if isinstance(request, str):
            watch = messages.WatchBranchRequest(branch_id=request)
            return calls.sandboxes.WatchBranch(watch, timeout=seconds)
        return calls.sandboxes.BranchSandbox(request, timeout=seconds)

    def again(seen: _Response, seconds: float | None) -> seam.Stream[_Response]:
        watch = messages.WatchBranchRequest(
            branch_id=seen.branch.branch_id, after_sequence=seen.branch.sequence
        )
        return calls.sandboxes.WatchBranch(watch, timeout=seconds)

    def over(seen: _Response) -> bool:
        return seen.branch.stage in _OVER

    return Follower(calls, start, again, over, timeout=timeout)


class Branching:
    """A branch on its way.

    `wait` for the snapshot, or iterate for every update; both raise when it fails. Nothing is sent
    before that. The branch belongs to the server: letting this object go ends the watching, never
    the branch.
    """

    def __init__(
        self,
        calls: Calls,
        request: messages.BranchSandboxRequest | str,
        timeout: durations.Duration | None = None,
    ) -> None:
        self._calls = calls
        self._follower = follow_branch(calls, request, timeout)
        self._last: BranchUpdate | None = None

    def __repr__(self) -> str:
        if self._last is None:
            return "<Branching, not heard of yet>"
        return f"<Branching {self._last.id} {self._last.stage}>"

    @property
    def last(self) -> BranchUpdate | None:
        """The newest update; None before the first."""
        return self._last

    @property
    def id(self) -> str | None:
        """The branch's id; None before the first update."""
        return None if self._last is None else self._last.id

    @property
    def pause(self) -> PauseWindow | None:
        """The pause window; there from RESUMED on."""
        return None if self._last is None else self._last.pause

    @property
    def snapshot(self) -> Snapshot | None:
        """The snapshot, as soon as it is READY."""
        if self._last is None or self._last.snapshot is None:
            return None
        return Snapshot(self._calls, self._last.snapshot)

    async def next(self) -> BranchUpdate | None:
        """The next update; None after the last. Unlike iterating it does not raise a failure."""
        response = await self._follower.next()
        if response is None:
            return None
        self._last = _wire.branch(response.branch)
        return self._last

    async def __aiter__(self) -> AsyncIterator[BranchUpdate]:
        while (update := await self.next()) is not None:
            yield update
        self._raise_failure()

    async def wait(self) -> Snapshot:
        """Waits for the end and returns the snapshot; raises why there is none."""
        while await self.next() is not None:
            pass
        self._raise_failure()
        snapshot = self.snapshot
        if snapshot is None:
            raise ForkpointError("the server says the branch is READY, but names no snapshot")
        return snapshot

    # <async only>
    def __await__(self) -> Generator[Any, None, Snapshot]:
        """The same as `wait`."""
        return self.wait().__await__()

    # </async only>
    def _raise_failure(self) -> None:
        if self._last is not None and self._last.error is not None:
            raise self._last.error

    async def started(self) -> BranchUpdate:
        """Waits until the server has admitted it; raises why it was refused."""
        while self._last is None:
            await self.next()
        return self._last

    async def cancel(self) -> BranchUpdate:
        """Stops it before its window; raises `BranchNotCancellable` from the window on."""
        return await Branches(self._calls).cancel((await self.started()).id)

    def close(self) -> None:
        """Stops watching now. The branch goes on."""
        self._follower.close()


class Branches:
    """The server's branches. They are started by `Sandbox.branch`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def get(self, branch_id: str) -> BranchUpdate:
        """One branch as of now. Raises `BranchNotFound`."""
        response = await self._calls.unary(
            self._calls.sandboxes.GetBranch, messages.GetBranchRequest(branch_id=branch_id)
        )
        return _wire.branch(response.branch)

    async def list(
        self,
        *,
        source: str | None = None,
        stages: Iterable[BranchStage | str] = (),
        page_size: int = 0,
    ) -> AsyncIterator[BranchUpdate]:
        """All branches of this source and in one of these stages, in the order of admission."""
        wanted = [
            _wire.enum_to(branch_pb2.BranchStage, choose(BranchStage, stage)) for stage in stages
        ]
        token = ""
        while True:
            response = await self._calls.unary(
                self._calls.sandboxes.ListBranches,
                messages.ListBranchesRequest(
                    page_size=page_size, page_token=token, sandbox_id=source or "", stages=wanted
                ),
            )
            for message in response.branches:
                yield _wire.branch(message)
            token = response.next_page_token
            if not token:
                return

    def watch(self, branch_id: str, *, timeout: durations.Duration | None = None) -> Branching:
        """Follows a branch from its present state to its end."""
        return Branching(self._calls, branch_id, timeout)

    async def cancel(self, branch_id: str) -> BranchUpdate:
        """Stops a branch before its window; raises `BranchNotCancellable` from the window on."""
        response = await self._calls.unary(
            self._calls.sandboxes.CancelBranch, messages.CancelBranchRequest(branch_id=branch_id)
        )
        return _wire.branch(response.branch)
