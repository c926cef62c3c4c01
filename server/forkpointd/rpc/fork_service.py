"""Forks: the part of SandboxService that starts and follows them."""

from __future__ import annotations

from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.rpc import convert, orders
from forkpointd.rpc.call import Call
from forkpointd.rpc.ports import ForkPort
from forkpointd.rpc.rules import Limits
from forkpointd.rpc.validation import check
from forkpointd.rpc.watching import released


class ForkCalls:
    """ForkSandboxes, WatchFork, GetFork."""

    _forks: ForkPort
    _limits: Limits

    async def ForkSandboxes(self, request: pb.ForkSandboxesRequest, call: Call) -> None:
        """Admits a fork, then follows it: from there on only the stream can end, not it."""
        check(request, self._limits)
        fork = await self._forks.start(orders.fork_order(request))
        messages = convert.ForkMessages()
        async with released(self._forks.watch(fork.fork_id, 0)) as forks:
            async for each in forks:
                await call.write(pb.ForkSandboxesResponse(fork=messages.message(each)))

    async def WatchFork(self, request: pb.WatchForkRequest, call: Call) -> None:
        """Follows a fork to its end."""
        check(request, self._limits)
        watch = self._forks.watch(request.fork_id, request.after_sequence)
        messages = convert.ForkMessages()
        async with released(watch) as forks:
            async for each in forks:
                await call.write(pb.WatchForkResponse(fork=messages.message(each)))

    async def GetFork(self, request: pb.GetForkRequest, _: Call) -> pb.GetForkResponse:
        """One fork."""
        check(request, self._limits)
        return pb.GetForkResponse(fork=convert.fork(await self._forks.get(request.fork_id)))
