"""Branches: the part of SandboxService that starts, follows and stops them."""

from __future__ import annotations

from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.model import BranchView
from forkpointd.rpc import convert, orders, pages, scalars
from forkpointd.rpc.call import Call
from forkpointd.rpc.ports import BranchPort, Position
from forkpointd.rpc.rules import Limits
from forkpointd.rpc.validation import check
from forkpointd.rpc.watching import released


class BranchCalls:
    """BranchSandbox, WatchBranch, GetBranch, ListBranches, CancelBranch."""

    _branches: BranchPort
    _limits: Limits

    async def BranchSandbox(self, request: pb.BranchSandboxRequest, call: Call) -> None:
        """Admits a branch, then follows it: from there on only the stream can end, not it."""
        check(request, self._limits)
        branch = await self._branches.start(orders.branch_order(request))
        forks = convert.ForkMessages()
        async with released(self._branches.watch(branch.branch_id, 0)) as views:
            async for view in views:
                await call.write(pb.BranchSandboxResponse(branch=convert.branch(view, forks)))

    async def WatchBranch(self, request: pb.WatchBranchRequest, call: Call) -> None:
        """Follows a branch to its end."""
        check(request, self._limits)
        watch = self._branches.watch(request.branch_id, request.after_sequence)
        forks = convert.ForkMessages()
        async with released(watch) as views:
            async for view in views:
                await call.write(pb.WatchBranchResponse(branch=convert.branch(view, forks)))

    async def GetBranch(self, request: pb.GetBranchRequest, _: Call) -> pb.GetBranchResponse:
        """One branch."""
        check(request, self._limits)
        view = await self._branches.get(request.branch_id)
        return pb.GetBranchResponse(branch=convert.branch(view))

    async def ListBranches(
        self, request: pb.ListBranchesRequest, _: Call
    ) -> pb.ListBranchesResponse:
        """A page of branches."""
        check(request, self._limits)
        page = await self._branches.list(
            page_size=orders.page_size(request.page_size),
            after=pages.position_of(request.page_token, request),
            sandbox_id=request.sandbox_id or None,
            stages=frozenset(map(scalars.BRANCH_STAGE.to_model, request.stages)),
        )
        branches, token = pages.page_of(page, request, convert.branch, _position)
        return pb.ListBranchesResponse(branches=branches, next_page_token=token)

    async def CancelBranch(
        self, request: pb.CancelBranchRequest, _: Call
    ) -> pb.CancelBranchResponse:
        """Stops a branch before its window."""
        check(request, self._limits)
        view = await self._branches.cancel(request.branch_id)
        return pb.CancelBranchResponse(branch=convert.branch(view))


def _position(view: BranchView) -> Position:
    return view.branch.create_time, view.branch.branch_id
