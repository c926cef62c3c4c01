"""Work that belongs to the server: no caller's leaving ends it, and no failure of it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class Tasks:
    """The tasks of one part of the server."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts work whose outcome somebody awaits."""
        task = asyncio.create_task(work, name=f"{self._name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start_unwatched(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts work that nobody awaits: an exception that leaves it is logged."""
        task = self.start(work, name)
        task.add_done_callback(_log_failure)
        return task

    async def run(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Runs work to its end even if the caller is cancelled while waiting for it."""
        task = self.start(work, name)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                task.add_done_callback(_log_failure)
            raise

    async def wait(self, seconds: float) -> int:
        """Waits for all work at most so long; returns how many are still at it."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        return len(self._tasks)

    async def cancel(self) -> None:
        """Cancels what is still at work and waits until it has left."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def drain_tasks(parts: Iterable[Tasks], seconds: float) -> int:
    """Waits for the work of several parts, which may start more in each other, at most so long in
    all; returns how much is still under way."""
    parts = tuple(parts)
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while any(len(part) for part in parts) and loop.time() < until:
        for part in parts:
            await part.wait(max(0.0, until - loop.time()))
    return sum(len(part) for part in parts)


def _log_failure(task: asyncio.Task[Any]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is not None:
        log.error("%s failed", task.get_name(), exc_info=error)
