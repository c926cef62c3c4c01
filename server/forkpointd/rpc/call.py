"""One call, as its method sees it: write, read, and how long its caller waits.

A write of gRPC's core can't be taken back: if the task that waits for it is cancelled, the write
goes on, and (when it is the first, with the initial metadata) a status sent meanwhile is refused
with GRPC_CALL_ERROR_TOO_MANY_OPERATIONS, after which the client hears nothing at all. So a write
here is a task of its own, which a cancel of its waiter leaves alone, and the status waits for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from forkpointd.model import ForkpointError, Reason

Context = grpc.aio.ServicerContext[Any, Any]
"""gRPC's own object of a call."""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Bytes that are not the message they should be."""

    message: str


def decoded(request: Any) -> Any:
    """The request; UNDECODABLE_MESSAGE where its bytes were none."""
    if isinstance(request, Undecodable):
        raise ForkpointError(Reason.UNDECODABLE_MESSAGE, request.message)
    return request


class Call:
    """A call at work."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._write: asyncio.Task[None] | None = None

    async def write(self, message: Message) -> None:
        """Sends a response, and waits while flow control holds it back."""
        self._write = asyncio.create_task(self._written(message))
        self._write.add_done_callback(_heard)
        await asyncio.shield(self._write)

    async def next_request(self) -> Any | None:
        """The next message of the client; None once it has closed its half.

        Raises UNDECODABLE_MESSAGE. What is not asked for stays with flow control, so a slow reader
        slows its client down.
        """
        request = await self.context.read()
        return None if request is grpc.aio.EOF else decoded(request)

    def seconds_left(self) -> float | None:
        """Until the caller's deadline; None without one."""
        left: float | None = self.context.time_remaining()
        return left

    async def settled(self) -> None:
        """Returns when no write is under way, so that a status can be sent."""
        if self._write is not None and not self._write.done():
            await asyncio.wait({self._write})

    async def _written(self, message: Message) -> None:
        await self.context.write(message)


def _heard(write: asyncio.Task[None]) -> None:
    """Its waiter may be gone when a write fails since the client is: then that says nothing."""
    if not write.cancelled():
        write.exception()
