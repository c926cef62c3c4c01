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


class Counter:
    """How many are at work, and when none is."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """One at work."""
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()

    async def idle(self) -> None:
        """Returns when none is at work."""
        await self._none.wait()


class Gate:
    """Shared by all calls of one server."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.stopping = asyncio.Event()
        self.calls = Counter()
        """Unary calls at work."""
        self.streams = Counter()
        """Streams that have not ended yet."""
        self._scopes: set[asyncio.Timeout] = set()

    def drain(self) -> None:
        """Refuses new work from now on and ends the streams. Idempotent."""
        self.draining.set()
        present = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(present)
        self._scopes.clear()

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
        """The body of a unary call. SERVER_DRAINING once the server stops."""
        if self.stopping.is_set():
            raise _draining()
        with self.calls.one():
            yield

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[None]:
        """The body of a stream: a drain cancels it, and SERVER_DRAINING takes the cancel's place.

        `asyncio.Timeout` tells the drain's cancel from the client's, also when both come at once:
        the client's goes on as the CancelledError it is.
        """
        self.must_be_open()
        scope = asyncio.timeout(None)
        try:
            with self.streams.one():
                async with scope:
                    self._scopes.add(scope)
                    yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise _draining() from None
        finally:
            self._scopes.discard(scope)


def _draining() -> ForkpointError:
    return ForkpointError(
        Reason.SERVER_DRAINING,
        "the server is going down: what was admitted is finished or told after its restart; "
        "ask again then",
        retry_after_seconds=RETRY_SECONDS,
    )
