"""SandboxService: the calls of single sandboxes; branches, forks and consoles are mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.model import Sandbox
from forkpointd.rpc import convert, image_paths, orders, pages, scalars
from forkpointd.rpc.branch_service import BranchCalls
from forkpointd.rpc.call import Call
from forkpointd.rpc.console_service import ConsoleCalls
from forkpointd.rpc.fork_service import ForkCalls
from forkpointd.rpc.ports import BranchPort, ConsolePort, ForkPort, Position, SandboxPort
from forkpointd.rpc.rules import Limits
from forkpointd.rpc.validation import check


class SandboxService(BranchCalls, ForkCalls, ConsoleCalls):
    """Sandboxes, their branches, forks and consoles."""

    def __init__(
        self,
        *,
        sandboxes: SandboxPort,
        branches: BranchPort,
        forks: ForkPort,
        consoles: ConsolePort,
        limits: Limits,
        image_roots: Sequence[Path],
    ) -> None:
        self._sandboxes = sandboxes
        self._branches = branches
        self._forks = forks
        self._consoles = consoles
        self._limits = limits
        self._image_roots = tuple(image_roots)

    async def CreateSandbox(
        self, request: pb.CreateSandboxRequest, _: Call
    ) -> pb.CreateSandboxResponse:
        """Makes a sandbox. The client's leaving ends this call, not the making."""
        named = image_paths.named_files(request.boot)
        files, unusable = await image_paths.resolve_all(named, self._image_roots)
        check(request, self._limits, *unusable)
        made = await self._sandboxes.create(orders.create_order(request, files))
        return pb.CreateSandboxResponse(sandbox=convert.sandbox(made))

    async def GetSandbox(self, request: pb.GetSandboxRequest, _: Call) -> pb.GetSandboxResponse:
        """One sandbox."""
        check(request, self._limits)
        found = convert.sandbox(await self._sandboxes.get(request.sandbox_id))
        if memory := await self._sandboxes.memory_of(request.sandbox_id):
            found.memory.CopyFrom(convert.sandbox_memory(memory))
        return pb.GetSandboxResponse(sandbox=found)

    async def ListSandboxes(
        self, request: pb.ListSandboxesRequest, _: Call
    ) -> pb.ListSandboxesResponse:
        """A page of sandboxes."""
        check(request, self._limits)
        page = await self._sandboxes.list(
            page_size=orders.page_size(request.page_size),
            after=pages.position_of(request.page_token, request),
            labels=dict(request.labels),
            states=frozenset(map(scalars.SANDBOX_STATE.to_model, request.states)),
        )
        sandboxes, token = pages.page_of(page, request, convert.sandbox, _position)
        return pb.ListSandboxesResponse(sandboxes=sandboxes, next_page_token=token)

    async def UpdateSandbox(
        self, request: pb.UpdateSandboxRequest, _: Call
    ) -> pb.UpdateSandboxResponse:
        """Changes labels, ttl or on_expiry."""
        check(request, self._limits)
        changed = await self._sandboxes.update(request.sandbox_id, orders.sandbox_change(request))
        return pb.UpdateSandboxResponse(sandbox=convert.sandbox(changed))

    async def DeleteSandbox(
        self, request: pb.DeleteSandboxRequest, _: Call
    ) -> pb.DeleteSandboxResponse:
        """Ends a sandbox."""
        check(request, self._limits)
        await self._sandboxes.delete(request.sandbox_id)
        return pb.DeleteSandboxResponse()

    async def PauseSandbox(
        self, request: pb.PauseSandboxRequest, _: Call
    ) -> pb.PauseSandboxResponse:
        """Wishes a sandbox PAUSED."""
        check(request, self._limits)
        paused = await self._sandboxes.pause(request.sandbox_id)
        return pb.PauseSandboxResponse(sandbox=convert.sandbox(paused))

    async def ResumeSandbox(
        self, request: pb.ResumeSandboxRequest, _: Call
    ) -> pb.ResumeSandboxResponse:
        """Wishes a sandbox RUNNING."""
        check(request, self._limits)
        resumed = await self._sandboxes.resume(request.sandbox_id)
        return pb.ResumeSandboxResponse(sandbox=convert.sandbox(resumed))


def _position(it: Sandbox) -> Position:
    return it.create_time, it.sandbox_id
