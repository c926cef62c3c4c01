"""A bounded queue that can be closed: what lies between a stream and who reads or writes it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from forkpoint._seam import aio as seam

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in order. A full one makes the giver wait, an empty one the taker."""

    def __init__(self, limit: int) -> None:
        self._items: deque[T] = deque()
        self._limit = limit
        self._closed = False
        self._error: Exception | None = None
        self._changed = seam.Condition()

    async def put(self, item: T) -> bool:
        """Adds an item, waiting while there is no room; False when it is closed."""
        async with self._changed:
            while len(self._items) >= self._limit and not self._closed:
                await seam.wait(self._changed, None)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    async def get(self, seconds: float | None = None) -> T | None:
        """Takes an item; None when it is closed and empty. Raises what it was closed with.

        TimeoutError when none came within `seconds`.
        """
        until = None if seconds is None else time.monotonic() + seconds
        async with self._changed:
            while not self._items:
                if self._closed:
                    if self._error is not None:
                        raise self._error
                    return None
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                await seam.wait(self._changed, left)
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    async def close(self, error: Exception | None = None) -> None:
        """Takes nothing more; what is in it can still be taken. The first close counts."""
        async with self._changed:
            if not self._closed:
                self._closed = True
                self._error = error
            self._changed.notify_all()

    async def __aiter__(self) -> AsyncIterator[T]:
        while (item := await self.get()) is not None:
            yield item
