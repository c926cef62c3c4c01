"""The gate: what calls may still begin, and the end of the streams when the server drains.

Its steps go one way: open, draining (nothing new is made, streams end with SERVER_DRAINING),
stopping (no call begins, and the watches of the server's health end too).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from forkpointd.model import ForkpointError, Reason

RETRY_SECONDS = 1.0
"""After which a client may try again: a restart takes about that long."""


class Gate:
    """Shared by all calls of one server."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.stopping = asyncio.Event()
        self._streams: set[asyncio.Timeout] = set()
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Refuses new work from now on and ends the streams. Idempotent."""
        self.draining.set()
        present = asyncio.get_running_loop().time()
        for stream in self._streams:
            stream.reschedule(present)
        self._streams.clear()

    def stop(self) -> None:
        """Drains, refuses every call from now on, and lets the watches of the health go.
        Idempotent."""
        self.drain()
        self.stopping.set()

    def must_be_open(self) -> None:
        """Raises SERVER_DRAINING for a call that makes something."""
        if self.draining.is_set():
            raise _draining()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call at work. SERVER_DRAINING once the server stops."""
        if self.stopping.is_set():
            raise _draining()
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is at work."""
        await self._idle.wait()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        """The body of a stream: a drain cancels it, and SERVER_DRAINING takes the cancel's place.

        `asyncio.Timeout` tells the drain's cancel from the client's, also when both come at once:
        the client's goes on as the CancelledError it is.
        """
        self.must_be_open()
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._streams.add(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise _draining() from None
        finally:
            self._streams.discard(scope)


def _draining() -> ForkpointError:
    return ForkpointError(
        Reason.SERVER_DRAINING,
        "the server is going down: what was admitted is finished or told after its restart; "
        "ask again then",
        retry_after_seconds=RETRY_SECONDS,
    )
