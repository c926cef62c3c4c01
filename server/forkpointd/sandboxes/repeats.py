"""Calls that make something, safe to repeat by their request_id.

A repeat joins the call that still runs; after it, the registry knows what it made, also across
restarts (it is remembered in the same transaction as the thing made). A call that was refused
before it had an effect leaves nothing to be remembered, so its repeat is a new call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from forkpointd.model import RequestKey
from forkpointd.registry import Registry, RequestSeen
from forkpointd.sandboxes.tasks import Tasks

T = TypeVar("T")


class Repeats(Generic[T]):
    """The calls of one kind that are under way."""

    def __init__(self, registry: Registry, tasks: Tasks) -> None:
        self._registry = registry
        self._tasks = tasks
        self._running: dict[str, tuple[RequestKey, asyncio.Task[T]]] = {}

    async def run(
        self,
        request: RequestKey | None,
        make: Callable[[], Coroutine[Any, Any, T]],
        find: Callable[[str], Awaitable[T]],
        name: str,
    ) -> T:
        """What `make` makes, or made, or is making for the same request; `find` gets it by the id
        of the resource. Goes on when its caller leaves. Raises REQUEST_ID_REUSED."""
        if request is None:
            return await self._tasks.run(make(), name)
        running = self._running.get(request.request_id)
        if running is None:
            task = self._tasks.start(self._make_or_find(request, make, find), name)
            self._running[request.request_id] = (request, task)
            task.add_done_callback(lambda _: self._running.pop(request.request_id))
        else:
            request.check(running[0])
            task = running[1]
        return await asyncio.shield(task)

    async def _make_or_find(
        self,
        request: RequestKey,
        make: Callable[[], Coroutine[Any, Any, T]],
        find: Callable[[str], Awaitable[T]],
    ) -> T:
        remembered = await self._registry.find_request(request.request_id)
        if remembered is None:
            try:
                return await make()
            except RequestSeen as seen:
                remembered = seen.remembered
        request.check(remembered)
        return await find(remembered.resource_id)
