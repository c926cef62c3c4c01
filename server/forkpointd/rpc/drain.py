"""The gate: what calls may still begin, and the end of the streams when the server drains.

Its steps go one way: open, draining (nothing new is made, streams end with SERVER_DRAINING),
stopping (also the watches of the server's health end).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from forkpointd.model import ForkpointError, Reason

RETRY_SECONDS = 1.0
"""After which a client may try again: a restart takes about that long."""


class Gate:
    """Shared by all calls of one server."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.stopping = asyncio.Event()
        self._streams: set[asyncio.Timeout] = set()

    @property
    def open_streams(self) -> int:
        """How many streams there are."""
        return len(self._streams)

    def drain(self) -> None:
        """Refuses new work from now on and ends the streams. Idempotent."""
        self.draining.set()
        present = asyncio.get_running_loop().time()
        for stream in self._streams:
            stream.reschedule(present)
        self._streams.clear()

    def stop(self) -> None:
        """Drains, and lets the watches of the health go. Idempotent."""
        self.drain()
        self.stopping.set()

    def must_be_open(self) -> None:
        """Raises SERVER_DRAINING for a call that makes something."""
        if self.draining.is_set():
            raise _draining()

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
