"""Consoles: the part of SandboxService that reads and writes them.

Many read, one writes. Whoever is the writer gives the console free in every case: at the end of its
input, of the output, of the call, or of the server.
"""

from __future__ import annotations

import asyncio
from contextlib import closing

from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.model import FieldViolation, ForkpointError, Reason
from forkpointd.rpc.call import Call
from forkpointd.rpc.ports import ConsolePort, ConsoleWriter
from forkpointd.rpc.rules import Limits
from forkpointd.rpc.status import invalid_fields
from forkpointd.rpc.validation import check
from forkpointd.rpc.watching import released

WRITE_WAIT_SECONDS = 2.0
"""How long WriteConsole waits for a guest that does not read."""

_SANDBOX_ENDED = frozenset(
    {Reason.SANDBOX_NOT_RUNNING, Reason.SANDBOX_DELETED, Reason.SANDBOX_NOT_FOUND}
)


class ConsoleCalls:
    """AttachConsole, ReadConsole, WriteConsole."""

    _consoles: ConsolePort
    _limits: Limits

    async def AttachConsole(self, call: Call) -> None:
        """Output until the sandbox ends; input until the client closes its half."""
        attach = await self._attach_message(call)
        if attach.read_only:
            await self._attached(attach, None, call)
            return
        with closing(await self._consoles.writer(attach.sandbox_id)) as writer:
            await self._attached(attach, writer, call)

    async def ReadConsole(self, request: pb.ReadConsoleRequest, call: Call) -> None:
        """Output from the oldest byte on, or from where the client says."""
        check(request, self._limits)
        first, end = await self._consoles.bounds(request.sandbox_id)
        start = _start(request, first, end, default=first)
        output = self._consoles.read(request.sandbox_id, start, follow=request.follow)
        async with released(output) as chunks:
            async for offset, data in chunks:
                await call.write(pb.ReadConsoleResponse(offset=offset, data=data))

    async def WriteConsole(
        self, request: pb.WriteConsoleRequest, call: Call
    ) -> pb.WriteConsoleResponse:
        """Input in one piece: all of it, or CONSOLE_FULL with what was taken."""
        check(request, self._limits)
        with closing(await self._consoles.writer(request.sandbox_id)) as writer:
            _, end = await self._consoles.bounds(request.sandbox_id)
            accepted = await writer.try_write(request.data, _write_wait(call))
        if accepted < len(request.data):
            raise ForkpointError(
                Reason.CONSOLE_FULL,
                f"the guest does not read its console: it took {accepted} of "
                f"{len(request.data)} bytes; send the rest when it reads again",
                metadata={"accepted_bytes": str(accepted)},
            )
        return pb.WriteConsoleResponse(accepted_bytes=accepted, offset=end)

    async def _attach_message(self, call: Call) -> pb.ConsoleAttach:
        request: pb.AttachConsoleRequest | None = await call.next_request()
        if request is None or request.WhichOneof("message") == "input":
            raise _invalid("attach", "must be the first message")
        check(request, self._limits)
        return request.attach

    async def _attached(
        self,
        attach: pb.ConsoleAttach,
        writer: ConsoleWriter | None,
        call: Call,
    ) -> None:
        first, end = await self._consoles.bounds(attach.sandbox_id)
        start = _start(attach, first, end, default=end)
        await call.write(pb.AttachConsoleResponse(offset=start))
        output = asyncio.create_task(self._show(attach.sandbox_id, start, call))
        feeding = asyncio.create_task(self._feed(writer, call))
        try:
            await asyncio.wait({output, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()  # raises what was wrong with the input; else its half is closed
            await output
        finally:
            output.cancel()
            feeding.cancel()
            await asyncio.gather(output, feeding, return_exceptions=True)

    async def _show(self, sandbox_id: str, start: int, call: Call) -> None:
        async with released(self._consoles.read(sandbox_id, start, follow=True)) as chunks:
            async for offset, data in chunks:
                await call.write(pb.AttachConsoleResponse(offset=offset, data=data))

    async def _feed(self, writer: ConsoleWriter | None, call: Call) -> None:
        """Hands input over until the client closes its half, then gives the console free.

        The next message is read when the guest has taken the one before: a guest that does not
        read stops its client by flow control, and nothing piles up here.
        """
        while (request := await call.next_request()) is not None:
            check(request, self._limits)
            if request.WhichOneof("message") != "input":
                raise _invalid("attach", "is the first message only: open a call for another one")
            if writer is None:
                raise _invalid("input", "this call attached with read_only")
            try:
                await writer.write(request.input)
            except ForkpointError as error:
                if error.reason not in _SANDBOX_ENDED:
                    raise
                break  # the output's end is the call's end
        if writer is not None:
            writer.close()


def _start(
    request: pb.ConsoleAttach | pb.ReadConsoleRequest, first: int, end: int, *, default: int
) -> int:
    """The offset to read from; CONSOLE_OFFSET where there is nothing (any more, or yet)."""
    match request.WhichOneof("start"):
        case "tail_bytes":
            return max(first, end - request.tail_bytes)
        case "from_offset":
            if first <= request.from_offset <= end:
                return request.from_offset
            raise ForkpointError(
                Reason.CONSOLE_OFFSET,
                f"offset {request.from_offset} is not there: this console has {first} to {end}",
                metadata={"first_offset": str(first), "end_offset": str(end)},
            )
    return default


def _write_wait(call: Call) -> float:
    """Less than the caller's own deadline, so that it learns how much was taken."""
    left = call.seconds_left()
    return WRITE_WAIT_SECONDS if left is None else min(WRITE_WAIT_SECONDS, left / 2)


def _invalid(field: str, words: str) -> ForkpointError:
    return invalid_fields((FieldViolation(field, words),))
